"""lock-reentry: code called under an allocator's lock comes back and waits for the same lock.

Owns: the rule's findings.
Takes: `Facts`. Gives: findings; no fork is needed for this hazard, one thread is enough.
Must never: call a way certain: whether a flag guards it is only known where the code shows it.
Wrong where: see the rule's page.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from forkproof.allocators import AllocatorFacts
from forkproof.cache import Json, Parts
from forkproof.content import Part, part_of
from forkproof.facts import Facts
from forkproof.locks.identity import lock_of
from forkproof.locks.ordinary import Occasions
from forkproof.locks.reentry import Reentries, Reentry
from forkproof.locks.summary import Step, step_frames
from forkproof.locks.values import Object, Value
from forkproof.model import Finding, Severity, Verdict
from forkproof.program import Function, Program

_Found = tuple[Reentry, str, int]
"""A way, what is rare about it, and how many other locks it is met under."""


def find(facts: Facts) -> list[Finding]:
    """The locks of the allocators in use that a call under them can ask for again."""
    return [finding for allocator in facts.allocators if allocator.is_used for finding in _of_one(facts, allocator)]


def _of_one(facts: Facts, allocator: AllocatorFacts) -> list[Finding]:
    if not facts.has_own_locks(allocator):
        return []
    parts = facts.parts or Parts()
    part = _part(facts, allocator)
    kept = parts.get(part.key)
    if kept is not None:
        ways = [_unpacked(row, part) for row in kept]
    else:
        ways = _searched(facts, allocator)
        if all(part.holds(step.function) for way in ways for step in way[0].path):
            parts.put(part.key, [_packed(way, part) for way in ways])
    return [_finding(facts, allocator, *way) for way in ways]


def _part(facts: Facts, allocator: AllocatorFacts) -> Part:
    """All that the search reads: what the allocators and those with handlers lead to, and what is asked about them."""
    flow = facts.flow
    program, registration = flow.program, allocator.registration
    handlers = () if registration is None else registration.handlers
    told = (
        program.closure.objects[allocator.object].name,
        allocator.hooks.value,
        [_told(program, function) for function in allocator.entries],
        [(handler.is_known, _told(program, handler.function)) for handler in handlers],
    )
    return part_of(flow, sorted(facts.summaries.objects), "lock-reentry", *told, outwards=True)


def _told(program: Program, function: Function | None) -> tuple[str, int] | None:
    """A function in words that mean the same in every program."""
    if function is None:
        return None
    return program.closure.objects[program.object_of(function)].name, program.rva_of(function)


def _packed(way: _Found, part: Part) -> Json:
    reentry, rare, more = way
    assert isinstance(reentry.address.base, Object)
    address = part.objects.index(reentry.address.base.number), reentry.address.offset
    steps = [(*part.place(step.function), step.site, step in reentry.chosen) for step in reentry.path]
    return [address, steps, rare, more]


def _unpacked(row: Json, part: Part) -> _Found:
    (obj, offset), steps, rare, more = row
    functions = part.functions((step[0], step[1]) for step in steps)
    path = tuple(Step(function, step[2]) for function, step in zip(functions, steps, strict=True))
    chosen = tuple(each for each, step in zip(path, steps, strict=True) if step[3])
    return Reentry(Value(Object(part.objects[obj]), offset), path, chosen), rare, more


def _searched(facts: Facts, allocator: AllocatorFacts) -> list[_Found]:
    locks = facts.locks_of(allocator, even_without_forks=True)
    if locks is None:
        return []
    reach = facts.flow.graph.distances(allocator.entries, blocked=facts.flow.dying)
    among = [function for function in facts.summaries.runs if reach[function] >= 0]
    addresses = [lock.taken.address for lock in locks.coverage.locks]
    occasions = Occasions(facts.summaries, allocator.entries)
    search = Reentries(facts.summaries, lambda step: occasions.rare((step,)) != "")
    found = [each for each in search.of(addresses, among) if not _is_doubtful(facts, occasions, each)]
    rarely = [(each, occasions.rare(each.path)) for each in found]
    kept = [(each, rare or _door(facts, search, each)) for each, rare in rarely if not rare or _stays(facts, each)]
    return _folded(kept, occasions)


def _door(facts: Facts, search: Reentries, reentry: Reentry) -> str:
    """What is rare about a way through an allocation that libc makes for itself."""
    for step, after in pairwise(reentry.path):
        if search.is_of_libc(step, after.function):
            return f"only when libc allocates for itself, in {facts.flow.name(step.function)}"
    return ""


def _is_doubtful(facts: Facts, occasions: Occasions, reentry: Reentry) -> bool:
    """The way leaves the allocator, and is rare before it does: then nothing outside of it need be looked into."""
    program, home = facts.flow.program, facts.summaries.objects
    inside = [step for step in reentry.path if program.object_of(step.function) in home]
    return len(inside) < len(reentry.path) and any(occasions.rare_step(step) for step in inside)


def _stays(facts: Facts, reentry: Reentry) -> bool:
    """The way does not leave the allocator. One that does and is rare besides is two guesses, and no finding."""
    program, home = facts.flow.program, facts.summaries.objects
    return all(program.object_of(step.function) in home for step in reentry.path)


def _folded(found: list[tuple[Reentry, str]], occasions: Occasions) -> list[_Found]:
    """Rare ways through one function that reports a problem are one way, met under several locks: the shortest of
    them stands for all, and the others are counted."""
    groups: dict[object, list[tuple[Reentry, str]]] = {}
    for each, rare in found:
        reporter = occasions.reporter(each.path) if rare else None
        groups.setdefault(each.address if reporter is None else reporter, []).append((each, rare))
    folded = []
    for group in groups.values():
        each, rare = min(group, key=lambda pair: (len(pair[0].path), pair[0].path))
        folded.append((each, rare, len(group) - 1))
    return folded


def _finding(facts: Facts, allocator: AllocatorFacts, reentry: Reentry, rare: str, more: int) -> Finding:
    name = facts.object_name(allocator.object)
    lock = lock_of(facts.flow.program, reentry.address, allocator.object)
    frames = zip(reentry.path, step_frames(facts.flow, reentry.path), strict=True)
    path = tuple(replace(frame, edge="table") if step in reentry.chosen else frame for step, frame in frames)
    doubt = " On the way is a call through a pointer, which may hold this function among others." * bool(reentry.chosen)
    doubt += f" That happens {rare}." if rare else ""
    doubt += f" It is the same under {more} other lock{'s' * (more > 1)}." if more else ""
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
