"""The truth and the honest emulation of one case: both runs of the op's reference, on private copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glm5_hal.ops._common.precision import exact
from glm5_hal.ops._common.references import reference_of
from glm5_hal.spec import OpSpec


@dataclass(frozen=True)
class Run:
    """What one execution gave: outputs by name, and the mutated arguments afterwards."""

    outs: Mapping[str, torch.Tensor]
    mutated: Mapping[str, torch.Tensor]


def truth(spec: OpSpec, args: Mapping[str, Any]) -> Run:
    """The reference in float64, nothing rounded. Float caches become float64, so that stores lose nothing either."""
    private = copied(spec, args)
    for name in spec.mutates:
        if private[name] is not None and private[name].is_floating_point():
            private[name] = private[name].double()
    with exact(), torch.inference_mode():
        return collect(spec, reference_of(spec.name)(**private), private)


def emulation(spec: OpSpec, args: Mapping[str, Any]) -> Run:
    """An honest run in the storage dtype, with the loosest roundings that the contract permits."""
    private = copied(spec, args)
    with torch.inference_mode():
        return collect(spec, (spec.emulate or reference_of(spec.name))(**private), private)


def copied(spec: OpSpec, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with private copies of what the op writes."""
    return {k: v.clone() if k in spec.mutates and v is not None else v for k, v in args.items()}


def collect(spec: OpSpec, returned: Any, args: Mapping[str, Any]) -> Run:
    values = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
    outs = dict(zip((o.name for o in spec.outs), values, strict=True))
    return Run(outs, {name: args[name] for name in spec.mutates if args[name] is not None})
