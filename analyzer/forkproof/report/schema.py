"""The JSON Schema of the canonical report, made from the model's own types.

Owns: the translation. Takes: nothing. Gives: the schema, as `docs/report-1.schema.json` holds it.
Must never: be written by hand: a test compares the published file, and the tests of `json` validate against it.

    python -m forkproof.report.schema > docs/report-1.schema.json

The schema lets unknown keys pass, as readers do: version 1 may grow.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from forkproof import model
from forkproof.model import Conditions, Finding, Report
from forkproof.report.json import CONDITIONS, VERSION

_Object = dict[str, Any]

_PLAIN: Final = {str: "string", int: "integer", bool: "boolean", float: "number"}


def schema() -> _Object:
    """The whole schema; every type of the model is a definition."""
    definitions: _Object = {}
    report = _record(Report, definitions)
    tool = {
        "type": "object",
        "properties": {"name": {"const": "forkproof"}, "version": {"type": "string"}},
        "required": ["name", "version"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:forkproof:report:{VERSION}",
        "title": f"forkproof report, version {VERSION}",
        **report,
        "properties": {"version": {"const": VERSION}, "tool": tool, **report["properties"]},
        "required": ["version", "tool", *report["properties"]],
        "$defs": dict(sorted(definitions.items())),
    }


def _record(kind: type, definitions: _Object) -> _Object:
    """A dataclass of the model as an object whose keys are its fields."""
    hints = get_type_hints(kind, vars(model))
    notes = _notes(kind)
    properties = {}
    for field in dataclasses.fields(kind):
        value = _value(hints[field.name], definitions)
        properties[field.name] = {**value, "description": notes[field.name]} if field.name in notes else value
    if kind is Finding:
        properties = {"id": {"type": "string"}, "fingerprint": {"type": "string"}, **properties}
    if kind is Conditions:
        answer = _value(model.Answer, definitions)
        answers = dict.fromkeys(CONDITIONS, answer)
        properties["answers"] = {"type": "object", "properties": answers, "required": list(CONDITIONS)}
    described = inspect.getdoc(kind) or ""
    return {"type": "object", "description": described, "properties": properties, "required": list(properties)}


def _value(hint: object, definitions: _Object) -> _Object:
    """A type annotation as a schema."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        return {"anyOf": [_value(option, definitions) for option in options]}
    if origin is tuple:
        if options[-1] is ...:
            return {"type": "array", "items": _value(options[0], definitions)}
        items = [_value(option, definitions) for option in options]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if hint is NoneType:
        return {"type": "null"}
    assert isinstance(hint, type)
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if hint.__name__ not in definitions:
        definitions[hint.__name__] = {}  # a type that mentions itself ends here
        is_enum = issubclass(hint, Enum)
        definitions[hint.__name__] = _member(hint) if is_enum else _record(hint, definitions)
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _member(kind: type) -> _Object:
    assert issubclass(kind, Enum)
    return {"enum": [member.value for member in kind], "description": inspect.getdoc(kind) or ""}


def _notes(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, which Python throws away."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    notes = {}
    for field, note in zip(body.body, body.body[1:], strict=False):
        is_note = isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
        if is_note and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(note, ast.Expr)
            assert isinstance(note.value, ast.Constant)
            notes[field.target.id] = inspect.cleandoc(str(note.value.value)).replace("\n", " ")
    return notes


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
