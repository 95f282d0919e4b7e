"""Shared libraries that stand in for CANN, so that the vendor's torch_npu can be imported where no CANN is.

    python ci/ascend/stubs.py --site DIR --out DIR

torch_npu's schemas and Meta kernels need no device; its libraries want CANN's to be there. What they call and nobody
defines is defined here: every function fails with CANN's number for that, but for those that the import depends on,
which say that there are no devices. Needs gcc and nm.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

#: What torch_npu links against.
LIBRARIES = (
    "ascendcl",
    "hccl",
    "acl_op_compiler",
    "ge_runner",
    "graph",
    "acl_tdt_channel",
    "fmk_parser",
    "ascend_protobuf",
    "atb",
)

#: ACL_ERROR_RT_DRV_INTERNAL_ERROR and its like: nothing here works.
FAILURE = 507899

#: What is believed. The chip is named, since some Meta kernels ask for its generation.
ANSWERS = {
    "aclInit": "int aclInit(const char *path) { return 0; }",
    "aclFinalize": "int aclFinalize(void) { return 0; }",
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 1; return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int *device) { *device = 0; return 0; }",
    "aclrtSetDevice": "int aclrtSetDevice(int device) { return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B1"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "a stand-in for CANN"; }',
    "aclAppLog": "void aclAppLog(int level, ...) {}",
    **{
        name: f"int {name}() {{ return 0; }}"
        for name in (
            "MsprofGetHashId",
            "MsprofSysCycleTime",
            "MsprofRegisterCallback",
            "MsprofReportApi",
            "MsprofReportCompactInfo",
            "MsprofReportAdditionalInfo",
        )
    },
}


def missing(site: Path) -> list[str]:
    """Functions that torch_npu's libraries call, and that neither they nor torch nor Python define. Those of the C and
    C++ libraries are known by their version."""
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch_libraries = sorted((Path(found.origin).parent / "lib").glob("*.so*"))
    own = sorted((site / "torch_npu").rglob("*.so"))
    defined = {name for name, _ in _symbols("--defined-only", [*own, *torch_libraries])}
    wanted = {name for name, kind in _symbols("--undefined-only", own) if kind == "U" and "@" not in name}
    return sorted(name for name in wanted - defined if not name.lstrip("_").startswith("Py"))


def _symbols(which: str, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for file in files:
        listed = subprocess.run(["nm", "-D", which, str(file)], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            *_, kind, name = line.split()
            yield (name.split("@")[0] if which == "--defined-only" else name), kind


def build(site: Path, out: Path) -> Path:
    """The libraries, in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    bodies = (ANSWERS.get(name, f"int {name}() {{ return {FAILURE}; }}") for name in missing(site))
    source, nothing = out / "stub.c", out / "nothing.c"
    source.write_text("\n".join(bodies) + "\n", encoding="utf-8")
    nothing.write_text("int glm5_hal_nothing;\n", encoding="utf-8")
    first, *others = LIBRARIES
    _compile(out, first, source)
    for name in others:
        _compile(out, name, nothing, f"-L{out}", "-Wl,--no-as-needed", f"-l{first}")
    return out


def _compile(out: Path, name: str, source: Path, *more: str) -> None:
    file = f"lib{name}.so"
    command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(out / file), str(source), f"-Wl,-soname,{file}", *more]
    subprocess.run(command, check=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--site", type=Path, required=True, help="folder that holds torch_npu")
    asked.add_argument("--out", type=Path, required=True, help="where the libraries go")
    args = asked.parse_args()
    print(build(args.site, args.out))


if __name__ == "__main__":
    main()
