"""Other people's kernels for Enflame's GCUs: those that vllm-gcu registers, over a closed library.

To import vllm_gcu puts torch.gcu in the place of torch.cuda, and needs vLLM: that is not done here. In a process that
has imported it, its kernels serve.

Left to Triton and torch:

- ``fwd_kvcache_mla``: what it reads behind the last key is not said.
- ``fused_grouped_topk``, ``fused_moe_kernel``, ``rotary_embedding_with_kv_cache``: closed, and no call fixes how they
  round or which of equals they take.
- The lightning indexer and sparse attention: its public tree has none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of
from glm5_hal.backends._libraries.vllm_ops import OPS
from glm5_hal.backends._probing import installed
from glm5_hal.backends._triton.offered import never

MODULE = "vllm_gcu"

LIBRARIES = (Library(MODULE, (), "install vllm_gcu of Enflame's TopsRider, for this torch_gcu", ops=OPS),)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    if not installed(MODULE):
        return ()
    if sys.modules.get(MODULE) is not None:
        return of(__package__, LIBRARIES)
    from glm5_hal.backend import kernels_of
    from glm5_hal.backends.enflame import vllm_gcu

    asleep = never(
        f"{MODULE} is installed and not imported: to import it changes torch.cuda for the whole process",
        f"import {MODULE} first, if that is wanted",
    )
    return [replace(kernel, requires=(asleep, *kernel.requires)) for kernel in kernels_of(vllm_gcu)]
