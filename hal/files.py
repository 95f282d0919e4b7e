"""Files that a setting names, and that events are added to: JSON objects, one a line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("glm5_hal")

#: Files that could not be written, so that each is told of once.
_told: set[str] = set()


def appendable(name: str) -> tuple[str, str]:
    """The absolute path that a name stands for, and why nothing can be added to such a file; "" where it can."""
    path = os.path.abspath(os.path.expanduser(name))
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        return path, f"{path} cannot be a file: it is a folder"
    if not os.path.isdir(folder):
        return path, f"{path} cannot be a file: there is no folder {folder}"
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        return path, f"{path} cannot be written"
    return path, ""


def add_line(path: str, record: Mapping[str, Any]) -> None:
    """Add one object. Where that fails it is lost, and the log says so once: what only watches breaks no call."""
    line = json.dumps(record) + "\n"
    try:
        with open(path, "a", encoding="utf-8") as sink:
            sink.write(line)
    except OSError as problem:
        if path not in _told:
            _told.add(path)
            log.warning("%s cannot be written, so what belongs there is lost: %s", path, problem)
