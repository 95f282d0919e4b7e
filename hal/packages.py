"""Distributions and the versions that are wanted of them, as PEP 440 has them."""

from __future__ import annotations

from collections.abc import Mapping


def is_range(versions: object) -> bool:
    """Whether this is a range of versions, such as ">=2.9"."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return isinstance(versions, str) and SpecifierSet(versions) is not None
    except InvalidSpecifier:
        return False


def package_problem(name: str, versions: str, known: Mapping[str, str] | None = None) -> str | None:
    """None if the distribution is installed within ``versions``; else what is wrong, in words."""
    from importlib import metadata

    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        found = (known or {}).get(name) or metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name}{versions} is needed and {name} is not installed"
    except (OSError, ValueError, KeyError) as problem:
        return f"{name}{versions} is needed and the METADATA of {name} cannot be read: {type(problem).__name__}"
    if not found:  # None, whatever importlib promises, where METADATA has no such line
        return f"{name}{versions} is needed and the METADATA of {name} gives no version"
    try:
        inside = Version(found) in SpecifierSet(versions, prereleases=True)
    except InvalidVersion:
        return f"{name}{versions} is needed and the version found, {found!r}, cannot be read"
    return None if inside else f"{name}{versions} is needed and {found} is installed"
