"""Lets the tests here say ``from small import ...``; without transformers (it needs Python 3.11) there are none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
elif "small" not in sys.modules:
    spec = importlib.util.spec_from_file_location("small", Path(__file__).with_name("small.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["small"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
