"""The GLM5_BACKEND grammar, and everything else that the environment may set.

    rules   := rule (';' rule)*
    rule    := [pattern '='] targets        pattern: an op's name or a glob; at most one rule has none, the default
    targets := target (',' target)*         in order of preference: what is not listed is not used
    target  := 'auto' | backend [':' provider]

"acme; topk_indices=acme:torch; mla_*=acme:triton". Spaces around names and separators do not matter.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

from glm5_hal import shadow
from glm5_hal.backend import NAME
from glm5_hal.errors import HalError, shown, suggest
from glm5_hal.files import appendable
from glm5_hal.shadow import Shadow

VARIABLES = ("GLM5_BACKEND", "GLM5_LOG", "GLM5_SHADOW")
LOG_CHOICES = ("off", "info", "debug", "jsonl:PATH")

_PATTERN = re.compile(r"[A-Za-z0-9_*?!\[\]-]+")
_GLOB = re.compile(r"[*?\[]")
_OURS = re.compile(r"GLM[-_.]*5?[-_.]*(?:HAL)?[-_.]*([A-Z].*)")


@dataclass(frozen=True)
class Target:
    """A backend, or one provider of it. ``auto`` stands for the backends of the tensors' device."""

    backend: str
    provider: str | None = None

    def __str__(self) -> str:
        return self.backend if self.provider is None else f"{self.backend}:{self.provider}"


AUTO = Target("auto")


@dataclass(frozen=True)
class Rule:
    """What may serve the ops that ``pattern`` matches; ``None`` is every op that no other rule names."""

    pattern: str | None
    targets: tuple[Target, ...]

    def __str__(self) -> str:
        listed = ",".join(map(str, self.targets))
        return listed if self.pattern is None else f"{self.pattern}={listed}"


@dataclass(frozen=True)
class Policy:
    """A parsed policy. ``text`` is what was written, ``provenance`` where: "default", "GLM5_BACKEND", "hal.use"."""

    rules: tuple[Rule, ...]
    text: str
    provenance: str

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules))

    @property
    def default(self) -> tuple[Target, ...]:
        return next((rule.targets for rule in self.rules if rule.pattern is None), (AUTO,))

    def targets(self, op: str) -> tuple[Target, ...]:
        """What may serve ``op``, in order: its exact name's rule, else the last glob that matches, else the default."""
        exact = [rule.targets for rule in self.rules if rule.pattern == op]
        globs = [rule.targets for rule in self.rules if rule.pattern is not None and fnmatchcase(op, rule.pattern)]
        return (exact or globs[-1:] or [self.default])[0]


@dataclass(frozen=True)
class LogSetting:
    """GLM5_LOG: ``level`` is off, info, debug or jsonl; ``path`` is where jsonl goes, else empty."""

    level: str = "off"
    path: str = ""
    provenance: str = "default"


@dataclass(frozen=True)
class Settings:
    """What the environment says. ``foreign`` lists the GLM5_ variables that are not ours, for `doctor`."""

    policy: Policy
    log: LogSetting
    foreign: tuple[str, ...] = ()
    shadow: Shadow = field(default_factory=Shadow)


def parse(text: str, provenance: str) -> Policy:
    """The policy that ``text`` spells; equal text gives the identical object. Raises HalError("POLICY")."""
    if not isinstance(text, str):
        raise HalError(
            "POLICY",
            f"policy {text!r} ({provenance}): a policy is text, this is {type(text).__name__}",
            value=text,
            fix='write it as in GLM5_BACKEND: "acme,cpu"',
        )
    return _parse(text, provenance)


@lru_cache(maxsize=1024)
def _parse(text: str, provenance: str) -> Policy:
    return Policy(_Reader(text, provenance).rules(), text, provenance)


def validate(
    policy: Policy,
    ops: Collection[str],
    backends: Collection[str],
    providers: Callable[[str], Collection[str] | None],
) -> None:
    """Every op, backend and provider that a policy names must exist.

    Args:
        policy: what to check.
        ops: every op's name.
        backends: every installed backend's name.
        providers: a backend's providers, or None where they cannot be known yet; those are not checked.

    Raises:
        HalError: UNKNOWN, with the nearest name that exists.
    """

    def unknown(what: str, name: str, fix: str) -> HalError:
        return HalError(
            "UNKNOWN", f"policy {shown(policy.text, 200)} ({policy.provenance}): {what}", value=name, fix=fix
        )

    for rule in policy.rules:
        if rule.pattern is not None and not any(fnmatchcase(op, rule.pattern) for op in ops):
            fix = suggest(rule.pattern, ops)
            if rule.pattern in backends:
                fix = f"{rule.pattern!r} is a backend: write the op first, op={rule.pattern}"
            what = "no op matches" if _GLOB.search(rule.pattern) else "no op is called"
            raise unknown(f"{what} {rule.pattern!r}", rule.pattern, fix)
        for target in rule.targets:
            if target == AUTO:
                continue
            if target.backend not in backends:
                fix = suggest(target.backend, {*filter(None, backends), "auto"})
                if target.backend in ops:
                    fix = f"{target.backend!r} is an op: write {target.backend}={target.provider or 'backend'}"
                raise unknown(f"no backend is called {shown(target.backend)}", target.backend, fix)
            known = None if target.provider is None else providers(target.backend)
            if target.provider is not None and known is not None and target.provider not in known:
                what = f"backend {target.backend!r} has no provider {target.provider!r}"
                raise unknown(what, target.provider, suggest(target.provider, known))


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that the environment holds.

    Raises:
        HalError: POLICY or CONFIG for a value that is not usable, UNKNOWN for a near miss of a variable's name: it
            would be ignored without a word.
    """
    for name in sorted(environ):
        meant = _near_miss(name)
        if meant is not None:
            raise HalError(
                "UNKNOWN", f"{name} is set, and means nothing", value=name, fix=f"{meant} was meant? rename or unset it"
            )
    policy = parse(environ["GLM5_BACKEND"], "GLM5_BACKEND") if "GLM5_BACKEND" in environ else parse("auto", "default")
    log = _log(environ["GLM5_LOG"]) if "GLM5_LOG" in environ else LogSetting()
    foreign = sorted(name for name in environ if name.startswith("GLM5_") and name not in VARIABLES)
    sampled = shadow.parse(environ["GLM5_SHADOW"], "GLM5_SHADOW") if "GLM5_SHADOW" in environ else Shadow()
    return Settings(policy, log, tuple(foreign), sampled)


def _near_miss(name: str) -> str | None:
    """The variable that a misspelt name stands for: GLM5_BACKENDS, GLM_BACKEND, GLM5HAL_BACKEND, glm5-backend."""
    found = None if name in VARIABLES else _OURS.fullmatch(name.upper())
    if found is None:
        return None
    stems = {variable.removeprefix("GLM5_"): variable for variable in VARIABLES}
    near = difflib.get_close_matches(re.sub(r"[^A-Z0-9]", "", found[1]), stems, n=1, cutoff=0.85)
    return stems[near[0]] if near else None


def _log(text: str) -> LogSetting:
    def bad(problem: str, fix: str) -> HalError:
        return HalError("CONFIG", f"GLM5_LOG={text!r}: {problem}", value=text, fix=fix)

    level, colon, path = text.strip().partition(":")
    if level == "jsonl":
        if not path.strip():
            raise bad("the file is missing", "write jsonl:PATH")
        path, problem = appendable(path.strip())
        if problem:
            raise bad(problem, "name a file that can be written, in a folder that exists")
        return LogSetting("jsonl", path, "GLM5_LOG")
    if colon or level not in LOG_CHOICES:
        raise bad("this is not among the choices", suggest(level.lower(), LOG_CHOICES))
    return LogSetting(level, "", "GLM5_LOG")


@dataclass(frozen=True)
class _Reader:
    """Reads one text; every piece travels with its offset, so that an error can point at it."""

    text: str
    provenance: str

    def rules(self) -> tuple[Rule, ...]:
        if not self.text.strip():
            raise self._error(0, self.text, "nothing is named", "unset it, or write auto")
        rules: dict[str | None, Rule] = {}
        for at, piece in _split(self.text, 0, ";"):
            rule = self._rule(at, piece)
            if rule.pattern in rules and rule.pattern is None:
                first = rules[None]
                listed = ",".join(map(str, dict.fromkeys((*first.targets, *rule.targets))))
                fix = f"separate fallbacks with ',': {listed}; or give the rule its op: op={rule}"
                if listed == str(first):
                    fix = f"keep one of the two; or give the rule its op: op={rule}"
                raise self._error(at, piece, "a second rule without an op", fix)
            if rule.pattern in rules:
                raise self._error(at, piece, f"a second rule for {rule.pattern!r}", "keep one of the two")
            rules[rule.pattern] = rule
        return tuple(rules.values())

    def _rule(self, at: int, piece: str) -> Rule:
        if not piece:
            raise self._error(at, piece, "a rule is expected", "remove the stray ';'")
        parts = list(_split(piece, at, "="))
        if len(parts) > 2:
            raise self._error(at, piece, "a second '='", "separate rules with ';'")
        pattern = parts[0][1] if len(parts) == 2 else None
        if pattern is not None and not _PATTERN.fullmatch(pattern):
            fix = "write an op's name or a glob before '='" + (": names are joined by '_'" if "." in pattern else "")
            raise self._error(parts[0][0], pattern, "an op is expected", fix)
        start, listed = parts[-1]
        targets: list[Target] = []
        for offset, text in _split(listed, start, ","):
            target = self._target(offset, text)
            if target in targets:
                raise self._error(offset, text, "a backend that is listed already", "remove one of the two")
            targets.append(target)
        return Rule(pattern, tuple(targets))

    def _target(self, at: int, piece: str) -> Target:
        if not piece:
            raise self._error(
                at, piece, "a backend is expected", "write backend or backend:provider, or remove the ','"
            )
        parts = list(_split(piece, at, ":"))
        if len(parts) > 2:
            raise self._error(at, piece, "a second ':'", "write backend:provider")
        for what, (offset, name) in zip(("backend", "provider"), parts, strict=False):
            if not NAME.fullmatch(name):
                raise self._error(offset, name, f"a {what} is expected", _spelling(what, name))
        names = [name for _, name in parts]
        if names[0] == "auto" and len(names) == 2:
            fix = f"write auto, or name the backend: backend:{names[1]}"
            raise self._error(at, piece, "auto takes no provider", fix)
        return Target(*names)

    def _error(self, at: int, piece: str, problem: str, fix: str) -> HalError:
        found = f"{shown(piece)} at character {at + 1}" if piece else f"nothing at character {at + 1}"
        return HalError(
            "POLICY",
            f"policy {shown(self.text, 200)} ({self.provenance}): {problem}, found {found}",
            value=piece,
            fix=fix,
        )


def _split(text: str, start: int, separator: str) -> Iterator[tuple[int, str]]:
    for raw in text.split(separator):
        piece = raw.strip()
        yield start + (raw.index(piece) if piece else 0), piece
        start += len(raw) + len(separator)


def _spelling(what: str, name: str) -> str:
    """What to write instead of a name that no backend or provider can have."""
    if what == "provider" and not name:
        return "write the provider's name after ':', or leave the ':' out"
    if what == "provider" and name.isdecimal():
        return "leave the device's number out: the tensors say which device"
    if NAME.fullmatch(name.lower()):
        return f"names are lower-case: {name.lower()}"
    for foreign in ("|", ">", "+", "/", ".", " "):
        if foreign in name:
            return f"separate backends with ',' and a provider from its backend with ':', not with {foreign!r}"
    return "names are lower-case letters, digits, '-' and '_', beginning with a letter"
