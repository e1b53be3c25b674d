"""The pages in a browser: every chart is drawn, a click shows a point, nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.report import render
from tests.conftest import tiny_model
from tests.contract.test_methods import tiny_task, tiny_tokenizer
from tests.contract.test_nas import NAS

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

LOOK = """<script>
window.failures = [];
window.addEventListener("error", function (event) { window.failures.push(String(event.message)); });
window.addEventListener("load", function () { setTimeout(function () {
  var found = { charts: [], picked: [], loaded: [] };
  performance.getEntriesByType("resource").forEach(function (entry) { found.loaded.push(entry.name); });
  function panel(section) {
    var box = section.querySelector(".picked");
    return { title: box.querySelector("h3").textContent, command: box.querySelector("code").textContent,
             layers: box.querySelectorAll(".layer").length, gone: box.querySelectorAll(".layer.gone").length };
  }
  document.querySelectorAll(".plot").forEach(function (box) {
    var area = box.getBoundingClientRect();
    found.charts.push([box.id, box.querySelectorAll("svg.main-svg").length, area.width > 100 && area.height > 100]);
  });
  document.querySelectorAll("section.front").forEach(function (section) {
    var buttons = section.querySelectorAll("[data-point]");
    var last = Number(buttons[buttons.length - 1].dataset.point);
    section.querySelector(".plot").emit("plotly_click", { points: [{ customdata: last }] });
    var clicked = panel(section);
    buttons[0].click();
    found.picked.push([clicked, panel(section)]);
  });
  found.failures = window.failures;
  document.body.setAttribute("data-found", JSON.stringify(found));
}, 500); });
</script>"""


def look(page: str, folder: Path) -> dict[str, Any]:
    """What a browser makes of a page, after some clicks."""
    (folder / "page.html").write_text(page.replace("<head>", "<head>" + LOOK, 1), encoding="utf-8")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,2600",
        "--virtual-time-budget=8000",
    ]
    done = subprocess.run(
        [str(BROWSER), *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{folder}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    held = re.search(r'data-found="([^"]*)"', done.stdout)
    assert held, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(held.group(1)))
    return found


def test_pages_are_drawn_and_a_click_shows_a_point(tmp_path: Path) -> None:
    task, words = tiny_task(), tiny_tokenizer()
    given: dict[str, Any] = {"task": task, "tokenizer": words, "seconds": 0.02}
    front = secateur.search(tiny_model("bert"), secateur.Nas(**NAS), **given)  # type: ignore[arg-type]
    method = secateur.Ptf(batches=2, batch_size=8, multiple=8)
    result = secateur.compress(tiny_model("bert"), method, budget="macs<=70%", **given)  # type: ignore[arg-type]
    for records in ([front.to_dict()], [result.to_dict()], [front.to_dict(), result.to_dict()]):
        found = look(render(records), tmp_path)
        assert found["failures"] == []
        assert found["loaded"] == []
        assert len(found["charts"]) >= 3
        for name, drawn, large in found["charts"]:
            assert drawn >= 1, name
            assert large, name
        for shown in found["picked"]:
            for panel, point in zip(shown, (front.pareto()[-1], front.pareto()[0]), strict=True):
                assert panel["title"].startswith(f"Point {point.number}: ")
                assert f"--point {point.number} " in panel["command"] + " "
                assert (panel["layers"], panel["gone"]) == (3, sum(width == 0 for width in point.sub.head_widths))
        assert len(found["picked"]) == sum("points" in record for record in records)
