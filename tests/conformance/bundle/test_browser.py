"""What the report does when it is clicked, in a browser; where none is installed, nothing of this is known."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from bundles import BAD, CASES, FAILS, PASSES, UNSUPPORTED, WAIVED

from glm5_hal.conformance.bundle import files

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

#: Runs after the page's own script, as a reader's hand would, and leaves what it saw.
HAND = """
<pre id="seen"></pre><script>
const seen = {}, all = (s) => [...document.querySelectorAll(s)];
const rows = () => all("#cases tbody tr").filter((r) => !r.hidden && r.className !== "more");
const names = () => rows().map((r) => r.cells[1].textContent);
const chip = (v) => all(".chips button").find((b) => b.dataset.verdict === v);
const text = document.getElementById("text");
const type = (t) => { text.value = t; text.dispatchEvent(new Event("input")); };
window.onerror = (what) => { seen.error = String(what); };
seen.first = names();
for (const key of ["c", "e"]) {
  const button = document.querySelector(`#cases th button[data-key=${key}]`);
  seen[key] = [];
  for (let n = 0; n < 2; n++) {
    button.click();
    seen[key].push([button.parentElement.getAttribute("aria-sort"), names()]);
  }
}
chip("FAIL").click(); seen.failures = names(); seen.count = document.getElementById("shown").textContent;
seen.off = all("circle.dot.off").length; chip("FAIL").click(); seen.again = names().length;
type("hadamard"); seen.typed = names(); type("no such case"); seen.none = names(); type("");
const row = all("#cases tbody tr").find((r) => r.cells[1].textContent === FAILS);
row.querySelector(".case button").click(); seen.details = row.nextElementSibling.textContent;
row.querySelector(".case button").click(); seen.closed = row.nextElementSibling?.className !== "more";
type("hadamard"); document.querySelector("[data-go]").click();
seen.jumped = all("tr.more").length; seen.filter = text.value;
seen.wide = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
document.getElementById("seen").textContent = JSON.stringify(seen);
</script></body>
"""


@pytest.fixture(params=[390, 1280], ids=["phone", "desktop"])
def seen(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> dict[str, Any]:
    page = files.derived(files.read(bundle))["report.html"]
    assert page.count("</body>") == 1
    (tmp_path / "page.html").write_text(page.replace("</body>", HAND.replace("FAILS", json.dumps(FAILS))))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={request.param},900", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (left,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    return dict(json.loads(unescape(left)))


def test_a_readers_hand_finds_what_it_looks_for(seen: dict[str, Any]) -> None:
    assert "error" not in seen
    assert sorted(seen["first"]) == sorted(CASES)
    by_name = sorted(CASES)
    assert seen["c"] == [["ascending", by_name], ["descending", by_name[::-1]]]
    assert [direction for direction, _ in seen["e"]] == ["descending", "ascending"]
    assert set(seen["e"][0][1][:2]) == {FAILS, WAIVED}, "the largest shares of their budgets come first"
    assert FAILS in seen["failures"]
    assert PASSES not in seen["failures"]
    assert seen["count"] == f"{len(seen['failures'])} of {len(CASES)}"
    assert seen["off"] > 0, "the dots of what is filtered out fade"
    assert seen["again"] == len(CASES)
    assert (seen["typed"], seen["none"]) == ([UNSUPPORTED], [])
    assert "glm5-hal conformance run" in seen["details"]
    assert seen["closed"]
    assert (seen["jumped"], seen["filter"]) == (1, ""), "a link to a failure takes the filter away and opens it"
    assert BAD in seen["first"]


def test_the_page_does_not_scroll_sideways(seen: dict[str, Any]) -> None:
    assert seen["wide"][0] <= seen["wide"][1]
