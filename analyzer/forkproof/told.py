"""Threads that have told by a semaphore that they have ended, where nothing joins them.

Owns: which threads post a semaphore as the last thing that they do, and which of a function's starts are waited for so.
Takes: `Flow`, `Signals`, the distance of functions to a start, and what tells that nothing follows a call.
Gives: edges: the starts whose threads hold no lock of the program's any more.
Must never: believe a post that anything follows, or a semaphore that something else posts or that begins with a permit.
Wrong where: a destructor of a variable of the thread takes a lock after the post; where a loop waits for fewer threads
      than another one has started.

What a thread does after its last post is libc's: so such a thread may exist for a while, and holds nothing meanwhile
but what its end takes, an allocator's locks among them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from typing import Final

import numpy as np

from forkproof.ahead import Ahead
from forkproof.callgraph import CERTAIN, EdgeKind, Reach
from forkproof.code.explore import CallEffect, Exploration, explore
from forkproof.code.operations import Return
from forkproof.flow import Flow
from forkproof.locks.values import Value
from forkproof.program import Function
from forkproof.signals import Call, Signals

_NEAR: Final = 2
"""Calls between a function and the post or the wait that it is there for, at most."""
_DEEPEST: Final = 4
"""Calls between one that starts a thread and the start itself."""
_SEMAPHORE: Final = "sem"


class Told:
    """Answers for the functions that both start threads and wait for semaphores, or call what does."""

    def __init__(
        self, flow: Flow, to_start: Reach, harmless: frozenset[int], signals: Callable[[], Signals],
        ends_after: Callable[[Function, int], bool],
    ) -> None:  # fmt: skip
        """`ends_after`: nothing but the end of the function follows one of its calls."""
        self.flow, self.graph, self.to_start, self.harmless = flow, flow.graph, to_start, harmless
        self._make, self._ends_after = signals, ends_after
        self._known: dict[tuple[Function, frozenset[int], frozenset[int]], frozenset[int]] = {}
        self._last: dict[Function, frozenset[int]] = {}
        self._within: dict[Function, bool] = {}

    @cached_property
    def signals(self) -> Signals:
        """Who waits for what."""
        return self._make()

    @cached_property
    def to_wait(self) -> Reach:
        """Distance of every function to the wait for a semaphore."""
        locks = self.flow.signatures.locks
        names = [n for n, f in locks.items() if f.kind == _SEMAPHORE and f.op == "acquire" and not f.bounded]
        return self.graph.distances(self.flow.program.called(sorted(names)), backward=True)

    def before(self, function: Function, starts: Collection[int], goals: Collection[int]) -> frozenset[int]:
        """Those of a function's calls that start a thread which has told its end when control comes to a goal."""
        if not 0 <= int(self.to_wait[function]) <= _NEAR + 1:
            return frozenset()
        key = function, frozenset(starts), frozenset(goals)
        if key not in self._known:
            self._known[key] = frozenset(self._find(*key))
        return self._known[key]

    def _find(self, function: Function, starts: frozenset[int], goals: frozenset[int]) -> Iterator[int]:
        begun = {e for e in starts if self._tells_within(Function(int(self.graph.target[e])))}
        yield from begun
        words = {e: word for e in starts - begun if (word := self._word_told(e)) is not None}
        sites = {int(self.graph.site[e]) for e in starts}
        calls = [e for e in self._calls(function) if int(self.graph.site[e]) not in sites] if words else []
        waits = {int(self.graph.site[e]): word for e in calls if (word := self._waited(e)) is not None}
        for edge, word in words.items():
            asked = {site for site, other in waits.items() if other == word}
            told = {int(self.graph.site[e]) for e, other in words.items() if other == word}
            is_all = self._starts_of(word) <= len(told)
            if asked and is_all and self._is_waited(function, edge, goals, frozenset(asked), len(told)):
                yield edge

    def _tells_within(self, function: Function) -> bool:
        """A function has waited for the end of each thread that it has started when it returns."""
        function = self.flow.whole(function)
        if function not in self._within:
            self._within[function] = False  # of what calls itself
            starts = [e for e in self._calls(function) if self._starts(e)]
            is_near = bool(starts) and 0 <= int(self.to_wait[function]) <= _NEAR
            self._within[function] = is_near and set(starts) == self.before(function, starts, self._ends(function))
        return self._within[function]

    def _ends(self, function: Function) -> set[int]:
        instructions = self.flow.body(function).instructions
        returns = {i.address for i in instructions for o in i.operations if isinstance(o, Return)}
        jumps = (e for e in self.flow.outgoing(function) if self.graph.kind[e] == EdgeKind.JUMP)
        return returns | {int(self.graph.site[e]) for e in jumps}

    def _calls(self, function: Function) -> list[int]:
        return [e for e in self.flow.outgoing(function) if int(self.graph.kind[e]) in CERTAIN]

    def _starts(self, edge: int) -> bool:
        return bool(self.to_start[self.graph.target[edge]] >= 0) and edge not in self.harmless

    # ---- who posts ---------------------------------------------------------------------------

    def _word_told(self, edge: int) -> Value | None:
        """The one semaphore that every thread which a call starts posts as the last thing that it does."""
        begins = self._begins(edge, _DEEPEST)
        if not begins:
            return None
        words = {self._word(posts) for posts in map(self._last_posts, begins)}
        word = words.pop() if len(words) == 1 else None
        return word if word is not None and word in self.signals.emptied and self._is_theirs(word) else None

    def _begins(self, edge: int, depth: int) -> set[Function]:
        """What the threads of a call begin in; nothing where that is not known of one."""
        graph, site = self.graph, int(self.graph.site[edge])
        rows = graph.rows_from(Function(int(graph.source[edge])))
        begins = {Function(to) for _, to, place, kind in rows if place == site and kind == EdgeKind.THREAD}
        target = Function(int(graph.target[edge]))
        if begins or not depth or self.to_start[target] == 0:
            return begins
        inner = [self._begins(e, depth - 1) for e in self._calls(target) if self._starts(e)]
        return set().union(*inner) if all(inner) else set()

    def _word(self, posts: frozenset[int]) -> Value | None:
        words = frozenset[Value]().union(*(self.signals.cells(e) for e in posts))
        return next(iter(words)) if len(words) == 1 and all(self.signals.cells(e) for e in posts) else None

    def _last_posts(self, function: Function, depth: int = _NEAR) -> frozenset[int]:
        """The calls by which a function, or what it calls last, posts a semaphore and then only ends."""
        known = self._last.get(function)
        if known is None:
            posts = {call.edge for call in self._posts}
            found = set[int]()
            for edge in self._calls(self.flow.whole(function)):
                inner = {edge} if edge in posts else set[int]()
                if not inner and depth and self.graph.target[edge] in self._posting:
                    inner = set(self._last_posts(Function(int(self.graph.target[edge])), depth - 1))
                if inner and self._is_last(function, edge):
                    found |= inner
            known = self._last[function] = frozenset(found)
        return known

    def _is_last(self, function: Function, edge: int) -> bool:
        if self.graph.kind[edge] == EdgeKind.JUMP:
            return True
        return self._ends_after(self.flow.whole(function), int(self.graph.site[edge]))

    @cached_property
    def _posts(self) -> list[Call]:
        return [call for call in self.signals.wakes() if call.kind == _SEMAPHORE]

    @cached_property
    def _posting(self) -> frozenset[int]:
        return frozenset(int(self.graph.source[call.edge]) for call in self._posts)

    @cached_property
    def _threads(self) -> Mapping[Function, set[tuple[int, int]]]:
        """What threads begin in, and the places where one is started."""
        graph, found = self.graph, dict[Function, set[tuple[int, int]]]()
        for edge in np.flatnonzero(graph.kind == EdgeKind.THREAD).tolist():
            place = int(graph.source[edge]), int(graph.site[edge])
            found.setdefault(Function(int(graph.target[edge])), set()).add(place)
        return found

    def _is_theirs(self, word: Value) -> bool:
        """Only ends of threads post it, as far as every post of the objects that know it tells."""
        ends = frozenset[int]().union(*map(self._last_posts, self._threads))
        return all(call.edge in ends for call in self._posts if word in call.cells or not call.cells)

    def _starts_of(self, word: Value) -> int:
        """The places where threads are started that post it."""
        begins = (begin for begin in self._threads if self._word(self._last_posts(begin)) == word)
        return len(set[tuple[int, int]]().union(*(self._threads[begin] for begin in begins)))

    # ---- who waits ---------------------------------------------------------------------------

    def _waited(self, edge: int, depth: int = _NEAR) -> Value | None:
        """The semaphore for which a call surely waits."""
        target = self.flow.whole(Function(int(self.graph.target[edge])))
        if self.to_wait[target] == 0:
            cells = self.signals.cells(edge)
            return next(iter(cells)) if len(cells) == 1 else None
        if not depth or not 0 <= int(self.to_wait[target]) <= depth:
            return None
        waits = {int(self.graph.site[e]): w for e in self._calls(target) if (w := self._waited(e, depth - 1))}
        words = set(waits.values())
        run = self.flow.explored(target)
        ahead = Ahead(self.flow.body(target), self.flow.program.rva_of(target), run)
        is_sure = len(words) == 1 and run.complete and not ahead.comes_to(self._ends(target) - {*waits}, waits)
        return words.pop() if is_sure else None

    def _is_waited(self, function: Function, edge: int, goals: frozenset[int], waits: frozenset[int], n: int) -> bool:
        """Every way from a start, one of so many, to a goal comes to as many waits, which no signal interrupts."""
        body, site = self.flow.body(function), int(self.graph.site[edge])
        position = body.position(site)
        if position is None:
            return False
        start = body.instructions[position].end
        ahead = Ahead(body, start, self._explored(function, start, waits | {site}))
        met = ahead.between(waits, goals, site)
        if len(met) < n or not ahead.run.complete:
            return False
        if ahead.comes_to({site}, met) and not all(ahead.run.leads(wait, wait) for wait in met):
            return False  # a loop starts several, and not as many are waited for
        return not ahead.comes_to(goals, ahead.with_loops(met, {site, *goals}))

    def _explored(self, function: Function, start: int, succeeding: frozenset[int]) -> Exploration:
        """What runs from there on, where these calls succeed: who waits again after a signal waits for one thread."""
        effects = self.flow.effects(function)

        def effect(site: int) -> CallEffect:
            return effects(site)._replace(result=0) if site in succeeding else effects(site)

        known = {self.flow.convention.result: 0}
        return explore(self.flow.body(function), self.flow.machine, start, known=known, effects=effect)
