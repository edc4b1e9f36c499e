"""The HTML pages in headless Chromium: axe-core's rules, light and dark, and the width of a phone.

Needs Chromium on the PATH, and axe-core: npm install --prefix tests/pages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_compare import comparison  # noqa: F401  (a fixture)

from triton_repo import report
from triton_repo.compare import Comparison

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
AXE = Path(__file__).parent / "pages" / "node_modules" / "axe-core" / "axe.min.js"
SCHEMES = {"light": 1, "dark": 0}  # Blink's numbers
CHECK = """
<pre id="told"></pre>
<script>
addEventListener("load", async () => {
  const found = await axe.run(document.querySelector("main"));
  const root = document.documentElement;
  document.getElementById("told").textContent = JSON.stringify({
    violations: found.violations.map(x => [x.id, x.impact, x.nodes.map(n => n.html.slice(0, 120))]),
    passes: found.passes.length,
    overflow: root.scrollWidth - root.clientWidth,
    width: root.clientWidth,
    background: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").length,
  });
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    if not AXE.is_file():
        pytest.skip("no axe-core here; npm install --prefix tests/pages")
    return found


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    output = tmp_path_factory.mktemp("pages") / "report"
    report.write_report(comparison, output)
    return output / "report.html"


def opened(browser: str, page: Path, scheme: str, width: int) -> dict[str, Any]:
    """What the checks tell of a page in a window of that width."""
    checked = page.with_name(f"checked-{scheme}-{width}.html")
    script = f"<script>{AXE.read_text(encoding='utf-8')}</script>{CHECK}"
    inner = page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>")
    checked.write_text(inner, encoding="utf-8")
    frame = page.with_name(f"frame-{scheme}-{width}.html")
    frame.write_text(f'<iframe src="{checked.name}" width="{width}" height="1200" style="border:0"></iframe>')
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--virtual-time-budget=20000"]
    options += [f"--window-size={max(width, 600)},1300", f"--user-data-dir={page.parent / 'profile'}"]
    reads = (
        "<script>addEventListener('load', () => setInterval(() => {"
        "const told = document.querySelector('iframe').contentDocument.getElementById('told');"
        "document.title = told.textContent; }, 50));</script>"
    )
    frame.write_text(frame.read_text() + reads)
    told = subprocess.run(
        [browser, *options, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(page.parent)},
    )
    title = re.search(r"<title>(.+?)</title>", told.stdout, re.DOTALL)
    assert title, told.stderr[-2000:]
    import html

    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_comparison_is_readable_for_everybody(browser: str, page: Path, scheme: str, width: int) -> None:
    told = opened(browser, page, scheme, width)
    assert told["violations"] == []
    assert told["passes"] > 10
    assert width - 20 <= told["width"] <= width  # a scroll bar
    assert told["overflow"] <= 0
    assert told["requests"] == 0
    light = [int(x) > 127 for x in re.findall(r"\d+", told["background"])[:3]]
    assert light == [scheme == "light"] * 3
