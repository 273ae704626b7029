"""What the sides of a branch show: whether an attempt at a lock succeeded, which values are equal, which way is taken.

Owns: the attempts of one function, and the reading of flags.
Takes: `State`s and branches. Gives: outcomes and facts.
Must never: take an attempt for a success because one value looks like it: a ticket, or a pointer swapped in, tells
      only by the comparison that the code makes.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

from forkproof.code.operations import AtomicKind, Branch, Condition
from forkproof.locks.state import Attempt, Flags, State
from forkproof.locks.values import ZERO, Base, Content, Entry, Named, Old, Status, Value, Won, Word

_BESIDE: Final = 64
"""Bytes between the two words of a ticket lock."""
_LOW_BITS: Final = {0xFF: 8, 0xFFFF: 16, 0xFFFFFFFF: 32}
_FAR: Final = 64
"""Blocks after a failed attempt in which its wait is looked for."""
_RETURN_ERRORS: Final = ("mutex", "rwlock")
"""What a try of these returns is EBUSY where somebody else has the lock; other errors are those of broken programs."""
EQ: Final = Condition.EQ
NE: Final = Condition.NE
EQUALITY: Final = (EQ, NE)
"""Members of an enumeration are slow to reach, and the interpretation asks for these at every branch."""
Outcome = tuple[int, bool]
"""The site of an attempt, and whether it succeeded."""


def compared(branch: Branch, state: State) -> Flags | None:
    """What a branch looks at, as a comparison where it is one."""
    if branch.operand is not None:
        return Flags("cmp", state.register(branch.operand.name), ZERO, branch.bits)
    flags = state.flags
    if flags is not None and flags.kind == "test":
        if flags.left == flags.right:
            return flags._replace(kind="cmp", right=ZERO)
        width = _LOW_BITS.get(flags.right.offset) if flags.right.base is None else None
        # How a bool that a call returns is tested on AArch64. The sign is that of the whole register, so only
        # whether it is zero is told.
        if width is None or branch.condition not in (Condition.EQ, Condition.NE):
            return None
        return flags._replace(kind="cmp", right=ZERO, bits=width)
    return flags


def decided(branch: Branch, flags: Flags | None) -> bool | None:
    """Which way a branch goes, if constants or what a call has told decide it."""
    if flags is None or flags.kind != "cmp":
        return None
    a, b = flags.left, flags.right
    if branch.condition in EQUALITY:
        if a.base is None and b.base is None:
            mask = (1 << flags.bits) - 1
            return ((a.offset ^ b.offset) & mask == 0) is (branch.condition is EQ)
        named = a.base
        if b == ZERO and isinstance(named, Named) and named.register == "nonzero" and flags.bits > 1:
            return branch.condition is NE
    return None


def shown(
    branch: Branch, flags: Flags | None, left: Value, right: Value, *, taken: bool
) -> list[tuple[Value, Value, bool | None]]:
    """What one side of a branch shows: two values, and whether they are equal there if that is told.

    Behind a conditional comparison, the side that its other outcome excludes shows both comparisons.
    """
    equal = (branch.condition is EQ) is taken
    if flags is None or branch.condition not in EQUALITY:
        return [(left, right, None)]
    if flags.kind != "both":
        is_told = flags.kind == "cmp" and not (equal and flags.bits == 1)
        return [(left, right, equal if is_told else None)]
    if flags.zero is equal:
        return [(left, right, None)]
    found: list[tuple[Value, Value, bool | None]] = [(left, right, equal)]
    first = flags.before
    if first is not None and first.kind == "cmp" and flags.condition in EQUALITY:
        found.insert(0, (first.left, first.right, flags.condition is EQ))
    return found


def equate(state: State, flags: Flags) -> None:
    """What is equal to a constant is that constant from here on."""
    value, other = flags.left, flags.right
    if value.base is None:
        value, other = other, value
    if value.base is None or other.base is not None or flags.bits == 1:
        return
    if isinstance(value.base, Old):
        state.known[value.base.site] = other.offset - value.offset
    state.replace(value, other)
    if isinstance(value.base, Entry) and value.offset == 0 and value.base.register not in state.registers:
        state.registers[value.base.register] = other


def _is_beside(served: Base, ticket: Value) -> bool:
    """What is compared with a ticket is the word beside it, or a part of the word itself."""
    if not isinstance(served, Content | Word) or served.base != ticket.base:
        return False
    return abs(served.offset - ticket.offset) <= _BESIDE


def exclusive(stores: Value | None, state: State) -> tuple[AtomicKind, Value | None, int]:
    """What a load- and a store-exclusive do together, and the site of the load, which names the old value."""
    load = state.reserved
    if load in state.known:
        return AtomicKind.COMPARE_SWAP, Value(None, state.known[load]), load
    if stores is not None and isinstance(stores.base, Old):
        return AtomicKind.ADD, None, load
    if stores is not None and isinstance(stores.base, Named):
        return AtomicKind.OTHER, None, load
    return AtomicKind.SWAP, None, load


class Attempts:
    """The attempts of one function, by site: what each tries, in which block, and where its failure leads."""

    def __init__(self) -> None:
        self.known: dict[int, Attempt] = {}
        self.blocks: dict[int, int] = {}
        self.failing: dict[int, set[int]] = {}

    def note(self, site: int, attempt: Attempt, block: int) -> None:
        """An attempt that has been met."""
        self.known[site] = attempt
        self.blocks[site] = block

    def note_failure(self, outcome: Outcome | None, target: int) -> None:
        """One side of a branch, if it is where an attempt has failed."""
        if outcome is not None and not outcome[1]:
            self.failing.setdefault(outcome[0], set()).add(target)

    def outcome(self, branch: Branch, flags: Flags | None, *, taken: bool) -> Outcome | None:
        """What one side of a branch tells, by what the branch looks at."""
        if flags is None:
            return None
        if flags.kind == "bit":
            if branch.condition in (Condition.BELOW, Condition.ABOVE_EQ):
                return flags.site, (branch.condition is Condition.ABOVE_EQ) is taken
            return None
        if branch.condition not in EQUALITY or flags.kind == "both":
            return None
        equal = (branch.condition is EQ) is taken
        if flags.kind == "won":
            return flags.site, equal
        return self.tested(flags.left, flags.right, equal=equal) or self.tested(flags.right, flags.left, equal=equal)

    def tested(self, value: Value, other: Value, *, equal: bool) -> Outcome | None:
        """(site of an attempt, whether it succeeded) if a value equals another, or does not."""
        base = value.base
        if isinstance(base, Won) and other.base is None:
            return base.site, (equal is (other.offset != 0)) is not base.inverted
        if not isinstance(base, Old | Status):
            return None
        attempt = self.known.get(base.site)
        if attempt is not None and attempt.kind == "ticket":
            return (base.site, equal) if _is_beside(other.base, attempt.address) else None
        if other.base is not None or value.offset != 0:
            return None
        if isinstance(base, Status):
            return (base.site, equal) if attempt is not None and attempt.by_status else None
        if attempt is None or attempt.by_status:  # a look before the attempt can only show that it would fail
            return None if equal else (base.site, False)
        if other.offset == attempt.expected:
            return base.site, equal
        if not equal and other.offset == errno.EBUSY and attempt.kind in _RETURN_ERRORS:
            return base.site, True
        return (base.site, False) if equal else None

    def waits_after_failure(
        self, site: int, block: int, waiting: set[int], successors: Mapping[int, set[int]], *, may_repeat: bool
    ) -> bool:
        """The failing side of what is tried in a block waits, or comes back to it."""
        frontier, seen = set(self.failing.get(site, ())), set[int]()
        while frontier and len(seen) < _FAR:
            if frontier & waiting or (may_repeat and block in frontier):
                return True
            seen |= frontier
            frontier = {n for b in frontier for n in successors.get(b, ())} - seen
        return False
