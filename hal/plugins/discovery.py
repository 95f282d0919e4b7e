"""Which plugins there are, which of them may not be used beside each other, and in which order they come."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path

import glm5_hal
from glm5_hal import hookspecs
from glm5_hal.plugins.given import given_record
from glm5_hal.plugins.isolation import told
from glm5_hal.plugins.loading import LOAD_DEADLINE, load
from glm5_hal.plugins.record import DISTRIBUTION, TRIAL, Defect, PluginRecord


def find(
    entry_points: Iterable[metadata.EntryPoint] | None = None, given: Sequence[str] = ()
) -> tuple[PluginRecord, ...]:
    """Every backend plugin that is announced: what is installed, or these entry points; none of them is loaded.

    Plugins that are ``given`` by path or module are, since their own answer has their name.
    """
    found = _installed() if entry_points is None else (_unloaded(point, point.dist) for point in entry_points)
    named = (load(_unless_nested(given_record(path)), LOAD_DEADLINE) for path in given)
    once = {(_canonical(r.dist), r.name, r.value, r.reason): r for r in (*map(_unless_nested, found), *named)}
    return tuple(sorted(once.values(), key=order))


def _unless_nested(record: PluginRecord) -> PluginRecord:
    if record.builtin or record.status != "ok" or TRIAL not in os.environ:
        return record
    reason = f"a plugin that is being tried started this process, where {record.value!r} is not loaded"
    return record.failed(Defect("NESTED", reason, "start no process while a plugin is imported or probed", "refused"))


def settle(same: Sequence[PluginRecord]) -> tuple[PluginRecord, ...]:
    """Load the plugins of one name, and refuse those that cannot be used beside each other.

    An outside plugin that takes a built-in's name is not even loaded.
    """
    owned = without_theft(same)
    return without_twins([load(record, None if record.builtin else LOAD_DEADLINE) for record in owned])


def unreadable() -> tuple[PluginRecord, ...]:
    """A record of every distribution whose entry points cannot be read, ours or not: it spoils them for all who ask."""
    return tuple(record for record in _installed() if record.reason.startswith(UNREADABLE))


#: What the reason of such a record begins with, and what it says where even an attempt would never end.
UNREADABLE = "entry_points.txt cannot be read"
NO_FILE = "is not a regular file"


def _installed() -> Iterator[PluginRecord]:
    """The entry points of our group, from one version of each distribution: the one that an import would see.

    Of our own distribution all metadata counts: stale metadata that comes first must not hide our backends.
    """
    seen: set[str] = set()
    for dist in metadata.distributions():
        points, problem = _announced(dist)
        if not points and not problem:
            continue
        name = _identity(dist)[0]
        if name and _canonical(name) in seen:
            continue
        if name and _canonical(name) != DISTRIBUTION:
            seen.add(_canonical(name))
            dist = _live(dist, name)
            points, problem = _announced(dist)
        if problem:
            yield _illegible(dist, problem)
        yield from (_unloaded(point, dist) for point in points)


def _announced(dist: metadata.Distribution) -> tuple[tuple[metadata.EntryPoint, ...], str]:
    """The entry points of our group, and what is wrong with them or with the file as a whole."""
    try:
        text = _text(dist, "entry_points.txt")
        points = tuple(point for point in dist.entry_points if point.group == hookspecs.GROUP) if text else ()
    except Exception as problem:  # noqa: BLE001 - any parser's error, in any Python
        return (), f"{UNREADABLE}: {told(problem)[0]}"
    groups = {group for group in _GROUP.findall(text) if _LIKE_OURS.fullmatch(group)}
    if odd := ", ".join(f"[{group}]" for group in sorted(groups - {hookspecs.GROUP})):
        return points, f"entry_points.txt has the group {odd}, which nobody reads: it is spelt [{hookspecs.GROUP}]"
    if groups and not points:
        mark = " after a byte order mark" if text.startswith("\ufeff") else ", without an entry that can be read"
        return points, f"entry_points.txt has the group [{hookspecs.GROUP}]{mark}"
    return points, ""


#: A group's line, and what a vendor may write for our group.
_GROUP = re.compile(r"^(?:\ufeff)?\s*\[([^\]\n]*)\]", re.MULTILINE)
_LIKE_OURS = re.compile(r"\s*glm5[-_.\s]*hal[-_.\s]*backends?\s*", re.IGNORECASE)


def _illegible(dist: metadata.Distribution, problem: str) -> PluginRecord:
    name, version = _identity(dist)
    record = PluginRecord(name or "unknown", "", name, version, builtin=False)
    place = getattr(dist, "_path", dist.locate_file(""))
    return record.failed(
        Defect("METADATA", f"{problem}; it is in {place}", record.remedy if name else f"remove {place}")
    )


def _text(dist: metadata.Distribution, name: str) -> str:
    """A file of its metadata. What is no regular file is not opened: a pipe would be waited for."""
    folder = getattr(dist, "_path", None)  # no public name leads there
    if isinstance(folder, Path) and folder.is_dir() and (folder / name).exists() and not (folder / name).is_file():
        raise OSError(f"{folder / name} {NO_FILE}")
    return dist.read_text(name) or ""


def _live(dist: metadata.Distribution, name: str) -> metadata.Distribution:
    """A folder may hold stale metadata of older versions: of those in the first folder the newest counts."""
    from packaging.version import InvalidVersion, Version

    def age(each: metadata.Distribution) -> tuple[bool, Version]:
        try:
            return True, Version(_identity(each)[1])
        except InvalidVersion:
            return False, Version("0")

    home = str(dist.locate_file(""))
    same = [each for each in metadata.distributions(name=name) if str(each.locate_file("")) == home]
    return max(same, key=age, default=dist)


def _identity(dist: metadata.Distribution) -> tuple[str, str]:
    try:
        _text(dist, "METADATA")
        return dist.metadata["Name"] or "", dist.metadata["Version"] or ""
    except Exception:  # noqa: BLE001 - metadata that cannot be read must not hide the other plugins
        return "", ""


def _unloaded(point: metadata.EntryPoint, dist: metadata.Distribution | None) -> PluginRecord:
    name, version = ("", "") if dist is None else _identity(dist)
    record = PluginRecord(point.name, point.value, name, version, builtin=False)
    if dist is None or _canonical(name) != DISTRIBUTION:
        return record
    if _is_ours(point.value, dist):
        return replace(record, builtin=True, version=glm5_hal.__version__)
    place = getattr(dist, "_path", dist.locate_file(""))
    reason = f"{place} calls itself {DISTRIBUTION} and names {point.value!r}, which is no backend of {_HOME}"
    return record.failed(Defect("METADATA", reason, f"remove {place}"))


#: Where the package is that runs.
_HOME = Path(glm5_hal.__file__).parent


def _is_ours(value: str, dist: metadata.Distribution) -> bool:
    """Whether an entry point of a distribution with our name leads into the package that runs: any distribution can
    take the name, and metadata of another version may be left behind."""
    module = value.partition(":")[0].strip()
    if not module.startswith(f"{_BACKENDS}."):
        return False
    try:
        return Path(str(dist.locate_file(""))).samefile(_HOME.parent) or util.find_spec(module) is not None
    except (ImportError, OSError, ValueError):
        return False


_BACKENDS = "glm5_hal.backends"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def without_theft(records: Sequence[PluginRecord]) -> tuple[PluginRecord, ...]:
    """Refuse an outside plugin that takes a built-in's name."""
    owners = {record.name: record.origin for record in records if record.builtin}
    return tuple(
        record
        if record.builtin or record.status != "ok" or record.name not in owners
        else record.failed(
            Defect(
                "BUILTIN_NAME",
                f"{record.name!r} is a built-in backend of {owners[record.name]}, and {record.origin} offers it too",
                f"give the outside one a name of its own, or take it out: {record.removal}",
                "refused",
            )
        )
        for record in records
    )


def without_twins(records: Sequence[PluginRecord]) -> tuple[PluginRecord, ...]:
    """Refuse every one of two outside plugins that offer the same name.

    A plugin that is broken anyway clashes with nothing: it must not take a working one down with it.
    """
    kept = []
    for record in records:
        rivals = [r for r in records if r.name == record.name and r.status == "ok" and not r.builtin]
        if record in rivals and len(rivals) > 1:
            who = " and ".join(sorted(f"{r.origin} ({r.value})" for r in rivals))
            fix = "uninstall one of them: " + " or ".join(sorted({r.removal for r in rivals}))
            reason = f"backend {record.name!r} is offered by {who}; neither is used"
            record = record.failed(Defect("DUPLICATE", reason, fix, "refused"))
        kept.append(record)
    return tuple(kept)


def order(record: PluginRecord) -> tuple[bool, int, str, str, str]:
    """Built-in ones first, then by priority (0 until it is loaded), then by name."""
    priority = 0 if record.builtin or record.backend is None else record.backend.priority
    return not record.builtin, -priority, record.name, record.dist, record.value
