"""lock-reentry: code called under an allocator's lock comes back and waits for the same lock.

Owns: the rule's findings.
Takes: `Facts`. Gives: findings; no fork is needed for this hazard, one thread is enough.
Must never: call a way certain: whether a flag guards it is only known where the code shows it.
Wrong where: see the rule's page.
"""

from __future__ import annotations

from forkproof.allocators import AllocatorFacts
from forkproof.facts import Facts
from forkproof.locks.identity import lock_of
from forkproof.locks.ordinary import Occasions
from forkproof.locks.reentry import Reentries, Reentry
from forkproof.locks.summary import step_frames
from forkproof.model import Finding, Severity, Verdict


def find(facts: Facts) -> list[Finding]:
    """The locks of the allocators in use that a call under them can ask for again."""
    return [finding for allocator in facts.allocators if allocator.is_used for finding in _of_one(facts, allocator)]


def _of_one(facts: Facts, allocator: AllocatorFacts) -> list[Finding]:
    locks = facts.locks_of(allocator, even_without_forks=True)
    if locks is None:
        return []
    reach = facts.flow.graph.distances(allocator.entries, blocked=facts.flow.dying)
    among = [function for function in facts.summaries.runs if reach[function] >= 0]
    addresses = [lock.taken.address for lock in locks.coverage.locks]
    occasions = Occasions(facts.summaries, allocator.entries)
    return [_finding(facts, allocator, each, occasions) for each in Reentries(facts.summaries).of(addresses, among)]


def _finding(facts: Facts, allocator: AllocatorFacts, reentry: Reentry, occasions: Occasions) -> Finding:
    name = facts.object_name(allocator.object)
    lock = lock_of(facts.flow.program, reentry.address, allocator.object)
    path = step_frames(facts.flow, reentry.path)
    rare = occasions.rare(reentry.path)
    doubt = f" That happens {rare}." if rare else ""
    return Finding(
        rule="lock-reentry",
        severity=Severity.LOW if rare else Severity.MEDIUM,
        verdict=Verdict.SUSPECTED,
        target=facts.target,
        object=name,
        message=f"{path[0].function} calls code that comes back for {lock.name} while it holds it",
        why=f"{path[0].function} holds {lock.name} and calls {path[1].function}; from there {path[-1].function} waits "
        f"for the same lock, in the same thread.{doubt}",
        fix=facts.fix(allocator, "lock-reentry"),
        lock=lock,
        holder=path,
    )
