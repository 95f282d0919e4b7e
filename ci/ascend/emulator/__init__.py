"""An emulator of Huawei Ascend's npu ops on the CPU: the vendor's schemas, documented constraints and numerics.

It stands in for torch_npu's kernels in tests, so that code written against `torch.ops.npu` runs where no NPU is. What
it knows comes from the vendor's op-plugin documents and golden code alone; each module says what it assumes where they
are silent. It is as slow as a CPU, and what it answers is evidence "emulated", never "hardware".

    from ci.ascend import emulator     # with the repository on the path

    emulator.install(soc="A2")
    y, rstd = torch.ops.npu.npu_rms_norm(x, gamma, 1e-5)

A broken constraint raises `ConstraintError`, which names the op, the constraint, the value and the document; what the
documents allow and the emulator leaves out raises `NotEmulatedError`. Outputs that the documents leave undefined are
filled with NaN, or with the lowest integer.
"""

from .chip import CHIPS
from .constraints import ConstraintError, NotEmulatedError
from .registry import install, kernels, schemas, uninstall

__all__ = ["CHIPS", "ConstraintError", "NotEmulatedError", "install", "kernels", "schemas", "uninstall"]
