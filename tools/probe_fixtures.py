"""Which fixtures a probe can decide, and the plans for them.

Owns: the choice, by what fixtures say of themselves, and the question that is put to a clean twin: what the scan found
in the one that hangs, about the same lock and the same fork. A scan of the twin has no such finding, so a probe of its
findings would show nothing.
Takes: built fixtures. Gives: plans, as text for `forkproof probe --plan`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Final

from fixtures import truth
from fixtures.build import Result
from fixtures.truth import Fixture
from forkproof import pipeline
from forkproof.code.decode import listing
from forkproof.elf.image import Image, load
from forkproof.facts import Facts
from forkproof.model import Finding, Frame, Lock, Severity, Verdict
from forkproof.options import QUIET, ScanOptions
from forkproof.probe import plan, planfile
from forkproof.probe.prove import is_probed

PROBED: Final = frozenset({"inherited-lock", "unsafe-call", "lock-reentry"})
"""Rules whose fixtures hang as a probe can show. The others' hang elsewhere: in a handler, or for want of a thread."""

GUEST: Final = "/work/fixtures"
"""Where the laboratory has the fixtures."""
_LIBRARIES: Final = ("libc.so.6", "ld-linux-aarch64.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6")


def hanging(known: Mapping[str, Fixture], machine: str) -> list[Fixture]:
    """Fixtures that hang for a reason that a probe can show."""
    return [f for f in known.values() if f.hangs(machine) and _rules(f, known, machine) & PROBED]


def clean(known: Mapping[str, Fixture], machine: str) -> list[Fixture]:
    """Programs of the same directories that end."""
    return [f for f in known.values() if f.hangs(machine) is False and f.area in ("programs", "rules")]


def _rules(fixture: Fixture, known: Mapping[str, Fixture], machine: str) -> set[str]:
    stated = [fixture, *(known[name] for name in fixture.recipe.links)]
    return {fact.rule for f in stated for fact in f.facts(machine) if isinstance(fact, truth.Finding)}


@dataclass(frozen=True)
class Planner:
    """Scans fixtures where they were built, or as a sysroot has them."""

    built: Result
    options: ScanOptions = field(default_factory=ScanOptions)
    inside: str = ""
    """The directory of the fixtures as a process sees it, if not where they were built."""

    def program(self, fixture: Fixture) -> str:
        """Its path, as a process sees it."""
        path = self.built.tree.path(fixture)
        return f"{self.inside}/{fixture.output}" if self.inside else str(path)

    def text(self, fixture: Fixture) -> str:
        """The plan of one fixture, a clean one with its twin's question."""
        asked: list[Finding] = []
        if fixture.hangs(self.built.tree.machine) is False and (other := self._hazard(fixture)) is not None:
            asked = list(_Question(self, other, fixture).findings())
        made: list[plan.Plan] = []

        def note(facts: Facts, findings: list[Finding]) -> None:
            asked[:] = [a for a in asked if (a.rule, a.lock) not in {(f.rule, f.lock) for f in findings}]
            made.append(plan.make(facts, str(self.options.sysroot or "/"), [*findings, *asked]))

        report = pipeline.scan((self.program(fixture),), self.options, QUIET, note)
        assert made, report.errors
        return planfile.dump(replace(report, findings=(*report.findings, *asked)), made[0])

    def _hazard(self, fixture: Fixture) -> Fixture | None:
        machine, known = self.built.tree.machine, self.built.fixtures
        found = [f for f in hanging(known, machine) if f.twin == fixture.name or f.name == fixture.twin]
        return min(found, key=lambda f: (f.name != fixture.twin, f.name), default=None)


def for_guest(built: Result, folder: Path, system: Path) -> Planner:
    """A planner for the laboratory: `folder` gets what fixtures need of its system, and the fixtures as `GUEST`."""
    libraries = folder / "usr/lib/aarch64-linux-gnu"
    libraries.mkdir(parents=True)
    (folder / "lib").symlink_to("usr/lib")
    for name in _LIBRARIES:
        shutil.copy2(system / "usr/lib/aarch64-linux-gnu" / name, libraries / name)
    (folder / "usr/lib/ld-linux-aarch64.so.1").symlink_to("aarch64-linux-gnu/ld-linux-aarch64.so.1")
    variants = shutil.ignore_patterns("stripped", "O0", "minidebug", "separate")
    shutil.copytree(built.tree.root(), folder / GUEST.lstrip("/"), ignore=variants)
    return Planner(built, ScanOptions(folder), GUEST)


@dataclass(frozen=True)
class _Question:
    """What is asked of a clean fixture."""

    planner: Planner
    hazard: Fixture
    clean: Fixture

    def findings(self) -> Iterator[Finding]:
        report = pipeline.scan((self.planner.program(self.hazard),), self.planner.options, QUIET)
        for finding in report.findings:
            is_theirs = finding.rule in PROBED and finding.severity.rank <= Severity.MEDIUM.rank and is_probed(finding)
            if is_theirs and (lock := self._lock(finding.lock)) is not None:
                yield replace(
                    finding, verdict=Verdict.SUSPECTED, severity=Severity.NOTE, target=self.planner.program(self.clean),
                    object=self._name(finding.object), lock=lock, fork=self._frame(finding.fork),
                    holder=self._path(finding.holder), requester=self._path(finding.requester),
                    message="as in the fixture that hangs", why="", fix="", conditions=None,
                )  # fmt: skip

    @property
    def _pairs(self) -> dict[str, str]:
        """Files of the one, and what takes their place in the other."""
        known = self.planner.built.fixtures
        pairs = {self.hazard.output: self.clean.output}
        for name in self.hazard.recipe.links:
            for other in self.clean.recipe.links:
                if other == name or known[other].twin == name or known[name].twin == other:
                    pairs.setdefault(known[name].output, known[other].output)
        return pairs

    def _name(self, name: str) -> str:
        return self._pairs.get(name, name)

    def _lock(self, lock: Lock | None) -> Lock | None:
        """The lock of the same name."""
        if lock is None or lock.object not in self._pairs or lock.rva is None:
            return lock
        match = re.match(r"\w+", lock.name)
        places = [_symbol(self._image(n), match[0]) if match else None for n in (lock.object, self._name(lock.object))]
        if None in places:
            return None
        before, after = (place[0] for place in places if place is not None)
        return replace(lock, object=self._name(lock.object), rva=lock.rva - before + after)

    def _frame(self, frame: Frame | None) -> Frame | None:
        return replace(frame, object=self._name(frame.object)) if frame is not None else None

    def _path(self, path: tuple[Frame, ...]) -> tuple[Frame, ...]:
        """A witness path whose last function is the same code in both; or none: its offset may be another."""
        if not path or path[-1].object not in self._pairs:
            return path
        codes = [self._code(name, path[-1].function) for name in (path[-1].object, self._name(path[-1].object))]
        moved = tuple(replace(frame, object=self._name(frame.object)) for frame in path)
        return moved if codes[0] and codes[0] == codes[1] else ()

    def _image(self, output: str) -> Image:
        return _image(self.planner.built.tree.root() / output)

    def _code(self, output: str, function: str) -> list[str]:
        image = self._image(output)
        place = _symbol(image, function)
        return [row[2] for row in listing(image.read(*place).tobytes(), place[0], image.machine)] if place else []


@cache
def _image(path: Path) -> Image:
    return load(path)


def _symbol(image: Image, name: str) -> tuple[int, int] | None:
    """Its address and size."""
    table = image.static_symbols
    if name not in table.names:
        return None
    at = table.names.index(name)
    return int(table.value[at]), int(table.size[at])
