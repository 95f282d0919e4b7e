"""What is known of one plugin, and the codes of all that can be wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from glm5_hal.backend import Backend

DISTRIBUTION = "glm5-hal"

#: Set where a plugin is tried, and in all that it starts there: were plugins loaded in those too, that would not end.
TRIAL = "_GLM5_HAL_TRIAL"

#: Every code that a PluginRecord may carry; an `ok` record carries none.
CODES: dict[str, str] = {
    "METADATA": "the distribution's entry points cannot be read",
    "ENTRY_POINT": "the entry point names a module or an object that is not there",
    "IMPORT": "the module raised while it was imported",
    "TIMEOUT": "the module or its hook did not come back in time",
    "CRASH": "the module or its hook ended the process that loaded it, or left it unusable",
    "HOOK_MISSING": "the module implements no glm5_backend hook",
    "HOOK_SPEC": "the hook does not fit its specification",
    "HOOK_RAISED": "the hook raised",
    "HOOK_RESULT": "the hook returned something else than one Backend",
    "NAME": "the backend's name is not the entry point's name",
    "FIELD": "a field of the Backend has the wrong type",
    "HAL_API": "the plugin was written for a contract version that this core does not speak",
    "REQUIRES": "a requirement on a distribution cannot be read",
    "NESTED": "this process was started by a plugin that is being tried; no outside plugin is loaded in it",
    "DUPLICATE": "two distributions offer a backend of this name",
    "BUILTIN_NAME": "the name belongs to a built-in backend",
}


_CONTROLS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Someone else's text for a terminal, which obeys whatever control sequence it is sent."""
    return _CONTROLS.sub("", text)


@dataclass(frozen=True)
class PluginRecord:
    """One entry point, and what became of it.

    Attributes:
        name: the entry point's name, which is the backend's.
        value: the entry point's "module" or "module:attribute".
        dist, version: the distribution that it comes from.
        builtin: it comes with glm5-hal itself.
        given: the path or module that names it, where no entry point does; its name is then its backend's.
        status: "ok", "broken" (it cannot be used by anyone) or "refused" (it works, but not with this core or beside
            these plugins).
        code, reason, fix: why it is not ok, one of :data:`CODES` first, and what to do; empty where it is.
        backend: the plugin object, once it is loaded and its status is ok.
        device_type, communicator, smi: the backend's; known without it where it was loaded in another process.
        output: what it printed while it loaded.
    """

    name: str
    value: str
    dist: str
    version: str
    builtin: bool
    status: str = "ok"
    code: str = ""
    reason: str = ""
    fix: str = ""
    backend: Backend | None = None
    device_type: str = ""
    communicator: str | None = None
    smi: tuple[str, ...] = ()
    output: str = ""
    given: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "dist", "version", "reason", "fix"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    @property
    def origin(self) -> str:
        if self.given:
            return f"plugin {self.given}"
        return f"{self.dist or 'an unknown distribution'} {self.version}".strip()

    @property
    def job(self) -> dict[str, Any]:
        """What a child process makes this record of again."""
        return {name: getattr(self, name) for name in ("name", "value", "dist", "version", "builtin", "given")}

    @property
    def root(self) -> str:
        """The module or package whose frames are the plugin's own."""
        module = self.value.partition(":")[0].strip()
        return module if self.builtin else module.partition(".")[0]

    @property
    def remedy(self) -> str:
        """The fix where nothing better is known."""
        if self.builtin:
            return f"pip install --force-reinstall {DISTRIBUTION}"
        if self.given:
            return f"mend {self.given}"
        if not self.dist:
            return f"reinstall what offers the entry point {self.name} = {self.value!r}"
        return f"pip install -U '{self.dist}', or take it out: pip uninstall {self.dist}"

    @property
    def removal(self) -> str:
        return f"leave out --plugin {self.given}" if self.given else f"pip uninstall {self.dist}"

    def failed(self, defect: Defect) -> PluginRecord:
        return replace(self, status=defect.status, code=defect.code, reason=defect.reason, fix=defect.fix, backend=None)


class Defect(Exception):  # noqa: N818 - it is on its way into a record, and never leaves this package
    """Why a plugin is not used; the arguments are a record's fields."""

    def __init__(self, code: str, reason: str, fix: str, status: str = "broken") -> None:
        super().__init__(reason)
        self.code, self.reason, self.fix, self.status = code, reason, fix, status
