"""``torch.<type>`` of a stand-in: the part of torch.cuda's surface that backends, their probes and the suite use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .device import StandIn
from .watching import recorded, recording


class Stream:
    """Work is done when it is asked for: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Event:
    """It has no clock of the device's: times cannot be taken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Graph:
    """A device graph: what was captured is computed again, with what lies in its memory then."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def replay(self) -> None:
        for step in self.steps:
            step()


class Namespace(ModuleType):
    """What ``torch.<type>`` has."""

    Stream, Event = Stream, Event

    def __init__(self, device: StandIn, name: str, properties: dict[str, Any], capability: tuple[int, int]) -> None:
        super().__init__(f"torch.{device.type}")
        self._device, self._capability = device, capability
        self._properties = SimpleNamespace(name=name, total_memory=64 << 30, **properties)
        setattr(self, f"{device.type.upper()}Graph", Graph)
        self._default = Stream()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def init(self) -> None: ...

    def _lazy_init(self) -> None: ...

    def _lazy_call(self, call: Any, **kwargs: Any) -> None:
        call()

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return self._device.count

    def current_device(self) -> int:
        return self._device.current

    def set_device(self, device: Any) -> None:
        self._device.current = _number(device)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self._device.current
        self._device.current = before if device is None else _number(device)
        try:
            yield
        finally:
            self._device.current = before

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_name(self, device: Any = None) -> str:
        return str(self._properties.name)

    def get_device_properties(self, device: Any = None) -> Any:
        return self._properties

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self._capability

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def max_memory_allocated(self, device: Any = None) -> int:
        return 0

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def current_stream(self, device: Any = None) -> Stream:
        return self._default

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext(stream)

    def is_current_stream_capturing(self) -> bool:
        return recording() is not None

    @contextmanager
    def graph(self, graph: Graph, **kwargs: Any) -> Iterator[Graph]:
        with recorded() as graph.steps:
            yield graph


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of the device itself."""

    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def attach(space: Namespace, type: str) -> None:
    """Let torch.<type> be this namespace; of torch.cuda, which there is, what it has is replaced."""
    if type != "cuda":
        torch._register_device_module(type, space)
        torch._C._acc.register_python_privateuseone_hook(_Hooks())
        return
    for name in (n for n in vars(Namespace) if not n.startswith("__")):
        setattr(torch.cuda, name, getattr(space, name))
    torch.cuda.CUDAGraph = Graph
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")


def _number(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0
