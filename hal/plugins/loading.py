"""From an entry point to a Backend: import the module, ask its hook, check the answer.

pluggy checks the hook and makes the one call; it is on no hot path.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import fields, replace

import pluggy

from glm5_hal import hookspecs
from glm5_hal.backend import Backend
from glm5_hal.plugins.checks import check, hook_missing
from glm5_hal.plugins.given import made_importable
from glm5_hal.plugins.isolation import attempted, defined_at, guarded, kind_of, told
from glm5_hal.plugins.record import Defect, PluginRecord

#: Seconds that an outside plugin has to be imported and to answer its hook.
LOAD_DEADLINE = 10.0

_VALUE = re.compile(r"(?P<module>\w+(\.\w+)*)\s*(:\s*(?P<attr>\w+(\.\w+)*))?\s*(\[.*\])?")


def load(record: PluginRecord, deadline: float | None) -> PluginRecord:
    """The record with its backend, or with what went wrong. Without a deadline it is loaded in this thread."""
    if record.status != "ok" or record.backend is not None:
        return record
    outcome = guarded(lambda: _build(record), deadline, record.root)
    record = replace(record, output=outcome.output)
    if outcome.stuck is not None:
        reason = f"importing {record.value!r} did not end within {deadline:g} s{outcome.stuck}"
        return record.failed(Defect("TIMEOUT", reason, f"import the vendor's SDK in probe() only; {record.remedy}"))
    if outcome.problem is not None:
        what = f"importing {record.value.partition(':')[0]} raised"
        return record.failed(_defect(record, "IMPORT", what, outcome.problem))
    backend: Backend = outcome.value
    return replace(
        record,
        backend=backend,
        name=record.name or backend.name,
        device_type=backend.device_type,
        communicator=backend.communicator,
        smi=backend.smi,
    )


def _build(record: PluginRecord) -> Backend:
    plugin = _imported(record)
    written = defined_at(getattr(plugin, "glm5_backend", None))
    manager = pluggy.PluginManager("glm5_hal")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, record.name or None)
        manager.check_pending()
    except pluggy.PluginValidationError as problem:
        said = "; ".join(line.strip() for line in str(problem).splitlines())
        fix = "write def glm5_backend(): ... without arguments, and no hook of another name"
        raise Defect("HOOK_SPEC", f"PluginValidationError: {said}{written}", fix) from problem
    if not manager.hook.glm5_backend.get_hookimpls():
        raise hook_missing(record, plugin, written)
    try:
        results = manager.hook.glm5_backend()
    except KeyboardInterrupt:
        raise
    except BaseException as problem:
        raise _defect(record, "HOOK_RAISED", "glm5_backend() raised", problem) from problem
    if len(results) != 1 or not isinstance(results[0], Backend):
        got = " and ".join(map(kind_of, results)) or "None"
        reason = f"glm5_backend() returned {got}, not a Backend{written}"
        raise Defect("HOOK_RESULT", reason, "return one glm5_hal.Backend")
    backend = _plain(results[0], record, written)
    check(record, backend, written)
    return backend


def _plain(backend: Backend, record: PluginRecord, written: str) -> Backend:
    """The same of our own class: a subclass may answer otherwise, or raise, when it is read later."""
    if type(backend) is Backend:
        return backend
    values, problem = attempted(lambda: {field.name: getattr(backend, field.name) for field in fields(Backend)})
    if values is None:
        said = "" if problem is None else told(problem, record.root)[0]
        raise Defect("FIELD", f"reading the Backend raised {said}{written}", f"return a plain Backend; {record.remedy}")
    return Backend(**values)


def _defect(record: PluginRecord, code: str, what: str, problem: BaseException) -> Defect:
    if isinstance(problem, Defect):
        return problem
    said, fix = told(problem, record.root)
    return Defect(code, f"{what} {said}", fix or record.remedy)


def _imported(record: PluginRecord) -> object:
    value = _VALUE.fullmatch(record.value.strip())
    if value is None:
        reason = f"the entry point's value {record.value!r} is not module or module:attribute"
        raise Defect("ENTRY_POINT", reason, record.remedy)
    module = value["module"]
    made_importable(record)
    try:
        plugin: object = importlib.import_module(module)
    except ModuleNotFoundError as problem:
        missing = problem.name or "what it lacks"
        if f"{module}.".startswith(f"{missing}."):
            reason = f"ModuleNotFoundError: the entry point names {module}, and there is no module {missing}"
            raise Defect("ENTRY_POINT", reason, record.remedy) from problem
        defect = _defect(record, "IMPORT", f"importing {module} raised", problem)
        defect.fix = f"install {missing}, or import it in probe() only; {record.remedy}"
        raise defect from problem
    for part in filter(None, (value["attr"] or "").split(".")):
        if not hasattr(plugin, part):
            raise Defect("ENTRY_POINT", f"the entry point names {record.value}: there is no {part!r}", record.remedy)
        plugin = getattr(plugin, part)
    return plugin
