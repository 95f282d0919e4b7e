"""Products of a storage dtype, accumulated in fp32 or wider and rounded once: one rule for composites, kernels and
integrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from glm5_hal.ops._common.packed import packed

#: Rows of float16 for which converting the weights takes longer than multiplying them as they are.
FEW = 8
#: Elements of the larger operand from which products that take some microseconds to begin are the faster ones.
LARGE = 1 << 18
#: Elements of bfloat16 weights from which two rows are multiplied in less time than one.
HUGE = 1 << 21
#: Rows of each head up to which weights are read as bags, by dtype.
BAGS = {torch.bfloat16: 2, torch.float32: 2, torch.float16: FEW}

#: Products by device type, of a backend on whose device torch's own may round a sum on the way. A backend puts its own
#: here where its kernels are loaded.
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x [..., in]`` @ weightᵀ, weight as [out, in]: see `multiply`. Weights that were packed are read so."""
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    ready = packed(weight) if _can_be_packed(rows, weight) else None
    made = multiply(rows, weight.T) if ready is None else _over(rows.contiguous(), ready)
    return made if x.dim() == 2 else made.view(*x.shape[:-1], weight.shape[0])


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, so that weights are not converted at every call; into ``out``, if that is given.

    Devices for which a backend has a product of its own have that: see `PRODUCTS`. A CPU has better ones than torch's
    for four kinds of operands; the figures are of two cores of a Zen 4:

    - float16: fast only for few rows over weights that lie [out, in], which are then read once. All others are faster
      in float32, up to a hundred times, the time to convert included.
    - float32, one of the two large, over weights that lie [out, in]: torch asks MKL, where oneDNN takes half the time
      for few rows and a sixth less for many.
    - One row of bfloat16 over large weights that lie [out, in]: oneDNN reads them a tenth faster for two rows.
    - Few rows of each head over the head's own weights, [in, out]: see `_bags`.
    """
    own = _own(a, b)
    if own is None:
        return torch.matmul(a, b, out=out)
    return own(a, b) if out is None else out.copy_(own(a, b))


def _own(a: Tensor, b: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What multiplies these in place of torch.matmul."""
    if a.device.type != "cpu" or a.device.type in PRODUCTS:
        return PRODUCTS.get(a.device.type)
    few, many = sorted((a.numel(), b.numel()))
    large = few > 0 and many >= LARGE and a.dtype == b.dtype and _is_plain_x86_call(a, b)
    if a.dim() == b.dim() == 3 and large and a.shape[1] <= BAGS.get(a.dtype, 0) and b.is_contiguous():
        return _bags
    rows_of_weights = a.dim() == b.dim() == 2 and b.stride(0) == 1
    if a.dtype == torch.float16:
        return None if rows_of_weights and a.shape[0] <= FEW else _widened
    contiguous = rows_of_weights and a.is_contiguous() and b.T.is_contiguous()  # oneDNN is slow with other strides
    if not (large and contiguous and torch.backends.mkldnn.enabled):
        return None
    if a.dtype == torch.float32:
        return None if _linear is None else _onednn
    one_of_bfloat16 = a.dtype == torch.bfloat16 and a.shape[0] == 1 and b.numel() >= HUGE
    return _doubled if one_of_bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def _is_plain_x86_call(*operands: Tensor) -> bool:
    """Whether products of torch's libraries for x86 can stand in: nobody differentiates or compiles."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in operands))
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


def _can_be_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether packed weights can stand in for these in a call with this ``x``, if there are any."""
    alike = type(x) is Tensor and x.dtype == weight.dtype and x.numel() > 0 and x.device.type not in PRODUCTS
    return alike and bool(torch.backends.mkldnn.enabled) and _is_plain_x86_call(x, weight)


def _widened(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


#: oneDNN's product of float32, which torch has no public function for: its compiler calls this one.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return _over(a, b.T)


def _over(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = _linear(x, weight, None, "none", [], "")
    return made


def _doubled(a: Tensor, b: Tensor) -> Tensor:
    return (a.expand(2, -1) @ b)[:1]


def _bags(a: Tensor, b: Tensor) -> Tensor:
    """``[H, m, K]`` @ ``[H, K, N]`` as weighted bags of embeddings: a row of weights is an embedding, a row of ``a``
    weighs a bag of them. Their kernel sums in fp32 and reads the weights at the speed of memory, half as fast again as
    a batch of products; in float16, ten times as fast."""
    (H, m, K), N = a.shape, b.shape[2]
    rows = torch.arange(H * K, dtype=torch.int32, device=a.device).view(H, 1, K).expand(H, m, K).reshape(-1)
    starts = torch.arange(0, H * m * K, K, dtype=torch.int32, device=a.device)
    weighed = a.reshape(-1)
    return embedding_bag(rows, b.view(H * K, N), starts, mode="sum", per_sample_weights=weighed).view(H, m, N)
