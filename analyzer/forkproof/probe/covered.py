"""Locks that the scan calls covered, as questions for a probe.

Owns: those questions, and what the answer means. Takes: a `Plan`, the findings. Gives: findings that claim nothing yet.
Must never: ask about a lock that a finding speaks of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from forkproof.model import Finding, Lock, Severity, Verdict
from forkproof.probe.plan import Plan


def questions(plan: Plan, target: str, findings: Sequence[Finding], wanted: str | None) -> list[Finding]:
    """A question for each allocator that is used, takes locks, and has no finding; or for one lock by its name."""
    known = {f.object for f in findings}
    spoken_of = {(f.lock.object, f.lock.name) for f in findings if f.lock is not None}
    if wanted is not None:
        locks = [k for k in dict.fromkeys(plan.locks) if k.name == wanted and (k.object, k.name) not in spoken_of]
        return [
            _covered(target, lock, f"{lock.name} of {lock.object}, which the scan calls covered,") for lock in locks
        ]
    return [
        _covered(
            target,
            Lock(name, "a lock of the allocator", None, "allocator"),
            f"the locks of {name}, which the scan calls covered",
        )
        for name in plan.active
        if name not in known
    ]


def _covered(target: str, lock: Lock, message: str) -> Finding:
    return Finding(
        rule="inherited-lock",
        severity=Severity.NOTE,
        verdict=Verdict.SUSPECTED,
        target=target,
        object=lock.object,
        message=message,
        why="",
        fix="",
        lock=lock,
    )


def answered(finding: Finding) -> Finding:
    """What the probe of a covered lock says: protection shown, or an error in the scan."""
    if finding.verdict is Verdict.CONFIRMED:
        message = f"{finding.message.rstrip(',')}, are not: this is an error in forkproof's analysis; please report it"
        return replace(finding, message=message)
    return finding
