"""Gains and head weights come in the activations' dtype or in float32, as their documentation says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from glm5_hal.conformance.inputs import Draw
from glm5_hal.dispatch import op_named
from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.spec import FLOATS

WIDE = {
    "rms_norm": ({"weight"},),
    "add_rms_norm": ({"weight"},),
    "mla_prolog": ({"q_a_norm", "kv_a_norm"},),
    "indexer_prolog": ({"k_norm_weight", "k_norm_bias"}, {"w_weights"}),
}
CASES = [(op, group) for op, groups in WIDE.items() for group in groups]


def test_every_argument_that_says_so_is_here() -> None:
    said = {(spec.name, a.name) for spec in specs().values() for a in spec.args if "dtype or float32" in a.doc}
    assert said <= {(op, name) for op, group in CASES for name in group}
    assert len(said) == 5


@pytest.mark.parametrize(("op", "group"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(sorted(v)))
@pytest.mark.parametrize(("activations", "gain"), list(itertools.product(FLOATS, FLOATS)))
def test_no_other_dtype_is_taken(op: str, group: set[str], activations: str, gain: str) -> None:
    spec = specs()[op]
    args: dict[str, Any] = dict(spec.inputs(next(iter(spec.samples())), activations, Draw(0, op)).args)
    for name in group:
        args[name] = args[name].to(getattr(torch, gain))
    if gain in (activations, "float32"):
        op_named(op).describe(**args)
        return
    with pytest.raises(HalError) as refused:
        op_named(op).describe(**args)
    assert refused.value.code == "DTYPE"
    assert "or in float32" in (refused.value.fix or "")
