"""Which blocks of a function are still to be followed, and with what.

Owns: the states in which blocks are entered, apart by what is held there, and the order in which blocks are followed.
Takes: arrivals. Gives: the next block with what is held in it and its state.
Must never: know what an instruction does.
Wrong where: more than `_KEYS` different sets of held locks meet at one block (the rest are joined).
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from forkproof.code.decode import Body
from forkproof.locks.runs import NOTHING, Held
from forkproof.locks.state import Joins, State
from forkproof.locks.values import Element, Object, Value

KEYS: Final = 8
"""Sets of held locks that are told apart."""
_VISITS: Final = 4
"""Joins at one block under one set before everything in registers is named anew."""
_Key = tuple[int, Held, int]
"""A block, what is held there, and the attempt whose outcome is still open."""


class Worklist:
    """The blocks of one run."""

    def __init__(self, body: Body, joins: Joins, *, joined: bool) -> None:
        """`joined`: one state a block, in which what any way to it holds is held."""
        self.body, self.joins = body, joins
        self.ranks = body.ranks
        self.block = 0
        """The one that is followed now, by position."""
        self._union: dict[_Key, Held] | None = {} if joined else None
        self._inputs: dict[_Key, State] = {}
        self._keys: dict[int, list[_Key]] = {}
        self._visits: dict[_Key, int] = {}
        self._pending: list[tuple[int, int, _Key]] = []
        self._queued: set[_Key] = set()
        self._order = 0

    def __bool__(self) -> bool:
        return bool(self._pending)

    def next(self) -> tuple[int, Held, State]:
        """The block that comes first, what is held in it, and a state that is the caller's own."""
        _, _, key = heappop(self._pending)
        self._queued.discard(key)
        self.block, held, _ = key
        if self._union is not None:
            held = self._union[key]
        return self.block, held, self._inputs[key].copy()

    def enter(self, position: int, held: Held, state: State) -> None:
        """Arrive at a block; it is followed again where that teaches something new."""
        if position >= len(self.body.instructions):
            return
        if held and self.ranks[position] <= self.ranks[self.block]:
            held = self._widened(position, held, state)
        key = position, held, state.pending
        grown = False
        if self._union is not None:
            key = position, NOTHING, 0
            before = self._union.get(key, NOTHING)
            self._union[key] = before | held
            grown = not held <= before
        old = self._inputs.get(key)
        if old is None:
            known = self._keys.setdefault(position, [])
            if len(known) >= KEYS:
                key = known[0]
                old = self._inputs[key]
            else:
                known.append(key)
        if old is None:
            self._inputs[key] = state  # whoever brings it goes on with a copy
        else:
            self._visits[key] = self._visits.get(key, 0) + 1
            if not self.joins.join(old, state, position, keep=self._visits[key] <= _VISITS) and not grown:
                return
        if key not in self._queued:
            self._queued.add(key)
            self._order += 1
            # What leads to a block comes before it: by address, code that lies apart was followed twice as often.
            heappush(self._pending, (self.ranks[position], self._order, key))

    def _widened(self, position: int, held: Held, state: State) -> Held:
        """A loop that has locked what a register pointed to, and moved on by a step, locks the elements of an array."""
        known = self._keys.get(position, ())
        if self._union is not None:
            old = next((self._inputs[k] for k in known if self._union[k] < held), None)
        else:
            old = next((self._inputs[k] for k in known if k[1] < held), None)
        if old is None:
            return held
        for name, now in list(state.registers.items()):
            before = old.registers.get(name)
            if before is None or before.base != now.base or before == now or before not in held:
                continue
            if isinstance(now.base, Object) or self.joins.is_pointer(now.base):
                element = Value(Element(before.base, before.offset, abs(now.offset - before.offset)), 0)
                state.registers[name] = element
                held = (held - {before}) | {element}
        return held
