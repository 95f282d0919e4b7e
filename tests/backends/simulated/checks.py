"""What a stand-in device does, as checks that are run in a process of their own: a process has one device.

python checks.py TYPE    prints one JSON object: of each check "" or what is wrong
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[3] / "ci"))

from simulated.device import install
from simulated.namespace import Namespace, attach
from simulated.watching import HiddenReadError, watched

TYPE = sys.argv[1]
DEVICE = install(TYPE)


def numbers(*size: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(size).numel()).view(size)


def refused(call: Callable[[], Any], kind: type[BaseException] = RuntimeError) -> str:
    try:
        call()
    except kind as problem:
        return str(problem)
    raise AssertionError("accepted")


# --- tensors ---------------------------------------------------------------------------------------------------------


def results_stay_on_the_device_with_the_cpus_numbers() -> None:
    a, b = numbers(4, 6), numbers(6, 4) / 7
    for what in (
        lambda a, b: a @ b,
        lambda a, b: (a * 1.5 + 2).softmax(-1),
        lambda a, b: torch.cat([a, b.t()]).sort(descending=True).values,
        lambda a, b: a.bfloat16().float().topk(3).indices,
        lambda a, b: torch.nn.functional.rms_norm(a, (6,)).to(torch.float8_e4m3fn).view(torch.uint8),
        lambda a, b: torch.where(a > 5, a, 0.0)[1:, ::2].cumsum(1),
        lambda a, b: torch.zeros_like(a).index_copy_(0, torch.tensor([2, 0], device=a.device), a[:2]),
        lambda a, b: torch.arange(3, device=a.device) + torch.full((3,), 2, device=a.device),
    ):
        there = what(a.to(TYPE), b.to(TYPE))
        assert there.device == torch.device(TYPE, 0), there.device
        assert torch.equal(there.cpu(), what(a, b))


def views_share_memory_and_keep_strides() -> None:
    x = numbers(4, 4).to(TYPE)
    t = x.t()[1:]
    assert t.stride() == (1, 4)
    assert t.data_ptr() == x.data_ptr() + 4
    assert t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    t.fill_(0)
    assert x.cpu()[:, 1:].sum() == 0
    whole = torch.empty(0, dtype=torch.uint8, device=TYPE).set_(x.untyped_storage())
    assert whole.shape == (64,)


def a_second_device_has_its_number() -> None:
    x = torch.ones(2, device=f"{TYPE}:1")
    assert (x + 1).device == torch.device(TYPE, 1)
    module = getattr(torch, TYPE)
    with module.device(1):
        assert module.current_device() == 1
        assert torch.empty(1, device=TYPE).device.index == 1
    assert torch.empty(1, device=TYPE).device.index == 0


def tensors_of_two_devices_do_not_mix() -> None:
    x = torch.ones(2, 2, device=TYPE)
    for other in (torch.ones(2, 2), torch.ones(2, 2, device=f"{TYPE}:1")):
        for call in (lambda o: x + o, lambda o: x @ o, lambda o: torch.cat([x, o]), lambda o: x.lerp_(o, 0.5)):
            said = refused(lambda: call(other))  # noqa: B023 - called at once
            assert "device" in said, said


def a_single_number_of_the_host_may_come_and_so_may_an_index() -> None:
    x = torch.ones(2, device=TYPE)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3]
    assert x[torch.tensor([0])].device.type == TYPE


def numpy_does_not_take_them() -> None:
    assert "numpy" in refused(lambda: torch.ones(2, device=TYPE).numpy(), TypeError)


def memory_is_given_back() -> None:
    import resource

    for _ in range(200):
        torch.empty(1 << 21, dtype=torch.uint8, device=TYPE).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        torch.empty(1 << 21, dtype=torch.uint8, device=TYPE).fill_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def memory_is_as_large_as_its_tensor() -> None:
    for size in (0, 1, 3, 100):
        assert torch.empty(size, dtype=torch.int16, device=TYPE).untyped_storage().nbytes() == 2 * size


# --- what leaves the device ------------------------------------------------------------------------------------------

READS: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "cpu": ("copy", lambda x: x.cpu()),
    "to": ("copy", lambda x: x.to("cpu", torch.float64)),
    "copy_": ("copy", lambda x: torch.empty(2).copy_(x)),
    "tolist": ("copy", lambda x: x.tolist()),
    "item": ("value", lambda x: x[0].item()),
    "bool": ("value", lambda x: bool((x > 0).all())),
    "float": ("value", lambda x: float(x.sum())),
    "equal": ("value", lambda x: torch.equal(x, x)),
    "nonzero": ("size", lambda x: x.nonzero()),
    "mask": ("size", lambda x: x[x > 1]),
}


def every_way_to_the_host_is_seen_with_its_line() -> None:
    x = numbers(2).to(TYPE)
    for name, (kind, read) in READS.items():
        with watched() as seen:
            read(x)
        assert kind in {r.kind for r in seen}, f"{name}: {seen}"
        assert all(r.site.startswith(f"{__file__}:") for r in seen), f"{name}: {seen}"
        line = Path(__file__).read_text(encoding="utf-8").splitlines()[int(seen[0].site.rpartition(":")[2]) - 1]
        assert f'"{name}"' in line, line


def and_refused_where_that_is_asked_for() -> None:
    x = numbers(2).to(TYPE)
    for name, (kind, read) in READS.items():
        with watched(strict=True, why="not here"):
            said = refused(lambda: read(x), HiddenReadError)  # noqa: B023 - called at once
        assert said.startswith(f"not here; {kind}: "), (name, said)
    assert x.tolist() == [1, 2]


def what_stays_is_not_seen() -> None:
    x = numbers(2).to(TYPE)
    with watched(strict=True) as seen:
        y = (x * 2 + 1).clone()
        y[torch.tensor([0], device=TYPE)] = x[:1]
        torch.zeros(2, device=TYPE).copy_(y).masked_fill_(y > 1, 0.0)
        y.to(torch.bfloat16).shape[0]
    assert not seen


def another_thread_is_not_watched() -> None:
    x, done = numbers(2).to(TYPE), []
    with watched(strict=True) as seen:
        thread = threading.Thread(target=lambda: done.append(x.tolist()))
        thread.start()
        thread.join()
    assert done
    assert not seen


# --- a library for the device ----------------------------------------------------------------------------------------


def a_library_computes_in_the_devices_memory_and_takes_nothing_of_the_host() -> None:
    def scaled_into(out: torch.Tensor, x: torch.Tensor, by: float) -> torch.Tensor:
        assert x.device.type == out.device.type == "cpu"
        out.copy_(x * by)
        return x.sum()

    call, x = DEVICE.hosted(scaled_into), numbers(3).to(TYPE)
    out = torch.zeros(3, device=TYPE)
    with watched(strict=True):
        total = call(out, x, by=2.0)
    assert out.tolist() == [2, 4, 6]
    assert (total.device.type, total.item()) == (TYPE, 6)
    assert "scaled_into was given torch.float32 [3] of cpu" in refused(lambda: call(torch.zeros(3), x, 2.0))


# --- torch.<type> ----------------------------------------------------------------------------------------------------


def torch_has_its_module() -> None:
    module = getattr(torch, TYPE)
    assert module.is_available()
    assert module.device_count() == 2
    assert module.get_device_name(0) == "a stand-in"
    assert module.get_device_properties(0).gcnArchName == "gfx0"
    assert module.get_device_capability(0) == (3, 1)
    module.synchronize()
    stream, event = module.Stream(), module.Event(enable_timing=True)
    with module.stream(stream):
        event.record(stream)
    module.current_stream().wait_stream(stream)
    assert torch.accelerator.current_accelerator() == torch.device(TYPE)


def a_graph_computes_with_what_lies_in_its_inputs() -> None:
    module, x = getattr(torch, TYPE), numbers(3).to(TYPE)
    graph, kept = getattr(module, f"{TYPE.upper()}Graph")(), torch.zeros(3, device=TYPE)
    with module.graph(graph):
        assert module.is_current_stream_capturing()
        y = torch.logsumexp((x * 2).view(1, 3), 1)
        kept.add_(x[:1])
    x.copy_(torch.tensor([5.0, 6.0, 7.0]))
    graph.replay()
    assert torch.equal(y.cpu(), torch.logsumexp(torch.tensor([[10.0, 12.0, 14.0]]), 1))
    assert kept.tolist() == [6, 6, 6]
    assert not module.is_current_stream_capturing()


def a_graph_takes_nothing_from_the_host_and_gives_nothing_to_it() -> None:
    module, x = getattr(torch, TYPE), numbers(3).to(TYPE)
    for call in (x.tolist, lambda: x.copy_(torch.ones(3)), lambda: torch.tensor([1.0], device=TYPE)):
        with module.graph(getattr(module, f"{TYPE.upper()}Graph")()):
            assert "captured" in refused(call, HiddenReadError)


def main() -> None:
    attach(Namespace(DEVICE, "a stand-in", {"gcnArchName": "gfx0"}, (3, 1)), TYPE)
    said: dict[str, str] = {}
    for name, check in list(globals().items()):
        if callable(check) and getattr(check, "__module__", "") == "__main__" and not check.__code__.co_argcount:
            try:
                if name not in ("main", "numbers"):
                    said[name] = check() or ""
            except Exception:  # noqa: BLE001 - told to whoever runs this
                said[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
