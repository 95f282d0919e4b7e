"""What a plugin returns: a backend, its kernels, and what its probe found."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from glm5_hal.decision import Requirement
from glm5_hal.errors import HalError
from glm5_hal.signature import Facts

#: The contract's versions that this core speaks, lowest and highest.
HAL_API = (1, 1)

#: What a backend or a provider may be called, so that a policy can name it.
NAME = re.compile(r"[a-z][a-z0-9_-]*")

#: How strongly a result speaks about hardware, strongest first. Only "hardware" may be called conformant.
EVIDENCE = ("hardware", "emulated", "interpreted", "simulated", "compiled")

#: What a kernel may claim, and a user may ask for with hal.use(require=...).
ATTRIBUTES: dict[str, str] = {
    "deterministic": "the same inputs give the same bits, run after run",
    "batch_invariant": "a row's bits do not depend on the other rows in the batch",
    "canonical_ties": "ties are broken by the lower index: a total order",
    "sorted_indices": "indices come out ascending, -1 last",
    "graph_safe": "may be captured into a device graph: no sync, no host-dependent control flow",
}


@dataclass(frozen=True)
class Device:
    """Facts that a probe found.

    Attributes:
        type: torch's device type of the tensors that the backend's kernels take ("cpu", "cuda", "npu").
        name: the product name, as the driver or the operating system gives it.
        arch: what `arch(...)` requirements are compared with ("sm_90", "x86_64").
        count: how many such devices are visible.
        evidence: one of :data:`EVIDENCE`; a stand-in must say so here.
        versions: driver, SDK and library versions, by name.
        features: names for `feature(...)` requirements.
    """

    type: str
    name: str
    arch: str
    count: int = 1
    evidence: str = "hardware"
    versions: Mapping[str, str] = field(default_factory=dict)
    features: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.evidence not in EVIDENCE:
            raise HalError(
                "CONTRACT",
                f"evidence {self.evidence!r} is not one of {', '.join(EVIDENCE)}",
                value=self.evidence,
                fix="say how the result was obtained",
            )

    @property
    def facts(self) -> Facts:
        return Facts(arch=self.arch, features=self.features, versions=self.versions)


@dataclass(frozen=True)
class Unavailable:
    """A probe's typed no.

    Attributes:
        reason: why the device cannot be used.
        fix: what to do about it.
        fault: True where the probe itself broke: it raised, hung, crashed or answered nonsense; False where it answered
            by itself that its device is not there.
    """

    reason: str
    fix: str
    fault: bool = False


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op. ``fn`` has exactly the op's signature; it returns fresh tensors."""

    op: str
    provider: str
    fn: Callable[..., Any]
    requires: tuple[Requirement, ...] = ()
    provides: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = self.provides - ATTRIBUTES.keys()
        if unknown:
            raise HalError(
                "CONTRACT",
                f"kernel {self.op} of provider {self.provider} claims unknown attributes {sorted(unknown)}",
                value=sorted(unknown),
                fix=f"claim among {', '.join(ATTRIBUTES)}",
            )
        for item in self.requires:
            if not isinstance(item, Requirement):
                raise HalError(
                    "CONTRACT",
                    f"kernel {self.op} of provider {self.provider}: {item!r} is not a requirement",
                    value=item,
                    fix="build requirements with glm5_hal.capability (dtype, limit, when, ...)",
                )

    @property
    def rank(self) -> int:
        """Automatic choice goes native, triton, torch; a reference is never chosen unless named."""
        return {"triton": 1, "triton-invariant": 2, "torch": 3, "composite": 4, "reference": 5}.get(self.provider, 0)


def kernel(
    op: str,
    provider: str,
    *,
    requires: Sequence[Requirement] = (),
    provides: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare a function as a kernel. It registers nothing: a backend lists its kernels itself."""

    def declare(fn: Callable[..., Any]) -> Kernel:
        return Kernel(op, provider, fn, tuple(requires), frozenset(provides))

    return declare


def kernels_of(*modules: ModuleType) -> tuple[Kernel, ...]:
    """The kernels that these modules define, in the order of definition."""
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Kernel))


#: By op, its block sizes by name.
Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Tunable:
    """Kernels whose block sizes are data: what `glm5-hal tune` needs to know of them.

    Attributes:
        file: the TOML file that has the sizes; its tables ``[arch.<arch>]`` and ``[arch.<arch>.<op>]`` are written.
        sizes: of an architecture: those in force, by op.
        candidates: of such sizes: the values that may take the place of each.
        kernels: of an architecture: the kernels with these sizes of some ops, and those in force of the others.
    """

    file: Path
    sizes: Callable[[str], Sizes]
    candidates: Callable[[str, Mapping[str, int]], Mapping[str, Sequence[int]]]
    kernels: Callable[[str, Sizes], Sequence[Kernel]]


@dataclass(frozen=True)
class Backend:
    """One accelerator's plugin object.

    Attributes:
        name: lower-case; what a user writes into GLM5_BACKEND.
        device_type: torch's device type of the tensors that its kernels take.
        probe: answers with Device facts, or Unavailable with reason and fix; must not raise, must not take another
            vendor's device for its own. The vendor's SDK is imported here, never at module level.
        kernels: called once, after a successful probe; imports and returns the kernels.
        hal_api: the contract's version (or lowest and highest) that the plugin was written for.
        requires: distributions and version ranges that the backend needs, checked before the probe.
        priority: higher comes first among outside plugins of one device type.
        communicator: the torch.distributed backend's name ("nccl", "hccl"), if there is one.
        cache_formats: preferred formats first, by kind ("latent", "index"); names of `glm5_hal.formats.FORMATS`.
        prepare: turns an op's plain weights into the backend's own form, once, at load time.
        smi: the vendor's status command, for `doctor`.
        tuning: its kernels' block sizes, for `tune`, where those are data.
    """

    name: str
    device_type: str
    probe: Callable[[], Device | Unavailable]
    kernels: Callable[[], Sequence[Kernel]]
    hal_api: int | tuple[int, int] = 1
    requires: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    communicator: str | None = None
    cache_formats: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"latent": ("latent_576",), "index": ("bf16_128",)}
    )
    prepare: Callable[[str, Mapping[str, Any]], Any] | None = None
    smi: tuple[str, ...] = ()
    tuning: Tunable | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise HalError(
                "CONTRACT",
                f"backend name {self.name!r} is not usable",
                value=self.name,
                fix="use lower-case letters, digits, '-' and '_', beginning with a letter",
            )
        for what in ("probe", "kernels"):
            if not callable(getattr(self, what)):
                raise HalError(
                    "CONTRACT",
                    f"backend {self.name}: {what} is not callable",
                    value=getattr(self, what),
                    fix=f"pass a function as {what}",
                )

    @property
    def api_range(self) -> tuple[int, int]:
        """Lowest and highest version; of the types that it was declared with, right or wrong."""
        return self.hal_api if isinstance(self.hal_api, tuple) else (self.hal_api, self.hal_api)
