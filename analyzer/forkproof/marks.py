"""Marks: words of memory by which code can tell the child of a fork from its parent, carried over a return.

Owns: which words differ between the two where a function returns, what its caller calls them, and how long they are
      believed to hold what they held.
Takes: the states in which the child and the parent return. Gives: `Mark`s, and states that hold them.
Must never: believe in a word longer than until a call that is given the object, or that may fork again: where the word
      tells the two apart, the child is not followed to what only the parent does.
Wrong where: the caller comes to the word in a way that is not followed (then both sides count as the child's); where
      a call changes the word by another way than a pointer to the object that a register passes.

A function that forks may leave the result in an object that it returns, or in one that was passed to it:
`child->pid = fork(); return child;`. Globals are not carried: any call may change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from forkproof.code.conventions import Convention
from forkproof.code.explore import Changes
from forkproof.code.state import State
from forkproof.code.values import Cell, Entry, Former, Held, Pointer, Value, Word, constant

_RETURNED: Final = Pointer(-1)
"""Stands for what the function returned, whichever call that was."""
Cells = dict[Cell, Held]


class Mark(NamedTuple):
    """A word, in the terms of the function that returns: behind its result, or behind a parameter."""

    cell: Cell
    bits: int
    child: int
    parent: int | None
    """None if it is not known."""


def may_mark(child: State | None, parent: State | None, convention: Convention) -> bool:
    """Some word differs that may be known to a caller, whatever its pointer is: worth a closer look."""
    return any(
        mark.cell[0] is not None and not isinstance(mark.cell[0], Word) and mark.cell[0] != Entry(convention.stack)
        for mark in _differing(child, parent)
    )


def marks_left(child: State | None, parent: State | None, convention: Convention) -> tuple[Mark, ...]:
    """What tells the child from its parent after a function has returned in both, as its callers know it."""
    if child is None or parent is None:
        return ()
    result = child.register(convention.result)
    returned = result if result is not None and result == parent.register(convention.result) else None
    found = [
        named
        for mark in _differing(child, parent)
        for named in (mark, mark._replace(cell=_behind(mark.cell, returned)))
        if _is_for_callers(named, convention)
    ]
    return tuple(sorted(dict.fromkeys(found), key=repr))


def _differing(child: State | None, parent: State | None) -> Iterator[Mark]:
    """The words that hold one number in the child and, as far as is known, not the same in its parent."""
    if child is None or parent is None:
        return
    for cell, mine in child.cells.items():
        theirs = parent.cells.get(cell)
        if mine is not None and mine != theirs and mine.value.base is None:
            is_known = theirs is not None and theirs.bits == mine.bits
            yield Mark(cell, mine.bits, mine.value.offset, constant(theirs.value) if theirs and is_known else None)


def _behind(cell: Cell, returned: Value | None) -> Cell:
    """The word as one behind what the function returns, if it is."""
    base, offset = cell
    if returned is None or returned.base is None or base != returned.base:
        return cell
    return _RETURNED, offset - returned.offset


def _is_for_callers(mark: Mark, convention: Convention) -> bool:
    base = mark.cell[0]
    return base == _RETURNED or (isinstance(base, Entry) and base.register in convention.arguments)


def marks_seen(marks: Sequence[Mark], before: State | None, site: int) -> tuple[Mark, ...]:
    """The marks that a call leaves, as its caller names them; `before` is what is known there before the call."""
    seen = ((mark, _cell_seen(mark.cell, before, Pointer(site))) for mark in marks)
    return tuple(mark._replace(cell=cell) for mark, cell in seen if cell is not None)


def marks_passed_on(marks: Sequence[Mark], before: State | None, convention: Convention) -> tuple[Mark, ...]:
    """The marks that a tail call leaves, whose result is the caller's own."""
    seen = ((mark, _cell_seen(mark.cell, before, _RETURNED)) for mark in marks)
    named = (mark._replace(cell=cell) for mark, cell in seen if cell is not None)
    return tuple(mark for mark in named if _is_for_callers(mark, convention))


def _cell_seen(cell: Cell, before: State | None, returned: Pointer) -> Cell | None:
    base, offset = cell
    if base == _RETURNED:
        return returned, offset
    passed = before.register(base.register) if before is not None and isinstance(base, Entry) else None
    return None if passed is None or passed.base is None else (_former(passed).base, passed.offset + offset)


def _former(value: Value) -> Value:
    """What was known before a call, for use after it. What a register held at entry is the same for good."""
    return value if value.base is None or isinstance(value.base, Entry) else Value(Former(value.base), value.offset)


def constants_after(before: State | None, convention: Convention) -> State:
    """The constants that registers keep over a call; nothing else is known."""
    held = before.registers if before is not None else {}
    return State({n: v for n, v in held.items() if constant(v) is not None and n not in convention.destroyed})


def state_after(before: State | None, site: int, convention: Convention, marks: Sequence[Mark] = ()) -> State:
    """What is known after a call of all that was before it, in the terms of the function's entry.

    Constants in memory are left out, and pointers but in the frame: a call may have changed them.
    """
    state = State(dict.fromkeys(convention.destroyed))
    if before is not None:
        kept = {n: v and _former(v) for n, v in before.registers.items() if n not in convention.destroyed}
        state.registers.update(kept)
        state.cells = {
            cell: Held(_former(held.value), held.bits)
            for cell, held in before.cells.items()
            if held is not None and held.value.base is not None and cell[0] == Entry(convention.stack)
        }
    if any(mark.cell[0] == Pointer(site) for mark in marks):
        state.registers[convention.result] = Value(Pointer(site), 0)
    return state


def child_words(marks: Sequence[Mark]) -> Cells:
    """What the child finds in the marked words."""
    return {mark.cell: Held(Value(None, mark.child), mark.bits) for mark in marks}


def parent_words(marks: Sequence[Mark]) -> Cells:
    """What the parent finds in the marked words."""
    return {mark.cell: Held(Value(None, mark.parent), mark.bits) for mark in marks if mark.parent is not None}


def changes_by(convention: Convention, forks_again: Callable[[int], bool]) -> Changes:
    """Believes in a number in memory only until a call that may change it; `forks_again` tells of calls, by site."""

    def changes(site: int, state: State) -> None:
        again, passed = forks_again(site), [state.register(name) for name in convention.arguments]
        for (base, offset), held in state.cells.items():
            if held is not None and held.value.base is None:
                is_passed = any(p is not None and p.base == base and p.offset <= offset for p in passed)
                if again or is_passed:
                    state.cells[base, offset] = None

    return changes
