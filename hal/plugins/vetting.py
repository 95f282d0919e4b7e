"""Every plugin tried in a process of its own, several at a time: for commands that look at all of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from glm5_hal.plugins import child
from glm5_hal.plugins.child import Checkup
from glm5_hal.plugins.discovery import without_theft, without_twins
from glm5_hal.plugins.probing import PROBE_DEADLINE
from glm5_hal.plugins.record import Defect, PluginRecord

#: Children at a time. Most of their time they wait for a driver.
ABREAST = 4


def check_up_all(
    records: Sequence[PluginRecord], deadline: float = PROBE_DEADLINE, last: str = "kernel"
) -> tuple[Checkup, ...]:
    """A checkup of each, clashes of names included. No outside plugin is loaded in this process; the built-in ones are
    where loading is all that is asked for."""
    owned = without_theft(records)
    with ThreadPoolExecutor(ABREAST) as pool:
        told = [
            None if child.needs_no_child(record, last) else pool.submit(child.check_up, record, deadline, last)
            for record in owned
        ]
        # One after the other: while a plugin is loaded, what this process prints is the plugin's.
        checked = tuple(
            child.check_up(record, deadline, last) if answer is None else answer.result()
            for record, answer in zip(owned, told, strict=True)
        )
    settled = without_twins([c.record for c in checked])
    return tuple(replace(c, record=record) for c, record in zip(checked, settled, strict=True))


def vetted(records: Sequence[PluginRecord]) -> tuple[PluginRecord, ...]:
    """The same records, those failed that ended or hung the process that tried them. They are still to be loaded."""
    strange = [r for r in records if not r.builtin and r.backend is None and r.status == "ok"]
    ends = {id(r): c.ended for r, c in zip(strange, check_up_all(strange), strict=True)}
    return tuple(
        r.failed(Defect("CRASH", f"in a process of its own: {ends[id(r)]}", r.remedy)) if ends.get(id(r)) else r
        for r in records
    )
