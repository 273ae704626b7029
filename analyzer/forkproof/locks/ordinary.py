"""How ordinary it is that a lock is taken: on every call, or only when something rare is the case.

Owns: the two questions that rank a lock: must every call take it, and what must hold where it is taken.
Takes: `Summaries`. Gives: `Occasion`.
Must never: claim that a way is not taken: a condition that no code of the object sets may be set by a debugger.
Wrong where: the rare condition is one of data: it then counts as ordinary state, unless the code asks for it a second
      time under the lock (a tree that has no node yet).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CALLS, Reach
from forkproof.code.operations import Call, Const, Memory, Set
from forkproof.locks.newcomers import Newcomers
from forkproof.locks.runs import Turn, zero_words
from forkproof.locks.summary import Step, Summaries, Taken
from forkproof.locks.switches import Switches
from forkproof.locks.values import ZERO, Content, Element, Named, Object, Value, Word, root
from forkproof.program import Function

_DEEPEST: Final = 12
_REPORTING: Final = frozenset({"write", "writev", "abort", "fprintf", "vfprintf", "perror", "syslog"})
"""What a function of an allocator calls that reports a problem."""
_MAPPING: Final = frozenset({"mmap", "mmap64", "sbrk", "__sbrk"})
_ERRNO: Final = frozenset({"__errno_location", "___errno_location"})
_ERRNO_REACH: Final = 8
"""Instructions after one of these within which what it gives is stored to."""
_DYING: Final = frozenset({"abort"})
"""What a function of any library calls that does."""


class Rank(IntEnum):
    """How often a lock is taken, most often first."""

    ALWAYS = 0
    """Each call of an allocation function takes it, for some arguments."""
    USUAL = 1
    """It depends on the state of the heap or the thread."""
    RARE = 2
    """Only out of memory, once at start, behind a switch that is off, while something is reported."""


def _looks_at(turn: Turn, locks: set[Value]) -> bool:
    """A branch on the lock's own word: whoever waits until it is free takes it on each call."""
    words = (v.base for v in (turn.value, turn.other) if v.offset == 0)
    return any(Value(w.base, w.offset) in locks for w in words if isinstance(w, Content | Word))


def _leads_to(turn: Turn, lock: Value) -> bool:
    """A branch on the pointer that leads to the lock, which is not null there."""
    base = lock.base
    while isinstance(base, Content | Element):
        if turn.value == Value(base, 0) and turn.other == ZERO and turn.equal is False:
            return True
        base = base.base
    return False


@dataclass(frozen=True, slots=True)
class Occasion:
    """When a lock is taken."""

    rank: Rank
    why: str


class Occasions:
    """Answers for the locks of one allocator, or of what has no entries of its own.

    An allocator writes to report a problem. Where instead all that may run is given (`running`), the locks are those of
    a program and its libraries: a logger writes whenever it works, under its lock; a lock may lie behind a pointer that
    is null at start, and is set for whoever knows the lock; what the program computes may turn a switch on.
    """

    def __init__(
        self, summaries: Summaries, entries: Iterable[Function], running: npt.NDArray[np.bool_] | None = None
    ) -> None:
        self.summaries = summaries
        self.reporting = _REPORTING if running is None else _DYING
        self.follows_pointers = running is not None
        self.entries, self._running = tuple(entries), running
        self._steps: dict[Step, str] = {}
        self._easy: dict[tuple[Step, ...], tuple[Step, ...]] = {}
        self._reporters: dict[Step, bool] = {}
        self._named: dict[frozenset[str], frozenset[Function]] = {}
        self._acquiring: dict[Function, dict[Value, list[tuple[int, Function | None, Value]]]] = {}
        self._sure: dict[tuple[Function, Value], bool] = {}
        self._switches = Switches(summaries, lambda: self._reach, believes=running is None)
        self._newcomers = Newcomers(summaries, lambda: self._reach)

    def of(self, taken: Taken) -> Occasion:
        """When the lock at an address, as the entries see it, is taken."""
        if any(self.is_sure(entry, taken.address) for entry in self.entries):
            return Occasion(Rank.ALWAYS, "each call takes it")
        reason = self.rare_lock(taken.path, taken.address)
        return Occasion(Rank.RARE, reason) if reason else Occasion(Rank.USUAL, "")

    @cached_property
    def _reach(self) -> Reach:
        if self._running is not None:
            return np.where(self._running, 0, -1).astype(np.int32)
        return self.summaries.graph.distances(self.entries)

    def is_sure(self, function: Function, address: Value, depth: int = 0) -> bool:
        """Every call of the function takes the lock, for some arguments."""
        key = function, address
        if key not in self._sure:
            self._sure[key] = False  # in a circle of calls: not for sure
            self._sure[key] = depth < _DEEPEST and self._decide(function, address, depth)
        return self._sure[key]

    def _decide(self, function: Function, address: Value, depth: int) -> bool:
        summaries = self.summaries
        if address not in summaries.of(function).addresses:
            return False
        goals = {
            block
            for block, callee, taken in self._acquirers(function).get(address, ())
            if callee is None or self.is_sure(callee, taken, depth + 1)
        }
        return bool(goals) and summaries.run(function).blocks.surely_reaches(goals)

    def _acquirers(self, function: Function) -> dict[Value, list[tuple[int, Function | None, Value]]]:
        """Where a function takes each lock: the block, and who is called there for it, and what that calls the lock."""
        found = self._acquiring.get(function)
        if found is None:
            summaries, found = self.summaries, {}
            run = summaries.run(function)
            for acquire in run.acquires:
                found.setdefault(acquire.address, []).append((run.block_of(acquire.site), None, acquire.address))
            for call in run.calls:
                callee, block = Function(call.target), run.block_of(call.site)
                summary = summaries.of(callee)
                for taken in summary.taken:
                    passed = summaries.replaced(callee, call.arguments, taken.address)
                    found.setdefault(passed, []).append((block, callee, taken.address))
            self._acquiring[function] = found
        return found

    def _eased(self, path: tuple[Step, ...], address: Value) -> tuple[Step, ...]:
        """A way to a lock with each step at the place of its function that is not rare and has the fewest conditions:
        one rare way among others, such as that of a variable that is set up already, says nothing."""
        if not isinstance(root(address.base), Object):
            return path
        known = self._easy.get(path)
        if known is None:
            steps = zip(path, (*path[1:], None), strict=True)
            known = self._easy[path] = tuple(self._easiest(step, follower, address) for step, follower in steps)
        return known

    def _easiest(self, step: Step, after: Step | None, address: Value) -> Step:
        summaries, run = self.summaries, self.summaries.run(step.function)
        if after is None:
            sites = {a.site for a in run.acquires if a.address == address and a.blocking}
        else:
            callee = after.function
            takes = [t.address for t in summaries.of(callee).taken]
            sites = {
                call.site
                for call in run.calls
                if call.target == callee
                and any(address in (t, summaries.replaced(callee, call.arguments, t)) for t in takes)
            }
        # The way's own place comes first among equals.
        places = [step.site, *sorted(sites - {step.site})]
        places.sort(key=lambda site: len(run.blocks.requires(run.block_of(site))))
        steps = [Step(step.function, site) for site in places]
        return next((each for each in steps if not self.rare_step(each)), steps[0])

    def weight(self, taken: Taken) -> int:
        """On how many conditions, other than of arguments, the way to a lock depends."""
        total = 0
        for step in self._eased(taken.path, taken.address):
            run = self.summaries.run(step.function)
            total += len(run.blocks.requires(run.block_of(step.site)))
        return total

    def rare_lock(self, path: tuple[Step, ...], address: Value) -> str:
        """The same for the lock at an address, which the functions of the way may take elsewhere as well."""
        return self.rare(self._eased(path, address))

    def rare(self, path: tuple[Step, ...]) -> str:
        """What must be the case on a way to an acquire site, if it is something rare."""
        for step in path:
            if reason := self.rare_step(step):
                return reason
        if len(path) > 1 and self._asks_in_callee(*path[-2:]):
            return "only where something is first set up"
        return "" if self.reporter(path) is None else "only while a problem is reported"

    def reporter(self, path: tuple[Step, ...]) -> Function | None:
        """The first function on a way that reports a problem; the one that the way begins in counts if it is all."""
        return next((step.function for step in path[1:] or path if self._reports(step)), None)

    def rare_step(self, step: Step) -> str:
        """What must be the case for a function to get to an instruction, if it is something rare."""
        if step not in self._steps:
            run = self.summaries.run(step.function)
            locks = {a.address for a in run.acquires if a.site == step.site}
            turns = [t for t in run.blocks.requires(run.block_of(step.site)) if not _looks_at(t, locks)]
            if self.follows_pointers:
                reached = locks.union(self._passed_locks(step))
                turns = [t for t in turns if not any(_leads_to(t, lock) for lock in reached)]
            reason = next((r for turn in turns if (r := self._reason(step, turn))), "")
            if not reason and self._is_once(step):
                reason = "only once"
            is_set = any(self._may_set_up(step, word) for word in zero_words(turns))
            if not reason and is_set and self._is_kept(step) and self._asks_again(step, turns):
                reason = "only where something is first set up"
            if not reason and self._is_out_of_memory(step):
                reason = "only when an allocation has failed"
            if not reason and self._newcomers.is_only_for(step):
                reason = "only in a thread that is new to it"
            self._steps[step] = reason
        return self._steps[step]

    def required(self, step: Step) -> tuple[Turn, ...]:
        """The branches that every way of a function to an instruction takes."""
        run = self.summaries.run(step.function)
        return tuple(run.blocks.requires(run.block_of(step.site)))

    def _may_set_up(self, step: Step, word: Value) -> bool:
        """A function may store to a word that it has looked at; what it does not is a switch."""
        base = word.base
        if not self.follows_pointers or not isinstance(base, Content | Word) or not isinstance(base.base, Object):
            return True
        return self._switches.sets_up(step.function, Value(base.base, base.offset))

    def _asks_in_callee(self, step: Step, last: Step) -> bool:
        """The function that takes the lock looks, with the lock, at a word that had to be 0 for it to be called."""
        run, callee = self.summaries.run(step.function), self.summaries.run(last.function)
        words = zero_words(run.blocks.requires(run.block_of(step.site)))
        if not words:
            return False
        asked = callee.blocks.asked_beyond(callee.block_of(last.site))
        passed = [call.arguments for call in run.calls if (call.site, call.target) == (step.site, last.function)]
        replaced = self.summaries.replaced
        return any(replaced(last.function, arguments, word) in words for arguments in passed for word in asked)

    def _is_kept(self, step: Step) -> bool:
        """The function goes on with a lock that the step takes: what it asks then, it asks under the lock."""
        summaries = self.summaries
        run = summaries.run(step.function)
        called = (Function(call.target) for call in run.calls if call.site == step.site)
        return any(a.site == step.site for a in run.acquires) or any(
            e.held for callee in called for e in summaries.of(callee).exits
        )

    def _asks_again(self, step: Step, turns: Iterable[Turn]) -> bool:
        blocks = self.summaries.run(step.function).blocks
        block = self.summaries.run(step.function).block_of(step.site)
        return blocks.asks_again(block, turns) and blocks.asks_again(block, turns, self._letting_go(step))

    def _letting_go(self, step: Step) -> set[int]:
        """The blocks of a function at the end of which it has let a lock go that a step takes."""
        summaries, flow, function = self.summaries, self.summaries.flow, step.function
        run, calls = summaries.run(function), summaries.run(function).calls
        taken = {*self._passed_locks(step), *(a.address for a in run.acquires if a.site == step.site)}
        sites = {step.site: True}
        for call in calls:
            callee = Function(call.target)
            released = {summaries.replaced(callee, call.arguments, r) for r in summaries.of(callee).releases}
            if not released.isdisjoint(taken):
                sites[call.site] = False
        rows = [(site, summaries.library.get(Function(t))) for _, t, site, _ in flow.outgoing_rows(function)]
        passed = {site: lock for site, lock in rows if lock is not None and lock.op in ("acquire", "release")}
        if step.site in passed:
            states = flow.states(function, passed, fields=True)
            values = {s: state.register(flow.convention.arguments[passed[s].argument]) for s, state in states.items()}
            own = values.get(step.site)
            sites |= {s: passed[s].op == "acquire" for s, value in values.items() if value is not None and value == own}
        last = {run.block_of(site): is_taken for site, is_taken in sorted(sites.items())}
        return {block for block, is_taken in last.items() if not is_taken}

    def _passed_locks(self, step: Step) -> Iterator[Value]:
        """The locks that a function takes by a call there, in its own terms."""
        summaries = self.summaries
        for call in summaries.run(step.function).calls:
            if call.site == step.site:
                callee = Function(call.target)
                for taken in summaries.of(callee).entering:
                    yield summaries.replaced(callee, call.arguments, taken.address)

    def _reason(self, step: Step, turn: Turn) -> str:
        value, other = (turn.value, turn.other) if turn.other.base is None else (turn.other, turn.value)
        if turn.equal is None:
            return self._switch(step, value, other, equal=True, bits=1) if turn.tells else ""
        if other.base is not None:
            return "only for one value in particular" if turn.equal and self._is_particular(step, turn) else ""
        if self._is_failed_allocation(step, value, other, equal=turn.equal):
            return "only when an allocation has failed"
        return self._switch(step, value, other, equal=turn.equal, bits=turn.bits)

    def _is_failed_allocation(self, step: Step, value: Value, other: Value, *, equal: bool) -> bool:
        """A call that allocates, takes a lock each time, or maps memory, has returned 0 or -1.

        One that takes none each time has looked for something, and what follows is what it did not find.
        """
        if not equal or other.offset not in (0, -1):
            return False
        meant = self.summaries.run(step.function).meant(value)
        return other not in meant and any(self._is_allocated(step.function, each) for each in meant)

    def _is_allocated(self, function: Function, value: Value) -> bool:
        """What a call has returned that allocates."""
        base, flow = value.base, self.summaries.flow
        if not isinstance(base, Named) or value.offset != 0 or base.register != flow.convention.result:
            return False
        targets = [Function(int(flow.graph.target[e])) for e in flow.edges_at(function, base.site)]
        return any(
            self._allocates(t) or any(self.is_sure(t, taken.address) for taken in self.summaries.of(t).taken)
            for t in targets
        )

    def _allocates(self, function: Function) -> bool:
        program = self.summaries.program
        names = program.names[program.object_of(function)].aliases(program.rva_of(function))
        roles = self.summaries.flow.signatures.malloc_family
        return not _MAPPING.isdisjoint(names) or any(roles.get(n) in ("allocate", "resize") for n in names)

    def _switch(self, step: Step, value: Value, other: Value, *, equal: bool, bits: int) -> str:
        """A word of the object's own data must be what it rarely is."""
        base = value.base
        if not isinstance(base, Content | Word) or not isinstance(base.base, Object) or value.offset != 0:
            return ""
        word = Value(base.base, base.offset)
        return self._switches.why_rare(step.function, word, other.offset, equal=equal, bits=bits)

    def _is_particular(self, step: Step, turn: Turn) -> bool:
        """A number that the code has computed equals what a variable holds: rarely so by chance."""
        for one, two in ((turn.value, turn.other), (turn.other, turn.value)):
            is_variable = isinstance(two.base, Content | Word) and isinstance(two.base.base, Object)
            if is_variable and isinstance(one.base, Named) and not self._is_result(step, one.base):
                return True
        return False

    def _is_result(self, step: Step, name: Named) -> bool:
        """The value is what a call returned, or was stored by one: not computed here."""
        body = self.summaries.run(step.function).body
        position = body.position(name.site)
        if position is None:
            return True
        return any(isinstance(operation, Call) for operation in body.instructions[position].operations)

    def _reports(self, step: Step) -> bool:
        """A function of the allocator that writes somewhere, or gives up, on its way through a step.

        What it does elsewhere is not asked: a debugging allocator writes a trace if that is turned on. Other libraries
        write for a living.
        """
        summaries, function = self.summaries, step.function
        if summaries.program.object_of(function) not in summaries.objects:
            return False
        known = self._reporters.get(step)
        if known is None:
            sites = self._sites_of(function, self.reporting)
            run = summaries.run(function) if sites else None
            known = run is not None and run.blocks.passes(run.block_of(step.site), {run.block_of(s) for s in sites})
            self._reporters[step] = known
        return known

    def _sites_of(self, function: Function, names: frozenset[str]) -> list[int]:
        """Where a function calls one of these."""
        called = self._named.get(names)
        if called is None:
            called = self._named[names] = frozenset(self.summaries.program.called(sorted(names)))
        return [
            site
            for _, target, site, kind in self.summaries.flow.outgoing_rows(function)
            if target in called and kind in CALLS
        ]

    def _is_out_of_memory(self, step: Step) -> bool:
        """The function says so on its way through a step: it sets errno to ENOMEM."""
        run = self.summaries.run(step.function)
        blocks = set()
        for site in self._sites_of(step.function, _ERRNO):
            position = run.body.position(site) or 0
            after = run.body.instructions[position + 1 : position + _ERRNO_REACH]
            sets = [o for i in after for o in i.operations if isinstance(o, Set)]
            holders = {o.destination for o in sets if o.source == Const(errno.ENOMEM)} | {Const(errno.ENOMEM)}
            if any(isinstance(o.destination, Memory) and {o.destination, o.source} & holders for o in sets):
                blocks.add(run.block_of(site))
        return bool(blocks) and run.blocks.passes(run.block_of(step.site), blocks)

    def _is_once(self, step: Step) -> bool:
        """The step is pthread_once, or another function that calls what it is given once."""
        flow, library = self.summaries.flow, self.summaries.library
        targets = [int(flow.graph.target[e]) for e in flow.edges_at(step.function, step.site)]
        return any(t in library and library[t].kind == "once" for t in targets)
