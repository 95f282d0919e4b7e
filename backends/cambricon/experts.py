"""torch_mlu_ops' routing and grouped product as kernels of ours.

By its documentation every row of the product is some expert's, so rows that are in no use go to the last one and are
written over. Groups are compared by the sum of their two best only where there is a bias, and where experts are scored
by softmax what is not eligible counts as 0, not as −inf. Scores are divided by their bare sum, so that is done here.

Legend: T tokens, M rows, K input features, N output features, E experts.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.capability import contiguous, dtype, when
from glm5_hal.ops._moe_route import weigh
from glm5_hal.signature import Signature


def _grouped(call: Signature) -> bool:
    sigmoid = call.scalars["scoring_func"] == "sigmoid" and call.tensors.get("bias") is not None
    return call.scalars["n_group"] == 1 or sigmoid


GROUPED = when(
    _grouped,
    "groups of experts are chosen by the sum of their two best only with sigmoid and a bias",
    "use n_group=1, or another kernel",
    reads=(("n_group", "value"), ("scoring_func", "value"), ("bias", "dtype")),
)


@kernel("moe_route", "tmo", requires=(dtype("router_logits", "float32"), GROUPED))
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
    T = len(router_logits)
    if T == 0:
        return router_logits.new_empty(0, top_k), router_logits.new_empty(0, top_k, dtype=torch.int32)
    library = import_module("torch_mlu_ops")
    score = library.moe_sigmoid_topk if scoring_func == "sigmoid" else library.moe_softmax_topk
    groups = (n_group, topk_group) if n_group > 1 else (-1, 0)
    logits, bias = router_logits.contiguous(), None if bias is None else bias.contiguous()
    scores, ids = score(logits, top_k, False, *groups, score_bias=bias)
    return weigh(scores, norm_topk_prob, routed_scaling_factor), ids


@kernel("grouped_gemm", "tmo", requires=(dtype("x", "bfloat16", "float16"), contiguous("weight")))
def grouped_gemm(x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain") -> Tensor:
    M, E = len(x), len(weight)
    if M == 0 or E == 0 or x.shape[1] == 0 or weight.shape[1] == 0:
        return x.new_zeros(M, weight.shape[1])
    ends = torch.cat([expert_offsets[1:-1], expert_offsets.new_full((1,), M)])
    counts = ends.diff(prepend=expert_offsets[:1]).int()
    y: Tensor = import_module("torch_mlu_ops").group_gemm(x.contiguous(), weight, counts, None, None, None, None, M)
    unused = torch.arange(M, device=x.device) >= expert_offsets[-1]
    return y.masked_fill_(unused[:, None], 0.0)
