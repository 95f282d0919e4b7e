"""The published sizes of the models, and the same sums done another way."""

import json
from math import prod
from pathlib import Path

import pytest

from glm5_hal.errors import HalError
from glm5_hal.params import load
from glm5_hal.params.config import parse
from glm5_hal.params.count import cost_sheet, kv_cache_bytes, parameters, weights

MODELS = ("glm-5", "glm-5.1", "glm-5.2", "deepseek-v3.2")

TINY = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 7,
    "num_nextn_predict_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "index_n_heads": 5,
    "index_head_dim": 18,
    "index_topk": 16,
    "intermediate_size": 70,
    "moe_intermediate_size": 22,
    "n_routed_experts": 9,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 2,
    "index_topk_freq": 2,
    "index_skip_topk_offset": 2,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}


def tiny(**edits):
    return parse({**TINY, **edits})


def cost(name, config, context=4096):
    (found,) = [line for line in cost_sheet(config, context) if line.name == name]
    return found


# --- parameters ------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "glm-5": {
        "main": 743_911_218_432,
        "main_layers": 742_008_046_848,
        "mtp": 9_952_920_576,
        "total_checkpoint": 753_864_139_008,
        "active": 39_881_563_392,
        "active_with_lm_head": 40_833_146_112,
        "active_with_embedding_and_head": 41_784_728_832,
    },
    "glm-5.2": {
        "main": 743_377_019_904,
        "main_layers": 741_473_848_320,
        "mtp": 9_952_920_576,
        "total_checkpoint": 753_329_940_480,
        "active": 39_347_364_864,
        "active_with_lm_head": 40_298_947_584,
        "active_with_embedding_and_head": 41_250_530_304,
    },
    "deepseek-v3.2": {
        "main": 671_877_944_064,
        "main_layers": 670_024_578_816,
        "mtp": 11_624_027_648,
        "total_checkpoint": 683_501_971_712,
        "active": 36_550_464_256,
        "active_with_lm_head": 37_477_143_296,
        "active_with_embedding_and_head": 38_403_822_336,
    },
}
PUBLISHED["glm-5.1"] = PUBLISHED["glm-5"]


@pytest.mark.parametrize(("model", "count"), [(m, key) for m in PUBLISHED for key in PUBLISHED[m]])
def test_published_count(model, count):
    assert getattr(parameters(load(model)), count) == PUBLISHED[model][count]


@pytest.mark.parametrize("model", MODELS)
def test_the_final_norm_is_in_every_count_but_those_of_the_layers(model):
    config, p = load(model), parameters(load(model))
    assert p.main_without_embedding_and_head == p.main_layers + config.hidden_size
    assert p.active == p.active_layers + config.hidden_size
    assert p.main == p.main_without_embedding_and_head + 2 * config.vocab_size * config.hidden_size


def test_the_components_of_glm_5_by_hand():
    p = parameters(load("glm-5"))
    expert = 3 * 2048 * 6144
    assert expert == 37_748_736
    assert p.by_component == {
        "embedding": 154_880 * 6144,
        "mla": 78 * 165_022_208,
        "indexer": 78 * 9_371_904,
        "norms": 78 * 12_288,
        "dense_mlp": 3 * 226_492_416,
        "router": 75 * (256 * 6144 + 256),
        "routed_experts": 75 * 256 * expert,
        "shared_experts": 75 * expert,
        "final_norm": 6144,
        "lm_head": 154_880 * 6144,
    }
    moe = sum(p.by_component[key] for key in ("router", "routed_experts", "shared_experts"))
    assert moe == 75 * 9_702_998_272
    assert p.mtp_by_component == {
        "mla": 165_022_208,
        "indexer": 9_371_904,
        "norms": 12_288 + 3 * 6144,  # enorm, hnorm, shared_head.norm
        "router": 256 * 6144 + 256,
        "routed_experts": 256 * expert,
        "shared_experts": expert,
        "eh_proj": 6144 * 2 * 6144,
    }


def test_the_attention_of_deepseek_v3_2_by_hand():
    p = parameters(load("deepseek-v3.2"))
    q = 1536 * 7168 + 1536 + 128 * 192 * 1536
    kv = 576 * 7168 + 512 + 128 * 256 * 512
    assert p.by_component["mla"] == 61 * (q + kv + 7168 * 128 * 128)
    assert p.by_component["indexer"] == 61 * (64 * 128 * 1536 + 128 * 7168 + 2 * 128 + 64 * 7168)


def test_what_the_sizes_in_the_names_mean():
    p = parameters(load("glm-5"))
    assert round(p.main / 1e9) == 744
    assert round(p.active / 1e9, 1) == 39.9
    assert round(p.active_with_lm_head / 1e9, 1) == 40.8
    assert round(p.total_checkpoint / 1e9) == 754
    assert round(p.by_component["routed_experts"] / p.main, 3) == 0.974
    active_moe = sum(p.active_by_component[key] for key in ("router", "routed_experts", "shared_experts"))
    assert round(active_moe / 1e9, 1) == 25.6
    assert round(p.by_component["mla"] / 1e9, 2) == 12.87


def test_sharing_saves_exactly_the_indexers_of_the_shared_layers():
    saved = parameters(load("glm-5")).total_checkpoint - parameters(load("glm-5.2")).total_checkpoint
    assert saved == 57 * 9_371_904 == 534_198_528


def test_the_glm_5_2_count_is_that_of_the_published_safetensors_headers():
    total = parameters(load("glm-5.2")).total_checkpoint
    router_biases = sum(w.total for w in weights(load("glm-5.2")) if w.name.endswith("e_score_correction_bias"))
    assert router_biases == 76 * 256
    assert total - router_biases == 753_329_921_024


def test_every_weight_has_its_checkpoint_name_and_shape():
    shapes = {w.name: w.shape for w in weights(load("glm-5"))}
    layer = "model.layers.*."
    assert shapes == {
        "model.embed_tokens.weight": (154880, 6144),
        "model.norm.weight": (6144,),
        "lm_head.weight": (154880, 6144),
        layer + "input_layernorm.weight": (6144,),
        layer + "post_attention_layernorm.weight": (6144,),
        layer + "self_attn.q_a_proj.weight": (2048, 6144),
        layer + "self_attn.q_a_layernorm.weight": (2048,),
        layer + "self_attn.q_b_proj.weight": (16384, 2048),
        layer + "self_attn.kv_a_proj_with_mqa.weight": (576, 6144),
        layer + "self_attn.kv_a_layernorm.weight": (512,),
        layer + "self_attn.kv_b_proj.weight": (28672, 512),
        layer + "self_attn.o_proj.weight": (6144, 16384),
        layer + "self_attn.indexer.wq_b.weight": (4096, 2048),
        layer + "self_attn.indexer.wk.weight": (128, 6144),
        layer + "self_attn.indexer.k_norm.weight": (128,),
        layer + "self_attn.indexer.k_norm.bias": (128,),
        layer + "self_attn.indexer.weights_proj.weight": (32, 6144),
        layer + "mlp.gate_proj.weight": (12288, 6144),
        layer + "mlp.up_proj.weight": (12288, 6144),
        layer + "mlp.down_proj.weight": (6144, 12288),
        layer + "mlp.gate.weight": (256, 6144),
        layer + "mlp.gate.e_score_correction_bias": (256,),
        layer + "mlp.experts.*.gate_proj.weight": (2048, 6144),
        layer + "mlp.experts.*.up_proj.weight": (2048, 6144),
        layer + "mlp.experts.*.down_proj.weight": (6144, 2048),
        layer + "mlp.shared_experts.gate_proj.weight": (2048, 6144),
        layer + "mlp.shared_experts.up_proj.weight": (2048, 6144),
        layer + "mlp.shared_experts.down_proj.weight": (6144, 2048),
        layer + "enorm.weight": (6144,),
        layer + "hnorm.weight": (6144,),
        layer + "eh_proj.weight": (6144, 12288),
        layer + "shared_head.norm.weight": (6144,),
    }


def walk(c):
    """The main model's and the MTP layers' parameters, and those a token uses, layer by layer."""
    heads, hidden = c.num_attention_heads, c.hidden_size
    qk = c.qk_nope_head_dim + c.qk_rope_head_dim
    attention = hidden * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * heads * qk
    attention += hidden * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    attention += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim) + heads * c.v_head_dim * hidden
    if c.attention_bias:
        attention += c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim + hidden
    indexer = c.q_lora_rank * c.index_n_heads * c.index_head_dim + hidden * (c.index_head_dim + c.index_n_heads)
    indexer += 2 * c.index_head_dim
    expert = 3 * hidden * c.moe_intermediate_size
    rest = c.n_shared_experts * expert + (hidden + 1) * c.n_routed_experts
    main = active = hidden
    for indexer_type, mlp_type in zip(c.indexer_types, c.mlp_layer_types, strict=True):
        common = attention + 2 * hidden + (indexer if indexer_type == "full" else 0)
        main += common + (3 * hidden * c.intermediate_size if mlp_type == "dense" else 0)
        active += common + (3 * hidden * c.intermediate_size if mlp_type == "dense" else 0)
        if mlp_type == "sparse":
            main += rest + c.n_routed_experts * expert
            active += rest + c.num_experts_per_tok * expert
    mtp = attention + indexer + 2 * hidden + rest + c.n_routed_experts * expert + 2 * hidden * hidden + 3 * hidden
    return main, active, c.num_nextn_predict_layers * mtp


@pytest.mark.parametrize(
    "edits",
    [
        {},
        {"attention_bias": True},
        {"n_shared_experts": 0},
        {"num_nextn_predict_layers": 0},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 7},
        {"index_topk_freq": 1},
        {"mlp_layer_types": ["sparse", "dense", "sparse", "dense", "dense", "sparse", "sparse"]},
    ],
    ids=str,
)
def test_the_table_of_weights_sums_to_a_walk_over_the_layers(edits):
    config = tiny(**edits)
    p = parameters(config)
    vocabulary = 101 * 48
    main, active, mtp = walk(config)
    assert (p.main_without_embedding_and_head, p.active, p.mtp) == (main, active, mtp)
    assert p.total_checkpoint == main + mtp + 2 * vocabulary
    assert p.active_with_embedding_and_head == active + 2 * vocabulary


def test_a_tied_head_is_stored_once_and_used_all_the_same():
    tied, untied = parameters(tiny(tie_word_embeddings=True)), parameters(tiny())
    assert tied.total_checkpoint == untied.total_checkpoint - 101 * 48
    assert tied.active_with_lm_head == untied.active_with_lm_head
    assert tied.active_with_embedding_and_head == untied.active_with_embedding_and_head - 101 * 48


@pytest.mark.parametrize("model", MODELS)
def test_the_components_sum_to_the_totals(model):
    p = parameters(load(model))
    assert sum(p.by_component.values()) == p.main
    assert sum(p.active_by_component.values()) == p.active_with_embedding_and_head
    assert sum(p.mtp_by_component.values()) == p.mtp == p.total_checkpoint - p.main


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*MODELS, "tiny", "tiny with biases"])
def test_a_transformers_model_on_the_meta_device_has_as_many_parameters(model):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    torch = pytest.importorskip("torch")
    if model.startswith("tiny"):
        data = {**TINY, "attention_bias": model.endswith("biases")}
        config = parse(data)
    else:
        config = load(model)
        file = config.source.removeprefix("built-in ")
        data = json.loads((Path(load.__code__.co_filename).with_name("configs") / file).read_text())
    kind = {"glm_moe_dsa": "GlmMoeDsa", "deepseek_v32": "DeepseekV32"}[config.model_type]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**data))
    biases = sum(b.numel() for name, b in theirs.named_buffers() if name.endswith("e_score_correction_bias"))
    assert sum(p.numel() for p in theirs.parameters()) + biases == parameters(config).main


# --- FLOPs -----------------------------------------------------------------------------------------------------------

SHEET = [
    # name, MFLOP of one run, MB of weights or (for the two that read caches) of cache, layers in GLM-5, in GLM-5.2
    ("q_a + kv_a", "32.2", "16.1", 78, 78),
    ("indexer wk + weights_proj", "2.0", "2.0", 78, 21),
    ("q_b", "67.1", "33.6", 78, 78),
    ("indexer wq_b", "16.8", "8.4", 78, 21),
    ("absorb W_UK", "12.6", "6.3", 78, 78),
    ("sparse attention", "285.2", "1.34", 78, 78),
    ("W_UV", "16.8", "8.4", 78, 78),
    ("o_proj", "201.3", "100.7", 78, 78),
    ("router", "3.1", "3.1", 75, 75),
    ("routed experts", "604.0", "302", 75, 75),
    ("shared experts", "75.5", "37.7", 75, 75),
    ("dense MLP", "453.0", "226.5", 3, 3),
    ("lm_head", "1903", "1903", 1, 1),
]


def to_digits_of(printed: str, value: float) -> str:
    return f"{value:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "mflop", "megabytes", "runs", "runs_shared"), SHEET, ids=[line[0] for line in SHEET])
def test_cost_sheet(name, mflop, megabytes, runs, runs_shared):
    found = cost(name, load("glm-5"))
    assert to_digits_of(mflop, found.flops / 1e6) == mflop
    assert to_digits_of(megabytes, (found.weight_bytes or found.cache_bytes) / 1e6) == megabytes
    assert (found.runs, cost(name, load("glm-5.2")).runs) == (runs, runs_shared)


def test_index_logits_cost_8192_flops_and_132_bytes_per_key_in_the_full_layers_only():
    for context in (1, 2048, 131072):
        found = cost("index logits", load("glm-5.2"), context)
        assert (found.flops, found.cache_bytes, found.runs) == (8192 * context, 132 * context, 21)
    assert cost("index logits", load("deepseek-v3.2"), 1).flops == 2 * 64 * 128


def test_the_sheet_has_no_other_lines():
    assert {line.name for line in cost_sheet(load("glm-5"), 1)} == {line[0] for line in SHEET} | {"index logits"}


@pytest.mark.parametrize(("context", "keys"), [(1, 1), (2047, 2047), (2048, 2048), (2049, 2048), (202752, 2048)])
def test_attention_reads_at_most_index_topk_keys(context, keys):
    found = cost("sparse attention", load("glm-5"), context)
    assert (found.flops, found.cache_bytes) == (139_264 * keys, 656 * keys)


@pytest.mark.parametrize("config", [*map(load, MODELS), tiny(), tiny(n_shared_experts=0, first_k_dense_replace=0)])
def test_every_active_matrix_is_multiplied_once(config):
    """The absorbed form splits kv_b in two products of the same size together; the embedding is a look-up."""
    matrices = [w for w in weights(config) if len(w.shape) == 2 and not w.mtp and w.component != "embedding"]
    over_caches = {"index logits", "sparse attention"}
    products = sum(line.total_flops for line in cost_sheet(config, 100) if line.name not in over_caches)
    assert products == 2 * sum(w.active * prod(w.shape) for w in matrices)


def test_a_whole_token_of_glm_5_by_hand():
    """2 FLOPs per active parameter that is in a matrix, and 78 layers of two products over the caches."""
    vectors = 78 * (2048 + 512 + 2 * 128 + 2 * 6144) + 75 * 256 + 6144
    expected = 2 * (40_833_146_112 - vectors) + 78 * (8192 * 131072 + 139_264 * 2048)
    assert sum(line.total_flops for line in cost_sheet(load("glm-5"), 131072)) == expected


@pytest.mark.parametrize("context", [0, -1, 1.0, "4096", True, None])
def test_context_is_a_positive_integer(context):
    with pytest.raises(HalError, match="not a positive integer") as caught:
        cost_sheet(load("glm-5"), context)
    assert caught.value.code == "CONFIG"


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "format", "per_layer", "needed", "with_mtp", "all_layers", "all_with_mtp"),
    [
        ("glm-5", "latent_576", 1152, 89_856, 79 * 1152, 89_856, 79 * 1152),
        ("glm-5", "latent_512_rope_64", 1152, 89_856, 79 * 1152, 89_856, 79 * 1152),
        ("glm-5", "fp8_656", 656, 51_168, 79 * 656, 51_168, 79 * 656),
        ("glm-5", "bf16_128", 256, 78 * 256, 79 * 256, 78 * 256, 79 * 256),
        ("glm-5", "fp8_132", 132, 10_296, 79 * 132, 10_296, 79 * 132),
        ("glm-5.2", "fp8_656", 656, 51_168, 79 * 656, 51_168, 79 * 656),
        ("glm-5.2", "bf16_128", 256, 21 * 256, 22 * 256, 78 * 256, 79 * 256),
        ("glm-5.2", "fp8_132", 132, 2_772, 22 * 132, 10_296, 79 * 132),
        ("deepseek-v3.2", "latent_576", 1152, 61 * 1152, 62 * 1152, 61 * 1152, 62 * 1152),
        ("deepseek-v3.2", "fp8_132", 132, 61 * 132, 62 * 132, 61 * 132, 62 * 132),
    ],
)
def test_cache_bytes_per_token(model, format, per_layer, needed, with_mtp, all_layers, all_with_mtp):
    found = kv_cache_bytes(load(model))[format]
    assert (found.per_layer, found.needed, found.needed_with_mtp) == (per_layer, needed, with_mtp)
    assert (found.all_layers, found.all_layers_with_mtp) == (all_layers, all_with_mtp)


def test_a_full_context_of_glm_5_in_fp8():
    caches, config = kv_cache_bytes(load("glm-5")), load("glm-5")
    per_token = caches["fp8_656"].needed + caches["fp8_132"].needed
    assert per_token == 61_464
    assert round(per_token * config.max_position_embeddings / 1e9, 1) == 12.5


def test_a_format_that_cannot_hold_the_widths_is_left_out():
    assert "fp8_656" in kv_cache_bytes(load("glm-5"))
    assert "fp8_656" not in kv_cache_bytes(tiny())
    assert cost("sparse attention", tiny()).cache_bytes is None
    assert kv_cache_bytes(tiny())["latent_576"].per_layer == 2 * (24 + 6)
