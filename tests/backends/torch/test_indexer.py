"""The indexer's kernels in plain torch: scores at every tile boundary, and the same choice whichever way it is made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from judging import NeverWaits, arguments, passes, points, run, same_bits

from glm5_hal.backend import Kernel
from glm5_hal.backends._torch import indexer, topk
from glm5_hal.backends._torch.indexer import indexer_logits, lightning_indexer
from glm5_hal.backends._torch.topk import topk_indices
from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops import specs
from glm5_hal.ops._topk_indices import topk_indices as by_sorting
from glm5_hal.plan import StepPlan
from glm5_hal.spec import Sample

KERNELS = (indexer_logits, lightning_indexer)


@points(*KERNELS, topk_indices)
def test_within_the_budgets_of_the_suite(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@points(*KERNELS)
@pytest.mark.usefixtures("small_tiles")
def test_over_many_tiles(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@points(lightning_indexer, topk_indices)
@pytest.mark.usefixtures("far_device", "small_tiles")
def test_where_the_host_cannot_look_at_the_scores(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("new", [1, 2, 9, 17])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
def test_around_the_size_of_a_tile(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, length: int, new: int) -> None:
    monkeypatch.setattr(indexer, "KEYS", 8)
    axes = {"H": 3, "D": 16, "page": 3, "format": "bf16_128", "lens": ((new, length), (1, 8)), "K": 8}
    passes(kernel, Sample("tiles", axes), "float32")


def off_the_grid(dtype: str, lens: tuple[tuple[int, int], ...], heads: int = 32) -> dict[str, Any]:
    """GLM-5's widths, and numbers whose sums differ in their last bits with the order of summation."""
    axes = {"H": heads, "D": 128, "page": 64, "format": "bf16_128", "lens": lens}
    args = dict(specs()["indexer_logits"].inputs(Sample("wide", axes), dtype, Draw(0, "wide")).args)
    generator = torch.Generator().manual_seed(0)
    for name in ("q", "weights", "index_cache"):
        args[name] = torch.randn(args[name].shape, generator=generator).to(args[name].dtype)
    return args


def fused(args: dict[str, Any], top_k: int) -> dict[str, Any]:
    return {**{k: v for k, v in args.items() if k != "max_seq_len"}, "top_k": top_k}


def test_scores_of_bfloat16_inputs_keep_the_bits_of_float32() -> None:
    """Scores rounded to bfloat16 on the way would be off by 1e-3 of their size."""
    args = off_the_grid("bfloat16", ((1, 200), (2, 64)))
    truth = oracle.truth(specs()["indexer_logits"], args).outs["logits"]
    seen = truth.isfinite()
    error = (run(indexer_logits, args)["logits"].double() - truth)[seen].abs().max()
    assert error < 1e-6 * truth[seen].abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_choice_is_that_of_the_two_ops(dtype: str) -> None:
    args = off_the_grid(dtype, ((1, 300), (3, 90), (2, 2), (40, 60)))
    logits = run(indexer_logits, args)["logits"]
    lengths = torch.full((len(logits),), logits.shape[1], dtype=torch.int32)
    for top_k in (1, 24, 64, 512):
        expected = run(topk_indices, {"scores": logits, "seq_lens": lengths, "top_k": top_k})
        assert same_bits(run(lightning_indexer, fused(args, top_k)), expected)


# --- what the claims say ---------------------------------------------------------------------------------------------

LENS = ((1, 300), (4, 1030), (2, 2), (1, 65), (3, 4100))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tokens_bits_do_not_depend_on_the_batch(dtype: str, threads: int) -> None:
    args = off_the_grid(dtype, LENS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together, t = run(indexer_logits, args)["logits"], 0
        for r, (new, length) in enumerate(LENS):
            for i in range(new):
                alone = {
                    **args,
                    "q": args["q"][t : t + 1].clone(),
                    "weights": args["weights"][t : t + 1].clone(),
                    "block_table": args["block_table"][r : r + 1],
                    "seq_lens": torch.tensor([length - new + i + 1], dtype=torch.int32),
                    "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32),
                }
                assert same_bits(run(indexer_logits, alone), {"logits": together[t : t + 1]}), (r, i)
                t += 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
def test_the_same_bits_run_after_run(kernel: Kernel) -> None:
    args = arguments(kernel.op, "prefill", "bfloat16")
    assert same_bits(run(kernel, args), run(kernel, args))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
@pytest.mark.parametrize("form", ["bf16_128", "fp8_132"])
@pytest.mark.usefixtures("far_device")
def test_with_a_plan_the_host_never_waits(kernel: Kernel, form: str) -> None:
    args = arguments(kernel.op, f"decode-{form}", "bfloat16")
    with StepPlan.build(args["seq_lens"], args["cu_seqlens_q"]).active(), NeverWaits():
        kernel.fn(**args)


@pytest.mark.usefixtures("far_device")
def test_topk_never_waits() -> None:
    args = arguments("topk_indices", "ties")
    with NeverWaits():
        topk_indices.fn(**args)


def test_the_fused_op_keeps_no_more_than_a_block_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens there are; and none for the block table's unused width."""
    kept = []
    choose = indexer.choose

    def watched(scores: torch.Tensor, lengths: Any, out: torch.Tensor) -> None:
        kept.append(scores.untyped_storage().nbytes())
        choose(scores, lengths, out)

    monkeypatch.setattr(indexer, "choose", watched)
    args = off_the_grid("float32", ((40, 50), (1, 33)), heads=2)
    run(lightning_indexer, fused(args, 8))
    assert max(kept) == indexer.TOKENS * 50 * 4


# --- top-k: the guess is only about time -----------------------------------------------------------------------------

WIDTH, K = 4096, 64


def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(WIDTH, generator=generator)
    comb = plain.clone()
    comb[:: topk.STRIDE] += 100  # what is sampled is higher than all else: the guess is far too high
    holes = plain.clone()
    holes[:: topk.STRIDE] = torch.nan
    low = plain.clone()
    low[:: topk.STRIDE] = -torch.inf
    infinite = plain.clone()
    infinite[torch.randperm(WIDTH, generator=generator)[:200]] = torch.inf
    few = torch.full((WIDTH,), -torch.inf)
    few[[5, 4000]] = torch.tensor([torch.finfo(torch.float32).min, -1.0])
    return {
        "random": plain,
        "ascending": plain.sort().values,
        "descending": plain.sort(descending=True).values,
        "comb": comb,
        "sample_of_nan": holes,
        "sample_of_minus_inf": low,
        "more_inf_than_places": infinite,
        "few_eligible": few,
        "all_nan": torch.full((WIDTH,), torch.nan),
        "all_equal": torch.full((WIDTH,), -3.0),
        "both_zeros": torch.where(plain > 0, 0.0, -0.0),
        "few_values": (plain * 2).round(),
        "tiny": plain * 1e-42,
    }


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", list(rows()))
def test_the_choice_is_that_of_a_full_sort(request: pytest.FixtureRequest, name: str, dtype: str, far: bool) -> None:
    if far:
        request.getfixturevalue("far_device")
    row = rows()[name].to(getattr(torch, dtype))
    lengths = torch.tensor([WIDTH, WIDTH - 1, 1000, K, K - 1, 1, 0], dtype=torch.int32)
    scores = row.expand(len(lengths), -1)
    for top_k in (1, K, WIDTH + 5):
        got = topk_indices.fn(scores, lengths, top_k=top_k)
        assert torch.equal(got, by_sorting(scores, lengths, top_k=top_k)), top_k


def test_a_good_guess_leaves_few_candidates() -> None:
    row = torch.randn(65536, generator=torch.Generator().manual_seed(0))
    guess = topk._guess(row, 2048)
    assert 2048 <= int((row >= guess).sum()) < 2 * 2048
    assert topk._guess(row[:2048], 2048) == -math.inf
