"""Mutants of our own source: put in place and taken out, known by what they change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm5_hal import ops
from glm5_hal.conformance.mutants import mechanical, stand_in


def one(at: str, after: str) -> mechanical.Mechanical:
    (found,) = (m for m in mechanical.all_mutants() if m.at == at and m.mutation.after == after)
    return found


def test_every_op_has_a_kernel_that_is_mutated() -> None:
    assert set(mechanical.kernels()) == set(ops.names())


def test_ids_say_where_and_are_unique() -> None:
    ids = [m.id for m in mechanical.all_mutants()]
    assert len(set(ids)) == len(ids)
    assert mechanical.find(ids[0]).id == ids[0]
    module, line, column, operator = ids[0].split(":")
    assert module in mechanical.sources()
    assert line.isdigit()
    assert column.isdigit()
    assert operator


def test_a_mutant_is_in_place_for_a_while_and_for_all_who_call_it() -> None:
    mutant = one("elementary.rope", "ya.copy_(a * c + b * s)")
    x, turn = torch.ones(2, 4), torch.full((2, 2), 0.5)
    rope = mechanical.kernels()["rope"]
    right = rope(x, turn, turn)
    with mechanical.in_place(mutant):
        assert not torch.equal(rope(x, turn, turn), right)
    assert torch.equal(rope(x, turn, turn), right)


def test_a_method_and_a_composite_can_be_mutated() -> None:
    for mutant in mechanical.all_mutants():
        if mutant.module in ("caches", "_mla_prolog"):
            with mechanical.in_place(mutant):
                pass


def test_lines_count_as_executed_only_where_a_kernel_runs_them() -> None:
    cases = stand_in.good_cases("rope")[:1]
    (lines,) = mechanical.executed("rope", cases, lambda c: stand_in.subject_of(c, 0).inputs.args).values()
    of = {m.mutation.function: {f"elementary:{n}" for n in range(m.mutation.lines[0], m.mutation.lines[1] + 1)}
          for m in mechanical.all_of("elementary")}  # fmt: skip
    assert of["rope"] & set(lines)
    assert not of["hadamard"] & set(lines)


def test_every_argument_is_about_a_mutant_that_exists() -> None:
    found = mechanical.equivalents()
    assert found.stale == ()
    assert all(len(why) > 20 for why in found.why.values())


@pytest.mark.parametrize("before", ["ya.copy_(a * c - b * s)", "ya.copy_(a * c - b * s * 2)"])
def test_an_argument_about_code_that_has_changed_is_stale(tmp_path: Path, before: str) -> None:
    page = tmp_path / "equivalents.toml"
    page.write_text(
        f'[[equivalent]]\nat = "elementary.rope"\nwhy = "an example"\nbefore = "{before}"\n'
        'after = ["ya.copy_(a * c + b * s)"]\n'
    )
    found = mechanical.equivalents(page)
    assert bool(found.stale) == (before != "ya.copy_(a * c - b * s)")
    assert len(found.why) + len(found.stale) == 1
