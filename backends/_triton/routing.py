"""Which experts a token goes to: some tokens to a program, each one's experts in one tile.

Legend: T tokens, E experts, G groups of S experts, K experts per token. A place is an expert's in a row of the tile,
where every group is padded: place // BLOCK_S is the group, place % BLOCK_S where in it.

Choices are compared as integers, which NaN cannot confuse: see `_ordered`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.capability import limit

#: Below the order of every number, −∞ included: what is chosen already, and what pads a group.
NEVER = tl.constexpr(-(2**31))
#: The order of −∞, and of NaN, which counts as the largest.
LOWEST = tl.constexpr(-0x7F800001)
LARGEST = tl.constexpr(0x7FFFFFFF)


@triton_kernel(
    "moe_route",
    requires=(limit("E", 4096),),  # a token's experts are one tile
    provides=("deterministic", "batch_invariant", "canonical_ties", "graph_safe"),
)
def moe_route(
    tuning: Tuning,
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
    weights, ids = router_logits.new_empty(T, top_k), router_logits.new_empty(T, top_k, dtype=torch.int32)
    sizes = tuning["moe_route"]
    launch(
        _route, (triton.cdiv(T, sizes["BLOCK_T"]),), router_logits,
        router_logits, router_logits if bias is None else bias, weights, ids,
        T, n_group, E // n_group, top_k, topk_group, float(routed_scaling_factor),
        *router_logits.stride(), 0 if bias is None else bias.stride(0),
        SOFTMAX=scoring_func == "softmax", BIASED=bias is not None, GROUPED=n_group > 1, NORMALISED=norm_topk_prob,
        BLOCK_G=triton.next_power_of_2(n_group), BLOCK_S=triton.next_power_of_2(E // n_group),
        BLOCK_K=triton.next_power_of_2(top_k), INDEX=addresses(tuning), **sizes,
    )  # fmt: skip
    return weights, ids


@triton.jit
def _route(
    logits, bias, weights, ids, T, G, S, K, kept, factor, logits_row, logits_col, bias_col,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, GROUPED: tl.constexpr, NORMALISED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    some = token < T
    from_row = logits + (tl.minimum(token, T - 1).to(INDEX) * logits_row)[:, None]  # what is beyond is not stored
    place = tl.arange(0, BLOCK_G * BLOCK_S)
    expert = place // BLOCK_S * S + place % BLOCK_S
    here = (place // BLOCK_S < G) & (place % BLOCK_S < S)
    x = tl.load(from_row + expert[None, :] * logits_col, mask=here[None, :], other=float("-inf"))
    peak, total = _softmax_over(x, SOFTMAX)
    choice = _score(x, peak, total, SOFTMAX)
    if BIASED:
        choice += tl.load(bias + expert * bias_col, mask=here, other=0.0)[None, :]
    order = tl.where(here[None, :], _ordered(choice), NEVER)
    if GROUPED:
        order = _among_kept(order, G, kept, BLOCK_T, BLOCK_G, BLOCK_S)
    slot = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in range(K):
        best = tl.argmax(order, 1)
        chosen = tl.where(slot[None, :] == k, best[:, None], chosen)
        order = tl.where(place[None, :] == best[:, None], NEVER, order)
    chosen = chosen // BLOCK_S * S + chosen % BLOCK_S
    # Scores of the few that are chosen are computed anew: picking them out of the tile takes a reduction for each.
    wanted = (slot < K)[None, :]
    weight = _score(tl.load(from_row + chosen * logits_col, mask=wanted, other=0.0), peak, total, SOFTMAX)
    if NORMALISED:
        weight = weight / (tl.sum(tl.where(wanted, weight, 0.0), 1) + 1e-20)[:, None]
    to = (token.to(INDEX) * K)[:, None] + slot[None, :]
    tl.store(weights + to, weight * factor, mask=some[:, None] & wanted)
    tl.store(ids + to, chosen, mask=some[:, None] & wanted)


@triton.jit
def _among_kept(order, G, kept, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):
    """``order`` with −∞ for the experts of all groups but the ``kept`` with the largest sum of their two best."""
    experts = tl.reshape(order, (BLOCK_T, BLOCK_G, BLOCK_S))
    inside, group = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_G)
    best = tl.argmax(experts, 2)
    second = tl.max(tl.where(inside[None, None, :] == best[:, :, None], NEVER, experts), 2)
    groups = tl.where((group < G)[None, :], _ordered(_number(tl.max(experts, 2)) + _number(second)), NEVER)
    eligible = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
    for _ in range(kept):
        mine = group[None, :] == tl.argmax(groups, 1)[:, None]
        eligible = tl.where(mine, 1, eligible)
        groups = tl.where(mine, NEVER, groups)
    experts = tl.where(eligible[:, :, None] > 0, experts, tl.minimum(experts, LOWEST))  # padding stays below
    return tl.reshape(experts, (BLOCK_T, BLOCK_G * BLOCK_S))


@triton.jit
def _ordered(values):
    """int32 that are ordered as these fp32 numbers: −0 is 0, and NaN the largest."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(values != values, LARGEST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _number(order):
    """The number that has this order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _softmax_over(x, SOFTMAX: tl.constexpr):
    """Each row's largest logit, and the sum of e^(x - it); a maximum drops NaN, the sum does not."""
    peak = tl.max(x, 1)
    total = peak
    if SOFTMAX:
        total = tl.sum(_exp(x - peak[:, None]), 1)
    return peak, total


@triton.jit
def _score(x, peak, total, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        score = _exp(x - peak[:, None]) / total[:, None]
    else:  # e^-|x| cannot overflow, and what it loses to 1 + e^-|x| is below its last digit
        below = _exp(-tl.abs(x))
        score = tl.where(x >= 0.0, 1.0, below) / (1.0 + below)
    return score


@triton.jit
def _exp(x):
    """e^x for x <= 0, to fp32's last digits: tl.exp loses log2(-x) bits, as it multiplies by log2(e) first."""
    n = tl.floor(tl.maximum(x * 1.4426950408889634, -160.0) + 0.5)  # a maximum drops NaN, the next line does not
    rest = (x - n * 0.693145751953125) - n * 1.428606765330187e-06  # ln 2 in two parts; the first product is exact
    return tl.exp(rest) * tl.exp2(n)
