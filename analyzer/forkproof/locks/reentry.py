"""Calls made under a lock that come back for the same lock, in the same thread.

Owns: the search for such calls, through the functions of the allocator with the lock held on entry, and through other
      libraries along the call graph, back to whatever function of the allocator they are bound to.
Takes: `Summaries`, and locks that have one address. Gives: `Reentry`s.
Must never: report a callee that lets the lock go before it takes it again, or a way that a flag of the thread closes,
      which was set on the way.
Wrong where: a flag that is no variable of the thread keeps the second acquisition from being reached (then it is found
      and cannot happen); where another library calls through a pointer (then it is missed); where what lies between
      in another library is a way that no input takes.

A call through a pointer in memory leads to whatever the pointer may hold (`forkproof.locks.chosen`): a table of
implementations, of which the run chooses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CERTAIN, CallGraph, EdgeKind, Reach, sorted_graph
from forkproof.code.operations import Call, Memory, Operation
from forkproof.locks.chosen import Chosen
from forkproof.locks.runs import NOTHING, Effect, Exit, Held, Run, in_order
from forkproof.locks.summary import Alone, FunctionCalls, Step, Summaries
from forkproof.locks.values import Element, Object, Value
from forkproof.program import Function

_ROUNDS: Final = 3
"""How often a call through a pointer may lead to functions that call through pointers themselves."""
_TABLE: Final = int(EdgeKind.TABLE)
_KINDS: Final = CERTAIN | {EdgeKind.TABLE}
_ANY: Final = Value(Object(-1), 0)
"""Stands for a lock with which a function has nothing to do."""
_Way = tuple[Step, ...]
_Node = tuple[Function, tuple[Value, ...]]
"""A function, and what is held when it is entered; of another library, when it was left for."""
_Cost = tuple[int, int, int, int]
_Came = tuple[_Node, Step, bool]
"""What a node was reached from, by which call, and whether that is one through a pointer."""


@dataclass(frozen=True, slots=True)
class Reentry:
    """A way from a function that holds a lock back to an acquisition of it."""

    address: Value
    path: tuple[Step, ...]
    """From the call under the lock to the acquire site."""
    chosen: tuple[Step, ...]
    """Calls on it through a pointer of which only the run knows what it holds."""


class Reentries:
    """The search; remembers what it knows of each function."""

    def __init__(self, summaries: Summaries, is_rare: Callable[[Step], bool]) -> None:
        """`is_rare` tells whether a call is made only when something is the case that seldom is."""
        self.summaries, self.flow, self.is_rare = summaries, summaries.flow, is_rare
        self.chosen = Chosen(summaries)
        self.graph = self.flow.graph
        self.back: Reach = np.zeros(0, np.int32)
        self.leads_back: npt.NDArray[np.bool_] = np.zeros(0, bool)
        """The functions that lead back to any of the locks."""
        self.lock = _ANY
        self._shared: dict[tuple[Function, Held], Run] = {}
        self._reached: npt.NDArray[np.bool_] = np.zeros(0, bool)
        """The functions that run under any of the locks."""
        self._flags: dict[Function, Effect | None] = {}
        self._deciding: set[Function] = set()
        self._circles = 0
        """How often flags were asked for that were being decided."""

    def of(self, addresses: Iterable[Value], among: Iterable[Function]) -> list[Reentry]:
        """The best re-entry for each lock, begun in one of these functions: an ordinary one before a rare one, calls
        that are certain before those through pointers, and then the shortest."""
        functions = sorted(set(among) & self.summaries.runs.keys())
        locks = [a for a in addresses if isinstance(a.base, Object) and not isinstance(a.base, Element)]
        holders = {lock: [f for f in functions if self._may_hold(f, lock)] for lock in locks}
        beginning = {f for found in holders.values() for f in found}
        self.graph = self._graph(beginning)
        self._reached = self.graph.distances(beginning, _KINDS, blocked=self.flow.dying) >= 0
        back = [
            self.graph.distances(self.summaries.places(lock), _KINDS, backward=True, blocked=~self._reached)
            for lock in locks
        ]
        self.leads_back = np.logical_or.reduce([reach >= 0 for reach in back]) if back else self.leads_back
        found = []
        for self.lock, self.back in zip(locks, back, strict=True):
            way = self._search([f for f in holders[self.lock] if self.back[f] >= 0])
            if way is not None:
                found.append(way)
        return found

    @cached_property
    def freeing(self) -> frozenset[Function]:
        """Functions of the closure that free."""
        roles = self.flow.signatures.malloc_family
        return frozenset(self.summaries.program.called(sorted(n for n, role in roles.items() if role == "release")))

    def is_of_libc(self, step: Step, after: Function) -> bool:
        """Libc itself calls back into the allocator: most of its functions allocate seldom, or only once."""
        program = self.summaries.program
        return program.object_of(step.function) in self.summaries.libc_objects and self._is_followed(after)

    def _may_hold(self, function: Function, lock: Value) -> bool:
        """The function takes the lock itself, or calls something while it holds it."""
        run = self.summaries.runs[function]
        return any(a.address == lock for a in run.acquires) or any(lock in call.held for call in run.calls)

    # ---- calls through pointers ------------------------------------------------------------

    def _graph(self, holders: set[Function]) -> CallGraph:
        """The call graph, with the calls through pointers of functions that run under a lock."""
        program, graph = self.summaries.program, self.flow.graph
        unknown = np.concatenate([code.unknown_calls for code in program.codes]) > 0
        unknown[graph.source[graph.kind == EdgeKind.GOT]] = True  # the pointer may hold more than the file says
        for obj in range(len(program.codes)):
            if obj not in self.summaries.objects:
                unknown[int(program.base[obj]) : int(program.base[obj + 1])] = False
        seen: set[Function] = set()
        for _ in range(_ROUNDS):
            reach = graph.distances(holders, _KINDS, blocked=self.flow.dying)
            new = {Function(f) for f in np.flatnonzero((reach >= 0) & unknown).tolist()} - seen
            seen |= new
            edges = [edge for f in sorted(new) for edge in self._edges(self.flow.whole(f))]
            if not edges:
                break
            source, target, site = (np.array(column, np.int64) for column in zip(*edges, strict=True))
            kind = np.full(len(edges), EdgeKind.TABLE, np.uint8)
            before = graph.source.astype(np.int64), graph.target.astype(np.int64), graph.site, graph.kind
            graph = sorted_graph(program, [before, (source, target, site, kind)], graph.imports)
        return graph

    def _edges(self, function: Function) -> Iterator[tuple[int, int, int]]:
        calls = _Finding(self.summaries, function, self.chosen)
        run = self.summaries.interpreted_run(function, NOTHING, NOTHING, calls=calls)
        return ((function, call.target, call.site) for call in run.calls if call.is_chosen)

    # ---- the search ------------------------------------------------------------------------

    def _search(self, holders: Iterable[Function]) -> Reentry | None:
        """Dijkstra over functions and what is held on entry.

        A way costs, in this order, calls that are seldom made, calls through pointers, ways back through a function
        that frees (which seldom takes a lock that a function that allocates would not), and its length.

        1. begin with the calls that a holder makes under the lock;
        2. follow a function of the allocator with what is held; it ends where the lock is waited for again;
        3. follow one of another library along its edges.

        Whether a call is seldom made is asked when its turn has come: of most it need not be known.
        """
        came: dict[_Node, _Came] = {}
        queue: list[tuple[_Cost, int, _Node, _Came | None, bool]] = []
        done: set[_Node] = set()
        for holder in holders:
            heappush(queue, ((0, 0, 0, 0), len(queue), (holder, ()), None, False))
        order = len(queue)
        while queue:
            cost, place, node, before, is_open = heappop(queue)
            if node in done:
                continue
            if is_open and before is not None and self.is_rare(before[1]):
                heappush(queue, ((cost[0] + 1, *cost[1:]), place, node, before, False))
                continue
            done.add(node)
            if before is not None:
                came[node] = before
            end, ways = self._follow(node, is_holder=before is None)
            if end is not None:
                way = _back(came, node)
                return Reentry(self.lock, (*(s for s, _ in way), *end), tuple(s for s, is_chosen in way if is_chosen))
            for onward, after, is_chosen in ways:
                is_inside = self._is_followed(onward.function)
                more = (
                    not is_inside and self.is_of_libc(onward, after[0]),
                    is_chosen,
                    not is_inside and after[0] in self.freeing,
                    1,
                )
                order += 1
                total = cost[0] + more[0], cost[1] + more[1], cost[2] + more[2], cost[3] + 1
                heappush(queue, (total, order, after, (node, onward, is_chosen), is_inside))
        return None

    def _is_followed(self, function: Function) -> bool:
        return self.summaries.program.object_of(function) in self.summaries.objects

    def _is_followable(self, function: Function) -> bool:
        """It does not end the program, nor is it a lock function, which does no more than its signature says."""
        return function not in self.flow.dying and function not in self.summaries.library

    def _follow(self, node: _Node, *, is_holder: bool) -> tuple[_Way | None, list[tuple[Step, _Node, bool]]]:
        """Where a function waits for the lock, or else the calls that lead on."""
        function, held = node[0], frozenset(node[1])
        if not self._is_followed(function):
            rows = self.graph.rows_from(function)
            return None, [
                (Step(function, site), (Function(target), node[1]), kind == _TABLE)
                for _, target, site, kind in rows
                if kind in _KINDS and self.back[target] >= 0 and self._is_followable(Function(target))
            ]
        run = self._run(function, held)
        if run.again and not is_holder:
            return (Step(function, run.again[0].site),), []
        ways = []
        for call in run.calls:
            callee = Function(call.target)
            held = frozenset(self.lock if h == _ANY else h for h in call.held)
            if self.lock not in held or not self.flow.returns(callee) or callee in self.summaries.library:
                continue
            if not is_holder and self._locks_what_it_is_given(callee, call.arguments):
                return (Step(function, call.site), *self._tail(callee)), []
            if self.back[callee] >= 0:
                ways.append((Step(function, call.site), (callee, tuple(sorted(held, key=repr))), call.is_chosen))
        return None, ways

    def _run(self, function: Function, held: Held) -> Run:
        """The function followed with what is held on entry. One that has nothing to do with the lock is followed once
        for all locks, with one that is none of the program's in their place."""
        if self.lock not in held:
            return self._watched(function, held, self.lock)
        others = held - {self.lock}
        shared = self._shared.get((function, others))
        if shared is None:
            shared = self._shared[function, others] = self._watched(function, others | {_ANY}, _ANY)
        return self._watched(function, held, self.lock) if self.lock in shared.touched else shared

    def _watched(self, function: Function, held: Held, lock: Value) -> Run:
        calls = _Following(self, function)  # not kept: each holds the search that would hold it
        return self.summaries.interpreted_run(function, held, frozenset([lock]), calls=calls, flagged=True)

    def _locks_what_it_is_given(self, callee: Function, arguments: tuple[Value, ...]) -> bool:
        summaries = self.summaries
        return any(
            t.blocking and summaries.replaced(callee, arguments, t.address) == self.lock
            for t in summaries.of(callee).entering
        )

    def _tail(self, callee: Function) -> _Way:
        taken = min((t for t in self.summaries.of(callee).taken if t.blocking), key=lambda t: len(t.path))
        return taken.path

    # ---- flags of the thread ---------------------------------------------------------------

    def flags_set(self, function: Function) -> Effect | None:
        """The flags of the thread that a call sets, by its result; None where it stores into none."""
        if function not in self._flags:
            self._flags[function] = None
            if self._cells and self._is_followed(function) and self._uses_thread(function):
                self._deciding.add(function)
                run = self._run_for_flags(function)
                self._deciding.discard(function)
                cells = self._cells & run.releases
                exits = sorted((Exit(e.held - {_ANY}, e.result) for e in run.exits), key=in_order)
                self._flags[function] = Effect(tuple(exits), cells) if cells else None
        elif function in self._deciding:
            self._circles += 1
        return self._flags[function]

    @cached_property
    def _cells(self) -> frozenset[Value]:
        """The words of the thread that get a constant somewhere under a lock: counters and pointers are no flags.

        Few allocators have any, and to follow what each call does to them costs as much as all the rest.
        """
        program, runs = self.summaries.program, self.summaries.runs
        found: set[Value] = set()
        for obj in sorted(self.summaries.objects):
            first, last = int(program.base[obj]), int(program.base[obj + 1])
            for number in (np.flatnonzero(self._reached[first:last]) + first).tolist():
                function = self.flow.whole(Function(number))
                if self._uses_thread(function):
                    run = runs.get(function) or self.summaries.interpreted_run(function, NOTHING)
                    found |= {cell for cell, values in run.own_stores.items() if any(v.base is None for v in values)}
        return frozenset(found)

    def _run_for_flags(self, function: Function) -> Run:
        """The function followed with a lock that is none of the program's, which serves all locks, as in `_run`.

        Not where it asked for what was not decided yet, in a circle of calls: that is one question's answer only.
        """
        known = self._shared.get((function, NOTHING))
        if known is None:
            before = self._circles
            known = self._watched(function, frozenset([_ANY]), _ANY)
            if self._circles == before:
                self._shared[function, NOTHING] = known
        return known

    def _uses_thread(self, function: Function) -> bool:
        """Its code refers to the thread's own storage."""
        if any(int(self.flow.graph.target[e]) in self.summaries.thread_cells for e in self.flow.outgoing(function)):
            return True
        operations = (o for i in self.flow.body(function).instructions for o in i.operations)
        return any(_is_of_thread(operation) for operation in operations)


def _is_of_thread(operation: Operation) -> bool:
    if isinstance(operation, Call):
        return False
    return any(isinstance(operand, Memory) and operand.thread for operand in operation)


def _back(came: dict[_Node, _Came], end: _Node) -> list[tuple[Step, bool]]:
    steps = []
    while end in came:
        end, step, is_chosen = came[end]
        steps.append((step, is_chosen))
    return steps[::-1]


class _Finding(Alone):
    """Calls through pointers, with all that they may lead to."""

    def __init__(self, summaries: Summaries, function: Function, chosen: Chosen) -> None:
        super().__init__(summaries, function)
        self._chosen = chosen

    def chosen(self, pointer: Value) -> tuple[int, ...]:
        return self._chosen.functions(pointer)

    def is_relevant(self, target: int) -> bool:
        del target
        return True


class _Following(FunctionCalls):
    """The calls of a function that is followed with a lock held: those that lead back to it matter."""

    def __init__(self, search: Reentries, function: Function) -> None:
        super().__init__(search.summaries, function)
        self.search = search

    def chosen(self, pointer: Value) -> tuple[int, ...]:
        return self.search.chosen.functions(pointer)

    def is_relevant(self, target: int) -> bool:
        return bool(self.search.leads_back[target]) or (
            super().is_relevant(target) and self.summaries.of(Function(target)).depends_on_caller
        )

    def effect(self, target: int, arguments: tuple[Value, ...]) -> Effect | None:
        locks, flags = super().effect(target, arguments), self.search.flags_set(Function(target))
        if locks is None or flags is None:
            return locks or flags
        always = frozenset[Value]().union(*(e.held for e in flags.exits))
        for exit_ in flags.exits:
            always &= exit_.held
        exits = tuple(Exit(e.held | always, e.result) for e in locks.exits)
        return locks._replace(exits=exits, releases=locks.releases | flags.releases)
