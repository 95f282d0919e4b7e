"""A decode step compiles whole, once for its shape and once for lengths that grow, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import KINDS, model, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import PagedCache, apply

PROMPT, STEPS = 30, 12
MASK = torch.ones(2, PROMPT + STEPS, dtype=torch.long)
MASK[0, :9] = 0


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@torch.no_grad()
def decoded(small: Any, step: Any, cache: PagedCache, padded: bool) -> list[torch.Tensor]:
    def given(end: int, columns: int) -> dict[str, Any]:
        if not padded:
            return {}
        mask = MASK[:, :end].contiguous()
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -columns:]}

    logits = [small(tokens(2, PROMPT), past_key_values=cache, **given(PROMPT, PROMPT)).logits[:, -1:]]
    for i in range(STEPS):
        logits.append(step(logits[-1].argmax(-1), past_key_values=cache, **given(PROMPT + i + 1, 1)).logits)
    return logits


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_decode_step_has_no_graph_break_and_the_same_bits(kind: str, padded: bool) -> None:
    small = apply(model(kind))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(small, fullgraph=True, backend=counter)
    found = decoded(small, step, PagedCache(small, batch_size=2, max_length=PROMPT + STEPS), padded)
    expected = decoded(small, small, PagedCache(small), padded)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count == 2


def test_compiled_code_says_that_it_cannot_grow_the_cache() -> None:
    small = apply(model("glm"), page_size=8)
    step = torch.compile(small, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="cannot grow the cache"):  # dynamo wraps it
        decoded(small, step, PagedCache(small), False)


def test_compiled_code_refuses_new_padding() -> None:
    small = apply(model("glm"))
    step = torch.compile(small, fullgraph=True, backend="aot_eager")
    cache = PagedCache(small, batch_size=2, max_length=40)
    with torch.no_grad():
        small(tokens(2, PROMPT), past_key_values=cache)
        mask = torch.ones(2, PROMPT + 1)
        mask[1, -1] = 0
        with pytest.raises(RuntimeError, match="no new padding"):
            step(tokens(2, 1), past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("column", [0, 12], ids=["padding made real", "real made padding"])
def test_compiled_code_refuses_a_mask_that_changed(column: int) -> None:
    small = apply(model("glm"))
    step = torch.compile(small, fullgraph=True, backend="aot_eager")
    cache = PagedCache(small, batch_size=2, max_length=40)
    mask = MASK[:, :PROMPT].clone()
    with torch.no_grad():
        small(tokens(2, PROMPT), past_key_values=cache, attention_mask=mask)
        mask[0, column] = 1 - mask[0, column]
        with pytest.raises(RuntimeError, match="changed in earlier columns"):
            step(tokens(2, 1), past_key_values=cache, attention_mask=torch.cat([mask, mask.new_ones(2, 1)], 1))


def test_layers_with_a_policy_of_their_own_are_not_compiled() -> None:
    small = apply(model("glm"), policies={1: "cpu:reference"})
    step = torch.compile(small, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="policy of its own"):
        decoded(small, step, PagedCache(small, batch_size=2, max_length=PROMPT + STEPS), False)
    with pytest.raises(HalError):
        apply(small, policies={1: "cpu:nothing"})
