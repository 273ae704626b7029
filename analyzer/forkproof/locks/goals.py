"""The locks of an allocator that a child may inherit taken, each with the ways that lead to it.

Owns: the choice of the locks that findings are about, and for each the functions in which it is taken.
Takes: `Summaries`, an allocator's functions and registration. Gives: `AllocatorLocks`.
Must never: leave an allocator without any goal because its locks have no names: then all of them are one goal.
Wrong where: a lock is reached only through functions that no allocation function leads to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from forkproof.callgraph import CERTAIN, EdgeKind, Reach
from forkproof.flow import Flow
from forkproof.locks.coverage import AllocatorLock, Cover, Coverage, coverage, taken_by
from forkproof.locks.identity import lock_of
from forkproof.locks.ordinary import Occasion, Occasions, Rank
from forkproof.locks.summary import Step, Summaries, step_frames
from forkproof.locks.values import Value
from forkproof.model import Frame, Lock
from forkproof.program import Function

_MANY_CONDITIONS: Final = 8
"""Conditions of state on the way to a lock, beyond which it is taken rarely."""
_FEW_CONDITIONS: Final = 4
"""Conditions of state beyond which an allocator that runs normally does not often take a lock."""
_MOST: Final = 4
"""Locks of one allocator that findings are about; the rest is counted."""


@dataclass(frozen=True, eq=False)
class Goal:
    """One lock, or all locks of an allocator where they have no names."""

    lock: Lock
    address: Value | None
    places: Mapping[Function, tuple[Step, ...]]
    """Functions in which the lock is known to be this one, each with the steps from there to where it waits."""
    occasion: Occasion
    is_left: bool
    """Handlers run, and leave this lock out."""
    is_plain: bool
    """It is taken in ordinary running: not on rare ways, nor where much must be the case."""
    flow: Flow

    @cached_property
    def to_lock(self) -> Reach:
        """Distance of every function to one that takes the lock, in ordinary running."""
        return self.flow.graph.distances(self.places, backward=True, blocked=self.flow.dying)

    @cached_property
    def to_lock_dying(self) -> Reach:
        """The same, ways through exit, abort and failed assertions included."""
        return self.flow.graph.distances(self.places, backward=True)

    def to_lock_without(self, edges: Collection[int], kinds: Iterable[EdgeKind] = CERTAIN) -> Reach:
        """Distances in ordinary running that use none of these edges."""
        return self.flow.graph.distances(self.places, kinds, backward=True, blocked=self.flow.dying, without=edges)

    def frames(self, edges: Sequence[int], start: Function) -> tuple[Frame, ...]:
        """From a function, along edges to one that takes the lock, to the acquire site."""
        last = Function(int(self.flow.graph.target[edges[-1]])) if edges else start
        before = self.flow.frames(edges, last)[:-1]
        return (*before, *self._tail(last))

    def _tail(self, place: Function) -> tuple[Frame, ...]:
        steps = self.places[place]
        if not steps:
            return (self.flow.frame(place, None, ""),)
        return step_frames(self.flow, steps)


@dataclass(frozen=True, eq=False)
class AllocatorLocks:
    """What is known of one allocator's locks."""

    coverage: Coverage
    occasions: Mapping[Value, Occasion]
    weights: Mapping[Value, int]
    goals: tuple[Goal, ...]
    more: int
    """Locks as open as the goals that no finding is about."""

    def is_rare(self, lock: AllocatorLock) -> bool:
        """The lock is taken so rarely that no one needs to wait for a fix."""
        address = lock.taken.address
        occasion = self.occasions[address]
        return occasion.rank is Rank.RARE or (occasion.rank is Rank.USUAL and self.weights[address] > _MANY_CONDITIONS)


def allocator_locks(
    summaries: Summaries,
    obj: int,
    entries: tuple[Function, ...],
    handlers: tuple[Function | None, Function | None],
    *,
    is_effective: bool,
) -> AllocatorLocks:
    """Judge the locks of the allocation paths against a prepare and a child handler.

    1. which locks the paths can take, and which prepare holds (coverage);
    2. when each that stays open is taken (occasions);
    3. the open ones that are not rare are the goals; if handlers exist but are never registered, what they would have
       taken.
    """
    covered = coverage(summaries, entries, [obj], handlers)
    wanted = {Cover.UNCOVERED} if is_effective else {Cover.UNCOVERED, Cover.UNRESOLVED}
    if not is_effective and handlers[0] is not None:
        wanted = {Cover.COVERED, Cover.ASSUMED}
    open_locks = [lock for lock in covered.locks if lock.cover in wanted]
    everyday = _everyday(summaries, entries)
    judged = Occasions(summaries, everyday)
    interesting = [lock for lock in covered.locks if lock.cover in wanted | {Cover.UNCOVERED}]
    ways = {address: taken for address, (taken, _) in taken_by(summaries, everyday, [obj]).items()}
    occasions = {
        lock.taken.address: judged.of(ways[lock.taken.address])
        if lock.taken.address in ways
        else Occasion(Rank.RARE, "only when something is asked of the allocator")
        for lock in interesting
    }
    weights = {lock.taken.address: judged.weight(ways.get(lock.taken.address, lock.taken)) for lock in interesting}
    found = AllocatorLocks(covered, occasions, weights, (), 0)
    often = [lock for lock in open_locks if not found.is_rare(lock)]
    if not is_effective and (handlers[0] is not None or not often):
        often = open_locks  # what handlers would have taken matters by that alone
    often.sort(key=lambda lock: (occasions[lock.taken.address].rank, len(lock.taken.path), repr(lock.taken.address)))
    goals = tuple(
        _goal(
            summaries,
            obj,
            lock,
            occasions[lock.taken.address],
            is_left=is_effective,
            is_plain=_is_plain(occasions[lock.taken.address], weights[lock.taken.address]),
        )
        for lock in often[:_MOST]
    )
    return AllocatorLocks(covered, occasions, weights, goals, len(often) - len(goals))


def _everyday(summaries: Summaries, entries: tuple[Function, ...]) -> tuple[Function, ...]:
    """The functions that allocate and free; those of an allocator with names of its own are all there is to go by."""
    program = summaries.program
    roles = summaries.flow.signatures.malloc_family
    found = []
    for entry in entries:
        obj = program.object_of(entry)
        names = program.names[obj].aliases(program.rva_of(entry))
        if any(roles.get(name, "query") != "query" for name in names):
            found.append(entry)
    return tuple(found) or entries


def _is_plain(occasion: Occasion, weight: int) -> bool:
    return occasion.rank is Rank.ALWAYS or (occasion.rank is Rank.USUAL and weight <= _FEW_CONDITIONS)


def _goal(
    summaries: Summaries, obj: int, lock: AllocatorLock, occasion: Occasion, *, is_left: bool, is_plain: bool
) -> Goal:
    address = lock.taken.address
    places = summaries.places(address)
    if not places:  # named by none of the functions that were followed: the way that was found is all there is
        places = {lock.taken.path[0].function: lock.taken.path}
    return Goal(lock_of(summaries.program, address, obj), address, places, occasion, is_left, is_plain, summaries.flow)
