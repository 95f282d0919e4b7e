"""The draft layer's weights come from the names that published checkpoints give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import KINDS, model, tokens
from torch import Tensor

from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import Mtp, apply, load_mtp


@pytest.fixture(scope="module")
def small() -> Any:
    return apply(model("glm"))


def published(mtp: Mtp) -> dict[str, Tensor]:
    """A draft layer's tensors as checkpoints have them: layer 4 beside a model of 4; experts one by one."""
    made = {}
    for name, tensor in mtp.state_dict().items():
        if "mlp.experts.gate_up_proj" in name:
            for e, (gate, up) in enumerate(w.chunk(2) for w in tensor):
                made[f"mlp.experts.{e}.gate_proj.weight"], made[f"mlp.experts.{e}.up_proj.weight"] = gate, up
        elif "mlp.experts.down_proj" in name:
            made |= {f"mlp.experts.{e}.down_proj.weight": w for e, w in enumerate(tensor)}
        else:
            made[name.removeprefix("layer.") if name != "norm.weight" else "shared_head.norm.weight"] = tensor
    return {f"model.layers.4.{name}": tensor.contiguous() for name, tensor in made.items()}


def write(folder: Path, tensors: dict[str, Tensor], files: int = 1) -> Path:
    """A checkpoint with something else in it too, in one file or several with an index."""
    tensors = {"model.norm.weight": torch.ones(64), "model.layers.3.enorm.weight": torch.ones(64), **tensors}
    tensors |= {
        "model.layers.4.embed_tokens.weight": torch.ones(3),
        "model.layers.4.shared_head.head.weight": torch.ones(3),
    }
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"model-{i % files}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n].clone() for n in names if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def refused(call: Any, *args: Any) -> tuple[str, str]:
    with pytest.raises(HalError) as found:
        call(*args)
    assert found.value.fix
    return found.value.code, found.value.what


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_draft_layer_computes_the_same(kind: str, files: int, tmp_path: Path) -> None:
    small = apply(model(kind))
    mtp = Mtp(small)
    with torch.no_grad():
        mtp.layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    mtp.derive()
    loaded = load_mtp(small, write(tmp_path, published(mtp), files))
    for (name, mine), theirs in zip(mtp.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    ids, hidden = tokens(2, 30), torch.randn(2, 30, 64)
    with torch.no_grad():
        expected, found = (m(ids, hidden, cache=m.cache())[0] for m in (mtp, loaded))
    assert torch.equal(found, expected)


def test_experts_that_are_joined_already_stay_so(small: Any, tmp_path: Path) -> None:
    mtp = Mtp(small)
    names = {name: f"model.layers.4.{name.removeprefix('layer.')}" for name in mtp.state_dict()}
    names["norm.weight"] = "model.layers.4.shared_head.norm.weight"
    folder = write(tmp_path, {names[n]: t for n, t in mtp.state_dict().items()})
    for name, tensor in load_mtp(small, folder).state_dict().items():
        assert torch.equal(tensor, mtp.state_dict()[name])


def test_weights_take_the_dtypes_that_the_model_has_them_in(tmp_path: Path) -> None:
    """The router's bias and the indexer's head weights stay in float32 where the model keeps them so."""
    narrow = model("glm").bfloat16()
    for layer in narrow.model.layers:
        layer.self_attn.indexer.weights_proj.float()
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float()
    apply(narrow)
    folder = write(tmp_path, published(Mtp(apply(model("glm")))))
    wide = {n for n, t in load_mtp(narrow, folder).state_dict().items() if t.dtype == torch.float32}
    assert wide == {"layer.mlp.gate.e_score_correction_bias", "layer.self_attn.indexer.weights_proj.weight"}


def test_what_is_missing_unknown_or_of_another_shape_is_named(small: Any, tmp_path: Path) -> None:
    whole = published(Mtp(small))

    def found(**changes: Tensor | None) -> tuple[str, str]:
        changed = {**whole, **{f"model.layers.4.{n}": t for n, t in changes.items()}}
        return refused(load_mtp, small, write(tmp_path, {n: t for n, t in changed.items() if t is not None}))

    for names, what in (
        ({"enorm.weight": None}, "enorm.weight"),
        ({"self_attn.indexer.wk.weight": None}, "self_attn.indexer.wk.weight"),
        ({"mlp.experts.2.up_proj.weight": None}, "experts.2.up_proj"),
        ({"mlp.experts.7.up_proj.weight": None}, "experts.7.up_proj"),
        ({"self_attn.sinks": torch.ones(4)}, "self_attn.sinks"),
        ({"eh_proj.weight": torch.ones(64, 64)}, "eh_proj.weight"),
    ):
        code, said = found(**names)
        assert code == "CONFIG"
        assert what in said


def test_a_quantised_draft_layer_is_refused(small: Any, tmp_path: Path) -> None:
    whole = published(Mtp(small))
    whole["model.layers.4.eh_proj.weight"] = whole["model.layers.4.eh_proj.weight"].to(torch.float8_e4m3fn)
    assert refused(load_mtp, small, write(tmp_path, whole))[0] == "TYPE"


def test_a_folder_without_one_is_refused(small: Any, tmp_path: Path) -> None:
    assert refused(load_mtp, small, tmp_path / "nowhere")[0] == "CONFIG"
    save_file({"model.layers.3.enorm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    code, said = refused(load_mtp, small, tmp_path)
    assert code == "CONFIG"
    assert "model.layers.4." in said


def test_what_transformers_saves_has_no_draft_layer(small: Any, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    assert refused(load_mtp, small, tmp_path)[0] == "CONFIG"
