"""A distribution whose metadata is spoilt is named, with what is wrong with it."""

from pathlib import Path

import pytest

from glm5_hal.packages import package_problem


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (b"Name: acme-sdk\n", "the METADATA of acme-sdk gives no version"),
        (b"Name: acme-sdk\nVersion: 1\nSummary: \xe9\n", "the METADATA of acme-sdk cannot be read: UnicodeDecodeError"),
        (b"Name: acme-sdk\nVersion: one\n", "the version found, 'one', cannot be read"),
    ],
)
def test_metadata_that_is_spoilt(written: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "acme_sdk-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_bytes(written)
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = package_problem("acme-sdk", ">=1")
    assert problem is not None
    assert problem.startswith("acme-sdk>=1 is needed and ")
    assert says in problem
