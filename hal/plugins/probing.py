"""What a backend's probe finds, and whether it can be believed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import Any

from glm5_hal.backend import Backend, Device, Unavailable
from glm5_hal.errors import shown
from glm5_hal.packages import package_problem
from glm5_hal.plugins.isolation import defined_at, guarded, kind_of, plain, told
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
    # Reading the answer runs the plugin's code again, where it is of a class of its own.
    read = guarded(lambda: _believed(outcome.value, record, backend), deadline, record.root)
    if read.value is not None:
        found: Device | Unavailable = read.value
        return found
    stuck = f"does not end{defined_at(backend.probe)}"
    said = stuck if read.problem is None else f"raised {told(read.problem, record.root)[0]}"
    what = f"reading the probe's answer {said}"
    return Unavailable(what, f"correct probe(); {record.remedy}", fault=True)


def _believed(found: object, record: PluginRecord, backend: Backend) -> Device | Unavailable:
    """The answer, of plain fields; or what is wrong with it."""
    if isinstance(found, Unavailable):
        words = (found.reason, found.fix)
        wrong = [kind_of(word) for word in words if not isinstance(word, str)]
        if not wrong:
            reason, fix = map(plain, words)
            return Unavailable(reason or "the probe gave no reason", fix or hardware_fix(record), found.fault is True)
        what = f"the probe's Unavailable has reason and fix that are text, not {wrong[0]}"
    else:
        device = _device(found, backend)
        if isinstance(device, Device):
            return device
        what = f"the probe's answer is not usable: {device}"
    return Unavailable(f"{what}{defined_at(backend.probe)}", f"correct probe(); {record.remedy}", fault=True)


def _lacking(backend: Backend) -> Unavailable | None:
    """The distributions that the backend needs and that are not here, with the one command that brings them."""
    problems = {n: p for n, v in backend.requires.items() if (p := package_problem(n, v)) is not None}
    wanted = " ".join(f"'{name}{backend.requires[name]}'" for name in problems)
    return Unavailable("; ".join(problems.values()), f"pip install {wanted}") if problems else None


def hardware_fix(record: PluginRecord) -> str:
    """What to do where the driver is the suspect."""
    smi = " ".join(record.smi)
    then = "reinstall what torch has of this vendor, for this torch" if record.builtin else record.remedy
    return f"see whether {f'`{smi}`' if smi else 'the driver'} answers; {then}"


def _device(found: object, backend: Backend) -> Device | str:
    """A Device of plain fields, or what is wrong with what was found."""
    if not isinstance(found, Device):
        return f"it is {kind_of(found)}, not Device or Unavailable"
    if found.type != backend.device_type:
        return f"the device is of type {shown(found.type)}, the backend says {backend.device_type!r}"
    if type(found.count) is not int or found.count < 1:
        return f"it counts {shown(found.count)} devices, and where there is none it should be Unavailable"
    features: Any = found.features  # whatever it is declared to be
    versions: Any = found.versions
    if not isinstance(features, Set | list | tuple) or not isinstance(versions, Mapping):
        return f"features are a set and versions a dict, not {kind_of(features)} and {kind_of(versions)}"
    of_features, of_versions = list(features), dict(versions)
    words = (found.type, found.name, found.arch, found.evidence)
    texts: list[Any] = [*words, *of_features, *of_versions, *of_versions.values()]
    for text in texts:
        if not isinstance(text, str):
            return f"names, features and versions are text, and {shown(text)} is {kind_of(text)}"
    return Device(
        plain(found.type),
        plain(found.name),
        plain(found.arch),
        found.count,
        plain(found.evidence),
        {plain(name): plain(version) for name, version in of_versions.items()},
        frozenset(map(plain, of_features)),
    )
