"""Which functions of libc take a lock as a matter of course, and not only on a way that programs hardly ever go.

Owns: that judgement. Takes: `Flow`, a libc's `Catalogue`. Gives: functions, lock by lock.
Must never: depend on what was asked before.
Wrong where: a function's usual way is decided by what its caller passes, past its first checks.

A call of a function takes a lock as a matter of course when less than half of the function can run without taking it;
what is left are checks of arguments and ways out. Where the lock is taken in a callee, the callee must do so as a
matter of course too. Functions are judged after those that they call; in a circle, the first that the order meets is
judged without those that follow.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

from forkproof.callgraph import CERTAIN
from forkproof.code.decode import Instruction
from forkproof.code.explore import Exploration, explore
from forkproof.code.operations import Atomic, Memory, Return
from forkproof.locks.evidence import address_of
from forkproof.program import Function

if TYPE_CHECKING:
    from forkproof.flow import Flow
    from forkproof.libc_code import Address, Catalogue, LibcLock

_HELPER: Final = 64
"""Bytes of the largest out-of-line atomic operation."""
_RARE: Final = 0.5
"""A lock is taken as a matter of course when less than this part of a function can run without it."""
_CHECKS: Final = 1
"""Calls that a check of arguments may need."""
_LARGE: Final = 600
"""Instructions of a function beyond which it has more results than one kind of failure."""
_SIGN: Final = 1 << 31
_RECURSIVE: Final = 16
"""Bytes of glibc's lock that its owner may take again (sysdeps/nptl/stdio-lock.h): a word, a count, the owner."""
_WRAPPER: Final = 64
"""Instructions of a function that does little else than to check its arguments."""


class Usual:
    """The judgement on one libc; what locks share is kept."""

    def __init__(self, flow: Flow, catalogue: Catalogue) -> None:
        self.flow, self.catalogue = flow, catalogue
        self.graph, self.program = flow.graph, flow.program

    def judge(
        self, function: Function, lock: LibcLock, bit: int, known: dict[Function, bool], *, writing: bool
    ) -> bool:
        """Whether a call of a function takes a lock as a matter of course; `writing`: not only to read.

        `known` are earlier judgements on the same lock; it grows.
        """
        if lock.is_described or lock.address is None:
            return function in lock.takers and function not in self.flow.dying
        may = self.catalogue.may_take
        wanted: set[Function] = set()
        pending = [function]
        while pending:
            here = pending.pop()
            if here in self._order and may[here] & bit and here not in known and here not in wanted:
                wanted.add(here)
                pending += [t for t, _ in self._calls[here] if self._order.get(t, len(may)) < self._order[here]]
        for here in sorted(wanted, key=self._order.__getitem__):
            own = {
                s
                for s in self.catalogue.acquires[lock.address].get(here, ())
                if not (writing and self._only_reads(here, s))
            }
            sites = own | {
                site for target, site in self._calls[here] if known.get(target) and self._is_before(target, here)
            }
            known[here] = bool(sites) and self._is_main_way(here, sites, own, lock.address)
        return known.get(function, False)

    def _is_before(self, callee: Function, function: Function) -> bool:
        return self._order[callee] < self._order[function]

    def _only_reads(self, function: Function, site: int) -> bool:
        return all(method.shared for method in self.catalogue.methods_of(self.flow, function, [site]))

    @cached_property
    def _calls(self) -> Mapping[Function, tuple[tuple[Function, int], ...]]:
        """What each function calls that may lock, and where."""
        may, graph = self.catalogue.may_take, self.graph
        return {
            function: tuple(
                (Function(int(graph.target[e])), int(graph.site[e]))
                for e in self.flow.outgoing(function)
                if int(graph.kind[e]) in CERTAIN and Function(int(graph.target[e])) in may
            )
            for function in sorted(may)
            if function not in self.flow.dying
        }

    @cached_property
    def _order(self) -> Mapping[Function, int]:
        """A number for each function, larger than those of its callees but for circles."""
        order: list[Function] = []
        seen: set[Function] = set()
        for start in self._calls:
            if start in seen:
                continue
            seen.add(start)
            way = [(start, iter(self._calls[start]))]
            while way:
                function, rest = way[-1]
                callee = next((t for t, _ in rest if t not in seen and t in self._calls), None)
                if callee is None:
                    order.append(function)
                    way.pop()
                else:
                    seen.add(callee)
                    way.append((callee, iter(self._calls[callee])))
        return {function: number for number, function in enumerate(order)}

    def _is_main_way(self, function: Function, sites: set[int], own: set[int], lock: Address) -> bool:
        """Less than half of a function runs when it returns without passing any of these sites.

        What is left must be decided early: checks of arguments come before the work, options after it. In a
        small function, what runs before the decision does not count: a wrapper that checks its arguments.
        """
        run = self.flow.explored(function)
        blocks = _Blocks(run)
        slow = {blocks.of(site) for site in own if site in run.visited}
        cut = {blocks.of(site) for site in sites if site in run.visited}
        cut |= {before for block in slow for before in self._fast_sides(function, run, block)}
        cut |= self._having(function, run, cut, lock) if own else set()
        if not cut:
            return False
        start = blocks.of(self.program.rva_of(function))
        ways = blocks.reached([start], cut) & blocks.reached(self._exits(function, run), cut, backward=True)
        if not ways:
            return True
        before = blocks.dominators(start, cut)
        calls = sum(not t.is_jump and blocks.of(t.site) in before - cut for t in run.transfers)
        rest = ways - before if len(run.visited) <= _WRAPPER else ways
        is_most = calls <= _CHECKS and sum(blocks.size(b) for b in rest) < _RARE * len(run.visited)
        return is_most or self._only_fails(function, run, cut)

    def _only_fails(self, function: Function, run: Exploration, cut: set[int]) -> bool:
        """Whoever gets no lock gets nothing else either: those ways return NULL, or a negative number.

        The function must return something else on its other ways: of one that returns 0 only, it is a success.
        """
        body = self.flow.body(function)
        if len(run.visited) > _LARGE:
            return False
        within = frozenset(p for p in body.leaders if body.instructions[p].address not in cut)
        start = self.program.rva_of(function)
        effects = self.flow.effects(function)
        without = explore(body, self.flow.machine, start, effects=effects, within=within).results
        failures = [v for v in without if v is not None and v.base is None and _is_failure(v.offset)]
        return 0 < len(failures) == len(without) and not set(run.results) <= set(failures)

    def _exits(self, function: Function, run: Exploration) -> list[int]:
        """The blocks that end in a return or a tail call."""
        body = self.flow.body(function)
        leaving = {t.site for t in run.transfers if t.is_jump}
        found = []
        for block in run.successors:
            first = body.index[block]
            last = body.instructions[body.block_end(first) - 1]
            if last.address in leaving or any(isinstance(o, Return) for o in last.operations):
                found.append(block)
        return found

    def _fast_sides(self, function: Function, run: Exploration, slow: int) -> Iterator[int]:
        """The blocks whose atomic operation, when it fails, leads to the block that waits."""
        body = self.flow.body(function)
        for block, following in run.successors.items():
            if slow in following and block != slow:
                first = body.index[block]
                inside = body.instructions[first : body.block_end(first)]
                if any(_is_atomic(i) or self._is_atomic_helper(function, i.address) for i in inside):
                    yield block

    def _having(self, function: Function, run: Exploration, cut: set[int], lock: Address) -> set[int]:
        """The blocks before the acquire that look at the word beside the lock: a thread that owns it goes round."""
        flow, body = self.flow, self.flow.body(function)
        found = {block for block, following in run.successors.items() if set(following) & cut and len(following) > 1}
        cells: dict[int, tuple[Memory, int]] = {}
        blocks: dict[int, int] = {}
        for block in found - cut:
            first = body.index[block]
            for i in body.instructions[first : body.block_end(first)]:
                for cell in (o for operation in i.operations for o in operation if isinstance(o, Memory)):
                    cells[i.address], blocks[i.address] = (cell, i.end), block
        known = flow.states(function, cells) if cells else {}
        beside = range(lock.rva + 1, lock.rva + _RECURSIVE)
        looked = {s: address_of(cells[s][0], state, cells[s][1]) for s, state in known.items()}
        return {blocks[s] for s, at in looked.items() if at is not None and at.base is None and at.offset in beside}

    def _is_atomic_helper(self, function: Function, site: int) -> bool:
        for edge in self.flow.edges_at(function, site):
            target = Function(int(self.graph.target[edge]))
            if 0 < self.program.size_of(target) <= _HELPER and any(
                _is_atomic(i) for i in self.flow.body(target).instructions
            ):
                return True
        return False


class _Blocks:
    """The feasible blocks of one function."""

    def __init__(self, run: Exploration) -> None:
        self.starts = sorted(run.successors)
        self.addresses = sorted(run.visited)
        self.after: dict[int, list[int]] = {b: list(run.successors[b]) for b in self.starts}
        self.before: dict[int, list[int]] = {b: [] for b in self.starts}
        for block, following in self.after.items():
            for other in following:
                self.before.setdefault(other, []).append(block)

    def of(self, address: int) -> int:
        return self.starts[max(bisect_right(self.starts, address) - 1, 0)]

    def size(self, block: int) -> int:
        """Instructions of a block."""
        position = bisect_right(self.starts, block)
        end = self.starts[position] if position < len(self.starts) else 1 << 62
        return bisect_left(self.addresses, end) - bisect_left(self.addresses, block)

    def reached(self, starts: Iterable[int], cut: Collection[int], *, backward: bool = False) -> set[int]:
        """Blocks that can be reached from these without entering one that is cut."""
        steps = self.before if backward else self.after
        seen: set[int] = set()
        pending = list(starts)
        while pending:
            block = pending.pop()
            if block not in seen and block not in cut:
                seen.add(block)
                pending += steps.get(block, ())
        return seen

    def dominators(self, start: int, goals: Collection[int]) -> set[int]:
        """Blocks on every way from `start` to any of the goals: those of one shortest way that no other avoids."""
        came: dict[int, int | None] = {start: None}
        pending = [start]
        for block in pending:
            if block in goals:
                break
            for following in self.after.get(block, ()):
                if following not in came:
                    came[following] = block
                    pending.append(following)
        way: list[int] = []
        here = next((b for b in came if b in goals), None)
        while here is not None:
            way.append(here)
            here = came[here]
        return {b for b in way if b == start or not self.reached([start], {b}) & set(goals)}


def _is_failure(result: int) -> bool:
    """NULL, or negative as an int."""
    return result == 0 or bool(result & _SIGN)


def _is_atomic(instruction: Instruction) -> bool:
    return any(isinstance(operation, Atomic) for operation in instruction.operations)
