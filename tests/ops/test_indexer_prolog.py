"""indexer_prolog against the layer's maths written from scratch in numpy, up to which keys would be selected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm5_hal import rope
from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._common.references import REFERENCES, reference_of
from glm5_hal.ops._indexer_prolog import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
prolog = reference_of("indexer_prolog")


# --- the second oracle -----------------------------------------------------------------------------------------------


def rotate_first(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str) -> np.ndarray:
    """The first R dims of [T, ..., D], pair by pair; the rest passes."""
    y, half = x.copy(), cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + half)
        c, s = (t[:, i].reshape(-1, *[1] * (x.ndim - 2)) for t in (cos, sin))
        y[..., a] = x[..., a] * c - x[..., b] * s
        y[..., b] = x[..., b] * c + x[..., a] * s
    return y


def hadamard_matrix(n: int) -> np.ndarray:
    """±1 by the parity of the common bits of row and column."""
    bits = np.arange(n)[:, None] & np.arange(n)
    return np.where(np.vectorize(lambda v: bin(v).count("1") % 2)(bits), -1.0, 1.0)


def by_hand(args: dict[str, Any]) -> dict[str, np.ndarray]:
    a = {k: v.double().numpy() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    T, H, D = len(a["x"]), a["num_heads"], len(a["w_k"])
    q = (a["q_c"] @ a["w_q_b"].T).reshape(T, H, D)
    k = a["x"] @ a["w_k"].T
    mean = k.sum(-1, keepdims=True) / D
    variance = ((k - mean) ** 2).sum(-1, keepdims=True) / D
    k = (k - mean) / np.sqrt(variance + a["eps"]) * a["k_norm_weight"] + a["k_norm_bias"]
    q, k = (rotate_first(v, a["cos"], a["sin"], a["layout"]) for v in (q, k))
    if a.get("hadamard"):
        q, k = (v @ hadamard_matrix(D) / np.sqrt(D) for v in (q, k))
    return {"q": q, "k": k, "weights": a["x"] @ a["w_weights"].T * a["weights_scale"]}


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_layers_maths(sample: Sample) -> None:
    args = dict(SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args)
    truth, expected = oracle.truth(SPEC, args), by_hand(args)
    for name in ("q", "weights"):
        np.testing.assert_allclose(truth.outs[name].numpy(), expected[name], rtol=1e-11, atol=1e-12)
    held = args["index_cache"].double() if args["index_cache"].is_floating_point() else args["index_cache"].clone()
    k = torch.from_numpy(expected["k"])
    reference_of("index_cache_write")(k, held, args["slot_mapping"], cache_format=args["cache_format"])
    torch.testing.assert_close(truth.mutated["index_cache"], held, rtol=1e-11, atol=1e-12)


# --- an indexer of GLM-5 and one of DeepSeek-V3.2, with a smaller hidden size ----------------------------------------

MODELS = {
    "glm5": {"num_heads": 32, "layout": "interleaved", "hadamard": False, "theta": 1e6},
    "dsv32": {"num_heads": 64, "layout": "half", "hadamard": True, "theta": 1e4},
}


def layer(model: str, tokens: int, start: int = 150_000) -> dict[str, Any]:
    """float64 arguments for consecutive positions from ``start`` on, on the pages of one request."""
    axes = MODELS[model]
    E, Q, D, R, H = 64, 48, 128, 64, axes["num_heads"]
    made = torch.Generator().manual_seed(11)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64) * fan_in**-0.5

    cos, sin = rope.rope_tables(torch.arange(start, start + tokens), R, axes["theta"])
    pages = -(-tokens // 64)
    return {
        "x": normal(tokens, E),
        "q_c": normal(tokens, Q),
        "w_q_b": normal(H * D, Q, fan_in=Q),
        "w_k": normal(D, E, fan_in=E),
        "k_norm_weight": 1 + 0.3 * normal(D),
        "k_norm_bias": 0.3 * normal(D),
        "w_weights": normal(H, E, fan_in=E),
        "cos": cos,
        "sin": sin,
        "index_cache": torch.zeros(pages, 64, D, dtype=torch.float64),
        "slot_mapping": torch.arange(tokens),
        "num_heads": H,
        "weights_scale": H**-0.5 * D**-0.5,
        "layout": axes["layout"],
        "hadamard": axes["hadamard"],
        "eps": 1e-6,
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_keys_that_would_be_selected_are_the_right_ones(model: str) -> None:
    """Pitfalls 2 and 12, with more than 2048 keys at positions beyond 150,000: the last tokens' scores, written out as
    Σ_h w_h heads^-0.5 · relu(q·k · 128^-0.5), pick the same 2048 keys; the other rope layout picks others."""
    args, tokens, last, top_k = layer(model, 2112), 2112, 3, 2048
    newest = {n: args[n][-last:] for n in ("x", "q_c", "cos", "sin", "slot_mapping")}
    keys_only = {"w_q_b": args["w_q_b"][:128], "w_weights": args["w_weights"][:1], "num_heads": 1}
    raw = newest["x"].numpy() @ args["w_weights"].numpy().T * args["num_heads"] ** -0.5
    q, k = by_hand({**args, **newest})["q"], by_hand({**args, **keys_only})["k"]
    scores = np.stack([w @ np.maximum(q_h @ k.T * 128**-0.5, 0) for w, q_h in zip(raw, q, strict=True)])
    scores[np.arange(tokens) > np.arange(tokens - last, tokens)[:, None]] = -np.inf
    best = [set(np.argsort(-row, kind="stable")[:top_k].tolist()) for row in scores]

    def selected(**change: Any) -> list[set[int]]:
        prolog(**{**args, **change, **keys_only})  # every key, and queries of the last tokens only
        q, weights = prolog(**{**args, **change, **newest})
        chosen = reference_of("lightning_indexer")(
            q,
            weights,
            args["index_cache"],
            torch.arange(len(args["index_cache"]), dtype=torch.int32)[None],
            torch.tensor([tokens], dtype=torch.int32),
            torch.tensor([0, last], dtype=torch.int32),
            top_k=top_k,
        )
        return [set(row.tolist()) for row in chosen]

    assert selected() == best
    other = "half" if args["layout"] == "interleaved" else "interleaved"
    assert all(len(a ^ b) > 4 for a, b in zip(selected(layout=other), best, strict=True))


# --- conventions -----------------------------------------------------------------------------------------------------


def keys_of(args: dict[str, Any]) -> Tensor:
    return args["index_cache"].view(-1, args["index_cache"].shape[-1])[args["slot_mapping"]]


def test_rope_turns_the_first_dims_and_leaves_the_others() -> None:
    """Pitfall 3: the other way round than in the main attention."""
    args = layer("glm5", 5)
    still = {**args, "cos": torch.ones_like(args["cos"]), "sin": torch.zeros_like(args["sin"])}
    q, _ = prolog(**args)
    k = keys_of(args).clone()
    q_still, _ = prolog(**still)
    k_still = keys_of(args)
    for turned, plain in ((q, q_still), (k, k_still)):
        assert torch.equal(turned[..., 64:], plain[..., 64:])
        assert not torch.isclose(turned[..., :64], plain[..., :64]).any(-1).all()


def test_the_key_norm_is_a_layer_norm_with_bias_and_eps_1e_6() -> None:
    """Pitfall 5: a constant added to every dim of the projected key changes nothing; torch's layer_norm agrees."""
    args = layer("glm5", 6)
    args["w_k"] = args["w_k"] + 3.0 * args["x"].pinverse()[:, 0]  # token 0's projected key gets 3 more in every dim
    args["x"] = args["x"] * 1e-3  # eps counts
    still = {**args, "cos": torch.ones_like(args["cos"]), "sin": torch.zeros_like(args["sin"])}
    prolog(**still)
    expected = torch.nn.functional.layer_norm(
        args["x"] @ args["w_k"].T, (128,), args["k_norm_weight"], args["k_norm_bias"], 1e-6
    )
    torch.testing.assert_close(keys_of(args), expected)
    assert reference_default("eps") == 1e-6


def reference_default(name: str) -> Any:
    return SPEC.signature.parameters[name].default


def test_queries_come_from_the_query_latent_and_keys_and_weights_from_x() -> None:
    """Pitfall 5."""
    args = layer("glm5", 4)
    q, weights = prolog(**args)
    k = keys_of(args).clone()
    q_x, weights_x = prolog(**{**args, "x": args["x"].flip(0)})
    assert torch.equal(q, q_x)
    assert not torch.isclose(weights, weights_x).any()
    assert not torch.isclose(k, keys_of(args)).all(-1).any()
    q_c, weights_c = prolog(**{**args, "q_c": 2 * args["q_c"]})
    torch.testing.assert_close(q_c, 2 * q)
    assert torch.equal(weights_c, weights)


def test_hadamard_leaves_the_scores_as_they_are() -> None:
    args = layer("glm5", 7)
    runs = []
    for hadamard in (False, True):
        q, _ = prolog(**{**args, "hadamard": hadamard})
        runs.append((q, keys_of(args).clone()))
    (q, k), (q_h, k_h) = runs
    assert not torch.isclose(k, k_h).all(-1).any()
    torch.testing.assert_close(
        torch.einsum("thd,sd->ths", q_h, k_h), torch.einsum("thd,sd->ths", q, k), rtol=1e-12, atol=1e-12
    )


def test_weights_are_scaled_once_signed_and_never_rounded_to_the_activations_dtype() -> None:
    """Pitfalls 10 and 12."""
    args = dict(SPEC.inputs(SMOKE[0], "bfloat16", Draw(0, "x")).args)
    _, weights = prolog(**oracle.copied(SPEC, args))
    expected = (args["x"].double() @ args["w_weights"].double().T) * (5 * 128) ** -0.5
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights, weights.bfloat16().float())
    assert (weights < 0).any()


def test_float32_head_weights_are_used_as_they_are() -> None:
    sample = next(s for s in SMOKE if s.id == "float32_weights")
    args = dict(SPEC.inputs(sample, "bfloat16", Draw(0, "x")).args)
    assert args["w_weights"].dtype == torch.float32
    _, weights = prolog(**oracle.copied(SPEC, args))
    _, rounded = prolog(**oracle.copied(SPEC, {**args, "w_weights": args["w_weights"].bfloat16().float()}))
    assert not torch.equal(weights, rounded)


def test_keys_are_written_for_every_token_with_a_slot_and_no_other() -> None:
    """Pitfall 8: also where scoring would be skipped (fewer than 2048 keys), and for drafted tokens."""
    args = layer("glm5", 4)
    prolog(**args)
    k = keys_of(args).clone()
    args["index_cache"].fill_(5.0)
    prolog(**{**args, "slot_mapping": torch.tensor([63, -1, 0, -1])})
    assert torch.equal(args["index_cache"][0, [63, 0]], k[[0, 2]])
    assert (args["index_cache"][0, 1:63] == 5.0).all()


def test_it_is_made_of_other_ops() -> None:
    for hadamard, expected in ((False, []), (True, ["hadamard", "hadamard"])):
        called = []

        class Recorder:
            def __getattr__(self, name: str, called: list[str] = called) -> Any:
                called.append(name)
                return getattr(REFERENCES, name)

        SPEC.reference(Recorder(), **{**layer("glm5", 3), "hadamard": hadamard})
        assert sorted(called) == [*expected, "index_cache_write", "rope", "rope"]
