"""lightning_indexer: scores and top-k in one, without ever keeping the scores.

Legend: T tokens, H index heads, D index head dim, B requests, M pages per request, P page size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops import _indexer_logits as logits_op
from glm5_hal.ops._common import checks
from glm5_hal.ops._common.indexer import INDEX_ARGS, INDEX_SCALARS, index_constraints
from glm5_hal.ops._common.precision import exact
from glm5_hal.spec import FLOATS, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample, Scalar, Selection


def lightning_indexer(
    ops: Any,
    q: Tensor,
    weights: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    top_k: int,
    cache_format: str = "bf16_128",
) -> Tensor:
    """The ``top_k`` best keys of every token: topk_indices over indexer_logits, causal mask first.

    A token that sees fewer than ``top_k`` keys with a score above −inf gets all of these, then -1. Indices are local to
    the request, ascending where ``sorted_indices`` is claimed. One index set per token serves all attention heads and
    all tensor-parallel ranks, so a deterministic kernel matters. Fused kernels keep no more than a tile of scores.
    """
    T = q.shape[0]
    width = block_table.shape[1] * index_cache.shape[1]
    logits = ops.indexer_logits(
        q, weights, index_cache, block_table, seq_lens, cu_seqlens_q, max_seq_len=width, cache_format=cache_format
    )
    return ops.topk_indices(logits, torch.full((T,), width, dtype=torch.int32, device=q.device), top_k=top_k)  # type: ignore[no-any-return]


def oracle_scores(args: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """float64 logits, and per row what an honest fp32 computation may be off by."""
    width = args["block_table"].shape[1] * args["index_cache"].shape[1]
    call = {k: v for k, v in args.items() if k != "top_k"}
    with exact():
        scores = logits_op.indexer_logits(**call, max_seq_len=width)
    # The error of one score is that of its inner products, as large as the terms that cancel in it.
    H, D = args["q"].shape[1:]
    terms = args["weights"].double().abs().sum(-1) * args["q"].double().norm(dim=-1).amax(-1) * 1.2
    return scores, 4 * 2.0**-24 * terms * (D + H) ** 0.5


def check_values(args: Mapping[str, Any]) -> None:
    checks.batch("lightning_indexer", args, "index_cache")


def samples() -> Iterator[Sample]:
    for sample in logits_op.samples():
        top_k = 2048 if sample.level == "standard" else 24
        yield Sample(sample.id, {"K": top_k, **sample.axes}, sample.level, sample.fill, sample.tags, sample.dtypes)
    more = {"H": 1, "D": 128, "K": 2304, "lens": ((1, 2400),), "page": 64, "format": "bf16_128"}
    yield Sample("more_than_2048", more, dtypes=("bfloat16",))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    made = logits_op.inputs(sample, dtype, draw)
    args = {k: v for k, v in made.args.items() if k != "max_seq_len"}
    return Inputs({**args, "top_k": sample.axes["K"]}, made.poison)


def fuzz(pick: Pick) -> Sample:
    sample = logits_op.fuzz(pick)
    return replace(sample, axes={**sample.axes, "K": pick.integer(1, 130)})


def cost(axes: Mapping[str, Any]) -> Cost:
    """With every request as long as the block table."""
    T, H, D, S, K = axes["T"], axes["H"], axes["D"], axes["M"] * axes["P"], axes["top_k"]
    cached = axes["B"] * S * axes["cache_row"]
    return Cost(flops=2 * T * S * H * (D + 1), bytes=cached + axes["itemsize"] * T * H * D + 4 * T * (H + K))


SPEC = OpSpec(
    name="lightning_indexer",
    group="dsa",
    composite=True,
    reference=lightning_indexer,
    args=INDEX_ARGS,
    scalars=(Scalar("top_k", "how many keys to choose: index_topk, 2048 for GLM-5", low=1), *INDEX_SCALARS),
    outs=(Out("indices", "T top_k", "int32", "chosen key positions, local to the request, -1 where there are fewer"),),
    dtypes={"F": FLOATS, "C": (*FLOATS, "uint8"), "A": ("float32", "float64")},
    constraints=index_constraints(),
    rounding="as indexer_logits and topk_indices: scores in fp32, never rounded below it",
    attributes=("deterministic", "batch_invariant", "canonical_ties", "sorted_indices", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"indices": Selection(oracle_scores)},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    source="spec 4.1 to 4.4",
)
