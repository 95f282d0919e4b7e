"""Products of half-precision matrices whose sums stay in fp32, whatever the process has set.

cuBLAS may cut a long sum into parts and add them in the dtype of the result, which torch allows it by default
(``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``). That switch is the user's. A result that is
asked for in fp32 is added up in fp32; it is rounded here, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.ops._common import products as shared

#: Of each dtype, torch's leave to add parts of a sum in it.
REDUCED = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


def install() -> None:
    """Let every product of ops on CUDA tensors be `accumulated`."""
    shared.PRODUCTS["cuda"] = accumulated


def accumulated(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed in fp32 and rounded once. Products of fp32 are torch's own."""
    if a.dtype not in REDUCED or not (a.numel() and b.numel()):
        return torch.matmul(a, b)
    if has_out_dtype() and a.dim() == b.dim() in (2, 3):
        multiplied = torch.mm if a.dim() == 2 else torch.bmm
        return multiplied(a, b, out_dtype=torch.float32).to(a.dtype)
    if not getattr(torch.backends.cuda.matmul, REDUCED[a.dtype]):
        return torch.matmul(a, b)
    return (a.float() @ b.float()).to(a.dtype)  # slow, and right


def has_out_dtype() -> bool:
    """torch has had it since 2.8."""
    return hasattr(torch.ops.aten.mm, "dtype")
