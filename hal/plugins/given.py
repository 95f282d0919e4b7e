"""A plugin that no entry point names: a vendor's work in progress, given by its path or by its module."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from glm5_hal.plugins.record import Defect, PluginRecord


def given_record(given: str) -> PluginRecord:
    """The record of a path (a .py file, a package's folder) or of an importable module, not yet loaded."""
    file = _file(given)
    if file is None:
        return PluginRecord("", given, "", "", builtin=False, given=given)
    record = PluginRecord("", _module(file), "", "", builtin=False, given=given)
    if os.path.isfile(file):  # never raises, whatever a path is: too long, a link to itself
        return record
    if file.name == "__init__.py" and os.path.isdir(file.parent):
        reason = f"the folder {file.parent} has no __init__.py, so it is no package"
        return record.failed(Defect("ENTRY_POINT", reason, "name the package's own folder, or one .py file"))
    reason = f"there is no {given}"
    if os.path.exists(given):
        reason = f"{given} is neither a .py file nor a package's folder"
    elif os.path.islink(given):
        reason = f"{given} is a link that leads nowhere"
    return record.failed(Defect("ENTRY_POINT", reason, "give a .py file, a package's folder or a module"))


def made_importable(record: PluginRecord) -> None:
    """Let ``record.value`` be imported from the path that was given, as `python FILE` would: what lies beside it can be
    imported too. A module of that name that is loaded already is not replaced: that is a Defect."""
    file = _file(record.given)
    if file is None:
        return
    loaded = getattr(sys.modules.get(record.value), "__file__", str(file))
    if loaded is None or not os.path.exists(loaded) or not os.path.samefile(loaded, file):
        reason = f"a module called {record.value!r} is there already, from {loaded}"
        raise Defect("IMPORT", reason, f"rename {record.given}")
    finder = _Finder(record.value, file)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)
    beside = str(file.parents[1] if file.name == "__init__.py" else file.parent)
    if beside not in sys.path:
        sys.path.append(beside)


class _Finder(MetaPathFinder):
    """Finds one module, where its file is, before anything else of that name."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Finder) and (self.name, self.file) == (other.name, other.file)

    def __hash__(self) -> int:
        return hash((self.name, self.file))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        inside = [str(self.file.parent)] if self.file.name == "__init__.py" else None
        return util.spec_from_file_location(fullname, self.file, submodule_search_locations=inside)


def _file(given: str) -> Path | None:
    """The file to import for a path; None for a module's name, or for nothing."""
    if not given or not (os.sep in given or given.endswith(".py") or os.path.lexists(given)):
        return None
    path = Path(os.path.realpath(given))
    return path if path.suffix == ".py" and not os.path.isdir(path) else path / "__init__.py"


def _module(file: Path) -> str:
    return re.sub(r"\W", "_", file.parent.name if file.name == "__init__.py" else file.stem)
