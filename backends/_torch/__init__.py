"""Plain-torch kernels, tiled and device-neutral: the provider that every backend starts from."""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel, kernels_of


def kernels() -> Sequence[Kernel]:
    """All kernels of provider ``torch``."""
    from glm5_hal.backends._torch import attention, caches, elementary, indexer, moe, norms, topk

    return kernels_of(attention, caches, elementary, indexer, moe, norms, topk)
