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

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.hookspecs import hookimpl

#: The kernels that can run on a stand-in.
PROVIDERS = ("torch",)


def simulated(key: str) -> Callable[[], Backend]:
    """The hook of a plugin: the backend of an identity, called ``<backend>-simulated``."""

    @hookimpl
    def glm5_backend() -> Backend:
        from simulated.identities import IDENTITIES

        identity = IDENTITIES[key]
        real: Backend = import_module(f"glm5_hal.backends.{identity.backend}").glm5_backend()

        def probe() -> Device | Unavailable:
            import torch

            if torch.cuda.is_available():
                return Unavailable("a GPU is here, and a stand-in would hide it", "use a machine without one")
            stand_in(key)
            found = real.probe()
            return replace(found, evidence="simulated") if isinstance(found, Device) else found

        def kernels() -> Sequence[Kernel]:
            return [kernel for kernel in real.kernels() if kernel.provider in PROVIDERS]

        return replace(real, name=f"{real.name}-simulated", probe=probe, kernels=kernels, requires={}, tuning=None)

    return glm5_backend


def stand_in(key: str) -> None:
    """Let this process have the identity's device, once."""
    import torch

    from simulated import device, identities, namespace

    if key in _made:
        return
    identity = identities.IDENTITIES[key]
    made = device.install(identity.type)
    space = namespace.Namespace(made, identity.name, identity.properties, identity.capability)
    namespace.attach(space, identity.type)
    torch.__version__, torch.version = identities.versions_of(identity)
    sys.meta_path.insert(0, identities.Packages(identity.packages, lambda m: identities.extend(m, identity, space)))
    for name in filter(None, (identity.extension, *identity.loaded)):
        import_module(name)
    _made.append(key)


_made: list[str] = []
