"""What a worker says of itself before it judges anything: only there is the backend loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm5_hal.backend import Device
from glm5_hal.conformance.target import Target
from glm5_hal.conformance.waivers import shipped
from glm5_hal.plugins.child import decoded, encoded


@dataclass(frozen=True)
class Greeting:
    """What is judged there, which backend, device and code that is (`identity.of_backend`), how many threads torch has,
    and the file and text of the waivers that the backend ships."""

    targets: tuple[Target, ...]
    identity: Mapping[str, Any]
    threads: int
    waivers: tuple[str, str]


def said(judged: Sequence[Target], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The message of a worker that judges these."""
    import torch

    return {
        "hello": os.getpid(),
        "backend": judged[0].backend,
        "providers": [t.provider for t in judged],
        "device": judged[0].device,
        "facts": encoded(judged[0].facts),
        "identity": identity,
        "threads": torch.get_num_threads(),
        "waivers": shipped(judged[0].backend),
    }


def heard(message: Mapping[str, Any], plugin: str) -> Greeting:
    """The inverse, for a worker that was told of ``plugin``. Raises ValueError, TypeError or KeyError."""
    facts, (file, text) = decoded(message["facts"]), message["waivers"]
    if not isinstance(facts, Device):
        raise ValueError("no device")
    targets = tuple(Target(message["backend"], p, message["device"], facts, plugin) for p in message["providers"])
    return Greeting(targets, message["identity"], int(message["threads"]), (str(file), str(text)))
