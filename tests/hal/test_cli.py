"""The command line: what it prints, to which stream, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toys import checked_here, installed, stand_in

from glm5_hal import cli
from glm5_hal.backend import Kernel, Unavailable
from glm5_hal.errors import CODES, HalError
from glm5_hal.inventory import inventory
from glm5_hal.ops import specs
from glm5_hal.plugins import PluginRecord, child


@dataclass(frozen=True)
class Done:
    code: Any
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process: its exit code and what it printed."""
    fresh.setenv("COLUMNS", "200")
    fresh.setattr(child, "check_up", checked_here)

    def call(*words: str) -> Done:
        fresh.setattr(sys, "argv", ["glm5-hal", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return Done(left.value.code, said.out, said.err)

    return call


# Every command as data


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("list",), {"ops", "backends", "cache_formats"}),
        (("doctor",), {"ok", "backends", "versions", "settings", "problem"}),
        (("explain", "rms_norm"), {"op", "policy", "tensors", "scalars", "chosen", "trace"}),
        (("params", "glm-5"), set[str]()),
        (("conformance", "list", "--op", "rms_norm"), {"cases"}),
    ],
)
def test_json_is_one_object_and_nothing_else(run: Any, words: tuple[str, ...], keys: set[str]) -> None:
    done = run(*words, "--json")
    assert (done.code, done.err) == (0, "")
    assert isinstance(done.data, dict)
    assert keys <= set(done.data)


def test_a_run_of_the_suite_as_data(run: Any, tmp_path: Path) -> None:
    done = run("conformance", "run", "--backend", "cpu:torch", "--op", "rms_norm", "--out", str(tmp_path), "--json")
    assert done.code == 0
    assert done.data["out"] == str(tmp_path)
    assert [json.loads(line)["op"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]


def test_list_shows_every_op_backend_and_format(run: Any) -> None:
    done = run("list")
    assert done.code == 0
    for name in (*specs(), "cpu", "torch, reference", "latent_576", "fp8_132"):
        assert name in done.out
    assert {op["name"] for op in inventory()["ops"]} == set(specs())


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("raise RuntimeError('no compiler')", "no compiler"), ("os.abort()", "the probe died with SIGABRT")],
)
def test_list_survives_built_in_backends_that_cannot_offer_their_kernels(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, reason: str
) -> None:
    source = """
import os
from glm5_hal import Backend, Device, hookimpl
def kernels(): {}
@hookimpl
def glm5_backend(): return Backend({!r}, "cpu", probe=lambda: Device("cpu", "a CPU", ""), kernels=kernels)
"""
    records = []
    for name, does in {"first": broken, "second": "return ()"}.items():
        (tmp_path / f"{name}_of_ours.py").write_text(source.format(does, name))
        records.append(PluginRecord(name, f"{name}_of_ours", "glm5-hal", "0", builtin=True))
    monkeypatch.syspath_prepend(tmp_path)
    with installed(*records):
        found = {backend["name"]: backend for backend in run("list", "--json").data["backends"]}
        shown = run("list").out
    assert (found["first"]["status"], found["first"]["providers"]) == ("broken", [])
    assert (found["second"]["status"], found["second"]["reason"]) == ("ok", "")
    assert reason in found["first"]["reason"]
    assert f"fix: {found['first']['fix']}" in shown
    assert reason in shown


def test_list_probes_no_outside_plugin(run: Any) -> None:
    def probe() -> Any:
        raise AssertionError("probed")

    with installed(stand_in("acme", probe=probe)):
        (found,) = run("list", "--json").data["backends"]
    assert (found["status"], found["providers"]) == ("ok", [])


# explain


def test_explain_shows_every_candidate(run: Any) -> None:
    limited = specs()["topk_indices"]
    from glm5_hal.capability import limit

    kernels = [Kernel("topk_indices", "native", limited.reference, (limit("top_k", 2048),))]
    with installed(stand_in("acme", kernels)):
        done = run("explain", "topk_indices", "top_k=4096", "T=3", "dtype=bfloat16")
        assert done.code == 1, "no kernel takes the call"
        assert "scores bfloat16[3, 150]" in done.out
        assert "LIMIT  top_k must be <= 2048, got 4096  -> use top_k=2048" in done.out
        assert done.err == ""
        done = run("explain", "topk_indices", "top_k=4096", "--json")
        assert (done.code, done.data["chosen"]) == (1, None)
        assert run("explain", "topk_indices", "top_k=2048").code == 0


def test_explain_takes_a_policy_and_requirements(run: Any) -> None:
    done = run("explain", "topk_indices", "--backend", "cpu:torch", "--require", "canonical_ties", "--require",
               "deterministic", "--json")  # fmt: skip
    assert done.data["chosen"] == "cpu:torch"
    assert done.data["policy"] == {"text": "cpu:torch", "provenance": "hal.use"}
    assert run("explain", "topk_indices", "--require", "determinstic").code == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=3", 3),
        ("k=0.5", 0.5),
        ("k=true", True),
        ("k=False", False),
        ("k=None", None),
        ("k=fp8_656", "fp8_656"),
        ("k=a=b", "a=b"),
    ],
)
def test_how_settings_are_read(text: str, value: object) -> None:
    assert cli._setting(text) == ("k", value)
    assert type(cli._setting(text)[1]) is type(value)


# Errors


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("explain", "rms_nrom"), 2, "did you mean 'rms_norm'?"),
        (("explain", "topk_indices", "topk=3"), 2, "did you mean 'top_k'?"),
        (("explain", "topk_indices", "3"), 2, "'3' is not NAME=VALUE"),
        (("explain", "topk_indices", "top_k=-1"), 2, "[SCALAR]"),
        (("explain", "topk_indices", "--backend", "cqu"), 2, "did you mean 'cpu'?"),
        (("explain",), 2, "Missing argument"),
        (("explain", "rms_norm", "--jsn"), 2, "No such option"),
        (("doctor", "--timeout", "0"), 2, "--timeout"),
        (("doctor", "--timeout", "soon"), 2, "--timeout"),
        (("nothing",), 2, "No such command"),
        (("params", "glm-4"), 2, "glm-4"),
        (("conformance", "run", "--backend", "emca"), 2, "known: "),
        (("conformance", "run", "--level", "quick"), 2, "quick"),
        (("bench", "--model", "glm-5", "--dtype", "bf16"), 2, "did you mean 'bfloat16'?"),
        (("bench", "--model", "glm-5", "--op", "rms_norm"), 2, "[CONFIG] --op"),
        (("bench", "--model", "glm-5", "--level", "smoke"), 2, "[CONFIG] --level"),
        (("bench", "--model", "glm-5", "--seconds", "1"), 2, "[CONFIG] --seconds"),
        (("bench", "--context", "64"), 2, "[CONFIG] --context"),
        (("bench", "--batch", "1"), 2, "[CONFIG] --batch"),
        (("bench", "--tokens", "1"), 2, "[CONFIG] --tokens"),
        (("bench", "--experts", "8"), 2, "[CONFIG] --experts"),
        (("bench", "--device", "cpu"), 2, "[CONFIG] --device"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_exit_code_2(run: Any, words: tuple[str, ...], code: int, said: str) -> None:
    done = run(*words)
    assert (done.code, done.out) == (code, "")
    assert said in done.err


def test_a_device_that_is_not_there_is_exit_code_3(run: Any, tmp_path: Path) -> None:
    with installed(stand_in("acme", probe=lambda: Unavailable("no card", "plug it in"))):
        done = run("conformance", "run", "--backend", "acme", "--in-process", "--out", str(tmp_path))
    assert (done.code, done.out) == (3, "")
    assert "no card" in done.err
    assert "fix: plug it in" in done.err


EXITS = {"UNAVAILABLE": 3, "PLUGIN": 3, "NO_KERNEL": 1, "KERNEL": 1}


@pytest.mark.parametrize("code", CODES)
def test_each_error_has_its_exit_code(run: Any, fresh: pytest.MonkeyPatch, code: str) -> None:
    def fail() -> None:
        raise HalError(code, "something", fix="do that")

    fresh.setattr(cli, "app", fail)
    done = run()
    assert done.code == EXITS.get(code, 2)
    assert done.err == f"error [{code}] something\n  fix: do that\n"


def test_the_doctor_fails_where_something_is_broken(run: Any, fresh: pytest.MonkeyPatch) -> None:
    norm = [Kernel("rms_norm", "native", specs()["rms_norm"].reference)]
    with installed(stand_in("acme", norm)):
        assert run("doctor").code == 0
        fresh.setenv("GLM5_BACKEND", "acmee")
        done = run("doctor")
        assert (done.code, done.err) == (1, "")
        assert "did you mean 'acme'?" in done.out
    with installed(stand_in("acme", probe=lambda: 1 / 0)):  # type: ignore[arg-type, return-value]
        fresh.delenv("GLM5_BACKEND")
        done = run("doctor")
        assert done.code == 1
        assert "ZeroDivisionError" in done.out


def test_no_command_is_help(run: Any) -> None:
    done = run()
    assert "Usage" in done.out + done.err
    for command in ("list", "doctor", "explain", "params", "bench", "new-backend", "conformance"):
        assert command in done.out + done.err


# A process of its own


def test_as_a_module_without_colour_and_with_settings_that_are_wrong() -> None:
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM5_")}
    env |= {"NO_COLOR": "1", "FORCE_COLOR": "1", "GLM5_BACKENDS": "cpu"}
    words = [sys.executable, "-m", "glm5_hal", "explain", "rms_norm"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error [UNKNOWN] GLM5_BACKENDS is set, and means nothing")


@pytest.mark.parametrize("words", [("list",), ("doctor",)])
def test_no_colour_is_printed_where_none_is_wanted(run: Any, fresh: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    fresh.setenv("FORCE_COLOR", "1")
    fresh.setenv("NO_COLOR", "1")
    colours = ("\x1b[3", "\x1b[9")
    assert not any(code in run(*words).out for code in colours)


LIGHT = """
import sys
import glm5_hal
from glm5_hal.cli import app
glm5_hal.HalError, glm5_hal.Backend, glm5_hal.hookimpl
assert "torch" not in sys.modules
"""


def test_neither_the_package_nor_the_command_line_imports_torch_before_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# bench


def test_what_bench_is_not_told_is_what_its_measure_says(run: Any, fresh: pytest.MonkeyPatch) -> None:
    """So that a model runs under the policy in force, and an op on the CPU."""
    from glm5_hal.conformance import bench as of_ops

    told: list[Any] = []

    def measure(*args: Any, **kwargs: Any) -> Any:
        told.append((args, kwargs))
        raise HalError("CONFIG", "enough")

    fresh.setattr(of_ops, "measure", measure)
    run("bench")
    run("bench", "--op", "rope", "--level", "smoke", "--seconds", "0.1", "--backend", "acme", "--dtype", "float32")
    assert [args for args, _ in told] == [
        ("cpu", ["*"], "standard", "bfloat16", 0.5),
        ("acme", ["rope"], "smoke", "float32", 0.1),
    ]
    of_models = ModuleType("bench")
    of_models.measure, of_models.render = measure, None  # type: ignore[attr-defined]
    fresh.setitem(sys.modules, "glm5_hal.integrations.transformers", ModuleType("transformers"))
    fresh.setitem(sys.modules, "glm5_hal.integrations.transformers.bench", of_models)
    run("bench", "--model", "glm-5")
    run("bench", "--model", "glm-5", "--context", "9", "--batch", "2", "--dtype", "float32", "--backend", "acme")
    assert told[2:] == [
        (("glm-5",), {}),
        (("glm-5",), {"context": 9, "batch": 2, "dtype": "float32", "backend": "acme"}),
    ]
