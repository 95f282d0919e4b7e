"""The mixture of experts by npu_moe_gating_top_k, npu_moe_init_routing_v2, npu_grouped_matmul and
npu_moe_finalize_routing.

Their conventions, and what is done about them:

- routing with sigmoid divides the weights by their sum, with softmax it never does: the other two are refused.
- an expert that is not here has no number, so it gets one beyond the experts that are: of these no row is made. What
  lies behind the last row is not defined, and is made zero.
- a grouped product's rows are all somebody's: those behind the last are given to the last expert, and their results are
  not used. So they cost time where most of a batch's experts are on other ranks.
- results are combined in float32, router weights included: they have the dtype of the rows there. Rows may be left out
  in its drop modes only, which know rows as [experts, capacity], with as many experts as a token has, or more.

Legend: T tokens, K experts per token, D hidden size, E experts, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends.ascend.elementwise import swiglu
from glm5_hal.backends.ascend.needs import A2_A3, floats, has
from glm5_hal.capability import at_least, contiguous, dtype, when
from glm5_hal.capability import limit as at_most
from glm5_hal.signature import Signature

#: Groups of a product, and what its inner sizes stay below.
GROUPS, INNER = 1024, 65536

#: Experts that rows can be sorted by, one of them for those that are elsewhere.
SORTED = 10240 - 1


def _weighed_so(call: Signature) -> bool:
    return bool((call.scalars["scoring_func"] == "sigmoid") == call.scalars["norm_topk_prob"])


def _groups_fit(call: Signature) -> bool:
    """With every group taking a multiple of 32 places."""
    size = call.axes["E"] // call.scalars["n_group"]
    return bool(size > 2 and -(-size // 32) * 32 * call.scalars["n_group"] <= 2048)


@kernel(
    "moe_route",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_moe_gating_top_k"),
        dtype("router_logits", "float32"),
        at_most("E", 2048),
        when(
            _groups_fit,
            "a group has more than two experts, and the groups of a multiple of 32 places each fit into 2048",
            "use another kernel for such groups",
            reads=(("E", "value"), ("n_group", "value")),
        ),
        when(
            _weighed_so,
            "norm_topk_prob goes with sigmoid, and with sigmoid alone",
            "GLM-5 has both; use another kernel for other routers",
            reads=(("scoring_func", "value"), ("norm_topk_prob", "value")),
        ),
    ),
    provides=("canonical_ties", "graph_safe"),
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
    T = len(router_logits)
    if T == 0:
        return router_logits.new_empty(T, top_k), router_logits.new_empty(T, top_k, dtype=torch.int32)
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k(
        router_logits,
        top_k,
        bias=bias,
        k_group=topk_group,
        group_count=n_group,
        group_select_mode=1,  # a group's two best
        renorm=0,
        norm_type=1 if scoring_func == "sigmoid" else 0,
        routed_scaling_factor=routed_scaling_factor,
        eps=1e-20,
    )
    return weights, ids


@kernel(
    "moe_permute",
    "aclnn",
    requires=(A2_A3, *has("npu_moe_init_routing_v2"), *floats("x"), at_most("num_experts", SORTED)),
    provides=("graph_safe",),
)
def moe_permute(x: Tensor, topk_ids: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    (T, K), D = topk_ids.shape, x.shape[1]
    if num_experts == 0 or topk_ids.numel() == 0 or D == 0:
        return x.new_zeros(T * K, D), topk_ids.new_zeros(num_experts + 1), torch.full_like(topk_ids, -1)
    rows, ends, inverse = _sorted_rows(x, topk_ids, num_experts)
    behind = torch.arange(T * K, device=x.device) >= ends[-1]
    offsets = torch.cat([ends.new_zeros(1), ends]).int()
    return rows.masked_fill_(behind[:, None], 0.0), offsets, inverse


def _sorted_rows(x: Tensor, topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T·K, D] by expert, where each expert's end [E], and the row of each slot [T, K], -1 for none."""
    T, K = topk_ids.shape
    rows, inverse, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x.contiguous(),
        topk_ids.masked_fill(topk_ids < 0, experts),
        active_num=T * K,
        expert_num=experts + 1,
        drop_pad_mode=0,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, experts],
        row_idx_type=0,
    )
    return rows, counts.cumsum(0), inverse.view(T, K)


@kernel(
    "grouped_gemm",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_grouped_matmul"),
        *floats("x"),
        at_most("E", GROUPS),
        at_most("K", INNER - 1),
        at_most("N", INNER - 1),
        contiguous("weight"),
    ),
    provides=("graph_safe",),
)
def grouped_gemm(x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain") -> Tensor:
    M, N = len(x), weight.shape[1]
    if x.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(M, N)
    behind = torch.arange(M, device=x.device) >= expert_offsets[-1]
    return _product(x.contiguous(), weight, expert_offsets[1:].long()).masked_fill_(behind[:, None], 0.0)


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Every expert's rows times its weight [N, K]; of rows behind the last expert's, anything."""
    M, last = len(x), torch.arange(len(ends), device=ends.device) == len(ends) - 1
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x],
        [weight.transpose(1, 2)],
        group_list=torch.where(last, M, ends),
        split_item=2,  # one result
        group_type=0,  # groups of rows
        group_list_type=0,  # their ends
    )
    return y  # type: ignore[no-any-return]


@kernel(
    "moe_combine",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_moe_finalize_routing"),
        *floats("y"),
        dtype("topk_weights", "float32"),
        at_least("K", 1),
    ),
    provides=("graph_safe",),
)
def moe_combine(y: Tensor, topk_weights: Tensor, inverse_ids: Tensor, shared: Tensor | None = None) -> Tensor:
    (T, K), (M, D) = inverse_ids.shape, y.shape
    if T == 0 or M == 0 or D == 0:
        return y.new_zeros(T, D) if shared is None else shared.clone(memory_format=torch.contiguous_format)
    capacity = -(-M // K)
    rows = torch.empty(K * capacity, D, dtype=torch.float32, device=y.device)
    rows[:M] = y
    return _combined(rows.view(K, capacity, D), topk_weights, inverse_ids, shared, 3).to(y.dtype)


def _combined(rows: Tensor, weights: Tensor, inverse: Tensor, shared: Tensor | None, mode: int) -> Tensor:
    """The weighted sum in float32. A weight of a row that is not here is not read."""
    return torch.ops.npu.npu_moe_finalize_routing(  # type: ignore[no-any-return]
        rows,
        None if shared is None else shared.float(),
        None,
        None,
        weights.masked_fill(inverse < 0, 0.0),
        inverse.reshape(-1),
        None,
        drop_pad_mode=mode,
    )


@kernel(
    "moe_experts",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_moe_finalize_routing"),
        *floats("x"),
        dtype("topk_weights", "float32"),
        at_most("E", GROUPS),
        at_most("D", INNER - 1),
        at_most("I", INNER // 2 - 1),
        at_least("K", 1),
        contiguous("w_gate_up"),
        contiguous("w_down"),
    ),
    provides=("graph_safe",),
)
def moe_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared: Tensor | None = None,
    *,
    limit: float | None = None,
    weight_format: str = "plain",
) -> Tensor:
    """As its parts are, but that rows which nobody reads need not be zero."""
    (T, D), (E, _, I), K = x.shape, w_down.shape, topk_ids.shape[1]  # noqa: E741 - the letters of the legend
    if T == 0 or E == 0 or D == 0 or I == 0:
        return x.new_zeros(T, D) if shared is None else shared.clone(memory_format=torch.contiguous_format)
    rows, ends, inverse = _sorted_rows(x, topk_ids, E)
    hidden = swiglu(_product(rows, w_gate_up, ends), limit)
    result = _product(hidden, w_down, ends).float()
    return _combined(result.view(K, T, D), topk_weights, inverse, shared, 3).to(x.dtype)
