"""The policy in force: from the environment, or from `hal.use` in code. One ContextVar, so threads and tasks differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

from glm5_hal import policy as policies
from glm5_hal.backend import ATTRIBUTES
from glm5_hal.catalogue import Catalogue
from glm5_hal.errors import HalError, suggest
from glm5_hal.plugins import PluginRecord
from glm5_hal.policy import Policy, Settings

#: "auto" reads index and length values on CPU tensors only (elsewhere that would sync the device); "values" reads them
#: everywhere; "metadata" reads none.
CHECKS = ("auto", "values", "metadata")


@dataclass(frozen=True, eq=False)
class Active:
    """What `hal.use` set. Interned, so that identity is a cheap key for the dispatch tables."""

    policy: Policy | None
    require: frozenset[str]
    check: str


active: ContextVar[Active | None] = ContextVar("glm5_hal_active", default=None)

_intern = lru_cache(maxsize=1024)(Active)
_DEFAULT = _intern(None, frozenset(), "auto")


#: Plugins beside the installed ones. They belong to the process's command line, so neither a reset nor a fork forgets
#: them.
_given: list[str] = []


class _Process:
    """State of the process that a fork or `reset` must forget."""

    def __init__(self) -> None:
        self.catalogue = Catalogue(given=_given)
        self.settings: Settings | None = None
        self.policy: Policy | None = None


_process = _Process()


def catalogue() -> Catalogue:
    return _process.catalogue


def include(plugin: str) -> PluginRecord:
    """Have a plugin that no entry point names: a .py file, a package's folder, or an importable module.

    It is checked as an installed one is, and takes no other's name. Everything learnt before is forgotten.
    """
    if plugin not in _given:
        _given.append(plugin)
    reset()
    name = next(r.name for r in catalogue().found if r.given == plugin)
    return next(r for r in catalogue().named(name) if r.given == plugin)


@contextmanager
def installed(these: Catalogue) -> Iterator[Catalogue]:
    """These backends and no others, in the whole process; then those of before, with what was learnt of them. The
    settings are read again."""
    before = _process.catalogue
    reset()
    _process.catalogue = these
    try:
        yield these
    finally:
        reset()
        _process.catalogue = before


def settings() -> Settings:
    """The environment's settings, read once. Raises HalError for a bad value or a near miss of a variable's name.

    The names in its policy are not looked up: a plugin that nobody uses here must not be loaded for GLM5_LOG.
    """
    if _process.settings is None:
        _process.settings = policies.from_environment(os.environ)
    return _process.settings


def _policy() -> Policy:
    """The environment's, every name in it looked up, once."""
    if _process.policy is None:
        found = settings().policy
        validate(found)
        _process.policy = found
    return _process.policy


def reset() -> None:
    """Forget everything learnt: settings, plugins, probes, tables. The next call starts afresh."""
    _process.__init__()  # type: ignore[misc]
    dispatch = sys.modules.get("glm5_hal.dispatch")
    if dispatch is not None:
        dispatch.clear_tables()


def _forked() -> None:
    for name in ("glm5_hal.observe", "glm5_hal.dispatch"):
        module = sys.modules.get(name)
        if module is not None:
            module.renew_locks()
    shadow = sys.modules.get("glm5_hal.shadow")
    if shadow is not None:
        shadow.forked()
    reset()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forked)


def effective() -> tuple[Policy, frozenset[str], str]:
    """Policy, required attributes and checking that hold here and now."""
    current = active.get() or _DEFAULT
    return current.policy or _policy(), current.require, current.check


def validate(policy: Policy) -> None:
    """Every name in a policy must exist. Raises HalError("UNKNOWN") with the nearest name."""
    from glm5_hal.ops import names

    known = catalogue()

    def providers(backend: str) -> tuple[str, ...] | None:
        try:
            return known.providers(backend)
        except HalError:  # it cannot offer its kernels: what the policy lists beside it serves, and the trace says why
            return None

    policies.validate(policy, names(), known.names, providers)


@contextmanager
def use(
    policy: str | None = None, *, require: str | Iterable[str] | None = None, check: str | None = None
) -> Iterator[None]:
    """Set the policy for a block of code, in this thread or task.

    Args:
        policy: the grammar of GLM5_BACKEND ("cpu", "cpu:reference", "acme; rope=acme:torch"); None keeps the outer one.
        require: attributes that every chosen kernel must claim, of those that its op knows ("deterministic").
        check: "auto" (index and length values are checked on CPU tensors), "values" (on every device; syncs),
            "metadata" (never).

    Raises:
        HalError: POLICY or UNKNOWN for a bad policy, UNKNOWN for an attribute or check that does not exist, CAPTURE
            inside a device graph capture: a captured graph holds the kernels of the policy it was captured under.
    """
    outer = active.get() or _DEFAULT
    chosen = outer.policy
    if policy is not None:
        chosen = policies.parse(policy, "hal.use")
        validate(chosen)
    wanted = outer.require
    if require is not None:
        wanted = wanted | {require} if isinstance(require, str) else wanted | frozenset(require)
    for name in wanted - ATTRIBUTES.keys():
        raise HalError("UNKNOWN", f"no attribute {name!r}", value=name, fix=suggest(name, ATTRIBUTES))
    if check is not None and check not in CHECKS:
        raise HalError("UNKNOWN", f"no check level {check!r}", value=check, fix=suggest(check, CHECKS))
    if capturing():
        raise HalError(
            "CAPTURE",
            "the policy was changed while a device graph is being captured",
            fix="enter hal.use before capture",
        )
    token = active.set(_intern(chosen, frozenset(wanted), check or outer.check))
    try:
        yield
    finally:
        active.reset(token)


def capturing() -> bool:
    """Whether a device graph is being captured here and now."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    of_device = getattr(torch, "get_device_module", lambda: torch.cuda)  # not in every torch that vendors build
    return any(_captures(module) for module in (torch.cuda, of_device()))


def _captures(module: object) -> bool:
    """Of a device's module in torch. One that is not initialized is not asked: that would initialize it."""
    begun = getattr(module, "is_initialized", lambda: False)
    return bool(begun() and getattr(module, "is_current_stream_capturing", lambda: False)())
