"""Weights in a backend's own form go to ops only: what is computed beside them takes the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from small import KINDS, greedy, model, tokens
from torch import Tensor
from toys import installed, stand_in

import glm5_hal
from glm5_hal.backend import Kernel
from glm5_hal.backends import cpu
from glm5_hal.capability import one_of
from glm5_hal.integrations.transformers import apply
from glm5_hal.ops import specs
from glm5_hal.ops._common.references import reference_of
from glm5_hal.prepared import Prepared

#: Ops whose weights the backend keeps with their rows reversed.
REVERSED = ("mla_prolog", "indexer_prolog")


def reversed_rows(op: str, weights: Mapping[str, Tensor]) -> Prepared | None:
    return Prepared(op, {n: w.flip(0) for n, w in weights.items()}, "reversed") if op in REVERSED else None


def kernel(op: str) -> Kernel:
    """What the op's default computes, of such weights."""
    spec, run = specs()[op], reference_of(op)
    weights = ("w_", "q_a_norm", "kv_a_norm", "k_norm")

    def native(*args: Any, **kwargs: Any) -> Any:
        call = spec.bind(*args, **kwargs)
        restored = {n: call[n].flip(0) for n in spec.tensors if n.startswith(weights)}
        return run(**{**call, **restored, "weight_format": "plain"})

    native.__signature__ = spec.signature  # type: ignore[attr-defined]
    return Kernel(op, "native", native, requires=(one_of("weight_format", "reversed"),))


@pytest.fixture
def _backend() -> Iterator[None]:
    kernels = (*cpu.kernels(), *(kernel(op) for op in REVERSED))
    formats = cpu.glm5_backend().cache_formats
    with installed(stand_in("mirror", kernels, builtin=True, prepare=reversed_rows, cache_formats=formats)):
        yield


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("kind", KINDS)
def test_a_backends_own_form_of_the_weights_changes_no_result(kind: str) -> None:
    """12 tokens with full heads; then absorbed, first over all keys, from 16 on over chosen ones."""
    small, ids = model(kind), tokens(2, 12)
    expected, _ = greedy(small, ids, 8)
    apply(small)
    assert small.model.layers[0].self_attn._glm5_hal.weights.format == "reversed"
    glm5_hal.watch(counters=True)
    try:
        found, _ = greedy(small, ids, 8)
        ran = set(glm5_hal.counts())
    finally:
        glm5_hal.watch()
        glm5_hal.clear_counts()
    assert ran >= {"mla_prolog[mirror:native]", "indexer_prolog[mirror:native]", "mla_prefill[mirror:sdpa]"}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
