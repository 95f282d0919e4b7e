"""The numbers that define a GLM-5 class model, read from a config.json and checked before anything is computed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from glm5_hal.errors import HalError, suggest

_CONFIGS = Path(__file__).with_name("configs")

#: Built-in names. GLM-5.1 is GLM-5 with other weights: the same architecture, the same numbers.
BUILT_IN: dict[str, str] = {
    "glm-5": "glm-5.json",
    "glm-5.1": "glm-5.json",
    "glm-5.2": "glm-5.2.json",
    "deepseek-v3.2": "deepseek-v3.2.json",
}

SUPPORTED = ("glm_moe_dsa", "deepseek_v32")

_REFUSED = {
    "glm5_next": "it is another architecture: most of its layers are linear attention, its indexer pools keys, "
    "its attention has no RoPE",
}


def _only(value: str) -> Any:
    return field(default=value, metadata={"only": value})


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding, in the names of transformers v5. The fields after ``rope_type`` are YaRN's."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """One model. Field names are those of the transformers config.

    ``head_dim`` is absent on purpose: checkpoints write 64 or 192 there and no shape follows from it.
    ``indexer_types`` and ``mlp_layer_types`` always have one entry per main layer, whichever way the file said it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    n_shared_experts: int = field(metadata={"least": 0})
    first_k_dense_replace: int = field(metadata={"least": 0})
    indexer_rope_interleave: bool
    # These three are worked out by parse(): files say them in more than one way.
    rope_parameters: RopeParameters
    indexer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    # transformers does not know the MTP layer and drops the key: a file without it describes a model without it.
    num_nextn_predict_layers: int = field(default=0, metadata={"least": 0})
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    index_share_for_mtp_iteration: bool = False
    hidden_act: str = _only("silu")
    scoring_func: str = _only("sigmoid")
    topk_method: str = _only("noaux_tc")
    name: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_full_indexers(self) -> int:
        """Main layers that run their own indexer, own its weights and need an index-key cache."""
        return self.indexer_types.count("full")

    @property
    def num_moe_layers(self) -> int:
        return self.mlp_layer_types.count("sparse")

    @property
    def num_dense_layers(self) -> int:
        return self.mlp_layer_types.count("dense")


_DERIVED = ("rope_parameters", "indexer_types", "mlp_layer_types", "name", "source")
_KEYS: tuple[Field[Any], ...] = tuple(f for f in fields(ModelConfig) if f.name not in _DERIVED)
_ROPE_KEYS: tuple[Field[Any], ...] = fields(RopeParameters)


def load(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a built-in model, of a config.json, or of the folder that holds one.

    A built-in name wins over a folder of that name: write ``./glm-5`` for the folder.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        _fail("a model is named by text or by a path", name_or_path, suggest("", BUILT_IN))
    if isinstance(name_or_path, str) and (name := name_or_path.casefold()) in BUILT_IN:
        return parse(_read(_CONFIGS / BUILT_IN[name]), name=name, source=f"built-in {BUILT_IN[name]}")
    path = Path(name_or_path)
    is_folder = os.path.isdir(path)  # unlike Path.is_dir, False for a text that no path can be
    file = path / "config.json" if is_folder else path
    if not os.path.isfile(file):
        hint = suggest(path.name.casefold(), BUILT_IN)
        if is_folder:
            _fail(f"the folder {str(path)!r} holds no config.json", str(path), "name the file itself")
        if path.name == str(name_or_path) and path.suffix != ".json":
            _fail(f"unknown model {path.name!r}", path.name, f"{hint}; or give the path of a config.json")
        _fail(f"no file or folder {str(path)!r}", str(path), f"check the path; or use a built-in name: {hint}")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return parse(_read(file), name=name, source=str(file))


def parse(data: Mapping[str, Any], *, name: str = "", source: str = "") -> ModelConfig:
    """Check the content of a config.json and make a ModelConfig of it. Unknown keys are ignored, null means absent."""
    where = f"{source}: " if source else ""
    data = {key: value for key, value in data.items() if value is not None}
    if "text_config" in data:
        _fail(f"{where}a nested text_config is not read", "text_config", "save the inner object as a config.json")
    model_type = data.get("model_type")
    if model_type is not None and model_type not in SUPPORTED:
        reason = _REFUSED.get(str(model_type))
        what = f"{where}model_type {model_type!r} is not supported" + (f": {reason}" if reason else "")
        _fail(what, model_type, suggest(str(model_type), SUPPORTED))
    # The two families rotate the indexer differently, and DeepSeek's files do not have the key at all.
    data.setdefault("indexer_rope_interleave", model_type == "glm_moe_dsa")

    rope = _rope_keys(data, where)
    missing = [f.name for f in _KEYS if f.name not in data and f.default is MISSING] + _missing_rope(rope)
    if missing:
        fix = "take the keys from the config.json of the checkpoint; none of them has a default here"
        if "rope_theta" in missing:
            fix += " (rope_theta goes into rope_parameters; falling back to 10000 would only fail at long context)"
        _fail(f"{where}missing or null: {', '.join(missing)}", missing, fix)
    problems = {**_check(data, _KEYS), **_check(rope, _ROPE_KEYS)}
    if problems:
        values = {key: rope[key] if key in rope else data[key] for key in problems}
        listing = (f"{key} is {json.dumps(values[key], default=repr)}, not {need}" for key, need in problems.items())
        _fail(where + "; ".join(listing), values, "correct the named keys; the checkpoint's config.json has them right")
    config = ModelConfig(
        **{f.name: data[f.name] for f in _KEYS if f.name in data},
        rope_parameters=RopeParameters(**rope),
        indexer_types=_indexer_types(data, where),
        mlp_layer_types=_mlp_layer_types(data, where),
        name=name,
        source=source,
    )
    _check_relations(config, where)
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}"
        raise _error(f"{file} is not valid JSON: {error.msg} at {at}", str(file), f"correct {at}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"{file} cannot be read: {error}", str(file), "give a readable UTF-8 file") from error
    if not isinstance(data, dict):
        _fail(f"{file} holds a JSON {type(data).__name__}, not an object", str(file), "give a model's config.json")
    return data


def _check(data: Mapping[str, Any], keys: tuple[Field[Any], ...]) -> dict[str, str]:
    """What each wrong value should have been."""
    problems = {}
    for key in keys:
        if key.name not in data:
            continue
        value, kind, least = data[key.name], str(key.type).partition(" ")[0], key.metadata.get("least", 1)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind == "int" and not (number and isinstance(value, int) and value >= least):
            problems[key.name] = f"an integer of at least {least}"
        elif kind == "float" and not (number and 0 < value < math.inf):
            problems[key.name] = "a positive number"
        elif kind == "bool" and not isinstance(value, bool):
            problems[key.name] = "true or false"
        elif kind == "str" and value != key.metadata.get("only", value):
            problems[key.name] = f'"{key.metadata["only"]}", the only choice of this model family'
    return problems


def _rope_keys(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rope keys in v5 names: v5 nests them in rope_parameters, v4 splits them in rope_theta and rope_scaling."""
    key = "rope_parameters" if "rope_parameters" in data else "rope_scaling"
    nested = data.get(key, {})
    if not isinstance(nested, dict):
        _fail(f"{where}{key} is {nested!r}, not an object", nested, f'write {key} as {{"rope_type": "default", ...}}')
    keys = {name: value for name, value in nested.items() if value is not None}
    top = data.get("rope_theta")
    if top is not None and keys.setdefault("rope_theta", top) != top:
        what = f"{where}rope_theta is {top} at the top and {keys['rope_theta']} in {key}"
        _fail(what, (top, keys["rope_theta"]), "keep the one of the checkpoint")
    kind = keys.setdefault("rope_type", keys.get("type", "default"))
    if kind not in ("default", "yarn"):
        _fail(f"{where}rope_type {kind!r} is not supported", kind, "known: default, yarn")
    return {f.name: keys[f.name] for f in _ROPE_KEYS if f.name in keys}


def _missing_rope(rope: Mapping[str, Any]) -> list[str]:
    yarn = ["factor", "original_max_position_embeddings"] if rope["rope_type"] == "yarn" else []
    return [key for key in ["rope_theta", *yarn] if key not in rope]


def _indexer_types(data: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Per layer, whether it selects keys itself. The list wins over the pattern, the pattern over the schedule."""
    layers: int = data["num_hidden_layers"]
    key = next((key for key in ("indexer_types", "index_topk_pattern") if key in data), "index_topk_freq")
    listed = data.get(key)
    if key == "index_topk_pattern" and isinstance(listed, str):
        listed = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in listed]
    if key == "index_topk_freq":
        freq, offset = data.get(key, 1), data.get("index_skip_topk_offset")
        for name, value, least in ((key, freq, 1), ("index_skip_topk_offset", offset, 0)):
            wrong = not isinstance(value, int) or isinstance(value, bool) or value < least
            if wrong and value is not None:
                _fail(f"{where}{name} is {value!r}, not an integer of at least {least}", value, f"correct {name}")
        if freq == 1:
            return ("full",) * layers
        if offset is None:
            # Known readers assume 2, 1 or 0 here: each makes other layers full.
            what = f"{where}index_topk_freq is {freq} but index_skip_topk_offset is missing"
            _fail(what, freq, "add index_skip_topk_offset, or list indexer_types layer by layer")
        listed = ["shared" if max(i - offset + 1, 0) % freq else "full" for i in range(layers)]
    types = _per_layer(listed, key, ("full", "shared"), layers, where)
    if types[0] != "full":
        what = f"{where}{key} makes layer 0 shared, but there is no earlier selection to reuse"
        _fail(what, types[0], "layer 0 must be full: correct the list, the pattern or index_skip_topk_offset")
    return types


def _mlp_layer_types(data: Mapping[str, Any], where: str) -> tuple[str, ...]:
    layers: int = data["num_hidden_layers"]
    listed = data.get("mlp_layer_types")
    if listed is not None:
        return _per_layer(listed, "mlp_layer_types", ("dense", "sparse"), layers, where)
    if data.get("moe_layer_freq", 1) != 1:
        _fail(f"{where}moe_layer_freq is not 1", data["moe_layer_freq"], "list mlp_layer_types layer by layer")
    dense: int = min(data["first_k_dense_replace"], layers)
    return ("dense",) * dense + ("sparse",) * (layers - dense)


def _per_layer(listed: Any, key: str, choices: tuple[str, str], layers: int, where: str) -> tuple[str, ...]:
    fix = f"give {layers} entries, each {' or '.join(choices)}"
    if not isinstance(listed, (list, tuple)):
        _fail(f"{where}{key} is {listed!r}, not a list", listed, fix)
    if len(listed) != layers:
        _fail(f"{where}{key} has {len(listed)} entries for {layers} layers", len(listed), fix)
    for layer, entry in enumerate(listed):
        if entry not in choices:
            _fail(f"{where}{key} has {entry!r} at layer {layer}", entry, fix)
    return tuple(listed)


def _check_relations(c: ModelConfig, where: str) -> None:
    """Shapes that cannot be built, although each number alone is fine."""
    per_group = c.n_routed_experts // c.n_group
    for holds, what, value in (
        (c.n_routed_experts % c.n_group == 0, "n_group does not divide n_routed_experts", c.n_group),
        (c.topk_group <= c.n_group, "topk_group is more than n_group", c.topk_group),
        (
            c.num_experts_per_tok <= per_group * c.topk_group,
            "num_experts_per_tok is more than the experts a token may choose from",
            c.num_experts_per_tok,
        ),
        (c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim is odd; RoPE rotates pairs", c.qk_rope_head_dim),
        (c.qk_rope_head_dim <= c.index_head_dim, "index_head_dim has no room for qk_rope_head_dim", c.index_head_dim),
    ):
        if not holds:
            _fail(f"{where}{what}: {value}", value, "take both numbers from the checkpoint's config.json")


def _error(what: str, value: object, fix: str) -> HalError:
    return HalError("CONFIG", what, value=value, fix=fix)


def _fail(what: str, value: object, fix: str) -> NoReturn:
    raise _error(what, value, fix)
