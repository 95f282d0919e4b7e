"""The references as kernels. Readable, not fast; chosen only when named (``cpu:reference``)."""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.ops import specs
from glm5_hal.ops._common.references import reference_of

#: What the references hold by construction. They read lengths on the host, so they are not graph safe, and they leave
#: matrix products to torch, whose tiles depend on the batch.
CLAIMS = frozenset({"deterministic", "canonical_ties", "sorted_indices"})


def kernels() -> Sequence[Kernel]:
    return tuple(
        Kernel(name, "reference", reference_of(name), provides=CLAIMS & set(spec.attributes))
        for name, spec in specs().items()
    )
