"""Two reports compared: what came, what went, what stayed, and what cannot be told.

Owns: when findings of two builds are the same. Takes: Reports. Gives: a `Comparison`, or a Report with its baseline.
Must never: call a finding known that has become more severe: an upgrade that makes it worse is what a gate is for. Nor
call a finding introduced that the old report could not have had, or fixed where the new one could not have it.
Wrong where: functions without names are told apart by the named functions around them only; findings that share a
fingerprint are counted, and which of them is the new one is a guess. A program that was renamed is another program.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from forkproof.model import Baseline, Diagnostic, Finding, Report, program_name
from forkproof.report.json import in_order


@dataclass(frozen=True, slots=True)
class Gap:
    """A program that one of the reports does not tell everything of."""

    program: str
    side: str
    """old or new."""
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Findings of the new report, but for those that are fixed, which are of the old one."""

    introduced: tuple[Finding, ...]
    fixed: tuple[Finding, ...]
    unchanged: tuple[Finding, ...]
    perhaps_introduced: tuple[Finding, ...] = ()
    """The old report does not tell everything of the program."""
    perhaps_fixed: tuple[Finding, ...] = ()
    """The new one does not."""
    gaps: tuple[Gap, ...] = ()
    errors: tuple[str, ...] = ()
    """What could not be analysed, on either side."""


def compare(old: Report, new: Report) -> Comparison:
    """Each finding of the new report meets at most one of the old."""
    left: dict[str, list[Finding]] = defaultdict(list)
    for finding in in_order(old.findings):
        left[finding.fingerprint].append(finding)
    introduced: list[Finding] = []
    unchanged: list[Finding] = []
    for finding in in_order(new.findings):
        candidates = left[finding.fingerprint]
        peer = next((each for each in candidates if each.id == finding.id), candidates[0] if candidates else None)
        if peer is not None:
            candidates.remove(peer)
        is_known = peer is not None and finding.severity.rank >= peer.severity.rank
        (unchanged if is_known else introduced).append(finding)
    met = set(map(id, (each for rest in left.values() for each in rest)))
    fixed = [finding for finding in in_order(old.findings) if id(finding) in met]
    gaps = tuple(_gaps(old, new))
    introduced, perhaps_introduced = _judged(introduced, gaps, "old")
    fixed, perhaps_fixed = _judged(fixed, gaps, "new")
    return Comparison(
        introduced=tuple(introduced),
        fixed=tuple(fixed),
        unchanged=tuple(unchanged),
        perhaps_introduced=tuple(perhaps_introduced),
        perhaps_fixed=tuple(perhaps_fixed),
        gaps=gaps,
        errors=tuple(dict.fromkeys((*old.errors, *new.errors))),
    )


def _judged(findings: list[Finding], gaps: Iterable[Gap], side: str) -> tuple[list[Finding], list[Finding]]:
    """Those of programs that this side tells everything of, and the others."""
    unsure = {gap.program for gap in gaps if gap.side == side}
    parts: tuple[list[Finding], list[Finding]] = [], []
    for finding in findings:
        parts[program_name(finding.target) in unsure].append(finding)
    return parts


def _gaps(old: Report, new: Report) -> Iterator[Gap]:
    """Programs of either report that one of them does not tell everything of."""
    programs = {target.name for target in (*old.targets, *new.targets)}
    programs |= {program_name(finding.target) for finding in (*old.findings, *new.findings)}
    sides = (("old", old, _failed(old)), ("new", new, _failed(new)))
    for program in sorted(programs):
        for side, report, failed in sides:
            if (reason := _gap(program, report, failed, programs)) is not None:
                yield Gap(program, side, reason)


def _failed(report: Report) -> dict[str, str]:
    """Names of what gave nothing, with the reason: programs, and artifacts of which nobody knows what they hold."""
    lines = ((each.object, each.message) for each in report.diagnostics if each.message in report.errors)
    return {program_name(name): message.splitlines()[0].removeprefix(f"{name}: ") for name, message in lines}


def _gap(program: str, report: Report, failed: dict[str, str], programs: set[str]) -> str | None:
    """What is not known of a program. One that is not there is known not to be, unless something could not be read."""
    if program in failed:
        return f"not analysed: {failed[program]}"
    mine = [target for target in report.targets if target.name == program]
    if mine:
        return next((target.gap for target in mine if target.gap), None)
    artifact = next((name for name in failed if name not in programs), None)
    return None if artifact is None else f"not analysed: {artifact}: {failed[artifact]}"


def against(old: Report, new: Report) -> Report:
    """The new report, each finding marked as new or unchanged; what an incomplete scan leaves open is said."""
    compared = compare(old, new)
    came = (*compared.introduced, *compared.perhaps_introduced)
    marked = [replace(finding, baseline=Baseline.NEW) for finding in came]
    marked += [replace(finding, baseline=Baseline.UNCHANGED) for finding in compared.unchanged]
    notes = tuple(_open(compared))
    return replace(new, findings=tuple(in_order(tuple(marked))), diagnostics=(*new.diagnostics, *notes))


def _open(compared: Comparison) -> Iterator[Diagnostic]:
    came = Counter(program_name(finding.target) for finding in compared.perhaps_introduced)
    gone = Counter(program_name(finding.target) for finding in compared.perhaps_fixed)
    for gap in compared.gaps:
        if gap.side == "old" and (count := came[gap.program]):
            counts = "1 finding counts" if count == 1 else f"{count} findings count"
            message = f"{counts} as new, though the baseline does not tell everything of this program ({gap.reason})"
            yield Diagnostic("warning", gap.program, message)
        if gap.side == "new" and (count := gone[gap.program]):
            are = "1 finding of the baseline is" if count == 1 else f"{count} findings of the baseline are"
            message = f"{are} not seen here; whether that is a repair is not known ({gap.reason})"
            yield Diagnostic("warning", gap.program, message)
