"""`ci/triton_api.py`: the shared kernels use nothing that Triton 3.2 lacks, and what does is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

HEAD = """\
import triton
import triton.language as tl
from glm5_hal.backends._triton import rows


@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0).to(tl.int32, bitcast=True)
"""


def lint(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "ci/triton_api.py"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_shared_kernels_are_clean() -> None:
    done = lint()
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("h = tl.histogram(v, 4, mask=i < n)", "tl.histogram: takes no mask= in Triton 3.2"),
        ("s = tl.sum(v, 0, dtype=tl.float32)", "tl.sum: takes no dtype= in Triton 3.2"),
        ("p = tl.program_id(0, 1)", "tl.program_id: takes 1 arguments in Triton 3.2, not 2"),
        ("d = tl.make_tensor_descriptor(x, [n], [1], [BLOCK])", "tl.make_tensor_descriptor: Triton 3.2 has none"),
        ("g = v.gather(i, 0)", ".gather: no value of Triton 3.2 has it"),
        ("f = v.to(tl.float8e5).sum()", "tl.float8e5: not every chip's compiler has fp8"),
        ("w = v.to(tl.float64)", "tl.float64: not every chip has float64"),
    ],
)
def test_what_triton_3_2_lacks_is_told_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "planted.py"
    file.write_text(f"{HEAD}    {line}\n")
    done = lint(file)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{file}:10: {reason}")
    assert done.stdout.count("\n") == 1


def test_a_chips_own_form_is_for_an_if_that_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    own = "a = v.to(tl.float8e4nv)"
    file.write_text(f"{HEAD}    if FP8:\n        {own}\n    else:\n        {own}\n    if INT8:\n        {own}\n")
    assert [line.split(":")[1] for line in lint(file).stdout.splitlines()] == ["13", "15"]
    file.write_text(f"{HEAD}    if FP8:\n        a = v.to(tl.float8e5)\n")
    assert "tl.float8e5" in lint(file).stdout


def test_imports_and_decorators_are_looked_at_too(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text(
        "from triton.tools.tensor_descriptor import TensorDescriptor\n" + HEAD.replace("@", "@triton.autotune\n@")
    )
    told = lint(file).stdout.splitlines()
    assert [line.split(": ")[1] for line in told] == [
        "triton.tools.tensor_descriptor.TensorDescriptor",
        "triton.autotune",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "e = x.dtype.element_ty",
        "r = rows.no_matter_what(v, mask=1)",
        "t = tl.trans(tl.reshape(v, (1, BLOCK), can_reorder=True), 1, 0)",
        "b = tl.float32.primitive_bitwidth",
        "m = tl.maximum(v, 0, propagate_nan=tl.PropagateNan.ALL)",
        "for _ in tl.range(0, n, BLOCK, num_stages=2): pass",
    ],
)
def test_what_it_has_is_taken(tmp_path: Path, line: str) -> None:
    file = tmp_path / "fine.py"
    file.write_text(f"{HEAD}    {line}\n")
    assert lint(file).stdout == ""
