"""The page and the plots of an analysis: what they show, that they load nothing, what they need."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from builder.analysis import page, plots
from builder.analysis.record import (
    Alternative,
    Analysis,
    Baseline,
    Data,
    Dependency,
    Evaluations,
    Explain,
    Fidelity,
    GroupAnalysis,
    Importance,
    LayerAnalysis,
    Window,
)
from builder.analysis.summary import inside, measured_on, sentences
from builder.errors import UserError

SIZE = 8
NONE = Evaluations(dependency=36, dependency_dropped=36, importance=0, alternatives=0, groups=0, statistics=8)


def outcome(kl: float) -> Fidelity:
    return Fidelity(kl=kl, perplexity=10 + kl, top1=1 - kl)


def matrix(scale: float) -> tuple[tuple[float, ...], ...]:
    rng = np.random.default_rng(0)
    return tuple(tuple(row) for row in (np.triu(rng.random((SIZE, SIZE)), 1) * scale).tolist())


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    layers = [
        LayerAnalysis(
            attention=None if i == 7 else Importance(cosine=0.01 * (i + 1), kl=0.1 * (8 - i)),
            ffn=Importance(cosine=0.02, kl=0.05 * (i + 1)),
            block=Importance(cosine=0.03, kl=0.0 if i == 5 else 0.9),
            explain=Explain(input_output=0.1, ratio=0.3, input_contribution=0.95),
            kv_heads=None,
        )
        for i in range(SIZE)
    ]
    group = GroupAnalysis(
        first=3,
        last=5,
        sequential=outcome(0.11),
        fused=outcome(0.1235),
        reversed=outcome(0.13),
        removed=outcome(0.42),
        fused_with_last=outcome(0.2),
    )
    return Analysis(
        model="0" * 64,
        num_layers=SIZE,
        data=Data(files=("text.txt",), samples=4, length=32, seed=7, tokens=128),
        baseline=Baseline(perplexity=12.34),
        layers=tuple(layers),
        alternatives=(
            Alternative(layer=0, part="attention", size=0, kl=0.8),
            Alternative(layer=0, part="attention", size=2, kl=0.0625),
            Alternative(layer=1, part="ffn", size=48, kl=0.0312),
        ),
        planned_drops=(3, 4, 5, 6),
        dependency=Dependency(model=matrix(1.0), dropped=matrix(0.1)),
        windows=(Window(first=0, last=3, max=0.4567, sum=1.2345),),
        groups=(group,),
        evaluations=NONE,
    )


class Page(HTMLParser):
    """The tags, attributes and words of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def report(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page") / "report"
    page.write(analysis, {0: np.ones(4)}, directory, "a <model> & more")
    return directory


def test_the_page_loads_nothing(report: Path) -> None:
    html = (report / page.PAGE).read_text()
    found = Page(html)
    assert found.open == []
    loads = [
        (tag, name, value)
        for tag, name, value in found.attributes
        if tag in ("script", "link", "img", "iframe", "object")
        or (name in ("src", "href", "xlink:href", "srcset") and not value.startswith(("#", "data:")))
    ]
    assert loads == []
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_ids_of_the_figures_are_unlike(report: Path) -> None:
    """Figures share the page, so an id that two have would show one's clip or marker in the other."""
    found = Page((report / page.PAGE).read_text())
    ids = [value for _, name, value in found.attributes if name == "id"]
    used = {v[1:] for _, name, v in found.attributes if name == "xlink:href" and v.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", " ".join(v for _, _, v in found.attributes)))
    assert used <= set(ids)
    assert all(ids.count(name) == 1 for name in used)


def test_the_page_tells_the_figures(report: Path) -> None:
    words = " ".join("".join(Page((report / page.PAGE).read_text()).words).split())
    for figure in (
        "0.1235",
        "0.4200",
        "0.2000",
        "89.0%",
        "12.34",
        "0.4567",
        "1.2345",
        "2: 0.0625",
        "48: 0.0312",
    ):
        assert figure in words, figure
    assert "a <model> & more" in words
    assert "none: 0.8000" in words
    assert "128 tokens: 4 samples of 32, seed 7" in words


def test_without_groups_windows_and_drops(analysis: Analysis, tmp_path: Path) -> None:
    bare = replace(
        analysis,
        groups=(),
        windows=(),
        planned_drops=(),
        alternatives=(),
        dependency=replace(analysis.dependency, dropped=None),
    )
    page.write(bare, {}, tmp_path / "r", "m")
    names = sorted(p.name for p in (tmp_path / "r").glob("*.png"))
    assert names == ["dependency.png", "explain.png", "importance.png"]
    words = "".join(Page((tmp_path / "r" / page.PAGE).read_text()).words)
    assert "one attention less costs 0.2000 nats per token or more" in words


def test_pngs_are_pictures(report: Path) -> None:
    for file in report.glob("*.png"):
        header = file.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
        assert min(width, height) > 200
    assert len(list(report.glob("*.png"))) == 5


def test_the_heat_map_is_the_matrix_on_a_log_scale(analysis: Analysis) -> None:
    from matplotlib.colors import LogNorm

    figure = plots.heat_map(analysis.dependency.model)
    (image,) = figure.axes[0].images
    assert isinstance(image.norm, LogNorm)
    shown = np.ma.filled(image.get_array(), np.nan)
    expected = np.array(analysis.dependency.model)
    above = np.triu_indices(SIZE, 1)
    np.testing.assert_array_equal(shown[above], expected[above])
    assert np.isnan(shown[np.tril_indices(SIZE)]).all()
    assert image.norm.vmax == expected.max()
    _close(figure)


def _close(figure: object) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)


def test_a_matrix_of_zeros_has_a_heat_map(tmp_path: Path) -> None:
    plots.save({"zero": plots.heat_map(((0.0, 0.0), (0.0, 0.0)))}, tmp_path)
    assert (tmp_path / "zero.png").is_file()


def test_the_curves_are_the_record(analysis: Analysis) -> None:
    figure = plots.importance(analysis)
    attention, ffn, block = figure.axes[0].lines
    assert attention.get_xdata().tolist() == list(range(7))
    assert attention.get_ydata().tolist() == [layer.attention.kl for layer in analysis.layers[:7]]
    assert ffn.get_ydata().tolist() == [layer.ffn.kl for layer in analysis.layers]
    assert block.get_ydata()[5] == plots.FLOOR
    assert all(axes.get_yscale() == "log" for axes in figure.axes)
    _close(figure)


def test_group_bars_are_the_record(analysis: Analysis) -> None:
    figure = plots.groups(analysis)
    group = analysis.groups[0]
    widths = {bars.get_label(): bars[0].get_width() for bars in figure.axes[0].containers if len(bars)}
    assert widths == {label: getattr(group, name).kl for name, (label, _) in plots.OUTCOMES.items()}
    _close(figure)


def test_sentences(analysis: Analysis) -> None:
    attention, ffn, group, needed, windows = sentences(analysis)
    assert attention == (
        "Dropping one attention costs 0.2000 to 0.8000 nats per token; cheapest in layer 6 (at most 0.2000), "
        "dearest in layer 0."
    )
    assert ffn.startswith(
        "Dropping one FFN costs 0.0500 to 0.4000 nats per token; cheapest in layers 0-1 (at most"
    )
    assert group == (
        "Fusing 3-5 costs +0.0135 nats per token over the 0.1100 before, removing those FFNs +0.3100, "
        "running them in reversed order +0.0200: fuse them. With the run's last FFN fused too it is +0.0900."
    )
    dropped = np.array(analysis.dependency.dropped)
    assert inside(analysis, 3, 5) == max(dropped[3, 4], dropped[3, 5], dropped[4, 5])
    assert f"The largest dependency is {inside(analysis, 3, 5):.3f} in 3-5." in needed
    model = np.array(analysis.dependency.model)
    means = {i: model[i, i + 1 :].mean() for i in range(SIZE - 1)}
    best = sorted(sorted(means, key=lambda i: -means[i])[:2])
    assert f"depend most on blocks {best[0]} and {best[1]} " in needed
    assert "0-3 is the least dependent (largest entry 0.457)" in windows
    assert measured_on(analysis) == "Perplexity 12.34 on 128 tokens: 4 samples of 32, seed 7."


def test_a_group_that_may_go_is_said_to(analysis: Analysis) -> None:
    group = replace(analysis.groups[0], removed=outcome(0.1), fused_with_last=None)
    told = sentences(replace(analysis, groups=(group,)))[2]
    assert told.endswith("removing them costs no more.")


def test_matplotlib_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is missing; pip install 'ffn-fusion\[report\]'"):
        page.check_output(tmp_path / "r")


def test_a_failed_report_leaves_nothing(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "render", full)
    with pytest.raises(UserError, match="No space left on device; nothing was left there"):
        page.write(analysis, {}, tmp_path / "r", "m")
    assert list(tmp_path.iterdir()) == []
