"""mla_prolog against the layer's maths written from scratch in numpy, and the absorbed form against full heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm5_hal import rope
from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._common.references import REFERENCES, reference_of
from glm5_hal.ops._mla_prolog import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
prolog = reference_of("mla_prolog")


# --- the second oracle -----------------------------------------------------------------------------------------------


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str) -> np.ndarray:
    """Pairs as complex numbers times cos + i sin, x [T, ..., R]."""
    half = x.shape[-1] // 2
    first, second = (x[..., ::2], x[..., 1::2]) if layout == "interleaved" else (x[..., :half], x[..., half:])
    turn = (cos + 1j * sin).reshape(len(x), *[1] * (x.ndim - 2), half)
    z = (first + 1j * second) * turn
    y = np.empty(x.shape)
    if layout == "interleaved":
        y[..., ::2], y[..., 1::2] = z.real, z.imag
    else:
        y[..., :half], y[..., half:] = z.real, z.imag
    return y


def by_hand(args: dict[str, Any]) -> dict[str, np.ndarray]:
    """c, k_pe, q_c and the absorbed queries, float64."""
    a = {k: v.double().numpy() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    (H, K, L), T, R = a["w_uk"].shape, len(a["x"]), 2 * a["cos"].shape[1]
    q_c = rms_norm(a["x"] @ a["w_q_a"].T, a["q_a_norm"], a["eps"])
    q = (q_c @ a["w_q_b"].T).reshape(T, H, K + R)
    absorbed = np.stack([q[:, h, :K] @ a["w_uk"][h] for h in range(H)], 1)
    kv = a["x"] @ a["w_kv_a"].T
    return {
        "q": np.concatenate([absorbed, rotate(q[..., K:], a["cos"], a["sin"], a["layout"])], -1),
        "q_c": q_c,
        "kv_c": rms_norm(kv[:, :L], a["kv_a_norm"], a["eps"]),
        "k_pe": rotate(kv[:, L:], a["cos"], a["sin"], a["layout"]),
    }


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_layers_maths(sample: Sample) -> None:
    args = dict(SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args)
    truth, expected = oracle.truth(SPEC, args), by_hand(args)
    for name in ("q", "q_c"):
        np.testing.assert_allclose(truth.outs[name].numpy(), expected[name], rtol=1e-11, atol=1e-12)
    held = {n: t.double() if t.is_floating_point() else t.clone() for n, t in caches_of(args).items()}
    reference_of("mla_cache_write")(
        torch.from_numpy(expected["kv_c"]),
        torch.from_numpy(expected["k_pe"]),
        held["kv_cache"],
        args["slot_mapping"],
        held.get("rope_cache"),
        cache_format=args["cache_format"],
    )
    for name, tensor in held.items():
        torch.testing.assert_close(truth.mutated[name], tensor, rtol=1e-11, atol=1e-12)


def caches_of(args: dict[str, Any]) -> dict[str, Tensor]:
    return {n: args[n] for n in ("kv_cache", "rope_cache") if args[n] is not None}


# --- a layer of GLM-5 and one of DeepSeek-V3.2, with fewer heads and a smaller hidden size ---------------------------

MODELS = {
    "glm5": {"K": 192, "Dv": 256, "scale": 0.0625, "eps": 1e-5, "theta": 1e6},
    "dsv32": {"K": 128, "Dv": 128, "scale": 0.135234, "eps": 1e-6, "theta": 1e4},
}


def layer(model: str, tokens: int, **change: Any) -> dict[str, Any]:
    """float64 arguments at positions up to 200,000, slots of a cache that just holds them, shuffled."""
    axes = MODELS[model] | change
    E, Q, H, L, R, K = 96, 64, 3, 512, 64, axes["K"]
    made = torch.Generator().manual_seed(7)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64) * fan_in**-0.5

    positions = torch.randint(0, 200_000, (tokens,), generator=made)
    cos, sin = rope.rope_tables(positions, R, axes["theta"])
    pages = -(-tokens // 16)
    return {
        "x": normal(tokens, E),
        "w_q_a": normal(Q, E, fan_in=E),
        "q_a_norm": 1 + 0.3 * normal(Q),
        "w_q_b": normal(H * (K + R), Q, fan_in=Q),
        "w_kv_a": normal(L + R, E, fan_in=E),
        "kv_a_norm": 1 + 0.3 * normal(L),
        "w_uk": normal(H, K, L, fan_in=L),
        "cos": cos,
        "sin": sin,
        "kv_cache": torch.full((pages, 16, L + R), torch.nan, dtype=torch.float64),
        "slot_mapping": torch.randperm(pages * 16, generator=made)[:tokens],
        "eps": axes["eps"],
        "layout": "interleaved",
    }


def rows_of(args: dict[str, Any]) -> Tensor:
    """What was stored for each token, [T, L+R]."""
    slots = args["slot_mapping"]
    return args["kv_cache"][slots // 16, slots % 16]


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_of_the_models_own_head_sizes(model: str) -> None:
    args = layer(model, 70)
    q, q_c = prolog(**args)
    expected = by_hand(args)
    np.testing.assert_allclose(q.numpy(), expected["q"], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(q_c.numpy(), expected["q_c"], rtol=1e-11, atol=1e-12)
    stored = np.concatenate([expected["kv_c"], expected["k_pe"]], -1)
    np.testing.assert_allclose(rows_of(args).numpy(), stored, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_the_absorbed_form_is_attention_with_full_heads(model: str) -> None:
    """mla_prolog and mla_decode, times W_UV, against mla_prefill over k and v expanded from numpy's latents."""
    axes, lens = MODELS[model], (37, 16, 17)
    args = layer(model, sum(lens))
    H, K, L = args["w_uk"].shape
    w_uv = torch.randn(H, axes["Dv"], L, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / L**0.5
    # Each request's tokens in order on pages of one slot: any slot_mapping is then a block table.
    cu = torch.tensor([0, *lens]).cumsum(0).int()
    table = torch.zeros(len(lens), max(lens), dtype=torch.int32)
    for r, n in enumerate(lens):
        table[r, :n] = args["slot_mapping"][cu[r] : cu[r + 1]].int()
    q, _ = prolog(**args)
    z, lse = reference_of("mla_decode")(
        q,
        args["kv_cache"].view(-1, 1, args["kv_cache"].shape[-1]),
        table,
        torch.tensor(lens, dtype=torch.int32),
        cu,
        scale=axes["scale"],
        kv_lora_rank=L,
    )
    out = torch.einsum("thl,hvl->thv", z, w_uv)

    expected = {k: torch.from_numpy(v) for k, v in by_hand(args).items()}
    plain = expected["q_c"] @ args["w_q_b"].T
    plain = plain.view(len(q), H, -1)
    q_full = torch.cat([plain[..., :K], expected["q"][..., L:]], -1)
    k_nope = torch.einsum("sl,hkl->shk", expected["kv_c"], args["w_uk"])
    k_full = torch.cat([k_nope, expected["k_pe"][:, None].expand(-1, H, -1)], -1)
    v = torch.einsum("sl,hvl->shv", expected["kv_c"], w_uv)
    full, full_lse = reference_of("mla_prefill")(q_full, k_full, v, cu, cu, scale=axes["scale"])
    torch.testing.assert_close(out, full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, full_lse, rtol=1e-12, atol=1e-12)


# --- conventions -----------------------------------------------------------------------------------------------------


def test_the_heads_are_nope_then_rope() -> None:
    """Pitfall 3: without the last 64 rows of each head of w_q_b only the absorbed part is left, and the other way."""
    args = layer("glm5", 5)
    whole, _ = prolog(**args)
    rows = args["w_q_b"].view(3, 256, -1)
    no_rope, no_nope = rows.clone(), rows.clone()
    no_rope[:, 192:], no_nope[:, :192] = 0, 0
    a, _ = prolog(**{**args, "w_q_b": no_rope.view(3 * 256, -1)})
    b, _ = prolog(**{**args, "w_q_b": no_nope.view(3 * 256, -1)})
    torch.testing.assert_close(a, torch.cat([whole[..., :512], torch.zeros(5, 3, 64)], -1))
    torch.testing.assert_close(b, torch.cat([torch.zeros(5, 3, 512), whole[..., 512:]], -1))


def test_the_rope_key_is_not_normed() -> None:
    """Twice the hidden state: the latent stays (at eps 0), the rope key doubles; queries stay, being normed."""
    args = layer("glm5", 6, eps=0.0)
    q, q_c = prolog(**args)
    once = rows_of(args).clone()
    q2, q_c2 = prolog(**{**args, "x": 2 * args["x"]})
    torch.testing.assert_close(rows_of(args), once * torch.tensor([1.0] * 512 + [2.0] * 64))
    torch.testing.assert_close(q2, q)
    torch.testing.assert_close(q_c2, q_c)


def test_the_latents_eps_is_the_given_one() -> None:
    """Pitfall 6: with latents of size sqrt(eps) the two values in use differ by 40 %."""
    args = layer("glm5", 6)
    args["x"] = args["x"] * 1e-5**0.5
    for eps in (1e-5, 1e-6):
        _, q_c = prolog(**{**args, "eps": eps})
        latent = args["x"] @ args["w_q_a"].T
        size = torch.sqrt(latent.square().mean(-1, keepdim=True) + eps)
        torch.testing.assert_close(q_c, latent / size * args["q_a_norm"])


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_relative_positions_are_what_counts(layout: str) -> None:
    """Rope's purpose, at large positions: the rope score of two tokens depends on the distance of their positions."""
    args = layer("glm5", 2)
    args["x"][1] = args["x"][0]
    scores = []
    for start in (0, 150_000):
        cos, sin = rope.rope_tables(torch.tensor([start, start + 77]), 64, 1e6)
        q, _ = prolog(**{**args, "cos": cos.double(), "sin": sin.double(), "layout": layout})
        scores.append(q[1, 0, 512:] @ rows_of(args)[0, 512:])
    assert scores[0].item() == pytest.approx(scores[1].item(), rel=1e-6)  # the tables themselves are fp32


def test_the_two_layouts_are_a_permutation_of_each_other_in_scores_only() -> None:
    """Pitfalls 2 and 4: deinterleaving the rope rows of both projections and "half" keep scores; the cache differs."""
    args = layer("glm5", 5)
    q, _ = prolog(**args)
    rows = rows_of(args).clone()
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    w_q_b, w_kv_a = args["w_q_b"].view(3, 256, -1).clone(), args["w_kv_a"].clone()
    w_q_b[:, 192:], w_kv_a[512:] = w_q_b[:, 192 + order], w_kv_a[512 + order]
    q_half, _ = prolog(**{**args, "w_q_b": w_q_b.view(3 * 256, -1), "w_kv_a": w_kv_a, "layout": "half"})
    rows_half = rows_of(args)
    torch.testing.assert_close(torch.einsum("thw,sw->ths", q_half, rows_half), torch.einsum("thw,sw->ths", q, rows))
    torch.testing.assert_close(rows_half[:, 512:], rows[:, 512 + order])
    assert not torch.allclose(rows_half, rows)


def test_a_token_without_a_slot_still_gets_its_query() -> None:
    args = layer("glm5", 4)
    q, q_c = prolog(**args)
    rows = rows_of(args).clone()
    skipped = {**args, "kv_cache": torch.full_like(args["kv_cache"], 5.0), "slot_mapping": args["slot_mapping"].clone()}
    skipped["slot_mapping"][[0, 2]] = -1
    for a, b in zip(prolog(**skipped), (q, q_c), strict=True):
        assert torch.equal(a, b)
    stored = skipped["kv_cache"].view(-1, 576)
    assert torch.equal(stored[args["slot_mapping"][[1, 3]]], rows[[1, 3]])
    stored[args["slot_mapping"][[1, 3]]] = 5.0
    assert (stored == 5.0).all()


def test_it_is_made_of_other_ops() -> None:
    called = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(REFERENCES, name)

    SPEC.reference(Recorder(), **layer("glm5", 3))
    assert sorted(called) == ["mla_cache_write", "rms_norm", "rms_norm", "rope", "rope"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_plain_run_rounds_each_stage_once(dtype: str) -> None:
    """Four roundings in a row stand between x and q: the error stays within a few units, and is there."""
    args = dict(SPEC.inputs(SMOKE[0], dtype, Draw(0, "x")).args)
    truth = oracle.truth(SPEC, args).outs
    q, q_c = prolog(**oracle.copied(SPEC, args))
    unit = torch.finfo(getattr(torch, dtype)).eps
    for got, name in ((q, "q"), (q_c, "q_c")):
        error = ((got.double() - truth[name]).norm() / truth[name].norm()).item()
        assert unit / 8 < error < 2 * unit
        assert math.isfinite(error)
