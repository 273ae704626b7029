"""The report as canonical JSON, version 1, and back.

Owns: the document's top level, its version, and the rule by which values of `forkproof.model` become JSON.
Takes: a Report, or text that claims to be one. Gives: text, or a Report equal to the one it was made from.
Must never: drop a field, or write anything that differs between two scans of the same input.

The keys *are* the field names of the model, in their order, so a document and the types cannot drift apart;
`tests/unit/report/test_json.py` pins every key that version 1 promises. Three things are written differently:

- a finding carries its `id` and its `fingerprint`, which the model derives;
- `conditions.answers` is an object with the four conditions as its keys;
- the findings are sorted, most severe first.

Output is ASCII: a file name that is not UTF-8 (a lone surrogate to Python) survives the round trip, and the
bytes do not depend on the reader's locale. Readers ignore keys that they do not know: version 1 may grow.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from forkproof import __version__, model
from forkproof.errors import EXIT_INPUT, ForkproofError
from forkproof.model import Conditions, Finding, Report

VERSION: Final = 1
CONDITIONS: Final = ("threads", "holder", "requester", "not_quiesced")

_KINDS: Final[dict[type, str]] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    NoneType: "null",
}

_T = TypeVar("_T")
_Object = dict[str, Any]


class BadReport(ForkproofError):
    """Text that is not a report of this version; says where and what was expected."""

    exit_code = EXIT_INPUT

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(
            f"not a forkproof report: {where}: {problem}" if where else f"not a forkproof report: {problem}",
            next_step="Make one with: forkproof scan TARGET --format json --output FILE",
        )
        self.where = where
        self.reason = problem


def render(report: Report) -> str:
    """The canonical document: two spaces of indentation, ASCII, a newline at its end."""
    return json.dumps(document(report), indent=2) + "\n"


def document(report: Report) -> _Object:
    """The same as plain values."""
    return {
        "version": VERSION,
        "tool": {"name": "forkproof", "version": __version__},
        "targets": [plain(target) for target in report.targets],
        "findings": [plain(finding) for finding in in_order(report.findings)],
        "diagnostics": [plain(diagnostic) for diagnostic in report.diagnostics],
        "errors": list(report.errors),
        "overrides": [plain(override) for override in report.overrides],
    }


def in_order(findings: tuple[Finding, ...]) -> list[Finding]:
    """Most severe first; ties by everything else that a finding says, so that the order is total."""
    return sorted(findings, key=lambda finding: (finding.severity.rank, finding.target, finding.rule, repr(finding)))


def parse(text: str) -> Report:
    """The report that `render` made this text from; `BadReport` for anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadReport(f"line {error.lineno} column {error.colno}", f"not JSON: {error.msg}") from error
    except RecursionError as error:
        raise BadReport("", "nested too deeply") from error
    except ValueError as error:
        raise BadReport("", f"not JSON: {error}") from error
    whole = _expect(dict, value, "")
    version = whole.get("version")
    if version != VERSION or isinstance(version, bool):
        raise BadReport("version", f"{_shown(version)} where this forkproof reads {VERSION}")
    for name in ("targets", "findings", "diagnostics"):  # a Report may lack them, a document may not
        if name not in whole:
            raise BadReport(name, "missing")
    report = _typed(Report, whole, "")
    assert isinstance(report, Report)
    return report


# Values to JSON.


def plain(value: object) -> object:
    """A value of the model as what json.dumps takes."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    result = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Finding):
        return {"id": value.id, "fingerprint": value.fingerprint, **result}
    if isinstance(value, Conditions):
        answers = (answer.value for answer in value.answers)
        return {**result, "answers": dict(zip(CONDITIONS, answers, strict=True))}
    return result


# JSON to values. Each function takes the value and the place where it stands, for the message.


def _typed(kind: object, value: object, where: str) -> object:
    """The value as the annotation `kind` of a field of the model says."""
    origin = get_origin(kind)
    if origin in {Union, UnionType}:
        return _optional(kind, value, where)
    if origin is tuple:
        return _sequence(get_args(kind), value, where)
    assert isinstance(kind, type)
    if dataclasses.is_dataclass(kind):
        return _record(kind, _expect(dict, value, where), where)
    if issubclass(kind, Enum):
        return _member(kind, value, where)
    return _expect(kind, value, where)


def _optional(kind: object, value: object, where: str) -> object:
    (inner,) = (option for option in get_args(kind) if option is not NoneType)
    return None if value is None else _typed(inner, value, where)


def _sequence(kinds: tuple[object, ...], value: object, where: str) -> tuple[object, ...]:
    items = _expect(list, value, where)
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise BadReport(where, f"{len(items)} values where {len(kinds)} were expected")
    return tuple(_typed(kind, items[i], f"{where}[{i}]") for i, kind in enumerate(kinds))


def _record(kind: type, value: _Object, where: str) -> object:
    if kind is Conditions:
        answers = _expect(dict, value.get("answers"), f"{where}.answers")
        value = {**value, "answers": [answers.get(name) for name in CONDITIONS]}
    values = {}
    for name, hint, required in _fields(kind):
        place = f"{where}.{name}" if where else name
        if name in value:
            values[name] = _typed(hint, value[name], place)
        elif required:
            raise BadReport(place, "missing")
    return kind(**values)


def _member(kind: type[Enum], value: object, where: str) -> Enum:
    for member in kind:
        if member.value == value:
            return member
    known = ", ".join(str(member.value) for member in kind)
    raise BadReport(where, f"{_shown(value)} is none of {known}")


def _expect(kind: type[_T], value: object, where: str) -> _T:
    """The value itself, if it is of this very type: JSON's true is no number here."""
    if type(value) is kind:
        return value
    raise BadReport(where, f"{_shown(value)} where {_KINDS[kind]} was expected")


def _shown(value: object) -> str:
    """A value for a message, never more than a line of it."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


@cache
def _fields(kind: type) -> tuple[tuple[str, object, bool], ...]:
    """Name, type and necessity of each field."""
    hints = get_type_hints(kind, vars(model))
    absent = dataclasses.MISSING
    return tuple(
        (field.name, hints[field.name], field.default is absent and field.default_factory is absent)
        for field in dataclasses.fields(kind)
    )


__all__: Final[list[str]] = ["VERSION", "BadReport", "document", "in_order", "parse", "render"]
