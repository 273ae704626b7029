"""Symbolic addresses: where a lock is, as the code of one function tells it.

Owns: the values that the lock analysis follows, and the substitution of a caller's arguments for a callee's
      parameters.
Takes: nothing. Gives: hashable values.
Must never: call two values equal that may differ: an unknown value has a name of its own (the place where it
      came up), so that a lock that is taken and released through it still matches.

A value is base + offset. Without a base it is a number. Chains of loads are kept to `DEEPEST` levels: what lies
deeper begins at a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias


class Object(NamedTuple):
    """The load bias of an object of the closure: offsets are its link-time addresses."""

    number: int


class Entry(NamedTuple):
    """What a register held when the function was entered: a parameter, or the stack pointer."""

    register: str


class Content(NamedTuple):
    """What the word at base + offset holds."""

    base: Base
    offset: int


class Word(NamedTuple):
    """What 4 bytes or fewer at base + offset hold: a number, nothing that points."""

    base: Base
    offset: int


class Thread(NamedTuple):
    """The thread's own storage, from the offset on that a word of the object tells; of None: the thread pointer."""

    of: Base


class Flag(NamedTuple):
    """The fact that the word at base + offset, of the thread's own storage, holds a constant."""

    base: Base
    offset: int
    constant: int


class Element(NamedTuple):
    """The address of some element of an array that begins at base + offset; stride 0: not known."""

    base: Base
    offset: int
    stride: int


class Old(NamedTuple):
    """What an atomic operation found in its word; of a try call, its result."""

    site: int


class Status(NamedTuple):
    """Whether a store-exclusive stored (0) or not (1)."""

    site: int
    of: str = "status"
    """Tuples are equal by what they hold: without this it would be what the load of the same pair found."""


class Won(NamedTuple):
    """1 if the attempt at a site got the lock, else 0; the other way round if `inverted`."""

    site: int
    inverted: bool


class Masked(NamedTuple):
    """The bits of a value that a mask has, or has not, if `inverted`."""

    of: Value
    mask: Value
    inverted: bool


class Joined(NamedTuple):
    """A value with the bits of a mask set."""

    of: Value
    mask: Value


class Part(NamedTuple):
    """Some bits of a value, moved."""

    of: Value


class Named(NamedTuple):
    """A value that is not known, by where it came up."""

    site: int
    register: str


class Made(NamedTuple):
    """What a function got from a call at a site, or its frame (site -1), where it hands that to others: as good as a
    variable."""

    function: int
    site: int


class Default(NamedTuple):
    """A parameter, or what stands in for it where it is null: `context ? context : the_default`."""

    of: Entry
    instead: Value


class Foreign(NamedTuple):
    """A value that means nothing outside of a function; -1: of any function."""

    function: int


Base: TypeAlias = (
    "Object | Entry | Content | Word | Thread | Flag | Element | Old | Status | Won | Masked | Joined | Part | Named | "
    "Made | Default | Foreign | None"
)
DEEPEST: Final = 4


class Value(NamedTuple):
    """base + offset; a number when base is None."""

    base: Base
    offset: int


ZERO: Final = Value(None, 0)
_new: Final = tuple.__new__
"""Makes a named tuple without the call in Python that its class makes: where hundreds of thousands are made."""


_CHAINED: Final = (Content, Element)
_NOBODYS: Final = (Object, Made, Foreign)
"""What means the same to callers and callees. Constants: to join types at each test takes longer than the test."""


def depth(base: Base) -> int:
    """How many loads and steps through arrays a base is made of."""
    levels = 0
    while isinstance(base, _CHAINED):
        levels += 1
        base = base.base
    return levels


def content(address: Value, name: Named) -> Value:
    """What the word at an address holds; a name of its own where the chain gets too deep."""
    return Value(name, 0) if depth(address.base) >= DEEPEST else _new(Value, (_new(Content, address), 0))


def stepped(value: Value) -> Value:
    """A whole step from some element of an array is some element too."""
    base = value.base
    if isinstance(base, Element) and base.stride and value.offset % base.stride == 0:
        return Value(base, 0)
    return value


def root(base: Base) -> Base:
    """Where a chain begins."""
    while isinstance(base, _CHAINED):
        base = base.base
    return base.of if isinstance(base, Default) else base


Substitution = Callable[[Base], Value]
"""What the root of a callee's value is for the caller."""


def substituted(value: Value, replace: Substitution) -> Value:
    """A callee's value as the caller sees it."""
    base = value.base
    if base is None or isinstance(base, Object) or isinstance(root(base), _NOBODYS):
        return value
    if isinstance(base, Content):
        inner = substituted(_new(Value, base), replace)
        found: Base = _new(Content, inner)
        return _new(Value, (found, value.offset))
    if isinstance(base, Element):
        inner = substituted(Value(base.base, base.offset), replace)
        if isinstance(inner.base, Element):  # an array in an array: one unknown index is as good as two
            return Value(inner.base, inner.offset + value.offset)
        return Value(Element(inner.base, inner.offset, base.stride), value.offset)
    result = _default(base, replace) if isinstance(base, Default) else replace(base)
    return _new(Value, (result.base, result.offset + value.offset))


def _default(base: Default, replace: Substitution) -> Value:
    result = replace(base.of)
    if result == ZERO:
        return base.instead
    is_parameter = isinstance(result.base, Entry) and result.offset == 0
    return Value(Default(result.base, base.instead), 0) if is_parameter else result  # type: ignore[arg-type]


TELLING: Final = 0x100
"""An offset from which on a field is taken to be the same one in whatever function: few structures are so large."""


def unrooted(value: Value, begin: Foreign) -> Value:
    """The last two fields of a chain that begins at something unknown."""
    offsets = chain(value)[:2]
    anywhere = any(abs(offset) >= TELLING for offset in offsets)
    base: Base = Foreign(-1) if anywhere or begin.function < 0 else begin
    return Value(base, offsets[0]) if len(offsets) == 1 else Value(Content(base, offsets[1]), offsets[0])


def chain(value: Value) -> tuple[int, ...]:
    """The offsets of a chain of loads, root erased, last first: what two ways to one field have in common."""
    offsets = [value.offset]
    base = value.base
    while isinstance(base, _CHAINED):
        if isinstance(base, Element):
            offsets[-1] += base.offset
        else:
            offsets.append(base.offset)
        base = base.base
    return tuple(offsets)
