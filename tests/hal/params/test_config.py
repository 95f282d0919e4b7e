"""What a config.json may say, what is made of it, and what every unusable one is told."""

import json
from pathlib import Path

import pytest

from glm5_hal.errors import HalError
from glm5_hal.params import ModelConfig, load
from glm5_hal.params.config import BUILT_IN, parse

CONFIGS = Path(load.__code__.co_filename).with_name("configs")
REMOVE = object()


def raw(name="glm-5", **edits):
    """The content of a built-in config.json with some keys replaced or removed."""
    data = json.loads((CONFIGS / BUILT_IN[name]).read_text())
    data.update(edits)
    return {key: value for key, value in data.items() if value is not REMOVE}


def refusal(data) -> HalError:
    with pytest.raises(HalError) as caught:
        parse(data)
    assert caught.value.code == "CONFIG"
    assert caught.value.fix
    return caught.value


def full_layers(config: ModelConfig) -> list[int]:
    return [layer for layer, kind in enumerate(config.indexer_types) if kind == "full"]


# --- built-in models -------------------------------------------------------------------------------------------------


def test_glm_5_has_its_published_numbers():
    c = load("glm-5")
    assert (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_nextn_predict_layers) == (154880, 6144, 78, 1)
    assert (c.num_attention_heads, c.q_lora_rank, c.kv_lora_rank) == (64, 2048, 512)
    assert (c.qk_nope_head_dim, c.qk_rope_head_dim, c.qk_head_dim, c.v_head_dim) == (192, 64, 256, 256)
    assert (c.index_n_heads, c.index_head_dim, c.index_topk) == (32, 128, 2048)
    assert (c.intermediate_size, c.moe_intermediate_size) == (12288, 2048)
    assert (c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts) == (256, 8, 1)
    assert (c.n_group, c.topk_group, c.routed_scaling_factor, c.norm_topk_prob) == (1, 1, 2.5, True)
    assert (c.num_dense_layers, c.num_moe_layers, c.num_full_indexers) == (3, 75, 78)
    assert (c.max_position_embeddings, c.rms_norm_eps, c.tie_word_embeddings) == (202752, 1e-5, False)
    assert (c.rope_parameters.rope_theta, c.rope_parameters.rope_type) == (1e6, "default")
    assert c.indexer_rope_interleave


def test_glm_5_1_is_glm_5_under_its_own_name():
    assert load("glm-5.1") == load("glm-5")
    assert load("glm-5.1").name == "glm-5.1"


def test_glm_5_2_shares_selections_and_has_a_longer_context():
    c = load("glm-5.2")
    assert full_layers(c) == [0, 1, 2, *range(6, 75, 4)]
    assert (c.num_full_indexers, c.indexer_types.count("shared")) == (21, 57)
    assert (c.rope_parameters.rope_theta, c.max_position_embeddings) == (8e6, 1048576)
    assert c.index_share_for_mtp_iteration


def test_deepseek_v3_2_reads_the_v4_rope_keys_and_turns_the_indexer_by_halves():
    c = load("deepseek-v3.2")
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.q_lora_rank) == (7168, 61, 128, 1536)
    assert (c.qk_nope_head_dim, c.v_head_dim, c.index_n_heads) == (128, 128, 64)
    assert (c.n_group, c.topk_group, c.rms_norm_eps) == (8, 4, 1e-6)
    rope = c.rope_parameters
    assert (rope.rope_theta, rope.rope_type, rope.factor) == (1e4, "yarn", 40)
    assert (rope.original_max_position_embeddings, rope.beta_fast, rope.beta_slow, rope.mscale) == (4096, 32, 1, 1.0)
    assert not c.indexer_rope_interleave


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_config_is_frozen_hashable_and_knows_where_it_came_from(name):
    c = load(name)
    assert c.source == f"built-in {BUILT_IN[name]}"
    assert hash(c) == hash(load(name.upper()))
    with pytest.raises(AttributeError):
        c.hidden_size = 1


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_file_and_its_folder_load_as_the_built_in_does(tmp_path, name):
    folder = tmp_path / "my-model"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(raw(name)))
    for given in (file, str(file), folder, str(folder)):
        assert load(given) == load(name)
        assert (load(given).name, load(given).source) == ("my-model", str(file))


def test_a_built_in_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("glm-5").mkdir()
    Path("glm-5/config.json").write_text(json.dumps(raw("deepseek-v3.2")))
    assert load("glm-5").model_type == "glm_moe_dsa"
    assert load("./glm-5").model_type == "deepseek_v32"
    assert load(Path("glm-5")).model_type == "deepseek_v32"


@pytest.mark.parametrize(
    ("given", "what", "fix"),
    [
        ("glm5", "unknown model 'glm5'", "did you mean 'glm-5'? known: deepseek-v3.2, glm-5, glm-5.1, glm-5.2"),
        ("GLM-5.3-Flash", "unknown model 'GLM-5.3-Flash'", "or give the path of a config.json"),
        ("no/such/glm-5.2", "no file or folder 'no/such/glm-5.2'", "did you mean 'glm-5.2'?"),
        ("nothing.json", "no file or folder 'nothing.json'", "check the path"),
        ("x" * 5000, "unknown model", "known: deepseek-v3.2"),
        ("", "named by text or by a path", "known: deepseek-v3.2"),
        (None, "named by text or by a path", "known: deepseek-v3.2"),
        (5, "named by text or by a path", "known: deepseek-v3.2"),
    ],
)
def test_a_name_that_is_nothing_says_what_there_is(given, what, fix):
    with pytest.raises(HalError) as caught:
        load(given)
    assert caught.value.code == "CONFIG"
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_folder_without_config_json(tmp_path):
    with pytest.raises(HalError, match=r"holds no config\.json"):
        load(tmp_path)


def test_invalid_json_names_the_line(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{\n  "hidden_size": 6144,\n  "vocab_size": \n}\n')
    with pytest.raises(HalError, match=r"config\.json is not valid JSON: Expecting value at line 4 column 1") as caught:
        load(file)
    assert caught.value.fix == "correct line 4 column 1"


@pytest.mark.parametrize(
    ("content", "what"), [(b"[1, 2]", "holds a JSON list, not an object"), (b"\xff\xfe\x00", "cannot be read")]
)
def test_a_file_that_is_no_config_at_all(tmp_path, content, what):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(HalError, match=what):
        load(file)


def test_errors_in_a_file_name_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw(hidden_size=0)))
    with pytest.raises(HalError, match=r"config\.json: hidden_size is 0"):
        load(file)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_all_missing_keys_are_named_at_once():
    error = refusal(raw(hidden_size=REMOVE, index_topk=None, model_type=REMOVE, rope_parameters=REMOVE))
    assert sorted(error.value) == ["hidden_size", "index_topk", "model_type", "rope_theta"]
    assert all(key in error.what for key in error.value)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "rms_norm_eps",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "intermediate_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "norm_topk_prob",
        "first_k_dense_replace",
    ],
)
def test_a_number_that_shapes_the_model_has_no_default(key):
    assert refusal(raw(**{key: REMOVE})).value == [key]


def test_optional_keys_have_the_defaults_of_transformers():
    optional = ("num_nextn_predict_layers", "tie_word_embeddings", "attention_bias", "hidden_act", "scoring_func")
    c = parse(raw(**dict.fromkeys(optional, REMOVE)))
    assert (c.num_nextn_predict_layers, c.tie_word_embeddings, c.attention_bias) == (0, False, False)
    assert (c.hidden_act, c.scoring_func) == ("silu", "sigmoid")


@pytest.mark.parametrize(("model_type", "expected"), [("glm_moe_dsa", True), ("deepseek_v32", False)])
def test_without_its_key_the_indexer_rope_follows_the_family(model_type, expected):
    data = raw(model_type=model_type, indexer_rope_interleave=REMOVE)
    assert parse(data).indexer_rope_interleave is expected
    assert parse({**data, "indexer_rope_interleave": not expected}).indexer_rope_interleave is not expected


@pytest.mark.parametrize("head_dim", [64, 192, 256, "nonsense", REMOVE])
def test_head_dim_is_ignored(head_dim):
    assert parse(raw(head_dim=head_dim)) == load("glm-5")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("hidden_size", "6144", 'hidden_size is "6144", not an integer of at least 1'),
        ("hidden_size", 6144.0, "hidden_size is 6144.0, not an integer"),
        ("hidden_size", True, "hidden_size is true, not an integer"),
        ("hidden_size", [6144], "hidden_size is [6144], not an integer"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0, not an integer of at least 1"),
        ("vocab_size", -1, "vocab_size is -1, not an integer of at least 1"),
        ("n_shared_experts", -1, "n_shared_experts is -1, not an integer of at least 0"),
        ("num_nextn_predict_layers", -1, "num_nextn_predict_layers is -1, not an integer of at least 0"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0, not a positive number"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is NaN, not a positive number"),
        ("routed_scaling_factor", float("inf"), "routed_scaling_factor is Infinity, not a positive number"),
        ("norm_topk_prob", 1, "norm_topk_prob is 1, not true or false"),
        ("indexer_rope_interleave", "yes", 'indexer_rope_interleave is "yes", not true or false'),
        ("scoring_func", "softmax", 'scoring_func is "softmax", not "sigmoid"'),
        ("topk_method", "greedy", 'topk_method is "greedy", not "noaux_tc"'),
        ("hidden_act", "gelu", 'hidden_act is "gelu", not "silu"'),
    ],
)
def test_a_wrong_value_is_shown_beside_what_was_needed(key, value, what):
    error = refusal(raw(**{key: value}))
    assert what in error.what
    assert list(error.value) == [key]


def test_all_wrong_values_are_named_at_once():
    error = refusal(raw(hidden_size=0, index_topk="2048", rope_parameters={"rope_theta": -1}))
    assert error.value == {"hidden_size": 0, "index_topk": "2048", "rope_theta": -1}
    assert error.what.count(";") == 2


@pytest.mark.parametrize(
    ("edits", "what"),
    [
        ({"n_group": 3}, "n_group does not divide n_routed_experts: 3"),
        ({"topk_group": 2}, "topk_group is more than n_group: 2"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok is more than"),
        ({"n_group": 64, "num_experts_per_tok": 5}, "num_experts_per_tok is more than"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is odd"),
        ({"index_head_dim": 32}, "index_head_dim has no room"),
    ],
)
def test_numbers_that_cannot_stand_together(edits, what):
    assert what in refusal(raw(**edits)).what


# --- model types -----------------------------------------------------------------------------------------------------


def test_glm5_next_is_refused_with_the_reason():
    error = refusal(raw(model_type="glm5_next"))
    assert "another architecture" in error.what
    assert "linear attention" in error.what
    assert "pools keys" in error.what


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", 7, ["glm_moe_dsa"]])
def test_another_model_type_is_refused_with_the_supported_ones(model_type):
    error = refusal(raw(model_type=model_type))
    assert error.value == model_type
    assert "deepseek_v32, glm_moe_dsa" in error.fix


def test_a_near_miss_of_a_model_type_gets_a_suggestion():
    assert "did you mean 'deepseek_v32'?" in refusal(raw(model_type="deepseek_v3")).fix


def test_a_nested_text_config_is_refused():
    assert "text_config" in refusal({"model_type": "glm_moe_dsa", "text_config": raw()}).what


# --- rope ------------------------------------------------------------------------------------------------------------


def test_v4_and_v5_spellings_of_rope_are_one():
    v5 = raw(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    for v4 in ({"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}, {"rope_scaling": {"rope_theta": 1e6}}):
        assert parse(raw(rope_parameters=REMOVE, **v4)) == parse(v5)
    assert parse(raw(rope_parameters={"rope_type": "default"}, rope_theta=1e6)) == parse(v5)


def test_yarn_has_the_same_meaning_in_both_spellings():
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    mscale = {"mscale": 1.0, "mscale_all_dim": 1.0}
    v5 = {"rope_parameters": {"rope_theta": 10000, "rope_type": "yarn", **yarn, **mscale}}
    assert parse(raw("deepseek-v3.2", rope_scaling=REMOVE, rope_theta=REMOVE, **v5)) == load("deepseek-v3.2")


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": {"rope_type": "default"}}, {"rope_scaling": None}])
def test_a_missing_theta_is_an_error_and_not_10000(rope):
    error = refusal({**raw(rope_parameters=REMOVE), **rope})
    assert error.value == ["rope_theta"]
    assert "10000" in error.fix


@pytest.mark.parametrize(
    ("edits", "what"),
    [
        ({"rope_theta": 10000}, "rope_theta is 10000 at the top and 1000000 in rope_parameters"),
        ({"rope_parameters": 1e6}, "rope_parameters is 1000000.0, not an object"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, 'rope_theta is "1e6", not a positive number'),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, not a positive number"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"}}, "rope_type 'llama3' is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}},
            "missing or null: factor, original_max_position_embeddings",
        ),
    ],
)
def test_unusable_rope_keys(edits, what):
    assert what in refusal(raw(**edits)).what


# --- which layers run their own indexer ------------------------------------------------------------------------------


def schedule(**edits):
    return raw(indexer_types=REMOVE, index_topk_pattern=REMOVE, **edits)


def test_without_a_schedule_every_layer_is_full():
    assert full_layers(parse(schedule())) == list(range(78))
    assert full_layers(parse(schedule(index_topk_freq=1))) == list(range(78))


def test_the_schedule_of_glm_5_2_gives_its_list():
    c = parse(schedule(index_topk_freq=4, index_skip_topk_offset=3))
    assert c.indexer_types == load("glm-5.2").indexer_types


def test_the_offset_that_a_reader_would_assume_gives_as_many_layers_but_the_wrong_ones():
    c = parse(schedule(index_topk_freq=4, index_skip_topk_offset=2))
    assert full_layers(c) == [0, 1, *range(5, 78, 4)]
    assert c.num_full_indexers == load("glm-5.2").num_full_indexers


@pytest.mark.parametrize("offset", [{}, {"index_skip_topk_offset": None}])
def test_so_a_missing_offset_is_an_error_that_asks_for_it(offset):
    error = refusal(schedule(index_topk_freq=4, **offset))
    assert "index_topk_freq is 4 but index_skip_topk_offset is missing" in error.what
    assert error.fix == "add index_skip_topk_offset, or list indexer_types layer by layer"


def test_a_pattern_overrides_the_schedule_and_a_list_overrides_both():
    pattern = "FSSS" * 19 + "FF"
    frequency = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    by_pattern = [*range(0, 76, 4), 76, 77]
    assert full_layers(parse({**schedule(**frequency), "index_topk_pattern": pattern})) == by_pattern
    listed = ["full"] + ["shared"] * 77
    assert full_layers(parse({**raw(**frequency), "index_topk_pattern": pattern, "indexer_types": listed})) == [0]
    assert full_layers(parse({**schedule(), "index_topk_pattern": listed})) == [0]


@pytest.mark.parametrize(
    ("edits", "what"),
    [
        ({"indexer_types": ["full"] * 79}, "indexer_types has 79 entries for 78 layers"),
        ({"indexer_types": ["full"] * 77 + ["half"]}, "indexer_types has 'half' at layer 77"),
        ({"indexer_types": "full"}, "indexer_types is 'full', not a list"),
        ({"indexer_types": ["shared"] + ["full"] * 77}, "indexer_types makes layer 0 shared"),
        ({"index_topk_pattern": "F" * 77}, "index_topk_pattern has 77 entries for 78 layers"),
        ({"index_topk_pattern": "F" * 77 + "X"}, "index_topk_pattern has 'X' at layer 77"),
        ({"index_topk_pattern": 4}, "index_topk_pattern is 4, not a list"),
        ({"index_topk_freq": 0}, "index_topk_freq is 0, not an integer of at least 1"),
        ({"index_topk_freq": True}, "index_topk_freq is True, not an integer of at least 1"),
        ({"index_topk_freq": "4"}, "index_topk_freq is '4', not an integer of at least 1"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": -1}, "index_skip_topk_offset is -1"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, "index_topk_freq makes layer 0 shared"),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types has 3 entries for 78 layers"),
        ({"mlp_layer_types": ["moe"] * 78}, "mlp_layer_types has 'moe' at layer 0"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is not 1"),
    ],
)
def test_unusable_layer_lists(edits, what):
    assert what in refusal({**schedule(), **edits}).what


def test_a_list_of_mlp_types_wins_over_the_number_of_leading_dense_layers():
    assert parse(raw(mlp_layer_types=["sparse", "dense"] * 39)).num_dense_layers == 39
    assert parse(raw(first_k_dense_replace=100)).num_moe_layers == 0
