"""Which plugins are found, which of them clash, and in which order they come."""

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from glm5_hal import __version__
from glm5_hal.hookspecs import GROUP
from glm5_hal.plugins import PluginRecord, find, order
from glm5_hal.plugins.discovery import unreadable

from .site import GOOD, Site, backend, discover


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
    site.install("cpu", dist="fast-cpu")
    ours, theirs = (record for record in discover() if record.name == "cpu")
    assert (ours.dist, ours.builtin, ours.status) == ("glm5-hal", True, "ok")
    assert (theirs.dist, theirs.status, theirs.code) == ("fast-cpu", "refused", "BUILTIN_NAME")
    assert theirs.reason == f"'cpu' is a built-in backend of glm5-hal {__version__}, and fast-cpu 1.0 offers it too"
    assert "pip uninstall fast-cpu" in theirs.fix


@pytest.mark.parametrize("value", ["fake_plugin", "glm5_hal.backends.gone", "glm5_hal.backendsgone"])
def test_who_takes_our_distributions_name_is_no_builtin_and_hides_none(site: Site, value: str) -> None:
    site.install("fake", dist="GLM5.HAL", version="9.0", value=value)
    found = {record.name: record for record in find()}
    assert (found["cpu"].builtin, found["cpu"].status, found["cpu"].version) == (True, "ok", __version__)
    fake = found["fake"]
    assert (fake.builtin, fake.status, fake.code) == (False, "broken", "METADATA")
    assert f"calls itself glm5-hal and names {value!r}, which is no backend of " in fake.reason
    assert fake.fix == f"remove {site.folder / 'GLM5.HAL-9.0.dist-info'}"


def test_stale_metadata_of_ours_is_no_second_backend(site: Site) -> None:
    site.install("cpu", None, dist="glm5-hal", version="9.0", value="glm5_hal.backends.cpu")
    (found,) = (record for record in find() if record.name == "cpu")
    assert (found.builtin, found.version) == (True, __version__)


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


def test_entry_points_that_a_disk_does_not_give_are_a_record(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme")
    read = metadata.PathDistribution.read_text

    def failing(self: metadata.PathDistribution, name: str) -> str | None:
        if name == "entry_points.txt" and self.metadata["Name"] == "acme-hal":
            raise OSError(5, "Input/output error")
        return read(self, name)

    monkeypatch.setattr(metadata.PathDistribution, "read_text", failing)
    (found,) = (record for record in find() if record.dist == "acme-hal")
    assert found.code == "METADATA"
    assert "Input/output error" in found.reason


@pytest.mark.parametrize(
    "text", [b"[console_scripts]\nodd\n", b"[console_scripts]\n\xe9=\xe9\n", "[x]".encode("utf-16")]
)
def test_whose_entry_points_spoil_all_others_is_named_though_it_has_no_backend(site: Site, text: bytes) -> None:
    site.install("odd", None)
    (site.folder / "odd_hal-1.0.dist-info" / "entry_points.txt").write_bytes(text)
    (found,) = (record for record in find() if record.dist == "odd-hal")
    assert (found.name, found.code) == ("odd-hal", "METADATA")
    assert [record.dist for record in unreadable()] == ["odd-hal"]


def test_a_pipe_is_not_waited_for(site: Site) -> None:
    for name in ("entry_points.txt", "METADATA"):
        site.install("acme", dist=f"{name[0]}-hal".lower())
        file = site.folder / f"{name[0].lower()}_hal-1.0.dist-info" / name
        file.unlink()
        os.mkfifo(file)
    found = {record.dist: record for record in find() if not record.builtin}
    assert "entry_points.txt is not a regular file" in found["e-hal"].reason
    assert (found[""].name, found[""].status) == ("acme", "ok"), "of a distribution whose name is not known"


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("\ufeff[glm5_hal.backends]", "has the group [glm5_hal.backends] after a byte order mark"),
        ("[glm5_hal.backends ]", "[glm5_hal.backends ], which nobody reads: it is spelt [glm5_hal.backends]"),
        ("[GLM5_HAL.backends]", "[GLM5_HAL.backends], which nobody reads"),
        ("[glm5_hal.backend]", "[glm5_hal.backend], which nobody reads"),
        ("[glm5-hal.backends]", "[glm5-hal.backends], which nobody reads"),
        ("[glm5_hal.backends]\n[other]", "has the group [glm5_hal.backends], without an entry"),
    ],
)
def test_a_plugin_that_would_be_invisible_is_a_record(site: Site, group: str, words: str) -> None:
    site.install("acme", entry_points=f"{group}\nacme = acme_plugin\n")
    (found,) = (record for record in find() if record.dist == "acme-hal")
    assert (found.status, found.code) == ("broken", "METADATA")
    assert words in found.reason
    assert unreadable() == ()


@pytest.mark.parametrize("group", ["glm5_hal.backends_of_acme", "acme.glm5_hal.backends", "console_scripts"])
def test_a_group_of_someone_else_is_none_of_ours(site: Site, group: str) -> None:
    site.install("acme", entry_points=f"[{group}]\nacme = acme_plugin\n")
    assert not [record for record in find() if record.dist == "acme-hal"]


def test_builtin_plugins_come_first_then_priority_then_name(site: Site) -> None:
    for name, fields in (("beta", {}), ("alpha", {}), ("omega", {"priority": 5}), ("late", {"priority": -1})):
        site.install(name, backend(**fields))
    site.install("broken", "raise ValueError")
    ours = [PluginRecord(name, "", "glm5-hal", "1.0", builtin=True) for name in ("zeta", "cpu")]
    found = sorted([*ours, *site.records()], key=order)
    assert [record.name for record in found] == ["cpu", "zeta", "omega", "alpha", "beta", "broken", "late"]
