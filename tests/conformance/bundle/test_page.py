"""The report is one file that needs nothing, says what the results say, and runs nothing that a kernel wrote."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bundles import BAD, CASES, FAILS, PASSES, UNSUPPORTED, WAIVED

from glm5_hal.conformance.bundle import files, page, plots, view
from glm5_hal.conformance.bundle.files import Bundle
from glm5_hal.conformance.bundle.manifest import Limits
from glm5_hal.conformance.bundle.plots import Scale
from glm5_hal.conformance.results import VERDICTS, Result


class Page(HTMLParser):
    """What is in a page: tags with their attributes in order, the text, and that all is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in ("meta", "input", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture
def read(bundle: Path) -> Bundle:
    return files.read(bundle)


def html(bundle: Bundle) -> str:
    return files.derived(bundle)["report.html"]


def test_it_is_well_formed_and_asks_for_nothing_from_outside(read: Bundle) -> None:
    text = html(read)
    found = Page(text)
    assert found.open == []
    for tag, attrs in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    (policy,) = (a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_evidence_and_the_verdict_come_before_all_else(read: Bundle) -> None:
    found = Page(html(read)).text.split("Profiles")[0]
    assert "1 of 7 cases fail" in found
    assert "Evidence: simulated" in found
    assert "1 waiver, 1 case excused" in found
    for verdict, count in {"PASS": 4, "FAIL": 1, "XFAIL": 1, "UNSUPPORTED": 1}.items():
        assert re.search(rf"\b{count}\s+{verdict}\b", found)
    assert "CONFORMANT" not in Page(html(read)).text


def test_every_case_has_its_row_and_every_judged_one_its_dot(read: Bundle) -> None:
    found = Page(html(read))
    rows = [a for t, a in found.tags if t == "tr" and a.get("id", "").startswith("r")]
    assert [r["data-v"] for r in rows] == [r.verdict for r in read.results]
    assert all(case in found.text for case in CASES)
    (plot,) = re.findall(r'id="errors">.*?</section>', html(read), re.DOTALL)
    drawn = re.findall(r'<circle class="dot (\w+)"[^>]*data-i="(\d+)"', plot)
    kinds = {read.results[int(i)].case: kind for kind, i in drawn}
    assert kinds[FAILS] == "fail"
    assert kinds[WAIVED] == "waived"
    assert kinds[PASSES] == "pass"
    assert UNSUPPORTED not in kinds
    assert BAD not in kinds, "a bad input has no error to show"


def test_a_failure_has_its_command_and_its_first_wrong_element(read: Bundle) -> None:
    found = Page(html(read)).text
    (failed,) = (r for r in read.results if r.case == FAILS)
    assert failed.repro in found
    where, got, expected = view.first_wrong(failed.detail) or ("", "", "")
    assert re.search(rf"first wrong element {re.escape(where)} is {got} expected {expected}", " ".join(found.split()))


@pytest.mark.parametrize(
    ("detail", "element"),
    [
        ("y: row: 1 > 0; at [0, 3] got nan, expected -0.5", ("[0, 3]", "nan", "-0.5")),
        ("bits: 1 of 4 elements differ; at [] got 1.0, expected 2.0 (the sign of zero)", ("[]", "1.0", "2.0")),
        ("run 2 differs from run 1 in y at flat index 7: 1.0 and 2.5", ("flat index 7", "1.0", "2.5")),
        ("raised RuntimeError: launch failed", None),
    ],
)
def test_the_first_wrong_element_is_what_a_check_says(detail: str, element: tuple[str, str, str] | None) -> None:
    assert view.first_wrong(detail) == element


def test_what_a_kernel_says_stays_text(read: Bundle) -> None:
    hostile = "</script><script>alert(1)</script>\n<img src=x onerror=alert(1)> `a` | b & \u2028 [x](http://x)"
    spoilt = tuple(replace(r, detail=hostile, checks={**r.checks, "form": f"failed: {hostile}"}) for r in read.results)
    derived = files.derived(replace(read, results=spoilt))
    text = derived["report.html"]
    assert Page(text).open == []
    assert text.count("<script") == 2
    assert "<img" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data)[0]["d"] == hostile
    assert "<script>" not in derived["report.md"].replace("\\<script\\>", "")
    assert not re.findall(r"(?<!\\)\]\(", derived["report.md"])


def test_an_empty_run_and_one_of_nothing_but_unsupported_say_so(read: Bundle) -> None:
    empty = replace(read, results=(), manifest=replace(read.manifest, counts={}, cases=0))
    assert "No case was run" in Page(html(empty)).text
    refused = next(r for r in read.results if r.verdict == "UNSUPPORTED")
    many = tuple(replace(refused, case=f"hadamard[float32-n{n}]") for n in range(900))
    text = Page(html(replace(read, results=many))).text
    assert "Nothing was judged: none of 900 cases passed or failed" in text
    assert refused.detail in text
    assert "and 500 more" in text


def test_the_same_bundle_gives_the_same_bytes(read: Bundle) -> None:
    assert files.derived(read) == files.derived(read)


def test_markdown_has_every_op_failure_and_waiver(read: Bundle) -> None:
    text = files.derived(read)["report.md"]
    assert text.startswith("# 1 of 7 cases fail\n")
    for word in ("**Evidence: simulated**", "| rms_norm |", FAILS, "norm-scale"):
        assert word in text


def test_every_verdict_and_kind_of_evidence_is_explained() -> None:
    from glm5_hal.backend import EVIDENCE

    assert view.MEANING.keys() == VERDICTS.keys()
    assert view.EVIDENCE.keys() == set(EVIDENCE)


# --- plots -----------------------------------------------------------------------------------------------------------


def test_a_logarithmic_place_is_where_it_should_be_and_never_outside() -> None:
    scale = Scale(1e-3, 1e3, 10.0, 90.0)
    assert [scale.place(v) for v in (1e-3, 1.0, 1e3, 0.0, 1e9)] == [10.0, 50.0, 90.0, 10.0, 90.0]


def results(*ratios: float, verdict: str = "PASS") -> list[tuple[int, Result]]:
    found = bundles_result(verdict)
    return [(i, replace(found, errors={"y.row": r}, budget={"y.row": 1.0})) for i, r in enumerate(ratios)]


def bundles_result(verdict: str) -> Result:
    return Result("rope[float32-x]", "rope", "a:b", "a:b", verdict, "", "", "float32", "smoke", 0, "")


def test_a_passing_dot_is_left_of_the_line_and_a_failing_one_right_of_it() -> None:
    scale = Scale(1e-3, 1e3, plots.LEFT, plots.RIGHT)
    line = scale.place(1.0)
    for ratio in (1e-9, 0.01, 0.999):
        assert plots.error_dots(results(ratio), scale)[0][0].x < line
    for ratio in (1.001, 50.0, 1e9, float("inf")):
        assert plots.error_dots(results(ratio, verdict="FAIL"), scale)[0][0].x > line
    raised = [(0, bundles_result("CRASH"))]
    assert plots.error_dots(raised, scale)[0][0].x == plots.BEYOND
    exact = plots.error_dots(
        [(0, replace(bundles_result("PASS"), errors={"y.different": 0.0}, budget={"y.different": 0.0}))], scale
    )
    assert exact[0][0].x < plots.LEFT


def test_dots_of_one_place_lie_around_each_other_inside_the_row() -> None:
    dots, height = plots.error_dots(results(*[0.5] * 30), Scale(1e-3, 10.0, plots.LEFT, plots.RIGHT))
    assert len({d.y for d in dots[: plots.LINES]}) == plots.LINES
    assert all(0 < d.y < height for d in dots)


def test_of_limit_is_the_least_time_over_the_time_that_it_took() -> None:
    limits = Limits(1e9, {"float32": 1e12})
    timed = replace(bundles_result("PASS"), kernel_seconds=0.1, work={"flops": 1e10, "bytes": 2e7})
    assert plots.of_limit(timed, limits) == pytest.approx(0.2)
    assert plots.of_limit(replace(timed, work={"flops": 5e10, "bytes": 2e7}), limits) == pytest.approx(0.5)
    assert plots.of_limit(replace(timed, dtype="float16"), limits) is None
    assert plots.of_limit(replace(timed, kernel_seconds=0.0), limits) is None
    assert plots.roofline([timed], Limits(problem="no device")) is None


def test_no_dot_is_above_its_roof_if_it_took_at_least_the_least_time() -> None:
    limits = Limits(1e9, {"float32": 1e12})
    timed = replace(bundles_result("PASS"), kernel_seconds=0.1, work={"flops": 1e10, "bytes": 2e7})
    drawn = plots.roofline([timed], limits)
    assert drawn is not None
    (roof,), (dot,) = drawn.roofs, drawn.dots
    assert dot.y > roof.y1, "down is slower"


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (None, "–"),
        (0.0, "0 %"),
        (0.001, "<1 %"),
        (0.35, "35 %"),
        (1.2, "120 %"),
        (5.8, "5.8×"),
        (1234.0, "1,234×"),
        (float("inf"), "∞"),
    ],
)
def test_shares_are_short(share: float | None, shown: str) -> None:
    assert page.percent(share) == shown
