"""Threads that have ended again: starts that a join follows on every way, or the wait for a future that they tell.

Owns: the pairing of what starts threads with what joins them, in one function and in what it calls.
Takes: `Flow`, and the distance of functions to a start. Gives: an answer for each start: has the thread ended?
Must never: believe that a thread has ended because something is joined somewhere.
Wrong where: of two threads the wrong one is joined (starts and joins are counted, their handles are not compared);
      where a loop joins fewer threads than another one has started; where a future is let go in a function that does
      not see how it was made.

What lets an object go may call what joins: the shared state of a `std::future` joins when its last reference goes. One
reference is that by which `std::async` itself has made it, so only where two go it may be the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Final, NamedTuple

from forkproof.ahead import Ahead
from forkproof.callgraph import CERTAIN, EdgeKind, Reach
from forkproof.code.operations import Return
from forkproof.code.values import Value
from forkproof.flow import Flow
from forkproof.futures import Futures
from forkproof.model import Answer
from forkproof.program import Function
from forkproof.signals import Signals
from forkproof.told import Told

_NEAR: Final = 2
"""Calls between a function and the join, at most, where its callers may take it to be there for that."""
_LET_GO: Final = 2
"""References that go before the last one may have."""
_ZERO_IS_STARTED: Final = ("pthread_create", "thrd_create", "uv_thread_create")
"""What gives 0 when there is a thread: where there is none, nobody joins it."""


class _Sites(NamedTuple):
    """The calls of a function with which a thread ends."""

    joins: frozenset[int]
    waits: frozenset[int]
    """Those that wait for a future that the thread tells,"""
    looks: frozenset[int]
    """those that do so for a time only,"""
    letting_go: frozenset[int]
    """and those that join if an object has no other reference."""
    tells: bool = True
    """The thread was seen to tell one."""


class Joins:
    """Answers for the functions that both start and join threads, or call what does."""

    def __init__(self, flow: Flow, to_start: Reach, harmless: frozenset[int], signals: Callable[[], Signals]) -> None:
        self.flow, self.graph = flow, flow.graph
        self.to_start, self.harmless = to_start, harmless
        self.futures = Futures(flow, to_start)
        self._told = Told(flow, to_start, harmless, signals, self.futures.ends_after)
        self._left: dict[Function, Answer] = {}
        self._known: dict[tuple[Function, frozenset[int], frozenset[int]], Mapping[int, Answer]] = {}

    @cached_property
    def to_join(self) -> Reach:
        """Distance of every function to a join."""
        return self.graph.distances(self.flow.program.called(self.flow.signatures.joins.exact), backward=True)

    def leaves(self, function: Function) -> bool:
        """A thread that the function has started may exist when it returns."""
        return self._ended_within(function) is not Answer.YES

    def _ended_within(self, function: Function) -> Answer:
        """Whether the threads that the function has started have ended when it returns."""
        known = self._left.get(function)
        if known is None:
            self._left[function] = Answer.NO  # what calls itself leaves some
            known = self._left[function] = self._decide(function)
        return known

    def _decide(self, function: Function) -> Answer:
        if not self._is_near(function, _NEAR + 1):
            return Answer.NO
        whole = self.flow.whole(function)
        starts = [e for e in self._calls(whole) if self.to_start[self.graph.target[e]] >= 0 and e not in self.harmless]
        body = self.flow.body(whole)
        ends = {i.address for i in body.instructions for o in i.operations if isinstance(o, Return)}
        ends |= {int(self.graph.site[e]) for e in self._calls(whole) if self.graph.kind[e] == EdgeKind.JUMP}
        joins, _ = self._joining(whole, starts)
        answers = set(self.ended(whole, starts, ends - joins).values())
        if not starts or Answer.NO in answers:
            return Answer.NO
        return Answer.UNKNOWN if Answer.UNKNOWN in answers else Answer.YES

    def ended(self, function: Function, starts: Collection[int], goals: Collection[int]) -> Mapping[int, Answer]:
        """For each of a function's calls that start a thread: has that ended when control comes to one of the goals?

        Of a thread that has told its end by a semaphore this is not known: it may be on its way out.
        """
        told = self.told(function, starts, goals)
        found = self._joined(function, starts, goals)
        return {e: Answer.UNKNOWN if a is Answer.NO and e in told else a for e, a in found.items()}

    def told(self, function: Function, starts: Collection[int], goals: Collection[int]) -> frozenset[int]:
        """Those of them whose threads have told, as the last thing that they do, that they have ended."""
        return self._told.before(function, starts, goals)

    def _joined(self, function: Function, starts: Collection[int], goals: Collection[int]) -> Mapping[int, Answer]:
        if not self._is_near(function, _NEAR + 1):
            return dict.fromkeys(starts, Answer.NO)
        key = function, frozenset(starts), frozenset(goals)
        if key not in self._known:
            self._known[key] = self._find(function, starts, key[2])
        return self._known[key]

    def _is_near(self, function: Function, most: int) -> bool:
        return 0 <= int(self.to_join[function]) <= most or 0 <= int(self.futures.to_wait[function]) <= most

    def _calls(self, function: Function) -> list[int]:
        return [e for e in self.flow.outgoing(function) if int(self.graph.kind[e]) in CERTAIN]

    def _joining(self, function: Function, starts: Collection[int]) -> tuple[frozenset[int], frozenset[int]]:
        """Sites of calls that join, and of those that do if an object has nobody else: what also starts is left out."""
        graph, starting = self.graph, {int(self.graph.site[e]) for e in starts}
        near = [e for e in self._calls(function) if 0 <= int(self.to_join[graph.target[e]]) <= _NEAR]
        near = [e for e in near if int(graph.site[e]) not in starting]
        held = {e for e in near if graph.kind[e] == EdgeKind.CALLBACK and not self._is_passed(function, e)}
        joins = frozenset(int(graph.site[e]) for e in near if e not in held)
        return joins, frozenset(int(graph.site[e]) for e in held) - joins

    def _is_passed(self, function: Function, edge: int) -> bool:
        """What a call passes on is the callee's address, and not an object that leads to it."""
        target, program = Function(int(self.graph.target[edge])), self.flow.program
        if self.to_join[target] == 0:
            return True
        state = self.flow.state_before(function, int(self.graph.site[edge]))
        address = Value(None, program.rva_of(target))
        return state is None or any(state.register(name) == address for name in self.flow.convention.arguments)

    def _find(self, function: Function, starts: Collection[int], goals: frozenset[int]) -> Mapping[int, Answer]:
        graph = self.graph
        within = {e: self._ended_by(e) for e in starts}
        left = [e for e in starts if within[e] is not Answer.YES]
        sites = {int(graph.site[e]) for e in left}
        at_site = {
            int(graph.site[e]): self._at(function, e, goals, self._sites(function, starts, e), len(sites)) for e in left
        }
        found = {e: at_site[int(graph.site[e])] for e in left}
        return within | {e: within[e] if answer is Answer.NO else answer for e, answer in found.items()}

    def _sites(self, function: Function, starts: Collection[int], start: int) -> _Sites:
        """What may end the thread of one of the starts."""
        joins, letting_go = self._joining(function, starts)
        starting = {int(self.graph.site[e]) for e in starts}
        calls = [e for e in self._calls(function) if int(self.graph.site[e]) not in starting]
        waits = {int(self.graph.site[e]) for e in calls if self.futures.is_wait(e)}
        looks = {int(self.graph.site[e]) for e in calls if self.futures.is_look(e)}
        tells = self.futures.tells(start) if waits or looks else Answer.NO
        if tells is Answer.NO:
            return _Sites(joins, frozenset(), frozenset(), letting_go)
        return _Sites(joins, frozenset(waits), frozenset(looks), letting_go, tells is Answer.YES)

    def _ended_by(self, edge: int) -> Answer:
        """Whether a call that starts threads, or the start itself, leaves none behind."""
        target = Function(int(self.graph.target[edge]))
        is_start = self.graph.kind[edge] == EdgeKind.THREAD or self.to_start[target] == 0
        return Answer.NO if is_start else self._ended_within(target)

    def _at(self, function: Function, edge: int, goals: frozenset[int], sites: _Sites, starts: int) -> Answer:
        """Whether a thread that is started at a site, one of so many, has ended at the goals."""
        body, site = self.flow.body(function), int(self.graph.site[edge])
        position = body.position(site)
        if position is None:
            return Answer.NO
        targets = {Function(int(self.graph.target[e])) for e in self.flow.edges_at(function, site)}
        gives_zero = targets & set(self.flow.program.called(_ZERO_IS_STARTED))
        known = {self.flow.convention.result: 0} if gives_zero else {}
        start = body.instructions[position].end
        ahead = Ahead(body, start, self.flow.explore_from(function, start, known))
        met = ahead.between(sites.joins | sites.waits, goals, site)
        stops = ahead.with_loops(met, {site, *goals}) | ahead.looks_before(met & sites.waits)
        if not met:
            gone = ahead.between(sites.letting_go - goals, goals, site) | (sites.letting_go & goals)
            looks = ahead.between(sites.looks, goals, site)
            return Answer.UNKNOWN if looks or len(gone) >= _LET_GO else Answer.NO
        if ahead.comes_to(goals, stops) or not (sites.tells or met <= sites.joins):
            return Answer.UNKNOWN
        if len(met) >= starts:
            return Answer.YES
        joins_one = stops == met and all(self._joins_one(function, place) for place in met)
        return Answer.NO if joins_one else Answer.UNKNOWN

    def _joins_one(self, function: Function, site: int) -> bool:
        """The call is a join itself, of one thread."""
        return all(self.to_join[self.graph.target[e]] == 0 for e in self.flow.edges_at(function, site))
