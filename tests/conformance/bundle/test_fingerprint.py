"""Hashes change with what they stand for, and with nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from glm5_hal.conformance import identity
from glm5_hal.conformance.bundle import fingerprint
from glm5_hal.conformance.bundle.fingerprint import combined, essence, files_of, hashed, spec_hashes, suite
from glm5_hal.ops import names

SOURCE = '''"""Module."""

from x import y  # why


def f(a):
    """Doc,
    over lines."""
    # comment
    return a + 1


class C:
    """Doc."""

    text = """# not a comment"""
'''

SAME = '''"""Another module docstring."""
from x import y
def f(a):
    return a + 1
class C:
    text = """# not a comment"""
'''


def test_the_essence_of_a_source_is_without_docstrings_comments_and_blank_lines() -> None:
    assert essence(SOURCE) == essence(SAME)
    assert '"""# not a comment"""' in essence(SOURCE)
    assert "Doc" not in essence(SOURCE)


@pytest.mark.parametrize(("old", "new"), [("a + 1", "a + 2"), ("# not a", "# no"), ("import y", "import z")])
def test_the_essence_changes_with_the_code(old: str, new: str) -> None:
    assert essence(SOURCE) != essence(SOURCE.replace(old, new))


def test_every_op_has_a_hash_of_its_own_and_together_they_have_one() -> None:
    hashes = spec_hashes()
    assert hashes.keys() == set(names())
    assert len(set(hashes.values())) == len(hashes)
    assert combined(hashes) == combined(dict(reversed(hashes.items())))
    assert combined(hashes) != combined({**hashes, "rope": "0"})


def test_the_suite_knows_its_version_and_code() -> None:
    mine = suite()
    assert mine.version == fingerprint.glm5_hal.__version__
    assert len(mine.code) == 64
    assert mine.origin in ("git", "wheel")
    assert (len(mine.commit) == 40) == (mine.origin == "git")


def test_a_package_changes_with_its_files_and_not_with_an_editors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "acme_hashed"
    (package / "deep").mkdir(parents=True)
    for name in ("__init__.py", "deep/a.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def code() -> str:
        return hashed(files_of("acme_hashed"))

    before = code()
    for name in (".a.py.swp", "deep/.#a.py", "__pycache__/a.pyc"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("mine")
    assert code() == before
    (package / "deep/a.py").rename(package / "a.py")
    assert code() != before, "where a file lies counts"
    (package / "a.py").rename(package / "deep/a.py")
    assert code() == before
    (package / "deep/a.py").write_text("x = 2\n")
    assert code() != before
    assert files_of("acme_hashed.nowhere") == {}


def test_a_run_is_resumed_by_the_suite_that_its_manifest_will_name() -> None:
    assert identity.of_run({}, ["a:b"], "smoke", 0, [])["suite"] == suite().code


# A checkout, small


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one package, in the place of this one."""
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text(".venv/\n__pycache__/\n")

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    place(monkeypatch, package)
    return package


def place(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    class Module:
        __path__ = (str(package),)

    monkeypatch.setattr(fingerprint.importlib, "import_module", lambda name: Module)


def test_a_checkout_is_clean_until_something_in_its_packages_changes(checkout: Path) -> None:
    found = fingerprint._checkout()
    assert found is not None
    assert (found[0], len(found[1]), found[2]) == ("git", 40, True)
    (checkout.parent / "notes.txt").write_text("mine")
    assert fingerprint._checkout() == found, "what lies elsewhere in the repository does not judge"
    (checkout / "__init__.py").write_text("x = 2\n")
    assert fingerprint._checkout() == (*found[:2], False)
    (checkout / "__init__.py").write_text("x = 1\n")
    (checkout / "new.py").write_text("")
    assert fingerprint._checkout() == (*found[:2], False), "a file too many"


def test_an_environment_inside_a_checkout_is_not_the_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = checkout.parent / ".venv/lib"
    inside.mkdir(parents=True)
    (inside / "__init__.py").touch()
    place(monkeypatch, inside)
    assert fingerprint._checkout() is None


def test_an_installed_wheel_is_clean_while_its_files_are_those_of_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "glm5_hal/a.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    info = tmp_path / "glm5_hal-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: glm5-hal\nVersion: 1\n")
    (info / "RECORD").write_text(f"glm5_hal/a.py,sha256={fingerprint._record_hash(file)},6\nother/b.py,,\n")
    found = fingerprint.metadata.Distribution.at(info)
    monkeypatch.setattr(fingerprint.metadata, "distribution", lambda name: found)
    files = {"glm5_hal/a.py": file}
    assert fingerprint._wheel(files) == ("wheel", "", True)
    assert fingerprint._wheel({**files, "glm5_hal/b.py": file}) == ("wheel", "", False)
    file.write_text("x = 2\n")
    assert fingerprint._wheel(files) == ("wheel", "", False)
