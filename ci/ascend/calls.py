"""The calls of the contract job: every aclnn kernel over samples of its op, on tensors without values on the vendor's
device type. Imported where the vendor's torch_npu is.

The vendor's schemas and Meta kernels check names, keywords, dtypes, shapes and devices. What a Meta kernel takes the
real one may still refuse, and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal import torchlib
from glm5_hal.backend import Kernel
from glm5_hal.backends import ascend
from glm5_hal.backends.ascend import dense, needs, weights
from glm5_hal.conformance.inputs import Draw
from glm5_hal.decision import Rejected
from glm5_hal.metadata import signature_of
from glm5_hal.ops import specs
from glm5_hal.signature import Facts, TensorMeta
from glm5_hal.spec import OpSpec, Sample

#: GLM-5's decode batches as a server on this chip has them: pages of 128, the rope keys apart.
LENS = ((1, 4096), (2, 2049), (4, 700), (1, 1))
PAGED = {"lens": LENS, "page": 128}
LATENT = {"H": 64, "L": 512, "R": 64, "scale": 0.0625, **PAGED}
GLM5 = {"E": 6144, "Q": 2048, "H": 64, "K": 192, "L": 512, "R": 64, "N": 3, "page": 128, "eps": 1e-5}
INDEXER = {"H": 32, "D": 128, "K": 2048, "format": "bf16_128", **PAGED}
HEADS = {"H": 128, "Dqk": 192, "Dv": 128, "scale": 0.135}

MORE: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "mla_decode": (
        {**LATENT, "format": "latent_512_rope_64"},
        {**LATENT, "format": "latent_512_rope_64", "lens": ((1, 300), (1, 5))},
        {**LATENT, "format": "latent_512_rope_64", "lens": ((3, 1), (1, 0))},
    ),
    "sparse_mla": tuple(
        {**LATENT, "K": 2048, "format": form, "lens": lens}
        for form in ("latent_512_rope_64", "latent_576")
        for lens in (((1, 4096), (2, 2049)), ((300, 300),))
    ),
    "mla_prefill": ({**HEADS, "lens": ((40, 40), (3, 50))}, {**HEADS, "lens": ((4, 2),)}),
    "lightning_indexer": (INDEXER, {**INDEXER, "lens": ((70, 700),)}),
    "mla_prolog": (
        {**GLM5, "T": 4, "format": "latent_512_rope_64"},
        {**GLM5, "T": 130, "format": "latent_512_rope_64", "skip": "all"},
    ),
}


#: What adapters may read on the host.
LENGTHS = ("seq_lens", "cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True)
class Call:
    """One call and how it ended: "ok", "refused" by a requirement, or "failed"."""

    op: str
    sample: str
    dtype: str
    outcome: str
    detail: str = ""


def calls(level: str = "standard") -> Iterator[Call]:
    _let_formats_be_cast()
    features = needs.available()
    for kernel in ascend.aclnn():
        for sample in _samples(specs()[kernel.op], level):
            for dtype in sample.dtypes:
                yield _called(kernel, sample, dtype, Facts(arch=needs.A2, features=features))


def _samples(spec: OpSpec, level: str) -> Iterator[Sample]:
    for sample in spec.samples():
        if sample.level in ("smoke", level):
            yield sample
    for i, axes in enumerate(MORE.get(spec.name, ())):
        yield Sample(f"ascend-{i}", dict(axes), dtypes=("bfloat16",))


def _called(kernel: Kernel, sample: Sample, dtype: str, facts: Facts) -> Call:
    spec = specs()[kernel.op]
    where = (kernel.op, sample.id, dtype)
    given = spec.inputs(sample, dtype, Draw(0, f"{kernel.op}-{sample.id}")).args
    lists = {name: tuple(given[name].tolist()) for name in LENGTHS if name in given}
    with FakeTensorMode(), torch.inference_mode(), _Recording():  # the vendor's autograd kernels ask for a device
        args = {name: _on_npu(value) if isinstance(value, Tensor) else value for name, value in given.items()}
        read = {id(args[name]): values for name, values in lists.items()}
        args |= _prepared(kernel.op, args)
        rejected = _rejected(spec, kernel, args, facts)
        if rejected is not None:
            return Call(*where, "refused", f"{rejected.code}: {rejected.detail}")
        # Lengths are known to the host where a step has a plan; here they are what the sample has.
        with patch.object(dense, "host_list", lambda tensor: read[id(tensor)]):
            try:
                got = kernel.fn(**args)
            except Exception as problem:  # noqa: BLE001 - whatever the vendor's side says is the finding
                return Call(*where, "failed", f"{type(problem).__name__}: {str(problem).strip()[:400]}")
        wrong = _differences(got, torchlib.fake(spec)(**args))
    return Call(*where, "failed" if wrong else "ok", wrong)


#: What adapters called of torch itself and of the vendor, by name.
_called_ops: dict[str, Any] = {}


class _Recording(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _called_ops.setdefault(str(func), func)
        return func(*args, **(kwargs or {}))


def without_kernel() -> list[str]:
    """Ops that were called and that the device has no kernel for: torch_npu computes them on the CPU, and waits."""
    keys = ("PrivateUse1", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(
        name
        for name, op in _called_ops.items()
        if op.namespace in ("aten", "npu") and not any(has(op.name(), key) for key in keys)
    )


def _on_npu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="npu")


def _prepared(op: str, args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights as they are after loading, and the name of their format."""
    if "weight_format" not in args:
        return {}
    made = weights.prepare(op, {name: args[name] for name in args if name.startswith("w_")})
    return {} if made is None else {**made.tensors, "weight_format": made.format}


def _let_formats_be_cast() -> None:
    """The one op of OPS without a Meta kernel: shape and dtype stay, the bytes are others."""
    library = torch.library.Library("npu", "IMPL")
    library.impl("npu_format_cast", lambda x, acl_format, customize_dtype=None: torch.empty_like(x), "Meta")
    _kept.append(library)


#: A library's registrations end with it.
_kept: list[torch.library.Library] = []


def _rejected(spec: OpSpec, kernel: Kernel, args: Mapping[str, Any], facts: Facts) -> Rejected | None:
    metas = {name: None if args[name] is None else _meta(args[name]) for name in spec.tensors}
    call = signature_of(spec, metas, {name: args[name] for name in spec.options})
    answers = (requirement.test(call, facts) for requirement in kernel.requires)
    return next((answer for answer in answers if isinstance(answer, Rejected)), None)


def _meta(tensor: Tensor) -> TensorMeta:
    return TensorMeta(str(tensor.dtype)[6:], tuple(tensor.shape), str(tensor.device), tensor.stride())


def _differences(got: Any, wanted: Any) -> str:
    """In what the results' metadata is not what the op declares."""
    given, declared = (x if isinstance(x, tuple) else () if x is None else (x,) for x in (got, wanted))
    if len(given) != len(declared):
        return f"{len(given)} results, {len(declared)} declared"
    told = []
    for i, (a, b) in enumerate(zip(given, declared, strict=True)):
        for what in ("shape", "dtype", "device"):
            if getattr(a, what) != getattr(b, what):
                told.append(f"result {i}: {what} {getattr(a, what)}, declared {getattr(b, what)}")
        if not a.is_contiguous():
            told.append(f"result {i} is not contiguous")
    return "; ".join(told)
