"""Under torch.compile, with static and with dynamic shapes, the op gives what it gives eagerly; and torch's own check
of operators (schema, fake tensors, dispatch) finds nothing. Seconds each, so once per op: in its case "compiled"."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from glm5_hal import ops
from glm5_hal.conformance.checks.agreement import as_good
from glm5_hal.conformance.trial import Finding, Trial

TAG = "compile"


def check(trial: Trial) -> Finding:
    if TAG not in trial.case.sample.tags:
        return Finding(None, f"looked at in {trial.case.op}'s case compiled, at level full")
    op = getattr(ops, trial.case.op)
    # As in training code and in servers that do not use inference mode: tensors of the ordinary kind.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        for dynamic in (False, True):
            torch.compiler.reset()
            try:
                compiled = torch.compile(_caller(op), backend="aot_eager", fullgraph=True, dynamic=dynamic)
                placed = trial.place(trial.inputs.args)
                run = trial.bring_back(compiled(**placed), placed)
            finally:
                torch.compiler.reset()
            finding = as_good(trial, run, f"compiled with {'dynamic' if dynamic else 'static'} shapes")
            if not finding.ok:
                return finding
        said = torch.library.opcheck(op.torch_op, (), trial.place(trial.inputs.args), raise_exception=False)
    failed = [f"{name}: {str(problem).splitlines()[0]}" for name, problem in said.items() if problem != "SUCCESS"]
    return Finding(not failed, f"opcheck: {', '.join(failed)}" if failed else "")


def _caller(op: Any) -> Callable[..., Any]:
    def call(**placed: Any) -> Any:
        return op(**placed)

    return call
