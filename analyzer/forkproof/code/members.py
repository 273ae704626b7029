"""Calls through pointers to member functions, of which some are virtual and most are not.

Owns: finding the part of such a call that looks a virtual function up, and the object that it is called with.
Takes: a `Body`. Gives: blocks; the same body with what is added to `this` left out.
Must never: be left out of what is asked for control flow: only values are told apart.
Wrong where: code is not optimised, where both ways are parts of the same length (nothing is found then); where the
      function is of a base that does not begin where the object does.

Such a pointer is two words: a function's address, or a place in the virtual table, and what is added to `this`. A bit
of one of them tells which it is (the least of the address in the Itanium ABI, of the addend on Arm), and code asks it
at each call:

    if (bit) target = *(*this + target);    target(this)

A value that is a function's address is none of a place in a table. So where a call's target is followed to what was
stored, the way through the table says nothing, and joining it in would hide what is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from forkproof.code.decode import Body
from forkproof.code.operations import Memory, Operand, Register, Set, Sum

_MOST: Final = 8
"""Instructions of such a part."""
_WORD: Final = 8
"""Bytes from the first word of such a pointer to the second."""


def virtual_ways(body: Body, calls: Mapping[int, Operand | int | None]) -> frozenset[int]:
    """The blocks in which the target of a call is looked up in a virtual table, only to go on to the call.

    `calls`: what the calls that are asked about go through, by site.
    """
    through = [(body.index[site], target) for site, target in calls.items() if isinstance(target, Register)]
    return frozenset(part for position, target in through for part in _lookups(body, position, target))


def without_addends(body: Body, calls: Mapping[int, Operand | int | None], this: str) -> Body:
    """The same, where a pointer to a member function is called with the object itself: mostly nothing is added to it.

    `this`: the register that is the first argument.
    """
    changed = dict[int, tuple[Sum, Operand]]()
    for site, target in calls.items():
        if not isinstance(target, Register):
            continue
        position = body.index[site]
        for part in _lookups(body, position, target):
            first = body.predecessors[part][0]
            found = _before(body, body.block_start(position), position, target)
            loaded = _before(body, first, body.block_end(first), found)
            for here, o in _additions(body, first, this):
                objects = [p for p in (o.left, o.right) if p is not None and _is_object(body, first, here, p, loaded)]
                if len(objects) == 1:
                    changed[here] = o, objects[0]
    if not changed:
        return body
    instructions = list(body.instructions)
    for here, (addition, pointer) in changed.items():
        new = tuple(Set(o.destination, pointer) if o == addition else o for o in instructions[here].operations)
        instructions[here] = instructions[here]._replace(operations=new)
    return replace(body, instructions=tuple(instructions))


def _additions(body: Body, first: int, this: str) -> Iterator[tuple[int, Sum]]:
    """The last sum in a block that gives `this`."""
    for here in range(body.block_end(first) - 1, first - 1, -1):
        for o in body.instructions[here].operations:
            if getattr(o, "destination", None) == Register(this):
                if isinstance(o, Sum):
                    yield here, o
                return


def _is_object(body: Body, first: int, here: int, operand: Operand, loaded: Operand) -> bool:
    """It is loaded, and not from the word after that of the function."""
    source = _before(body, first, here, operand) if isinstance(operand, Register) else operand
    if not isinstance(source, Memory) or not isinstance(loaded, Memory):
        return False
    return source.displacement != loaded.displacement + _WORD


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
