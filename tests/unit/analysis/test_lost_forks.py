"""A program that asks for fork is not said to be without forks because its libc is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forkproof import pipeline
from forkproof.model import Report
from forkproof.options import QUIET, ScanOptions
from forkproof.report import brief, text
from tests.unit.analysis.snippets import MACHINES, Build, Plan, compiled

pytestmark = pytest.mark.together("build")

FORKS = "int main(void) { if (fork() == 0) _exit(0); return 0; }"
NEVER = "int main(void) { return getpid(); }"
SPAWNS = "int main(void) { return system(0); }"


def _scanned(build: Build, code: str, into: Path) -> Report:
    """With no library at all."""
    program = compiled(Plan(build, f"#include <unistd.h>\n#include <stdlib.h>\n{code}", "program"))
    shutil.copyfile(program, into / "program")
    return pipeline.scan(["/program"], ScanOptions(sysroot=into), QUIET)


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_the_libc_that_would_fork_is_named(build: Build, tmp_path: Path) -> None:
    report = _scanned(build, FORKS, tmp_path)
    (target,) = report.targets
    doubt = "what children of fork can hang on: program asks for it, and libc.so.6, which could define it, is missing"
    assert target.not_known == (doubt,)
    assert f"not known: {doubt}" in {each.message for each in report.diagnostics if each.level == "warning"}
    assert doubt in brief.render(report)
    shown = " ".join(text.render(report).split())
    assert "no fork was seen in what was found" in shown
    assert "nothing in the closure was seen to fork" not in shown


@pytest.mark.parametrize("code", [NEVER, SPAWNS])
@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_nothing_is_said_of_what_asks_for_none(build: Build, code: str, tmp_path: Path) -> None:
    """What `system` and its like do in a child is theirs."""
    assert _scanned(build, code, tmp_path).targets[0].not_known == ()
