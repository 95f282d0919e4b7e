"""Which plugins there are, which of them may not be used beside each other, and in which order they come."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata

from glm5_hal import hookspecs
from glm5_hal.plugins.given import given_record
from glm5_hal.plugins.isolation import told
from glm5_hal.plugins.loading import LOAD_DEADLINE, load
from glm5_hal.plugins.record import DISTRIBUTION, Defect, PluginRecord

log = logging.getLogger("glm5_hal.plugins")


def find(
    entry_points: Iterable[metadata.EntryPoint] | None = None, given: Sequence[str] = ()
) -> tuple[PluginRecord, ...]:
    """Every backend plugin that is announced: what is installed, or these entry points; none of them is loaded.

    Plugins that are ``given`` by path or module are, since their own answer has their name.
    """
    found = _installed() if entry_points is None else (_unloaded(point, point.dist) for point in entry_points)
    named = (load(given_record(path), LOAD_DEADLINE) for path in given)
    once = {(_canonical(record.dist), record.name, record.value): record for record in (*found, *named)}
    return tuple(sorted(once.values(), key=order))


def settle(same: Sequence[PluginRecord]) -> tuple[PluginRecord, ...]:
    """Load the plugins of one name, and refuse those that cannot be used beside each other.

    An outside plugin that takes a built-in's name is not even loaded.
    """
    owned = without_theft(same)
    return without_twins([load(record, None if record.builtin else LOAD_DEADLINE) for record in owned])


def _installed() -> Iterator[PluginRecord]:
    """The entry points of our group, from one version of each distribution: the one that an import would see."""
    seen: set[str] = set()
    for dist in metadata.distributions():
        if not _announces(dist):
            continue
        name, version = _identity(dist)
        if name and _canonical(name) in seen:
            continue
        seen.add(_canonical(name))
        live = _live(dist, name) if name else dist
        try:
            points = [point for point in live.entry_points if point.group == hookspecs.GROUP]
        except Exception as problem:  # noqa: BLE001 - any parser's error, in any Python
            reason = f"entry_points.txt cannot be read: {told(problem)[0]}; it is in {dist.locate_file('')}"
            record = PluginRecord(name or "unknown", "", name, version, builtin=_canonical(name) == DISTRIBUTION)
            yield record.failed(Defect("METADATA", reason, record.remedy))
            continue
        yield from (_unloaded(point, live) for point in points)


def _announces(dist: metadata.Distribution) -> bool:
    """Whether our group is among its entry points, readable or not. One of which that cannot be said is logged."""
    try:
        text = dist.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as problem:
        text = problem.object.decode(errors="replace")
    except (OSError, ValueError) as problem:
        what = "entry_points.txt of %s in %s cannot be read; a backend that it announces is not seen: %s"
        log.warning(what, _identity(dist)[0] or "an unknown distribution", dist.locate_file(""), problem)
        return False
    return hookspecs.GROUP in text


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
        return dist.metadata["Name"] or "", dist.metadata["Version"] or ""
    except Exception:  # noqa: BLE001 - metadata that cannot be read must not hide the other plugins
        return "", ""


def _unloaded(point: metadata.EntryPoint, dist: metadata.Distribution | None) -> PluginRecord:
    name, version = ("", "") if dist is None else _identity(dist)
    return PluginRecord(point.name, point.value, name, version, builtin=_canonical(name) == DISTRIBUTION)


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
