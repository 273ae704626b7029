"""What the fixtures say of themselves is what forkproof says of them: for both machines, at -O2 and -O0, stripped, with
symbols in .gnu_debugdata, and with symbols in separate debug files.

Reports are compared with truths by `tests.support.truths`. Programs for the other machine are scanned inside a
directory that holds them and its C library, since a scan with --sysroot never looks at the host.

Rules that do not exist yet have their truths in the fixtures already: `NOT_YET` says which, and each such truth is a
test of its own that must fail. When a rule appears, these tests say so, and the line here goes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import forkproof
from fixtures import truth
from fixtures.build import Result
from fixtures.truth import MACHINES, Expectation, Fixture, read_all
from forkproof.cli import main
from forkproof.cli.gate import exit_code
from forkproof.elf.demangle import demangle
from forkproof.report import json as report_json
from tests.support import command, truths
from tests.support.machines import CROSS_ROOT, NATIVE

if TYPE_CHECKING:
    from forkproof.model import Report

FIXTURES = {name: fixture for name, fixture in read_all().items() if fixture.recipe.kind != "library"}

#: Rules whose truths the fixtures state and that no code checks yet.
NOT_YET: dict[str, str] = {}


#: Libraries that fixtures need, beside the dynamic linker.
RUNTIME = ("libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6")
LINKERS = {"x86_64": "lib64/ld-linux-x86-64.so.2", "aarch64": "lib/ld-linux-aarch64.so.1"}
SEARCHED = {"x86_64": "lib/x86_64-linux-gnu", "aarch64": "lib/aarch64-linux-gnu"}


def not_yet(expectation: Expectation) -> str | None:
    """Why this truth is not borne out yet; None where it must hold."""
    match expectation.fact:
        case truth.Finding(rule=rule) if rule in NOT_YET:
            return f"{rule}: {NOT_YET[rule]}"
        case _:
            return None


@dataclass(frozen=True)
class Case:
    """One program, as it was built for a machine in a variant."""

    fixture: Fixture
    machine: str
    variant: str

    @property
    def has_names(self) -> bool:
        return self.variant != "stripped"

    @property
    def is_blind(self) -> bool:
        """A static program without symbols: libc's functions inside it have no names to be known by."""
        return self.variant == "stripped" and self.fixture.recipe.kind.startswith("static")


@dataclass(frozen=True)
class Place:
    """Where a case lies, and how forkproof is asked about it."""

    path: str
    sysroot: Path | None
    preload: tuple[str, ...]
    library_path: tuple[str, ...]
    cache: Path
    """All share what is found about libc."""

    @property
    def arguments(self) -> list[str]:
        """For the command line."""
        sysroot = ["--sysroot", str(self.sysroot)] if self.sysroot else []
        preload = [word for name in self.preload for word in ("--preload", name)]
        paths = [word for name in self.library_path for word in ("--library-path", name)]
        return [self.path, *sysroot, *preload, *paths]

    def scan(self) -> Report:
        return forkproof.scan(
            self.path,
            sysroot=self.sysroot,
            preload=self.preload,
            library_path=self.library_path,
            cache=self.cache,
        )


Locate = Callable[[Case], Place]


def cases(variants: frozenset[str] | None = None) -> Iterator[Any]:
    for machine in MACHINES:
        for fixture in FIXTURES.values():
            for variant in fixture.recipe.variants:
                if machine in fixture.recipe.machines and (variants is None or variant in variants):
                    marks = [pytest.mark.arm64] if machine == "aarch64" else []
                    case = Case(fixture, machine, variant)
                    yield pytest.param(case, id=f"{machine}-{variant}-{fixture.name}", marks=marks)


@pytest.fixture(scope="module")
def locate(built_fixtures: Callable[[str], Result], tmp_path_factory: pytest.TempPathFactory) -> Locate:
    """Finds a case's file: on the host, or in a sysroot with the other machine's C library."""
    kept = tmp_path_factory.mktemp("cache")

    @cache
    def root_of(machine: str, variant: str) -> Path:
        """A sysroot that holds a variant's directory as /, and the C library."""
        root = tmp_path_factory.mktemp(f"{machine}-{variant}")
        shutil.copytree(
            built_fixtures(machine).tree.root(variant),
            root,
            copy_function=_linked,
            dirs_exist_ok=True,
            ignore=_variants,
        )
        for name, source in _runtime(machine).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, root / name)
        return root

    def find(case: Case) -> Place:
        result = built_fixtures(case.machine)
        if case.fixture.name in result.skipped:
            pytest.skip(result.skipped[case.fixture.name])
        path = result.tree.path(case.fixture, case.variant)
        directory, sysroot = result.tree.root(case.variant), None
        # On the host, separate debug files are looked for in /usr/lib/debug only.
        if case.machine != NATIVE or case.variant == "separate":
            sysroot = root_of(case.machine, case.variant)
            path, directory = Path("/") / path.relative_to(directory), Path("/")
        environment = case.fixture.environment(directory)
        return Place(
            str(path),
            sysroot,
            tuple(environment.get("LD_PRELOAD", "").split()),
            tuple(filter(None, environment.get("LD_LIBRARY_PATH", "").split(":"))),
            kept,
        )

    return find


def _runtime(machine: str) -> dict[str, Path]:
    """The dynamic linker and the libraries of a machine, by where they belong in a sysroot."""
    if machine == NATIVE:
        ask = ["gcc", "-print-file-name=libc.so.6"]
        libraries = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()).parent
        linker = Path("/") / LINKERS[machine]
    else:
        libraries = Path(CROSS_ROOT.format(machine=machine)) / "lib"
        linker = libraries / Path(LINKERS[machine]).name
    found = {f"{SEARCHED[machine]}/{name}": libraries / name for name in RUNTIME} | {LINKERS[machine]: linker}
    if missing := [str(path) for path in found.values() if not path.exists()]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return found


def _variants(directory: str, names: list[str]) -> set[str]:
    """Directories of other variants below the one of -O2."""
    return {name for name in names if name in truth.VARIANTS or name == ".stubs"}


def _linked(source: str, target: str) -> None:
    """A second name for a file; a copy where that is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _holding(fixture: Fixture) -> Fixture:
    """The fixture with the truths that must hold today."""
    return replace(fixture, expectations=tuple(e for e in fixture.expectations if not_yet(e) is None))


def _document(report: Report) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(report_json.render(report))
    return document


@pytest.mark.parametrize("case", [p for p in cases() if not p.values[0].is_blind])
def test_the_report_bears_out_the_truth(case: Case, locate: Locate) -> None:
    report = locate(case).scan()
    document = _document(report)
    assert len(document["targets"]) == 1, document["diagnostics"]
    assert document["targets"][0]["machine"] == case.machine
    assert truths.report_mismatches(_holding(case.fixture), case.machine, document, names=case.has_names) == []
    for fact in case.fixture.facts(case.machine):
        if isinstance(fact, truth.Exit):
            assert exit_code(report, "high") == fact.code


def _blind() -> Iterator[Any]:
    for param in cases():
        case: Case = param.values[0]
        if case.is_blind:
            yield param


@pytest.mark.parametrize("case", list(_blind()))
def test_a_static_program_without_symbols_is_not_called_safe(case: Case, locate: Locate) -> None:
    """Nothing in it says which code is malloc or pthread_create: not a word of "no", and a warning that says so."""
    document = _document(locate(case).scan())
    (target,) = document["targets"]
    assert target["threads"] != "no"
    assert all(window["threads"] != "no" and window["reachable"] != "no" for window in target["windows"])
    assert not any(a["active"] or a["hooks"] in {"effective", "not-needed"} for a in target["allocators"])
    assert any("own locks" in question for question in target["not_known"])
    warnings = [d["message"] for d in document["diagnostics"] if d["level"] == "warning"]
    assert any("without symbols" in message for message in warnings)


def _early() -> Iterator[Any]:
    for param in cases(frozenset({"O2"})):
        case: Case = param.values[0]
        for expectation in case.fixture.expected(case.machine):
            reason = not_yet(expectation)
            if reason is not None:
                marks = [*param.marks, pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)]
                yield pytest.param(case, expectation, id=f"{param.id}-{expectation.text}", marks=marks)


@pytest.mark.parametrize(("case", "expectation"), list(_early()))
def test_not_yet(case: Case, expectation: Expectation, locate: Locate) -> None:
    document = _document(locate(case).scan())
    only = replace(case.fixture, expectations=(expectation,))
    assert truths.report_mismatches(only, case.machine, document) == []


def _with_facts(*kinds: type, variants: frozenset[str]) -> list[Any]:
    return [
        param
        for param in cases(variants)
        if any(isinstance(fact, kinds) for fact in param.values[0].fixture.facts(param.values[0].machine))
    ]


CLOSURE_FACTS = (truth.Binding, truth.NoBinding, truth.Missing, truth.Loads, truth.Closure)


def _invoked(*arguments: str) -> dict[str, Any]:
    """The JSON of a command, run in this process; its exit code may say that a library is missing."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code in (0, 3), result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize("case", _with_facts(*CLOSURE_FACTS, variants=frozenset({"O2", "O0", "stripped"})))
def test_the_closure_bears_out_the_truth(case: Case, locate: Locate) -> None:
    if case.fixture.recipe.kind != "program":
        pytest.skip("a static program binds nothing")
    document = _invoked("closure", *locate(case).arguments, "--bindings", "--format", "json")
    assert truths.binding_mismatches(case.fixture, case.machine, document) == []


@pytest.mark.parametrize("case", _with_facts(truth.Edge, variants=frozenset({"O2", "O0"})))
def test_the_call_graph_bears_out_the_truth(case: Case, locate: Locate) -> None:
    from forkproof.elf.image import load
    from forkproof.elf.names import FunctionNames

    place = locate(case)
    document = _invoked("graph", *place.arguments, "--format", "json")

    @cache
    def table(path: Path) -> FunctionNames:
        return FunctionNames(load(path))

    def function_at(path: Path, rva: int) -> str | None:
        host = path if place.sysroot is None else place.sysroot / path.relative_to("/")
        return demangle(table(host).name(rva))

    assert truths.edge_mismatches(case.fixture, case.machine, document, function_at) == []


#: A few through the command itself: what it prints is what the functions above have compared.
THROUGH_THE_COMMAND = ("daemon_unhooked", "daemon_hooked", "daemon_weak", "fork_exec", "static_unhooked")


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_command_says_the_same(machine: str, name: str, locate: Locate) -> None:
    case = Case(FIXTURES[name], machine, "O2")
    place = locate(case)
    done = command.forkproof("scan", *place.arguments, "--format", "json")
    assert truths.report_mismatches(_holding(case.fixture), machine, done.json()) == []
    report = place.scan()
    assert done.stdout == report_json.render(report)
    assert done.code == exit_code(report, "high")
    assert done.stderr == ""
