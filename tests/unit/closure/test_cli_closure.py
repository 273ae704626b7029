"""The command: its document, its text and its exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from forkproof.cli.closure import closure_command

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.closure.conftest import Compiler

HERE = ("-L.", "-Wl,-rpath,$ORIGIN")


@pytest.fixture
def program(gcc: Compiler) -> Path:
    gcc.library("liba.so", "int w() __attribute__((weak)); int a(void) { return w ? w() : 0; }")
    return gcc.program("p", "int a(); int main() { return a(); }", *HERE, "-la")


def _run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(closure_command, [str(part) for part in arguments])
    return result.exit_code, result.output


def test_document_has_the_keys_of_the_design(program: Path) -> None:
    code, output = _run(program, "--bindings", "--format", "json")
    document: dict[str, Any] = json.loads(output)
    assert code == 0
    assert document["objects"][0] == {"name": "p", "path": str(program), "why": "program"}
    assert [set(item) for item in document["objects"]] == [{"name", "path", "why"}] * len(document["objects"])
    library = str(program.parent / "liba.so")
    assert {"from": str(program), "to": library, "symbol": "a", "version": None, "weak": False, "ifunc": False} in (
        document["bindings"]
    )
    weak = next(item for item in document["bindings"] if item["symbol"] == "w")
    assert weak["to"] is None
    assert document["missing"] == []


def test_output_is_the_same_every_time(program: Path) -> None:
    assert _run(program, "--bindings", "--format", "json") == _run(program, "--bindings", "--format", "json")


def test_missing_library_is_exit_code_3_and_lists_the_places(program: Path) -> None:
    (program.parent / "liba.so").unlink()
    code, output = _run(program)
    assert code == 3
    assert "missing: liba.so, needed by" in output
    assert f"{program.parent}/liba.so (RUNPATH of {program}): no such file" in output


def test_bindings_are_listed_on_request_only(program: Path) -> None:
    assert "->" not in _run(program)[1]
    assert "liba.so: w -> nothing (weak)" in _run(program, "--bindings")[1]


def test_preload_that_cannot_be_loaded_is_exit_code_3_as_in_a_scan(program: Path) -> None:
    code, output = _run(program, "--preload", "/etc/passwd")
    assert code == 3
    assert "/etc/passwd: cannot be preloaded" in output
