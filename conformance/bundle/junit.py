"""JUnit XML, for CI systems, from results."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from glm5_hal.conformance.results import Result

#: Verdicts that JUnit knows as skipped.
SKIPPED = ("UNSUPPORTED", "XFAIL")


def junit(results: Sequence[Result]) -> str:
    """JUnit XML for CI systems: a case per test, UNSUPPORTED and XFAIL as skipped."""
    suite = ElementTree.Element(
        "testsuite",
        name="glm5-hal conformance",
        tests=str(len(results)),
        failures=str(sum(not r.ok for r in results)),
        skipped=str(sum(r.verdict in SKIPPED for r in results)),
        time=f"{sum(r.seconds for r in results):.3f}",
    )
    for r in results:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{r.backend}.{r.op}", name=r.case, time=f"{r.seconds:.3f}"
        )
        if not r.ok:
            failure = ElementTree.SubElement(case, "failure", type=r.verdict, message=_printable(r.detail))
            failure.text = _printable("\n".join(filter(None, (r.detail, r.log, r.repro))))
        elif r.verdict in SKIPPED:
            waived = f"waived by {r.waiver}: " if r.waiver else ""
            ElementTree.SubElement(case, "skipped", message=_printable(f"{waived}{r.code} {r.detail}"))
    ElementTree.indent(suite, "")
    return "<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _printable(text: str) -> str:
    """XML has no control characters; a kernel's message may."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
