"""npu_transpose_batchmatmul: float32 sums, rounded once.

The page knows one perm_x2 and one perm_y; where they are None the op's shape inference takes [0, 1, 2] and [1, 0, 2],
and so does this. That inference also takes perm_x2 [0, 2, 1] from CANN 8.5 on, which the page does not know: refused.
Quantised output (`scale`) is not emulated. Page and shape inference differ from golden code about nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constraints import Rules
from .norms import FLOATS


def transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    perm_x1: list[int] | None,
    perm_x2: list[int] | None,
    perm_y: list[int] | None,
    batch_split_factor: int | None,
) -> Tensor:
    rules = Rules("npu_transpose_batchmatmul", "torch_npu-npu_transpose_batchmatmul.md")
    perm_x1, perm_x2 = list(perm_x1 or (0, 1, 2)), list(perm_x2 or (0, 1, 2))
    perm_y, split = list(perm_y or (1, 0, 2)), 1 if batch_split_factor is None else batch_split_factor
    rules.absent("not supported yet", bias=bias)
    rules.beyond(scale is not None, "scale")
    rules.one_of("perm_x1", perm_x1, ([0, 1, 2], [1, 0, 2]))
    rules.one_of("perm_x2", perm_x2, ([0, 1, 2],))
    rules.one_of("perm_y", perm_y, ([1, 0, 2],))
    for name, tensor in {"input": input, "weight": weight}.items():
        rules.dims(name, tensor, 3)
        rules.dtype(name, tensor, *FLOATS)
        rules.need(tensor.shape[-1] <= 65535, f"the last dim of {name} is at most 65535", tensor)
    rules.same_dtype(input=input, weight=weight)
    x = input.permute(perm_x1)
    batch, rows, inner = x.shape
    rules.need(tuple(weight.shape[:2]) == (batch, inner), "weight is [B, K, N] with input's B and K", [input, weight])
    columns = weight.shape[2]
    rules.need(1 <= batch < 65536 and 1 <= columns < 65536, "B and N are within [1, 65536)", [input, weight])
    row = inner * batch if perm_x1 == [1, 0, 2] else inner
    rules.need(1 <= row < 65536, "K·B (perm_x1 [1, 0, 2]) or K is within [1, 65536)", row)
    rules.need(inner % 16 == 0 and columns % 16 == 0, "K and N are multiples of 16", [input, weight])
    fits = 1 <= split <= columns and columns % split == 0
    rules.need(fits, f"batch_split_factor divides N = {columns}", split)
    y = torch.bmm(x.float(), weight.float()).permute(perm_y).to(input.dtype)
    if split == 1:
        return y.contiguous()
    return y.reshape(rows, split, -1).transpose(0, 1).contiguous()


KERNELS = {"npu_transpose_batchmatmul": transpose_batchmatmul}
