"""Backend plugins: found, loaded in isolation, put in order; then probed, and asked for their kernels.

Whatever a plugin does short of ending the process becomes a record with a code, a reason and a fix: one broken plugin
breaks neither the import nor the others. pluggy checks the hook and makes the one call; it is on no hot path.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata

import pluggy

from glm5_hal import _probe_child, hookspecs
from glm5_hal._probe_child import defined_at, guarded, told
from glm5_hal.backend import HAL_API, Backend, Device, Kernel, Unavailable
from glm5_hal.capability import package_problem
from glm5_hal.errors import HalError, suggest

DISTRIBUTION = "glm5-hal"

#: Seconds that an outside plugin has to be imported and to answer its hook.
LOAD_DEADLINE = 10.0
#: Seconds that a probe has to answer.
PROBE_DEADLINE = 20.0

#: Every code that a PluginRecord may carry; an `ok` record carries none.
CODES: dict[str, str] = {
    "METADATA": "the distribution's entry points cannot be read",
    "ENTRY_POINT": "the entry point names a module or an object that is not there",
    "IMPORT": "the module raised while it was imported",
    "TIMEOUT": "the module or its hook did not come back in time",
    "HOOK_MISSING": "the module implements no glm5_backend hook",
    "HOOK_SPEC": "the hook does not fit its specification",
    "HOOK_RAISED": "the hook raised",
    "HOOK_RESULT": "the hook returned something else than one Backend",
    "NAME": "the backend's name is not the entry point's name",
    "FIELD": "a field of the Backend has the wrong type",
    "HAL_API": "the plugin was written for a contract version that this core does not speak",
    "REQUIRES": "a requirement on a distribution cannot be read",
    "DUPLICATE": "two distributions offer a backend of this name",
    "BUILTIN_NAME": "the name belongs to a built-in backend",
}

#: How a reason begins where the probe is at fault; any other Unavailable is the probe's own, well-formed no.
BROKEN_PROBE = (
    "the probe raised",
    "the probe did not answer",
    "the probe died",
    "the probe ended",
    "the probe's answer",
    "the probe's process",
)

log = logging.getLogger("glm5_hal.plugins")

_VALUE = re.compile(r"(?P<module>\w+(\.\w+)*)\s*(:\s*(?P<attr>\w+(\.\w+)*))?\s*(\[.*\])?")
_DIST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_PROVIDER = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class PluginRecord:
    """One entry point, and what became of it.

    Attributes:
        name: the entry point's name, which is the backend's.
        value: the entry point's "module" or "module:attribute".
        dist, version: the distribution that it comes from.
        builtin: it comes with glm5-hal itself.
        status: "ok", "broken" (it cannot be used by anyone) or "refused" (it works, but not with this core or beside
            these plugins).
        code, reason, fix: why it is not ok, one of :data:`CODES` first, and what to do; empty where it is.
        backend: the plugin object, exactly where the status is ok.
        seconds: how long it took to load.
        output: what it printed while it loaded.
    """

    name: str
    value: str
    dist: str
    version: str
    builtin: bool
    status: str = "ok"
    code: str = ""
    reason: str = ""
    fix: str = ""
    backend: Backend | None = None
    seconds: float = 0.0
    output: str = ""

    @property
    def origin(self) -> str:
        return f"{self.dist or 'an unknown distribution'} {self.version}".strip()

    @property
    def root(self) -> str:
        """The module or package whose frames are the plugin's own."""
        module = self.value.partition(":")[0].strip()
        return module if self.builtin else module.partition(".")[0]

    @property
    def remedy(self) -> str:
        """The fix where nothing better is known."""
        if self.builtin:
            return f"pip install --force-reinstall {DISTRIBUTION}"
        if not self.dist:
            return f"reinstall what offers the entry point {self.name} = {self.value!r}"
        return f"pip install -U '{self.dist}', or take it out: pip uninstall {self.dist}"


class _Fault(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, code: str, reason: str, fix: str, status: str = "broken") -> None:
        super().__init__(reason)
        self.code, self.reason, self.fix, self.status = code, reason, fix, status


def discover(
    entry_points: Iterable[metadata.EntryPoint] | None = None, *, deadline: float = LOAD_DEADLINE
) -> tuple[PluginRecord, ...]:
    """Load every backend plugin: built-in ones by name, then outside ones by priority (higher first) and name.

    Args:
        entry_points: what to load instead of what is installed.
        deadline: seconds that each outside plugin has. They are loaded in a thread, which a plugin that hangs keeps.
    """
    found = _installed() if entry_points is None else (_unloaded(point, point.dist) for point in entry_points)
    once = {(_canonical(record.dist), record.name, record.value): record for record in found}
    loaded = [load(record, None if record.builtin else deadline) for record in once.values()]
    return tuple(sorted(_without_clashes(loaded), key=_order))


def load(record: PluginRecord, deadline: float | None) -> PluginRecord:
    """The record with its backend, or with what went wrong. Without a deadline it is loaded in this thread."""
    if record.status != "ok":
        return record
    outcome = guarded(lambda: _build(record), deadline, record.root)
    record = replace(record, seconds=outcome.seconds, output=outcome.output)
    if outcome.stuck is not None:
        reason = f"importing {record.value!r} did not end within {deadline:g} s{outcome.stuck}"
        return _with(record, _Fault("TIMEOUT", reason, f"import the vendor's SDK in probe() only; {record.remedy}"))
    if outcome.problem is not None:
        return _with(record, _fault(record, "IMPORT", f"loading {record.value!r} raised", outcome.problem))
    return replace(record, backend=outcome.value)


def probe(record: PluginRecord, deadline: float | None = PROBE_DEADLINE) -> Device | Unavailable:
    """What the backend's probe finds. Never raises: a raise, a hang or a wrong answer is Unavailable, with its fix.

    It is asked in a thread, or in this one where ``deadline`` is None.
    """
    backend = record.backend
    if backend is None:
        return Unavailable(record.reason, record.fix)
    outcome = guarded(lambda: _lacking(backend) or backend.probe(), deadline, record.root)
    if outcome.output:
        log.debug("the probe of %s printed: %s", record.name, outcome.output)
    if outcome.stuck is not None:
        return Unavailable(f"the probe did not answer within {deadline:g} s{outcome.stuck}", _hardware_fix(record))
    if outcome.problem is not None:
        what, fix = told(outcome.problem, record.root)
        return Unavailable(f"the probe raised {what}", fix or record.remedy)
    if isinstance(outcome.value, Unavailable):
        no = outcome.value
        return Unavailable(no.reason or "the probe gave no reason", no.fix or _hardware_fix(record))
    problem = _device_problem(outcome.value, backend)
    if problem is not None:
        what = f"the probe's answer is not usable: {problem}{defined_at(backend.probe)}"
        return Unavailable(what, f"correct probe(); {record.remedy}")
    device: Device = outcome.value
    return device


def probe_in_subprocess(record: PluginRecord, deadline: float = PROBE_DEADLINE) -> Device | Unavailable:
    """The same answer from a child process, so that a crash or a driver that never returns costs that child alone.

    ``deadline`` covers all of it, the start of the interpreter included.
    """
    if record.backend is None:
        return Unavailable(record.reason, record.fix)
    return _probe_child.ask(record, deadline, _hardware_fix(record))


def load_kernels(record: PluginRecord, signatures: Mapping[str, inspect.Signature]) -> tuple[Kernel, ...]:
    """The backend's kernels, each checked against the signature of its op (``signatures``, by op name).

    Raises:
        HalError: PLUGIN where the plugin is not usable or its ``kernels()`` raises, CONTRACT where a kernel is not
            what its op asks for.
    """
    whose = f"plugin {record.name} ({record.origin})"
    if record.backend is None:
        raise HalError("PLUGIN", f"{whose}: {record.reason}", value=record.name, fix=record.fix)
    outcome = guarded(record.backend.kernels, None, record.root)
    if outcome.output:
        log.debug("the kernels of %s printed: %s", record.name, outcome.output)
    if outcome.problem is not None:
        what, fix = told(outcome.problem, record.root)
        what = f"{whose}: kernels() raised {what}"
        raise HalError("PLUGIN", what, value=record.name, fix=fix or record.remedy) from outcome.problem
    if not isinstance(outcome.value, Sequence):
        what = f"{whose}: kernels() returned {_kind(outcome.value)}, not a sequence of Kernel"
        raise HalError("CONTRACT", what, value=outcome.value, fix="return a tuple, say kernels_of(module)")
    seen: set[tuple[str, str]] = set()
    for position, kernel in enumerate(outcome.value):
        if not isinstance(kernel, Kernel):
            what = f"{whose}: kernels()[{position}] is {_kind(kernel)}, not a Kernel"
            raise HalError("CONTRACT", what, value=kernel, fix="decorate it with glm5_hal.kernel(op, provider)")
        problem = _kernel_problem(kernel, signatures, seen)
        if problem is not None:
            what = f"{whose}: kernel {kernel.op} of provider {kernel.provider} {problem[0]}"
            raise HalError("CONTRACT", what, value=kernel, fix=problem[1])
        seen.add((kernel.op, kernel.provider))
    return tuple(outcome.value)


# Finding


def _installed() -> Iterator[PluginRecord]:
    """The entry points of our group, from one version of each distribution: the one that an import would see."""
    seen: set[str] = set()
    for dist in metadata.distributions():
        try:
            if hookspecs.GROUP not in (dist.read_text("entry_points.txt") or ""):
                continue
        except (OSError, ValueError):
            continue  # it cannot be read, so nothing says that it is ours
        name, version = _identity(dist)
        if name and _canonical(name) in seen:
            continue
        seen.add(_canonical(name))
        live = _live(dist, name) if name else dist
        try:
            points = [point for point in live.entry_points if point.group == hookspecs.GROUP]
        except Exception as problem:  # noqa: BLE001 - any parser's error, in any Python
            reason = f"entry_points.txt cannot be read: {told(problem)[0]}"
            record = PluginRecord(name or "unknown", "", name, version, builtin=_canonical(name) == DISTRIBUTION)
            yield _with(record, _Fault("METADATA", reason, record.remedy))
            continue
        yield from (_unloaded(point, live) for point in points)


def _live(dist: metadata.Distribution, name: str) -> metadata.Distribution:
    """A folder may hold stale metadata of older versions: of those in the first folder the newest counts."""
    from packaging.version import InvalidVersion, Version

    def age(each: metadata.Distribution) -> tuple[bool, Version]:
        try:
            return True, Version(_identity(each)[1])
        except InvalidVersion:
            return False, Version("0")

    home = str(dist.locate_file(""))
    same = [each for each in metadata.distributions(name=name) if str(each.locate_file("")) == home]
    return max(same, key=age, default=dist)


def _identity(dist: metadata.Distribution) -> tuple[str, str]:
    try:
        return dist.metadata["Name"] or "", dist.metadata["Version"] or ""
    except Exception:  # noqa: BLE001 - metadata that cannot be read must not hide the other plugins
        return "", ""


def _unloaded(point: metadata.EntryPoint, dist: metadata.Distribution | None) -> PluginRecord:
    name, version = ("", "") if dist is None else _identity(dist)
    return PluginRecord(point.name, point.value, name, version, builtin=_canonical(name) == DISTRIBUTION)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _without_clashes(records: Sequence[PluginRecord]) -> Iterator[PluginRecord]:
    """Refuse an outside plugin that takes a built-in's name, and every one of two that offer the same name.

    A plugin that is broken anyway clashes with nothing: it must not take a working one down with it.
    """
    builtin = {record.name: record for record in records if record.builtin}
    for record in records:
        rivals = [r for r in records if r.name == record.name and r.status == "ok" and not r.builtin]
        if record not in rivals:
            yield record
        elif record.name in builtin:
            owner = builtin[record.name].origin
            reason = f"{record.name!r} is a built-in backend of {owner}, and {record.origin} offers it too"
            fix = f"give the outside one a name of its own, or take it out: pip uninstall {record.dist}"
            yield _with(record, _Fault("BUILTIN_NAME", reason, fix, "refused"))
        elif len(rivals) > 1:
            who = " and ".join(sorted(f"{r.origin} ({r.value})" for r in rivals))
            fix = "uninstall one of them: " + " or ".join(sorted({f"pip uninstall {r.dist}" for r in rivals}))
            reason = f"backend {record.name!r} is offered by {who}; neither is used"
            yield _with(record, _Fault("DUPLICATE", reason, fix, "refused"))
        else:
            yield record


def _order(record: PluginRecord) -> tuple[bool, int, str, str, str]:
    priority = 0 if record.builtin or record.backend is None else record.backend.priority
    return not record.builtin, -priority, record.name, record.dist, record.value


def _with(record: PluginRecord, fault: _Fault) -> PluginRecord:
    return replace(record, status=fault.status, code=fault.code, reason=fault.reason, fix=fault.fix, backend=None)


# Loading


def _build(record: PluginRecord) -> Backend:
    plugin = _imported(record)
    written = defined_at(getattr(plugin, "glm5_backend", None))
    manager = pluggy.PluginManager("glm5_hal")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, record.name)
        manager.check_pending()
    except pluggy.PluginValidationError as problem:
        said = "; ".join(line.strip() for line in str(problem).splitlines())
        fix = "write def glm5_backend(): ... without arguments, and no hook of another name"
        raise _Fault("HOOK_SPEC", f"PluginValidationError: {said}{written}", fix) from problem
    if not manager.hook.glm5_backend.get_hookimpls():
        raise _hook_missing(record, plugin, written)
    with _stage(record, "HOOK_RAISED", "glm5_backend() raised"):
        results = manager.hook.glm5_backend()
    if len(results) != 1 or not isinstance(results[0], Backend):
        got = " and ".join(map(_kind, results)) or "None"
        reason = f"glm5_backend() returned {got}, not a Backend{written}"
        raise _Fault("HOOK_RESULT", reason, "return one glm5_hal.Backend")
    backend: Backend = results[0]
    _check_fields(record, backend, written)
    _check_api(record, backend, written)
    _check_requires(backend, written)
    return backend


@contextmanager
def _stage(record: PluginRecord, code: str, what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as problem:
        raise _fault(record, code, what, problem) from problem


def _fault(record: PluginRecord, code: str, what: str, problem: BaseException) -> _Fault:
    if isinstance(problem, KeyboardInterrupt):
        raise problem
    if isinstance(problem, _Fault):
        return problem
    said, fix = told(problem, record.root)
    return _Fault(code, f"{what} {said}", fix or record.remedy)


def _imported(record: PluginRecord) -> object:
    value = _VALUE.fullmatch(record.value.strip())
    if value is None:
        reason = f"the entry point's value {record.value!r} is not module or module:attribute"
        raise _Fault("ENTRY_POINT", reason, record.remedy)
    module = value["module"]
    with _stage(record, "IMPORT", f"importing {module} raised"):
        try:
            plugin: object = importlib.import_module(module)
        except ModuleNotFoundError as problem:
            missing = problem.name or "what it lacks"
            if f"{module}.".startswith(f"{missing}."):
                reason = f"ModuleNotFoundError: the entry point names {module}, and there is no module {missing}"
                raise _Fault("ENTRY_POINT", reason, record.remedy) from problem
            fault = _fault(record, "IMPORT", f"importing {module} raised", problem)
            fault.fix = f"install {missing}, or import it in probe() only; {record.remedy}"
            raise fault from problem
    for part in filter(None, (value["attr"] or "").split(".")):
        if not hasattr(plugin, part):
            raise _Fault("ENTRY_POINT", f"the entry point names {record.value}: there is no {part!r}", record.remedy)
        plugin = getattr(plugin, part)
    return plugin


def _hook_missing(record: PluginRecord, plugin: object, written: str) -> _Fault:
    fix = f"""write in the plugin's module:
from glm5_hal import Backend, hookimpl
@hookimpl
def glm5_backend(): return Backend(name={record.name!r}, device_type=..., probe=probe, kernels=kernels)"""
    if getattr(plugin, "glm5_backend", None) is not None:
        return _Fault("HOOK_MISSING", f"glm5_backend lacks the decorator @glm5_hal.hookimpl{written}", fix)
    if inspect.isfunction(plugin):
        fix = f"name the module alone in the entry point: {record.name} = {plugin.__module__!r}"
    return _Fault("HOOK_MISSING", f"{record.value} has no function glm5_backend", fix)


def _check_fields(record: PluginRecord, backend: Backend, written: str) -> None:
    if backend.name == "auto":
        reason = f"a backend cannot be called 'auto', which means something else in a policy{written}"
        raise _Fault("NAME", reason, "choose another name")
    if backend.name != record.name:
        reason = f"the entry point is called {record.name!r} and its backend {backend.name!r}{written}"
        raise _Fault("NAME", reason, f"call the entry point {backend.name!r} or the backend {record.name!r}")
    for field, kind in (("device_type", str), ("priority", int), ("requires", Mapping), ("smi", tuple)):
        value = getattr(backend, field)
        if not isinstance(value, kind):
            reason = f"Backend.{field} is {_kind(value)}, it should be {kind.__name__}{written}"
            raise _Fault("FIELD", reason, f"correct {field}; {record.remedy}")


def _check_api(record: PluginRecord, backend: Backend, written: str) -> None:
    api = backend.hal_api
    pair = api if isinstance(api, tuple) else (api, api)
    if len(pair) != 2 or any(type(version) is not int for version in pair) or pair[0] > pair[1]:
        reason = f"hal_api {api!r} is neither an int nor a pair of ints, lowest first{written}"
        raise _Fault("HAL_API", reason, f"write hal_api={HAL_API[1]}")
    low, high = pair
    if low > HAL_API[1] or high < HAL_API[0]:
        theirs, ours = (" to ".join(map(str, sorted(set(versions)))) for versions in (pair, HAL_API))
        reason = f"the plugin speaks hal_api {theirs}, this core speaks {ours}{written}"
        behind = DISTRIBUTION if low > HAL_API[1] else record.dist
        raise _Fault("HAL_API", reason, f"pip install -U '{behind}'", "refused")


def _check_requires(backend: Backend, written: str) -> None:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    for name, versions in backend.requires.items():
        try:
            good = isinstance(versions, str) and _DIST_NAME.fullmatch(name) and SpecifierSet(versions) is not None
        except (InvalidSpecifier, TypeError):
            good = False
        if not good:
            reason = f"requires {{{name!r}: {versions!r}}} is not a distribution and its versions{written}"
            raise _Fault("REQUIRES", reason, "write versions as PEP 440 has them: requires={'name': '>=2.9'}")


# Probing


def _lacking(backend: Backend) -> Unavailable | None:
    """The distributions that the backend needs and that are not here, with the one command that brings them."""
    problems = {n: p for n, v in backend.requires.items() if (p := package_problem(n, v)) is not None}
    wanted = " ".join(f"'{name}{backend.requires[name]}'" for name in problems)
    return Unavailable("; ".join(problems.values()), f"pip install {wanted}") if problems else None


def _hardware_fix(record: PluginRecord) -> str:
    """What to do where the driver is the suspect."""
    smi = " ".join(record.backend.smi) if record.backend is not None else ""
    return f"see whether {f'`{smi}`' if smi else 'the driver'} answers; {record.remedy}"


def _device_problem(found: object, backend: Backend) -> str | None:
    if not isinstance(found, Device):
        return f"it is {_kind(found)}, not Device or Unavailable"
    if found.type != backend.device_type:
        return f"the device is of type {found.type!r}, the backend says {backend.device_type!r}"
    if type(found.count) is not int or found.count < 1:
        return f"it counts {found.count!r} devices, and where there is none it should be Unavailable"
    texts = [found.name, found.arch, *found.features, *found.versions, *found.versions.values()]
    wrong = [text for text in texts if not isinstance(text, str)]
    return f"names, features and versions are text, and {wrong[0]!r} is {_kind(wrong[0])}" if wrong else None


# Kernels


def _kernel_problem(
    kernel: Kernel, signatures: Mapping[str, inspect.Signature], seen: set[tuple[str, str]]
) -> tuple[str, str] | None:
    """What is wrong with a kernel, and the fix."""
    if kernel.op not in signatures:
        return "is for an op that does not exist", suggest(str(kernel.op), signatures)
    if not isinstance(kernel.provider, str) or not _PROVIDER.fullmatch(kernel.provider):
        return "has a provider that no policy can name", "use lower-case letters, digits, '-' and '_'"
    if (kernel.op, kernel.provider) in seen:
        return "is listed twice", "remove one, or give it a provider of its own"
    empty = inspect.Parameter.empty
    wanted = inspect.Signature([p.replace(annotation=empty) for p in signatures[kernel.op].parameters.values()])
    fix = f"write it as def {kernel.op}{wanted}"
    try:
        difference = signature_difference(inspect.signature(kernel.fn), wanted)
    except (TypeError, ValueError) as problem:
        return f"cannot be inspected: {told(problem)[0]}", f"wrap it in a function; {fix}"
    return (f"{difference}{defined_at(kernel.fn)}", fix) if difference else None


def signature_difference(got: inspect.Signature, wanted: inspect.Signature) -> str | None:
    """The first difference in names, order, kinds or defaults, in words. Annotations are documentation here."""
    ours, theirs = wanted.parameters, got.parameters
    if lacking := [name for name in ours if name not in theirs]:
        return f"lacks the parameter {lacking[0]!r}"
    if extra := [name for name in theirs if name not in ours]:
        return f"has a parameter {extra[0]!r} that its op has not"
    if list(ours) != list(theirs):
        return f"takes its parameters in the order {', '.join(theirs)}, its op in the order {', '.join(ours)}"
    for name, want in ours.items():
        have = theirs[name]
        if have.kind is not want.kind:
            return f"takes {name!r} as {have.kind.description}, its op as {want.kind.description}"
        if type(have.default) is not type(want.default) or have.default != want.default:
            return f"has {_default(have)} for {name!r}, its op {_default(want)}"
    return None


def _default(parameter: inspect.Parameter) -> str:
    return "no default" if parameter.default is inspect.Parameter.empty else f"the default {parameter.default!r}"


def _kind(value: object) -> str:
    return type(value).__qualname__
