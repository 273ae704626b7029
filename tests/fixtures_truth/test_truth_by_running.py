"""What the fixtures say about running them holds when they are run, and what they say about the dynamic linker is
what the dynamic linker says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures import truth
from fixtures.build import Result
from fixtures.truth import MACHINES, Fixture, read_all
from tests.support.cage import observe
from tests.support.machines import NATIVE, runner

FIXTURES = read_all()
#: What is true on the machine itself, but cannot be shown by user-mode emulation.
BEYOND_QEMU = {
    "handler_starts_thread": "qemu-user cannot start threads in the child of a threaded process",
    "threads_in_handler": "qemu-user cannot start threads in the child of a threaded process",
    "raw_clone3": "qemu-user does not know clone3",
}
HANG_RUNS, HANG_LIMIT = 40, 1.5
CLEAN_RUNS, CLEAN_LIMIT = 10, 60.0


def _runs() -> Iterator[object]:
    for machine in MACHINES:
        for fixture in FIXTURES.values():
            hangs = fixture.hangs(machine)
            if hangs is not None and machine in fixture.recipe.machines:
                marks = [pytest.mark.arm64] if machine == "aarch64" else []
                yield pytest.param(machine, fixture, hangs, id=f"{machine}-{fixture.name}", marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "fixture", "hangs"), list(_runs()))
def test_runs_as_it_says(machine: str, fixture: Fixture, hangs: bool, built_fixtures: Callable[[str], Result]) -> None:
    prefix = runner(machine)
    if prefix is None:
        pytest.skip(f"nothing here runs {machine} programs (Debian: qemu-user)")
    if machine != NATIVE and fixture.name in BEYOND_QEMU:
        pytest.skip(BEYOND_QEMU[fixture.name])
    result = built_fixtures(machine)
    if fixture.name in result.skipped:
        pytest.skip(result.skipped[fixture.name])
    program = result.tree.path(fixture)
    attempts, limit = (HANG_RUNS, HANG_LIMIT) if hangs else (CLEAN_RUNS, CLEAN_LIMIT)
    outcome = observe([*prefix, program], attempts=attempts, limit=limit)
    assert outcome.status == 0
    assert outcome.hung == hangs, f"{outcome.runs} runs"


def _linked() -> list[Fixture]:
    facts = (truth.Binding, truth.NoBinding, truth.Loads, truth.Missing, truth.Closure)
    return [
        fixture
        for fixture in FIXTURES.values()
        if fixture.recipe.kind == "program"
        and NATIVE in fixture.recipe.machines
        and any(isinstance(fact, facts) for fact in fixture.facts(NATIVE))
    ]


def _trace(program: Path, fixture: Fixture) -> str:
    """Everything the dynamic linker would do for this program, which does not run."""
    env = {**os.environ, **fixture.environment(program.parent)}
    env |= {"LD_TRACE_LOADED_OBJECTS": "1", "LD_WARN": "1", "LD_BIND_NOW": "1", "LD_DEBUG": "bindings"}
    return subprocess.run(
        [program], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    ).stdout.decode()


def _ends_in(path: str, name: str) -> bool:
    return f"/{path}".endswith(f"/{name}")


@pytest.mark.parametrize("fixture", _linked(), ids=lambda f: f.name)
def test_dynamic_linker_agrees(fixture: Fixture, built_fixtures: Callable[[str], Result]) -> None:
    program = built_fixtures(NATIVE).tree.path(fixture)
    trace = _trace(program, fixture)
    objects = re.findall(r"^\t(\S+)(?: => (\S+))? \(0x", trace, re.MULTILINE)
    paths = [program.name, *(path or name for name, path in objects)]
    pattern = r"binding file (\S+) \[0\] to (\S+) \[0\]: \w+ symbol `([^']+)'(?: \[(\S+)\])?"
    bound = re.findall(pattern, trace)
    for fact in fixture.facts(NATIVE):
        match fact:
            case truth.Loads():
                assert any(_ends_in(path, fact.path) for path in paths)
            case truth.Missing():
                assert f"{fact.soname} => not found" in trace
            case truth.Closure():
                rest = iter(paths)
                assert all(any(_ends_in(path, name) for path in rest) for name in fact.names)
            case truth.Binding() | truth.NoBinding():
                found = [b for b in bound if b[2] == fact.symbol and _ends_in(b[0], fact.source)]
                if isinstance(fact, truth.NoBinding) or fact.target is None:
                    assert not found
                else:
                    assert any(_ends_in(b[1], fact.target) for b in found), found
            case _:
                pass
