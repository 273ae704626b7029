"""What the sides of a branch show: whether an attempt at a lock succeeded, which values are equal, which way is taken.

Owns: the attempts of one function, and the reading of flags.
Takes: `State`s and branches. Gives: outcomes and facts.
Must never: take an attempt for a success because one value looks like it: a ticket, or a pointer swapped in, tells
      only by the comparison that the code makes.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final, NamedTuple

from forkproof.code.operations import AtomicKind, Branch, Condition
from forkproof.locks.state import Attempt, Flags, State
from forkproof.locks.values import (
    ZERO,
    Content,
    Entry,
    Joined,
    Masked,
    Named,
    Old,
    Part,
    Status,
    Value,
    Won,
    Word,
)

_BESIDE: Final = 256
"""Bytes between the two words of a ticket lock: lines of 128 bytes, as some processors fetch them."""
_LOW_BITS: Final = {0xFF: 8, 0xFFFF: 16, 0xFFFFFFFF: 32}
_FAR: Final = 64
"""Blocks after a failed attempt in which its wait is looked for."""
_NEAR: Final = 6
"""Blocks on the way back to an attempt from a look that comes before it: many loops skip what bears a mark."""
_RETURN_ERRORS: Final = ("mutex", "rwlock")
"""What a try of these returns is EBUSY where somebody else has the lock; other errors are those of broken programs."""
EQ: Final = Condition.EQ
NE: Final = Condition.NE
_SIGN: Final = {Condition.LT: False, Condition.NEGATIVE: False, Condition.GE: True, Condition.NOT_NEGATIVE: True}
"""Conditions that look at the highest bit alone, where it is 0 that is compared with: whether it is to be clear."""
EQUALITY: Final = (EQ, NE)
"""Members of an enumeration are slow to reach, and the interpretation asks for these at every branch."""
_SEEN: Final = (Content, Word, Named, Masked)
"""What a word may be that is exchanged by what was read of it."""
Outcome = tuple[int, bool]
"""The site of an attempt, and whether it succeeded."""


def plain(branch: Branch, state: State) -> tuple[Branch, Flags | None]:
    """A branch and what it looks at; one that looks at a bit of a register as one that looks at flags."""
    if branch.bit is None:
        return branch, compared(branch, state)
    register, number, is_set = branch.bit
    flags = Flags("test", state.register(register.name), Value(None, 1 << number), 64)
    return Branch(NE if is_set else EQ, branch.target), flags


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
            return flags if branch.condition in EQUALITY else None
        return flags._replace(kind="cmp", right=ZERO, bits=width)
    return flags


class Look(NamedTuple):
    """A branch on bits of a word: which they are, and whether it is taken where they are clear."""

    value: Value
    mask: Value
    if_clear: bool


def look(branch: Branch, flags: Flags | None) -> Look | None:
    """The bits that a branch looks at, if it looks at bits."""
    if flags is None or flags.kind not in ("test", "cmp"):
        return None
    left, right, condition = flags.left, flags.right, branch.condition
    if flags.kind == "test":
        is_word = isinstance(left.base, Old) or right.base is None or isinstance(right.base, Entry)
        left, right = (left, right) if is_word else (right, left)
        return Look(left, right, condition is EQ) if condition in EQUALITY else None
    if right != ZERO:
        return None
    if condition in EQUALITY:
        if flags.bits == 1:
            return Look(left, Value(None, 1), condition is EQ)
        base = left.base
        is_part = isinstance(base, Masked) and not base.inverted and left.offset == 0
        return Look(base.of, base.mask, condition is EQ) if is_part and isinstance(base, Masked) else None
    if condition in _SIGN:
        return Look(left, Value(None, 1 << (flags.bits - 1)), _SIGN[condition])
    return None


def _without(base: Masked, bits: Value) -> bool:
    """These bits are clear in what a mask has left."""
    if base.inverted and base.mask == bits:
        return True
    if base.mask.base is not None or bits.base is not None:
        return False
    kept = ~base.mask.offset if base.inverted else base.mask.offset
    return bits.offset & kept == 0


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
    if isinstance(other.base, Old):
        value, other = other, value
    if isinstance(value.base, Old) and isinstance(other.base, _SEEN) and value.offset == 0 and flags.bits > 1:
        state.known[value.base.site] = other
    if value.base is None or other.base is not None or flags.bits == 1:
        return
    if isinstance(value.base, Old):
        state.known[value.base.site] = Value(None, other.offset - value.offset)
    state.replace(value, other)
    if isinstance(value.base, Entry) and value.offset == 0 and value.base.register not in state.registers:
        state.registers[value.base.register] = other


def _whole(value: Value) -> Value:
    """What a part is of."""
    while isinstance(value.base, Part | Masked):
        value = value.base.of
    return value


def _served(other: Value, ticket: Value, *, is_part: bool) -> Value | None:
    """The word that a ticket is compared with, if that lies beside it, or is a part of the word itself."""
    base = _whole(other).base
    if not isinstance(base, Content | Word) or base.base != ticket.base:
        return None
    distance = abs(base.offset - ticket.offset)
    return Value(base.base, base.offset) if distance <= _BESIDE and (distance or is_part) else None


def exclusive(stores: Value | None, state: State) -> tuple[AtomicKind, Value | None, int]:
    """What a load- and a store-exclusive do together, and the site of the load, which names the old value."""
    load = state.reserved
    if load in state.known:
        return AtomicKind.COMPARE_SWAP, state.known[load], load
    if stores is not None and isinstance(stores.base, Joined) and stores.base.of == Value(Old(load), 0):
        return AtomicKind.SET_BITS, None, load
    if stores is not None and isinstance(stores.base, Masked) and stores.base.of == Value(Old(load), 0):
        return AtomicKind.CLEAR_BITS, None, load
    if stores is not None and isinstance(stores.base, Old):
        return AtomicKind.ADD, None, load
    if stores is not None and isinstance(stores.base, Named | Joined | Masked | Part):
        return AtomicKind.OTHER, None, load
    return AtomicKind.SWAP, None, load


class Attempts:
    """The attempts of one function, by site: what each tries, in which block, and where its failure leads."""

    def __init__(self) -> None:
        self.known: dict[int, Attempt] = {}
        self.blocks: dict[int, int] = {}
        self.failing: dict[int, set[int]] = {}
        self.won: dict[int, set[tuple[int, int]]] = {}
        """The edges on which each is shown to have succeeded."""
        self.looks: dict[int, set[tuple[int, int]]] = {}
        """Of tickets: the blocks that compare them, and where these lead when it is not yet their turn."""
        self.zero: dict[Value, set[int]] = {}
        """Where looks at a word lead that find it 0,"""
        self.nonzero: dict[Value, set[tuple[int, int]]] = {}
        """and the edges on which they find it to be something else."""
        self.taken: dict[Masked, set[int]] = {}
        """Where looks at a word lead that find its bits set, by what the word is where they are clear."""

    def note(self, site: int, attempt: Attempt, block: int) -> None:
        """An attempt that has been met."""
        self.known[site] = attempt
        self.blocks[site] = block

    def at_same_lock(self, site: int) -> set[int]:
        """The attempts at what one tries, itself included."""
        attempt = self.known.get(site)
        return {site, *(s for s, each in self.known.items() if attempt is not None and each.address == attempt.address)}

    def note_outcome(self, outcome: Outcome | None, block: int, target: int) -> None:
        """One side of the branch that ends a block, if it is where an attempt has succeeded, or failed."""
        if outcome is None:
            return
        if outcome[1]:
            self.won.setdefault(outcome[0], set()).add((block, target))
            return
        attempt = self.known.get(outcome[0])
        if attempt is not None and attempt.is_looked_at:
            return  # the word has changed, which says nothing of the bit
        self.failing.setdefault(outcome[0], set()).add(target)
        if attempt is not None and attempt.kind == "ticket":
            self.looks.setdefault(outcome[0], set()).add((block, target))

    def tried(
        self,
        site: int,
        kind: AtomicKind,
        address: Value,
        stores: Value | None,
        expects: Value | None,
        state: State,
        *,
        by_status: bool,
    ) -> Attempt | None:
        """What an atomic operation attempts, if that may be a lock."""
        attempt = Attempt(address, "spin", by_status=by_status)
        match kind:
            case AtomicKind.COMPARE_SWAP if expects == ZERO:
                return attempt if stores != ZERO else None
            case AtomicKind.COMPARE_SWAP if expects is not None:
                attempt = attempt._replace(is_token=False)
                return self._taking(site, attempt, stores, expects) or self._setting(
                    site, attempt, stores, expects, state
                )
            case AtomicKind.SWAP if stores != ZERO:
                return attempt._replace(is_token=stores is not None and stores.base is None)
            case AtomicKind.SET_BITS:
                return attempt._replace(bits=stores)
            case AtomicKind.ADD:
                return Attempt(address, "ticket", is_token=False, drawn=address)
        return None

    def _setting(
        self, site: int, attempt: Attempt, stores: Value | None, expects: Value, state: State
    ) -> Attempt | None:
        """The attempt of a compare-and-swap that sets bits of what it expects; none where these may be set already."""
        if stores is None or not isinstance(stores.base, Joined) or stores.base.of != expects:
            return None
        bits = stores.base.mask
        if isinstance(expects.base, Masked):
            return attempt._replace(was=expects) if _without(expects.base, bits) else None
        clear = Masked(expects, bits, True)
        if clear in state.clear:
            self.failing.setdefault(site, set()).update(self.taken.get(clear, ()))
            return attempt._replace(was=expects, is_looked_at=True)
        return attempt._replace(was=expects, bits=bits)

    def _taking(self, site: int, attempt: Attempt, stores: Value | None, expects: Value) -> Attempt | None:
        """The attempt of a compare-and-swap that counts a word down, which was seen not to be 0: a permit is taken."""
        counted = expects.base
        is_word = isinstance(counted, Content | Word) and Value(counted.base, counted.offset) == attempt.address
        if not is_word or stores != Value(counted, expects.offset - 1) or expects not in self.zero:
            return None
        self.failing.setdefault(site, set()).update(self.zero[expects])
        return attempt._replace(kind="permit", was=expects, is_looked_at=True)

    def note_zero(self, branch: Branch, flags: Flags | None, block: int, target: int | None, after: int) -> None:
        """Where a branch leads if the word that it looks at is 0, and where if not: to `target`, or on."""
        if flags is None or flags.kind != "cmp" or flags.right != ZERO or branch.condition not in EQUALITY:
            return
        if isinstance(flags.left.base, Content | Word) and target is not None:
            zero, other = (target, after) if branch.condition is EQ else (after, target)
            self.zero.setdefault(flags.left, set()).add(zero)
            self.nonzero.setdefault(flags.left, set()).add((block, other))

    def hopes(self, site: int) -> set[tuple[int, int]]:
        """The edges that are taken only where the lock is got, or was seen to be free."""
        attempt = self.known.get(site)
        counted = attempt.was if attempt is not None and attempt.kind == "permit" else None
        return self.won.get(site, set()) | (self.nonzero.get(counted, set()) if counted is not None else set())

    def comes_back(self, site: int, successors: Mapping[int, set[int]]) -> bool:
        """Who has failed may come to the attempt again."""
        frontier, seen = set(self.failing.get(site, ())), set[int]()
        while frontier and len(seen) < _FAR:
            seen |= frontier
            frontier = {n for b in frontier for n in successors.get(b, ())} - seen
        return self.blocks[site] in seen | frontier

    def exchanged(self, branch: Branch, flags: Flags | None, *, taken: bool) -> int:
        """The site of a compare-and-swap that sets bits, on the side where it is shown to have stored; else 0."""
        if flags is None or branch.condition not in EQUALITY:
            return 0
        equal = (branch.condition is EQ) is taken
        won = flags.left.base
        if isinstance(won, Won) and flags.kind == "cmp" and flags.right == ZERO:
            attempt = self.known.get(won.site)
            is_mine = attempt is not None and attempt.bits is not None and attempt.was is not None
            return won.site if is_mine and equal is won.inverted else 0
        if not equal:
            return 0
        bases = (flags.left.base, flags.right.base)
        sites = [flags.site] if flags.kind == "won" else [b.site for b in bases if isinstance(b, Old | Status)]
        for site in sites:
            attempt = self.known.get(site)
            if attempt is not None and attempt.bits is not None and attempt.was is not None:
                told = flags.right == ZERO if attempt.by_status else attempt.was in (flags.left, flags.right)
                return site if told or flags.kind == "won" else 0
        return 0

    def note_look(self, found: Look, target: int) -> Masked | None:
        """Where a look leads that finds bits set; the fact that the other side knows."""
        if not isinstance(found.value.base, _SEEN):
            return None
        clear = Masked(*found[:2], inverted=True)
        self.taken.setdefault(clear, set()).add(target)
        return clear

    def outcome(self, branch: Branch, flags: Flags | None, *, taken: bool) -> Outcome | None:
        """What one side of a branch tells, by what the branch looks at."""
        if flags is None:
            return None
        if (seen := look(branch, flags)) is not None:
            base = seen.value.base
            attempt = self.known.get(base.site) if isinstance(base, Old) else None
            if isinstance(base, Old) and attempt is not None and attempt.bits is not None:
                return (base.site, seen.if_clear is taken) if attempt.bits == seen.mask else None
        if flags.kind == "bit":
            if branch.condition in (Condition.BELOW, Condition.ABOVE_EQ):
                return flags.site, (branch.condition is Condition.ABOVE_EQ) is taken
            return None
        if branch.condition not in EQUALITY or flags.kind == "both":
            return None
        equal = (branch.condition is EQ) is taken
        if flags.kind == "won":
            attempt = self.known.get(flags.site)
            return None if attempt is not None and attempt.bits is not None else (flags.site, equal)
        if flags.kind != "cmp":
            return None
        return self.tested(flags.left, flags.right, equal=equal) or self.tested(flags.right, flags.left, equal=equal)

    def tested(self, value: Value, other: Value, *, equal: bool) -> Outcome | None:
        """(site of an attempt, whether it succeeded) if a value equals another, or does not."""
        base = _whole(value).base
        if isinstance(base, Won) and (won := self.known.get(base.site)) is not None and won.bits is not None:
            return None  # it has stored, which does not tell what it found
        if isinstance(base, Won) and other.base is None:
            return base.site, (equal is (other.offset != 0)) is not base.inverted
        if not isinstance(base, Old | Status):
            return None
        attempt = self.known.get(base.site)
        if attempt is not None and attempt.kind == "ticket":
            return self._turn_of(base.site, attempt, value, other, equal=equal)
        if base is not value.base:
            return None
        if attempt is not None and attempt.is_told_by(other):
            return base.site, equal
        if other.base is not None or value.offset != 0:
            return None
        if isinstance(base, Status):
            told = attempt is not None and attempt.by_status and attempt.bits is None
            return (base.site, equal) if told else None
        if attempt is None or attempt.by_status:  # a look before the attempt can only show that it would fail
            return None if equal else (base.site, False)
        if other.offset == attempt.expected:
            return base.site, equal
        if not equal and other.offset == errno.EBUSY and attempt.kind in _RETURN_ERRORS:
            return base.site, True
        return (base.site, False) if equal else None

    def _turn_of(self, site: int, attempt: Attempt, ticket: Value, other: Value, *, equal: bool) -> Outcome | None:
        """Whether it is a ticket's turn. The lock is known by the word that says whose turn it is: that releases it."""
        is_part = isinstance(ticket.base, Part)
        if _whole(other).base == Old(site):
            return (site, equal) if is_part is not isinstance(other.base, Part) else None
        served = _served(other, attempt.drawn, is_part=is_part)
        if served is None:
            return None
        self.known[site] = attempt._replace(address=served)
        return site, equal

    def waits_after_failure(
        self, site: int, block: int, waiting: set[int], successors: Mapping[int, set[int]], *, may_repeat: bool
    ) -> bool:
        """The failing side of what is tried in a block waits, or comes back to it."""
        frontier, seen = set(self.failing.get(site, ())), set[int]()
        attempt = self.known.get(site)
        rounds = _NEAR if attempt is not None and attempt.is_looked_at else _FAR
        while frontier and len(seen) < _FAR:
            if frontier & waiting or (may_repeat and rounds and block in frontier):
                return True
            rounds -= bool(rounds)
            seen |= frontier
            frontier = {n for b in frontier for n in successors.get(b, ())} - seen
        return False

    def waits_for_turn(self, site: int, waiting: set[int], successors: Mapping[int, set[int]], ends: set[int]) -> bool:
        """Who has a ticket goes on when it is its turn only: all ways lead back to look again, or to a wait elsewhere.

        One who gives up after so many looks has waited for nothing.
        """
        looks = {block for block, _ in self.looks.get(site, ())}
        for _, target in self.looks.get(site, ()):
            frontier, seen = {target}, set[int]()
            while frontier and len(seen) < _FAR:
                seen |= frontier
                frontier = {n for b in frontier - looks for n in successors.get(b, ())} - seen
            does_end = bool(frontier or seen & ends or (self.blocks[site] in seen and self.blocks[site] != target))
            if does_end and (seen & looks or not seen & waiting):
                return False
        return bool(looks)
