"""indexer_logits and lightning_indexer against one product at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._common.references import reference_of
from glm5_hal.ops._indexer_logits import SPEC
from glm5_hal.ops._lightning_indexer import SPEC as FUSED
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
logits, indexer = reference_of("indexer_logits"), reference_of("lightning_indexer")


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def key_at(args: dict[str, Any], block: int, offset: int) -> list[float]:
    page = args["index_cache"][block]
    if args["cache_format"] == "bf16_128":
        return page[offset].tolist()
    P, groups = page.shape[0], page.shape[1] // (128 + 4)
    D = 128 * groups
    raw = np.array(page.flatten().tolist(), dtype=np.uint8)
    scales = raw[P * D :].copy().view("<f4")[offset * groups :]
    return [e4m3(int(c)) * float(scales[i // 128]) for i, c in enumerate(raw[offset * D : (offset + 1) * D])]


def by_hand(args: dict[str, Any], width: int) -> np.ndarray:
    T, H, _ = args["q"].shape
    out = np.full((T, width), -math.inf)
    q, w = args["q"].double().numpy(), args["weights"].double().numpy()
    page, starts = args["index_cache"].shape[1], args["cu_seqlens_q"].tolist()
    for r, length in enumerate(args["seq_lens"].tolist()):
        table = args["block_table"][r].tolist()
        keys = [np.array(key_at(args, table[s // page], s % page)) for s in range(length)]
        new = starts[r + 1] - starts[r]
        for i in range(new):
            for s in range(length - new + i + 1):
                out[starts[r] + i, s] = math.fsum(
                    w[starts[r] + i, h] * max(float(np.dot(q[starts[r] + i, h], keys[s])), 0.0) for h in range(H)
                )
    return out


@pytest.mark.parametrize("sample", [s for s in SMOKE if s.id != "many_heads"], ids=lambda s: s.id)
def test_every_score_is_the_sum_that_it_says(sample: Sample) -> None:
    args = dict(SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args)
    truth = oracle.truth(SPEC, args).outs["logits"]
    torch.testing.assert_close(
        truth, torch.from_numpy(by_hand(args, args["max_seq_len"])), rtol=1e-12, atol=1e-12, equal_nan=True
    )


def one(q: list[float], weight: list[float], keys: list[list[float]], **more: Any) -> torch.Tensor:
    """One token, head dim 1, one page."""
    cache = torch.tensor(keys, dtype=torch.float64)[None]
    n = torch.tensor([len(keys)], dtype=torch.int32)
    queries = torch.tensor(q, dtype=torch.float64).view(1, -1, 1)
    weights = torch.tensor([weight], dtype=torch.float64)
    table, offsets = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    return logits(queries, weights, cache, table, n, offsets, max_seq_len=len(keys), **more)


def test_relu_comes_before_the_weights_and_weights_may_be_negative() -> None:
    assert one([1.0, -1.0], [2.0, -3.0], [[4.0], [-5.0]]).tolist() == [[8.0, -15.0]]


def test_no_scale_is_applied_beside_the_weights() -> None:
    assert one([1.0], [1.0], [[7.0]]).item() == 7.0


def test_a_query_head_far_from_all_keys_scores_exactly_zero() -> None:
    assert one([-1.0], [3.0], [[4.0]]).item() == 0.0


def test_columns_beyond_the_limit_are_minus_infinity() -> None:
    sample = next(s for s in SMOKE if s.id == "prefill")
    args = dict(SPEC.inputs(sample, "float32", Draw(0, "x")).args)
    got = logits(**args)
    assert torch.isfinite(got[0, :1]).all()
    assert (got[0, 1:] == -math.inf).all()


@pytest.mark.parametrize("sample", [s for s in FUSED.samples() if s.level == "smoke"], ids=lambda s: s.id)
def test_the_indexer_takes_the_best_keys_that_the_token_sees(sample: Sample) -> None:
    if sample.id == "many_heads":
        pytest.skip("96 heads by hand take too long")
    args = dict(FUSED.inputs(sample, "float32", Draw(0, sample.id)).args)
    width = args["block_table"].shape[1] * args["index_cache"].shape[1]
    truth = oracle.truth(FUSED, args).outs["indices"].tolist()
    for row, scores in zip(truth, by_hand(args, width), strict=True):
        seen = [j for j in range(width) if scores[j] > -math.inf]  # which NaN is not
        # Scores that differ by less than float64 rounding may swap: compare the chosen scores, and the form exactly.
        picked = [j for j in row if j >= 0]
        assert picked == sorted(set(picked))
        assert row == picked + [-1] * (args["top_k"] - len(picked))
        best = sorted((scores[j] for j in seen), reverse=True)[: args["top_k"]]
        np.testing.assert_allclose(sorted((scores[j] for j in picked), reverse=True), best, rtol=1e-12, atol=1e-12)


def test_a_token_that_sees_fewer_keys_than_top_k_gets_them_all() -> None:
    sample = next(s for s in FUSED.samples() if s.id == "prefill")
    args = dict(FUSED.inputs(sample, "float32", Draw(0, "x")).args)
    got = indexer(**args)
    assert got[4].tolist() == [0, 1, 2, 3, 4, *[-1] * (args["top_k"] - 5)]
