"""CONFORMANT is said of a profile whose cases all pass, in a whole full run, on hardware; and of nothing else."""

from __future__ import annotations

from dataclasses import replace

import bundles
import pytest

from glm5_hal.conformance.bundle.manifest import Facts, Host, Manifest, Selection
from glm5_hal.conformance.cases import cases
from glm5_hal.conformance.profiles import Claim, claims, mandatory, profiles
from glm5_hal.conformance.results import Result

DECODE = next(p for p in profiles() if p.name == "glm5-decode-bf16")


def manifest(evidence: str = "hardware", level: str = "full", target: str = "acme:native") -> Manifest:
    selection = Selection(level, ("*",), (), (target,), 0)
    facts = Facts("npu", "ACME-1", "a1", 1, evidence, {}, ())
    host = Host("Linux", "x86_64", "3.12", {}, 1)
    suite = bundles.committed()
    return Manifest(suite, "", {}, selection, "", facts, host, bundles.rates(), "", "", 0, {}, (), "")


def results(target: str = "acme:native", **others: str) -> list[Result]:
    """Every mandatory case passes, but the first few, which have these verdicts."""
    found = [Result(c, "", target, target, "PASS", "", "", "", "full", 0, "") for c in sorted(mandatory(DECODE))]
    for n, verdict in enumerate(others.values()):
        found[n] = replace(found[n], verdict=verdict)
    return found


def claim(said: Manifest, found: list[Result]) -> Claim:
    return next(c for c in claims(said, found) if c.profile == DECODE.name)


def test_all_mandatory_cases_pass() -> None:
    made = claim(manifest(), results())
    assert made.conformant
    assert made.passed == made.mandatory > 300


def test_waivers_of_other_cases_are_counted_beside_the_name() -> None:
    extra = Result("topk_indices[x]", "", "acme:native", "", "XFAIL", "", "", "", "full", 0, "")
    made = claim(manifest(), [*results(), extra])
    assert (made.conformant, made.waived) == (True, 1)


@pytest.mark.parametrize("verdict", ["FAIL", "UNSUPPORTED", "XFAIL", "XPASS", "CRASH"])
def test_a_mandatory_case_that_does_not_pass_rules_it_out(verdict: str) -> None:
    made = claim(manifest(), results(first=verdict))
    assert not made.conformant
    assert made.reasons == (f"1 of {made.mandatory} mandatory cases: {verdict}",)


def test_damage_that_nobody_is_known_to_have_done_rules_it_out() -> None:
    """Wherever it showed: the kernel that did it may be a mandatory case's, and pass."""
    extra = Result("topk_indices[x]", "", "acme:native", "", "PASS", "", "", "", "full", 0, "", remark="it gave CRASH")
    made = claim(manifest(), [*results(), extra])
    assert made.reasons == ("in 1 case a worker was damaged, and which kernel did that is not known",)
    assert claim(manifest(), [*results(), replace(extra, culprit="rope[x] on acme:native")]).conformant
    assert claim(manifest(), [*results(), replace(extra, backend="acme:other")]).conformant


def test_a_mandatory_case_that_is_not_there_rules_it_out() -> None:
    assert claim(manifest(), results()[1:]).reasons[-1].endswith("mandatory cases: not in the run")


@pytest.mark.parametrize(
    ("said", "target", "reason"),
    [
        (manifest(evidence="emulated"), "acme:native", "emulated, not hardware"),
        (manifest(level="standard"), "acme:native", "level full is needed"),
        (manifest(target="acme:reference"), "acme:reference", "never called conformant"),
        (replace(manifest(), suite=replace(bundles.committed(), clean=False)), "acme:native", "as committed"),
        (
            replace(manifest(), selection=replace(manifest().selection, ops=("rms_*",))),
            "acme:native",
            "full, in part",
        ),
    ],
)
def test_a_run_that_proves_less_rules_it_out(said: Manifest, target: str, reason: str) -> None:
    made = claim(said, results(target))
    assert len(made.reasons) == 1
    assert reason in made.reasons[0]


@pytest.mark.parametrize("profile", profiles(), ids=lambda p: p.name)
def test_every_pattern_of_a_profile_matches_a_case_and_caches_are_the_plain_ones(profile: object) -> None:
    from glm5_hal.conformance.globs import matches
    from glm5_hal.conformance.profiles import Profile

    assert isinstance(profile, Profile)
    known = [c.id for c in cases("full")]
    for pattern in (*profile.cases, *profile.excepted):
        assert any(matches(case, [pattern]) for case in known), pattern
    assert any("latent_576" in case for case in mandatory(profile))
    assert not any("fp8" in case for case in mandatory(profile))
