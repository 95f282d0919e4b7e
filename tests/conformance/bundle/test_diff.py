"""Two bundles case by case: what is worse comes first, and what differs beside the kernels is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import FAILS, PASSES, TARGET, WAIVED

from glm5_hal.conformance.bundle import files
from glm5_hal.conformance.bundle.diff import ABSENT, diff, paired
from glm5_hal.conformance.bundle.files import Bundle


@pytest.fixture
def a(bundle: Path) -> Bundle:
    return files.read(bundle)


def changed(bundle: Bundle, case: str, **fields: Any) -> Bundle:
    return replace(bundle, results=tuple(replace(r, **fields) if r.case == case else r for r in bundle.results))


def test_a_bundle_does_not_differ_from_itself(a: Bundle) -> None:
    found = diff(a, a)
    assert (found.pairs, found.cases) == (((TARGET, TARGET),), 7)
    assert (found.verdicts, found.errors, found.times, found.notes) == ((), (), (), ())
    assert {s.factor for s in found.speed} == {1.0}


def test_worse_verdicts_come_first(a: Bundle) -> None:
    b = changed(changed(a, PASSES, verdict="FAIL", detail="off"), FAILS, verdict="PASS", detail="")
    b = replace(b, results=tuple(r for r in b.results if r.case != WAIVED))
    found = [(c.case, c.a, c.b, c.worse) for c in diff(a, b).verdicts]
    assert found[0] == (PASSES, "PASS", "FAIL", True)
    assert (FAILS, "FAIL", "PASS", False) in found
    assert (WAIVED, "XFAIL", ABSENT, True) in found
    assert diff(b, a).verdicts[0].case == FAILS


def test_errors_and_times_are_ranked_by_how_much_they_changed(a: Bundle) -> None:
    mine = {r.case: r for r in a.results}
    b = changed(a, PASSES, errors={k: 4 * v for k, v in mine[PASSES].errors.items()}, kernel_seconds=3.0)
    b = changed(b, FAILS, errors={k: 2 * v for k, v in mine[FAILS].errors.items()})
    found = diff(a, b)
    assert [(r.case, round(r.factor, 3)) for r in found.errors] == [(PASSES, 4.0), (FAILS, 2.0)]
    assert [r.case for r in found.times] == [PASSES]
    assert [round(r.factor, 3) for r in diff(b, a).errors] == [0.25, 0.5]


def test_what_differs_beside_the_kernels_is_said(a: Bundle) -> None:
    said = a.manifest
    other = replace(
        said,
        device=replace(said.device, name="another", versions={"driver": "2.1"}),
        selection=replace(said.selection, seed=5),
        specs={**said.specs, "rope": "0"},
    )
    notes = diff(a, replace(a, manifest=other)).notes
    assert notes == (
        "device: stand-in, another",
        "seed (so the inputs differ): 0, 5",
        "driver: 2.0, 2.1",
        "specs of other content: rope",
    )


def test_two_vendors_are_compared_by_provider_and_then_in_order(a: Bundle) -> None:
    assert paired(["acme:native"], ["cpu:torch"]) == (("acme:native", "cpu:torch"),)
    assert paired(["acme:native", "acme:torch"], ["cpu:torch", "cpu:reference"]) == (
        ("acme:torch", "cpu:torch"),
        ("acme:native", "cpu:reference"),
    )
    assert paired(["cpu:torch"], ["cpu:reference", "cpu:torch"]) == (("cpu:torch", "cpu:torch"),)
    said = a.manifest
    theirs = replace(said, selection=replace(said.selection, targets=("acme:native",)))
    b = Bundle(theirs, tuple(replace(r, backend="acme:native") for r in a.results), a.book)
    assert not diff(a, b).verdicts
