"""The installed backends as one object: discovered, probed and loaded lazily, each at most once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glm5_hal import plugins
from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.capability import one_of
from glm5_hal.decision import Requirement
from glm5_hal.errors import HalError, suggest
from glm5_hal.metadata import axis_names
from glm5_hal.plugins import PluginRecord
from glm5_hal.plugins.isolation import attempted, told
from glm5_hal.resolve import described
from glm5_hal.spec import OpSpec


class Catalogue:
    """Thread-safe; `glm5_hal.resolve.Catalogue` is the part of it that resolution reads."""

    def __init__(self, records: Sequence[PluginRecord] | None = None, given: Sequence[str] = ()) -> None:
        self._lock = threading.RLock()
        self._given = tuple(given)
        self._found = None if records is None else tuple(records)
        self._settled: dict[str, tuple[PluginRecord, ...]] = {}
        self._devices: dict[str, Device | Unavailable] = {}
        self._kernels: dict[str, tuple[Kernel, ...] | HalError] = {}

    @property
    def found(self) -> tuple[PluginRecord, ...]:
        """Every plugin that is announced, loaded or not."""
        with self._lock:
            if self._found is None:
                self._found = plugins.find(given=self._given)
            return self._found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.name for record in self.found))

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """All of them, loaded, in their order."""
        return tuple(sorted((r for name in self.names for r in self.named(name)), key=plugins.order))

    def named(self, name: str) -> tuple[PluginRecord, ...]:
        """The records of one name, loaded: these and no others."""
        with self._lock:
            if name not in self._settled:
                self._settled[name] = plugins.settle([r for r in self.found if r.name == name])
            return self._settled[name]

    def of_device(self, device_type: str, *, outside: bool = True) -> Iterator[PluginRecord]:
        """What computes on such a device, in order. Outside plugins are not loaded until the built-in ones are through:
        who is served by these never waits for those, nor fails with them. Without ``outside`` they are left alone."""
        names = dict.fromkeys(r.name for r in self.found if r.builtin)
        ours = [r for name in names for r in self.named(name) if r.builtin]
        yield from (r for r in ours if r.backend is not None and r.backend.device_type == device_type)
        theirs = (r for r in self.records if not r.builtin) if outside else ()
        yield from (r for r in theirs if r.backend is not None and r.backend.device_type == device_type)

    def unusable(self) -> Iterator[PluginRecord]:
        """Outside plugins that are broken or refused: which device they would compute on is not known."""
        yield from (r for r in self.records if not r.builtin and r.status != "ok")

    def vet(self) -> None:
        """Try every outside plugin in a process of its own, before any is loaded here."""
        with self._lock:
            self._found = plugins.vetted(self.found)

    def record(self, name: str) -> PluginRecord:
        """The record that answers for a backend name. Raises HalError("UNKNOWN")."""
        if name not in self.names:
            raise HalError("UNKNOWN", f"no backend {name!r}", value=name, fix=suggest(name, self.names))
        return min(self.named(name), key=lambda r: r.status != "ok")

    def backend(self, name: str) -> Backend:
        """A backend's plugin object. Raises HalError: UNKNOWN, or PLUGIN where the plugin is not usable."""
        record = self.record(name)
        if record.backend is None:
            raise HalError("PLUGIN", f"backend {name}: {record.reason}", value=name, fix=record.fix)
        return record.backend

    def device(self, name: str) -> Device | Unavailable:
        """What the backend's probe found, asked once per process."""
        with self._lock:
            if name not in self._devices:
                self._devices[name] = plugins.probe(self.record(name))
            return self._devices[name]

    def all_kernels(self, name: str) -> tuple[Kernel, ...]:
        """Every kernel of a backend, checked against its op; composites' defaults included.

        Raises HalError("PLUGIN") or HalError("CONTRACT"), the same one each time: a plugin is asked once.
        """
        with self._lock:
            if name not in self._kernels:
                try:
                    self._kernels[name] = self._load(name)
                except HalError as problem:
                    self._kernels[name] = problem
            found = self._kernels[name]
        if isinstance(found, HalError):
            raise found.with_traceback(None)
        return found

    def kernels(self, name: str, op: str) -> tuple[Kernel, ...]:
        return tuple(k for k in self.all_kernels(name) if k.op == op)

    def providers(self, name: str) -> tuple[str, ...] | None:
        """Provider names of a backend, or None where its device is not there and its kernels cannot be asked."""
        if self.record(name).status != "ok" or isinstance(self.device(name), Unavailable):
            return None
        return tuple(dict.fromkeys(k.provider for k in self.all_kernels(name)))

    def _load(self, name: str) -> tuple[Kernel, ...]:
        from glm5_hal.ops import specs

        known, record = specs(), self.record(name)
        loaded = plugins.load_kernels(record, {n: s.signature for n, s in known.items()})
        for kernel in loaded:
            _check_requirements(kernel, known[kernel.op], record)
        formatted = tuple(_plain_weights_unless_declared(k, "weight_format" in known[k.op].options) for k in loaded)
        return formatted + tuple(_default(s) for s in known.values() if s.composite)


def _default(spec: OpSpec) -> Kernel:
    """A composite's default as a kernel: what is asked of it is asked of its parts in their turn."""
    fn = _composite(spec)
    if not spec.own_products:
        return Kernel(spec.name, "composite", fn, provides=frozenset(spec.attributes))
    claims = frozenset(spec.attributes) - {"batch_invariant"}
    return _plain_weights_unless_declared(Kernel(spec.name, "composite", fn, provides=claims), True)


def _composite(spec: OpSpec) -> Callable[..., Any]:
    """A composite's body over the dispatched ops, each resolved in its turn."""
    from glm5_hal import ops

    body = spec.reference

    def composite(*args: Any, **kwargs: Any) -> Any:
        return body(ops, *args, **kwargs)

    composite.__name__ = f"{spec.name}_composite"
    composite.__signature__ = spec.signature  # type: ignore[attr-defined]
    return composite


#: What a requirement may read of a tensor; of an axis or a scalar it reads the "value".
_READABLE = ("dtype", "shape", "strides", "device")


def _check_requirements(kernel: Kernel, spec: OpSpec, record: PluginRecord) -> None:
    """Whatever a requirement reads must be there: a misspelt limit would never bind."""
    whose = f"plugin {record.name}: kernel {kernel.op} of provider {kernel.provider}"
    for requirement in kernel.requires:
        for name, what in _reads(requirement, whose, record.root):
            known = (
                {*spec.tensors}
                if what in _READABLE
                else {*spec.options, *axis_names(spec)}
                if what == "value"
                else set()
            )
            if name not in known:
                raise HalError(
                    "CONTRACT",
                    f"{whose} requires {described(requirement)!r}, which reads the {what} of {name!r}, and its op has "
                    "no such thing",
                    value=(name, what),
                    fix=suggest(name, known) if known else f"read among value, {', '.join(_READABLE)}",
                )


def _reads(requirement: Requirement, whose: str, root: str) -> list[tuple[str, str]]:
    reads, problem = attempted(lambda: [(str(name), str(what)) for name, what in requirement.reads])
    if problem is not None or reads is None:
        said = "" if problem is None else told(problem, root)[0]
        raise HalError(
            "CONTRACT",
            f"{whose}: what {described(requirement)!r} reads is not known: {said}",
            value=requirement,
            fix='let reads be a frozenset of pairs such as ("x", "dtype")',
        ) from problem
    return reads


def _plain_weights_unless_declared(kernel: Kernel, takes_format: bool) -> Kernel:
    """A kernel that says nothing about prepared weights knows the plain form only; silence must not mean "any"."""
    if not takes_format or any(("weight_format", "value") in r.reads for r in kernel.requires):
        return kernel
    requires = (*kernel.requires, one_of("weight_format", "plain"))
    return Kernel(kernel.op, kernel.provider, kernel.fn, requires, kernel.provides)
