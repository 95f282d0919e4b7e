"""mla_prefill against torch's scaled_dot_product_attention and against sums written out, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._common.references import reference_of
from glm5_hal.ops._mla_prefill import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
prefill = reference_of("mla_prefill")


def args_of(sample: Sample, dtype: str = "bfloat16") -> dict[str, Any]:
    return dict(SPEC.inputs(sample, dtype, Draw(0, sample.id)).args)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def sdpa(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Request by request: torch's attention under an explicit mask, and lse head by head in Python floats."""
    q, k, v = (args[n].double() for n in "qkv")
    out, lse = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64), torch.full(q.shape[:2], -torch.inf).double()
    cu_q, cu_k = args["cu_seqlens_q"].tolist(), args["cu_seqlens_k"].tolist()
    for r in range(len(cu_q) - 1):
        n, m = cu_q[r + 1] - cu_q[r], cu_k[r + 1] - cu_k[r]
        rows = [[not args["causal"] or s <= i + m - n for s in range(m)] for i in range(n)]
        mask = torch.tensor(rows, dtype=torch.bool).view(n, m)
        Q, K, V = (
            t.transpose(0, 1) for t in (q[cu_q[r] : cu_q[r + 1]], k[cu_k[r] : cu_k[r + 1]], v[cu_k[r] : cu_k[r + 1]])
        )
        attended = scaled_dot_product_attention(Q, K, V, attn_mask=mask, scale=args["scale"]).transpose(0, 1)
        for i in range(n):
            if mask[i].any():
                out[cu_q[r] + i] = attended[i]
                for h in range(q.shape[1]):
                    scores = [args["scale"] * x for x in (K[h] @ Q[h, i])[mask[i]].tolist()]
                    top = max(scores)
                    lse[cu_q[r] + i, h] = top + math.log(math.fsum(math.exp(x - top) for x in scores))
    return out, lse


@pytest.mark.parametrize("sample", [s for s in SMOKE if s.id != "many_heads"], ids=lambda s: s.id)
def test_it_is_scaled_dot_product_attention(sample: Sample) -> None:
    args = args_of(sample)
    truth, (out, lse) = oracle.truth(SPEC, args).outs, sdpa(args)
    torch.testing.assert_close(truth["out"], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(truth["lse"], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_plain_run_is_off_by_the_rounding_of_its_dtype_and_no_more(dtype: str) -> None:
    args = args_of(SMOKE[0], dtype)
    out, lse = prefill(**args)
    truth = oracle.truth(SPEC, args).outs
    unit = torch.finfo(getattr(torch, dtype)).eps
    assert (out.double() - truth["out"]).norm() < unit * truth["out"].norm()
    assert (lse.double() - truth["lse"]).abs().max() < 2e-6
    assert (out.double() - truth["out"]).norm() > 0


def test_the_queries_are_the_last_of_the_keys() -> None:
    """With equal scores a query's output is the mean of the values that it sees: of 5 keys, query i of 2 sees 4 + i."""
    v = torch.tensor([1.0, 2, 4, 8, 16]).view(5, 1, 1)
    out, lse = prefill(torch.zeros(2, 1, 3), torch.ones(5, 1, 3), v, offsets(2), offsets(5), scale=1.0)
    assert out.flatten().tolist() == [15 / 4, pytest.approx(31 / 5)]
    assert lse.flatten().tolist() == pytest.approx([math.log(4), math.log(5)])


def test_without_the_mask_every_query_sees_all_keys_of_its_request() -> None:
    v = torch.tensor([1.0, 2, 4, 8]).view(4, 1, 1)
    out, _ = prefill(
        torch.zeros(3, 1, 2), torch.ones(4, 1, 2), v, offsets(2, 1), offsets(2, 2), scale=1.0, causal=False
    )
    assert out.flatten().tolist() == [1.5, 1.5, 6.0]


def test_more_queries_than_keys_leave_the_first_ones_empty() -> None:
    """Pitfall 15: an empty row is 0 with lse −inf, even where its query is NaN."""
    q = torch.zeros(3, 1, 2)
    q[:2] = torch.nan
    out, lse = prefill(q, torch.ones(1, 1, 2), torch.full((1, 1, 4), 7.0), offsets(3), offsets(1), scale=1.0)
    assert out[:, 0].tolist() == [[0.0] * 4, [0.0] * 4, [7.0] * 4]
    assert lse.flatten().tolist() == [-math.inf, -math.inf, 0.0]


@pytest.mark.parametrize("causal", [True, False])
def test_no_keys_at_all(causal: bool) -> None:
    out, lse = prefill(
        torch.ones(2, 1, 2), torch.ones(0, 1, 2), torch.ones(0, 1, 4), offsets(2), offsets(0), scale=1.0, causal=causal
    )
    assert not out.any()
    assert (lse == -math.inf).all()


def test_lse_is_a_natural_logarithm_and_the_scale_is_the_given_one() -> None:
    """Pitfalls 1 and 15: one key with score 4 at scale 0.0625 is lse 0.25, whatever the widths."""
    q, k = torch.full((1, 1, 256), 0.125), torch.full((1, 1, 256), 0.125)
    _, lse = prefill(q, k, torch.ones(1, 1, 2), offsets(1), offsets(1), scale=0.0625)
    assert lse.item() == 0.0625 * 256 * 0.125**2


def test_requests_do_not_see_each_other() -> None:
    args = args_of(SMOKE[0], "float32")
    start, stop = args["cu_seqlens_k"][1:3].tolist()
    before = prefill(**args)
    changed = {n: args[n].clone() for n in "kv"}
    for t in changed.values():
        t[start:stop] = 99.0
    after = prefill(**{**args, **changed})
    mine = slice(*args["cu_seqlens_q"][1:3].tolist())
    for a, b in zip(before, after, strict=True):
        assert not torch.equal(a[mine], b[mine])
        a[mine], b[mine] = 0, 0
        assert torch.equal(a, b)


def test_scores_far_apart_do_not_overflow() -> None:
    q = torch.tensor([100.0]).view(1, 1, 1)
    k = torch.tensor([100.0, -100.0]).view(2, 1, 1)
    v = torch.tensor([3.0, 5.0]).view(2, 1, 1)
    out, lse = prefill(q, k, v, offsets(1), offsets(2), scale=1.0)
    assert (out.item(), lse.item()) == (3.0, 10000.0)


def test_probabilities_are_rounded_to_the_storage_dtype() -> None:
    """exp(-1) is 0.3679, in bfloat16 0.3672: the rounding contract, visible in one output."""
    q, k = torch.ones(1, 1, 1).bfloat16(), torch.tensor([1.0, 0.0]).view(2, 1, 1).bfloat16()
    v = torch.tensor([0.0, 1.0]).view(2, 1, 1).bfloat16()
    p = torch.tensor(math.exp(-1)).bfloat16().double()
    out, _ = prefill(q, k, v, offsets(1), offsets(2), scale=1.0)
    assert out.item() == (p / (1 + p)).bfloat16().item()


@pytest.mark.parametrize("bad", SPEC.errors, ids=lambda b: b.id)
def test_offsets_out_of_range_are_refused(bad: Any) -> None:
    with pytest.raises(HalError) as refusal:
        SPEC.check_values(bad.spoil(args_of(SMOKE[0])))
    assert refusal.value.code == bad.code
    assert refusal.value.fix


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_good_samples_pass_the_value_checks(sample: Sample) -> None:
    SPEC.check_values(args_of(sample))
