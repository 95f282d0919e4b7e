"""Mutation operators: small changes to Python source, each one a mistake that a programmer makes.

Only the bodies of functions are changed: not signatures, annotations, decorators or docstrings. A change is known by
the statement before and after it, which says what it is and outlives edits elsewhere in the file.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

#: From a node to a field of its, and to a place in it where that is a list.
Step = tuple[str, int | None]


@dataclass(frozen=True)
class Mutation:
    """One change to a module.

    Attributes:
        function: qualified name of the function that it is in.
        line, column: where, the line counted from 1 and the column from 0.
        lines: first and last line of the statement (of its header, where it has a body): what has to be executed.
        operator: one of :data:`OPERATORS`, or "drop".
        before, after: the statement (its header) in both forms.
    """

    function: str
    line: int
    column: int
    lines: tuple[int, int]
    operator: str
    before: str
    after: str
    path: tuple[Step, ...]
    node: ast.AST


def mutations(source: str) -> Iterator[Mutation]:
    """Every mutation of a module, in the order of its text."""
    tree = ast.parse(source)
    for name, path, function in _functions(tree, (), ""):
        bound: set[str] = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        for where, statement in _statements(function, path):
            yield from _of_statement(name, tree, where, statement, bound)


def mutated(source: str, mutation: Mutation, file: str) -> CodeType:
    """The compiled module with this one change."""
    tree = ast.parse(source)
    _put(tree, mutation.path, copy.deepcopy(mutation.node))
    return compile(ast.fix_missing_locations(tree), file, "exec")


def _functions(
    node: ast.AST, path: tuple[Step, ...], prefix: str
) -> Iterator[tuple[str, tuple[Step, ...], ast.FunctionDef]]:
    """Functions of a module and methods of its classes; what is defined inside a function is part of that."""
    for i, item in enumerate(getattr(node, "body", ())):
        here = (*path, ("body", i))
        if isinstance(item, ast.FunctionDef):
            yield f"{prefix}{item.name}", here, item
        elif isinstance(item, ast.ClassDef):
            yield from _functions(item, here, f"{prefix}{item.name}.")


def _statements(node: ast.AST, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], ast.stmt]]:
    for field in ("body", "orelse", "handlers", "finalbody"):
        inner = getattr(node, field, None)
        for i, item in enumerate(inner if isinstance(inner, list) else ()):
            here = (*path, (field, i))
            if isinstance(item, ast.stmt) and not _is_docstring(item):
                yield here, item
            yield from _statements(item, here)


def _is_docstring(item: ast.stmt) -> bool:
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)


def _of_statement(
    function: str, tree: ast.AST, path: tuple[Step, ...], statement: ast.stmt, bound: set[str]
) -> Iterator[Mutation]:
    header, before = _header_lines(statement), _header(statement)

    def made(operator: str, at: tuple[Step, ...], old: ast.AST, new: ast.AST) -> Mutation:
        _put(tree, at, new)
        after = _header(new) if isinstance(new, ast.stmt) else _header(statement)
        _put(tree, at, old)
        line, column = getattr(old, "lineno", statement.lineno), getattr(old, "col_offset", statement.col_offset)
        return Mutation(function, line, column, header, operator, before, after, at, new)

    if _may_go(statement, bound):
        yield made("drop", path, statement, ast.Pass())
    bound |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for at, node in _expressions(statement, path):
        for operator, variants in OPERATORS.items():
            for new in variants(node):
                yield made(operator, at, node, new)


def _may_go(statement: ast.stmt, bound: set[str]) -> bool:
    """Whether a program without this statement still has all its names."""
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        new = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return new <= bound
    return isinstance(statement, (ast.Expr, ast.AugAssign, ast.Continue, ast.Break))


def _expressions(statement: ast.stmt, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], ast.AST]]:
    """The nodes of a statement that are not statements of their own, itself first."""
    yield path, statement
    if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield from _inside(statement, path)


def _inside(node: ast.AST, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], ast.AST]]:
    for field, value in ast.iter_fields(node):
        if field == "annotation":
            continue
        for i, item in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(item, ast.keyword) and item.arg == "strict":
                continue  # an assertion
            if isinstance(item, ast.AST) and not isinstance(item, (ast.stmt, ast.expr_context, ast.excepthandler)):
                yield (*path, (field, i)), item
                yield from _inside(item, (*path, (field, i)))


def _header(statement: ast.stmt) -> str:
    """A statement's text, less its body."""
    if isinstance(statement, ast.Pass):
        return "pass"
    bare = copy.copy(statement)
    for field in ("body", "orelse", "finalbody", "handlers"):
        if isinstance(getattr(bare, field, None), list):
            setattr(bare, field, [ast.Pass()] if field == "body" else [])
    text = ast.unparse(bare)
    return text.removesuffix("pass").rstrip() if hasattr(bare, "body") else text


def _header_lines(statement: ast.stmt) -> tuple[int, int]:
    body = getattr(statement, "body", None)
    last = statement.end_lineno or statement.lineno
    return statement.lineno, max(statement.lineno, body[0].lineno - 1) if isinstance(body, list) and body else last


def _put(tree: ast.AST, path: tuple[Step, ...], new: ast.AST) -> None:
    *way, (field, i) = path
    node: Any = tree
    for name, at in way:
        node = getattr(node, name) if at is None else getattr(node, name)[at]
    if i is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[i] = new


# --- what a node may become ------------------------------------------------------------------------------------------

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr,
    ast.RShift: ast.LShift, ast.LShift: ast.RShift,
}  # fmt: skip
RENAMED = {
    "amax": "amin", "argmax": "argmin", "maximum": "minimum", "minimum": "maximum", "clamp_min": "clamp_max",
    "log": "log2", "exp_": "exp2_", "exp": "exp2", "any": "all", "all": "any", "sum": "mean", "min": "max",
    "max": "min", "zeros": "ones", "new_zeros": "new_ones", "cumsum": "cumprod", "sigmoid": "tanh", "sub_": "add_",
    "add_": "sub_", "mul": "div", "mul_": "div_", "neg": "abs", "mm": "add",
}  # fmt: skip
COMMUTATIVE = ("max", "min", "maximum", "minimum", "transpose")
NARROWED = {"float32": "bfloat16", "float64": "float32", "float": "bfloat16", "double": "float", "int16": "int32"}


def _comparison(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        yield ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators)


def _arithmetic(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
    if isinstance(node, ast.AugAssign) and type(node.op) in COMPUTED:
        yield ast.AugAssign(node.target, COMPUTED[type(node.op)](), node.value)
    if isinstance(node, ast.UnaryOp):
        yield node.operand


def _constant(node: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield from (ast.Constant(value + 1), ast.Constant(value - 1))
    elif isinstance(value, float):
        yield ast.Constant(value * 1.5 if value else 1.0)


def _index(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Slice):
        if node.lower is not None and not (isinstance(node.lower, ast.Constant) and node.lower.value == 0):
            yield ast.Slice(None, node.upper, node.step)
        if node.upper is not None:
            yield ast.Slice(node.lower, None, node.step)
    if isinstance(node, ast.Subscript) and (isinstance(node.slice, ast.Name) or _is_sum(node.slice)):
        yield ast.Subscript(node.value, ast.BinOp(node.slice, ast.Sub(), ast.Constant(1)), node.ctx)


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))


def _renamed(names: dict[str, str]) -> Callable[[ast.AST], Iterator[ast.AST]]:
    def variants(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.ctx, ast.Load):
            yield ast.Attribute(node.value, names[node.attr], node.ctx)
        if isinstance(node, ast.Name) and node.id in ("min", "max", "any", "all") and node.id in names:
            yield ast.Name(names[node.id], node.ctx)

    return variants


def _branch(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    if isinstance(node, ast.If):
        yield from (ast.If(ast.Constant(value), node.body, node.orelse) for value in (True, False))


def _arguments(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Call) and len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args):
        *first, a, b = node.args
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if type(a) is type(b) and ast.dump(a) != ast.dump(b) and called not in COMMUTATIVE:
            yield ast.Call(node.func, [*first, b, a], node.keywords)


#: By name: what a node may become.
OPERATORS: dict[str, Callable[[ast.AST], Iterator[ast.AST]]] = {
    "compare": _comparison,
    "arithmetic": _arithmetic,
    "constant": _constant,
    "index": _index,
    "name": _renamed(RENAMED),
    "dtype": _renamed(NARROWED),
    "branch": _branch,
    "arguments": _arguments,
}
