"""Our own kernels with one change to their source each: every mutation of the torch provider and of the composites.

A mutant is put in place by giving the live function the changed code, so that whoever calls it gets the mutant, and is
taken out again. That is why mutants are judged in processes of their own (`pool`).
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from glm5_hal import ops
from glm5_hal.backend import Kernel
from glm5_hal.backends import _torch
from glm5_hal.backends._torch import blocks, caches, numbers
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.mutants.operators import Mutation, mutated, mutations
from glm5_hal.ops._common.references import reference_of


@dataclass(frozen=True)
class Mechanical:
    """One mutation of one of our modules. ``id`` is module:line:column:operator, with a number where there are more."""

    id: str
    module: str
    mutation: Mutation

    @property
    def at(self) -> str:
        """The function that it changes."""
        return f"{self.module}.{self.mutation.function}"

    @property
    def digest(self) -> str:
        """Of what it changes into what, wherever in the file: outlives edits elsewhere."""
        text = f"{self.at}\n{self.mutation.before}\n{self.mutation.after}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def kernels() -> Mapping[str, Callable[..., Any]]:
    """What is mutated, by op: the kernels of the torch provider; a composite's own body where there is none."""
    own = {k.op: k.fn for k in _torch.kernels()}
    return {name: own.get(name) or reference_of(name) for name in ops.names()}


@cache
def sources() -> Mapping[str, types.ModuleType]:
    """The modules that are mutated, by short name: where those kernels are, and what they share."""
    places = [module.__name__ for module in (blocks, caches, numbers)]
    for op, fn in kernels().items():
        places.append(fn.__module__ if _is_torch(fn.__module__) else ops.specs()[op].reference.__module__)
    return {name.rpartition(".")[2]: sys.modules[name] for name in dict.fromkeys(places)}


def _is_torch(module: str) -> bool:
    return module.startswith(_torch.__name__)


def _mutated_functions(module: types.ModuleType) -> set[str] | None:
    """A module of ops is mutated in its composite's body alone (None: in everything)."""
    return None if _is_torch(module.__name__) else {module.SPEC.reference.__name__}


@cache
def _text(module: str) -> str:
    return inspect.getsource(sources()[module])


@cache
def all_of(module: str) -> tuple[Mechanical, ...]:
    """Every mutant of a module. Two mutations that give the same statement are one."""
    only, taken = _mutated_functions(sources()[module]), set()
    found: dict[Any, Mechanical] = {}
    for m in mutations(_text(module)):
        if only is not None and m.function not in only:
            continue
        name = f"{module}:{m.line}:{m.column}:{m.operator}"
        number = next(i for i in range(1, 1000) if (name, i) not in taken)
        taken.add((name, number))
        made = Mechanical(name if number == 1 else f"{name}-{number}", module, m)
        found.setdefault((m.path[:3], made.digest), made)
    return tuple(found.values())


def all_mutants() -> tuple[Mechanical, ...]:
    return tuple(m for module in sources() for m in all_of(module))


def find(mutant_id: str) -> Mechanical:
    return next(m for m in all_of(mutant_id.split(":")[0]) if m.id == mutant_id)


@contextmanager
def in_place(mutant: Mechanical) -> Iterator[None]:
    """The live function with the mutant's code."""
    module = sources()[mutant.module]
    function = _function(module, mutant.mutation.function)
    code = mutated(_text(mutant.module), mutant.mutation, str(module.__file__))
    before = function.__code__
    function.__code__ = _code_of(code, mutant.mutation.function)
    try:
        yield
    finally:
        function.__code__ = before


def _function(module: types.ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    return found.fn if isinstance(found, Kernel) else found


def _code_of(code: types.CodeType, name: str) -> types.CodeType:
    for part in name.split("."):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == part)
    return code


def executed(op: str, cases: Sequence[Case], arguments: Callable[[Case], Mapping[str, Any]]) -> dict[str, list[str]]:
    """Which lines of which module ("module:line") the op's kernel executes, by case id.

    ``arguments``: fresh inputs of a case. A mutant is judged on the cases that execute its statement.
    """
    files = {str(module.__file__): name for name, module in sources().items()}
    lines: set[str] = set()

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            lines.add(f"{files[frame.f_code.co_filename]}:{frame.f_lineno}")
        return local

    def called(frame: Any, event: str, arg: Any) -> Any:
        return local if frame.f_code.co_filename in files else None

    found = {}
    for case in cases:
        args = dict(arguments(case))
        lines.clear()
        outer = sys.gettrace()
        sys.settrace(called)
        try:
            with torch.inference_mode():
                kernels()[op](**args)
        finally:
            sys.settrace(outer)
        found[case.id] = sorted(lines)
    return found


ARGUED = Path(__file__).with_name("equivalents.toml")


@dataclass(frozen=True)
class Equivalents:
    """Mutants that are no mistakes, with the argument why: ``why`` by digest, and entries that match none."""

    why: Mapping[str, str]
    stale: tuple[str, ...]


def equivalents(path: Path | None = None) -> Equivalents:
    """The mutants that `equivalents.toml` argues away. An entry that matches no mutant is stale: an error."""
    known = {(m.at, m.mutation.before, m.mutation.after): m for m in all_mutants()}
    why, stale = {}, []
    for entry in tomllib.loads((path or ARGUED).read_text(encoding="utf-8"))["equivalent"]:
        for after in entry["after"]:
            mutant = known.get((entry["at"], entry["before"], after))
            if mutant is None:
                stale.append(f"{entry['at']}: {entry['before']} -> {after}")
            else:
                why[mutant.digest] = entry["why"]
    return Equivalents(why, tuple(stale))
