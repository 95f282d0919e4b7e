"""Whether a backend computes at all: one tiny kernel with a known answer."""

from __future__ import annotations

from itertools import takewhile

from glm5_hal import context
from glm5_hal.backend import Device
from glm5_hal.catalogue import Catalogue
from glm5_hal.errors import shown
from glm5_hal.explanation import explain
from glm5_hal.plugins import PluginRecord
from glm5_hal.plugins.isolation import told


def tiny_kernel(record: PluginRecord) -> str:
    """Run rms_norm on two numbers: the bare kernel, with this backend alone, whatever the environment's settings are.

    The answer begins with "failed" where the backend is at fault. It names the kernels that would have come first.
    """
    import torch

    from glm5_hal import ops

    name = record.name
    with context.installed(Catalogue((record,))) as catalogue:
        try:
            device = catalogue.device(name)
            if not isinstance(device, Device):
                return f"failed: asked a second time, {device.reason}"
            if not catalogue.kernels(name, "rms_norm"):
                return "no rms_norm to try"
            x = torch.tensor([[3.0, 4.0]], device=device.type)
            with context.use(name), torch.inference_mode():
                choice = ops.rms_norm.choose(x, torch.ones_like(x[0]), eps=0.0)
                asked = explain("rms_norm", x, torch.ones_like(x[0]), eps=0.0).resolution.trace
                y = choice.kernel.fn(x, torch.ones_like(x[0]), eps=0.0).cpu()
            answer = torch.tensor([[3.0, 4.0]]) / 12.5**0.5
            # Shapes first: values that are right would be broadcast to one another.
            if y.shape != answer.shape or not torch.allclose(y.float(), answer, rtol=1e-2):
                return f"failed: {choice.name} gave {shown(y.tolist())}, the answer is {answer.tolist()}"
        except KeyboardInterrupt:
            raise
        except BaseException as problem:  # noqa: BLE001 - whatever a vendor's kernel raises is the finding
            said, fix = told(problem, record.root)
            return f"failed: {said}" + (f"  -> {fix}" if fix else "")
    passed_by = takewhile(lambda step: step.candidate != choice.name, asked)
    return "; ".join([f"rms_norm on {choice.name}: right", *map(str, passed_by)])
