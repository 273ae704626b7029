"""Values that are known while a function is followed.

Owns: what a value can be, and the cell of memory that holds one.
Takes: nothing. Gives: values, compared as tuples.
Must never: be a run-time address.

Values are affine: a base and an offset. The base is None for constants, or names where the value came
from: a register or parameter at entry, a word in memory, the result of a call.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What a register held when the exploration began; argument registers are the parameters."""

    register: str


class Word(NamedTuple):
    """What memory holds at a link-time address (a GOT slot, a global)."""

    address: int


class Result(NamedTuple):
    """What the call at a site returned."""

    site: int


class Success(NamedTuple):
    """What the call at a site returned, which is assumed not to have failed: a number that is not negative."""

    site: int


class Pointer(NamedTuple):
    """What the call at a site returned, where something was stored behind it: a pointer that is not null."""

    site: int


class Behind(NamedTuple):
    """What memory held behind a pointer that is not known itself: a field of a parameter, of what a call returned."""

    base: Base
    offset: int


class Former(NamedTuple):
    """What a base named before the exploration began: since then the call may be made again, the word be changed."""

    base: Base


Base = Entry | Word | Result | Success | Pointer | Behind | Former | None


class Value(NamedTuple):
    """base + offset; a constant when base is None."""

    base: Base
    offset: int


class Held(NamedTuple):
    """What a cell holds, and how wide the store was."""

    value: Value
    bits: int


Cell = tuple[Base, int]


def constant(value: Value | None) -> int | None:
    """The number that a value is, if it is one."""
    return value.offset if value is not None and value.base is None else None


def depth(base: Base) -> int:
    """Loads behind pointers that lead to what a base names."""
    count = 0
    while isinstance(base, Behind):
        base, count = base.base, count + 1
    return count


def as_signed(value: int, bits: int) -> int:
    """The low bits of a number as two's complement."""
    sign = 1 << (bits - 1)
    value &= (1 << bits) - 1
    return (value & (sign - 1)) - (value & sign)
