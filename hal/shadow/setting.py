"""What GLM5_SHADOW says: which ops, how often, and into which file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from glm5_hal.errors import HalError, suggest
from glm5_hal.files import appendable

#: Where sampled calls are written, one JSON object a line, unless the setting names a file.
FILE = "glm5-shadow.jsonl"


@dataclass(frozen=True)
class Shadow:
    """GLM5_SHADOW: (glob, rate) rules, the first match holds; the file; where the setting comes from."""

    rules: tuple[tuple[str, float], ...] = ()
    file: str = FILE
    provenance: str = "default"

    def __str__(self) -> str:
        listed = ",".join(f"{glob}:{rate:g}" for glob, rate in self.rules)
        return f"{listed}; file={self.file}" if self.rules else "off"

    def rate(self, op: str) -> float:
        return next((rate for glob, rate in self.rules if fnmatchcase(op, glob)), 0.0)


def parse(text: str, provenance: str) -> Shadow:
    """``off``, or ``GLOB:RATE[,GLOB:RATE...][;file=PATH]`` with rates above 0 and at most 1.

    Raises:
        HalError: CONFIG for text that is not of this form, UNKNOWN for a glob that no op matches.
    """

    def bad(problem: str, fix: str) -> HalError:
        return HalError("CONFIG", f"{provenance}={text!r}: {problem}", value=text, fix=fix)

    if text.strip() in ("", "off"):
        return Shadow((), FILE, provenance)
    listed, _, option = text.partition(";")
    path = FILE
    if option.strip():
        name, equals, path = (part.strip() for part in option.partition("="))
        if name != "file" or not equals or not path:
            raise bad(f"{option.strip()!r} is no option", "write ;file=PATH")
    path, problem = appendable(path)
    if problem:
        raise bad(problem, "name a file that can be written, in a folder that exists")
    rules = []
    for piece in listed.split(","):
        glob, _, number = (part.strip() for part in piece.partition(":"))
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        if not glob or not 0 < rate <= 1:
            raise bad(f"{piece.strip()!r} is no rule", "write GLOB:RATE with a rate above 0 and at most 1: topk_*:0.01")
        rules.append((glob, rate))
    _check_globs(rules, bad)
    return Shadow(tuple(rules), path, provenance)


def _check_globs(rules: list[tuple[str, float]], bad: Callable[[str, str], HalError]) -> None:
    from glm5_hal.ops import names

    for glob, _ in rules:
        if not any(fnmatchcase(op, glob) for op in names()):
            raise HalError("UNKNOWN", bad(f"no op matches {glob!r}", "").what, value=glob, fix=suggest(glob, names()))
