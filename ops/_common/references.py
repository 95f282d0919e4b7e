"""The references as a namespace: what a composite's body is given when it is itself run as a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class References:
    """``REFERENCES.rms_norm(...)`` is the reference of rms_norm, undispatched."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from glm5_hal.ops import specs

        if name not in specs():
            raise AttributeError(name)
        return reference_of(name)


REFERENCES = References()


class Emulations:
    """``EMULATIONS.rms_norm(...)`` is rms_norm with the loosest roundings of its contract."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from glm5_hal.ops import specs

        if name not in specs():
            raise AttributeError(name)
        return specs()[name].emulate or reference_of(name)


EMULATIONS = Emulations()


def loosest(body: Callable[..., Any]) -> Callable[..., Any]:
    """A composite's emulation: its body over the emulations of its parts."""

    def emulate(*args: Any, **kwargs: Any) -> Any:
        return body(EMULATIONS, *args, **kwargs)

    return emulate


def reference_of(name: str) -> Callable[..., Any]:
    """An op's reference with exactly the op's signature; a composite's runs over the references of its parts."""
    from glm5_hal.ops import specs

    spec = specs()[name]
    if not spec.composite:
        return spec.reference

    def reference(*args: Any, **kwargs: Any) -> Any:
        return spec.reference(REFERENCES, *args, **kwargs)

    reference.__name__ = name
    reference.__doc__ = spec.doc
    reference.__signature__ = spec.signature  # type: ignore[attr-defined]
    return reference
