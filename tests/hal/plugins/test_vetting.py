"""All plugins at once, each in a process of its own: what does not survive there is not loaded here."""

import sys
from pathlib import Path

import pytest

from glm5_hal import context
from glm5_hal.backend import Unavailable
from glm5_hal.catalogue import Catalogue
from glm5_hal.plugins import PROBE_DEADLINE, Checkup, PluginRecord, check_up, check_up_all, child, find, vetted

from .site import GOOD, Site, probing

EXIT = "import os; os._exit(0)" + GOOD


def found(site: Site) -> list[PluginRecord]:
    return [r for r in find() if not r.builtin]


def test_every_plugin_is_checked_and_none_is_loaded_here(site: Site) -> None:
    site.install("acme")
    site.install("exits", EXIT)
    checked = {c.record.name: c for c in check_up_all(found(site), last="probe")}
    assert {name: c.record.code for name, c in checked.items()} == {"acme": "", "exits": "CRASH"}
    assert not {"acme_plugin", "exits_plugin"} & sys.modules.keys()


def test_clashes_of_names_are_found_without_loading_either(site: Site) -> None:
    site.install("acme", dist="acme-hal")
    site.install("acme", dist="acme-fork", value="acme_plugin")
    site.install("cpu", EXIT, dist="fast-cpu")
    codes = [c.record.code for c in check_up_all(find(), last="load") if not c.record.builtin]
    assert sorted(codes) == ["BUILTIN_NAME", "DUPLICATE", "DUPLICATE"]


def test_what_crashed_is_failed_and_what_is_in_order_is_still_to_be_loaded(site: Site) -> None:
    site.install("acme")
    site.install("exits", EXIT)
    site.install("dies", probing("import ctypes; ctypes.string_at(0)"))
    site.install("absent", probing("return Unavailable('no card', 'plug it in')"))
    site.install("raises", probing("raise OSError('no driver')"))
    site.install("odd", probing("return True"))
    site.install("says", probing("return Unavailable('old driver', 'update it', fault=True)"))
    records = {r.name: r for r in vetted(found(site))}
    assert {name: r.code for name, r in records.items()} == {
        "acme": "",
        "absent": "",
        "raises": "",
        "odd": "",
        "says": "",
        "exits": "CRASH",
        "dies": "CRASH",
    }
    assert "in a process of its own: the probe died with SIGSEGV" in records["dies"].reason
    catalogue = Catalogue(list(records.values()))
    assert catalogue.record("acme").backend is not None
    assert catalogue.record("dies").backend is None
    raising = catalogue.device("raises")
    assert isinstance(raising, Unavailable)
    assert "the probe raised OSError: no driver" in raising.reason


def test_a_probe_has_the_time_of_a_probe(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def check_up(record: PluginRecord, deadline: float, last: str) -> Checkup:
        given.append(deadline)
        return Checkup(record)

    site.install("acme")
    monkeypatch.setattr(child, "check_up", check_up)
    vetted(found(site))
    assert given == [PROBE_DEADLINE]


def test_a_call_loads_no_plugin_that_cannot_serve_it(site: Site, tmp_path: Path) -> None:
    """So neither a slow import nor a fatal one is anyone's but its own."""
    import torch

    import glm5_hal

    loaded = tmp_path / "loaded"
    noting = f"with open({str(loaded)!r}, 'a') as file: file.write('{{}} ')" + GOOD
    site.install("acme", noting.format("acme"))
    site.install("zeta", noting.format("zeta"))
    site.install("cpu", EXIT, dist="fast-cpu")
    with context.installed(Catalogue()):
        x = torch.ones(2, 3)
        glm5_hal.ops.rms_norm(x, x[0], eps=1e-5)
        with glm5_hal.use("cpu"):
            glm5_hal.ops.rms_norm(x, x[0], eps=1e-5)
        assert not loaded.exists()
        with glm5_hal.use("zeta,cpu"):
            assert glm5_hal.ops.rms_norm.choose(x, x[0], eps=1e-5).name == "cpu:torch"
        assert loaded.read_text() == "zeta "


def test_a_plugin_that_looks_at_all_plugins_while_it_is_tried_makes_no_chain(site: Site, tmp_path: Path) -> None:
    log, listed = tmp_path / "log", tmp_path / "listed"
    source = f"""
import subprocess, sys
with open({str(log)!r}, "a") as f: f.write("x")
asked = f"import sys; sys.path[:] = {{sys.path!r}}; from glm5_hal.plugins import check_up_all, find; "
asked += "print([(c.record.name, c.record.code) for c in check_up_all(find())])"
with open({str(listed)!r}, "w") as f: subprocess.run([sys.executable, "-c", asked], stdout=f)
"""
    site.install("acme", source + GOOD)
    (record,) = (record for record in find() if record.name == "acme")
    assert check_up(record).record.status == "ok"
    assert log.read_text() == "x", "by the child alone"
    assert "('acme', 'NESTED')" in listed.read_text()
    assert "('cpu', '')" in listed.read_text()
