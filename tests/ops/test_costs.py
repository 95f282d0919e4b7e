"""Bytes of a call, against the sizes of its tensors, where a call touches all of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from glm5_hal.conformance.inputs import Draw
from glm5_hal.formats import formats
from glm5_hal.ops import specs
from glm5_hal.ops._common.costs import cost_of
from glm5_hal.ops._common.references import reference_of
from glm5_hal.spec import Sample

REQUESTS, KEYS, PAGE = 3, 16, 8
#: Of a request: what is read beside the numbers, and small.
BOOKKEEPING = {"block_table", "seq_lens", "cu_seqlens_q", "cos", "sin"}


def drawn(op: str, fmt: str, **axes: Any) -> dict[str, Any]:
    """A call of requests that fill their pages and of tokens that all have a slot."""
    spec = specs()[op]
    like = next(s for s in spec.samples() if s.id.endswith(fmt)).axes
    paged = {"lens": ((2, KEYS),) * REQUESTS, "page": PAGE, "format": fmt, "skip": "none"}
    return dict(spec.inputs(Sample("cost", {**like, **paged, **axes}), "bfloat16", Draw(0, op)).args)


def size(tensors: Mapping[str, Any]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors.values() if isinstance(t, torch.Tensor))


def expected(op: str, args: Mapping[str, Any], cached: int) -> int:
    """Arguments and results, with so many keys of the caches."""
    spec = specs()[op]
    pages = {a.name for a in spec.args if a.layout == "page"}
    given = {n: args[n] for n in spec.tensors if n not in pages | BOOKKEEPING}
    row = sum(args[n].shape[-1] * args[n].itemsize for n in pages if args[n] is not None)
    made = reference_of(op)(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()})
    outs = made if isinstance(made, tuple) else (made,)
    return size(given) + size({str(n): o for n, o in enumerate(outs)}) + cached * row


@pytest.mark.parametrize("fmt", formats("latent"))
@pytest.mark.parametrize("op", ["mla_decode", "sparse_mla"])
def test_attention_reads_each_key_of_each_request_in_its_format(op: str, fmt: str) -> None:
    args = drawn(op, fmt, K=KEYS)
    args["block_table"] = args["block_table"][:, : KEYS // PAGE]
    keys = REQUESTS * KEYS if op == "mla_decode" else args["indices"].numel()
    assert cost_of(specs()[op], args, "bfloat16").bytes == expected(op, args, keys)


@pytest.mark.parametrize("fmt", formats("index"))
@pytest.mark.parametrize("op", ["indexer_logits", "lightning_indexer"])
def test_the_indexer_reads_each_key_of_each_request_in_its_format(op: str, fmt: str) -> None:
    args = drawn(op, fmt)
    args["block_table"] = args["block_table"][:, : KEYS // PAGE]
    assert cost_of(specs()[op], args, "bfloat16").bytes == expected(op, args, REQUESTS * KEYS)


@pytest.mark.parametrize(
    ("op", "fmt"),
    [("mla_cache_write", f) for f in formats("latent")] + [("index_cache_write", f) for f in formats("index")]
    + [("mla_prolog", f) for f in formats("latent")] + [("indexer_prolog", f) for f in formats("index")],
)  # fmt: skip
def test_a_write_stores_each_token_in_its_format(op: str, fmt: str) -> None:
    args = drawn(op, fmt, T=5)
    ignored = {"q_a_norm", "kv_a_norm", "k_norm_weight", "k_norm_bias", *({"slot_mapping"} if "prolog" in op else ())}
    small = size({n: args[n] for n in ignored if n in args})
    assert cost_of(specs()[op], args, "bfloat16").bytes == expected(op, args, 5) - small
