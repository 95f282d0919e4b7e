"""What the tests of the torch kernels share: running a kernel on an op's samples, and judging it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal.backend import Kernel
from glm5_hal.backends._torch import attention, caches, indexer
from glm5_hal.capability import Facts
from glm5_hal.conformance import oracle
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import accuracy, poison
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Expected, Trial
from glm5_hal.ops import specs
from glm5_hal.spec import Inputs, Sample


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The shapes here are too small to share, and barriers between busy cores are slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the smoke samples have many, with ragged last ones, none a multiple of a page."""
    for module, name, value in (
        (attention, "KEYS", 5),
        (attention, "TOKENS", 2),
        (attention, "PREFILL_QUERIES", 4),
        (attention, "PREFILL_KEYS", 7),
        (attention, "PREFILL_HEADS", 2),
        (indexer, "KEYS", 5),
        (indexer, "TOKENS", 2),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def far_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take the CPU for a device whose memory the host has to wait for."""
    monkeypatch.setattr(caches, "HOST_MEMORY", set())


def smoke(op: str) -> list[Sample]:
    return [s for s in specs()[op].samples() if s.level == "smoke"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``sample`` and ``dtype`` of a test class that names its ``op``: every smoke sample, in float64 too."""
    op = getattr(metafunc.cls, "op", None)
    if op is None or "sample" not in metafunc.fixturenames:
        return
    if "dtype" in metafunc.fixturenames:
        points = [(s, d) for s in smoke(op) for d in (*s.dtypes, "float64") if not (s.fill == "exact" and d == "float64")]
        metafunc.parametrize("sample, dtype", points, ids=[f"{s.id}-{d}" for s, d in points])
    else:
        metafunc.parametrize("sample", smoke(op), ids=lambda s: s.id)


class Bench:
    """Runs one kernel and judges what it gives."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.spec = kernel, specs()[kernel.op]

    def inputs(self, sample: Sample, dtype: str) -> Inputs:
        return self.spec.inputs(sample, dtype, Draw(0, f"{self.spec.name} {sample.id}"))

    def run(self, args: dict[str, Any]) -> Run:
        private = oracle.copied(self.spec, args)
        with torch.inference_mode():
            return oracle.collect(self.spec, self.kernel.fn(**private), private)

    def passes(self, sample: Sample, dtype: str) -> None:
        """Within the budget of the conformance suite, and unmoved by poison in what must not be read."""
        inputs = self.inputs(sample, dtype)
        expected = Expected(oracle.truth(self.spec, inputs.args), oracle.emulation(self.spec, inputs.args))
        trial = Trial(
            Case(self.spec.name, dtype, sample), inputs, self.kernel, self.kernel.fn, "cpu", expected, Facts()
        )
        with torch.inference_mode():
            for finding in (accuracy.judge(trial, trial.first), poison.check(trial)):
                assert finding.ok is not False, finding.detail


@pytest.fixture
def bench() -> type[Bench]:
    return Bench


class Waits(TorchDispatchMode):
    """Fails at the first operation for which the host would have to wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean_index = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select") and not boolean_index, f"{func} waits"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def never_waits() -> Callable[[], Any]:
    @contextmanager
    def watch() -> Iterator[None]:
        with Waits():
            yield

    return watch
