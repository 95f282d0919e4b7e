"""Which plugins are found, which of them clash, and in which order they come."""

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from glm5_hal.hookspecs import GROUP
from glm5_hal.plugins import find

from .site import GOOD, HEAD, Site, backend, discover


def test_two_distributions_with_one_backend_name_are_both_refused(site: Site) -> None:
    site.install("acme", dist="acme-hal", version="1.0")
    site.install("acme", dist="acme-fork", version="2.1", value="acme_plugin")
    records = site.records()
    assert [record.dist for record in records] == ["acme-fork", "acme-hal"]
    for record in records:
        assert (record.status, record.code, record.backend) == ("refused", "DUPLICATE", None)
        assert "acme-fork 2.1 (acme_plugin) and acme-hal 1.0 (acme_plugin); neither is used" in record.reason
        assert record.fix == "uninstall one of them: pip uninstall acme-fork or pip uninstall acme-hal"


def test_one_distribution_that_offers_a_name_twice_is_refused(site: Site) -> None:
    twice = f"[{GROUP}]\nacme = acme_plugin\nacme = acme_plugin:again\n"
    site.install("acme", GOOD + "import sys\nagain = sys.modules[__name__]", entry_points=twice)
    assert [record.code for record in site.records()] == ["DUPLICATE", "DUPLICATE"]


def test_a_broken_rival_does_not_take_the_working_one_down(site: Site) -> None:
    site.install("acme", dist="acme-hal")
    site.install("acme", None, dist="acme-fork", value="gone_plugin")
    assert {record.dist: record.status for record in site.records()} == {"acme-hal": "ok", "acme-fork": "broken"}


def test_an_outside_plugin_cannot_take_a_builtin_name(site: Site) -> None:
    site.install("cpu", dist="glm5-hal", version="0.9")
    site.install("cpu", dist="fast-cpu", value="cpu_plugin")
    ours, theirs = site.records()
    assert (ours.dist, ours.builtin, ours.status) == ("glm5-hal", True, "ok")
    assert (theirs.dist, theirs.status, theirs.code) == ("fast-cpu", "refused", "BUILTIN_NAME")
    assert theirs.reason == "'cpu' is a built-in backend of glm5-hal 0.9, and fast-cpu 1.0 offers it too"
    assert "pip uninstall fast-cpu" in theirs.fix


def test_metadata_that_is_found_twice_is_one_plugin(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site.folder), f"{site.folder}/"])
    assert [record.status for record in site.records()] == ["ok"]


@pytest.mark.parametrize("backwards", [False, True])
def test_stale_metadata_of_older_versions_is_not_a_second_plugin(
    site: Site, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    for version in ("0.9", "0.10", "0.8"):
        site.install("acme", version=version, value="acme_plugin" if version == "0.10" else "old_plugin")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder=".": sorted(listed(folder), reverse=backwards))
    (record,) = site.records()
    assert (record.status, record.version, record.value) == ("ok", "0.10", "acme_plugin")


def test_of_two_folders_the_first_on_the_path_counts(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Site(tmp_path / "later")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later.folder)])
    later.install("acme", version="2.0")
    site.install("acme", version="1.0")
    (record,) = site.records()
    assert (record.status, record.version) == ("ok", "1.0")


def test_the_same_entry_point_given_twice_is_one_plugin(site: Site) -> None:
    site.install("acme")
    (point,) = metadata.distribution("acme-hal").entry_points
    assert [record.status for record in discover([point, point])] == ["ok"]


def test_an_entry_point_of_no_distribution(site: Site) -> None:
    site.install("acme", "raise ValueError")
    (record,) = discover([metadata.EntryPoint("acme", "acme_plugin", GROUP)])
    assert (record.dist, record.code) == ("", "IMPORT")
    assert "reinstall what offers the entry point acme = 'acme_plugin'" in record.fix


def test_entry_points_that_cannot_be_read_are_a_record_of_their_distribution(site: Site) -> None:
    site.install("acme", entry_points=f"[{GROUP}]\nno equals sign here\n")
    site.install("zeta")
    record = site.record("acme-hal")
    assert (record.status, record.code) == ("broken", "METADATA")
    assert "pip install -U 'acme-hal'" in record.fix
    assert site.record("zeta").status == "ok"


def test_a_distribution_that_cannot_be_read_at_all_hides_no_other(site: Site) -> None:
    site.install("acme")
    (site.folder / "odd-1.0.dist-info").mkdir()
    (site.folder / "odd-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe\x00")
    (site.folder / "zeta_hal-1.0.dist-info").mkdir()
    (site.folder / "zeta_hal-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\nzeta = gone\n")
    importlib.invalidate_caches()
    found = {record.name: (record.dist, record.code) for record in discover() if record.name in ("acme", "zeta")}
    assert found == {"acme": ("acme-hal", ""), "zeta": ("", "ENTRY_POINT")}


@pytest.mark.parametrize("named", [True, False])
def test_entry_points_that_are_no_text_are_a_record_too(site: Site, named: bool) -> None:
    info = site.folder / "odd_hal-1.0.dist-info"
    info.mkdir()
    if named:
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-hal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(f"[{GROUP}]\nodd = odd_plugin\n".encode() + b"\xff\xfe")
    importlib.invalidate_caches()
    (record,) = [record for record in find() if record.code == "METADATA"]
    assert (record.name, record.dist) == (("odd-hal", "odd-hal") if named else ("unknown", ""))
    assert "entry_points.txt cannot be read: UnicodeDecodeError" in record.reason
    assert str(site.folder) in record.reason
    assert record.fix


def test_entry_points_that_say_nothing_at_all_are_logged(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.install("acme")
    read = metadata.PathDistribution.read_text

    def failing(self: metadata.PathDistribution, name: str) -> str | None:
        if name == "entry_points.txt" and self.metadata["Name"] == "acme-hal":
            raise OSError(5, "Input/output error")
        return read(self, name)

    monkeypatch.setattr(metadata.PathDistribution, "read_text", failing)
    assert not [record for record in find() if record.dist == "acme-hal"]
    (said,) = caplog.records
    assert "entry_points.txt of acme-hal in " in said.getMessage()
    assert "Input/output error" in said.getMessage()


def test_builtin_plugins_come_first_then_priority_then_name(site: Site) -> None:
    for name, fields in (("beta", {}), ("alpha", {}), ("omega", {"priority": 5}), ("late", {"priority": -1})):
        site.install(name, backend(**fields))
    site.install("broken", "raise ValueError")
    builtins = f"[{GROUP}]\nzeta = zeta_plugin\ncpu = cpu_plugin\n"
    site.install("zeta", backend(priority=9), dist="glm5-hal", entry_points=builtins)
    (site.folder / "cpu_plugin.py").write_text(f"NAME = 'cpu'\n{HEAD}{GOOD}")
    assert [record.name for record in site.records()] == ["cpu", "zeta", "omega", "alpha", "beta", "broken", "late"]
