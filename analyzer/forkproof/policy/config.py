"""forkproof.toml: a team's policy and the defaults of its scans, read and checked.

Owns: the file's keys. Takes: a path. Gives: a `Policy`, or an error that names the file, the key and what was expected.
Must never: let a misspelt key pass: a suppression that silently does nothing is worse than none.
"""

from __future__ import annotations

import datetime as dt
import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forkproof import rules
from forkproof.errors import UsageError
from forkproof.model import Severity

NAME: Final = "forkproof.toml"
OFF: Final = "off"
_SELECTORS: Final = ("id", "rule", "target", "object", "function", "lock")
_TABLES: Final = {
    "": ("fail-on", "scan", "rules", "suppress"),
    "scan": ("sysroot", "library-path", "preload", "also", "only"),
    "suppress": (*_SELECTORS, "reason", "expires"),
}
"""The keys of each table; those of [rules] are the rules."""
_HEADS: Final = {"scan": "[scan]", "suppress": "[[suppress]]"}
_LEVELS: Final = tuple(severity.value for severity in Severity)
_DAY: Final = "expires = 2027-03-01"
_PLACE: Final = re.compile(r" \(at line (\d+), column \d+\)$")
"""Where tomllib says what is wrong; before Python 3.14 it says so in its message only."""
_Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """One [[suppress]] entry: every selector that is given must match."""

    source: str
    """Which entry of which file."""
    reason: str
    expires: dt.date
    """The last day on which it holds."""
    id: str = ""
    rule: str = ""
    target: str = ""
    object: str = ""
    function: str = ""
    lock: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole file; the defaults are those of no file at all."""

    path: str = ""
    fail_on: str | None = None
    severities: tuple[tuple[str, Severity | None], ...] = ()
    """Rule ids with the severity that their findings get; None for a rule that is off."""
    suppressions: tuple[Rule, ...] = ()
    sysroot: Path | None = None
    library_path: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


class BadConfig(UsageError):
    """A forkproof.toml that cannot be meant as written."""


def load(path: Path) -> Policy:
    """Read and check a file."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise BadConfig(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path}: not TOML: {error}", next_step="Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(path, text, str(error)) from error
    return _Reader(path).policy(table)


def _not_toml(path: Path, text: str, message: str) -> BadConfig:
    """The line at fault with what it should be: a day that does not exist is no TOML, and nor is one without zeros."""
    place = _PLACE.search(message)
    number = int(place[1]) if place is not None else 0
    at_fault = "".join(text.split("\n")[number - 1 : number]).strip()
    help_text = 'Texts stand in quotes: key = "text", key = ["text", "text"].'
    if at_fault.startswith("expires"):
        help_text = f"Expected a day that there is, as YYYY-MM-DD without quotes: {_DAY}"
    told = f": {at_fault[:60]}" if at_fault else ""
    return BadConfig(f"{path}: not TOML: {message}{told}", next_step=help_text)


class _Reader:
    """Knows the file's name for its messages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def policy(self, table: _Table) -> Policy:
        self.known(table, _TABLES[""], "")
        scan = self.table(table.get("scan", {}), "scan")
        self.known(scan, _TABLES["scan"], "scan.")
        fail_on = table.get("fail-on")
        levels = (*_LEVELS, "never")
        if fail_on is not None and fail_on not in levels:
            raise self.bad("fail-on", fail_on, f"one of {', '.join(levels)}")
        entries = table.get("suppress", [])
        if not isinstance(entries, list):
            raise self.bad("suppress", entries, "a list of tables: [[suppress]]")
        sysroot = scan.get("sysroot")
        return Policy(
            path=str(self.path),
            fail_on=fail_on,
            severities=tuple(self.severities(self.table(table.get("rules", {}), "rules"))),
            suppressions=tuple(self.suppression(number, entry) for number, entry in enumerate(entries)),
            sysroot=self.path.parent / self.text(sysroot, "scan.sysroot") if sysroot is not None else None,
            library_path=self.texts(scan, "library-path"),
            preload=self.texts(scan, "preload"),
            also=self.texts(scan, "also"),
            only=self.texts(scan, "only"),
        )

    def severities(self, table: _Table) -> list[tuple[str, Severity | None]]:
        """[rules]: a severity for a rule, or off."""
        self.known(table, [rule.id for rule in rules.load()], "rules.")
        levels = (*_LEVELS, OFF)
        for rule, level in table.items():
            if level not in levels:
                raise self.bad(f"rules.{rule}", level, f"one of {', '.join(levels)}")
        return [(rule, None if level == OFF else Severity(level)) for rule, level in table.items()]

    def suppression(self, number: int, entry: Any) -> Rule:  # noqa: ANN401 - as TOML has it
        """One [[suppress]]."""
        place = f"suppress[{number}]"
        table = self.table(entry, place)
        self.known(table, _TABLES["suppress"], f"{place}.")
        chosen = {name: self.text(table[name], f"{place}.{name}") for name in _SELECTORS if name in table}
        if not chosen:
            raise BadConfig(f"{self.path}: {place} would suppress everything", next_step=f"Add one of: {_listed()}.")
        if "rule" in chosen:
            self.known({chosen["rule"]: 0}, [rule.id for rule in rules.load()], f"{place}.rule ")
        reason = self.text(table.get("reason", ""), f"{place}.reason").strip()
        if not reason:
            raise BadConfig(f"{self.path}: {place} has no reason", next_step='Say why: reason = "…"')
        if "expires" not in table:
            raise BadConfig(f"{self.path}: {place} has no date of expiry", next_step=f"Say until when it holds: {_DAY}")
        expires = self.day(table["expires"], f"{place}.expires")
        return Rule(f"{self.path}: {place}", reason, expires, **chosen)

    def day(self, value: Any, place: str) -> dt.date:  # noqa: ANN401 - as TOML has it
        """A date alone. A text that looks like one is refused, too: the next reader may be another program."""
        if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
            return value
        example = _DAY
        with suppress(ValueError):
            day = value.date() if isinstance(value, dt.datetime) else dt.date.fromisoformat(str(value))
            example = f"expires = {day.isoformat()}"
        raise self.bad(place, value, f"a day as YYYY-MM-DD, without quotes and without a time: {example}")

    def known(self, table: _Table, names: Sequence[str], place: str) -> None:
        """Refuse other keys, with those that look like them, that belong elsewhere, and that there are."""
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
                home = next((home for home, keys in _TABLES.items() if key in keys), None)
                hint = f"Did you mean {near[0]}? " if near else _belongs(key, home) if home is not None else ""
                raise BadConfig(
                    f"{self.path}: unknown: {place}{key}", next_step=f"{hint}Known are: {', '.join(names)}."
                )

    def table(self, value: Any, place: str) -> _Table:  # noqa: ANN401 - as TOML has it
        if not isinstance(value, dict):
            raise self.bad(place, value, "a table")
        return value

    def text(self, value: Any, place: str) -> str:  # noqa: ANN401 - as TOML has it
        if not isinstance(value, str):
            raise self.bad(place, value, "a string")
        return value

    def texts(self, table: _Table, name: str) -> tuple[str, ...]:
        value = table.get(name, [])
        if not isinstance(value, list):
            raise self.bad(f"scan.{name}", value, "a list of strings")
        return tuple(self.text(each, f"scan.{name}") for each in value)

    def bad(self, place: str, value: object, expected: str) -> BadConfig:
        shown = _shown(value)
        end = "" if expected.endswith(tuple("0123456789")) else "."  # a full stop is no part of an example
        return BadConfig(f"{self.path}: {place} is {shown}", next_step=f"Expected {expected}{end}")


def _belongs(key: str, home: str) -> str:
    where = f"below {_HEADS[home]}" if home else "at the top of the file, before the first [table]"
    return f"{key} belongs {where}. "


def _shown(value: object) -> str:
    """As the file has it, never more than a part of a line."""
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed() -> str:
    return ", ".join(_SELECTORS)
