"""The installed backends as one object: each is probed once and asked for its kernels once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import PAIR, PIPE, TOYS, installed, kernel_of, published, raised, spec_of, stand_in, toy

from glm5_hal import use
from glm5_hal.backend import Device, Kernel, Unavailable
from glm5_hal.capability import dtype, limit, one_of, when
from glm5_hal.catalogue import Catalogue
from glm5_hal.plugins import PluginRecord
from glm5_hal.spec import Arg, Scalar


def test_a_backend_is_probed_once_and_asked_for_its_kernels_once() -> None:
    asked: list[str] = []

    def probe() -> Device:
        asked.append("probe")
        return Device("cpu", "a", "b")

    def kernels() -> Sequence[Kernel]:
        asked.append("kernels")
        return [kernel_of(PAIR)]

    with published(), installed(stand_in("acme", kernels, probe=probe)) as catalogue:
        threads = [threading.Thread(target=catalogue.providers, args=("acme",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert catalogue.providers("acme") == ("native", "composite")
    assert asked == ["probe", "kernels"]


def test_a_backend_that_fails_to_offer_kernels_is_asked_once_and_fails_alike() -> None:
    asked: list[str] = []

    def kernels() -> Sequence[Kernel]:
        asked.append("kernels")
        raise RuntimeError("no memory")

    with installed(stand_in("acme", kernels)) as catalogue:
        problems = [raised(catalogue.kernels, "acme", "rms_norm") for _ in range(3)]
    assert asked == ["kernels"]
    assert {(p.code, p.what) for p in problems} == {(problems[0].code, problems[0].what)}
    assert problems[0].code == "PLUGIN"
    assert "no memory" in problems[0].what


def test_providers_are_not_known_without_the_device() -> None:
    def kernels() -> Sequence[Kernel]:
        raise AssertionError("the kernels need the device")

    with installed(stand_in("acme", kernels, probe=lambda: Unavailable("no card", "plug it in"))) as catalogue:
        assert catalogue.providers("acme") is None


def test_an_unknown_backend_is_told_with_the_nearest() -> None:
    with installed(stand_in("acme"), stand_in("emca")) as catalogue:
        problem = raised(catalogue.record, "acmee")
    assert problem.code == "UNKNOWN"
    assert problem.fix == "did you mean 'acme'? known: acme, emca"


def test_of_two_records_of_a_name_the_one_in_order_answers() -> None:
    refused = PluginRecord("acme", "m", "d", "1", False, "refused", "BUILTIN_NAME", "taken", "rename")
    good = stand_in("acme")
    for records in ((refused, good), (good, refused)):
        with installed(*records) as catalogue:
            assert catalogue.record("acme") is good


def test_every_backend_has_the_composites() -> None:
    with published(), installed(stand_in("acme", [kernel_of(PAIR)])) as catalogue:
        (default,) = catalogue.kernels("acme", "toy_pipe")
    assert (default.provider, default.provides) == ("composite", frozenset(PIPE.attributes))


def test_what_the_kernels_are_called_says_nothing_about_other_ops() -> None:
    with published(), installed(stand_in("acme", [kernel_of(PAIR), kernel_of(TOYS["toy_write"])])) as catalogue:
        assert [k.op for k in catalogue.kernels("acme", "toy_pair")] == ["toy_pair"]


# Requirements are held against the op


@pytest.mark.parametrize(
    ("requirement", "words", "fix"),
    [
        (limit("kk", 3), "the value of 'kk'", "did you mean 'k'?"),
        (limit("Q", 3), "the value of 'Q'", "known: D, T"),
        (dtype("xx", "float32"), "the dtype of 'xx'", "did you mean 'x'?"),
        (dtype("k", "float32"), "the dtype of 'k'", "known: x, y"),
        (when(lambda c: True, "r", "f", reads=(("x", "color"),)), "the color of 'x'", "read among value, dtype"),
        (when(lambda c: True, "r", "f", reads=(("x", "value"),)), "the value of 'x'", "known: D, T"),
    ],
)
def test_a_requirement_on_something_that_the_op_has_not_would_never_bind_and_is_refused(
    requirement: Any, words: str, fix: str
) -> None:
    with published(), installed(stand_in("acme", [kernel_of(PAIR, requires=[requirement])])) as catalogue:
        problem = raised(catalogue.kernels, "acme", "toy_pair")
    assert problem.code == "CONTRACT"
    assert words in problem.what
    assert "plugin acme: kernel toy_pair of provider native" in problem.what
    assert fix in problem.fix


def _packed(x: Tensor, *, weight_format: str = "plain") -> Tensor:
    return x


def test_a_kernel_that_says_nothing_about_prepared_weights_takes_the_plain_form_only() -> None:
    spec = spec_of("toy_packed", _packed, (Arg("x", "T D", "F", ""),), scalars=(Scalar("weight_format", ""),))
    silent, knowing = kernel_of(spec), kernel_of(spec, "torch", requires=[one_of("weight_format", "plain", "nz")])
    with published(toy_packed=spec), installed(stand_in("acme", [silent, knowing])) as catalogue:
        first, second = catalogue.kernels("acme", "toy_packed")
    assert [r.describe() for r in first.requires] == ["weight_format in plain"]
    assert second.requires == knowing.requires


def test_the_installed_backends_are_discovered_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from glm5_hal import plugins

    asked: list[int] = []

    def find(given: Sequence[str]) -> tuple[PluginRecord, ...]:
        asked.append(1)
        return (stand_in("acme"),)

    monkeypatch.setattr(plugins, "find", find)
    catalogue = Catalogue()
    assert asked == []
    assert [r.name for r in catalogue.records] == [r.name for r in catalogue.records] == ["acme"]
    assert asked == [1]


def test_the_built_in_backend_takes_every_op() -> None:
    from glm5_hal.ops import specs

    catalogue = Catalogue()
    kernels = catalogue.all_kernels("cpu")
    assert {k.op for k in kernels if k.provider == "reference"} == set(specs())
    assert {k.op for k in kernels if k.provider in ("torch", "composite")} == set(specs())


def test_every_built_in_folder_is_announced(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2] / "backends"
    folders = {p.parent.name for p in root.glob("[a-z]*/__init__.py")}
    assert {r.name for r in Catalogue().records if r.builtin} == folders


class Odd:
    """A vendor's own requirement, and all of it wrong."""

    reads: Any = frozenset()

    def describe(self) -> str:
        raise ValueError("no words")

    def test(self, call: Any, facts: Any) -> Any:
        raise SystemExit(9)


@pytest.mark.parametrize("reads", [5, ["abc"], [("x",)], None])
def test_a_requirement_whose_reads_are_no_pairs_is_refused(reads: Any) -> None:
    odd = Odd()
    odd.reads = reads
    with published(), installed(stand_in("acme", [kernel_of(PAIR, requires=[odd])])) as catalogue:
        problem = raised(catalogue.kernels, "acme", "toy_pair")
    assert problem.code == "CONTRACT"
    assert "what 'Odd' reads is not known" in problem.what


def test_a_requirement_that_leaves_and_has_no_words_is_a_no() -> None:
    with published(), installed(stand_in("acme", [kernel_of(PAIR, requires=[Odd()])])), use("acme"):
        problem = raised(toy(PAIR), torch.ones(2, 3))
    assert problem.code == "NO_KERNEL"
    assert "its requirement 'Odd' raised SystemExit: 9" in str(problem)
