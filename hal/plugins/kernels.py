"""A backend's kernels, each held against the signature of its op."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from glm5_hal.backend import NAME, Kernel
from glm5_hal.errors import HalError, shown, suggest
from glm5_hal.plugins.isolation import attempted, defined_at, guarded, kind_of, told
from glm5_hal.plugins.record import Defect, PluginRecord

#: Names that no plugin may give to a provider, and what they mean.
RESERVED = {
    "auto": "in a policy it means every backend of the device",
    "composite": "it is an op's default, made of other ops",
}

log = logging.getLogger("glm5_hal.plugins")


def load_kernels(record: PluginRecord, signatures: Mapping[str, inspect.Signature]) -> tuple[Kernel, ...]:
    """The backend's kernels, each checked against the signature of its op (``signatures``, by op name).

    Raises:
        HalError: PLUGIN where the plugin is not usable or its ``kernels()`` raises, CONTRACT where a kernel is not
            what its op asks for.
    """
    whose = f"plugin {record.name} ({record.origin})"
    backend = record.backend
    if backend is None:
        raise HalError("PLUGIN", f"{whose}: {record.reason}", value=record.name, fix=record.fix)
    returned = _had(lambda: backend.kernels(), record, f"{whose}: kernels() raised")
    # Reading what it returned runs the plugin's code again: a sequence, a default and a signature may be its own.
    made: tuple[Kernel, ...] = _had(
        lambda: _checked(returned, signatures), record, f"{whose}: reading what kernels() returned raised"
    )
    return made


def _had(ask: Callable[[], Any], record: PluginRecord, raised: str) -> Any:
    """What a plugin's code gives; or what it raised, as a HalError that begins with ``raised``."""
    outcome = guarded(ask, None, record.root)
    if outcome.output:
        log.debug("the kernels of %s printed: %s", record.name, outcome.output)
    if isinstance(outcome.problem, Defect):
        whose = raised.partition(": ")[0]
        raise HalError("CONTRACT", f"{whose}: {outcome.problem.reason}", value=record.name, fix=outcome.problem.fix)
    if outcome.problem is not None:
        what, fix = told(outcome.problem, record.root)
        raise HalError("PLUGIN", f"{raised} {what}", value=record.name, fix=fix or record.remedy) from outcome.problem
    return outcome.value


def _checked(returned: object, signatures: Mapping[str, inspect.Signature]) -> tuple[Kernel, ...]:
    """Kernels of plain fields; raises the first Defect."""
    if not isinstance(returned, Sequence):
        reason = f"kernels() returned {kind_of(returned)}, not a sequence of Kernel"
        raise Defect("CONTRACT", reason, "return a tuple, say kernels_of(module)")
    made: dict[tuple[str, str], Kernel] = {}
    for position, kernel in enumerate(returned):
        if not isinstance(kernel, Kernel):
            reason = f"kernels()[{position}] is {kind_of(kernel)}, not a Kernel"
            raise Defect("CONTRACT", reason, "decorate it with glm5_hal.kernel(op, provider)")
        kernel = Kernel(kernel.op, kernel.provider, kernel.fn, tuple(kernel.requires), frozenset(kernel.provides))
        for field, text in (("op", kernel.op), ("provider", kernel.provider)):
            if type(text) is not str:
                reason = f"kernels()[{position}] has {kind_of(text)} for its {field}, which is plain text"
                raise Defect("CONTRACT", reason, f"write the {field} as a str")
        problem = _kernel_problem(kernel, signatures, made)
        if problem is not None:
            reason = f"kernel {kernel.op} of provider {kernel.provider} {problem[0]}"
            raise Defect("CONTRACT", reason, problem[1])
        made[kernel.op, kernel.provider] = kernel
    return tuple(made.values())


def _kernel_problem(
    kernel: Kernel, signatures: Mapping[str, inspect.Signature], seen: Collection[tuple[str, str]]
) -> tuple[str, str] | None:
    """What is wrong with a kernel, and the fix."""
    if kernel.op not in signatures:
        return "is for an op that does not exist", suggest(kernel.op, signatures)
    if not NAME.fullmatch(kernel.provider):
        return "has a provider that no policy can name", "use lower-case letters, digits, '-' and '_'"
    if kernel.provider in RESERVED:
        return f"has a provider's name that is taken: {RESERVED[kernel.provider]}", "choose another, say native"
    if (kernel.op, kernel.provider) in seen:
        return "is listed twice", "remove one, or give it a provider of its own"
    empty = inspect.Parameter.empty
    wanted = inspect.Signature([p.replace(annotation=empty) for p in signatures[kernel.op].parameters.values()])
    fix = f"write it as def {kernel.op}{wanted}"
    later = _runs_later(kernel.fn)
    if later is not None:
        return f"is {later}{defined_at(kernel.fn)}: a call would compute nothing", f"return the tensors; {fix}"
    got, problem = attempted(lambda: inspect.signature(kernel.fn))
    if got is None:
        said = "" if problem is None else told(problem)[0]
        return f"cannot be inspected: {said}", f"wrap it in a function; {fix}"
    difference = signature_difference(got, wanted)
    return (f"{difference}{defined_at(kernel.fn)}", fix) if difference else None


def _runs_later(fn: object) -> str | None:
    """What a function is whose call only makes an object to wait for or to walk."""
    for found in (fn, inspect.getattr_static(type(fn), "__call__", None)):
        if inspect.iscoroutinefunction(found):
            return "a coroutine function (async def)"
        if inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found):
            return "a generator function (it has a yield)"
    return None


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
    return "no default" if parameter.default is inspect.Parameter.empty else f"the default {shown(parameter.default)}"
