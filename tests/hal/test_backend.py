"""What a plugin returns. A thing that contradicts itself cannot be made."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from toys import raised

from glm5_hal.backend import ATTRIBUTES, EVIDENCE, Backend, Device, Kernel, kernel, kernels_of
from glm5_hal.capability import dtype


def test_the_decorator_declares_and_registers_nothing() -> None:
    @kernel("rms_norm", "native", requires=[dtype("x", "float32")], provides=["deterministic"])
    def fast(x: Any) -> Any:
        return x

    assert isinstance(fast, Kernel)
    assert (fast.op, fast.provider, fast.provides) == ("rms_norm", "native", frozenset({"deterministic"}))
    assert fast.requires == (dtype("x", "float32"),)
    assert fast.fn(3) == 3


def test_kernels_of_modules_come_in_the_order_of_definition() -> None:
    one, two = ModuleType("one"), ModuleType("two")
    made = [Kernel("rope", provider, lambda: None) for provider in ("b", "a", "c")]
    one.first, one.helper, one.second, two.third = made[0], len, made[1], made[2]  # type: ignore[attr-defined]
    assert kernels_of(one, two) == tuple(made)


def test_an_attribute_that_nobody_can_ask_for_cannot_be_claimed() -> None:
    problem = raised(lambda: Kernel("rope", "native", print, provides=frozenset({"determinstic"})))
    assert problem.code == "CONTRACT"
    assert "determinstic" in problem.what
    assert all(name in problem.fix for name in ATTRIBUTES)


def test_what_is_not_a_requirement_cannot_be_required() -> None:
    problem = raised(lambda: Kernel("rope", "native", print, requires=("top_k <= 2048",)))  # type: ignore[arg-type]
    assert problem.code == "CONTRACT"
    assert problem.value == "top_k <= 2048"


def test_the_order_of_automatic_choice() -> None:
    order = ["native", "triton", "triton-invariant", "torch", "composite", "reference"]
    ranks = [Kernel("rope", provider, print).rank for provider in order]
    assert ranks == sorted(set(ranks))
    assert Kernel("rope", "anything_else", print).rank == ranks[0]


@pytest.mark.parametrize("name", ["", "Acme", "9acme", "acme torch", "acme:torch", None])
def test_a_name_that_no_policy_can_spell_is_refused(name: Any) -> None:
    assert raised(lambda: Backend(name, "cpu", print, list)).code == "CONTRACT"  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["probe", "kernels"])
def test_probe_and_kernels_are_functions(what: str) -> None:
    fields: dict[str, Any] = {"probe": print, "kernels": list, what: ()}
    problem = raised(lambda: Backend("acme", "cpu", **fields))
    assert problem.code == "CONTRACT"
    assert what in problem.what


def test_hal_api_is_one_version_or_a_range() -> None:
    assert Backend("acme", "cpu", print, list).api_range == (1, 1)  # type: ignore[arg-type]
    assert Backend("acme", "cpu", print, list, hal_api=(1, 3)).api_range == (1, 3)  # type: ignore[arg-type]


def test_evidence_is_one_of_five_and_a_device_is_hardware_unless_it_says_otherwise() -> None:
    assert Device("cpu", "a", "b").evidence == "hardware" == EVIDENCE[0]
    problem = raised(lambda: Device("cpu", "a", "b", evidence="certain"))
    assert problem.code == "CONTRACT"


def test_facts_are_the_devices() -> None:
    facts = Device("cpu", "a", "a1", versions={"sdk": "1"}, features=frozenset({"fp8"})).facts
    assert (facts.arch, facts.versions, facts.features) == ("a1", {"sdk": "1"}, frozenset({"fp8"}))
