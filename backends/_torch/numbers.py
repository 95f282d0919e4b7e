"""What kernels ask of a tensor: in which dtype to accumulate, whether narrower products would do, and whether the host
can look at it for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

#: Device types whose tensors the host can look at for nothing. Elsewhere it would have to wait for the device.
HOST_MEMORY = {"cpu"}


def in_host_memory(tensor: Tensor) -> bool:
    return tensor.device.type in HOST_MEMORY


def has_fast_products(tensor: Tensor) -> bool:
    """Whether a product of it, in its own dtype, is the fast one and sums in fp32: bfloat16, where a CPU has
    instructions for it."""
    return in_host_memory(tensor) and tensor.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def accumulation(tensor: Tensor) -> torch.dtype:
    """float64 where the tensor has that, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
