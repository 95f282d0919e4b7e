"""The attention kernels in plain torch: right at every tile boundary, the same bits whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judging import NeverWaits, arguments, passes, points, run, same_bits

from glm5_hal.backend import Kernel
from glm5_hal.backends._torch import attention
from glm5_hal.backends._torch.attention import Softmax, mla_decode, mla_prefill, sparse_mla
from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops import specs
from glm5_hal.plan import StepPlan
from glm5_hal.spec import Sample

KERNELS = (mla_prefill, mla_decode, sparse_mla)


@points(*KERNELS)
def test_within_the_budgets_of_the_suite(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@points(*KERNELS)
@pytest.mark.usefixtures("small_tiles")
def test_over_many_tiles(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@points(sparse_mla)
@pytest.mark.usefixtures("far_device", "small_tiles")
def test_where_the_host_cannot_count_the_indices(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


# --- online softmax --------------------------------------------------------------------------------------------------


def merged(scores: torch.Tensor, values: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    state = Softmax()
    for start in range(0, scores.shape[-1], width):
        state.add(scores[:, start : start + width].clone(), values[start : start + width])
    return state.result()


@pytest.mark.parametrize("width", [1, 3, 7, 20, 21])
def test_tiles_merge_to_one_softmax(width: int) -> None:
    scores = 40 * torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, lse = merged(scores, values, width)
    torch.testing.assert_close(out, scores.softmax(-1) @ values, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-14, atol=1e-14)


def test_tiles_without_a_visible_key_change_nothing_wherever_they_come() -> None:
    hidden, seen = torch.full((1, 3), -torch.inf), torch.tensor([[0.5, -0.5, 2.0]])
    values = torch.arange(9.0)[:, None]
    alone = merged(seen, values[3:6], 3)
    for scores in ([hidden, seen, hidden], [seen, hidden, hidden], [hidden, hidden, seen]):
        at = next(i for i, s in enumerate(scores) if s is seen)
        kept = torch.cat([torch.zeros(3 * at, 1), values[3:6], torch.zeros(6 - 3 * at, 1)])
        torch.testing.assert_close(merged(torch.cat(scores, 1), kept, 3), alone)


def test_scores_far_beyond_the_range_of_exp() -> None:
    out, lse = merged(torch.tensor([[-3e4, 2e4, 3e4]]), torch.tensor([[1.0], [2.0], [4.0]]), 1)
    assert out.tolist() == [[4.0]]
    assert lse.tolist() == [3e4]


def test_an_infinite_score_gives_an_infinite_lse_and_no_number_as_output() -> None:
    scores, values = torch.tensor([[1.0, torch.inf, 2.0]]), torch.ones(3, 1)
    for width in (1, 3):
        out, lse = merged(scores, values, width)
        assert lse.item() == scores.logsumexp(-1).item() == torch.inf
        assert out.isnan().item()


# --- lengths around the tiles ----------------------------------------------------------------------------------------

TILE = 8


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 64])
@pytest.mark.parametrize("new", [1, 2, 9])
def test_decode_around_the_size_of_a_tile(monkeypatch: pytest.MonkeyPatch, length: int, new: int) -> None:
    monkeypatch.setattr(attention, "KEYS", TILE)
    passes(mla_decode, Sample("tiles", {**TINY, "lens": ((new, length), (1, TILE))}), "float32")


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("queries", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_around_the_size_of_a_tile(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, causal: bool
) -> None:
    for name, value in (("PREFILL_KEYS", TILE), ("PREFILL_QUERIES", 4), ("PREFILL_HEADS", 2)):
        monkeypatch.setattr(attention, name, value)
    axes = {"H": 3, "Dqk": 8, "Dv": 5, "scale": 0.3, "lens": ((queries, keys),), "causal": causal}
    passes(mla_prefill, Sample("tiles", axes), "float32")


TINY = {"H": 3, "L": 8, "R": 4, "page": 3, "scale": 0.3, "format": "latent_576"}


@pytest.mark.parametrize("chosen", [1, 7, 8, 9, 24])
def test_sparse_around_the_size_of_a_tile(monkeypatch: pytest.MonkeyPatch, chosen: int) -> None:
    monkeypatch.setattr(attention, "KEYS", TILE)
    passes(sparse_mla, Sample("tiles", {**TINY, "K": chosen, "lens": ((2, 25), (3, 11))}), "float32")


# --- what the claims say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
def test_the_same_bits_run_after_run(kernel: Kernel) -> None:
    args = arguments(kernel.op, "many_heads", "bfloat16")
    assert same_bits(run(kernel, args), run(kernel, args))


def real_widths(dtype: str, lens: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Off the grid, so that any other order of summation gives other bits."""
    generator = torch.Generator().manual_seed(0)
    axes = {"H": 64, "L": 512, "R": 64, "K": 96, "page": 64, "scale": 0.0625, "format": "latent_576", "lens": lens}
    spec = specs()["sparse_mla"]
    args = dict(spec.inputs(Sample("wide", axes), dtype, Draw(0, "wide")).args)
    for name in ("q", "kv_cache"):
        args[name] = torch.randn(args[name].shape, generator=generator).to(args[name].dtype)
    return args


LENS = ((1, 300), (4, 1030), (2, 2), (1, 65))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [mla_decode, sparse_mla], ids=lambda k: k.op)
def test_a_tokens_bits_do_not_depend_on_the_batch(kernel: Kernel, dtype: str, threads: int) -> None:
    args = real_widths(dtype, LENS)
    if kernel is mla_decode:
        del args["indices"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = run(kernel, args)
        t = 0
        for r, (new, length) in enumerate(LENS):
            for i in range(new):
                alone = {
                    **args,
                    "q": args["q"][t : t + 1].clone(),
                    "block_table": args["block_table"][r : r + 1],
                    "seq_lens": torch.tensor([length - new + i + 1], dtype=torch.int32),
                    "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32),
                }
                if "indices" in args:
                    alone["indices"] = args["indices"][t : t + 1].clone()
                assert same_bits(run(kernel, alone), {k: v[t : t + 1] for k, v in together.items()}), (r, i)
                t += 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", [mla_decode, sparse_mla], ids=lambda k: k.op)
@pytest.mark.parametrize("form", ["latent_576", "latent_512_rope_64", "fp8_656", "fp8_656_ascend"])
@pytest.mark.usefixtures("far_device")
def test_with_a_plan_the_host_never_waits(kernel: Kernel, form: str) -> None:
    args = arguments(kernel.op, f"decode-{form}", "bfloat16")
    with StepPlan.build(args["seq_lens"], args["cu_seqlens_q"]).active(), NeverWaits():
        kernel.fn(**args)


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [mla_decode, sparse_mla], ids=lambda k: k.op)
def test_scores_of_bfloat16_inputs_keep_the_bits_of_float32(kernel: Kernel) -> None:
    """lse shows it: scores rounded to bfloat16 would move it by 1e-3 and more."""
    args = real_widths("bfloat16", ((1, 90), (2, 64)))
    if kernel is mla_decode:
        del args["indices"]
    truth = oracle.truth(specs()[kernel.op], args).outs["lse"]
    assert (run(kernel, args)["lse"].double() - truth).abs().max() < 2e-6


def test_over_all_keys_sparse_is_dense() -> None:
    args = real_widths("float32", ((1, 96), (1, 40)))
    args["indices"] = torch.arange(96, dtype=torch.int32).expand(2, -1).clone()
    args["indices"][1, 40:] = -1
    sparse = run(sparse_mla, args)
    del args["indices"]
    dense = run(mla_decode, args)
    assert same_bits(sparse, dense)


def test_the_order_of_the_indices_moves_nothing_but_the_last_bits() -> None:
    args = real_widths("float32", ((1, 400),))
    shuffled = {**args, "indices": args["indices"][:, torch.randperm(96)]}
    torch.testing.assert_close(run(sparse_mla, shuffled), run(sparse_mla, args), rtol=1e-5, atol=1e-6)


# --- what must not be touched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [False, True])
def test_a_key_without_an_index_is_not_even_multiplied_by_zero(request: pytest.FixtureRequest, far: bool) -> None:
    if far:
        request.getfixturevalue("far_device")
    args = arguments("sparse_mla", "decode-latent_576")
    named = torch.zeros(args["kv_cache"].shape[:2], dtype=torch.bool)
    P, starts = args["kv_cache"].shape[1], args["cu_seqlens_q"].tolist()
    for r in range(len(args["seq_lens"])):
        chosen = args["indices"][starts[r] : starts[r + 1]]
        chosen = chosen[chosen >= 0].long()
        named[args["block_table"][r][chosen // P].long(), chosen % P] = True
    spoilt = {**args, "kv_cache": args["kv_cache"].masked_fill(~named[..., None], torch.nan)}
    assert not named.all()
    assert same_bits(run(sparse_mla, spoilt), run(sparse_mla, args))


@pytest.mark.parametrize("far", [False, True])
def test_a_token_without_an_index_among_others(request: pytest.FixtureRequest, far: bool) -> None:
    if far:
        request.getfixturevalue("far_device")
    args = arguments("sparse_mla", "decode-latent_576")
    args["indices"] = args["indices"].clone()
    args["indices"][1] = -1
    args["kv_cache"] = args["kv_cache"].clone()
    page = args["block_table"][1, 0]
    args["kv_cache"][page, 0] = torch.nan  # position 0 of that token's request, which nobody names
    args["indices"][args["indices"] == 0] = 1
    found = run(sparse_mla, args)
    assert found["out"][1].eq(0).all()
    assert found["lse"][1].eq(-torch.inf).all()
    assert found["out"].isfinite().all()


def test_keys_after_a_token_cannot_spoil_it() -> None:
    """Several new tokens of one request: a NaN in a later key is seen by later tokens only."""
    args = real_widths("float32", ((4, 70),))
    del args["indices"]
    clean = run(mla_decode, args)
    page, offset = args["block_table"][0, 68 // 64], 68 % 64
    args["kv_cache"] = args["kv_cache"].clone()
    args["kv_cache"][page, offset] = torch.nan
    spoilt = run(mla_decode, args)
    assert same_bits({k: v[:2] for k, v in spoilt.items()}, {k: v[:2] for k, v in clean.items()})
    assert spoilt["out"][2:].isnan().all()


@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("kernel", [mla_decode, sparse_mla], ids=lambda k: k.op)
def test_pages_any_distance_apart(kernel: Kernel, gap: int) -> None:
    """A gap of whole rows, as some caches have between pages, and one that is no multiple of a row."""
    args = arguments(kernel.op, "decode-latent_576")
    cache = args["kv_cache"]
    N, P, W = cache.shape
    memory = torch.full((N * (P * W + gap * (W if gap == 1 else 1)),), torch.nan)
    apart = memory.as_strided((N, P, W), (memory.numel() // N, W, 1)).copy_(cache)
    assert same_bits(run(kernel, {**args, "kv_cache": apart}), run(kernel, args))


def test_no_tokens_no_requests_no_pages() -> None:
    empty = torch.zeros(0, 1, dtype=torch.int32)
    lens, starts = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    more = {"scale": 1.0, "kv_lora_rank": 8}
    q, cache = torch.zeros(0, 2, 12), torch.zeros(0, 4, 12)
    out, lse = mla_decode.fn(q, cache, empty, lens, starts, **more)
    assert (out.shape, lse.shape) == ((0, 2, 8), (0, 2))
    out, lse = sparse_mla.fn(q, cache, torch.zeros(0, 0, dtype=torch.int32), empty, lens, starts, **more)
    assert (out.shape, lse.shape) == ((0, 2, 8), (0, 2))
    out, lse = mla_prefill.fn(q, q, torch.zeros(0, 2, 5), starts, starts, scale=1.0)
    assert (out.shape, lse.shape) == ((0, 2, 5), (0, 2))
