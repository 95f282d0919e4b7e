"""Without transformers (it needs Python 3.11) there is nothing to test here."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
