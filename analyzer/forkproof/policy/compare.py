"""Two reports compared: what came, what went, what stayed.

Owns: when findings of two builds are the same. Takes: Reports. Gives: a `Comparison`, or a Report with its baseline.
Must never: call a finding known that has become more severe: an upgrade that makes it worse is what a gate is for.
Wrong where: functions without names are told apart by the named functions around them only; findings that share a
fingerprint are counted, and which of them is the new one is a guess.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from forkproof.model import Baseline, Finding, Report
from forkproof.report.json import in_order


@dataclass(frozen=True, slots=True)
class Comparison:
    """Findings of the new report, but for `fixed`, which are of the old one."""

    introduced: tuple[Finding, ...]
    fixed: tuple[Finding, ...]
    unchanged: tuple[Finding, ...]
    errors: tuple[str, ...] = ()
    """What could not be analysed, on either side: a finding may have come or gone there unseen."""


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
    fixed = tuple(finding for finding in in_order(old.findings) if id(finding) in met)
    errors = tuple(dict.fromkeys((*old.errors, *new.errors)))
    return Comparison(tuple(introduced), fixed, tuple(unchanged), errors)


def against(old: Report, new: Report) -> Report:
    """The new report, each finding marked as new or unchanged."""
    compared = compare(old, new)
    marked = [replace(finding, baseline=Baseline.NEW) for finding in compared.introduced]
    marked += [replace(finding, baseline=Baseline.UNCHANGED) for finding in compared.unchanged]
    return replace(new, findings=tuple(in_order(tuple(marked))))
