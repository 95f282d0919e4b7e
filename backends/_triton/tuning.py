"""Tuning as data: what a chip's Triton compiler has, and which block sizes suit it. Adding a chip touches no kernel.

A tuning file is TOML. ``[limits]`` says what the compiler has; ``[blocks.<op>]`` gives an op's block sizes,
``num_warps`` and ``num_stages`` for every chip of the vendor, ``[arch.<arch>.<op>]`` for one of them; ``source`` (of
the file, or of an ``[arch.<arch>]``) says where the numbers come from. What a file leaves out comes from
``conservative.toml``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5_hal.errors import HalError, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Block sizes for chips that nobody here has measured.
CONSERVATIVE = Path(__file__).with_name("conservative.toml")

UNTUNED = "untuned"


@dataclass(frozen=True)
class Tuning:
    """One chip's.

    Attributes:
        arch: the chip, as its backend's probe names it.
        source: "untuned", or where the block sizes were measured.
        floats: float dtypes that the compiler has.
        int64: whether it has 64-bit integers, which caches of more than 2^31 elements need.
        fp8: whether it has e4m3 numbers of its own; else they are decoded in integers.
        blocks: by op, the kernel's block sizes, num_warps and num_stages.
        wide: the same where numbers of four bytes are multiplied. What was measured for a chip is not for these: they
            take other units and twice the room.
    """

    arch: str
    source: str
    floats: tuple[str, ...]
    int64: bool
    fp8: bool
    blocks: Mapping[str, Mapping[str, int]]
    wide: Mapping[str, Mapping[str, int]]

    def __getitem__(self, op: str) -> Mapping[str, int]:
        return self.blocks[op]

    def products(self, op: str, bytes_of_number: int) -> dict[str, int]:
        """For an op that multiplies matrices of such numbers, a copy."""
        return dict((self.blocks if bytes_of_number < 4 else self.wide)[op])


def tuning(arch: str, *files: Path) -> Tuning:
    """The tuning of a chip: ``conservative.toml``, then each of the vendor's files over it. Raises HalError("CONFIG")
    for a file that names an op or a block size that there is not."""
    base = _read(CONSERVATIVE)
    limits, source = dict(base["limits"]), base["source"]
    blocks, wide = ({op: dict(sizes) for op, sizes in base["blocks"].items()} for _ in range(2))
    for file in files:
        read = _read(file)
        own = dict(read.get("arch", {}).get(arch, {}))
        source = own.pop("source", read.get("source", source))
        for part in (read.get("limits", {}), own.pop("limits", {})):
            limits.update(_known(part, limits, file))
        for part, chosen in ((read.get("blocks", {}), (blocks, wide)), (own, (blocks,))):
            for op, sizes in _known(part, blocks, file).items():
                for held in chosen:
                    held[op].update(_known(sizes, blocks[op], file))
    return Tuning(arch, source, tuple(limits["floats"]), limits["int64"], limits["fp8"], blocks, wide)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise HalError(
            "CONFIG", f"tuning file {file}: {problem}", value=str(file), fix="mend or remove it"
        ) from problem


def _known(given: Mapping[str, Any], known: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    for name in given:
        if name not in known:
            raise HalError("CONFIG", f"{file}: nothing is called {name!r}", value=name, fix=suggest(name, known))
    return given
