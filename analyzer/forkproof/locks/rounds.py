"""Loops that end after so many rounds, or after a time, so that who tries a lock in one gives up.

Owns: what a counter is, and what a time limit, and the question whether a failing attempt ends without its lock.
Takes: a decoded body, the feasible successors of its blocks. Gives: answers.
Must never: call a loop counted that has another way round: a lock that spins a while, yields and spins again waits for
      ever, and so does one that looks for as long as another thread has it.
Wrong where: a counter lies in memory, or a function of its own tells whether the time is over: such loops count as
      waiting for ever. One that asks for the time for another reason, and leaves by comparing something, as giving up.

A loop is counted if one of its blocks leaves it by a comparison of a register that each round through that block moves
in one direction, or by any comparison other than with 0 where each round asks for the time, and what is left of the
loop without that block is counted too, or goes round no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from forkproof.code.conventions import Convention
from forkproof.code.decode import Body
from forkproof.code.operations import (
    Add,
    Address,
    Atomic,
    AtomicKind,
    Branch,
    Call,
    Compare,
    Const,
    Memory,
    Operand,
    Operation,
    Register,
    Set,
    Sum,
    Test,
)

Edge = tuple[int, int]
_MOST: Final = 256
"""Blocks behind a failed attempt that are looked at; from more of them nobody is said to give up."""
_COPIES: Final = 3
"""Registers that a counter is copied through in one round."""
_EITHER: Final = 1 << 63
"""A step of which the size is not known: a doubling."""


class Rounds:
    """The loops behind the failing side of one attempt, or of several at one lock.

    `tries`: their blocks; `waiting`: blocks that pause or wait; `clocks`: that ask for the time; `ends`: that return;
    `won`: the edges on which the lock was got; `locking`: blocks that call what locks, as the slow way to the same
    lock does.
    """

    def __init__(
        self,
        body: Body,
        convention: Convention,
        successors: Mapping[int, Iterable[int]],
        tries: Iterable[int],
        waiting: set[int],
        clocks: set[int],
        ends: set[int],
        won: set[Edge],
        locking: set[int],
    ) -> None:
        self.body, self.convention = body, convention
        self.tries, self.waiting, self.ends = set(tries), waiting, ends
        self.won, self.locking, self.clocks = won, locking, clocks
        self.successors = successors
        self.after: dict[int, set[int]] = {}

    def gives_up(self, failing: Iterable[int]) -> bool:
        """Some way from a failed attempt comes to an end, and through nothing that repeats or waits but counted loops,
        one at least."""
        frontier = {(block, False) for block in failing}
        if not self._gather(failing):
            return False
        loops = {block: loop for loop in self._loops(set(self.after)) for block in loop}
        seen = set[tuple[int, bool]]()
        while frontier:
            here = frontier.pop()
            if here in seen:
                continue
            seen.add(here)
            block, is_counted = here
            if block in self.locking:
                continue
            loop = loops.get(block)
            if loop is not None and (loop & self.tries or loop & self.waiting):
                frontier |= {(out, True) for out in self._ways_out(loop)}
            elif not self.after[block] and (block not in self.ends or block not in self.waiting):
                if is_counted:  # who calls abort() hangs no more than who returns
                    return True
            elif block not in self.waiting:
                frontier |= {(onward, is_counted) for onward in self.after[block]}
        return False

    def _gather(self, starts: Iterable[int]) -> bool:
        """Note what each block leads to while the lock is not got; False where that is too much."""
        pending = list(starts)
        while pending:
            block = pending.pop()
            if block in self.after:
                continue
            if len(self.after) >= _MOST:
                return False
            self.after[block] = set() if block in self.locking else self._onward(block)
            pending += self.after[block]
        return True

    def _onward(self, block: int) -> set[int]:
        again = self._repeats_pair(block)
        return {b for b in self.successors.get(block, ()) if (block, b) not in self.won and b != again}

    def _operations(self, block: int) -> list[Operation]:
        end = self.body.block_end(block)
        return [o for i in self.body.instructions[block:end] for o in i.operations]

    def _repeats_pair(self, block: int) -> int | None:
        """Where AArch64 repeats a store-exclusive that failed: the word was touched meanwhile, which says nothing."""
        operations = self._operations(block)
        last = operations[-1] if operations else None
        stored = any(isinstance(o, Atomic) and o.kind is AtomicKind.EXCLUSIVE for o in operations)
        is_status = stored and isinstance(last, Branch) and last.operand is not None
        return self.body.position(last.target) if is_status and isinstance(last, Branch) else None

    # ---- loops -----------------------------------------------------------------------------

    def _loops(self, blocks: set[int]) -> list[set[int]]:
        """The largest sets of blocks that all lead to each other, within these."""
        before: dict[int, set[int]] = {}
        for block in blocks:
            for onward in self.after[block] & blocks:
                before.setdefault(onward, set()).add(block)
        inside = {block: self.after[block] & blocks for block in blocks}
        found, rest = [], set(blocks)
        for block in sorted(blocks):
            if block in rest:
                loop = _reached(inside, block) & _reached(before, block)
                rest -= loop or {block}
                if loop:
                    found.append(loop)
        return found

    def _ways_out(self, loop: set[int]) -> set[int]:
        """Where a counted loop leads when its rounds are over; nowhere if it is not counted."""
        for block in sorted(loop):
            out = self.after[block] - loop
            if not out or len(self.after[block]) == len(out):
                continue
            if not self._is_counter(block, loop) and not self._is_deadline(block, loop):
                continue
            if all(self._ways_out(inner) for inner in self._loops(loop - {block})):
                return out
        return set()

    def _is_deadline(self, block: int, loop: set[int]) -> bool:
        """Every way round asks for the time, and the branch that ends a block compares something, not with 0."""
        found = _compared(self._operations(block)) if loop & self.clocks else None
        if found is None or Const(0) in found[1]:
            return False
        return not any(block in other for other in self._loops(loop - self.clocks))

    # ---- counters --------------------------------------------------------------------------

    def _is_counter(self, block: int, loop: set[int]) -> bool:
        """The branch that ends a block compares what every way round through it moves with what stays."""
        found = _compared(self._operations(block))
        if found is None:
            return False
        before, sides = found
        return any(
            self._is_moved(block, counter, before, loop) and self._stays(limit, before, loop)
            for counter, limit in (sides, sides[::-1])
        )

    def _stays(self, limit: Operand, before: list[Operation], loop: set[int]) -> bool:
        """The same in each round, or a word of memory, which no round of this loop is meant to move."""
        if not isinstance(limit, Register):
            return True
        made = self._made(before, limit)
        if made is None:
            return _is_loaded(before, limit)
        name, step = made
        return step == 0 and not self._writers(name, loop)

    def _is_moved(self, block: int, counter: Operand, before: list[Operation], loop: set[int]) -> bool:
        made = self._made(before, counter) if isinstance(counter, Register) else None
        if made is None:
            return False
        steps: dict[int, int] = {}
        if not self._steps(made[0], made[0], loop, steps, _COPIES):
            return False
        moving = {b for b, step in steps.items() if step}
        is_one_way = len({step > 0 for step in steps.values() if step}) == 1
        rest = loop - moving
        return is_one_way and (block in moving or not any(block in other for other in self._loops(rest)))

    def _steps(self, name: str, counter: str, loop: set[int], steps: dict[int, int], depth: int) -> bool:
        """By how much each block that writes a register moves the counter; whether that is all that they do."""
        for block in self._writers(name, loop):
            made = self._made(self._operations(block), Register(name))
            if made is None:
                return False
            source, step = made
            if source != counter:
                inner: dict[int, int] = {}
                if depth == 0 or not self._steps(source, counter, loop, inner, depth - 1) or not inner:
                    return False
                step += next(iter(inner.values()))
            steps[block] = step
        return True

    def _writers(self, name: str, loop: set[int]) -> list[int]:
        return [b for b in sorted(loop) if any(self._is_written(o, name) for o in self._operations(b))]

    def _is_written(self, operation: Operation, name: str) -> bool:
        if isinstance(operation, Call):
            return name in self.convention.destroyed
        if isinstance(operation, Atomic):
            return operation.result == Register(name)
        return getattr(operation, "destination", None) == Register(name)

    def _made(self, operations: list[Operation], register: Register) -> tuple[str, int] | None:
        """A register as what another one held where these operations begin, and a number."""
        name, total = register.name, 0
        for operation in reversed(operations):
            if not self._is_written(operation, name):
                continue
            match operation:
                case Set(_, Register(source), bits) if bits >= 32:
                    name = source
                case Add(_, Register(source), value):
                    name, total = source, total + value
                case Address(_, Memory(str() as source, displacement, False)) if source != "pc":
                    name, total = source, total + displacement
                case Sum(_, Register(source), right) if right is None or right == Register(source):
                    name, total = source, total + _EITHER
                case _:
                    return None
        return name, total


def _compared(operations: list[Operation]) -> tuple[list[Operation], tuple[Operand, Operand]] | None:
    """What the branch at the end of a block compares, and the operations before that comparison."""
    branch = operations[-1] if operations else None
    if not isinstance(branch, Branch) or branch.bit is not None:
        return None
    if branch.operand is not None:
        return operations[:-1], (branch.operand, Const(0))
    for position in range(len(operations) - 2, -1, -1):
        match operations[position]:
            case Compare(left, right):
                return operations[:position], (left, right)
            case Test(left, right) if left == right:
                return operations[:position], (left, Const(0))
            case Add() | Set(Register()) | Address():
                continue  # these leave the flags alone
            case _:
                return None
    return None


def _is_loaded(operations: list[Operation], register: Register) -> bool:
    """The last that happens to a register is that it is loaded."""
    last = next((o for o in reversed(operations) if getattr(o, "destination", None) == register), None)
    return isinstance(last, Set) and isinstance(last.source, Memory)


def _reached(following: Mapping[int, set[int]], start: int) -> set[int]:
    """The blocks that one leads to; itself only if it comes back."""
    found, pending = set[int](), list(following.get(start, ()))
    while pending:
        block = pending.pop()
        if block not in found:
            found.add(block)
            pending += following.get(block, ())
    return found
