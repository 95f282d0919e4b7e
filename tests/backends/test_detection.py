"""Two vendors' software on one machine: the backend of the one that runs answers, all others say why not, and none
starts a driver that is not its own. And an SDK that is broken breaks its own backend alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from machines import IDENTITIES, QUESTIONS, machine

from glm5_hal import plugins
from glm5_hal.backend import Device, Unavailable
from glm5_hal.plugins import PluginRecord, load

BACKENDS = ("cuda", "ascend", "musa", "hygon", "cambricon", "kunlunxin", "metax", "enflame")

#: Those that are met in pairs.
VENDORS = ("nvidia", "amd", "ascend", "musa", "hygon", "cambricon", "kunlunxin", "metax", "enflame")

#: Two installed, and which of them runs, if any.
PAIRS = [(pair, runs) for pair in combinations(VENDORS, 2) for runs in (*pair, None)]


def named(pair: tuple[str, str], runs: str | None) -> str:
    return f"{' and '.join(pair)}, {runs or 'none'} runs"


of_two = pytest.mark.parametrize(("pair", "runs"), [pytest.param(*each, id=named(*each)) for each in PAIRS])


def probe(backend: str) -> Device | Unavailable:
    found: Device | Unavailable = import_module(f"glm5_hal.backends.{backend}").glm5_backend().probe()
    return found


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


@pytest.fixture
def empty(tools: Path) -> Path:
    """The same folder each time: as fast as none."""
    for tool in tools.iterdir():
        tool.unlink()
    return tools


def check_refusal(found: Device | Unavailable, backend: str) -> None:
    assert isinstance(found, Unavailable), f"{backend} takes {found}"
    assert found.reason, backend
    assert found.fix, backend


def check_device(found: Device | Unavailable, runs: str) -> None:
    assert isinstance(found, Device), found
    identity = IDENTITIES[runs]
    assert (found.type, found.count, found.evidence) == (identity.type, 2, "hardware")
    assert identity.name in found.name
    assert found.arch
    assert found.versions["torch"] == identity.torch


@pytest.mark.parametrize("runs", IDENTITIES)
def test_alone_a_device_is_its_vendors(runs: str, empty: Path) -> None:
    for backend in BACKENDS:
        with machine([runs], runs, tools=empty):
            found = probe(backend)
        if backend == IDENTITIES[runs].backend:
            check_device(found, runs)
        else:
            check_refusal(found, backend)


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
@of_two
def test_of_two_the_one_that_runs_answers(pair: tuple[str, str], runs: str | None, loaded: bool, empty: Path) -> None:
    owner = IDENTITIES[runs].backend if runs else ""
    for backend in BACKENDS:
        with machine(pair, runs, tools=empty, loaded=loaded) as asked:
            found = probe(backend)
        if backend == owner:
            check_device(found, runs or "")
        else:
            check_refusal(found, backend)
        assert {whose for whose, _ in asked} <= {backend}, f"{backend} asked {asked}"


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
@of_two
def test_asked_one_after_the_other_in_one_process_they_say_the_same(
    pair: tuple[str, str], runs: str | None, order: int, empty: Path
) -> None:
    owner = IDENTITIES[runs].backend if runs else ""
    with machine(pair, runs, tools=empty):
        found = {backend: probe(backend) for backend in BACKENDS[::order]}
    assert [backend for backend, answer in found.items() if isinstance(answer, Device)] == [owner][: bool(owner)]


# --- a broken SDK ----------------------------------------------------------------------------------------------------

EXTENSIONS = ("ascend", "musa", "cambricon", "enflame")


def no_library(module: ModuleType) -> None:
    raise ImportError("libsdk.so.1: cannot open shared object file: No such file or directory")


def wrong_build(module: ModuleType) -> None:
    raise OSError("undefined symbol: _ZN3c1010TensorImplE")


def assertion(module: ModuleType) -> None:
    raise AssertionError


def leaves(module: ModuleType) -> None:
    raise SystemExit(3)


def empty_module(module: ModuleType) -> None:
    """It is imported, and gives torch nothing."""


#: What an SDK does at its import, and words of it that the user must be told.
AT_IMPORT = {no_library: "libsdk.so", wrong_build: "undefined symbol", assertion: "AssertionError", empty_module: ""}


@pytest.mark.parametrize("broken", AT_IMPORT, ids=lambda b: b.__name__)
@pytest.mark.parametrize("runs", EXTENSIONS)
def test_an_extension_that_breaks_at_import_is_told_with_what_to_do(
    runs: str, broken: Callable[[ModuleType], None], empty: Path
) -> None:
    with machine([runs], runs, tools=empty, broken=broken):
        found = {backend: probe(backend) for backend in BACKENDS}
    for backend, answer in found.items():
        check_refusal(answer, backend)
    mine = found[IDENTITIES[runs].backend]
    assert isinstance(mine, Unavailable)
    assert AT_IMPORT[broken] in mine.reason
    assert IDENTITIES[runs].extension in mine.reason + mine.fix


@pytest.mark.parametrize("runs", EXTENSIONS)
def test_one_that_leaves_is_stopped_where_probes_are_called(runs: str, empty: Path) -> None:
    backend = IDENTITIES[runs].backend
    record = load(PluginRecord(backend, f"glm5_hal.backends.{backend}", "glm5-hal", "0", builtin=True), None)
    with machine([runs], runs, tools=empty, broken=leaves):
        found = plugins.probe(record)
    assert isinstance(found, Unavailable)
    assert "SystemExit: 3" in found.reason
    assert found.fix
    assert found.fault


@pytest.mark.parametrize("runs", [key for key in IDENTITIES if IDENTITIES[key].backend])
def test_no_device_is_no_ones(runs: str, empty: Path) -> None:
    for backend in BACKENDS:
        with machine([runs], runs, tools=empty, count=0):
            check_refusal(probe(backend), backend)


QUESTIONS_OF = [(key, question) for key in IDENTITIES if IDENTITIES[key].backend for question in QUESTIONS]


@pytest.mark.parametrize(("runs", "question"), QUESTIONS_OF)
def test_a_driver_that_raises_is_told_and_no_probe_does(
    runs: str, question: str, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("driver error 999")

    monkeypatch.setattr(f"machines.Driver.{question}", fail)
    own = IDENTITIES[runs].backend
    for backend in BACKENDS:
        with machine([runs], runs, tools=empty):
            found = probe(backend)
        if backend != own:
            check_refusal(found, backend)
        elif isinstance(found, Unavailable):  # or it did not ask that
            check_refusal(found, backend)
            assert "driver error 999" in found.reason
            assert found.fault


# --- one that takes its process along: only a process of its own helps -----------------------------------------------

#: How each SDK ends or stops whoever imports it, or asks it for a device.
DEADLY = {
    "torch_musa": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "torch_mlu": "import time; time.sleep(1000)",
    "torch_gcu": """
import os, signal, types, torch
def is_available(): os.kill(os.getpid(), signal.SIGABRT)
torch.gcu = types.SimpleNamespace(is_available=is_available, device_count=int, get_device_name=str)
""",
    "torch_npu": """
import time, types
npu = types.SimpleNamespace(is_available=lambda: time.sleep(1000))
""",
}


@pytest.fixture(scope="module")
def deadly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine where all of them are installed, and every backend is announced."""
    site = tmp_path_factory.mktemp("site")
    for name, code in DEADLY.items():
        (site / f"{name}.py").write_text(code)
    about = site / "glm5_hal-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: glm5-hal\nVersion: 0\n")
    points = "\n".join(f"{name} = glm5_hal.backends.{name}" for name in BACKENDS)
    (about / "entry_points.txt").write_text(f"[glm5_hal.backends]\n{points}\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def run(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=120)


def test_deadly_sdks_do_not_touch_who_computes_elsewhere(deadly: dict[str, str]) -> None:
    code = "import glm5_hal, torch; x = torch.ones(1, 4); print(glm5_hal.ops.rms_norm(x, x[0], eps=0.0).tolist())"
    done = run(deadly, "-c", code)
    assert done.stdout.strip() == "[[1.0, 1.0, 1.0, 1.0]]", done.stderr


def test_doctor_survives_them_and_says_whose_they_are(deadly: dict[str, str]) -> None:
    done = run(deadly, "-m", "glm5_hal", "doctor", "--json", "--timeout", "10")
    found = {backend["name"]: backend for backend in json.loads(done.stdout)["backends"]}
    assert found.keys() >= {"cpu", *BACKENDS}
    assert found["cpu"]["state"] == "ok"
    ends = {"musa": "died with SIGSEGV", "cambricon": "did not answer within 10 s", "enflame": "died with SIGABRT"}
    for name, end in {**ends, "ascend": "did not answer within 10 s"}.items():
        assert found[name]["state"] == "broken", found[name]
        assert end in found[name]["finding"], found[name]
        assert f"{IDENTITIES[name].extension}.py" in found[name]["finding"], found[name]
        assert IDENTITIES[name].tools[0] in found[name]["fix"], found[name]
    for name in ("cuda", "hygon", "kunlunxin", "metax"):
        assert found[name]["state"] == "absent", found[name]
        assert found[name]["fix"]
    assert done.returncode == 1


def test_list_survives_one_that_crashes(deadly: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "torch_mlu.py").write_text("raise ImportError('libcndrv.so')")  # a hang would take its 20 seconds
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so')")
    env = {**deadly, "PYTHONPATH": f"{tmp_path}{os.pathsep}{deadly['PYTHONPATH']}"}
    done = run(env, "-m", "glm5_hal", "list", "--json")
    assert done.returncode == 0, done.stderr[-300:]
    assert {"cpu", *BACKENDS} <= {backend["name"] for backend in json.loads(done.stdout)["backends"]}
