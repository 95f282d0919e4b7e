"""A backend's kernels, each held against the signature of its op."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence

from glm5_hal.backend import NAME, Kernel
from glm5_hal.errors import HalError, suggest
from glm5_hal.plugins.isolation import defined_at, guarded, kind_of, told
from glm5_hal.plugins.record import PluginRecord

log = logging.getLogger("glm5_hal.plugins")


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
        what = f"{whose}: kernels() returned {kind_of(outcome.value)}, not a sequence of Kernel"
        raise HalError("CONTRACT", what, value=outcome.value, fix="return a tuple, say kernels_of(module)")
    seen: set[tuple[str, str]] = set()
    for position, kernel in enumerate(outcome.value):
        if not isinstance(kernel, Kernel):
            what = f"{whose}: kernels()[{position}] is {kind_of(kernel)}, not a Kernel"
            raise HalError("CONTRACT", what, value=kernel, fix="decorate it with glm5_hal.kernel(op, provider)")
        problem = _kernel_problem(kernel, signatures, seen)
        if problem is not None:
            what = f"{whose}: kernel {kernel.op} of provider {kernel.provider} {problem[0]}"
            raise HalError("CONTRACT", what, value=kernel, fix=problem[1])
        seen.add((kernel.op, kernel.provider))
    return tuple(outcome.value)


def _kernel_problem(
    kernel: Kernel, signatures: Mapping[str, inspect.Signature], seen: set[tuple[str, str]]
) -> tuple[str, str] | None:
    """What is wrong with a kernel, and the fix."""
    if kernel.op not in signatures:
        return "is for an op that does not exist", suggest(str(kernel.op), signatures)
    if not isinstance(kernel.provider, str) or not NAME.fullmatch(kernel.provider):
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
