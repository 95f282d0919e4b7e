"""apply puts the operators in, remove takes them out, and what they cannot do is said and not done otherwise."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from small import GLM, KINDS, SIZES, VOCAB, YARN, model, tokens
from torch import nn
from toys import installed, stand_in
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import glm5_hal
from glm5_hal import observe
from glm5_hal.backends import cpu
from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import PagedCache, apply, experts, remove

COLUMNS = 24


def refused(call: Any, *args: Any, **kwargs: Any) -> HalError:
    with pytest.raises(HalError) as found:
        call(*args, **kwargs)
    assert found.value.fix
    return found.value


@torch.no_grad()
def run(model: Any, **kwargs: Any) -> Any:
    return model(tokens(2, COLUMNS), **kwargs)


# What apply does and remove undoes


@pytest.mark.parametrize("kind", KINDS)
def test_after_remove_the_model_is_what_it_was_bit_for_bit(kind: str) -> None:
    small, ids = model(kind), tokens(2, COLUMNS)
    modules, state = {n: dict(m.__dict__) for n, m in small.named_modules()}, copy.deepcopy(small.state_dict())
    expected, text = run(small).logits, small.generate(ids, max_new_tokens=8, do_sample=False)
    assert not torch.equal(run(apply(small)).logits, expected)
    small.generate(ids, max_new_tokens=8, do_sample=False)
    assert remove(small) is small
    assert torch.equal(run(small).logits, expected)
    assert torch.equal(small.generate(ids, max_new_tokens=8, do_sample=False), text)
    assert {n: set(m.__dict__) for n, m in small.named_modules()} == {n: set(d) for n, d in modules.items()}
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_parameters_and_state_are_untouched_while_applied() -> None:
    small = model("glm")
    before = [(n, p.data_ptr()) for n, p in small.named_parameters()]
    apply(small)
    assert [(n, p.data_ptr()) for n, p in small.named_parameters()] == before
    assert small.state_dict().keys() == model("glm").state_dict().keys()


def test_apply_twice_is_apply_once_and_remove_of_a_plain_model_does_nothing() -> None:
    small = model("glm")
    expected = run(apply(small)).logits
    assert torch.equal(run(apply(small)).logits, expected)
    plain = model("glm")
    assert torch.equal(run(remove(plain)).logits, run(model("glm")).logits)


def test_the_bare_decoder_may_be_given() -> None:
    small = model("glm")
    expected = run(apply(small)).logits
    remove(small)
    apply(small.model)
    assert torch.equal(run(small).logits, expected)


def test_a_copied_model_runs_on_its_own_weights() -> None:
    small = apply(model("glm"))
    other = apply(copy.deepcopy(small))
    expected = run(small).logits
    with torch.no_grad():
        small.model.layers[0].self_attn.o_proj.weight.zero_()
    assert torch.equal(run(other).logits, expected)


def test_every_operator_of_the_model_is_called_and_nothing_of_transformers_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = apply(model("shared"))
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    observe.clear_counts()
    observe.watch(counters=True)
    try:
        small.generate(tokens(2, 8), max_new_tokens=16, do_sample=False)
        ran = {name.split("[")[0] for name in glm5_hal.counts()}
    finally:
        observe.watch()
        observe.clear_counts()
    assert ran >= {
        "add_rms_norm", "index_cache_write", "indexer_prolog", "lightning_indexer", "mla_cache_write", "mla_decode",
        "mla_prefill", "mla_prolog", "moe_experts", "moe_route", "rms_norm", "rope", "silu_and_mul", "sparse_mla",
    }  # fmt: skip


# Backends


def test_the_policy_in_force_serves_the_model() -> None:
    small = apply(model("shared"))
    expected = run(small).logits
    with glm5_hal.use("cpu:reference"):
        found = run(small).logits
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_layers_may_have_a_policy_of_their_own() -> None:
    small = apply(model("glm"), policies={1: "cpu:reference", 3: "cpu; sparse_mla=cpu:reference"})
    observe.clear_counts()
    observe.watch(counters=True)
    try:
        found = run(small).logits
        counts = {name: row["calls"] for name, row in glm5_hal.counts().items()}
    finally:
        observe.watch()
        observe.clear_counts()
    assert counts["sparse_mla[cpu:torch]"] == counts["sparse_mla[cpu:reference]"] == 2
    assert counts["lightning_indexer[cpu:torch]"] == 3
    torch.testing.assert_close(found, run(apply(small)).logits, atol=1e-4, rtol=0)


def test_a_policy_must_be_well_formed_and_for_a_layer_that_exists() -> None:
    assert refused(apply, model("glm"), policies={9: "cpu"}).code == "POLICY"
    assert refused(apply, model("glm"), policies={0: "gpu5"}).code == "UNKNOWN"


@pytest.mark.parametrize("latent", ["latent_576", "latent_512_rope_64"])
def test_caches_are_in_the_named_formats(latent: str) -> None:
    small = model("glm")
    expected = run(apply(small)).logits
    apply(small, latent_format=latent, page_size=8)
    cache = PagedCache(small)
    assert torch.equal(run(small, past_key_values=cache).logits, expected)
    assert [len(tensors) for tensors in cache.latent] == [1 + ("rope" in latent)] * 4
    assert cache.latent[0][0].shape[1] == 8


def test_a_quantised_cache_comes_near() -> None:
    small = model("glm", index_head_dim=128)
    expected = run(small).logits
    found = run(apply(small, latent_format="fp8_656")).logits
    assert 0 < (found - expected).square().mean() < 0.05 * expected.square().mean()


def test_the_default_formats_are_the_backends_favourites() -> None:
    layout = PagedCache(apply(model("glm"))).layout
    assert layout.latent is glm5_hal.preferred_formats("cpu", "latent")[0]
    assert layout.index is glm5_hal.preferred_formats("cpu", "index")[0]


def test_shared_layers_have_no_index_cache() -> None:
    small = apply(model("shared"))
    cache = run(small).past_key_values
    assert [tensor is not None for tensor in cache.index] == [True, False, False, True]


# What goes wrong on the way


def test_an_apply_that_fails_leaves_transformers_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small, again = model("glm"), apply(model("glm"))
    expected, made = run(small).logits, experts.experts
    modules = {n: set(m.__dict__) for n, m in small.named_modules()}

    def full(module: Any, backend: str) -> Any:
        if module is small.model.layers[2].mlp.experts or module is again.model.layers[2].mlp.experts:
            raise torch.OutOfMemoryError("no room for layer 2")
        return made(module, backend)

    monkeypatch.setattr(experts, "experts", full)
    for one in (small, again):
        with pytest.raises(torch.OutOfMemoryError):
            apply(one)
        assert {n: set(m.__dict__) for n, m in one.named_modules()} == modules
        assert torch.equal(run(one).logits, expected)


def test_a_policy_that_cannot_serve_its_layer_leaves_transformers_own_model() -> None:
    small = model("glm")
    expected = run(small).logits
    formats = cpu.glm5_backend().cache_formats
    with installed(stand_in("cpu", cpu.kernels, builtin=True, cache_formats=formats), stand_in("bare")):
        assert refused(apply, small, policies={1: "bare"}).code == "NO_KERNEL"
    assert torch.equal(run(small).logits, expected)


def test_remove_from_the_decoder_alone_gives_generate_back_too() -> None:
    small, ids = model("glm"), tokens(2, COLUMNS)
    expected = small.generate(ids, max_new_tokens=8, do_sample=False)
    apply(small)
    remove(small.model)
    assert torch.equal(small.generate(ids, max_new_tokens=8, do_sample=False), expected)
    small.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static")


# What it cannot do


def test_gradients_are_refused() -> None:
    small = apply(model("glm"))
    assert refused(small, tokens(1, 4)).code == "GRAD"
    small.requires_grad_(False)
    small(tokens(1, 4))


def test_dropout_is_refused_and_training_mode_without_it_is_not() -> None:
    small = apply(model("glm", attention_dropout=0.1)).train()
    assert refused(run, small).code == "GRAD"
    run(apply(model("glm")).train())


@pytest.mark.parametrize(
    ("kwargs", "code"),
    [
        ({"attention_mask": torch.zeros(2, 1, COLUMNS, COLUMNS)}, "SHAPE"),
        ({"attention_mask": {"indexed_attention": None}}, "SHAPE"),
        ({"attention_mask": torch.ones(2, COLUMNS + 1)}, "SHAPE"),
        ({"attention_mask": torch.ones(1, COLUMNS)}, "SHAPE"),
        ({"output_attentions": True}, "CONFIG"),
        ({"is_causal": False}, "CONFIG"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "CONFIG"),
        ({"use_cache": False, "position_ids": torch.arange(COLUMNS)[None] % 12}, "CONFIG"),
    ],
)
def test_what_a_pass_may_not_ask_for(kwargs: dict[str, Any], code: str) -> None:
    assert refused(run, apply(model("glm")), **kwargs).code == code


def test_other_caches_are_refused() -> None:
    small = apply(model("glm"))
    for cache in (DynamicCache(config=small.config), StaticCache(config=small.config, max_cache_len=8)):
        assert refused(run, small, past_key_values=cache).code == "TYPE"
    assert refused(small.generate, tokens(1, 4), max_new_tokens=2, cache_implementation="static").code == "CONFIG"


def test_a_cache_of_ours_does_not_run_transformers_attention() -> None:
    small = apply(model("glm"))
    cache = PagedCache(small)
    assert refused(run, remove(small), past_key_values=cache).code == "CONFIG"
    assert refused(PagedCache, small).code == "CONTRACT"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"attention_bias": True}, "CONFIG"),
        ({"hidden_act": "gelu"}, "CONFIG"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "CONFIG"),
    ],
)
def test_what_a_model_may_not_be(changes: dict[str, Any], code: str) -> None:
    assert refused(apply, model("glm", **changes)).code == code


def test_other_models_and_other_layers_are_refused() -> None:
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1))
    assert refused(apply, llama).code == "TYPE"

    class Adapted(nn.Linear):
        """Stands for a quantised layer or an adapter."""

    small = model("glm")
    small.model.layers[1].self_attn.o_proj = Adapted(4 * SIZES["v_head_dim"], SIZES["hidden_size"], bias=False)
    assert refused(apply, small).code == "TYPE"
    assert torch.isfinite(run(small).logits).all()  # and it is still transformers' own


def test_two_eps_of_the_latents_are_refused() -> None:
    small = model("glm")
    small.model.layers[2].self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    assert refused(apply, small).code == "CONFIG"


def test_a_model_on_meta_is_refused() -> None:
    assert refused(apply, model("glm").to("meta")).code == "DEVICE"


@pytest.mark.parametrize("change", ["written", "converted", "loaded", "assigned", "set", "replaced"])
def test_weights_that_changed_since_apply_are_noticed(change: str) -> None:
    small = apply(model("glm"))
    run(small)
    if change == "written":
        with torch.no_grad():
            small.model.layers[1].self_attn.kv_b_proj.weight.mul_(2)
    elif change == "converted":
        small.double()
    elif change == "set":
        small.model.layers[1].self_attn.kv_b_proj.weight = (
            model("glm", seed=1).model.layers[1].self_attn.kv_b_proj.weight
        )
    elif change == "replaced":
        small.model.layers[0].mlp.up_proj = copy.deepcopy(model("glm", seed=1).model.layers[0].mlp.up_proj)
    else:
        small.load_state_dict(model("glm", seed=1).state_dict(), assign=change == "assigned")
    assert refused(run, small).code == "CONTRACT"
    expected = run(remove(small)).logits
    torch.testing.assert_close(run(apply(small)).logits, expected, atol=1e-4, rtol=0)


# Rope


@pytest.mark.parametrize(
    "rope",
    [
        GLM["rope_parameters"],
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        YARN,
        {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda r: r["rope_type"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["glm", "deepseek"])
def test_rope_is_as_the_configuration_demands(kind: str, rope: dict[str, Any]) -> None:
    small = model(kind, rope_parameters=rope)
    positions = torch.arange(COLUMNS)[None] + 60
    expected = run(small, position_ids=positions).logits
    torch.testing.assert_close(run(apply(small), position_ids=positions).logits, expected, atol=1e-4, rtol=0)


# Import


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, glm5_hal, glm5_hal.integrations; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
