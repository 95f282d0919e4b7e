"""A module of which only the weight would be read, and the rest dropped, is refused."""

from __future__ import annotations

from typing import Any

import pytest
from small import SIZES, model
from torch import nn

from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import Mtp, apply


class Wrapped(nn.Module):
    """An adapter as PEFT makes them: no linear layer, but something with a weight around one, and more beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    def forward(self, *args: Any) -> Any:
        return self.base_layer(*args)


@pytest.mark.parametrize(
    "path",
    [
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.up_proj",
        "layers.0.mlp.down_proj",
        "layers.1.mlp.shared_experts.up_proj",
        "layers.1.mlp.gate",
        "layers.1.mlp.experts",
        "layers.2.self_attn.indexer.wq_b",
        "layers.2.self_attn.indexer.wk",
        "layers.2.self_attn.indexer.weights_proj",
        "layers.2.self_attn.indexer.k_norm",
        "layers.2.self_attn.q_a_proj",
        "layers.3.input_layernorm",
        "norm",
    ],
)
def test_adapters_are_refused_wherever_they_are(path: str) -> None:
    small, (parent, _, name) = model("glm"), path.rpartition(".")
    holder = small.model.get_submodule(parent)
    setattr(holder, name, Wrapped(getattr(holder, name)))
    with pytest.raises(HalError, match=path) as found:
        apply(small)
    assert found.value.code == "TYPE"


def test_biases_that_no_configuration_speaks_of_are_refused() -> None:
    small = model("glm")
    small.model.layers[0].mlp.up_proj = nn.Linear(SIZES["hidden_size"], SIZES["intermediate_size"])
    with pytest.raises(HalError, match="bias") as found:
        apply(small)
    assert found.value.code == "CONFIG"


def test_an_adapter_in_the_draft_layer_is_refused_too() -> None:
    mtp = Mtp(apply(model("glm")))
    mtp.layer.self_attn.indexer.wk = Wrapped(mtp.layer.self_attn.indexer.wk)
    with pytest.raises(HalError, match=r"indexer\.wk") as found:
        mtp.derive()
    assert found.value.code == "TYPE"
