"""SARIF against judges that are not ours: the schema, and Microsoft's validator with the rules of code scanning.

Both come from npm (`make validators`), pinned below; without node the tests are skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from forkproof.report import formats
from forkproof.report.formats import Look
from tests.unit.report.test_formats import REPORTS

MODULES = Path(__file__).parents[2] / "build" / "node" / "node_modules" / "@microsoft"
VALIDATOR = MODULES / "sarif-multitool-linux" / "Sarif.Multitool"
SCHEMAS = (
    MODULES / "jest-sarif" / "lib" / "schemas" / "sarif-2.1.0-rtm.5.json",
    MODULES / "sarif-multitool-linux" / "sarif-2.1.0.json",
)

pytestmark = pytest.mark.skipif(not VALIDATOR.exists(), reason="needs npm's validators: make validators")


def log(name: str) -> dict[str, Any]:
    document = json.loads(formats.render(REPORTS[name](), "sarif", Look()))
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", REPORTS)
def test_schema(name: str, schema: Path) -> None:
    rules = json.loads(schema.read_text(encoding="utf-8-sig"))
    validator = jsonschema.validators.validator_for(rules)(rules)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(log(name))] == []


@pytest.mark.parametrize("name", REPORTS)
def test_microsofts_validator(name: str, tmp_path: Path) -> None:
    """No error by SARIF's own rules or GitHub's; of the warnings, only the address of a home page is missing."""
    path = tmp_path / "log.sarif"
    path.write_text(json.dumps(log(name), indent=2), encoding="utf-8")
    command = [str(VALIDATOR), "validate", str(path), "--rule-kind", "Sarif;Ghas", "--level", "Error;Warning"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout
    assert "Analysis completed successfully" in said
    assert re.findall(r": error \S+.*", said) == []
    assert set(re.findall(r": warning (\w+)", said)) <= {"SARIF2005"}


def test_the_validators_do_complain(tmp_path: Path) -> None:
    broken = log("incident")
    broken["runs"][0]["results"][0]["ruleIndex"] = 99
    path = tmp_path / "log.sarif"
    path.write_text(json.dumps(broken), encoding="utf-8")
    command = [str(VALIDATOR), "validate", str(path), "--rule-kind", "Sarif;Ghas"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout
    assert re.search(r": error \S+", said)
