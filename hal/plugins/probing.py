"""What a backend's probe finds, and whether it can be believed."""

from __future__ import annotations

import logging

from glm5_hal.backend import Backend, Device, Unavailable
from glm5_hal.packages import package_problem
from glm5_hal.plugins.isolation import defined_at, guarded, kind_of, told
from glm5_hal.plugins.record import PluginRecord

#: Seconds that a probe has to answer.
PROBE_DEADLINE = 20.0

log = logging.getLogger("glm5_hal.plugins")


def probe(record: PluginRecord, deadline: float | None = PROBE_DEADLINE) -> Device | Unavailable:
    """What the backend's probe finds. Never raises: a raise, a hang or a wrong answer is Unavailable, with its fix.

    It is asked in a thread, or in this one where ``deadline`` is None.
    """
    backend = record.backend
    if backend is None:
        return Unavailable(record.reason, record.fix, fault=True)
    outcome = guarded(lambda: _lacking(backend) or backend.probe(), deadline, record.root)
    if outcome.output:
        log.debug("the probe of %s printed: %s", record.name, outcome.output)
    if outcome.stuck is not None:
        what = f"the probe did not answer within {deadline:g} s{outcome.stuck}"
        return Unavailable(what, hardware_fix(record), fault=True)
    if outcome.problem is not None:
        what, fix = told(outcome.problem, record.root)
        return Unavailable(f"the probe raised {what}", fix or record.remedy, fault=True)
    if isinstance(outcome.value, Unavailable):
        no = outcome.value
        wrong = [kind_of(text) for text in (no.reason, no.fix) if not isinstance(text, str)]
        if wrong:
            what = (
                f"the probe's Unavailable has reason and fix that are text, not {wrong[0]}{defined_at(backend.probe)}"
            )
            return Unavailable(what, f"correct probe(); {record.remedy}", fault=True)
        return Unavailable(no.reason or "the probe gave no reason", no.fix or hardware_fix(record), no.fault)
    problem = _device_problem(outcome.value, backend)
    if problem is not None:
        what = f"the probe's answer is not usable: {problem}{defined_at(backend.probe)}"
        return Unavailable(what, f"correct probe(); {record.remedy}", fault=True)
    device: Device = outcome.value
    return device


def _lacking(backend: Backend) -> Unavailable | None:
    """The distributions that the backend needs and that are not here, with the one command that brings them."""
    problems = {n: p for n, v in backend.requires.items() if (p := package_problem(n, v)) is not None}
    wanted = " ".join(f"'{name}{backend.requires[name]}'" for name in problems)
    return Unavailable("; ".join(problems.values()), f"pip install {wanted}") if problems else None


def hardware_fix(record: PluginRecord) -> str:
    """What to do where the driver is the suspect."""
    smi = " ".join(record.smi)
    return f"see whether {f'`{smi}`' if smi else 'the driver'} answers; {record.remedy}"


def _device_problem(found: object, backend: Backend) -> str | None:
    if not isinstance(found, Device):
        return f"it is {kind_of(found)}, not Device or Unavailable"
    if found.type != backend.device_type:
        return f"the device is of type {found.type!r}, the backend says {backend.device_type!r}"
    if type(found.count) is not int or found.count < 1:
        return f"it counts {found.count!r} devices, and where there is none it should be Unavailable"
    texts = [found.name, found.arch, *found.features, *found.versions, *found.versions.values()]
    wrong = [text for text in texts if not isinstance(text, str)]
    return f"names, features and versions are text, and {wrong[0]!r} is {kind_of(wrong[0])}" if wrong else None
