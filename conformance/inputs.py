"""Inputs that are the same bits on every host, and a digest that proves it.

Random bits come from Philox, a counter-based integer generator; integer arithmetic puts them on a grid whose points
the dtype holds exactly. No libm, no rounding and no order of evaluation is involved, so a host of another architecture
makes the same tensors. Wider dtypes have a finer grid: computing float32 in bfloat16 or TF32 must lose something.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glm5_hal.errors import HalError

#: ``normal``'s grid: k * STEP with |k| <= 126, seven bits: what bfloat16 holds.
STEP = 2.0**-5

#: Bits that ``normal`` adds below that grid, by dtype.
FINE_BITS = {"bfloat16": 0, "float16": 3}
WIDE_BITS = 8


class Draw:
    """A stream of tensors for one case (the protocol `glm5_hal.spec.Draw`).

    Each call has its own Philox counter, under a key made of the seed and the name: streams with different names share
    nothing, and what a call returns depends on how many calls came before it, not on how much they drew.
    """

    def __init__(self, seed: int, name: str) -> None:
        self._key = int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:16], "little")
        self._calls = 0

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> torch.Tensor:
        """Bell-shaped and symmetric, standard deviation 1.155 and bound 3.94 times `scale`, a power of two."""
        if not scale > 0 or math.frexp(scale)[0] != 0.5:
            raise HalError("CONTRACT", f"normal: scale {scale} is no power of two", value=scale, fix="use 2.0**n")
        # Four six-bit numbers per word; their sum ends up in the top byte, which it cannot overflow (4 * 63 < 256).
        words = self._words(math.prod(shape))
        sums = (words & np.uint32(0x3F3F3F3F)) * np.uint32(0x01010101)
        bell = (sums >> np.uint32(24)).astype(np.int32) - 126
        bits = FINE_BITS.get(dtype, WIDE_BITS)
        if bits:  # from the two bits of each byte that the bell leaves over, odd so that both signs are as likely
            spare = (words >> np.uint32(6)) & np.uint32(0x03030303)
            packed = ((spare * np.uint32(0x01041040)) >> np.uint32(24)).astype(np.int32)
            bell = (bell << bits) + ((packed >> (8 - bits)) | 1) - (1 << (bits - 1))
        return _on_grid(bell, 127 << bits, STEP * scale / (1 << bits), dtype).reshape(shape)

    def uniform(self, *shape: int, dtype: str = "float32", low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Even over low, low + step, … < high, with the power of two step that makes 65 to 128 of them in bfloat16
        ([0, 1): 1/128), 2**3 times as many in float16 and 2**8 times as many in wider dtypes.

        Exact if low is a multiple of the step and no bound is further from 0 than 256 bfloat16 steps: [0, 1), [-1, 1),
        [0.25, 1), [0.5, 1.5). Else a value is rounded to float32 and then to the dtype: still the same bits on every
        host, but it may round to `high` itself.
        """
        if not low < high:
            raise HalError("CONTRACT", f"uniform: empty range [{low}, {high})", value=(low, high), fix="low < high")
        mantissa, exponent = math.frexp(high - low)
        step = 2.0 ** (exponent - (8 if mantissa == 0.5 else 7) - FINE_BITS.get(dtype, WIDE_BITS))
        k = self._words(math.prod(shape)) % np.uint32(math.ceil((high - low) / step))
        values = torch.from_numpy(low + k.astype(np.float64) * step)
        if dtype != "float64":
            values = values.float()
        return values.to(_dtype(dtype)).reshape(shape)

    def small(self, *shape: int, dtype: str = "float32", bound: int = 4) -> torch.Tensor:
        """Integers in [-bound, bound], as `dtype`: products and sums of them are exact in float32."""
        k = (self._words(math.prod(shape)) % np.uint32(2 * bound + 1)).astype(np.int64) - bound
        return _on_grid(k, bound, 1.0, dtype).reshape(shape)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 in [low, high)."""
        if not low < high:
            raise HalError("CONTRACT", f"integers: empty range [{low}, {high})", value=(low, high), fix="low < high")
        k = (self._raw(math.prod(shape)) % np.uint64(high - low)).astype(np.int64) + low
        return torch.from_numpy(k).reshape(shape)

    def permutation(self, n: int) -> torch.Tensor:
        """0 … n-1 in some order, int64."""
        return torch.from_numpy(np.argsort(self._raw(n), kind="stable").astype(np.int64))

    def _raw(self, n: int) -> npt.NDArray[np.uint64]:
        counter = self._calls << 128  # each call has 2**128 blocks to itself
        self._calls += 1
        return np.random.Philox(key=self._key, counter=counter).random_raw(n)

    def _words(self, n: int) -> npt.NDArray[np.uint32]:
        """32 bits per element, low half first whatever the host's byte order."""
        return self._raw(-(-n // 2)).astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)[:n]


def digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of everything in `tensors`, whatever its strides or order.

    Values may be tensors, numbers, strings, None, and sequences and mappings of these.
    """
    hasher = hashlib.sha256()
    _feed(hasher, tensors)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    # Each header says how much follows, so no two different values feed the same bytes.
    if isinstance(value, torch.Tensor):
        hasher.update(f"tensor {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            hasher.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value):
            _feed(hasher, key)
            _feed(hasher, value[key])
    elif isinstance(value, (tuple, list)):
        hasher.update(f"sequence {len(value)}\n".encode())
        for item in value:
            _feed(hasher, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        hasher.update(f"{type(value).__name__} {value!r}\n".encode())
    else:
        raise HalError(
            "CONTRACT",
            f"a digest of {type(value).__name__} is not defined",
            value=value,
            fix="pass tensors, numbers, strings, None, and sequences and mappings of these",
        )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise HalError("UNKNOWN", f"torch has no dtype {name!r}", value=name, fix="for example 'bfloat16'")
    return found


def _on_grid(k: npt.NDArray[Any], largest: int, step: float, dtype: str) -> torch.Tensor:
    """k * step in `dtype`, or an error if that dtype cannot hold every |k| <= largest exactly."""
    target = _dtype(dtype)
    if target.is_floating_point:
        info = torch.finfo(target)
        exact = largest <= 2 / info.eps and info.smallest_normal * info.eps <= step <= info.max / max(largest, 1)
    else:
        exact = step == 1 and largest <= torch.iinfo(target).max
    if not exact:
        raise HalError(
            "CONTRACT",
            f"{dtype} does not hold the multiples of {step} up to {largest * step} exactly",
            value=(dtype, step),
            fix="use a scale nearer 1, a smaller bound or a wider dtype",
        )
    if not target.is_floating_point:
        return torch.from_numpy(k).to(target)
    return torch.from_numpy(k).to(torch.float64 if target == torch.float64 else torch.float32).mul_(step).to(target)
