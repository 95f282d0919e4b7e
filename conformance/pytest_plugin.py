"""pytest over the same case objects: give a test the argument ``hal_case`` and it runs once per case.

    def test_conformance(hal_case):
        hal_case.check()

``pytest --hal-backend acme --hal-level smoke -k topk``; every case is one node id, so ``-k``, xdist and JUnit work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from glm5_hal.conformance.cases import Case
    from glm5_hal.conformance.results import Result
    from glm5_hal.conformance.target import Target
    from glm5_hal.conformance.waivers import Book


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("glm5-hal", "conformance of glm5-hal backends")
    group.addoption("--hal-backend", default="cpu", help="backend or backend:provider to judge (default: cpu)")
    group.addoption("--hal-level", default="smoke", help="smoke, standard or full (default: smoke)")
    group.addoption("--hal-device", default=None, help="device to run on, as torch names it (default: the first)")
    group.addoption("--hal-seed", type=int, default=0, help="seed of the inputs (default: 0)")
    group.addoption("--hal-op", action="append", default=None, help="only ops that match this glob; may be repeated")


@dataclass(frozen=True)
class HalCase:
    """One case on one kernel provider, with the backend's waivers."""

    case: Case
    target: Target
    seed: int
    book: Book

    def run(self) -> Result:
        """The result, whatever it is."""
        from glm5_hal.conformance import runner

        return self.book.judged(next(runner.run([self.case], [self.target], self.seed)))

    def check(self) -> None:
        """Fail on a failing verdict, skip on UNSUPPORTED with the reason, xfail on a failure that is waived."""
        result = self.run()
        if result.verdict == "XFAIL":
            pytest.xfail(f"waiver {result.waiver}: {result.detail}")
        if result.verdict == "UNSUPPORTED":
            pytest.skip(f"{result.verdict} {result.code}: {result.detail}")
        if not result.ok:
            pytest.fail(f"{result.verdict} {result.detail}\n{result.repro}", pytrace=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hal_case" not in metafunc.fixturenames:
        return
    from glm5_hal.conformance import cases, waivers
    from glm5_hal.conformance.target import targets
    from glm5_hal.errors import HalError

    option = metafunc.config.getoption
    try:
        judged = targets(option("--hal-backend"), option("--hal-device"))
        facts = judged[0].facts
        book = waivers.book(waivers.shipped(judged[0].backend), facts.name, facts.versions)
        found = list(cases.cases(option("--hal-level"), option("--hal-op") or ("*",)))
    except HalError as problem:
        raise pytest.UsageError(str(problem)) from None
    pairs = [HalCase(c, t, option("--hal-seed"), book) for c in found for t in judged]
    metafunc.parametrize("hal_case", pairs, ids=[f"{p.target.policy}-{p.case.id}" for p in pairs])
