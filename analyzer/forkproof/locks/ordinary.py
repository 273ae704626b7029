"""How ordinary it is that a lock is taken: on every call, or only when something rare is the case.

Owns: the two questions that rank a lock: must every call take it, and what must hold where it is taken.
Takes: `Summaries`. Gives: `Occasion`.
Must never: claim that a way is not taken: a condition that no code of the object sets may be set by a debugger.
Wrong where: the rare condition is one of data (a tree that has no node yet): it then counts as ordinary state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final

from forkproof.callgraph import CALLS, Function
from forkproof.locks.interpret import Run, Turn
from forkproof.locks.summary import Step, Summaries, Taken
from forkproof.locks.values import Content, Named, Object, Value

_DEEPEST: Final = 12
_REPORTING: Final = frozenset({"write", "writev", "abort", "fprintf", "vfprintf", "perror", "syslog"})
"""What a function calls that reports a problem."""


class Rank(IntEnum):
    """How often a lock is taken, most often first."""

    ALWAYS = 0
    """Each call of an allocation function takes it, for some arguments."""
    USUAL = 1
    """It depends on the state of the heap or the thread."""
    RARE = 2
    """Only out of memory, once at start, behind a switch that is off, while something is reported."""


@dataclass(frozen=True, slots=True)
class Occasion:
    """When a lock is taken."""

    rank: Rank
    why: str


class Occasions:
    """Answers for the locks of one allocator."""

    def __init__(self, summaries: Summaries) -> None:
        self.summaries = summaries
        self._sure: dict[tuple[Function, Value], bool] = {}

    def of(self, entries: Iterable[Function], taken: Taken) -> Occasion:
        """When the lock at an address, as the entries see it, is taken."""
        if any(self.is_sure(entry, taken.address) for entry in entries):
            return Occasion(Rank.ALWAYS, "each call takes it")
        reason = self._rare(taken)
        return Occasion(Rank.RARE, reason) if reason else Occasion(Rank.USUAL, "")

    @cached_property
    def _stored(self) -> dict[Value, frozenset[int]]:
        """Constants that the functions followed so far store into words: allocation and start-up run through them."""
        found: dict[Value, frozenset[int]] = {}
        for run in self.summaries.runs.values():
            for address, constants in run.stores.items():
                found[address] = found.get(address, frozenset()) | constants
        return found

    def is_sure(self, function: Function, address: Value, depth: int = 0) -> bool:
        """Every call of the function takes the lock, for some arguments."""
        key = function, address
        if key not in self._sure:
            self._sure[key] = False  # in a circle of calls: not for sure
            self._sure[key] = depth < _DEEPEST and self._decide(function, address, depth)
        return self._sure[key]

    def _decide(self, function: Function, address: Value, depth: int) -> bool:
        summaries = self.summaries
        if not any(t.address == address for t in summaries.of(function).taken):
            return False
        run = summaries.run(function)
        goals = {run.block_of(a.site) for a in run.acquires if a.address == address}
        for call in run.calls:
            callee = Function(call.target)
            for taken in summaries.of(callee).taken:
                if summaries.replaced(callee, call.arguments, taken.address) == address:
                    if self.is_sure(callee, taken.address, depth + 1):
                        goals.add(run.block_of(call.site))
        return bool(goals) and run.blocks.surely_reaches(goals)

    def _rare(self, taken: Taken) -> str:
        """What must be the case on the way to the acquire site, if it is something rare."""
        for step in taken.path:
            run = self.summaries.run(step.function)
            for turn in run.blocks.requires(run.block_of(step.site)):
                if reason := self._reason(step, run, turn):
                    return reason
        leaf = taken.path[-1].function
        if self._reports(leaf) or any(self._reports(step.function) for step in taken.path[1:]):
            return "only while a problem is reported"
        return ""

    def _reason(self, step: Step, run: Run, turn: Turn) -> str:
        value, other = (turn.value, turn.other) if turn.other.base is None else (turn.other, turn.value)
        if other.base is not None or turn.equal is None:
            return ""
        if self._is_failed_allocation(step, value, other, equal=turn.equal):
            return "only when an allocation has failed"
        return self._switch(value, other, equal=turn.equal)

    def _is_failed_allocation(self, step: Step, value: Value, other: Value, *, equal: bool) -> bool:
        """A call that itself takes locks, or maps memory, has returned 0 or -1."""
        base = value.base
        if not equal or not isinstance(base, Named) or value.offset != 0 or other.offset not in (0, -1):
            return False
        flow = self.summaries.flow
        if base.register != flow.convention.result:
            return False
        targets = [Function(int(flow.graph.target[e])) for e in flow.edges_at(step.function, base.site)]
        return any(
            self.summaries.relevant[t] or flow.program.name_of(t) in ("mmap", "mmap64", "sbrk", "__sbrk") for t in targets
        )

    def _switch(self, value: Value, other: Value, *, equal: bool) -> str:
        """A word of the object's own data must differ from what the file holds, or is set once it was as in the file."""
        base = value.base
        if not isinstance(base, Content) or not isinstance(base.base, Object) or value.offset != 0:
            return ""
        image = self.summaries.program.image(base.base.index)
        if image.pointer_at(base.offset) is not None:
            return ""
        raw = image.read(base.offset, 4).tobytes()
        first = int.from_bytes(raw, "little", signed=True) if len(raw) == 4 else 0
        if (first == other.offset) is equal:
            return ""
        stored = self._stored.get(Value(base.base, base.offset), frozenset())
        if any((constant == other.offset) is equal for constant in stored):
            return ""  # code that allocation or start-up runs through turns it on
        return "only while a switch is on that is off at start"

    def _reports(self, function: Function) -> bool:
        graph, program = self.summaries.graph, self.summaries.program
        return any(
            graph.kind[e] in CALLS and program.name_of(Function(int(graph.target[e]))) in _REPORTING
            for e in self.summaries.flow.outgoing(function)
        )
