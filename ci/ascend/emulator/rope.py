"""npu_interleave_rope and npu_rotary_mul.

npu_interleave_rope reads pairs (x0, x1), (x2, x3), … and writes all first members before all second ones, as its page
says; it computes in float32 and rounds once, as the golden code of npu_kv_rmsnorm_rope_cache does the same step.
npu_rotary_mul's golden code computes in the inputs' dtype, for float16 and float32, and so does this; bfloat16 has no
golden code, and is computed in float32 and rounded once. Coefficients of another dtype are first cast to input's, as
the op's source does. Its "data range [-1, 1]" of the coefficients is enforced.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .constraints import Rules
from .norms import FLOATS, HALF

#: Which axes of input r1 and r2 may broadcast (1) in each layout, and at which axes that layout has B and N.
HALF_MODE = {
    "BNSD": (("110", "010", "000"), (0, 1)),
    "BSND": (("101", "001", "000"), (0, 2)),
    "SBND": (("011", "001", "000"), (1, 2)),
    "TND": (("01", "00"), (1,)),
}
INTERLEAVE_MODE = {
    "BNSD": (("110",), (0, 1)),
    "BSND": (("101",), (0, 2)),
    "SBND": (("011",), (1, 2)),
    "TND": (("01",), (1,)),
}
LIMIT = 1000


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def deinterleaved(x: Tensor) -> Tensor:
    """x0 x1 x2 x3 … as x0 x2 … x1 x3 …"""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rules = Rules("npu_interleave_rope", "torch_npu-npu_interleave_rope.md")
    for name, tensor in {"x": x, "cos": cos, "sin": sin}.items():
        rules.dims(name, tensor, 4)
        rules.need(tensor.shape[-1] == 64, f"D of {name} is 64", tensor)
    rules.dtype("x", x, *HALF)
    rules.same_dtype(x=x, cos=cos, sin=sin)
    rules.contiguous(x=x, cos=cos, sin=sin)
    rules.shape("sin", sin, *cos.shape)
    rules.need(cos.shape[1] == 1, "N of cos and sin is 1", cos)
    rules.need(cos.shape[0] == x.shape[0], "B of cos and sin is that of x", [x, cos])
    rules.need(cos.shape[2] in (1, x.shape[2]), "S of cos and sin is 1 or that of x", [x, cos])
    q = deinterleaved(x.float())
    return (q * cos.float() + rotate_half(q) * sin.float()).to(x.dtype)


def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None) -> Tensor:
    rules = Rules("npu_rotary_mul", "torch_npu-npu_rotary_mul.md")
    rules.one_of("rotary_mode", rotary_mode, ("half", "interleave"))
    for name, tensor in {"input": input, "r1": r1, "r2": r2}.items():
        rules.dims(name, tensor, 3, 4)
        rules.dtype(name, tensor, *FLOATS)
    width = input.shape[-1]
    rules.need(width < 896 and width % 2 == 0, "D is even and below 896", input)
    rules.shape("r2", r2, *r1.shape)
    rules.need(r1.dim() == input.dim() and r1.shape[-1] == width, "r1 has input's dims and D", [input, r1])
    _layout(rules, input, r1, rotary_mode)
    for name, tensor in {"r1": r1, "r2": r2}.items():
        rules.need(not (tensor.abs() > 1).any(), f"the values of {name} are within [-1, 1]", tensor)
    work = torch.float32 if input.dtype is torch.bfloat16 else input.dtype
    x, cos, sin = input.to(work), r1.to(input.dtype).to(work), r2.to(input.dtype).to(work)
    if rotate is not None:
        rules.shape("rotate", rotate, width, width)
        rules.dtype("rotate", rotate, *FLOATS)
        turned = (x.float() @ rotate.float()).to(work)
    else:
        turned = rotate_half(x) if rotary_mode == "half" else rotate_pairs(x)
    return (cos * x + sin * turned).to(input.dtype)


def _layout(rules: Rules, x: Tensor, r1: Tensor, mode: str) -> None:
    """The layout is not an argument: some layout must allow these shapes, and its B and N must be small enough."""
    table = HALF_MODE if mode == "half" else INTERLEAVE_MODE
    sizes = list(zip(x.shape[:-1], r1.shape[:-1], strict=True))
    broadcasts = {"".join(bits) for bits in product("01", repeat=len(sizes)) if _fits(sizes, bits)}
    fitting = [(name, axes) for name, (patterns, axes) in table.items() if broadcasts & set(patterns)]
    allowed = ", ".join(f"{name} with {'/'.join(patterns)}" for name, (patterns, _) in table.items())
    rules.need(bool(fitting), f"r1 broadcasts (1) over input's axes as in: {allowed}", [x, r1])
    small = [_small([x.shape[axis] for axis in axes], mode) for _, axes in fitting]
    rules.need(any(small), f"B and N are below {LIMIT} (their product in interleave mode)", x)


def _fits(sizes: list[tuple[int, int]], bits: tuple[str, ...]) -> bool:
    return all(given == (1 if bit == "1" else own) for (own, given), bit in zip(sizes, bits, strict=True))


def _small(sizes: list[int], mode: str) -> bool:
    if mode == "half":
        return all(size < LIMIT for size in sizes)
    count = 1
    for size in sizes:
        count *= size
    return count < LIMIT


KERNELS = {"npu_interleave_rope": interleave_rope, "npu_rotary_mul": rotary_mul}
