"""The models that need no download: a config.json each, and what FFN Fusion does to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parent / "shapes"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """`groups` are written for TP 8, where TensorRT takes a fused gate and up weight of that width.

    `origin` says where layers and groups come from. Layer numbers are those of the config.
    """

    name: str
    drop_attention: str | None = None
    groups: tuple[str, ...]
    origin: str

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.name}.json"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-3.1-8b",
            drop_attention="17-28",
            groups=("17-27",),
            origin="the 49B's two long runs, scaled to 32 layers; for latency only",
        ),
        Shape(
            name="llama-3.1-70b",
            drop_attention="6,7,11,42-51,53-70",
            groups=("42-50", "53-69"),
            origin="the layers without attention and the groups of the 49B, at full FFN width",
        ),
        Shape(
            name="llama-3.1-405b",
            drop_attention="66-115",
            groups=("66-74", "75-82", "83-90", "91-98", "99-106", "107-114"),
            origin="the 253B's run, at full FFN width; six groups because TensorRT takes nine such FFNs",
        ),
        Shape(
            name="nemotron-super-49b",
            groups=("42-50", "53-69"),
            origin="the published config.json; the groups of arXiv 2503.18908, step 4",
        ),
        Shape(
            name="nemotron-ultra-253b",
            groups=("66-73", "74-85", "86-100", "101-114"),
            origin="the published config.json before its fusion; the groups of arXiv 2503.18908",
        ),
    )
}
