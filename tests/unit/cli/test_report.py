"""`forkproof report`: a saved report, rendered again."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkproof.report import formats, json
from forkproof.report.formats import Look
from tests.unit.cli.conftest import run
from tests.unit.report import samples
from tests.unit.report.test_formats import decided


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.render(samples.incident()))
    return path


@pytest.mark.parametrize("name", formats.NAMES)
def test_every_format(saved: Path, name: str) -> None:
    result = run("report", saved, "--format", name)
    assert (result.exit_code, result.output) == (1, formats.render(samples.incident(), name, Look()))


def test_to_a_file(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert run("report", saved, "-o", target).output == ""
    assert target.read_text() == formats.render(samples.incident(), "html", Look())


def test_one_finding(saved: Path) -> None:
    result = run("report", saved, "--finding", samples.INHERITED.id, "--format", "json")
    assert [finding.id for finding in json.parse(result.output).findings] == [samples.INHERITED.id]
    wrong = run("report", saved, "--finding", "inherited-lock-0000000000")
    assert wrong.exit_code == 2
    assert samples.INHERITED.id in wrong.output


def test_exit_code_is_the_gates(saved: Path, tmp_path: Path) -> None:
    assert run("report", saved, "--fail-on", "never").exit_code == 0
    known = tmp_path / "known.json"
    known.write_text(json.render(json.parse(json.render(decided()))))
    assert run("report", known).exit_code == 1


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("{}", "version"), ("", "not JSON")])
def test_what_is_no_report(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    result = run("report", path)
    assert result.exit_code == 3
    assert str(path) in result.output
    assert said in result.output


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = run("report", tmp_path / "report.json")
    assert result.exit_code == 3
    assert "cannot be read" in result.output
