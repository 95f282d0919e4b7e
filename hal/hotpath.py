"""The code that every call of an op runs, written out for the op's own parameters.

Generated source, as in dataclasses and for the same reason: a loop over arguments would cost several times the whole
budget of 2 µs. Its own names begin with an underscore, which no parameter's does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from glm5_hal import context, torchlib
from glm5_hal.errors import HalError
from glm5_hal.guards import innermost_transform
from glm5_hal.spec import OpSpec

#: What a key or a guard raises of a call that is new or wrong: it is not in the table; an argument is no tensor, or one
#: without strides; a scalar cannot be hashed, or is an array, which has no truth value. `_miss` says which. Anything
#: else is a fault of the guard itself, and must be seen.
BAD_CALL = (KeyError, AttributeError, TypeError, RuntimeError, ValueError)


def compiled(
    spec: OpSpec, table: dict[Any, Any], last: list[list[Any]] | None, strided: frozenset[str]
) -> tuple[Callable[..., Any], ...]:
    """Methods of one op's class: `__call__`, the same for torch's dispatcher, the key of a call, and the policy and
    scalars of a call.

    Args:
        spec: the op.
        table: kernels by key.
        last: where an op of many tensors keeps its last call's guard, policy and scalars, and kernel; else None.
        strided: tensors whose strides are part of the key.
    """
    scalars, key, grads = ["_active()"], ["_transform() is None"], []
    # A fake tensor looks like a real one, but its type is another.
    key.append(f"{next(a.name for a in spec.args if not a.optional)}.__class__")
    if last is not None:  # a guard knows tensors by their dispatch keys, which inference mode changes
        key.append("_inference()")
    parameters = spec.signature.parameters
    for name, parameter in parameters.items():
        arg = spec.tensors.get(name)
        if arg is None:
            scalars.append(name)
            if parameter.annotation is not str:  # 1, 1.0 and True are equal
                scalars.append(f"{name}.__class__")
            continue
        # size() is the cheaper spelling of .shape: 0.11 against 0.17 µs, measured.
        parts = [f"{name}.{what}" for what in ("dtype", "layout", "size()", "device")]
        parts += [f"{name}.stride()"] * (name in strided)
        if arg.optional:
            key.append(f"None if {name} is None else ({', '.join(parts)})")
        else:
            key += parts
        if torchlib.differentiable(spec, arg):
            grads.append(f"({name} is not None and {name}.requires_grad)" if arg.optional else f"{name}.requires_grad")
    passed = ", ".join(f"{n}={n}" if p.kind is inspect.Parameter.KEYWORD_ONLY else n for n, p in parameters.items())
    gradients = f"if _grad_enabled() and ({' or '.join(grads) or 'False'}): self._refuse_grad()"
    alike, whole = f"({', '.join(scalars)},)", f"({', '.join(scalars + key)},)"
    if last is not None:
        needed = ", ".join(n for n in parameters if n in spec.required)
        alone = " and ".join(f"{a.name} is None" for a in spec.args if a.optional) or "True"
        find = f"""
        _last = _cell[0]
        if {alone} and _last[0]({needed}) and _last[1] == {alike}:
            _kernel = _last[2]
        else:
            {gradients}
            _last = _cell[0] = _table[{whole}]
            _kernel = _last[2]"""
    else:
        find = f"""
        {gradients}
        _kernel = _table[{whole}]"""
    # A kernel that leaves would end the process without a word; an interrupt is the user's and passes.
    run = f"""
    try:{find}
    except _HalError:
        raise
    except _bad_call:
        _kernel = None
    if _kernel is None:
        _kernel = self._miss({passed})
    try:
        return _kernel({passed})
    except _HalError:
        raise
    except (Exception, SystemExit) as _problem:
        raise self._failed(_problem, dict({", ".join(f"{n}={n}" for n in parameters)})) from _problem
"""
    declared = _parameters(spec.signature)
    source = f"""
def __call__(self, {declared}):
    if _is_compiling():
        return self.torch_op({passed})
{run}
def from_torch(self, {declared}):
{run}
def key({declared}):
    return {whole}

def alike({declared}):
    return {alike}
"""
    namespace: dict[str, Any] = {
        "_is_compiling": torch.compiler.is_compiling,
        "_grad_enabled": torch.is_grad_enabled,
        "_inference": torch.is_inference_mode_enabled,
        "_active": context.active.get,
        "_transform": innermost_transform,
        "_table": table,
        "_cell": last,
        "_HalError": HalError,
        "_bad_call": BAD_CALL,
        **{f"_default_{n}": p.default for n, p in parameters.items()},
    }
    exec(compile(source, f"<glm5_hal op {spec.name}>", "exec"), namespace)
    namespace["__call__"].__doc__ = spec.doc
    return tuple(namespace[n] for n in ("__call__", "from_torch", "key", "alike"))


def _parameters(signature: inspect.Signature) -> str:
    parts, star = [], False
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        parts.append(name if parameter.default is inspect.Parameter.empty else f"{name}=_default_{name}")
    return ", ".join(parts)
