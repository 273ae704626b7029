"""The feasible control flow of one function: what must hold on the way to a block, and what every way passes."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkproof.locks.runs import Blocks, Turn
from forkproof.locks.values import ZERO, Named, Value

STATE, OTHER = Value(Named(4, "rax"), 0), Value(Named(8, "rbx"), 0)


def blocks(edges: dict[int, tuple[int, ...]], ends: tuple[int, ...], *turns: tuple[int, Turn]) -> Blocks:
    """A graph from block 0 on; a block without turns is decided by an argument."""
    by_block: dict[int, tuple[Turn, ...]] = {}
    for block, turn in turns:
        by_block[block] = (*by_block.get(block, ()), turn)
    return Blocks(0, edges, frozenset(ends), by_block)


def is_zero(block: int, target: int, value: Value = STATE) -> tuple[int, Turn]:
    return block, Turn(target, value, ZERO, True)


def is_set(block: int, target: int, value: Value = STATE) -> tuple[int, Turn]:
    return block, Turn(target, value, ZERO, False)


# ---- requires --------------------------------------------------------------------------------

DIAMOND = {0: (1, 2), 1: (3,), 2: (3,)}


def test_a_side_of_a_branch_is_required_for_what_lies_on_it_only() -> None:
    graph = blocks(DIAMOND, (3,), is_zero(0, 1), is_set(0, 2))
    assert [t.equal for t in graph.requires(1)] == [True]
    assert [t.equal for t in graph.requires(2)] == [False]
    assert graph.requires(3) == ()
    assert graph.requires(0) == ()


def test_an_argument_is_no_condition() -> None:
    assert blocks(DIAMOND, (3,)).requires(1) == ()


def test_one_condition_tested_in_two_places_is_required() -> None:
    """Compilers thread jumps: 0 goes to 1 or 2, and both ask for the state before they come to 5."""
    edges = {0: (1, 2), 1: (5, 6), 2: (5, 6), 5: (6,)}
    graph = blocks(edges, (6,), is_zero(1, 5), is_set(1, 6), is_zero(2, 5), is_set(2, 6))
    assert [(t.value, t.equal) for t in graph.requires(5)] == [(STATE, True)]


def test_two_conditions_that_lead_to_one_place_are_not() -> None:
    edges = {0: (1, 2), 1: (5, 6), 2: (5, 6), 5: (6,)}
    graph = blocks(edges, (6,), is_zero(1, 5), is_set(1, 6), is_zero(2, 5, OTHER), is_set(2, 6, OTHER))
    assert graph.requires(5) == ()


def test_what_would_end_the_program_otherwise_is_no_condition() -> None:
    """Block 9 gives up: whoever goes on has come to 1."""
    graph = blocks({0: (1, 9), 1: (2,)}, (2,), is_zero(0, 1), is_set(0, 9))
    assert graph.requires(1) == ()
    assert blocks({0: (1, 9), 1: (2,)}, (2, 9), is_zero(0, 1), is_set(0, 9)).requires(1) != ()


def test_in_a_function_that_never_returns_all_conditions_count() -> None:
    assert blocks({0: (1, 9)}, (), is_zero(0, 1), is_set(0, 9)).requires(1) != ()


def test_what_cannot_be_reached_requires_nothing() -> None:
    assert blocks(DIAMOND, (3,), is_zero(0, 1)).requires(77) == ()


@given(
    st.dictionaries(st.integers(0, 7), st.lists(st.integers(0, 7), max_size=3, unique=True).map(tuple)),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from([STATE, OTHER]), st.booleans())),
    st.integers(0, 7),
)
def test_what_is_required_is_what_no_way_does_without(
    edges: dict[int, tuple[int, ...]], sides: list[tuple[int, int, Value, bool]], goal: int
) -> None:
    turns = [(b, Turn(t, value, ZERO, equal)) for b, t, value, equal in sides if t in edges.get(b, ())]
    graph = blocks(edges, (), *turns)
    shown: dict[object, set[tuple[int, int]]] = {}
    for block, turn in turns:
        shown.setdefault(turn[1:], set()).add((block, turn.target))
    needed = {side for side, cut in shown.items() if is_way(edges, goal) and not is_way(edges, goal, cut)}
    assert {turn[1:] for turn in graph.requires(goal)} == needed


def is_way(edges: dict[int, tuple[int, ...]], goal: int, without: Collection[tuple[int, int]] = ()) -> bool:
    seen, frontier = {0}, [0]
    while frontier:
        here = frontier.pop()
        more = {after for after in edges.get(here, ()) if (here, after) not in without} - seen
        seen |= more
        frontier += more
    return goal in seen


# ---- passes ----------------------------------------------------------------------------------


def test_a_goal_before_or_after_is_passed() -> None:
    straight = blocks({0: (1,), 1: (2,)}, (2,))
    assert straight.passes(1, {0})
    assert straight.passes(1, {1})
    assert straight.passes(1, {2})


def test_a_goal_that_state_may_leave_out_is_not_passed() -> None:
    """0, then a report in 1 or not in 2, then the end."""
    graph = blocks({0: (1, 2), 1: (3,), 2: (3,)}, (3,), is_zero(0, 1), is_set(0, 2))
    assert not graph.passes(0, {1})
    assert not graph.passes(3, {1})
    assert graph.passes(1, {1})


def test_an_argument_may_be_chosen_so_that_a_goal_is_passed() -> None:
    assert blocks({0: (1, 2), 1: (3,), 2: (3,)}, (3,)).passes(0, {1})


def test_a_loop_on_the_way_does_not_hide_a_goal() -> None:
    graph = blocks({0: (1,), 1: (1, 2), 2: (3,)}, (3,), is_zero(1, 1), is_set(1, 2))
    assert graph.passes(0, {2})


def test_a_way_that_ends_the_program_leaves_nothing_out() -> None:
    graph = blocks({0: (1, 9), 1: (2,)}, (2,), is_zero(0, 1), is_set(0, 9))
    assert graph.passes(0, {1})


@pytest.mark.parametrize(("goals", "expected"), [({1, 2}, True), ({1}, False), (set(), False)])
def test_goals_on_both_sides_are_passed(goals: set[int], expected: bool) -> None:
    graph = blocks({0: (1, 2), 1: (3,), 2: (3,)}, (3,), is_zero(0, 1), is_set(0, 2))
    assert graph.passes(0, goals) is expected


# ---- surely_reaches ----------------------------------------------------------------------------


def test_state_must_lead_to_a_goal_on_both_sides() -> None:
    graph = blocks(DIAMOND, (3,), is_zero(0, 1), is_set(0, 2))
    assert not graph.surely_reaches({1})
    assert graph.surely_reaches({1, 2})
    assert graph.surely_reaches({3})


def test_an_argument_leads_to_a_goal_on_one_side() -> None:
    assert blocks(DIAMOND, (3,)).surely_reaches({1})
