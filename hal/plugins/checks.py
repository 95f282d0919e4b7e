"""What a plugin's module and its Backend must be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from glm5_hal.backend import HAL_API, Backend
from glm5_hal.packages import is_range
from glm5_hal.plugins.isolation import kind_of
from glm5_hal.plugins.record import DISTRIBUTION, Defect, PluginRecord

_KINDS: dict[str, type] = {"device_type": str, "priority": int, "requires": Mapping, "smi": tuple}

_DIST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def check(record: PluginRecord, backend: Backend, written: str) -> None:
    """Raise the first Defect; ``written`` says where the hook is, for its reason."""
    _check_fields(record, backend, written)
    _check_api(record, backend, written)
    _check_requires(backend, written)


def _check_fields(record: PluginRecord, backend: Backend, written: str) -> None:
    if backend.name == "auto":
        reason = f"a backend cannot be called 'auto', which means something else in a policy{written}"
        raise Defect("NAME", reason, "choose another name")
    if record.name and backend.name != record.name:
        reason = f"the entry point is called {record.name!r} and its backend {backend.name!r}{written}"
        raise Defect("NAME", reason, f"call the entry point {backend.name!r} or the backend {record.name!r}")
    for field, kind in _KINDS.items():
        value = getattr(backend, field)
        if not isinstance(value, kind):
            reason = f"Backend.{field} is {kind_of(value)}, it should be {kind.__name__}{written}"
            raise Defect("FIELD", reason, f"correct {field}; {record.remedy}")
    words: list[tuple[str, object]] = [
        ("communicator", backend.communicator or ""),
        *(("smi", word) for word in backend.smi),
    ]
    for field, word in words:  # a child process tells of them in JSON
        if not isinstance(word, str):
            reason = f"Backend.{field} holds {kind_of(word)}, it should hold text{written}"
            raise Defect("FIELD", reason, f"correct {field}; {record.remedy}")


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
    fix = f"""write in the plugin's module:
from glm5_hal import Backend, hookimpl
@hookimpl
def glm5_backend(): return Backend(name={record.name or "acme"!r}, device_type=..., probe=probe, kernels=kernels)"""
    if getattr(plugin, "glm5_backend", None) is not None:
        return Defect("HOOK_MISSING", f"glm5_backend lacks the decorator @glm5_hal.hookimpl{written}", fix)
    if inspect.isfunction(plugin) and not record.given:
        fix = f"name the module alone in the entry point: {record.name} = {plugin.__module__!r}"
    return Defect("HOOK_MISSING", f"{record.value} has no function glm5_backend", fix)
