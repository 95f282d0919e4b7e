"""The hot path: one table per op, keyed by what the checks and requirements read of a call.

A hit costs a dict lookup; a miss checks the metadata, resolves, and stores the kernel. Ops of many tensors remember the
last signature as a guard, which is cheaper than building its key. `op.bind()` hands out the kernel itself. Nothing is
counted or logged here: observing wraps what is stored in the table.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from glm5_hal import context, observe, torchlib
from glm5_hal.errors import HalError
from glm5_hal.guards import innermost_transform, is_wrapped, tensor_guard
from glm5_hal.hotpath import compiled
from glm5_hal.memory import check_apart
from glm5_hal.metadata import signature_of
from glm5_hal.plugins.isolation import told
from glm5_hal.resolve import Choice, Resolution, Step, left_out, resolve
from glm5_hal.signature import Signature, TensorMeta
from glm5_hal.spec import OpSpec

#: A table that has grown past this is cleared: serving with ever new batch sizes must not leak.
TABLE_LIMIT = 4096

#: From so many tensor arguments on, a guard on the last signature is worth its check.
GUARD_FROM = 4

#: What a guarded op remembers before its first call: [guard, policy and scalars, kernel].
NOTHING: list[Any] = [lambda *_: False, None, None]

_ops: weakref.WeakSet[Op] = weakref.WeakSet()
_made: dict[str, Op] = {}
_making = threading.RLock()


class Op:
    """A callable operator: eager calls go straight to the table, `torch.compile` sees ``torch.ops.glm5.<name>``.

    Attributes:
        spec: the op's declaration.
        torch_op: the same op as a torch.library operator.
    """

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.__name__ = self.__qualname__ = spec.name
        self.__doc__ = spec.doc
        self.__signature__ = spec.signature
        self._table: dict[Any, Any] = {}
        self._last: list[list[Any]] = [NOTHING]
        self._remembers = sum(not a.optional for a in spec.args) >= GUARD_FROM
        self._lock = threading.RLock()
        self._epoch = 0
        self._strided: frozenset[str] = frozenset(spec.mutates) | {a.name for a in spec.args if a.layout != "any"}
        self._functions = self._compiled()
        self._call, from_torch, self._key, self._alike = self._functions
        self.torch_op = torchlib.register(spec, from_torch.__get__(self))
        _ops.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # each instance's class overrides this: see `make_op`
        return self._call(self, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<glm5_hal op {self.spec.name}{self.spec.signature}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (op_named, (self.spec.name,))

    def bind(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The kernel that a call with these arguments would run, resolved once.

        It is the bare kernel: calling it skips every guard. No metadata or value is checked, no policy is read, no
        event is emitted; the caller promises calls of the same signature.
        """
        return self.choose(*args, **kwargs).kernel.fn

    def choose(self, *args: Any, **kwargs: Any) -> Choice:
        """The backend and kernel that serve such a call. Raises HalError("NO_KERNEL") with the whole trace."""
        call = self.describe(*args, **kwargs)
        return self._chosen(call, self.resolution(call))

    def describe(self, *args: Any, **kwargs: Any) -> Signature:
        """The call's metadata, checked against the declaration."""
        arguments = self.spec.bind(*args, **kwargs)
        metas = {a.name: meta_of(self.spec, a.name, arguments[a.name], a.optional) for a in self.spec.args}
        return signature_of(self.spec, metas, {s.name: arguments[s.name] for s in self.spec.scalars})

    def resolution(self, call: Signature) -> Resolution:
        """What the policy in force makes of a call."""
        policy, require, _ = context.effective()
        targets = policy.targets(self.spec.name)
        return resolve(self.spec, call, context.catalogue(), targets, require)

    def clear(self) -> None:
        with self._lock:
            self._epoch += 1
            if self._remembers:
                for entry in self._table.values():  # another thread may be about to remember one of them
                    entry[0] = NOTHING[0]
            self._table.clear()
            self._last[0] = NOTHING

    def _compiled(self) -> tuple[Callable[..., Any], ...]:
        return compiled(self.spec, self._table, self._last if self._remembers else None, self._strided)

    # --- the slow path -----------------------------------------------------------------------------------------------

    def _miss(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        epoch = self._epoch
        arguments = self.spec.bind(*args, **kwargs)
        call = self.describe(**arguments)
        if any(_is_fake(arguments[name]) for name in self.spec.tensors):
            return self.torch_op  # type: ignore[no-any-return]
        resolution = self.resolution(call)
        choice = self._chosen(call, resolution)
        entry = observe.wrapped(self.spec.name, choice, self._guarded(choice.kernel.fn, call))
        observe.selected(self.spec.name, call, choice)
        with self._lock:
            # Else it was decided under settings that hold no longer, or of tensors that a transform may wrap next time.
            if epoch == self._epoch and innermost_transform() is None:
                self._widen(resolution)
                if len(self._table) >= TABLE_LIMIT:
                    self._table.clear()
                self._table[self._key(**arguments)] = self._entry(arguments, entry) if self._remembers else entry
        return entry

    def _entry(self, arguments: Mapping[str, Any], kernel: Callable[..., Any]) -> list[Any]:
        needed = [arguments[n] for n in self.spec.signature.parameters if n in self.spec.required]
        more = any(arguments[a.name] is not None for a in self.spec.args if a.optional)
        guard = None if more else tensor_guard(needed)
        return [guard or NOTHING[0], self._alike(**arguments), kernel]

    def _chosen(self, call: Signature, resolution: Resolution) -> Choice:
        if resolution.chosen is None:
            raise _no_kernel(self.spec, call, resolution.trace)
        return resolution.chosen

    def _guarded(self, fn: Callable[..., Any], call: Signature) -> Callable[..., Any]:
        spec, check = self.spec, self.spec.check_values
        level = context.effective()[2]
        on_cpu = all(m is None or m.device == "cpu" for m in call.tensors.values())
        if not (check or spec.mutates) or level == "metadata" or (level == "auto" and not on_cpu):
            return fn
        names = tuple(spec.signature.parameters)

        def checked(*args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            check_apart(spec, arguments)
            if check is not None:
                check(arguments)
            return fn(*args, **kwargs)

        return checked

    def _widen(self, resolution: Resolution) -> None:
        """Strides join the key as soon as a kernel that asks for them is among the candidates, accepted or not."""
        read = {
            name
            for kernel in resolution.considered
            for requirement in kernel.requires
            for name, what in requirement.reads
            if what == "strides"
        }
        if not read <= self._strided:
            self._strided |= read
            self.clear()
            for old, new in zip(self._functions, self._compiled(), strict=True):
                old.__code__ = new.__code__

    def _refuse_grad(self) -> None:
        raise torchlib.no_gradient(self.spec)

    def _failed(self, problem: BaseException, arguments: Mapping[str, Any]) -> HalError:
        """A kernel's own exception, with what it takes to report it. Nothing else is tried after it."""
        try:
            resolution = self.resolution(self.describe(**arguments))
        except HalError:  # the kernel has spoilt an argument on its way: its own problem is the one to report
            resolution = Resolution(None, ())
        ran, versions, root = "?", "", ""
        if resolution.chosen:
            catalogue = context.catalogue()
            device = catalogue.device(resolution.chosen.backend)
            root = catalogue.record(resolution.chosen.backend).root
            ran, known = resolution.chosen.name, getattr(device, "versions", {})
            versions = f" ({', '.join(f'{k} {v}' for k, v in known.items())})" if known else ""
        return HalError(
            "KERNEL",
            f"{self.spec.name}: kernel {ran}{versions} raised {told(problem, root)[0]}",
            value=problem,
            fix=f"report it with `glm5-hal doctor --json`; GLM5_BACKEND='...; {self.spec.name}=...' chooses another",
            trace=resolution.trace,
        )


def make_op(spec: OpSpec) -> Op:
    """The op of a spec, made once. Its class is its own: calling an instance costs no more than calling a function."""
    with _making:
        op = _made.get(spec.name)
        if op is None or op.spec is not spec:
            cls = type(f"Op_{spec.name}", (Op,), {})
            op = _made[spec.name] = cls(spec)
            cls.__call__ = op._call  # type: ignore[method-assign]
        return op


def op_named(name: str) -> Op:
    from glm5_hal import ops

    op: Op = getattr(ops, name)
    return op


def clear_tables() -> None:
    for op in list(_ops):
        op.clear()


def renew_locks() -> None:
    """For a child after a fork: a lock that another thread of the parent held is never released there."""
    global _making
    _making = threading.RLock()
    for op in list(_ops):
        op._lock = threading.RLock()


def meta_of(spec: OpSpec, name: str, value: Any, optional: bool) -> TensorMeta | None:
    if value is None and optional:
        return None
    if not isinstance(value, torch.Tensor):
        raise HalError(
            "TYPE",
            f"{spec.name}: {name} is {type(value).__name__}, it should be a tensor",
            value=value,
            fix=spec.tensors[name].doc,
        )
    if is_wrapped(value):
        raise HalError(
            "TYPE",
            f"{spec.name}: {name} is wrapped by a torch.func transform (vmap, grad, jvp), and kernels read memory",
            value=type(value),
            fix="call the op outside of the transform; ops take whole batches",
        )
    if value.layout != torch.strided:
        raise HalError(
            "STRIDE", f"{spec.name}: {name} has layout {value.layout}", value=value.layout, fix="use to_dense()"
        )
    return TensorMeta(str(value.dtype)[6:], tuple(value.shape), str(value.device), tuple(value.stride()))


def _is_fake(value: Any) -> bool:
    return type(value) is not torch.Tensor and type(value).__name__ in ("FakeTensor", "FunctionalTensor")


def _no_kernel(spec: OpSpec, call: Signature, trace: Sequence[Step]) -> HalError:
    policy, require, _ = context.effective()
    wanted = f", require={sorted(require)}" if require else ""
    fix = next((getattr(s.decision, "fix", "") for s in trace), "")
    if not trace:
        fix = "install a backend for this device, or name one in GLM5_BACKEND; `glm5-hal doctor` lists what is there"
    return HalError(
        "NO_KERNEL",
        f"no kernel takes this call of {spec.name} under policy {policy.text!r} ({policy.provenance}{wanted})",
        fix=fix,
        trace=(*trace, *left_out(spec, call, context.catalogue(), policy.targets(spec.name), outside=False)),
    )
