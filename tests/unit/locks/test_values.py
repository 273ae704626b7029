"""Symbolic addresses, their joins and their sameness: what must be told apart and what is one lock."""

from __future__ import annotations

import pytest

from forkproof.code.conventions import CONVENTIONS
from forkproof.elf.image import Machine
from forkproof.locks.identity import Match, is_resolved, same
from forkproof.locks.state import Joins, State
from forkproof.locks.values import (
    ZERO,
    Base,
    Content,
    Element,
    Entry,
    Foreign,
    Named,
    Object,
    Value,
    chain,
    content,
    root,
    stepped,
    substituted,
    unrooted,
)

GLOBAL = Value(Object(0), 0x4000)
ARGUMENT = Entry("rdi")


def field(base: Base, *offsets: int) -> Value:
    """A chain of loads from a base: the last offset is the lock's."""
    for offset in offsets[:-1]:
        base = Content(base, offset)
    return Value(base, offsets[-1])


def element(offset: int = 0, stride: int = 0x20, inside: int = 0) -> Value:
    return Value(Element(Object(0), 0x4000 + offset, stride), inside)


# ---- identity --------------------------------------------------------------------------------

SAME = [
    (GLOBAL, GLOBAL, Match.EXACT),
    (GLOBAL, Value(Object(0), 0x4008), Match.NO),
    (GLOBAL, Value(Object(1), 0x4000), Match.NO),
    (element(), GLOBAL, Match.EXACT),
    (element(), Value(Object(0), 0x4060), Match.EXACT),
    (element(), Value(Object(0), 0x4068), Match.NO),
    (element(inside=8), Value(Object(0), 0x4068), Match.EXACT),
    (element(), Value(Object(0), 0x4000 + (1 << 21)), Match.NO),
    (field(Object(0), 0x10, 0x400), field(ARGUMENT, 0x400), Match.ASSUMED),
    (field(Object(0), 0x10, 0x40), field(ARGUMENT, 0x40), Match.NO),
    (field(Foreign(3), 0x400, 0x18), field(Foreign(7), 0x400, 0x18), Match.ASSUMED),
    (field(Foreign(3), 0x400, 0x18), field(Foreign(7), 0x408, 0x18), Match.NO),
    (Value(ARGUMENT, 8), Value(ARGUMENT, 8), Match.EXACT),
]


@pytest.mark.parametrize(("a", "b", "expected"), SAME)
def test_same(a: Value, b: Value, expected: Match) -> None:
    assert same(a, b) is expected
    assert same(b, a) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (GLOBAL, True),
        (element(), True),
        (field(Object(0), 0x10, 0x20), True),
        (Value(ARGUMENT, 0), False),
        (field(Foreign(1), 0x400), False),
        (Value(Element(Content(Object(0), 0x10), 0, 0), 0), False),  # anywhere in a heap object
    ],
)
def test_resolved_is_what_a_global_leads_to(value: Value, expected: bool) -> None:
    assert is_resolved(value) is expected


# ---- values ----------------------------------------------------------------------------------


def test_a_callees_field_is_the_callers() -> None:
    inner = field(ARGUMENT, 0x10, 0x20)
    assert substituted(inner, lambda _: Value(Object(0), 0x4000)) == field(Object(0), 0x4010, 0x20)


def test_an_array_in_an_array_has_one_unknown_index() -> None:
    inner = Value(Element(ARGUMENT, 0, 8), 4)
    assert substituted(inner, lambda _: element()) == Value(Element(Object(0), 0x4000, 0x20), 4)


def test_globals_are_nobodys_arguments() -> None:
    assert substituted(GLOBAL, lambda _: ZERO) == GLOBAL


def test_chains_get_names_where_they_are_too_deep() -> None:
    value = GLOBAL
    for _ in range(8):
        value = content(value, Named(1, "deep"))
    assert root(value.base) == Named(1, "deep") or isinstance(root(value.base), Named)


def test_unrooted_keeps_the_last_two_fields() -> None:
    assert chain(unrooted(field(Named(1, "x"), 1, 2, 3), Foreign(5))) == (3, 2)
    assert root(unrooted(field(Named(1, "x"), 0x400, 3), Foreign(5)).base) == Foreign(-1)  # tells by itself
    assert root(unrooted(field(Named(1, "x"), 0x40, 3), Foreign(5)).base) == Foreign(5)


def test_a_whole_step_from_an_element_is_an_element() -> None:
    assert stepped(element(inside=0x40)) == element()
    assert stepped(element(inside=0x44)) == element(inside=0x44)


# ---- joins -----------------------------------------------------------------------------------


def joined(a: Value, b: Value, *, keep: bool = True) -> Value:
    old, new = State({"rbx": a}), State({"rbx": b})
    Joins(CONVENTIONS[Machine.X86_64]).join(old, new, 7, keep=keep)
    return old.register("rbx")


PHI = Value(Named(-8, "rbx"), 0)
TABLE = Value(Content(Object(0), 0x4000), 0)
JOINED = [
    (GLOBAL, GLOBAL, GLOBAL),
    (ZERO, Value(None, 1), PHI),
    (GLOBAL, Value(Object(0), 0x4020), element()),
    (element(), Value(Object(0), 0x4040), element()),
    (GLOBAL, element(), element()),
    (Value(Object(0), 0x4008), element(), PHI),
    (TABLE, Value(Content(Object(0), 0x4008), 0), Value(Content(Element(Object(0), 0x4000, 8), 0), 0)),
    (TABLE, Value(Content(Object(1), 0x4008), 0), PHI),
    (TABLE, Value(Content(Object(0), 0x4008), 4), PHI),
]


@pytest.mark.parametrize(("a", "b", "expected"), JOINED)
def test_joins(a: Value, b: Value, expected: Value) -> None:
    assert joined(a, b) == expected


def test_after_many_rounds_only_what_is_settled_stays() -> None:
    assert joined(TABLE, TABLE, keep=False) == PHI
    some = Value(Content(Element(Object(0), 0x4000, 8), 0), 0)
    assert joined(some, some, keep=False) == some
