"""Futures that tell of the end of a thread: those of `std::async`.

Owns: which calls wait until a future has its result, and which threads give one as the last thing that they do.
Takes: `Flow`, the distance of functions to the start of a thread. Gives: sites; an answer for a start.
Must never: take a thread for ended because it has told something: others tell that they are ready, and go on.
Wrong where: what is waited for is the future of another thread; where a thread is not `std::async`'s, which the future
      joins as well, and has not ended yet when it has told (it frees what it was given).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Final

from forkproof.callgraph import CALLS, CERTAIN, EdgeKind, Reach
from forkproof.code.decode import Body
from forkproof.code.operations import Call, JumpUnknown, Operand
from forkproof.flow import Flow
from forkproof.functors import Part, functor_part, load_of
from forkproof.model import Answer
from forkproof.program import Function

_NEAR: Final = 1
"""Calls between a function and the wait, at most, where its callers may take it to be there for that."""
_DEEPEST: Final = 4
"""Calls between one that starts a thread and the start itself."""


class Futures:
    """Waits for futures, and the threads that give them their results."""

    def __init__(self, flow: Flow, to_start: Reach) -> None:
        self.flow, self.graph, self.to_start = flow, flow.graph, to_start
        self._tells: dict[int, Answer] = {}
        self._ends: dict[Function, bool] = {}

    # ---- waits -----------------------------------------------------------------------------

    @cached_property
    def _waits(self) -> Mapping[int, bool]:
        """The calls that wait, and whether they do so without an end."""
        flow, known = self.flow, self.flow.signatures.futures
        waiting = flow.program.called([name for name, function in known.items() if function.op == "wait"])
        return {
            edge: self._has_no_end(edge, known[name].bounded)
            for function, name in waiting.items()
            for edge in self.graph.edges_to(function)
            if int(self.graph.kind[edge]) in CALLS
        }

    def _has_no_end(self, edge: int, bounded: int | None) -> bool:
        if bounded is None:
            return True
        caller, register = Function(int(self.graph.source[edge])), self.flow.convention.arguments[bounded]
        return self.flow.constant_before(caller, int(self.graph.site[edge]), register) == 0

    @cached_property
    def to_wait(self) -> Reach:
        """Distance of every function to one that waits, for a time or without an end."""
        return self._distances(self._waits)

    @cached_property
    def _to_end(self) -> Reach:
        return self._distances([edge for edge, has_no_end in self._waits.items() if has_no_end])

    def _distances(self, edges: Iterable[int]) -> Reach:
        return self.graph.distances({int(self.graph.source[e]) for e in edges}, backward=True)

    def is_wait(self, edge: int) -> bool:
        """The call waits without an end, or calls what is there for that."""
        return self._waits.get(edge, False) or 0 <= int(self._to_end[self.graph.target[edge]]) <= _NEAR

    def is_look(self, edge: int) -> bool:
        """The call waits for a time, or calls what does."""
        is_near = edge in self._waits or 0 <= int(self.to_wait[self.graph.target[edge]]) <= _NEAR
        return is_near and not self.is_wait(edge)

    # ---- threads ---------------------------------------------------------------------------

    def tells(self, edge: int, depth: int = _DEEPEST) -> Answer:
        """Every thread that a call starts tells a future as the last thing that it does."""
        known = self._tells.get(edge)
        if known is None:
            self._tells[edge] = Answer.UNKNOWN  # of what calls itself
            known = self._tells[edge] = self._decide(edge, depth)
        return known

    def _decide(self, edge: int, depth: int) -> Answer:
        graph, site = self.graph, int(self.graph.site[edge])
        caller, target = Function(int(graph.source[edge])), Function(int(graph.target[edge]))
        rows = graph.rows_from(caller)
        begins = [Function(to) for _, to, place, kind in rows if place == site and kind == EdgeKind.THREAD]
        if any(self._ends_telling(function) for function in begins):
            return Answer.YES
        if target in self._starters:
            return Answer.NO if begins else Answer.UNKNOWN
        inner = [e for e in self.flow.outgoing(target) if int(graph.kind[e]) in CERTAIN and self._starts(e)]
        answers = {self.tells(e, depth - 1) for e in inner} if depth else set[Answer]()
        return answers.pop() if len(answers) == 1 else Answer.NO if Answer.NO in answers else Answer.UNKNOWN

    def _starts(self, edge: int) -> bool:
        return bool(self.to_start[self.graph.target[edge]] >= 0)

    @cached_property
    def _starters(self) -> frozenset[Function]:
        return frozenset(self.flow.program.called(self.flow.signatures.thread_starters))

    @cached_property
    def _telling(self) -> frozenset[Function]:
        known = self.flow.signatures.futures
        return frozenset(self.flow.program.called([name for name, function in known.items() if function.op == "tell"]))

    def _ends_telling(self, function: Function) -> bool:
        """What a thread begins in tells, and only cleans up then."""
        known = self._ends.get(function)
        if known is None:
            edges = [e for e in self.flow.outgoing(function) if Function(int(self.graph.target[e])) in self._telling]
            sites = {int(self.graph.site[e]) for e in edges}
            known = self._ends[function] = bool(sites) and all(self.ends_after(function, site) for site in sites)
        return known

    def ends_after(self, function: Function, site: int) -> bool:
        """Behind a call the function makes no other one, but that of what ends a `std::function`, and goes no round."""
        body = self.flow.body(function)
        position = body.position(site)
        if position is None:
            return False
        # From there on, since what is believed of memory from the entry on may say that control never comes there.
        run = self.flow.explore_from(function, body.instructions[position].end, {})
        if not run.complete or any(block in run.onward(block) for block in run.successors):
            return False
        return all(self._is_cleaning(function, body, body.index[address]) for address in run.visited)

    def _is_cleaning(self, function: Function, body: Body, position: int) -> bool:
        instruction = body.instructions[position]
        for o in instruction.operations:
            if isinstance(o, JumpUnknown):
                return False
            if isinstance(o, Call):
                edges = self.flow.edges_at(function, instruction.address)
                if edges and all(self.flow.ends_on(e) for e in edges):
                    return True
                return o.through is not None and self._is_manager(function, body, position, o.through)
        return True

    def _is_manager(self, function: Function, body: Body, position: int, through: Operand) -> bool:
        load = load_of(body, position, through)
        if load is None:
            return False
        site, loading = body.instructions[position].address, body.instructions[load.position].address
        states = self.flow.states(function, [site, loading])
        return functor_part(body, site, load, self.flow.machine, states) is Part.MANAGER
