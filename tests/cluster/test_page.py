"""The page on runs in a real browser: Debian's Chromium, which `make test-cluster` installs."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.reporting.test_page import HOSTILE, end, evaluated, write_run
from twinflow_train.reporting import page

ASK = """
<script>
window.alert = () => { window.broken = true; };
addEventListener("error", (event) => { window.failed = String(event.message); }, true);
addEventListener("load", async () => {
  const all = (query) => [...document.querySelectorAll(query)];
  const slider = document.querySelector("input[type=range]");
  const picture = document.querySelector("img.picture");
  const before = picture.src;
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  await picture.decode();
  const chart = document.querySelector("[data-chart=accuracy]");
  const paths = () => chart.querySelectorAll("path").length;
  const shown = paths();
  chart.querySelector("button.off").click();
  const more = paths();
  document.querySelector("#losses input[type=checkbox]").click();
  const said = {
    headings: all("h2").map((node) => node.textContent),
    charts: all("[data-chart]").map((node) => node.dataset.chart),
    drawn: all("[data-chart] svg path").every((node) => !node.getAttribute("d").includes("NaN")),
    lines: [shown, more],
    first: document.querySelector("output").textContent,
    moved: picture.src !== before,
    size: [picture.naturalWidth, picture.naturalHeight],
    rows: all("#results tbody tr").length,
    evaluated: all("#evaluations td").map((node) => node.textContent),
    names: all("#samples h3").map((node) => node.textContent),
    differs: all("#settings .differ td:first-child").map((node) => node.textContent),
    broken: window.broken === true,
    failed: window.failed ?? "",
  };
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
  document.body.append(told);
});
</script>
"""


def browse(path: Path, *words: str) -> str:
    """Open a page in headless Chromium and return what it prints."""
    chromium = shutil.which("chromium")
    assert chromium, "chromium is missing: run `make test-cluster`, which installs it"
    ended = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         f"--user-data-dir={path.parent / 'browser'}", *words, f"file://{path}"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-1000:]
    return ended.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Open a page on two runs, use it, and return what was seen."""
    folder = tmp_path_factory.mktemp("page")
    runs = [
        write_run(folder / "a", name="one", steps=200, seed=0),
        write_run(folder / "b", name=HOSTILE, steps=200, seed=1),
    ]
    end(runs[0])
    Image.new("RGB", (30, 20), "red").save(runs[0] / "samples" / "step-00000000.png")
    page.write(runs, folder / "page.html", evaluations=[evaluated(folder / "geneval")])
    text = (folder / "page.html").read_text()
    (folder / "asked.html").write_text(text.replace("</body>", f"{ASK}</body>"))
    found = re.search(r'<pre id="told">(\S+)</pre>', browse(folder / "asked.html", "--dump-dom"))
    assert found is not None

    said: dict[str, Any] = json.loads(base64.b64decode(found[1]))
    browse(folder / "page.html", "--window-size=1240,1600", f"--screenshot={folder / 'page.png'}")
    return said | {"screenshot": folder / "page.png"}


def test_every_section_and_chart_is_there(told: dict[str, Any]) -> None:
    assert told["failed"] == ""
    assert told["headings"] == [
        "Results", "Evaluations", "Samples", "Quality", "Losses", "Health", "Others", "Settings",
    ]  # fmt: skip
    assert set(told["charts"]) == {"accuracy", "loss/total", "norm/grad", "lr"}
    assert told["drawn"]
    assert told["rows"] == 3
    assert told["differs"][:2] == ["name", "seed"]


def test_the_slider_shows_another_picture(told: dict[str, Any]) -> None:
    assert told["moved"]
    assert told["first"] == "step 0"
    assert told["size"] == [30, 20]


def test_the_legend_shows_what_was_hidden(told: dict[str, Any]) -> None:
    before, after = told["lines"]
    assert after == before + 1


def test_what_runs_are_called_stays_text(told: dict[str, Any]) -> None:
    assert told["names"] == ["one", HOSTILE]
    assert "0.875" in told["evaluated"]
    assert any(HOSTILE[:20] in cell for cell in told["evaluated"])
    assert not told["broken"]


def test_it_looks_like_something(told: dict[str, Any]) -> None:
    with Image.open(told["screenshot"]) as picture:
        colors = picture.convert("RGB").getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 50
