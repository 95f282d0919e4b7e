"""Whether the weights that others were derived from are still the same ones, and still in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glm5_hal.errors import HalError
from glm5_hal.memory import state


@dataclass(frozen=True, eq=False)
class Source:
    """A parameter, buffer or module in its place, as it was.

    Attributes:
        name: for people.
        place, key: the dict of its module that holds it, and its name there. What is assigned later takes this place.
        held: itself.
        state: of a tensor; nothing of a module.
    """

    name: str
    place: Mapping[str, Any]
    key: str
    held: Any
    state: tuple[Any, ...]


def sources(name: str, root: nn.Module) -> Iterator[Source]:
    """Everything of layers but their norms, which are read where they are."""
    for path, module in root.named_modules(prefix=name):
        for place in (module._modules, module._parameters, module._buffers):
            for key, held in place.items():
                full = f"{path}.{key}"
                if held is not None and ("layernorm" not in full or "_a_layernorm" in full):
                    yield Source(full, place, key, held, state(held) if isinstance(held, Tensor) else ())


def check_unchanged(sources: Iterable[Source], *, again: str) -> None:
    """Raises HalError where a weight was written, moved, converted or replaced since; ``again`` derives anew."""
    for source in sources:
        replaced = source.place.get(source.key) is not source.held
        if replaced or (source.state and state(source.held) != source.state):
            raise HalError(
                "CONTRACT",
                f"{source.name} has changed since {again}, which derived other weights from it",
                value=source.name,
                fix=f"call {again} again after loading, moving, converting or replacing weights",
            )
