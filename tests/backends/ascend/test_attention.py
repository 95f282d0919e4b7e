"""Attention and the indexer over the vendor's ops, at their own widths: what samples of other widths cannot show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm5_hal import StepPlan
from glm5_hal.backends.ascend import dense
from glm5_hal.ops import specs

from .emulation import (
    DENSE,
    HEADS,
    INDEXER,
    QUICK,
    RAGGED,
    SPARSE,
    adapter,
    call,
    emulator,
    judged,
)

EDGE = frozenset({"edge"})


def passes(op: str, axes: dict[str, Any], **how: Any) -> None:
    result = judged(op, axes, **how)
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:aclnn")


@pytest.mark.parametrize("form", ["latent_512_rope_64", "latent_576"])
@pytest.mark.parametrize("K", [72, 9], ids=["all keys of a request are fewer", "the chosen ones are"])
def test_sparse_attention(form: str, K: int) -> None:
    passes("sparse_mla", {**SPARSE, "K": K, "format": form, "lens": RAGGED}, tags=EDGE)


@pytest.mark.parametrize(
    "axes",
    [
        {"holes": True, "lens": ((2, 50), (1, 90))},
        {"holes": True, "K": 7, "lens": ((2, 50), (1, 90))},
        {"freely": True, "lens": ((3, 20), (4, 2))},
        {"far_apart": True, "K": 30, "lens": ((3, 21),)},
        {"page": 1, "lens": ((1, 30), (2, 12))},
        {"page": 24, "K": 5, "lens": ((1, 60),)},
        {"K": 1, "lens": ((2, 20),)},
        {"q_scale": 8.0, "lens": ((2, 61),)},
        {"below_zero": True, "lens": ((1, 2), (2, 19))},
        {"lens": ((0, 9),)},
        {"H": 1, "lens": ((2, 20),)},
        {"broken": True, "lens": ((2, 9), (1, 20), (1, 12))},
        {"broken": True, "K": 4, "lens": ((2, 9), (1, 20), (1, 12))},
    ],
    ids=str,
)
def test_sparse_attention_at_the_edges(axes: dict[str, Any]) -> None:
    passes("sparse_mla", {**SPARSE, **axes}, checks=QUICK, tags=EDGE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_attention(dtype: str) -> None:
    passes("mla_decode", {**DENSE, "lens": ((1, 70), (2, 40), (2, 0), (3, 2), (1, 1))}, tags=EDGE, dtype=dtype)


def test_dense_attention_of_a_request_without_tokens() -> None:
    passes("mla_decode", {**DENSE, "lens": RAGGED}, checks=QUICK, tags=EDGE)


@pytest.mark.parametrize(
    "axes",
    [
        {"lens": ((1, 70), (2, 40), (2, 0), (3, 2), (1, 1))},
        {"H": 64, "page": 64, "lens": ((1, 4096), (2, 2049))},
        {"H": 64, "page": 128, "lens": ((1, 900), (1, 1), (1, 128))},
    ],
    ids=["ragged", "GLM-5 with drafts", "GLM-5"],
)
def test_dense_attention_of_several_requests(axes: dict[str, Any]) -> None:
    passes("mla_decode", {**DENSE, **axes}, checks=QUICK, once=True, tags=EDGE)


@pytest.mark.parametrize(
    "axes",
    [
        {"lens": ((1, 30), (1, 1), (1, 64))},  # one token each: no mask
        {"lens": ((20, 130),)},
        {"lens": ((0, 9),)},
        {"q_scale": 8.0, "lens": ((2, 61),)},
        {"below_zero": True, "lens": ((1, 2), (2, 19))},
        {"page": 128, "lens": ((1, 300),)},
        {"H": 64, "lens": ((2, 33),)},
    ],
    ids=str,
)
def test_dense_attention_at_the_edges(axes: dict[str, Any]) -> None:
    passes("mla_decode", {**DENSE, **axes}, checks=QUICK, tags=EDGE)


@pytest.mark.parametrize(
    "axes",
    [
        {"lens": ((40, 40), (3, 50), (1, 1))},
        {"lens": ((5, 3), (2, 0), (4, 9))},
        {"lens": ((6, 6), (2, 30)), "causal": False},
        {"lens": ((2, 0), (2, 30)), "causal": False},
        {"lens": ((7, 7),), "Dqk": 128},
    ],
    ids=str,
)
def test_prefill_of_documented_heads(axes: dict[str, Any]) -> None:
    passes("mla_prefill", {**HEADS, **axes}, checks=QUICK, tags=EDGE)


@pytest.mark.parametrize(
    "axes",
    [
        {"lens": RAGGED},
        {"lens": ((66, 66), (20, 50))},
        {"lens": ((1, 30),), "K": 2048},
        {"lens": ((0, 9),)},
        {"lens": ((2, 61), (1, 40)), "distinct": 7},
        {"lens": ((1, 300),), "page": 128, "H": 64},
    ],
    ids=str,
)
def test_the_indexer(axes: dict[str, Any]) -> None:
    fill = "exact" if "distinct" in axes else "normal"
    passes("lightning_indexer", {**INDEXER, **axes}, checks=QUICK, fill=fill, tags=EDGE)


def test_a_key_that_the_mask_hides_is_never_chosen() -> None:
    """Whether the vendor's op names such keys where there are too few is not documented: so it is seen both ways."""
    args = call("lightning_indexer", {**INDEXER, "lens": ((5, 5), (3, 2), (1, 40))})
    try:
        for hidden in (False, True):
            chosen = adapter("lightning_indexer")
            emulator.install(hidden_positions=hidden)
            indices = chosen(**args)
            assert [(row >= 0).sum().item() for row in indices] == [1, 2, 3, 4, 5, 0, 1, 2, 24]
            assert all(sorted(row[row >= 0].tolist()) == list(range(int((row >= 0).sum()))) for row in indices[:8])
            assert (indices.diff(dim=1)[indices[:, 1:] < 0] <= 0).all()  # -1 comes last
    finally:
        emulator.install()


#: Of two tokens without keys, one with nine, and three with one: those that see none.
LENS, BLIND = ((2, 0), (1, 9), (3, 1)), [0, 1, 3, 4]


@pytest.mark.parametrize("op", ["sparse_mla", "mla_decode", "mla_prefill"])
def test_what_the_op_gives_for_a_token_without_a_key_does_not_matter(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No document says what that is."""
    widths = {"sparse_mla": SPARSE, "mla_decode": DENSE, "mla_prefill": HEADS}[op]
    args = call(op, {**widths, "lens": LENS})
    run = adapter(op)
    name = "npu_sparse_flash_attention" if op == "sparse_mla" else "npu_fused_infer_attention_score_v2"
    real = getattr(torch.ops.npu, name)

    def spoilt(*given: Any, **more: Any) -> Any:
        made = real(*given, **more)
        for result in made:
            if result.dim() == 3:
                rows = result if op != "sparse_mla" or result.shape[0] == 6 else result[0]
                rows[BLIND] = torch.nan
        return made

    monkeypatch.setattr(torch.ops.npu, name, spoilt)
    out, lse = run(**args)
    blind = torch.zeros(6, dtype=torch.bool)
    blind[BLIND] = True
    assert (out[blind] == 0).all()
    assert (lse[blind] == -torch.inf).all()
    assert out[~blind].isfinite().all()
    assert lse[~blind].isfinite().all()


@pytest.mark.parametrize("op", ["sparse_mla", "mla_decode", "mla_prefill"])
def test_scores_of_minus_infinity_are_not_taken_for_no_key(op: str) -> None:
    """Their exponentials add up to nothing; no document says what the op makes of that."""
    widths = {"sparse_mla": SPARSE, "mla_decode": DENSE, "mla_prefill": HEADS}[op]
    args = call(op, {**widths, "lens": ((1, 1), (2, 9), (1, 5))})
    key = args["k"][0, 1] if op == "mla_prefill" else args["kv_cache"][args["block_table"][0, 0], 0]
    args["q"][0, 1, 0] = -torch.inf * key[0].sign()
    out, lse = adapter(op)(**args)
    assert out[0, 1].isnan().all()
    assert not lse[0, 1].isfinite()
    assert out[1:].isfinite().all()
    assert lse[1:].isfinite().all()


def test_requests_may_share_pages() -> None:
    """Then a cache has fewer pages than their lengths ask for, which the op does not take in one call."""
    args = call("mla_decode", {**DENSE, "lens": ((1, 40), (2, 40), (1, 40), (3, 40))})
    args["block_table"][1:] = args["block_table"][0]
    pages = args["block_table"][0, :3].unique().long()
    for name in ("kv_cache", "rope_cache"):
        args[name] = args[name][pages].repeat(2, 1, 1)[:5].contiguous()
    args["block_table"][:] = torch.searchsorted(pages, args["block_table"].long().clamp_max(int(pages[-1]))).int()
    out, lse = adapter("mla_decode")(**args)
    right, exact = specs()["mla_decode"].reference(**args)
    torch.testing.assert_close(out, right, rtol=0.03, atol=0.03)
    torch.testing.assert_close(lse, exact, rtol=1e-4, atol=1e-4)
    assert dense._shares([40, 40, 40, 40], 5, 16) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert dense._shares([40, 0, 40, 9], 6, 16) == [(0, 3), (3, 4)]
    assert dense._shares([], 6, 16) == [(0, 0)]


def test_lengths_come_from_the_steps_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is read from the device."""
    args = call("mla_decode", {**DENSE, "lens": ((1, 30), (2, 40))})
    plan = StepPlan.build(args["seq_lens"], args["cu_seqlens_q"])
    wanted = adapter("mla_decode")(**args)

    def synced(*args: Any) -> None:
        raise AssertionError("a value was read from the device")

    for name in ("tolist", "item", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, synced)
    monkeypatch.setattr(torch.ops.npu, "npu_fused_infer_attention_score_v2", lambda *a, **k: wanted_of(k))

    def wanted_of(keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        assert keywords["actual_seq_qlen"] == [1, 3]
        assert keywords["actual_seq_kvlen"] == [30, 40]
        return wanted[0], wanted[1][..., None]

    with plan.active():
        out, lse = dense.mla_decode.fn(**args)
    assert out is wanted[0]
    assert lse.shape == (3, 4)
