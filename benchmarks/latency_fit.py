"""Fits the two free constants of the latency model to two published speeds, and shows how firm they are.

`python -m benchmarks.latency_fit` prints them; builder/search/roofline.py has them, rounded to 0.1 us.
Source of the speeds: arXiv 2503.18908, one user, FP8, TP 8 on 8 H100. With a config.json of
Nemotron Super 49B or Ultra 253B, `--nas FILE`, also what the model says of it, to which nothing was fitted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.optimize import root

from builder import huggingface
from builder.architecture import Architecture
from builder.search.gpu import GPUS
from builder.search.roofline import CONSTANTS, Constants, Roofline
from builder.search.setting import Setting
from builder.storage import write_json

SETTING = Setting(gpu=GPUS["h100"], tp_size=8, batch=1, context=2048, dtype="fp8")


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A published speed of one user under SETTING, and the sizes in the model's config.json."""

    name: str
    tokens_per_s: float
    config: dict[str, Any]

    def architecture(self) -> Architecture:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "config.json"
            write_json(file, self.config)
            return huggingface.read_architecture(file)


def llama(*, layers: int, hidden: int, heads: int, width: int) -> dict[str, Any]:
    """The config.json of a large Llama 3."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": width,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }


ANCHORS = (
    Anchor(
        name="Llama-3.1-405B",
        tokens_per_s=41.44,
        config=llama(layers=126, hidden=16384, heads=128, width=53248),
    ),
    Anchor(
        name="Llama-3.3-70B",
        tokens_per_s=94.03,
        config=llama(layers=80, hidden=8192, heads=64, width=28672),
    ),
)


def tokens_per_s(
    architecture: Architecture, constants: Constants = CONSTANTS, setting: Setting = SETTING
) -> float:
    """The estimate for one user."""
    return (
        1 / Roofline(architecture=architecture, setting=setting, constants=constants).step(architecture).total
    )


def fit(start: Constants = CONSTANTS) -> Constants:
    """The constants with which both anchors are met; all but issue_s and kernels_s are `start`'s."""
    models = [anchor.architecture() for anchor in ANCHORS]

    def constants(microseconds: Any) -> Constants:
        issue, kernels = (float(x) * 1e-6 for x in microseconds)
        return replace(start, issue_s=issue, kernels_s=kernels)

    def errors(microseconds: Any) -> list[float]:
        chosen = constants(microseconds)
        speeds = [tokens_per_s(model, chosen) for model in models]
        return [speed / anchor.tokens_per_s - 1 for speed, anchor in zip(speeds, ANCHORS, strict=True)]

    found = root(errors, [start.issue_s * 1e6, start.kernels_s * 1e6])
    if max(map(abs, errors(found.x))) > 1e-6:
        raise ValueError(f"no constants meet both speeds: {found.message}")
    return constants(found.x)


def sensitivity() -> list[dict[str, Any]]:
    """What the fit becomes with other values of the stated constants."""
    rows = []
    for name, values in {
        "memory_efficiency": (0.87, 0.9, 0.93),
        "step_s": (0.5e-3, 1e-3, 2e-3),
        "peer_s": (0.5e-6, 1e-6, 2e-6),
    }.items():
        for value in values:
            fitted = fit(replace(CONSTANTS, **{name: value}))
            rows.append({"constant": name, "value": value, **_fitted(fitted)})
    return rows


def _fitted(constants: Constants) -> dict[str, float]:
    return {"issue_us": constants.issue_s * 1e6, "kernels_us": constants.kernels_s * 1e6}


def unfitted(config: Path) -> dict[str, Any]:
    """The estimate for a model of another kind, and its latency over the first anchor's."""
    seconds, large = (
        1 / tokens_per_s(x) for x in (huggingface.read_architecture(config), ANCHORS[0].architecture())
    )
    return {"config": str(config), "tokens_per_s": 1 / seconds, "faster_than_405B": large / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nas", type=Path, action="append", default=[], help="A config.json; repeatable.")
    given = parser.parse_args()
    anchors = [
        {"model": a.name, "published": a.tokens_per_s, "estimated": tokens_per_s(a.architecture())}
        for a in ANCHORS
    ]
    result = {
        "fitted": _fitted(fit()),
        "anchors": anchors,
        "sensitivity": sensitivity(),
        "unfitted": [unfitted(x) for x in given.nas],
    }
    print(json.dumps(result, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
