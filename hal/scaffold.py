"""``glm5-hal new-backend NAME``: the package in ``backends/_template`` with its two words filled in.

The template is plain files: in their paths and texts NAME stands for the backend's name and MODULE for the import name.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from glm5_hal import backends, context
from glm5_hal.errors import HalError

TEMPLATE = Path(backends.__path__[0], "_template")

#: A distribution's name may not end in '-' or '_', and the template's lines are laid out for names of this length.
_NAME = re.compile(r"[a-z](?:[a-z0-9_-]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Scaffold:
    """What was written: the package's folder, every file in it, and what its author does now."""

    folder: Path
    files: tuple[Path, ...]
    next_steps: str


def write(name: str, out: Path) -> Scaffold:
    """Write the package of a new backend to ``out/glm5-hal-NAME``: all of it, or nothing where anything is wrong.

    Raises:
        HalError: CONFIG for a name that cannot be used or is taken, and for a folder that exists or cannot be written.
    """
    files = rendered(name)
    _demand_free(name)
    folder = out / f"glm5-hal-{name}"
    if os.path.lexists(folder):
        raise HalError(
            "CONFIG",
            f"{folder} exists already, and nothing is overwritten",
            value=str(folder),
            fix="choose another name or another --out, or move it away",
        )
    if not out.is_dir():
        fix = f"mkdir -p {shlex.quote(str(out))}, or choose another --out"
        raise HalError("CONFIG", f"{out} is not a folder", value=str(out), fix=fix)
    try:
        with tempfile.TemporaryDirectory(prefix=".glm5-hal-", dir=out) as workshop:
            built = Path(workshop, folder.name)
            for path, text in files.items():
                target = built / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8", newline="\n")
            built.rename(folder)
    except OSError as problem:
        raise HalError(
            "CONFIG", f"cannot write {folder}: {problem}", value=str(folder), fix="choose another --out"
        ) from problem
    return Scaffold(folder, tuple(folder / path for path in files), _next_steps(name, folder))


def rendered(name: str) -> dict[str, str]:
    """The package's files: text by path below its folder. Raises HalError("CONFIG") for a name that cannot be used."""
    if not _NAME.fullmatch(name) or name == "auto":
        raise HalError("CONFIG", f"{name!r} cannot be the name of a backend", value=name, fix=_name_fix(name))
    module = module_of(name)

    def filled(text: str) -> str:
        return text.replace("MODULE", module).replace("NAME", name)

    return {
        filled(path.relative_to(TEMPLATE).with_suffix("").as_posix()): filled(path.read_text(encoding="utf-8"))
        for path in sorted(TEMPLATE.rglob("*.tmpl"))
    }


def module_of(name: str) -> str:
    """The import name of the package of a backend."""
    return f"glm5_hal_{name.replace('-', '_')}"


def _name_fix(name: str) -> str:
    rule = "use at most 40 lower-case letters, digits, '-' and '_', from a letter to a letter or digit"
    if name == "auto":
        return "choose another one: 'auto' means any backend of the tensors' device"
    near = re.sub(r"[^a-z0-9_]+", "-", name.lower()).lstrip("0123456789-_")[:40].rstrip("-_")
    return f"{rule}; {near!r}, say" if _NAME.fullmatch(near) else rule


def _demand_free(name: str) -> None:
    """Names that differ in '-' and '_' alone make one module and one distribution, so they count as the same."""
    module = module_of(name)
    for record in context.catalogue().found:
        if module_of(record.name) == module:
            kind, also = "an installed plugin", f", or: {record.removal}"
            if record.builtin:
                kind, also = "a built-in backend", ""
            raise HalError(
                "CONFIG",
                f"{record.name!r} is the name of {kind}, from {record.origin}",
                value=name,
                fix=f"choose another name{also}",
            )
    if importlib.util.find_spec(module) is not None:
        raise HalError(
            "CONFIG",
            f"a module {module} can be imported already, and the new package would hide it",
            value=name,
            fix="choose another name, or uninstall what offers that module",
        )


def _next_steps(name: str, folder: Path) -> str:
    return f"""\
Wrote {folder}: a package that runs and conforms as it is, on the CPU in your device's place. Next:

  cd {shlex.quote(str(folder))}
  pip install -e '.[test]'
  glm5-hal doctor
  glm5-hal conformance run --backend {name} --level smoke

Then put your device into probe() and your kernels into kernels.py; README.md there goes on from here."""
