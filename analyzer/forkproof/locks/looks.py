"""Loops that look at a word until another thread has changed it.

Owns: their shapes: a block that only loads, and the look before a compare-and-swap that is tried once the word is 0.
Takes: decoded functions. Gives: answers.
Must never: call a loop a wait that is left when the word is not as hoped: that is a try.
Wrong where: the word that is looked at is another than the one that is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from forkproof.code.decode import Body
from forkproof.code.explore import Exploration
from forkproof.code.operations import (
    Add,
    Atomic,
    Branch,
    Call,
    Compare,
    Condition,
    Const,
    Memory,
    Operand,
    Operation,
    Register,
    Set,
    Sum,
    Syscall,
    Test,
)

LOOP_BLOCKS: Final = 6
"""Blocks in a loop that does nothing but try again."""


def expects_what_was_0(body: Body, run: Exploration, site: int, expects: Operand | None) -> bool:
    """A compare-and-swap that expects what it has just read, after waiting until that was 0.

    Every way to it comes from a branch that has shown so, and whose other side comes back to look again: a claim that
    is given up when somebody else has the word leaves the loop there.
    """
    begin = run.block_of(site)
    if begin is None or not isinstance(expects, Register) or _is_set_between(body, begin, site, expects):
        return False
    before = [b for b, following in run.successors.items() if begin in following and b != begin]
    return bool(before) and all(
        _shows_0(body, b, begin, expects)
        and all(_leads_to(run, other, b) for other in run.successors[b] if other != begin)
        for b in before
    )


def _is_set_between(body: Body, begin: int, site: int, register: Register) -> bool:
    instructions = body.instructions[body.index[begin] : body.index[site]]
    return any(getattr(o, "destination", None) == register for i in instructions for o in i.operations)


def _shows_0(body: Body, block: int, target: int, register: Register) -> bool:
    """The edge from a block to a target is the one on which a register holds 0."""
    first = body.index[block]
    looked_at: Operand | None = None
    for instruction in body.instructions[first : body.block_end(first)]:
        for operation in instruction.operations:
            match operation:
                case Test(left, right) if left == right:
                    looked_at = left
                case Compare(left, Const(0)):
                    looked_at = left
                case Branch(condition, where, operand, bits) if condition in (Condition.EQ, Condition.NE) and bits > 1:
                    seen = looked_at if operand is None else operand
                    return seen == register and (condition is Condition.EQ) is (where == target)
    return False


def _leads_to(run: Exploration, start: int, goal: int) -> bool:
    """A block leads to another within a few."""
    frontier = {start}
    for _ in range(LOOP_BLOCKS):
        if goal in frontier:
            return True
        frontier = {n for b in frontier for n in run.successors.get(b, ())}
    return False


def waits_for_memory(body: Body, stack: str) -> bool:
    """Some block that jumps back to itself can end only when another thread changes a word that it loads.

    It stores nothing, calls nothing and advances no register; the address that it loads from stays.
    """
    starts = [*body.leaders, len(body.instructions)]
    for first, last in pairwise(starts):
        block = body.instructions[first:last]
        operations = [o for instruction in block for o in instruction.operations]
        ends = operations[-1] if operations else None
        if isinstance(ends, Branch) and ends.target == block[0].address and _only_loads(operations[:-1], stack):
            return True
    return False


def _only_loads(operations: Sequence[Operation], stack: str) -> bool:
    written = {o.destination.name for o in operations if isinstance(o, Set) and isinstance(o.destination, Register)}
    read: list[Memory] = []
    for operation in operations:
        if isinstance(operation, Add | Sum | Call | Atomic | Syscall):
            return False
        if isinstance(operation, Set):
            if isinstance(operation.destination, Memory):
                return False
            read += [operation.source] if isinstance(operation.source, Memory) else []
        if isinstance(operation, Compare | Test):
            read += [o for o in (operation.left, operation.right) if isinstance(o, Memory)]
    return any(not c.indexed and c.base != stack and c.base not in written for c in read)
