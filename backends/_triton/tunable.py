"""What `glm5-hal tune` needs of a backend that has the shared Triton kernels: ``Backend(..., tuning=tunable(FILE))``.

Values to try come from ``candidates.toml``: ``[candidates.<op>]``, or ``[candidates.every]`` for what is meant the same
in every op. A size that no table names is halved and doubled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from glm5_hal.backend import Kernel, Sizes, Tunable
from glm5_hal.backends._triton.tuning import _read, tuning

CANDIDATES = Path(__file__).with_name("candidates.toml")

EVERY = "every"


def tunable(file: Path) -> Tunable:
    """Of a vendor's tuning file. Nothing is read before it is asked for."""
    return Tunable(file, partial(_sizes, file), candidates, partial(_kernels, file))


def _sizes(file: Path, arch: str) -> Sizes:
    return tuning(arch, file).blocks


def candidates(op: str, sizes: Mapping[str, int]) -> Mapping[str, Sequence[int]]:
    """Values to try for each of an op's sizes, those in force among them."""
    known = _tables()
    named = {**known.get(EVERY, {}), **known.get(op, {})}
    return {name: sorted({size, *named.get(name, _around(size))}) for name, size in sizes.items()}


def _around(size: int) -> Sequence[int]:
    return [near for near in (size // 2, 2 * size) if near]


@cache
def _tables() -> Mapping[str, Mapping[str, Sequence[int]]]:
    found: Mapping[str, Mapping[str, Sequence[int]]] = _read(CANDIDATES)["candidates"]
    return found


def _kernels(file: Path, arch: str, sizes: Sizes) -> Sequence[Kernel]:
    from glm5_hal.backends import _triton

    found = tuning(arch, file)
    changed = {op: {**found.blocks[op], **new} for op, new in sizes.items()}
    return _triton.kernels(replace(found, blocks={**found.blocks, **changed}))
