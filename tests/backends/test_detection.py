"""Two vendors' software on one machine: the backend of the one that runs answers, all others say why not, and none
starts a driver that is not its own. And an SDK that is broken breaks its own backend alone."""

from __future__ import annotations

from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from machines import IDENTITIES, machine

from glm5_hal.backend import Device, Unavailable

BACKENDS = ("cuda", "ascend", "musa", "hygon", "cambricon", "kunlunxin", "metax", "enflame")

#: Those that are met in pairs.
VENDORS = ("nvidia", "amd", "ascend", "musa", "hygon", "cambricon", "kunlunxin", "metax", "enflame")

#: Two installed, and which of them runs, if any.
PAIRS = [(pair, runs) for pair in combinations(VENDORS, 2) for runs in (*pair, None)]

#: An AMD build where Hygon's status command is on the path: it is taken for one of Hygon's that was built from source.
AMD_TAKEN = pytest.mark.xfail(strict=True, reason="a HIP build that says rocm is Hygon's where hy-smi is")


def pairs(*taken: str | None) -> list[Any]:
    """``taken``: what runs where an AMD build is mistaken."""
    return [
        pytest.param(
            pair, runs, marks=AMD_TAKEN if pair == ("amd", "hygon") and runs in taken else (), id=named(pair, runs)
        )
        for pair, runs in PAIRS
    ]


def named(pair: tuple[str, str], runs: str | None) -> str:
    return f"{' and '.join(pair)}, {runs or 'none'} runs"


def probe(backend: str) -> Device | Unavailable:
    found: Device | Unavailable = import_module(f"glm5_hal.backends.{backend}").glm5_backend().probe()
    return found


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


@pytest.fixture
def empty(tools: Path) -> Path:
    """The same folder each time: as fast as none."""
    for tool in tools.iterdir():
        tool.unlink()
    return tools


def check_refusal(found: Device | Unavailable, backend: str) -> None:
    assert isinstance(found, Unavailable), f"{backend} takes {found}"
    assert found.reason, backend
    assert found.fix, backend
    assert "the probe raised" not in found.reason


def check_device(found: Device | Unavailable, runs: str) -> None:
    assert isinstance(found, Device), found
    identity = IDENTITIES[runs]
    assert (found.type, found.count, found.evidence) == (identity.type, 2, "hardware")
    assert identity.name in found.name
    assert found.arch
    assert found.versions["torch"] == identity.torch


@pytest.mark.parametrize("runs", IDENTITIES)
def test_alone_a_device_is_its_vendors(runs: str, empty: Path) -> None:
    for backend in BACKENDS:
        with machine([runs], runs, tools=empty):
            found = probe(backend)
        if backend == IDENTITIES[runs].backend:
            check_device(found, runs)
        else:
            check_refusal(found, backend)


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
@pytest.mark.parametrize(("pair", "runs"), pairs("amd", None))
def test_of_two_the_one_that_runs_answers(pair: tuple[str, str], runs: str | None, loaded: bool, empty: Path) -> None:
    owner = IDENTITIES[runs].backend if runs else ""
    for backend in BACKENDS:
        with machine(pair, runs, tools=empty, loaded=loaded) as asked:
            found = probe(backend)
        if backend == owner:
            check_device(found, runs or "")
        else:
            check_refusal(found, backend)
        assert {whose for whose, _ in asked} <= {backend}, f"{backend} asked {asked}"


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("pair", "runs"), pairs("amd"))
def test_asked_one_after_the_other_in_one_process_they_say_the_same(
    pair: tuple[str, str], runs: str | None, order: int, empty: Path
) -> None:
    owner = IDENTITIES[runs].backend if runs else ""
    with machine(pair, runs, tools=empty):
        found = {backend: probe(backend) for backend in BACKENDS[::order]}
    assert [backend for backend, answer in found.items() if isinstance(answer, Device)] == [owner][: bool(owner)]
