"""Threads that have ended again: starts that a join follows on every way.

Owns: the pairing of what starts threads with what joins them, in one function and in what it calls.
Takes: `Flow`, and the distance of functions to a start. Gives: an answer for each start: has the thread ended?
Must never: believe that a thread has ended because something is joined somewhere.
Wrong where: of two threads the wrong one is joined (starts and joins are counted, their handles are not compared);
      where a loop joins fewer threads than another one has started.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Final

from forkproof.callgraph import CERTAIN, EdgeKind, Reach
from forkproof.code.decode import Body
from forkproof.code.explore import Exploration
from forkproof.code.operations import Return
from forkproof.flow import Flow
from forkproof.model import Answer
from forkproof.program import Function

_NEAR: Final = 2
"""Calls between a function and the join, at most, where its callers may take it to be there for that."""
_ZERO_IS_STARTED: Final = ("pthread_create", "thrd_create", "uv_thread_create")
"""What gives 0 when there is a thread: where there is none, nobody joins it."""


class Joins:
    """Answers for the functions that both start and join threads, or call what does."""

    def __init__(self, flow: Flow, to_start: Reach, harmless: frozenset[int]) -> None:
        self.flow, self.graph = flow, flow.graph
        self.to_start, self.harmless = to_start, harmless
        self._leaves: dict[Function, bool] = {}
        self._known: dict[tuple[Function, frozenset[int], frozenset[int]], Mapping[int, Answer]] = {}

    @cached_property
    def to_join(self) -> Reach:
        """Distance of every function to a join."""
        return self.graph.distances(self.flow.program.called(self.flow.signatures.joins.exact), backward=True)

    def leaves(self, function: Function) -> bool:
        """A thread that the function has started may exist when it returns."""
        known = self._leaves.get(function)
        if known is None:
            self._leaves[function] = True  # what calls itself leaves some
            known = self._leaves[function] = self._decide(function)
        return known

    def _decide(self, function: Function) -> bool:
        if not self._is_near(function, _NEAR + 1):
            return True
        whole = self.flow.whole(function)
        starts = [e for e in self._calls(whole) if self.to_start[self.graph.target[e]] >= 0 and e not in self.harmless]
        body = self.flow.body(whole)
        ends = {i.address for i in body.instructions for o in i.operations if isinstance(o, Return)}
        ends |= {int(self.graph.site[e]) for e in self._calls(whole) if self.graph.kind[e] == EdgeKind.JUMP}
        answers = self.ended(whole, starts, ends - self._joining(whole, starts))
        return not starts or any(answer is not Answer.YES for answer in answers.values())

    def ended(self, function: Function, starts: Collection[int], goals: Collection[int]) -> Mapping[int, Answer]:
        """For each of a function's calls that start a thread: has that ended when control comes to one of the goals?"""
        if not self._is_near(function, _NEAR + 1):
            return dict.fromkeys(starts, Answer.NO)
        key = function, frozenset(starts), frozenset(goals)
        if key not in self._known:
            self._known[key] = self._find(function, starts, key[2])
        return self._known[key]

    def _is_near(self, function: Function, most: int) -> bool:
        return 0 <= int(self.to_join[function]) <= most

    def _calls(self, function: Function) -> list[int]:
        return [e for e in self.flow.outgoing(function) if int(self.graph.kind[e]) in CERTAIN]

    def _joining(self, function: Function, starts: Collection[int]) -> frozenset[int]:
        """Sites of calls that join, what also starts threads left out."""
        graph, starting = self.graph, {int(self.graph.site[e]) for e in starts}
        calls = self._calls(function)
        found = {int(graph.site[e]) for e in calls if self._is_near(Function(int(graph.target[e])), _NEAR)}
        return frozenset(found - starting)

    def _find(self, function: Function, starts: Collection[int], goals: frozenset[int]) -> Mapping[int, Answer]:
        graph = self.graph
        found = {e: Answer.YES for e in starts if not self._leaves_by(e)}
        left = [e for e in starts if e not in found]
        joins = self._joining(function, starts)
        sites = {int(graph.site[e]) for e in left}
        at_site = {site: self._at(function, site, goals, joins, len(sites)) for site in sites}
        return found | {edge: at_site[int(graph.site[edge])] for edge in left}

    def _leaves_by(self, edge: int) -> bool:
        """A call of a function that starts threads, or the start itself, leaves one behind."""
        target = Function(int(self.graph.target[edge]))
        return bool(self.graph.kind[edge] == EdgeKind.THREAD or self.to_start[target] == 0) or self.leaves(target)

    def _at(self, function: Function, site: int, goals: frozenset[int], joins: frozenset[int], starts: int) -> Answer:
        """Whether a thread that is started at a site, one of so many, has ended at the goals."""
        body = self.flow.body(function)
        position = body.position(site)
        if position is None:
            return Answer.NO
        targets = {Function(int(self.graph.target[e])) for e in self.flow.edges_at(function, site)}
        gives_zero = targets & set(self.flow.program.called(_ZERO_IS_STARTED))
        known = {self.flow.convention.result: 0} if gives_zero else {}
        start = body.instructions[position].end
        ahead = _Ahead(body, start, self.flow.explore_from(function, start, known))
        met = ahead.between(joins, goals, site)
        stops = ahead.with_loops(met, {site, *goals})
        if not met:
            return Answer.NO
        if ahead.comes_to(goals, stops):
            return Answer.UNKNOWN
        if len(met) >= starts:
            return Answer.YES
        joins_one = stops == met and all(self._joins_one(function, place) for place in met)
        return Answer.NO if joins_one else Answer.UNKNOWN

    def _joins_one(self, function: Function, site: int) -> bool:
        """The call is a join itself, of one thread."""
        return all(self.to_join[self.graph.target[e]] == 0 for e in self.flow.edges_at(function, site))


class _Ahead:
    """What can run after a start."""

    def __init__(self, body: Body, start: int, run: Exploration) -> None:
        self.body, self.start, self.run = body, start, run

    def _block(self, first: int) -> range:
        position = self.body.position(first) or 0
        return range(position, self.body.block_end(position))

    def _instructions(self, first: int) -> list[int]:
        return [self.body.instructions[p].address for p in self._block(first)]

    def with_loops(self, sites: Collection[int], outside: Collection[int]) -> set[int]:
        """These sites, and all of each loop around one: a loop that joins is taken to join what there is.

        Not where the loop goes around what lies outside as well.
        """
        found = set(sites)
        for first in self.run.successors:
            if not set(self._instructions(first)) & set(sites):
                continue
            loop = {b for b in self.run.onward(first) if first in self.run.onward(b)}
            inside = {address for block in loop for address in self._instructions(block)}
            if not inside & set(outside):
                found |= inside
        return found

    def between(self, sites: Collection[int], goals: Collection[int], start: int) -> set[int]:
        """Those sites that control comes to before a goal, and from which it goes on to one in the same round."""
        reached = {site for site in sites if self._comes(self.start, {site}, {start, *goals})}
        return {site for site in reached if self._comes(site, goals, {start})}

    def comes_to(self, goals: Collection[int], stops: Collection[int]) -> bool:
        """Control can come to a goal without meeting a stop."""
        return self._comes(self.start, goals, stops)

    def _comes(self, start: int, goals: Collection[int], stops: Collection[int]) -> bool:
        pending, seen = [start], {start}
        while pending:
            block = pending.pop()
            met = next((a for a in self._instructions(block) if a in goals or a in stops), None)
            if met is not None and met not in stops:
                return True
            if met is None:
                following = self.run.successors.get(self.run.block_of(block) or 0, ())
                new = [b for b in following if b not in seen]
                seen.update(new)
                pending += new
        return False
