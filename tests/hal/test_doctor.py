"""The doctor: every backend, what was found, what is wrong, what to do; and the others go on working."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import checked_here, installed, stand_in

import glm5_hal
from glm5_hal import context, plugins
from glm5_hal.backend import Kernel, Unavailable
from glm5_hal.catalogue import Catalogue
from glm5_hal.cli import main
from glm5_hal.conformance import identity
from glm5_hal.doctor import Patient, examine, render
from glm5_hal.hookspecs import GROUP
from glm5_hal.inventory import inventory
from glm5_hal.ops import specs
from glm5_hal.plugins import PluginRecord, child

NORM = specs()["rms_norm"]


@pytest.fixture
def in_process(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Probes without a process each: what these tests are about is what the doctor makes of the answer."""
    fresh.setattr(child, "check_up", checked_here)
    return fresh


def patient(*records: PluginRecord) -> Patient:
    with installed(*records):
        (found,) = examine().backends
        return found


def norm(fn: Any = NORM.reference) -> Sequence[Kernel]:
    return [Kernel("rms_norm", "native", fn)]


def test_a_backend_that_works(in_process: pytest.MonkeyPatch) -> None:
    found = patient(stand_in("acme", norm()))
    assert (found.name, found.state, found.fix) == ("acme", "ok", "")
    assert found.source == "acme-hal 1.0"
    assert found.finding == "acme device (toy1), 1 visible"
    assert found.kernel == "rms_norm on acme:native: right"
    assert found.device["evidence"] == "simulated"
    assert found.device["versions"] == {"driver": "1.2.3"}


def test_a_machine_without_the_device_is_no_fault(in_process: pytest.MonkeyPatch) -> None:
    with installed(stand_in("acme", probe=lambda: Unavailable("no card", "plug it in"))):
        found = examine()
    (absent,) = found.backends
    assert (absent.state, absent.finding, absent.fix) == ("absent", "no card", "plug it in")
    assert found.ok


def failing(x: Any, weight: Any, *, eps: float) -> Any:
    raise RuntimeError("illegal address")


def wrong(x: Any, weight: Any, *, eps: float) -> Any:
    return x


def deeper(x: Any, weight: Any, *, eps: float) -> Any:
    return NORM.reference(x, weight, eps=eps)[None]


def longer(x: Any, weight: Any, *, eps: float) -> Any:
    return torch.cat([x, x, x], -1)


def offering_nothing() -> Sequence[Kernel]:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (stand_in("acme", norm(failing)), "RuntimeError: illegal address"),
        (stand_in("acme", norm(wrong)), "acme:native gave [[3.0, 4.0]], the answer is [[0.84"),
        (stand_in("acme", norm(deeper)), "acme:native gave [[[0.84"),
        (stand_in("acme", norm(longer)), "acme:native gave [[3.0, 4.0, 3.0"),
        (stand_in("acme", offering_nothing), "no compiler"),
    ],
)
def test_a_tiny_kernel_that_is_not_right_is_a_fault(
    in_process: pytest.MonkeyPatch, record: PluginRecord, words: str
) -> None:
    found = patient(record)
    assert found.state == "broken"
    assert words in found.kernel
    assert found.fix


def test_a_backend_with_other_ops_alone_is_no_fault(in_process: pytest.MonkeyPatch) -> None:
    found = patient(stand_in("acme", [Kernel("rope", "native", specs()["rope"].reference)]))
    assert (found.state, found.kernel) == ("ok", "no rms_norm to try")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GLM5_BACKEND", "acmee", "did you mean 'acme'?"),
        ("GLM5_BACKENDS", "acme", "GLM5_BACKEND was meant?"),
        ("GLM5_LOG", "loud", "GLM5_LOG='loud'"),
    ],
)
def test_a_bad_setting_is_the_environments_fault_and_no_backends(
    in_process: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    in_process.setenv(name, value)
    with installed(stand_in("acme", norm())):
        found = examine()
    assert not found.ok
    assert words in found.problem
    assert [p.state for p in found.backends] == ["ok"]


def test_settings_are_listed_with_their_origin(in_process: pytest.MonkeyPatch) -> None:
    in_process.setenv("GLM5_BACKEND", "acme")
    in_process.setenv("GLM5_SHADOW", "topk_*:.1, *:0.01;file=/tmp/s.jsonl")
    in_process.setenv("GLM5_TEST_RIG", "7")
    with installed(stand_in("acme", norm())):
        found = examine()
    assert found.settings == {
        "GLM5_BACKEND": "acme (GLM5_BACKEND)",
        "GLM5_LOG": "off (default)",
        "GLM5_SHADOW": "topk_*:0.1,*:0.01; file=/tmp/s.jsonl (GLM5_SHADOW)",
        "GLM5_TEST_RIG": "not ours: ignored",
    }
    assert {"python", "platform", "torch", "glm5-hal"} <= set(found.versions)


def test_a_package_whose_metadata_cannot_be_read_is_listed_as_such(
    in_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "triton-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_bytes(b"Name: triton\nVersion: 1\nAuthor: \xe9\n")
    in_process.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with installed(stand_in("acme", norm())):
        said = examine().versions["triton"]
    assert said.startswith("cannot be read: 'utf-8' codec")
    assert identity._installed()["triton"] == said


def test_a_setting_that_is_not_there_is_listed_with_its_default(in_process: pytest.MonkeyPatch) -> None:
    with installed(stand_in("acme", norm())):
        found = examine()
    assert found.settings["GLM5_SHADOW"] == "off (default)"


def test_the_report_shows_each_fix_in_full(in_process: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    fix = "install the driver of at least version 7.3 from the vendor's site [not a tag]"
    with installed(stand_in("acme", probe=lambda: Unavailable("no card [odd]", fix))):
        Console(width=200).print(render(examine()))
    out = capsys.readouterr().out
    assert f"acme: {fix}" in out
    assert "no card [odd]" in out


# Plugins that are really installed, and really broken

HEAD = """
from glm5_hal import Backend, Device, Unavailable, hookimpl
def probe():
    return Device(type="cpu", name="One", arch="a1")
def kernels():
    return ()
"""
HOOK = """
@hookimpl
def glm5_backend():
    return Backend(name=NAME, device_type="cpu", probe=probe, kernels=kernels{more})
"""

BROKEN: dict[str, tuple[str, str, str, str, str]] = {
    # name: source, more of the Backend, state, the reason, the fix
    "no_sdk": ("def probe():\n    import acme_sdk_of_nobody", "", "broken", "acme_sdk_of_nobody", "no-sdk-hal"),
    "no_sdk_at_all": ("import acme_sdk_of_nobody", "", "broken", "acme_sdk_of_nobody", "install acme_sdk_of_nobody"),
    "hangs": ("import time\ndef probe():\n    time.sleep(600)", "", "broken", "did not answer within", "driver"),
    "crashes": ("import os\ndef probe():\n    os.abort()", "", "broken", "SIGABRT", "driver"),
    "future": ("", ", hal_api=99", "broken", "hal_api 99", "pip install -U 'glm5-hal'"),
    "cpu": ("", "", "broken", "built-in", "pip uninstall"),
}
TWICE = ("twins", "first-twin", "second-twin")


def install(site: Path, name: str, source: str, more: str, dist: str = "") -> None:
    dist = dist or f"{name.replace('_', '-')}-hal"
    info = site / f"{dist.replace('-', '_')}-1.0.dist-info"
    module = f"{dist.replace('-', '_')}_module"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}\n")
    code = f"NAME = {name!r}\n{HEAD}{textwrap.dedent(source)}\n{HOOK.format(more=more)}"
    (site / f"{module}.py").write_text(code)


@pytest.fixture
def ward(tmp_path: Path, fresh: pytest.MonkeyPatch) -> Iterator[Path]:
    """All of them at once."""
    site = tmp_path / "site"
    site.mkdir()
    for name, (source, more, *_) in BROKEN.items():
        install(site, name, source, more)
    for dist in TWICE[1:]:
        install(site, TWICE[0], "", "", dist)
    fresh.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield site
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(site)):
            del sys.modules[name]


def test_broken_plugins_are_named_with_reason_and_fix(ward: Path, fresh: pytest.MonkeyPatch) -> None:
    context._process.catalogue = Catalogue([r for r in Catalogue(plugins.find()).records if not r.builtin])
    found = examine(timeout=8.0)  # which only the one that hangs needs
    assert not found.ok
    patients: dict[str, list[Patient]] = {}
    for p in found.backends:
        patients.setdefault(p.name, []).append(p)
    for name, (_, _, state, reason, fix) in BROKEN.items():
        (one,) = patients[name]
        assert one.state == state
        assert reason in one.finding
        assert fix in one.fix
    twins = patients[TWICE[0]]
    assert len(twins) == 2
    for one in twins:
        assert one.state == "broken"
        assert all(dist in one.finding for dist in TWICE[1:])
        assert "uninstall one of them" in one.fix


@pytest.mark.parametrize(
    ("policy", "problem"),
    [("cpu:torhc", "did you mean 'torch'?"), ("hangs:native,cpu", ""), ("crashes:native", ""), ("kernels:native", "")],
)
def test_the_policy_is_checked_by_what_the_children_told(
    ward: Path, fresh: pytest.MonkeyPatch, policy: str, problem: str
) -> None:
    install(ward, "kernels", "import os\ndef kernels():\n    os._exit(0)", "")
    fresh.setenv("GLM5_BACKEND", policy)
    named = [r for r in plugins.find() if r.name == policy.partition(":")[0]]
    with installed(*named, *(r for r in plugins.find() if r.name == "cpu" and r.builtin and r not in named)):
        found = examine(timeout=8.0)
    assert problem in found.problem
    assert bool(found.problem) == bool(problem)
    assert not found.ok


def test_everything_else_works_beside_broken_plugins(
    ward: Path, fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x, w = torch.ones(2, 4), torch.ones(4)
    assert glm5_hal.ops.rms_norm(x, w, eps=1e-5).shape == (2, 4)
    listed = {b["name"]: b["status"] for b in inventory()["backends"] if not b["builtin"]}
    assert listed == {
        "no_sdk": "ok", "no_sdk_at_all": "broken", "hangs": "ok", "crashes": "ok",
        "future": "refused", "cpu": "refused", "twins": "refused",
    }  # fmt: skip
    assert glm5_hal.ops.rms_norm.choose(x, w, eps=1e-5).name == "cpu:torch"
    out = ward.parent / "out"
    words = ["conformance", "run", "--backend", "cpu:torch", "--op", "rms_norm", "--json", "--out", str(out)]
    fresh.setattr(sys, "argv", ["glm5-hal", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)


def test_the_built_in_backend_is_well() -> None:
    with installed(*[r for r in Catalogue(plugins.find()).records if r.name == "cpu" and r.builtin]):
        (found,) = examine(timeout=60).backends
    assert (found.state, found.kernel) == ("ok", "rms_norm on cpu:torch: right")
    assert found.communicator == "gloo", "told by the child, which alone has loaded it"
