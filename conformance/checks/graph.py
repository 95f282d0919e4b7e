"""Captured once into a device graph, a kernel that claims ``graph_safe`` computes with whatever lies in its inputs when
the graph is replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from glm5_hal.conformance.checks.agreement import as_good
from glm5_hal.conformance.trial import Finding, Trial

Call = Callable[[], Any]

#: Captures a call: gives what replays it, and what it returned.
Recorder = Callable[[Call], tuple[Callable[[], None], Any]]


def check(trial: Trial) -> Finding:
    if "graph_safe" not in trial.kernel.provides:
        return Finding(None, "the kernel does not claim graph_safe")
    record = recorder_of(trial.device)
    if record is None:
        return Finding(None, f"{trial.device} has no graphs")
    placed = trial.place(trial.other or trial.inputs.args)
    replay, returned = record(lambda: trial.call(**placed))
    for judged in (trial, trial.turned, trial):
        if judged is None:
            continue
        for name, value in placed.items():
            if isinstance(value, torch.Tensor):
                value.copy_(judged.inputs.args[name])
        replay()
        finding = as_good(judged, trial.bring_back(returned, placed), "replayed on other inputs")
        if finding.failed:
            return finding
    return Finding(True)


def recorder_of(device: str) -> Recorder | None:
    """How a device captures graphs, None where it does not: torch's own class for it, or that of its torch module
    (``torch.<type>.<TYPE>Graph``), as older versions and vendors' builds have it."""
    kind = device.split(":")[0]
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    if accelerator is None or accelerator.type != kind:
        return None
    module = getattr(torch, kind, None)
    make = getattr(module, f"{kind.upper()}Graph", None)
    if make is not None:
        return lambda call: _captured(call, make(), module)
    if hasattr(torch.accelerator, "Graph"):
        return lambda call: _captured(call, torch.accelerator.Graph(), None)
    return None


def _captured(call: Call, graph: Any, module: Any) -> tuple[Callable[[], None], Any]:
    stream = torch.Stream() if module is None else module.Stream()
    current = torch.accelerator.current_stream() if module is None else module.current_stream()
    stream.wait_stream(current)
    with stream if module is None else module.stream(stream):
        for _ in range(2):  # what is made at a kernel's first call is not part of the graph
            call()
    current.wait_stream(stream)
    with ExitStack() as capturing:
        for context in (stream, graph) if module is None else (module.graph(graph),):
            capturing.enter_context(context)
        returned = call()
    return graph.replay, returned
