"""Tables of a TOML file, exchanged in its text: comments and everything else stay as they are."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm5_hal.errors import HalError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: A table's names, outermost first.
Names = tuple[str, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def with_sections(text: str, sections: Mapping[Names, Mapping[str, str | int]]) -> str:
    """The text with these tables: in place of what stood under a header of their names, or at the end.

    Raises:
        HalError: CONFIG where the text is not TOML, or has one of these tables without a header of its own.
    """
    wanted = parsed(text)
    clean = {names: {key: _printable(value) for key, value in values.items()} for names, values in sections.items()}
    for (*outer, name), values in clean.items():
        holder = wanted
        for one in outer:
            holder = holder.setdefault(one, {})
        below = {k: v for k, v in holder.get(name, {}).items() if isinstance(v, dict)}
        holder[name] = {**below, **values}
    parts, left = _parts(text), dict(clean)
    kept = "".join(_written(names, left.pop(names)) + _tail(part) if names in left else part for names, part in parts)
    new = ("\n" + _written(names, values) for names, values in left.items())
    made = "".join([kept.rstrip("\n") + "\n", *new]).lstrip("\n")
    with suppress(ValueError):
        if tomllib.loads(made) == wanted:
            return made
    which = ", ".join(".".join(names) for names in sections)
    fix = "write each table under a [header] of its own"
    raise HalError("CONFIG", f"the file has {which}, or a part of it, without a header", value=which, fix=fix)


def replace_file(file: Path, text: str) -> None:
    """Write all of it or nothing: beside the file, and then in its place. Raises HalError("CONFIG")."""
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as beside:
            beside.write(text)
        os.chmod(name, file.stat().st_mode & 0o777 if file.exists() else 0o644)
        os.replace(name, file)
    except OSError as problem:
        with suppress(OSError):
            os.unlink(name)
        what = f"{file} cannot be written: {problem}"
        raise HalError("CONFIG", what, value=str(file), fix="name another file: --out FILE") from None


def parsed(text: str) -> dict[str, Any]:
    """What the text says. Raises HalError("CONFIG") where it is not TOML."""
    try:
        return tomllib.loads(text)
    except ValueError as problem:
        raise HalError("CONFIG", f"the file is not TOML: {problem}", fix="mend it") from None


def _parts(text: str) -> list[tuple[Names, str]]:
    """The text cut before every header: the names that it has, () at the beginning, and the lines from it on."""
    parts: list[tuple[Names, str]] = [((), "")]
    for line in text.splitlines(keepends=True):
        if names := _names(line):
            parts.append((names, ""))
        parts[-1] = (parts[-1][0], parts[-1][1] + line)
    return parts


def _names(line: str) -> Names:
    """What a line names if it is a header, () if it is none."""
    if not line.lstrip().startswith("["):
        return ()
    try:
        inner: Any = tomllib.loads(line)
    except ValueError:  # a line of a list
        return ()
    names = []
    while isinstance(inner, dict) and inner:
        ((name, inner),) = inner.items()
        names.append(name)
    return tuple(names) if inner == {} else ()


def _written(names: Names, values: Mapping[str, str | int]) -> str:
    header = ".".join(name if _BARE.fullmatch(name) else _quoted(name) for name in names)
    lines = (f"{key} = {value if isinstance(value, int) else _quoted(value)}\n" for key, value in values.items())
    return f"[{header}]\n{''.join(lines)}"


def _tail(part: str) -> str:
    """The empty lines and comments that end it: they belong to what follows."""
    lines = part.splitlines(keepends=True)
    last = max((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), default=0)
    return "".join(lines[last + 1 :])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _printable(value: str | int) -> str | int:
    return value if isinstance(value, int) else "".join(c for c in value if c.isprintable())
