"""Calls of `std::function` objects, and what the code puts into such objects.

Owns: what such a call looks like, and which functions are stored as what it calls.
Takes: a function's `Body` with the states before its calls; a linked program. Gives: sites; functions.
Must never: use names: this is told from code, which is what stripped programs have.
Wrong where: the objects are libc++'s (their calls are virtual), or C++23's `std::move_only_function`; where code is not
      optimised, so that a manager first stores what it is given.

libstdc++'s object is four words: two that the callee owns, then the manager, which copies and destroys it, and the
invoker, which is called with the object's address. So the call is `call [A + 24]` with A as its first argument (or as
its second on x86-64, whose first says where a large result goes), in code that looks at [A + 16], which is null if
there is nothing to call. And what may be called so is stored in the word after a manager: a function that compares its
third argument, what it is to do, with 0 to 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Final, NamedTuple

import numpy as np

from forkproof.code.conventions import CONVENTIONS, Convention
from forkproof.code.decode import Body, decode
from forkproof.code.operations import (
    Add,
    Address,
    Branch,
    Call,
    Compare,
    Const,
    Memory,
    Operand,
    Operation,
    Register,
    Return,
    Set,
    Test,
)
from forkproof.code.state import State
from forkproof.columns import position_in, unique
from forkproof.elf.image import Image, Machine
from forkproof.program import Function, Program

_WORD: Final = 8
_OPERATIONS: Final = 3
"""The largest number of a manager's operations: type, pointer, copy, destroy."""
_HEAD: Final = 48
"""Bytes at the begin of a manager in which it asks what it is to do."""
_BEFORE: Final = 96
"""Bytes before a manager's address is formed in which the invoker's may be,"""
_AFTER: Final = 256
"""and after it, in which both are stored."""
_BLOCKS: Final = 6
"""Blocks, each with one before it, in which it is looked for where registers got their values."""
_WHOLE: Final = 512
"""Bytes of a manager in which it writes to what its first argument points to."""
_MOST: Final = 4096
"""Places where the addresses of managers are formed, of one object."""


class Load(NamedTuple):
    """Where a call's target is loaded."""

    position: int
    cell: Memory


def load_of(body: Body, position: int, through: Operand) -> Load | None:
    """The load of a call's target from behind a pointer, or from a variable."""
    for here in before(body, position) if isinstance(through, Register) else ():
        for o in reversed(body.instructions[here].operations):
            if getattr(o, "destination", None) == through:
                if not isinstance(o, Set) or o.bits < 64:
                    return None
                through = o.source
        if not isinstance(through, Register):
            position = here
            break
    is_cell = isinstance(through, Memory) and not through.indexed and through.base is not None
    return Load(position, through) if is_cell and isinstance(through, Memory) else None


def before(body: Body, position: int) -> Iterator[int]:
    """The instructions before one, backward, as long as there is only one way to come there."""
    first = body.block_start(position)
    for _ in range(_BLOCKS):
        yield from range(position - 1, first - 1, -1)
        leading = body.predecessors.get(first, ())
        if len(leading) != 1 or leading[0] >= first:
            return
        first = leading[0]
        position = body.block_end(first)


class Part(Enum):
    """What of a `std::function` is called."""

    MANAGER = 16
    INVOKER = 24


def functor_part(body: Body, site: int, load: Load, machine: Machine, states: Mapping[int, State]) -> Part | None:
    """Whether a call is that of a part of a `std::function`: the invoker, or the manager, to copy it or end it."""
    position, convention = body.index[site], CONVENTIONS[machine]
    arguments = convention.arguments
    first, second = (_apart(body, position, argument, load, convention, states) for argument in arguments[:2])
    if first == Part.MANAGER.value and (second == first or _is_operation(body, position, arguments[2])):
        return Part.MANAGER
    objects = (first, second) if machine is Machine.X86_64 else (first,)  # large results have a register of their own
    is_invoker = Part.INVOKER.value in objects and _mentions(body, load, convention)
    return Part.INVOKER if is_invoker else None


def _is_operation(body: Body, position: int, third: str) -> bool:
    """The third argument is one of a manager's operations."""
    for here in before(body, position):
        for o in body.instructions[here].operations:
            if getattr(o, "destination", None) == Register(third):
                constant = o.source if isinstance(o, Set) else None
                return isinstance(constant, Const) and 0 <= constant.value <= _OPERATIONS
    return False


def _mentions(body: Body, load: Load, convention: Convention) -> bool:
    """Some instruction loads, stores or compares the manager, the word before the call's target."""
    name, offset = _place(body, load.position, load.cell, convention)
    return any(
        isinstance(cell, Memory) and not cell.indexed and _place(body, here, cell, convention) == (name, offset - _WORD)
        for here, instruction in enumerate(body.instructions)
        for o in instruction.operations
        if isinstance(o, Set | Compare | Test)
        for cell in (getattr(o, "source", None), getattr(o, "left", None), getattr(o, "destination", None))
    )


def _place(body: Body, position: int, cell: Memory, convention: Convention) -> tuple[str, int]:
    """A cell as what a register held before, and how far behind that it is; a variable by its address."""
    cell = _absolute(cell, body.instructions[position].end)
    if cell.base is None:
        return "", cell.displacement
    name, offset = root(body, position, cell.base, convention)
    return name, offset + cell.displacement


def _absolute(cell: Memory, end: int) -> Memory:
    """A variable by its address, not by its distance from the instruction that ends there."""
    return cell._replace(base=None, displacement=end + cell.displacement) if cell.base == "pc" else cell


def _apart(
    body: Body, position: int, argument: str, load: Load, convention: Convention, states: Mapping[int, State]
) -> int | None:
    """How far behind what an argument points to the call's target lies."""
    assert load.cell.base is not None
    if load.cell.base == "pc":
        state = states.get(body.instructions[position].address)
        known = state.register(argument) if state is not None else None
        address = _absolute(load.cell, body.instructions[load.position].end).displacement
        return address - known.offset if known is not None and known.base is None else None
    mine = root(body, position, argument, convention)
    other = root(body, load.position, load.cell.base, convention)
    if mine[0] == other[0]:
        return other[1] + load.cell.displacement - mine[1]
    addresses = [body.instructions[at].address for at in (position, load.position)]
    if not all(address in states for address in addresses):
        return None
    passed, base = states[addresses[0]].register(argument), states[addresses[1]].register(load.cell.base)
    if passed is None or base is None or passed.base != base.base:
        return None
    return base.offset + load.cell.displacement - passed.offset


def root(body: Body, position: int, name: str, convention: Convention) -> tuple[str, int]:
    """A register's value as what one held before, as far back as that can be told, and what was added to it."""
    offset = 0
    for here in before(body, position):
        for o in reversed(body.instructions[here].operations):
            if isinstance(o, Call) and name in convention.destroyed:
                return f"{name} after {here}", offset
            if getattr(o, "destination", None) != Register(name):
                continue
            if isinstance(o, Set) and isinstance(o.source, Register) and o.bits == 64:
                name = o.source.name
            elif isinstance(o, Add) and o.bits == 64:
                name, offset = o.left.name, offset + o.value
            elif isinstance(o, Address) and not o.source.indexed and o.source.base not in (None, "pc"):
                name, offset = o.source.base or "", offset + o.source.displacement
            else:
                return f"{name} after {here}", offset
    return name, offset


# ---- what is put into them ------------------------------------------------------------------------


def invokers(program: Program, obj: int) -> frozenset[Function]:
    """The functions that an object's code stores in the word after a manager's."""
    code, image = program.codes[obj], program.image(obj)
    order = np.argsort(code.sites.taken_site, kind="stable")
    site, target, owner = code.sites.taken_site[order], code.sites.taken_target[order], code.taken_owner[order]
    places = position_in(code.start, unique(target))
    places = places[places >= 0]
    sizes = zip(code.start[places].tolist(), code.size[places].tolist(), strict=True)
    managers = {start for start, size in sizes if is_manager(image, start, size)}
    formed = dict(zip(site.tolist(), target.tolist(), strict=True)) if managers else {}
    found = set[int]()
    is_taken = (position_in(np.array(sorted(managers), np.int64), target) >= 0) & (owner >= 0)
    for row in np.flatnonzero(is_taken)[:_MOST].tolist():
        at, index = int(site[row]), int(owner[row])
        start, end = int(code.start[index]), int(code.start[index] + code.size[index])
        first = int(site[site.searchsorted(max(start, at - _BEFORE))])
        body = decode(image, [(first, min(end, at + _AFTER) - first)], vectors=True)
        found.update(_stored_after(image, body, managers, formed))
    functions = (program.function(obj, address) for address in found)
    return frozenset(f for f in functions if f is not None)


def is_manager(image: Image, start: int, size: int) -> bool:
    """A function that asks first of all what it is to do, and writes a word to where its first argument points."""
    return _asks(image, start, min(size, _HEAD)) and _answers(image, start, min(size, _WHOLE))


def _asks(image: Image, start: int, size: int) -> bool:
    """It compares its third argument, as an int, with what the operations are."""
    third = Register(CONVENTIONS[image.machine].arguments[2])
    for instruction in decode(image, [(start, size)]).instructions:
        for o in instruction.operations:
            if isinstance(o, Compare) and o.left == third and isinstance(o.right, Const):
                return o.bits == 32 and 0 <= o.right.value <= _OPERATIONS
            if isinstance(o, Test) and third in (o.left, o.right):
                return o.bits == 32 and o.left == o.right
            if isinstance(o, Branch) and o.operand is not None:
                return o.operand == third and o.bits == 32
            if isinstance(o, Call | Return) or getattr(o, "destination", None) == third:
                return False
    return False


def _answers(image: Image, start: int, size: int) -> bool:
    names = {CONVENTIONS[image.machine].arguments[0]}
    for instruction in decode(image, [(start, size)]).instructions:
        for o in instruction.operations:
            if isinstance(o, Set) and isinstance(o.destination, Memory) and o.bits == 64:
                if o.destination.base in names and not o.destination.displacement and not o.destination.indexed:
                    return True
            elif isinstance(o, Set) and isinstance(o.source, Register) and o.source.name in names:
                names.add(getattr(o.destination, "name", ""))
    return False


def _stored_after(image: Image, body: Body, managers: set[int], formed: Mapping[int, int]) -> Iterator[int]:
    """Addresses stored in the word after a manager's, in instructions that are read one after the other.

    `formed`: the addresses of functions that some of them are known to form.
    """
    held: dict[str, int] = {}
    stored: dict[tuple[str, int], int | None] = {}
    destroyed = CONVENTIONS[image.machine].destroyed
    for instruction in body.instructions:
        for o in instruction.operations:
            if isinstance(o, Call):
                held = {name: value for name, value in held.items() if name not in destroyed and name[0] != "v"}
            place = getattr(o, "destination", None)
            value = formed.get(instruction.address)
            if value is None or isinstance(place, Memory):
                value = _value(image, o, instruction.end, held)
            if isinstance(place, Register):
                held.pop(place.name, None)
                stored = {cell: function for cell, function in stored.items() if cell[0] != place.name}
                if value is not None:
                    held[place.name] = value
            elif isinstance(place, Memory) and place.base is not None and not place.indexed:
                offset = place.displacement + (instruction.end if place.base == "pc" else 0)
                stored[place.base, offset] = value
                for manager, invoker in ((offset - _WORD, offset), (offset, offset + _WORD)):
                    after = stored.get((place.base, invoker))
                    if after is not None and stored.get((place.base, manager)) in managers:
                        yield after


def _value(image: Image, operation: Operation, end: int, held: Mapping[str, int]) -> int | None:
    """The address that an operation gives, or stores, where it is known."""
    match operation:
        case Address(_, Memory("pc", displacement, indexed=False), _):
            return end + displacement
        case Add(_, Register(name), value, _):
            return held[name] + value if name in held else None
        case Set(_, Const(value), 64 | 32, _):
            return value
        case Set(_, Register(name), 64, _):
            return held.get(name)
        case Set(_, Memory("pc" | None as base, displacement, indexed=False), 64, _):
            return image.pointer_at(displacement + (end if base == "pc" else 0))
        case _:
            return None
