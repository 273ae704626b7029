"""Calls through pointers to member functions, of which some are virtual and most are not.

Owns: finding the part of such a call that looks a virtual function up.
Takes: a `Body`. Gives: blocks. Must never: be left out of what is asked for control flow: only values are told apart.
Wrong where: code is not optimised, where both ways are parts of the same length (nothing is found then).

Such a pointer is two words: a function's address, or a place in the virtual table, and what is added to `this`. A bit
of one of them tells which it is (the least of the address in the Itanium ABI, of the addend on Arm), and code asks it
at each call:

    if (bit) target = *(*this + target);    target(this)

A value that is a function's address is none of a place in a table. So where a call's target is followed to what was
stored, the way through the table says nothing, and joining it in would hide what is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from forkproof.code.decode import Body
from forkproof.code.operations import Memory, Operand, Register, Set

_MOST: Final = 8
"""Instructions of such a part."""


def virtual_ways(body: Body, calls: Mapping[int, Operand | int | None]) -> frozenset[int]:
    """The blocks in which the target of a call is looked up in a virtual table, only to go on to the call.

    `calls`: what the calls that are asked about go through, by site.
    """
    through = [(body.index[site], target) for site, target in calls.items() if isinstance(target, Register)]
    return frozenset(part for position, target in through for part in _lookups(body, position, target))


def _lookups(body: Body, position: int, target: Operand) -> list[int]:
    block = body.block_start(position)
    before = body.predecessors.get(block, ())
    if len(before) < 2:
        return []
    target = _before(body, block, position, target)
    parts = [part for part in before if part != block and body.predecessors.get(part, ()) in [(o,) for o in before]]
    return [part for part in parts if _is_lookup(body, part, target)]


def _is_lookup(body: Body, part: int, target: Operand) -> bool:
    end = body.block_end(part)
    if end - part > _MOST:
        return False
    loaded = _before(body, part, end, target)
    return isinstance(loaded, Memory) and loaded.indexed and not loaded.thread


def _before(body: Body, first: int, position: int, wanted: Operand) -> Operand:
    """What a register's value is at the begin of a part of a block: another register, or what it is loaded from."""
    for instruction in reversed(body.instructions[first:position]):
        for o in reversed(instruction.operations):
            if getattr(o, "destination", None) == wanted and isinstance(wanted, Register):
                wanted = o.source if isinstance(o, Set) and o.bits == 64 else Register("?")
    return wanted
