"""mcoplib's ``grouped_topk`` as a kernel of ours, by its host code and kernels at f722323.

It is given scores, not logits: its own sigmoid is off by 6e-8, which is much where every score is small. Where it finds
fewer finite scores than it looks for it names expert 0 again, and where a group's two best have no finite sum it names
the first experts of all: so a NaN is a score of 0 here, and there are two experts at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.capability import at_least, dtype, limit
from glm5_hal.ops._moe_route import score

#: What ``scoring_func`` is where scores are given.
GIVEN = 0


@kernel(
    "moe_route",
    "mcoplib",
    requires=(dtype("router_logits", "float32"), limit("top_k", 32), limit("n_group", 32), at_least("E", 2)),
    provides=("deterministic",),
)
def moe_route(
    router_logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sigmoid",
) -> tuple[Tensor, Tensor]:
    T, E = router_logits.shape
    if T == 0:
        return router_logits.new_empty(0, top_k), router_logits.new_empty(0, top_k, dtype=torch.int32)
    scores, _ = score(router_logits.contiguous(), None, scoring_func)
    added = router_logits.new_zeros(E) if bias is None else bias.contiguous()
    how = (n_group, topk_group, top_k, norm_topk_prob, routed_scaling_factor)
    weights, ids = torch.ops._moe_C.grouped_topk(scores.nan_to_num_(nan=0.0), *how, added, GIVEN)
    return weights, ids
