"""Records from JSON, held to what their dataclass declares: every field, no other, each of its type.

What is read may come from a worker whose memory is damaged, a journal that was cut off, or a bundle that someone wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

#: How JSON, which has no such numbers, has them.
NOT_FINITE = ("nan", "inf", "-inf")


def read(kind: type[T], data: Any, name: str = "") -> T:
    """The record that `dataclasses.asdict` has made ``data`` of. Raises ValueError that says which field is not so."""
    name = name or kind.__name__.lower()
    hashable: Any = kind
    hints = _hints(hashable)
    if not isinstance(data, dict) or data.keys() != hints.keys():
        odd = sorted(map(str, data.keys() ^ hints.keys())) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{name}: missing or unknown: {odd}")
    return kind(**{field: _value(hint, data[field], f"{field} of {name}") for field, hint in hints.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return read(hint, value, where)
    if origin in (tuple, Sequence) and isinstance(value, list):
        return tuple(_value(args[0], item, f"an item of {where}") for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(args[1], item, f"{key} of {where}") for key, item in value.items()}
    if hint is float and (value in NOT_FINITE or (type(value) is int and abs(value) < 2**1023)):
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise ValueError(f"{where} is {value!r:.80}")
