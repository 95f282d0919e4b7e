"""A worker for `pool` whose jobs go wrong in every way."""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    _say({})
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "loop":
            while True:
                pass
        if job["do"] == "die":
            os.write(2, b"no such device\n")
            os._exit(7)
        if job["do"] == "beat":
            for _ in range(12):
                time.sleep(0.25)
                _say({})
        _say({"answer": {"of": job["n"]}})


def _say(line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
