"""The files in the folder of a run."""

from __future__ import annotations

#: What says to `--resume` which run a folder holds. No part of the bundle.
RUN = "run.json"

#: The files of a bundle, `bundle/files.py`, which writes all but the first.
BUNDLE = ("results.jsonl", "manifest.json", "waivers.toml", "junit.xml", "report.md", "report.html", "SHA256SUMS")
