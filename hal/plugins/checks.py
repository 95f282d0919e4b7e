"""What a plugin's module and its Backend must be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from glm5_hal.backend import HAL_API, NAME, Backend, Tunable
from glm5_hal.errors import shown
from glm5_hal.formats import FORMATS
from glm5_hal.packages import is_range
from glm5_hal.plugins.isolation import kind_of
from glm5_hal.plugins.record import DISTRIBUTION, Defect, PluginRecord

#: Exactly these, not a subclass: they are compared and told outside of the plugin's guard.
_KINDS: dict[str, type] = {"name": str, "device_type": str, "priority": int, "smi": tuple}

_DEVICE_TYPE = re.compile(r"[a-z][a-z0-9_]*")

_DIST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def check(record: PluginRecord, backend: Backend, written: str) -> None:
    """Raise the first Defect; ``written`` says where the hook is, for its reason."""
    _check_fields(record, backend, written)
    _check_name(record, backend, written)
    _check_api(record, backend, written)
    _check_requires(backend, written)


def _check_fields(record: PluginRecord, backend: Backend, written: str) -> None:
    for field, kind in _KINDS.items():
        if type(getattr(backend, field)) is not kind:
            raise _field(record, field, f"is {kind_of(getattr(backend, field))}, it should be {kind.__name__}", written)
    if not isinstance(backend.requires, Mapping):
        raise _field(record, "requires", f"is {kind_of(backend.requires)}, it should be Mapping", written)
    if not _DEVICE_TYPE.fullmatch(backend.device_type):
        said = f"is {shown(backend.device_type)}, it should be a device type of torch's, without a number"
        raise _field(record, "device_type", said, written)
    for field, word in (("communicator", backend.communicator or ""), *(("smi", word) for word in backend.smi)):
        if type(word) is not str:  # a child process tells of them in JSON
            raise _field(record, field, f"holds {kind_of(word)}, it should hold text", written)
    if backend.prepare is not None and not callable(backend.prepare):
        raise _field(record, "prepare", f"is {kind_of(backend.prepare)}, it should be a function or None", written)
    if backend.tuning is not None and type(backend.tuning) is not Tunable:
        said = f"is {kind_of(backend.tuning)}, it should be Tunable or None"
        raise _field(record, "tuning", said, written)
    _check_formats(record, backend.cache_formats, written)


def _check_name(record: PluginRecord, backend: Backend, written: str) -> None:
    if backend.name == "auto":
        reason = f"a backend cannot be called 'auto', which means something else in a policy{written}"
        raise Defect("NAME", reason, "choose another name")
    if backend.name != record.name and not (record.given and not record.name):
        reason = f"the entry point is called {record.name!r} and its backend {backend.name!r}{written}"
        fix = f"call the entry point {backend.name!r}"
        usable = NAME.fullmatch(record.name) and record.name != "auto"
        raise Defect("NAME", reason, f"{fix} or the backend {record.name!r}" if usable else fix)


def _check_formats(record: PluginRecord, formats: object, written: str) -> None:
    """Lists of names by kind, all of them known: they are read when a cache is made, long after."""
    if not isinstance(formats, Mapping):
        raise _field(record, "cache_formats", f"is {kind_of(formats)}, it should be Mapping", written)
    kinds = dict.fromkeys(known.kind for known in FORMATS.values())
    for kind, names in formats.items():
        if kind not in kinds:
            said = f"has the kind {shown(kind)}, the kinds are {', '.join(kinds)}"
            raise _field(record, "cache_formats", said, written)
        if not isinstance(names, tuple | list):
            said = f"has {kind_of(names)} for {kind!r}, it should have a tuple of names"
            raise _field(record, "cache_formats", said, written)
        known = [name for name, cache in FORMATS.items() if cache.kind == kind]
        for name in names:
            if name not in known:
                said = f"names {shown(name)}, the formats of {kind!r} are {', '.join(known)}"
                raise _field(record, "cache_formats", said, written)


def _field(record: PluginRecord, field: str, said: str, written: str) -> Defect:
    return Defect("FIELD", f"Backend.{field} {said}{written}", f"correct {field}; {record.remedy}")


def _check_api(record: PluginRecord, backend: Backend, written: str) -> None:
    api, pair = backend.hal_api, backend.api_range
    if len(pair) != 2 or any(type(version) is not int for version in pair) or pair[0] > pair[1]:
        reason = f"hal_api {api!r} is neither an int nor a pair of ints, lowest first{written}"
        raise Defect("HAL_API", reason, f"write hal_api={HAL_API[1]}")
    low, high = pair
    if low > HAL_API[1] or high < HAL_API[0]:
        theirs, ours = (" to ".join(map(str, sorted(set(versions)))) for versions in (pair, HAL_API))
        reason = f"the plugin speaks hal_api {theirs}, this core speaks {ours}{written}"
        fix = f"pip install -U '{DISTRIBUTION}'" if low > HAL_API[1] else record.remedy
        raise Defect("HAL_API", reason, fix, "refused")


def _check_requires(backend: Backend, written: str) -> None:
    for name, versions in backend.requires.items():
        if not (isinstance(name, str) and _DIST_NAME.fullmatch(name) and is_range(versions)):
            reason = f"requires {{{name!r}: {versions!r}}} is not a distribution and its versions{written}"
            raise Defect("REQUIRES", reason, "write versions as PEP 440 has them: requires={'name': '>=2.9'}")


def hook_missing(record: PluginRecord, plugin: object, written: str) -> Defect:
    name = record.name if NAME.fullmatch(record.name) else "acme"
    fix = f"""write in the plugin's module:
from glm5_hal import Backend, hookimpl
@hookimpl
def glm5_backend(): return Backend(name={name!r}, device_type=..., probe=probe, kernels=kernels)"""
    if getattr(plugin, "glm5_backend", None) is not None:
        return Defect("HOOK_MISSING", f"glm5_backend lacks the decorator @glm5_hal.hookimpl{written}", fix)
    if inspect.isfunction(plugin) and not record.given:
        fix = f"name the module alone in the entry point: {record.name} = {plugin.__module__!r}"
    return Defect("HOOK_MISSING", f"{record.value} has no function glm5_backend", fix)
