"""sparse_mla against one exponential at a time, and its relations to dense attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._common.references import reference_of
from glm5_hal.ops._sparse_mla import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
PLAIN = [s for s in SMOKE if s.axes["format"] == "latent_576" and s.id != "many_heads"]
sparse = reference_of("sparse_mla")


def args_of(sample: Sample, dtype: str = "float32") -> dict[str, Any]:
    return dict(SPEC.inputs(sample, dtype, Draw(0, sample.id)).args)


def sample(name: str) -> Sample:
    return next(s for s in SMOKE if s.id == name)


@pytest.mark.parametrize("sample", PLAIN, ids=lambda s: s.id)
def test_it_is_the_weighted_mean_that_it_says(sample: Sample) -> None:
    args = args_of(sample)
    truth = oracle.truth(SPEC, args).outs
    L, page, starts = args["kv_lora_rank"], args["kv_cache"].shape[1], args["cu_seqlens_q"].tolist()
    for r in range(len(args["seq_lens"])):
        for t in range(starts[r], starts[r + 1]):
            named = [j for j in args["indices"][t].tolist() if j != -1]
            rows = [args["kv_cache"][args["block_table"][r, j // page], j % page].tolist() for j in named]
            for h, q in enumerate(args["q"][t].tolist()):
                scores = [args["scale"] * math.fsum(a * b for a, b in zip(q, k, strict=True)) for k in rows]
                total = math.fsum(math.exp(s) for s in scores)
                lse = math.log(total) if scores else -math.inf
                assert truth["lse"][t, h].item() == pytest.approx(lse, rel=1e-12, abs=1e-12, nan_ok=True)
                for d in (0, 1, L - 1):
                    mean = math.fsum(math.exp(s) * k[d] for s, k in zip(scores, rows, strict=True)) / (total or 1.0)
                    assert truth["out"][t, h, d].item() == pytest.approx(mean, rel=1e-11, abs=1e-11, nan_ok=True)


def test_the_samples_reach_every_latent_format() -> None:
    assert {s.axes["format"] for s in SMOKE} == {"latent_576", "latent_512_rope_64", "fp8_656", "fp8_656_ascend"}


def test_minus_one_may_stand_anywhere_and_order_does_not_matter() -> None:
    args = args_of(sample("interleaved_invalid"))
    with oracle.exact():
        first = sparse(**args)
        order = torch.randperm(args["indices"].shape[1])
        second = sparse(**{**args, "indices": args["indices"][:, order]})
    torch.testing.assert_close(first, second, rtol=1e-13, atol=1e-13)


def test_a_token_without_an_index_gets_zero_and_minus_infinity() -> None:
    args = args_of(sample("decode-latent_576"))
    out, lse = sparse(**{**args, "indices": torch.full_like(args["indices"], -1)})
    assert not out.any()
    assert (lse == -math.inf).all()


def test_one_key_is_returned_as_it_is_and_its_score_is_the_natural_lse() -> None:
    args = args_of(sample("decode-latent_576"))
    only = torch.full_like(args["indices"], -1)
    only[:, 3] = 0
    with oracle.exact():
        out, lse = sparse(**{**args, "indices": only})
    first = args["kv_cache"][args["block_table"][0, 0], 0].double()
    torch.testing.assert_close(out[0], first[: args["kv_lora_rank"]].expand_as(out[0]))
    torch.testing.assert_close(lse[0], args["scale"] * args["q"][0].double() @ first)


def test_keys_that_are_not_named_do_not_matter() -> None:
    args = args_of(sample("decode-latent_576"))
    starts, page = args["cu_seqlens_q"].tolist(), args["kv_cache"].shape[1]
    used = {
        int(args["block_table"][r, j // page]) * page + j % page
        for r in range(len(starts) - 1)
        for j in args["indices"][starts[r] : starts[r + 1]].flatten().tolist()
        if j >= 0
    }
    poisoned = args["kv_cache"].clone().view(-1, args["kv_cache"].shape[-1])
    poisoned[[slot for slot in range(len(poisoned)) if slot not in used]] = math.nan
    again = sparse(**{**args, "kv_cache": poisoned.view_as(args["kv_cache"])})
    assert all(torch.equal(a, b) for a, b in zip(sparse(**args), again, strict=True))


def test_an_index_outside_the_request_is_refused() -> None:
    args = args_of(sample("decode-latent_576"))
    assert SPEC.check_values is not None
    for wrong in (int(args["seq_lens"][0]), -2):
        indices = args["indices"].clone()
        indices[0, 0] = wrong
        with pytest.raises(HalError) as refused:
            SPEC.check_values({**args, "indices": indices})
        assert (refused.value.code, refused.value.value) == ("VALUE", wrong)
    SPEC.check_values(args)
