"""A vendor's backend on a stand-in device: a backend for tests, evidence "simulated".

    glm5-hal conformance run --plugin ci/simulated/musa_simulated.py --level smoke

The vendor's own probe is asked, of a torch that looks like that vendor's, and the plain-torch kernels that the backend
lists are judged on tensors of the vendor's type of device. It shows that they stay on their device, that they may be
captured into a graph where they say so, and that probe, dispatcher and suite work with it. The maths is the CPU's: it
shows nothing of the vendor's numbers or speed, and nothing of its own kernels, whose libraries are not here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.hookspecs import hookimpl
from simulated.identities import Identity, Packages, extend, versions_of

if TYPE_CHECKING:
    from simulated.device import StandIn

#: Kernels that are torch's own operations, and so can run on a stand-in.
PROVIDERS = ("torch",)


def simulated(identity: Identity, module: str = "", providers: Sequence[str] = PROVIDERS) -> Callable[[], Backend]:
    """The hook of a plugin: the backend in ``module``, called ``<backend>-simulated``, on a stand-in of its device.

    Without a module it is the built-in backend of the identity's name.
    """

    @hookimpl
    def glm5_backend() -> Backend:
        real: Backend = import_module(module or f"glm5_hal.backends.{identity.backend}").glm5_backend()

        def probe() -> Device | Unavailable:
            import torch

            for other, _ in _made:
                if other != identity:
                    return Unavailable(f"this process stands in for {other.name}", "start a process for each device")
            if torch.version.cuda is not None and not _made:
                return Unavailable("this torch is built for CUDA, which a stand-in would hide", "install a CPU build")
            stand_in(identity)
            found = real.probe()
            return replace(found, evidence="simulated") if isinstance(found, Device) else found

        def kernels() -> Sequence[Kernel]:
            return [kernel for kernel in real.kernels() if kernel.provider in providers]

        return replace(real, name=f"{real.name}-simulated", probe=probe, kernels=kernels, requires={}, tuning=None)

    return glm5_backend


def stand_in(identity: Identity) -> StandIn:
    """Let this process have the identity's device, once."""
    import torch

    from simulated import device, namespace

    for known, made in _made:
        if known == identity:
            return made
    made = device.install(identity.type)
    space = namespace.Namespace(made, identity.name, identity.properties, identity.capability)
    namespace.attach(space, identity.type)
    if identity.torch:
        torch.__version__, torch.version = versions_of(identity)
    sys.meta_path.insert(0, Packages(identity.packages, lambda module: extend(module, identity, space)))
    for name in filter(None, (identity.extension, *identity.loaded)):
        import_module(name)
    _made.append((identity, made))
    return made


_made: list[tuple[Identity, StandIn]] = []
