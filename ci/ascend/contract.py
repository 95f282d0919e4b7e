"""The contract job: our adapters against the vendor's real schemas and Meta kernels, without a device.

    python ci/ascend/contract.py                            # fetches torch_npu and builds stand-ins for CANN
    python ci/ascend/contract.py --site DIR --stubs DIR     # where both are there already
    python ci/ascend/contract.py --json

torch_npu is imported over stand-ins for CANN's libraries (`stubs.py`), in a process of its own, and every aclnn kernel
is called with GLM-5's shapes on tensors without values (`calls.py`). Every op of torch's that an adapter calls must
have a kernel on the device. Exit codes: 0 all calls fit, 1 some do not, 2 wrong usage, 3 torch_npu cannot be had or
imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCHEMAS = HERE / "schemas.txt"

#: The vendor's package that the adapters are held against; it goes with torch of the same number.
PINNED = "2.13.0"

OK, FAILED, USAGE, UNAVAILABLE = 0, 1, 2, 3

#: Set in the process that has torch_npu.
INSIDE = "GLM5_HAL_ASCEND_CONTRACT"


def main(argv: list[str] | None = None) -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--site", type=Path, help="folder that holds torch_npu; left out: it is fetched")
    asked.add_argument("--stubs", type=Path, help="folder with what stubs.py builds; left out: it is built")
    asked.add_argument("--level", choices=("smoke", "standard"), default="standard", help="samples that are called")
    asked.add_argument("--json", action="store_true", help="print the calls as JSON")
    args = asked.parse_args(argv)
    if os.environ.get(INSIDE):
        return _inside(args.level, args.json)
    with tempfile.TemporaryDirectory() as made:
        try:
            site = args.site or _fetched(Path(made) / "site")
            stubs = args.stubs or _stubs(site, Path(made) / "stubs")
        except (subprocess.CalledProcessError, OSError) as problem:
            print(f"torch_npu {PINNED} or its stand-ins cannot be made here: {problem}", file=sys.stderr)
            return UNAVAILABLE
        for folder, holds in ((site, "torch_npu"), (stubs, "libascendcl.so")):
            if not (folder / holds).exists():
                print(f"{folder} holds no {holds}", file=sys.stderr)
                return USAGE
        own = [word for word in (argv or sys.argv[1:]) if word == "--json"]
        command = [sys.executable, str(Path(__file__).resolve()), "--level", args.level, *own]
        return subprocess.run(command, env=environment(site, stubs)).returncode


def environment(site: Path, stubs: Path) -> dict[str, str]:
    """Of a process that can import torch_npu over the stand-ins."""
    paths = {"LD_LIBRARY_PATH": stubs.resolve(), "PYTHONPATH": site.resolve()}
    joined = {name: os.pathsep.join(filter(None, (str(path), os.environ.get(name)))) for name, path in paths.items()}
    return {**os.environ, **joined, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", INSIDE: "1"}


def _fetched(site: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, f"torch_npu=={PINNED}"], check=True)
    return site


def _stubs(site: Path, out: Path) -> Path:
    sys.path.insert(0, str(HERE))
    import stubs

    return Path(stubs.build(site, out))


# --- in the process that has torch_npu -------------------------------------------------------------------------------


def _inside(level: str, as_json: bool) -> int:
    try:
        import torch_npu
    except Exception as problem:  # noqa: BLE001 - a torch of another number, a library that is missing
        print(f"torch_npu cannot be imported: {type(problem).__name__}: {problem}", file=sys.stderr)
        return UNAVAILABLE
    if torch_npu.npu.device_count() == 0:
        print("these stand-ins for CANN name no device: build them with ci/ascend/stubs.py", file=sys.stderr)
        return UNAVAILABLE
    sys.path.insert(0, str(HERE))
    from calls import calls, without_kernel

    made, wrong = list(calls(level)), schema_differences()
    on_cpu = without_kernel()
    report = {
        "torch_npu": torch_npu.__version__,
        "calls": [asdict(call) for call in made],
        "schemas": wrong,
        "on_cpu": on_cpu,
        "summary": _summary(made),
    }
    print(json.dumps(report, indent=1) if as_json else _told(report))
    return FAILED if wrong or on_cpu or any(call.outcome == "failed" for call in made) else OK


def schema_differences() -> list[str]:
    """Lines of schemas.txt that are not what the vendor's package registers."""
    import torch

    lines = [line for line in SCHEMAS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    wrong = [] if lines else [f"{SCHEMAS.name} holds no schema"]
    for line in lines:
        name, _, overload = line.partition("(")[0].partition(".")
        space, _, op = name.partition("::")
        try:
            registered = str(getattr(getattr(getattr(torch.ops, space), op), overload or "default")._schema)
        except AttributeError:
            registered = "nothing"
        if registered != line:
            wrong.append(f"{line}\n  the package has {registered}")
    return wrong


def _summary(made: list[Any]) -> dict[str, Mapping[str, int]]:
    ops = dict.fromkeys(call.op for call in made)
    return {op: Counter(call.outcome for call in made if call.op == op) for op in ops}


def _told(report: Mapping[str, Any]) -> str:
    rows = [f"torch_npu {report['torch_npu']}", f"{'op':20}{'ok':>6}{'refused':>9}{'failed':>8}"]
    for op, counts in report["summary"].items():
        rows.append(f"{op:20}{counts.get('ok', 0):6}{counts.get('refused', 0):9}{counts.get('failed', 0):8}")
    failed = [call for call in report["calls"] if call["outcome"] == "failed"]
    rows += [f"{call['op']}[{call['dtype']}-{call['sample']}]: {call['detail']}" for call in failed]
    rows += [f"{op}: the device has no kernel for it, and an adapter calls it" for op in report["on_cpu"]]
    rows += report["schemas"] or [f"{SCHEMAS.name}: as the package has them"]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
