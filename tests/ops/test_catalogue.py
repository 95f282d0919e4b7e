"""Every op's declaration is complete, and what is derived from it exists."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from glm5_hal import ops, torchlib, use
from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw, digest
from glm5_hal.dispatch import op_named
from glm5_hal.errors import HalError
from glm5_hal.metadata import bind_axes, bind_dtypes, out_shapes
from glm5_hal.ops import names, specs
from glm5_hal.ops._common.costs import cost_of
from glm5_hal.ops._common.references import reference_of
from glm5_hal.spec import LEVELS, OpSpec, Sample

ROOT = Path(__file__).resolve().parents[2]

CATALOGUE = {
    "elementary": {"rms_norm", "add_rms_norm", "rope", "silu_and_mul", "hadamard"},
    "mla": {"mla_prefill", "mla_decode", "mla_cache_write", "mla_prolog"},
    "dsa": {"index_cache_write", "indexer_logits", "topk_indices", "lightning_indexer", "sparse_mla", "indexer_prolog"},
    "moe": {"moe_route", "moe_permute", "grouped_gemm", "moe_combine", "moe_experts"},
}

every_op = pytest.mark.parametrize("spec", specs().values(), ids=list(specs()))


def smoke(spec: OpSpec) -> list[Sample]:
    return [s for s in spec.samples() if s.level == "smoke"]


def axes_of(spec: OpSpec, args: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {n: None if args[n] is None else tuple(args[n].shape) for n in spec.tensors}
    return bind_axes(spec, shapes, {n: args[n] for n in spec.options})


def test_the_catalogue_is_whole() -> None:
    found: dict[str, set[str]] = {}
    for spec in specs().values():
        found.setdefault(spec.group, set()).add(spec.name)
    assert found == CATALOGUE


@every_op
def test_a_file_is_named_after_its_op_and_nothing_else_names_it(spec: OpSpec) -> None:
    assert (ROOT / f"ops/_{spec.name}.py").exists()
    assert spec.reference.__name__ == spec.name
    assert spec.name in names()
    assert spec.name in dir(ops)


@every_op
def test_every_part_of_the_declaration_is_filled_in(spec: OpSpec) -> None:
    assert len(spec.doc.splitlines()[0]) > 20
    assert spec.rounding
    assert spec.source
    assert spec.attributes
    assert all(a.doc for a in (*spec.args, *spec.scalars, *spec.outs))
    assert spec.since >= 1


@every_op
def test_samples_are_distinct_and_reach_both_daily_levels(spec: OpSpec) -> None:
    samples = list(spec.samples())
    assert len({s.id for s in samples}) == len(samples)
    assert {s.level for s in samples} >= set(LEVELS[:2])
    assert any("edge" in s.tags for s in samples)
    assert any("glm5" in s.tags for s in samples)
    assert {d for s in smoke(spec) for d in s.dtypes} >= {"float32", "bfloat16", "float16"} & set().union(
        *spec.dtypes.values()
    )


@every_op
def test_the_oracle_and_the_emulation_have_the_declared_form(spec: OpSpec) -> None:
    for sample in smoke(spec):
        args = spec.inputs(sample, sample.dtypes[0], Draw(0, sample.id)).args
        before = digest(args)
        dtypes = bind_dtypes(spec, {n: None if args[n] is None else str(args[n].dtype)[6:] for n in spec.tensors})
        declared = out_shapes(spec, axes_of(spec, args), dtypes)
        truth, honest = oracle.truth(spec, args), oracle.emulation(spec, args)
        for out, (shape, dtype) in zip(spec.outs, declared, strict=True):
            b, y = honest.outs[out.name], truth.outs[out.name]
            assert tuple(b.shape) == tuple(y.shape) == tuple(shape), (sample.id, out.name)
            assert str(b.dtype)[6:] == dtype, (sample.id, out.name)
            assert y.dtype == (torch.float64 if b.is_floating_point() else b.dtype), (sample.id, out.name)
        assert digest(args) == before, f"{sample.id} changed its inputs"


@every_op
def test_the_reference_is_correct_in_float64(spec: OpSpec) -> None:
    sample = smoke(spec)[0]
    args = spec.inputs(sample, "float32", Draw(0, sample.id)).args
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in args.items()}
    wide = oracle.copied(spec, wide)
    plain, exact = oracle.collect(spec, reference_of(spec.name)(**wide), wide), oracle.truth(spec, args)
    for name, out in plain.outs.items():
        assert torch.allclose(out.double(), exact.outs[name].double(), rtol=1e-11, atol=1e-11, equal_nan=True), name


@every_op
def test_every_sample_has_a_cost(spec: OpSpec) -> None:
    for sample in smoke(spec):
        args = spec.inputs(sample, sample.dtypes[0], Draw(0, sample.id)).args
        cost = cost_of(spec, args, sample.dtypes[0])
        assert cost.flops >= 0
        assert cost.bytes >= 0


@every_op
def test_the_torch_schema_marks_exactly_what_is_written(spec: OpSpec) -> None:
    schema = torchlib.schema(spec)
    assert schema.count("!") == len(spec.mutates)
    for name in spec.mutates:
        assert any("!" in part and part.split("=")[0].endswith(f" {name}") for part in schema.split(", "))


@every_op
def test_inputs_repeat_for_a_seed_and_differ_between_seeds(spec: OpSpec) -> None:
    sample = max(smoke(spec), key=lambda s: "edge" not in s.tags)
    digests = [digest(spec.inputs(sample, "float32", Draw(seed, "x")).args) for seed in (0, 0, 1)]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def one_of_each_format(spec: OpSpec) -> Mapping[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for sample in smoke(spec):
        args = spec.inputs(sample, sample.dtypes[0], Draw(0, spec.name)).args
        found.setdefault(args.get("cache_format", ""), dict(args))
    return found


def in_dtypes(spec: OpSpec, args: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, Any]:
    kinds = {a.name: getattr(torch, dtypes.get(a.dtype, a.dtype)) for a in spec.args}
    return {n: v.to(kinds[n]) if isinstance(v, torch.Tensor) else v for n, v in args.items()}


@every_op
@pytest.mark.parametrize("provider", ["cpu:torch", "cpu:reference"])
def test_whatever_dtypes_are_declared_together_are_computed(spec: OpSpec, provider: str) -> None:
    computed = 0
    for args in one_of_each_format(spec).values():
        for kinds in itertools.product(*spec.dtypes.values()):
            call = in_dtypes(spec, args, dict(zip(spec.dtypes, kinds, strict=True)))
            try:
                op_named(spec.name).describe(**call)
            except HalError:
                continue
            with use(provider):
                op_named(spec.name)(**call)
            computed += 1
    assert computed >= len(one_of_each_format(spec))
