"""mla_decode against one dot product and one exponential at a time, in float64, bytes decoded by hand."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._common.references import reference_of
from glm5_hal.ops._mla_decode import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
decode = reference_of("mla_decode")


def args_of(sample: Sample, dtype: str = "bfloat16") -> dict[str, Any]:
    return dict(SPEC.inputs(sample, dtype, Draw(0, sample.id)).args)


def e4m3(code: int) -> float:
    if code & 127 == 127:
        return math.nan
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def bfloat16(low: int, high: int) -> float:
    return struct.unpack("<f", bytes((0, 0, low, high)))[0]


def key_at(args: dict[str, Any], page: int, offset: int) -> tuple[list[float], list[float]]:
    """Latent and rope of one slot, read from the format's bytes."""
    row, L = args["kv_cache"][page, offset], args["kv_lora_rank"]
    name = args["cache_format"]
    if name == "latent_576":
        return row[:L].tolist(), row[L:].tolist()
    if name == "latent_512_rope_64":
        return row.tolist(), args["rope_cache"][page, offset].tolist()
    raw, scale_bytes = bytes(row.tolist()), 4 * L // 128
    scale_at, rope_at = (L, L + scale_bytes) if name == "fp8_656" else (len(raw) - scale_bytes, L)
    scales = struct.unpack_from(f"<{L // 128}f", raw, scale_at)
    rope = raw[rope_at : rope_at + len(raw) - L - scale_bytes]
    latent = [e4m3(raw[i]) * scales[i // 128] for i in range(L)]
    return latent, [bfloat16(*rope[i : i + 2]) for i in range(0, len(rope), 2)]


def by_hand(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q = args["q"].double().numpy()
    T, H, _ = q.shape
    out, lse = np.zeros((T, H, args["kv_lora_rank"])), np.full((T, H), -math.inf)
    page_size, starts = args["kv_cache"].shape[1], args["cu_seqlens_q"].tolist()
    for r, length in enumerate(args["seq_lens"].tolist()):
        where = [(int(args["block_table"][r, s // page_size]), s % page_size) for s in range(length)]
        held = [key_at(args, *w) for w in where]
        latents = [np.array(latent) for latent, _ in held]
        keys = [np.array(latent + rope) for latent, rope in held]
        new = starts[r + 1] - starts[r]
        for i in range(new):
            seen = range(max(length - new + i + 1, 0))
            for h in range(H):
                scores = [args["scale"] * float(np.dot(q[starts[r] + i, h], keys[s])) for s in seen]
                if scores:
                    total = math.fsum(math.exp(x - max(scores)) for x in scores)
                    lse[starts[r] + i, h] = max(scores) + math.log(total)
                    for s, x in zip(seen, scores, strict=True):
                        out[starts[r] + i, h] += math.exp(x - max(scores)) / total * latents[s]
    return torch.from_numpy(out), torch.from_numpy(lse)


@pytest.mark.parametrize("sample", [s for s in SMOKE if s.id != "many_heads"], ids=lambda s: s.id)
def test_it_is_the_sum_that_it_says(sample: Sample) -> None:
    args = args_of(sample)
    truth, (out, lse) = oracle.truth(SPEC, args).outs, by_hand(args)
    torch.testing.assert_close(truth["out"], out, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(truth["lse"], lse, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_samples_reach_every_format_and_both_sides_of_a_page() -> None:
    assert {s.axes["format"] for s in SMOKE} == {"latent_576", "latent_512_rope_64", "fp8_656", "fp8_656_ascend"}
    lengths = {m % s.axes["page"] for s in SMOKE for _, m in s.axes["lens"]}
    assert {s.axes["page"] for s in SMOKE} >= {8}
    assert lengths >= {7, 0, 1}
    new = {n for s in SMOKE for n, _ in s.axes["lens"]}
    assert new >= {0, 1, 2, 3, 4}


def one_request(keys: Tensor, rope_dim: int, *, q: Tensor, page: int = 2, **more: Any) -> tuple[Tensor, Tensor]:
    """All keys [S, L+R] on consecutive pages, all q [n, H, L+R] of one request."""
    pages = -(-len(keys) // page)
    cache = torch.full((pages, page, keys.shape[1]), 77.0, dtype=keys.dtype)
    cache.view(-1, keys.shape[1])[: len(keys)] = keys
    return decode(
        q,
        cache,
        torch.arange(pages, dtype=torch.int32)[None],
        torch.tensor([len(keys)], dtype=torch.int32),
        torch.tensor([0, len(q)], dtype=torch.int32),
        kv_lora_rank=keys.shape[1] - rope_dim,
        **{"scale": 1.0, **more},
    )


def test_lse_is_a_natural_logarithm() -> None:
    """Pitfall 15: one key with logit 1 gives lse 1.0; in base 2 it would be 1.4427."""
    out, lse = one_request(torch.tensor([[2.0, 3.0, 1.0]]), 1, q=torch.tensor([[[0.0, 0.0, 1.0]]]))
    assert lse.item() == 1.0
    assert out.flatten().tolist() == [2.0, 3.0]


def test_the_scale_is_an_argument_and_not_the_absorbed_width() -> None:
    """Pitfall 1: at GLM-5's width of 576 the score of a key of ones is 0.0625 · 576, not 576^-0.5 · 576."""
    _, lse = one_request(torch.ones(1, 576), 64, q=torch.ones(1, 1, 576), scale=0.0625)
    assert lse.item() == 36.0


def test_the_rope_dims_score_but_are_not_values() -> None:
    """Pitfall 3: latent first, rope last; out has the latent's width."""
    keys = torch.tensor([[1.0, 0.0, 0.0], [5.0, 0.0, 200.0]])
    out, _ = one_request(keys, 1, q=torch.tensor([[[0.0, 0.0, 1.0]]]))
    assert out.flatten().tolist() == [5.0, 0.0]


def test_every_new_token_has_its_own_limit() -> None:
    """With a query of zeros the output is the mean of the keys that a token sees: 3 new tokens of 5 keys."""
    keys = torch.tensor([1.0, 2, 4, 8, 16]).view(5, 1)
    out, lse = one_request(torch.cat([keys, torch.zeros(5, 1)], 1), 1, q=torch.zeros(3, 1, 2))
    assert out.flatten().tolist() == pytest.approx([7 / 3, 15 / 4, 31 / 5])
    assert lse.flatten().tolist() == pytest.approx([math.log(3), math.log(4), math.log(5)])


def test_more_new_tokens_than_keys_leave_the_first_ones_empty() -> None:
    q = torch.zeros(3, 2, 2)
    q[:2] = torch.nan
    out, lse = one_request(torch.tensor([[7.0, 0.0]]), 1, q=q)
    assert out[..., 0].tolist() == [[0.0, 0.0], [0.0, 0.0], [7.0, 7.0]]
    assert lse.tolist() == [[-math.inf] * 2, [-math.inf] * 2, [0.0] * 2]


def test_over_all_visible_keys_sparse_mla_says_the_same() -> None:
    for sample in SMOKE:
        args = args_of(sample, "float32")
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
        if wide["kv_cache"].dtype == torch.uint8:
            continue
        longest = int(wide["seq_lens"].max())
        indices = torch.full((len(wide["q"]), longest + 1), -1, dtype=torch.int32)
        starts = wide["cu_seqlens_q"].tolist()
        for r, length in enumerate(wide["seq_lens"].tolist()):
            for t in range(starts[r], starts[r + 1]):
                seen = max(length - starts[r + 1] + t + 1, 0)
                indices[t, :seen] = torch.randperm(seen, generator=torch.Generator().manual_seed(t)).int()
        dense, sparse = decode(**wide), reference_of("sparse_mla")(indices=indices, **wide)
        for a, b in zip(dense, sparse, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, equal_nan=True)


def test_keys_split_in_two_and_merged_by_lse_are_one_pass() -> None:
    keys = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.randn(1, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, lse = one_request(keys, 2, q=q)
    (a, lse_a), (b, lse_b) = (one_request(part, 2, q=q) for part in (keys[:4], keys[4:]))
    merged = torch.logaddexp(lse_a, lse_b)
    weights = [torch.exp(part - merged)[..., None] for part in (lse_a, lse_b)]
    torch.testing.assert_close(lse, merged, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(whole, weights[0] * a + weights[1] * b, rtol=1e-13, atol=1e-13)


def test_where_the_pages_lie_does_not_matter() -> None:
    args = args_of(SMOKE[0])
    order = torch.randperm(args["kv_cache"].shape[0], generator=torch.Generator().manual_seed(0))
    moved = {**args, "kv_cache": args["kv_cache"][order], "block_table": order.argsort()[args["block_table"]].int()}
    for a, b in zip(decode(**args), decode(**moved), strict=True):
        assert torch.equal(a, b)


def test_formats_that_hold_the_same_numbers_give_the_same_bits() -> None:
    by_format = {s.axes["format"]: s for s in SMOKE if s.id.startswith("decode-")}
    for one, other in (("latent_576", "latent_512_rope_64"), ("fp8_656", "fp8_656_ascend")):
        runs = []
        for name in (one, other):
            inputs = SPEC.inputs(by_format[name], "bfloat16", Draw(0, "same"))
            runs.append(decode(**inputs.args))
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)


def test_what_lies_outside_the_requests_is_not_read() -> None:
    for sample in SMOKE:
        made = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id))
        args = dict(made.args)
        for name, mask in made.poison.items():
            byte = args[name].dtype == torch.uint8
            args[name] = args[name].masked_fill(mask, 0xFF if byte else 2**30 if name == "block_table" else torch.nan)
        for a, b in zip(decode(**made.args), decode(**args), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=sample.id)


def test_scores_far_apart_do_not_overflow() -> None:
    keys = torch.tensor([[3.0, 100.0], [5.0, -100.0]])
    out, lse = one_request(keys, 1, q=torch.tensor([[[0.0, 100.0]]]))
    assert (out.item(), lse.item()) == (3.0, 10000.0)


@pytest.mark.parametrize("bad", [b for b in SPEC.errors if b.code == "VALUE"], ids=lambda b: b.id)
def test_values_out_of_range_are_refused(bad: Any) -> None:
    with pytest.raises(HalError) as refusal:
        SPEC.check_values(bad.spoil(args_of(SMOKE[0])))
    assert refusal.value.code == "VALUE"
    assert refusal.value.fix


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_good_samples_pass_the_value_checks(sample: Sample) -> None:
    SPEC.check_values(args_of(sample))
