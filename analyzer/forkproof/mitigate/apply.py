"""Before, build, after: the program as it is, a shim, and the program with it.

Owns: the order of these steps and what counts as cured.
Takes: a target and how it is started. Gives: a `Mitigation`.
Must never: call cured what the second scan, or a probe that was asked for, does not show.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forkproof import pipeline
from forkproof.closure import DirectorySysroot, Sysroot
from forkproof.errors import UsageError
from forkproof.mitigate.remedy import Decision, Refusal, Remedy, decide
from forkproof.mitigate.shim import Shim, build, source
from forkproof.model import Finding, Report, Severity, Verdict
from forkproof.options import Progress, ScanOptions
from forkproof.probe import plan as planning
from forkproof.probe.plan import Plan
from forkproof.report.json import in_order
from forkproof.signatures import load as load_signatures

if TYPE_CHECKING:
    from forkproof.facts import Facts
    from forkproof.probe.stage import Command

_HANGS: Final = frozenset({"inherited-lock", "atfork-unbound", "atfork-absent", "atfork-order"})


@dataclass(frozen=True, slots=True)
class Mitigation:
    """What was found, built and shown."""

    before: Report
    decisions: tuple[Decision, ...]
    shim: Shim | None = None
    after: Report | None = None
    probed_before: tuple[Finding, ...] = ()
    probed_after: tuple[Finding, ...] = ()

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """What the shim does."""
        return tuple(d for d in self.decisions if isinstance(d, Remedy))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What no shim can do."""
        return tuple(d for d in self.decisions if isinstance(d, Refusal))

    @property
    def libraries(self) -> frozenset[str]:
        """The allocators in question."""
        return frozenset(d.finding.object for d in self.decisions)

    def of(self, report: Report) -> tuple[Finding, ...]:
        """The findings about their locks and handlers."""
        rules = _HANGS | {"atfork-incomplete"}
        return tuple(f for f in report.findings if f.object in self.libraries and f.rule in rules)

    def left(self, limit: Severity | None) -> tuple[Finding, ...]:
        """What the shim was to cure and the scan still finds; and hangs that count, if any."""
        gone = {r.finding.id for r in self.remedies}
        report = self.after or self.before
        return tuple(
            f
            for f in self.of(report)
            if f.id in gone or (f.rule in _HANGS and limit is not None and f.severity.rank <= limit.rank)
        )

    @property
    def still_hangs(self) -> bool:
        """A probe saw a child hang although the shim was there."""
        return any(f.verdict is Verdict.CONFIRMED for f in self.probed_after)

    @property
    def is_undecided(self) -> bool:
        """A probe was asked for, and showed neither."""
        return any(f.verdict is not Verdict.REFUTED for f in self.probed_after) and not self.still_hangs


@dataclass(slots=True)
class _Scan:
    """One scan, with what else is wanted of its facts."""

    decisions: tuple[Decision, ...] = ()
    plans: list[Plan] = field(default_factory=list)

    def __call__(self, facts: Facts, findings: list[Finding]) -> None:
        """A `pipeline.Note`."""
        self.decisions = decide(facts, findings)
        self.plans = [planning.make(facts, findings=findings)]


def mitigate(
    target: str,
    options: ScanOptions,
    output: Path,
    compiler: str | None,
    command: Command | None,
    seconds: float,
    progress: Progress,
) -> Mitigation:
    """All of it; without a remedy only the scan. With a command, the findings are probed before and after."""
    sysroot = DirectorySysroot(options.sysroot or Path("/"))
    looked = _Scan()
    before = _scanned(target, options, sysroot, progress, looked)
    found = Mitigation(before, looked.decisions)
    if not found.remedies:
        return found
    shim = build(source(found.remedies, Path(target).name), output, before.targets[0].machine, compiler)
    place = str(shim.path.resolve())
    with_shim = replace(options, preload=(place, *options.preload))
    after = _scanned(target, with_shim, _WithFile(sysroot, shim.path.resolve()), progress, _Scan())
    found = replace(found, shim=shim, after=after)
    if command is None:
        return found
    asked, plan = [r.finding for r in found.remedies], looked.plans[0]
    cured = replace(command, preload=(place, *command.preload))
    return replace(
        found,
        probed_before=_probed(asked, plan, command, seconds, progress),
        probed_after=_probed(asked, plan, cured, seconds, progress),
    )


def _scanned(target: str, options: ScanOptions, sysroot: Sysroot, progress: Progress, look: _Scan) -> Report:
    loaded = pipeline.load(sysroot.locate(target), options, sysroot)
    result, findings, notes = pipeline.scan_one(loaded, sysroot, options, load_signatures(), progress, look)
    unfound = pipeline.lacking(target, result, options)
    return Report((result,), tuple(in_order(tuple(findings))), tuple(notes), tuple(unfound))


def _probed(
    findings: Sequence[Finding], plan: Plan, command: Command, seconds: float, progress: Progress
) -> tuple[Finding, ...]:
    """The same findings asked of a run, with the shim or without."""
    from forkproof.probe.prove import Prover, Wanted

    return tuple(Prover(Wanted(command, seconds), progress).prove(plan, list(findings)))


class _WithFile:
    """A sysroot in which one file of this machine exists as well, under the path that it has here."""

    def __init__(self, inner: Sysroot, file: Path) -> None:
        self._inner, self._file = inner, file
        if not inner.is_host and inner.resolve(str(file)) is not None:
            raise UsageError(f"{file}: the sysroot has a file of that name", next_step="Name another: --output FILE")

    @property
    def is_host(self) -> bool:
        """As the inner one."""
        return self._inner.is_host

    def resolve(self, path: str) -> str | None:
        """The file, or the inner one's answer."""
        return path if self._is_it(path) else self._inner.resolve(path)

    def identity(self, path: str) -> Hashable:
        """The file's own."""
        return ("added", path) if self._is_it(path) else self._inner.identity(path)

    def read(self, path: str, size: int = -1) -> bytes:
        """The file's bytes, or the inner one's."""
        if not self._is_it(path):
            return self._inner.read(path, size)
        with self._file.open("rb") as stream:
            return stream.read(size)

    def names_in(self, path: str) -> tuple[str, ...]:
        """As the inner one: nobody searches for the file."""
        return self._inner.names_in(path)

    def host_path(self, path: str) -> Path:
        """The file, or the inner one's."""
        return self._file if self._is_it(path) else self._inner.host_path(path)

    def locate(self, target: str) -> str:
        """As the inner one."""
        return self._inner.locate(target)

    def _is_it(self, path: str) -> bool:
        return path == str(self._file)
