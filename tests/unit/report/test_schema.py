"""The published JSON Schema: what it says is what the model is, and what reports are."""

from __future__ import annotations

import json as stdlib_json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from forkproof.report import json
from forkproof.report.schema import schema
from tests.unit.report.test_formats import REPORTS

PUBLISHED = Path(__file__).parents[3] / "docs" / "report-1.schema.json"


def document(name: str) -> dict[str, Any]:
    value = stdlib_json.loads(json.render(REPORTS[name]()))
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_the_published_schema_is_the_models() -> None:
    hint = "run: python -m forkproof.report.schema > docs/report-1.schema.json"
    assert stdlib_json.loads(PUBLISHED.read_text(encoding="utf-8")) == schema(), hint


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_valid(validator: jsonschema.Draft202012Validator, name: str) -> None:
    validator.validate(document(name))


def test_new_keys_are_allowed(validator: jsonschema.Draft202012Validator) -> None:
    grown = document("incident")
    grown["findings"][0]["novelty"] = 1
    validator.validate(grown)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("version",), 2),
        (("findings", 0, "severity"), "fatal"),
        (("findings", 0, "id"), 7),
        (("targets", 0, "windows", 0, "kind"), "daemonise"),
        (("targets", 0, "path"), None),
    ],
)
def test_others_are_not(validator: jsonschema.Draft202012Validator, place: tuple[Any, ...], value: object) -> None:
    broken = document("incident")
    at: Any = broken
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    assert not validator.is_valid(broken)


def test_fields_are_described() -> None:
    assert (
        schema()["$defs"]["Frame"]["description"]
        == "One function of a witness path; `edge` says how the next frame is reached from it."
    )
    offset = schema()["$defs"]["Frame"]["properties"]["offset"]
    assert "Distance" in offset["description"]
