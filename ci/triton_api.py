"""The lint of ``backends/_triton``: its kernels use what Triton 3.2 has, the oldest that a vendor ships, and no more.

    python ci/triton_api.py [FILE...]               exit 1 and say file, line and reason
    python ci/triton_api.py --from-wheel WHEEL      print the names of that wheel, as triton_api_3.2.txt has them

Names, keywords and the number of arguments are compared with ``triton_api_3.2.txt``; what 3.2 has and some chip's
compiler lacks is refused with a reason of its own. Whether a compiler takes the rest, ``ci/triton_ascend.py`` asks it.
"""

from __future__ import annotations

import argparse
import ast
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "backends/_triton"
NAMES = Path(__file__).with_name("triton_api_3.2.txt")

#: Globs of names that Triton 3.2 has, and why a kernel for every chip does not use them. A chip's own form of something
#: may, under an `if` of the constant that says that the chip has it (OWN).
REFUSED = {
    "tl.float8*": "not every chip's compiler has fp8: decode the bytes, as rows.py does",
    "tl.float64": "not every chip has float64: accumulate in float32",
    "tl.dot_scaled": "not every chip's compiler has fp8",
    "tl._experimental_*": "tensor descriptors are one vendor's: use pointers",
    "tl.nv_tma_desc_type": "tensor descriptors are one vendor's: use pointers",
    "tl.inline_asm_elementwise": "assembly is one vendor's",
    "tl.extra*": "a vendor's own functions",
    "tl.device_print": "left from debugging",
    "tl.static_print": "left from debugging",
    "triton.autotune": "block sizes are data: see tuning.py",
    "triton.Config": "block sizes are data: see tuning.py",
}


#: Constants of kernels, and what is allowed under an `if` of theirs.
OWN = {"FP8": "tl.float8e4nv"}


@dataclass(frozen=True)
class Problem:
    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        file = self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else self.file
        return f"{file}:{self.line}: {self.what}"


#: Parameters by name, None for what is not called: "tl.load", "triton.cdiv", and ".to" of any value in a kernel.
Names = Mapping[str, tuple[str, ...] | None]


def read(file: Path = NAMES) -> Names:
    found: dict[str, tuple[str, ...] | None] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, called, parameters = line.partition("(")
        if name and not name.startswith("#"):
            found[name] = tuple(re.findall(r"[*\w]+", parameters)) if called else None
    return found


def check(file: Path, names: Names) -> list[Problem]:
    """What is wrong with one file, from the top."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    modules, others = _imported(tree)
    inside = {node for kernel in _kernels(tree, modules) for node in ast.walk(kernel)}
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    parts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    own = set(_own(tree))
    problems = []
    for node in ast.walk(tree):
        found: Iterator[str] = iter(())
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found = (
                what for whole in _origins(node) if _in_triton(whole) for what in _wrong(_short(whole), None, names)
            )
        elif isinstance(node, (ast.Attribute, ast.Name)) and node not in parts:
            name = _dotted(node, modules)
            if name in OWN.values() and node in own:
                continue
            if name is not None:
                found = _wrong(name, calls.get(node), names)
            elif node in inside:
                found = _member(node, calls.get(node), others, names)
        problems += [Problem(file, node.lineno, what) for what in found]
    return sorted(problems, key=lambda problem: problem.line)


def _own(tree: ast.AST) -> Iterator[ast.AST]:
    """What lies under an `if` of a chip's constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id in OWN:
            for line in node.body:
                yield from ast.walk(line)


def _imported(tree: ast.AST) -> tuple[dict[str, str], set[str]]:
    """What names of the file stand for in Triton, and its other imported names."""
    modules, others = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias, whole in zip(node.names, _origins(node), strict=True):
                plain = isinstance(node, ast.Import) and alias.asname is None
                called = whole.split(".")[0] if plain else alias.asname or alias.name
                if _in_triton(whole):
                    modules[called] = called if plain else whole
                else:
                    others.add(called)
    return modules, others


def _origins(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [f"{node.module}.{a.name}" if isinstance(node, ast.ImportFrom) else a.name for a in node.names]


def _in_triton(whole: str) -> bool:
    return whole.split(".")[0] == "triton"


def _short(whole: str) -> str:
    return re.sub(r"^triton\.language\b", "tl", whole)


def _kernels(tree: ast.AST, modules: Mapping[str, str]) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            plain = decorator.func if isinstance(decorator, ast.Call) else decorator
            if _dotted(plain, modules) == "triton.jit":
                yield node


def _dotted(node: ast.AST, modules: Mapping[str, str]) -> str | None:
    """The name within Triton that an expression spells out; ``triton.language`` is "tl"."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in modules:
        return None
    return _short(".".join([modules[node.id], *reversed(parts)]))


def _wrong(name: str, call: ast.Call | None, names: Names) -> Iterator[str]:
    refused = next((reason for glob, reason in REFUSED.items() if fnmatchcase(name, glob)), None)
    if refused:
        yield f"{name}: {refused}"
    elif name not in ("tl", "triton") and name not in names:
        value, _, member = name.rpartition(".")  # tl.float32.primitive_bitwidth
        if value.count(".") != 1 or names.get(value, ()) is not None or f".{member}" not in names:
            yield f"{name}: Triton 3.2 has none"
    elif call is not None and (parameters := names.get(name)) is not None:
        yield from _arguments(name, call, parameters)


def _member(node: ast.expr, call: ast.Call | None, others: set[str], names: Names) -> Iterator[str]:
    """An attribute of a value within a kernel, and of what that is an attribute of."""
    while isinstance(node, ast.Attribute):
        root = node.value
        if isinstance(root, ast.Name) and root.id in others:
            return
        name = f".{node.attr}"
        if name not in names:
            yield f"{name}: no value of Triton 3.2 has it"
        elif call is not None and (parameters := names[name]) is not None:
            yield from _arguments(name, call, parameters)
        node, call = root, None


def _arguments(name: str, call: ast.Call, parameters: Sequence[str]) -> Iterator[str]:
    for keyword in call.keywords:
        if keyword.arg is not None and keyword.arg not in parameters:
            yield f"{name}: takes no {keyword.arg}= in Triton 3.2"
    if len(call.args) > len(parameters) and not any(p.startswith("*") for p in parameters):
        yield f"{name}: takes {len(parameters)} arguments in Triton 3.2, not {len(call.args)}"


# --- the names of a wheel --------------------------------------------------------------------------------------------


def listed(wheel: Path) -> Iterator[str]:
    """Every line of the data file."""
    with zipfile.ZipFile(wheel) as archive:

        def parsed(path: str) -> ast.Module:
            return ast.parse(archive.read(f"triton/{path}"))

        languages = {stem: parsed(f"language/{stem}.py") for stem in ("core", "math", "standard", "random")}
        package, top = parsed("language/__init__.py"), parsed("__init__.py")
    yield f"# What {' '.join(wheel.name.split('-')[:2])} has: ci/triton_api.py --from-wheel made this list."
    defined = {name: line for tree in languages.values() for name, line in _definitions(tree).items()}
    exported = {alias.name for node in package.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    yield from (f"tl.{defined.get(name, name)}" for name in sorted(exported))
    yield from (f"tl.math.{line}" for _, line in sorted(_definitions(languages["math"]).items()))
    yield from (f"tl.PropagateNan.{name}" for name in ("ALL", "NONE"))  # compiled, not Python
    given = {alias.name for node in top.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    own = _definitions(top)
    yield from (f"triton.{own.get(name, name)}" for name in sorted({*given, *own}))
    methods = (line for tree in languages.values() for line in _methods(tree))
    yield from sorted({*_members(languages["core"]), *methods})


def _definitions(tree: ast.Module) -> dict[str, str]:
    """Functions and classes with their parameters, by name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_add_") and node.name != "_check_dtype":
            found[node.name] = _line(node.name, node.args)
        elif isinstance(node, ast.ClassDef):
            init = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            found[node.name] = _line(node.name, init[0].args, skip=1) if init else node.name
    return found


def _methods(tree: ast.Module) -> Iterator[str]:
    """Functions that are a tensor's methods as well."""
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if ast.unparse(decorator).endswith("_tensor_member_fn"):
                yield f".{_line(node.name, node.args, skip=1)}"


def _members(core: ast.Module) -> Iterator[str]:
    """Methods and attributes of the values in a kernel: tensors, dtypes and constants."""
    values = ("constexpr", "dtype", "pointer_type", "block_type", "tensor")
    classes = (node for node in core.body if isinstance(node, ast.ClassDef) and node.name in values)
    for part in (part for node in classes for part in node.body if isinstance(part, ast.FunctionDef)):
        how = {ast.unparse(decorator) for decorator in part.decorator_list}
        if part.name == "__init__":
            stored = (n for n in ast.walk(part) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
            yield from (f".{n.attr}" for n in stored)
        elif not part.name.startswith("_") and not _stub(part):
            yield f".{part.name}" if "property" in how else f".{_line(part.name, part.args, 'staticmethod' not in how)}"


def _stub(part: ast.FunctionDef) -> bool:
    """Whether it only tells type checkers of a method that is added later."""
    return ast.unparse(part.body[-1]) == "..."


def _line(name: str, args: ast.arguments, skip: int = 0) -> str:
    names = [a.arg for a in args.args][skip:]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [a.arg for a in args.kwonlyargs]
    return f"{name}({', '.join(n for n in names if n not in ('_builder', '_generator'))})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="instead of the shared kernels")
    parser.add_argument("--from-wheel", type=Path)
    args = parser.parse_args()
    if args.from_wheel:
        print("\n".join(dict.fromkeys(listed(args.from_wheel))))
        return 0
    names = read()
    files = args.files or sorted(KERNELS.rglob("*.py"))
    problems = [problem for file in files for problem in check(file.resolve(), names)]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
