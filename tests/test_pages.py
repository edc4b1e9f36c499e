"""The HTML pages in headless Chromium: axe-core's rules, light and dark, on a desktop and a phone, offline.

Needs Chromium on the PATH, and npm ci --prefix tests/pages.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_analysis_report import analysis  # noqa: F401  (a fixture)
from test_compare import comparison, make_rounds, recorded  # noqa: F401  (the first is a fixture)

from builder.analysis import page as analysis_page
from builder.analysis.record import Analysis
from triton_repo import compare, report, words
from triton_repo.compare import Comparison
from triton_repo.history import RATIO, Against, Change
from triton_repo.rounds import SIDES, Ratio, row
from triton_repo.shapes import Shape, shape_rows

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = Path(__file__).parent / "pages"
MODES = [(screen, scheme) for screen in ("desktop", "phone") for scheme in ("light", "dark")]


def rich(comparison: Comparison) -> Comparison:  # noqa: F811
    """Everything that a page can hold."""
    levels = [1, 4]
    rounds = [replace(x, concurrency=level) for level in levels for x in make_rounds(0.5, level)]
    shape = Shape(input_tokens=512, output_tokens=16, prompts=())
    changes = [
        Change(side=side, metric="inter_token_ms", concurrency=1, ratio=x, low=x - 0.03, high=x + 0.03)
        for side, x in zip((*SIDES, RATIO), (1.0, 1.1, 1.1), strict=True)
    ]
    counted = {"requests": 72, "calls": 720, "queue_ms": 0.5, "compute_ms": 2.0, "total_ms": 321.0}
    interval = {"value": 10.0, "low": 9.5, "high": 10.5}
    return replace(
        comparison,
        rows=tuple(row(rounds, metric, level) for level in levels for metric in comparison.metrics),
        settings={**comparison.settings, "concurrency": levels, "command": "ffn-fusion compare-latency a b"},
        server_times={side: {"tensorrt_llm": counted} for side in SIDES},
        by_shape=(shape_rows(shape, make_rounds(0.6)),),
        quality={
            "parent": {"perplexity": interval, "kl": None},
            "fused": {"perplexity": interval, "kl": interval},
        },
        against=Against(file="20260101T000000Z-00.json", changes=tuple(changes), packages=("torch 1 to 2",)),
    )


def recorded_by_a_tool() -> Comparison:
    """Slower, and only percentiles are known."""
    runs = [recorded(side, 12.0 if side == "candidate" else 10.0) for _ in range(6) for side in SIDES]
    settings = {"concurrency": [1], "rounds": 6, "seed": 0}
    return compare.assemble(runs, method="with a tool", how="6 rounds.", settings=settings)


def alike() -> Comparison:
    """Equal sides, unequal work, nothing known but times."""
    rounds = make_rounds(1.0, 3)
    rounds[-1] = replace(rounds[-1], timings=rounds[-1].timings[:1])
    settings = {"concurrency": [1], "rounds": 12, "seed": 0}
    return compare.assemble(rounds, method="through Triton", how="12 rounds.", settings=settings)


@pytest.fixture(scope="module")
def pages(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    made = {"rich": rich(comparison), "tool": recorded_by_a_tool(), "alike": alike()}
    directory = tmp_path_factory.mktemp("pages")
    files = {name: directory / f"{name}.html" for name in made}
    for name, file in files.items():
        file.write_text(report.render(made[name]), encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def analysed(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The page of `analyze`."""
    directory = tmp_path_factory.mktemp("analysis") / "page"
    analysis_page.write(analysis, {0: np.ones(4)}, directory, "a <model> & more")
    return next(directory.glob("*.html")).rename(directory / "analysis.html")


@pytest.fixture(scope="module")
def told(
    pages: dict[str, Path], analysed: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What tests/pages/check.mjs tells of all pages, each with its `pictures`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    if shutil.which("node") is None or not (PAGES / "node_modules" / "playwright-core").is_dir():
        pytest.skip("no playwright-core here; npm ci --prefix tests/pages")
    pictures = tmp_path_factory.mktemp("pictures")
    files = [*pages.values(), analysed]
    command = ["node", str(PAGES / "check.mjs"), browser, str(pictures), *map(str, files)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    assert [(x["screen"], x["scheme"]) for x in found] == MODES * len(files)
    for x in found:
        stem = f"{x['page'].removesuffix('.html')}-{x['screen']}-{x['scheme']}"
        x["pictures"] = {part: pictures / f"{stem}-{part}.png" for part in ("first", "whole")}
    return found


def test_everybody_can_read_them(told: list[dict[str, Any]]) -> None:
    for x in told:
        where = x["page"], x["screen"], x["scheme"]
        assert (*where, x["violations"]) == (*where, [])
        assert x["passes"] > 20


def test_they_load_nothing_and_fit_the_width(told: list[dict[str, Any]]) -> None:
    for x in told:
        assert x["requests"] == []
        assert x["overflow"] <= 0


def test_the_first_screen_has_the_answer_down_to_the_machine(told: list[dict[str, Any]]) -> None:
    assert all(x["answered"] for x in told if x["page"] != "analysis.html")


def test_light_and_dark(told: list[dict[str, Any]]) -> None:
    """Pictures are of the scheme's brightness, and of more than a background."""
    for x in told:
        light = [int(value) > 127 for value in re.findall(r"\d+", x["background"])[:3]]
        assert light == [x["scheme"] == "light"] * 3
        for picture in x["pictures"].values():
            with Image.open(picture) as image:
                grey = np.asarray(image.convert("L"))
            assert (grey.mean() > 127) == (x["scheme"] == "light")
            assert grey.std() > 10


class Page(HTMLParser):
    """Collects ids, references to them and table headers without a scope."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.tags: list[str] = []
        self.unscoped: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = dict(attributes)
        self.tags.append(tag)
        self.ids += [known["id"] or ""] if "id" in known else []
        self.references |= {(v or "")[1:] for k, v in attributes if k in ("xlink:href", "href")}
        for value in known.values():
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
        self.references |= {known["aria-labelledby"] or ""} if "aria-labelledby" in known else set()
        if tag == "th" and "scope" not in known:
            self.unscoped.append(str(attributes))


def test_ids_are_unique_and_whole(pages: dict[str, Path]) -> None:
    for file in pages.values():
        text = file.read_text(encoding="utf-8")
        page = Page(text)
        assert len(page.ids) == len(set(page.ids))
        assert page.references <= set(page.ids)
        assert page.unscoped == []
        assert page.tags.count("caption") == page.tags.count("table") > 0
        assert text.count("<svg") == text.count('role="img" aria-label="') > 0
        assert not re.search(r"#0[1-4]0[1-4]0[1-4]", text)  # all colours are the page's


def test_what_the_pages_say(pages: dict[str, Path]) -> None:
    texts = {name: file.read_text(encoding="utf-8") for name, file in pages.items()}
    assert "No certain difference in latency per token at one client." in texts["alike"]
    assert "no, see the notes" in texts["alike"]
    assert "not measured" in texts["alike"]
    assert "How much slower" in texts["tool"]
    assert "1.20 times slower per token at one client" in texts["tool"]
    assert "outliers, and kept" not in texts["tool"]  # it does not tell them
    rich_text = texts["rich"]
    for said in (
        "times faster per token at one client",
        "perplexity",
        "10.0000 [9.5000, 10.5000]",
        "ratio 1.10 times</dd>",
        "The candidate is slower than in 20260101T000000Z-00.json",
        "The ratio candidate / baseline is larger than in 20260101T000000Z-00.json",
        "inter-token at one client 1.10 times [1.07, 1.13].",
        "Since 20260101T000000Z-00.json: torch 1 to 2.",
        "<td>321</td>",
        "tensorrt_llm",
        "512 in, 16 out",
        "<code>ffn-fusion compare-latency a b</code>",
    ):
        assert said in rich_text
    assert texts["rich"].count("<svg") == 12


def test_every_outlier_that_is_counted_is_drawn(comparison: Comparison) -> None:  # noqa: F811
    from triton_repo import plots

    values = [*np.linspace(1.0, 1.4, 20), 9.0, 12.0]
    odd = replace(comparison, token_gap_ms={"baseline": values, "candidate": values[:20]})
    assert list(plots._outside(np.asarray(values))) == [9.0, 12.0]
    assert "outliers: 2 of the baseline, 0 of the candidate" in plots.spread(odd)
    many = np.linspace(100, 200, 10_000)
    assert 150 < len(plots._thinned(many)) < 401


def test_a_ratio_that_is_none_is_words() -> None:
    nothing = Ratio(value=float("nan"), low=float("nan"), high=float("nan"), differs=False)
    assert words.interval(nothing) == "no ratio"


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from builder.errors import UserError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is missing; pip install 'ffn-fusion\[report\]'"):
        report.check_output(tmp_path / "report")
