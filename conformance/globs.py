"""Globs over case ids. Ids have brackets, so only ``*`` and ``?`` are special: ``rms_norm[bfloat16-*]``."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches(text: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns covers all of the text."""
    return any(fnmatch.fnmatchcase(text, pattern.replace("[", "[[]")) for pattern in patterns)
