"""The providers of several backends, asked for in one child process: a broken SDK ends that, not its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from glm5_hal.errors import HalError
from glm5_hal.plugins.child import signal_name
from glm5_hal.plugins.isolation import OUTPUT_LIMIT, told
from glm5_hal.plugins.loading import load
from glm5_hal.plugins.probing import PROBE_DEADLINE, hardware_fix
from glm5_hal.plugins.record import TRIAL, Defect, PluginRecord

#: What the child's own lines begin with; an SDK may print, too.
MARK = "glm5-hal:"


def survey(records: Sequence[PluginRecord]) -> tuple[list[PluginRecord], list[tuple[str, ...] | None]]:
    """The records, with what their probes broke, and each one's provider names: None where its device is not there,
    and of outside plugins.

    A built-in backend at which the child ended or hung is broken; the others are asked again without it.
    """
    settled = list(records)
    offered: list[tuple[str, ...] | None] = [None] * len(records)
    left = [i for i, record in enumerate(records) if record.builtin and record.status == "ok"]
    while left:
        answers, end = _asked([records[i] for i in left])
        for i in (i for i in left if records[i].name in answers):
            names, reason, fix = answers[records[i].name]
            offered[i] = None if names is None else tuple(names)
            if reason:
                settled[i] = records[i].failed(Defect("CRASH", reason, fix))
        left = [i for i in left if records[i].name not in answers]
        if left:
            lost, *left = left
            settled[lost] = records[lost].failed(Defect("CRASH", f"the probe {end}", hardware_fix(records[lost])))
    return settled, offered


def _asked(records: Sequence[PluginRecord]) -> tuple[dict[str, Any], str]:
    """What a child answers of these, by name, as far as it comes; and how it ended."""
    jobs = [record.job for record in records]
    path = [entry for entry in sys.path if isinstance(entry, str)]
    boot = f"import sys; sys.path[:] = {path!r}; from {__name__} import answer; answer({jobs!r})"
    command, env = [sys.executable, "-c", boot], {**os.environ, TRIAL: "1"}
    limit = 2 * PROBE_DEADLINE + len(records)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=limit)
        said, status = done.stdout, done.returncode
        end = f"ended its process with status {status}" if status >= 0 else f"died with {signal_name(-status)}"
    except subprocess.TimeoutExpired as expired:
        said, end = expired.stdout or b"", f"did not answer within {limit:g} s"
    except OSError as problem:
        said, end = b"", f"could not be tried in a process: {told(problem)[0]}"
    whole = said[: said.rfind(b"\n") + 1].decode(errors="replace").split("\n")
    return dict(json.loads(line.removeprefix(MARK)) for line in whole if line.startswith(MARK)), end


def answer(jobs: Sequence[Mapping[str, Any]]) -> None:
    """The child's side: one line for each backend."""
    from glm5_hal.catalogue import Catalogue

    for job in jobs:
        record = load(PluginRecord(**job), None)
        names, reason, fix = None, "", ""
        try:
            names = Catalogue((record,)).providers(record.name)
        except HalError as problem:
            reason, fix = problem.what, problem.fix
        print(f"\n{MARK}{json.dumps([record.name, [names, reason[:OUTPUT_LIMIT], fix]])}", flush=True)  # noqa: T201
    os._exit(0)
