"""A matplotlib figure as an SVG element of a page: the page's colours, in light and in dark, and its font."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from builder.errors import UserError

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

# matplotlib draws in these colours, and the page's variables of that name take their place
INK, LINE, BASELINE, CANDIDATE = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "--dim", LINE: "--line", BASELINE: "--baseline", CANDIDATE: "--candidate"}
XLINK = "http://www.w3.org/1999/xlink"
WIDTH = 4.4  # inches; on a page of two columns, and on a phone, its letters are about as large as the text's
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), LINE),
}


def check() -> None:
    """Raise UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("matplotlib is missing; pip install 'ffn-fusion[report]'") from None


def drawn(name: str, label: str, draw: Callable[[Axes], None], *, height: float) -> Markup:
    """The SVG element of what `draw` does to axes, `height` inches high.

    `name` is unique on the page, for the element's ids; `label` says in words what is to be seen.
    """
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    style: Any = STYLE | {"svg.hashsalt": name}  # the keys are typed
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        about: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=about)
    return Markup(_element(buffer.getvalue(), name, label))


def _element(text: str, name: str, label: str) -> str:
    """Without what only a file of its own needs; ids that nothing refers to would be there twice."""
    text = text[text.index("<svg") :].strip()
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"#([\w.-]+)", rf"#{name}-\1", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None, "matplotlib writes it"
    start = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" aria-label="{escape(label)}">'
    )
    return start + text[text.index(">") + 1 :]
