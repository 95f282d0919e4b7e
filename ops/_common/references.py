"""The references as a namespace: what a composite's body is given when it is itself run as a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Namespace:
    """``REFERENCES.rms_norm(...)``: an op by its name, undispatched, as ``find`` has it."""

    def __init__(self, find: Callable[[str], Callable[..., Any]]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from glm5_hal.ops import specs

        if name not in specs():
            raise AttributeError(name)
        return self._find(name)


def loosest(body: Callable[..., Any]) -> Callable[..., Any]:
    """A composite's emulation: its body over the emulations of its parts."""

    def emulate(*args: Any, **kwargs: Any) -> Any:
        return body(EMULATIONS, *args, **kwargs)

    return emulate


def emulation_of(name: str) -> Callable[..., Any]:
    """An op with the loosest roundings of its contract."""
    from glm5_hal.ops import specs

    return specs()[name].emulate or reference_of(name)


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


REFERENCES, EMULATIONS = Namespace(reference_of), Namespace(emulation_of)
