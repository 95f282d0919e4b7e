"""What kernels ask of a tensor: in which dtype to accumulate, and whether the host can look at it for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

#: Device types whose tensors the host can look at for nothing. Elsewhere it would have to wait for the device.
HOST_MEMORY = {"cpu"}


def in_host_memory(tensor: Tensor) -> bool:
    return tensor.device.type in HOST_MEMORY


def accumulation(tensor: Tensor) -> torch.dtype:
    """float64 where the tensor has that, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
