"""What is judged, and what a result of it says before anything has run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from glm5_hal import context
from glm5_hal.backend import Device, Unavailable
from glm5_hal.conformance.cases import Case
from glm5_hal.errors import HalError, suggest


@dataclass(frozen=True)
class Target:
    """What is judged: one provider of one backend, on one of its devices."""

    backend: str
    provider: str
    device: str
    facts: Device
    plugin: str = ""

    @property
    def policy(self) -> str:
        return f"{self.backend}:{self.provider}"


def targets(backend: str, device: str | None = None, plugin: str = "") -> list[Target]:
    """What ``--backend B[:provider]`` names: one provider, or all of the backend's. ``plugin`` says where a backend
    comes from that is not installed; without a backend's name it is the one that is judged.

    Raises:
        HalError: UNKNOWN for a name that does not exist, UNAVAILABLE where the device is not there.
    """
    given = context.include(plugin) if plugin else None
    catalogue = context.catalogue()
    name, _, provider = backend.partition(":")
    record = given if given and name in ("", given.name) else catalogue.record(name)
    name = record.name
    if record.status != "ok":
        whose = f"backend {name}" if name else record.origin
        raise HalError("PLUGIN", f"{whose}: {record.reason}", value=name, fix=record.fix)
    facts = catalogue.device(name)
    if isinstance(facts, Unavailable):
        raise HalError("UNAVAILABLE", f"backend {name}: {facts.reason}", value=name, fix=facts.fix)
    found = [p for p in catalogue.providers(name) or () if p != "composite"]
    if not found:
        raise HalError(
            "NO_KERNEL", f"backend {name} has no kernel of its own", value=name, fix="list some in kernels()"
        )
    if provider and provider not in found:
        raise HalError(
            "UNKNOWN", f"backend {name} has no provider {provider!r}", value=provider, fix=suggest(provider, found)
        )
    if device is not None and device.split(":")[0] != facts.type:
        raise HalError(
            "DEVICE",
            f"backend {name} computes on {facts.type}, not on {device}",
            value=device,
            fix=f"use {facts.type}:0",
        )
    return [Target(name, p, device or facts.type, facts, plugin) for p in ([provider] if provider else found)]


def fields_of(case: Case, target: Target, seed: int) -> dict[str, Any]:
    """What a result says before anything has run."""
    plugin = f" --plugin {shlex.quote(target.plugin)}" if target.plugin else ""
    return {
        "case": case.id,
        "op": case.op,
        "backend": target.policy,
        "kernel": "",
        "evidence": target.facts.evidence,
        "device": target.facts.name,
        "dtype": case.dtype,
        "level": case.sample.level,
        "seed": seed,
        "repro": f"glm5-hal conformance run{plugin} --backend {target.policy} {case.argument} --seed {seed}",
    }
