"""What instructions do with functions' addresses: call what is not known, put a register or a constant into a cell.

Owns: these patterns.
Takes: a `Body`. Gives: positions, sites and cells.
Must never: follow a value: that is done by `explore`.
Wrong where: a value is spilled between being formed and being stored.
"""

from __future__ import annotations

from collections.abc import Iterator

from forkproof.code.decode import Body
from forkproof.code.operations import (
    Address,
    Call,
    Const,
    Jump,
    JumpUnknown,
    Memory,
    Operand,
    Register,
    Return,
    Set,
)


def unknown_calls(body: Body) -> Iterator[tuple[int, Operand]]:
    """(position, what it goes through) of calls and tail calls that name no function."""
    for position, instruction in enumerate(body.instructions):
        for o in instruction.operations:
            is_call = isinstance(o, Call) or (isinstance(o, JumpUnknown) and not body.orphans)
            if is_call and isinstance(o, Call | JumpUnknown) and o.through is not None:
                yield position, o.through


def registers_stored(body: Body) -> dict[int, list[tuple[Memory, Register]]]:
    """What a function stores of its registers, by site."""
    found: dict[int, list[tuple[Memory, Register]]] = {}
    for instruction in body.instructions:
        for o in instruction.operations:
            is_store = isinstance(o, Set) and o.bits == 64 and isinstance(o.destination, Memory)
            if is_store and isinstance(o, Set) and isinstance(o.source, Register):
                assert isinstance(o.destination, Memory)
                found.setdefault(instruction.address, []).append((o.destination, o.source))
    return found


def stores_of(body: Body, address: int) -> Iterator[tuple[Memory, int]]:
    """Cells into which the first instruction's result goes, each with the end of the instruction that stores it."""
    names = set[str]()
    for instruction in body.instructions:
        for o in instruction.operations:
            if isinstance(o, Call | Jump | JumpUnknown | Return):
                return
            place = getattr(o, "destination", None)
            is_it = not names if isinstance(o, Address) else False
            if isinstance(o, Set):
                is_it = o.source == Const(address) or (isinstance(o.source, Register) and o.source.name in names)
                if is_it and o.bits == 64 and isinstance(place, Memory) and not place.indexed:
                    yield place, instruction.end
            if isinstance(place, Register):
                (names.add if is_it or (not names and instruction is body.instructions[0]) else names.discard)(
                    place.name
                )
        if not names and instruction is not body.instructions[0]:
            return
