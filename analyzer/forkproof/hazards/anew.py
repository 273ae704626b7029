"""Objects that a child has made anew before it asks for their locks: `logger = new Logger`, then `logger->log()`.

Owns: whether the pointer by which a lock is reached holds an object of the child's own when the child asks.
Takes: `Flow` and the child's levels. Gives: yes or no for a place in the child's own code.
Must never: say yes where some way to the place leaves the pointer as it was: what is made only if there is none is no
      new object, for the parent has made it when a thread of it has the lock.
Wrong where: a call between changes the pointer again; where the memory of the old object is used again as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final

from forkproof.callgraph import CERTAIN
from forkproof.code.explore import CallEffect, explore
from forkproof.code.operations import Return
from forkproof.code.state import State
from forkproof.code.values import Entry, Result, Word
from forkproof.code.values import Value as KnownValue
from forkproof.flow import Flow
from forkproof.forks import Level
from forkproof.hazards.evidence import comes_first
from forkproof.locks.values import Content, Object, Value
from forkproof.program import Function

_NEAR: Final = 2
"""Calls between a function and the allocation, or the store, that it is there for, at most."""
_SETTER: Final = 64
"""Bytes of a function that may do no more than keep what it is passed."""
_MEMORY: Final = 1 << 44
"""Numbers from here on stand for memory that an allocation has just given: no code holds such."""


class Anew:
    """Answers for one fork window."""

    def __init__(self, flow: Flow, levels: Sequence[Level]) -> None:
        self.flow, self.graph, self.levels = flow, flow.graph, levels
        self._putting: dict[tuple[Function, int], KnownValue | None] = {}
        self._fresh: dict[Function, bool] = {}

    def is_new(self, address: Value, depth: int, site: int, *, is_own: bool) -> bool:
        """When the child comes to a site of a level, the pointer that leads to a lock holds an object of its own.

        `is_own`: that is where the function itself names the lock, perhaps by what it has loaded before.
        """
        word = _pointer(address)
        level = self.levels[depth]
        if word is None or self.flow.program.object_of(level.function) != word[0] or not self._stores(level):
            return False
        state = self._states(level).get(site)
        if state is not None and self._holds_new(level.function, state, word[1]):
            return not is_own or self._passes_new(level.function, state, word[1])
        return not is_own and self._is_replaced_below(level, site, word[1])

    def constants(self, depth: int, site: int) -> Mapping[int, int]:
        """What the child has stored into variables of its object when it comes to a site of a level: constants only."""
        state = self._states(self.levels[depth]).get(site)
        cells = state.cells.items() if state is not None else ()
        return {
            word: held.value.offset
            for (base, word), held in cells
            if base is None and held is not None and held.value.base is None
        }

    def _stores(self, level: Level) -> bool:
        """The child may allocate there at all: most do not."""
        return any(0 <= int(self.flow.to_memory[self.graph.target[e]]) <= _NEAR for e in level.edges)

    @cached_property
    def _known(self) -> dict[tuple[Function, int], Mapping[int, State]]:
        return {}

    def _states(self, level: Level) -> Mapping[int, State]:
        """What is known before each call that the child makes in a level."""
        key = level.function, level.site
        if key not in self._known:
            sites = frozenset(int(self.graph.site[e]) for e in self.flow.outgoing(level.function))
            self._known[key] = explore(
                self.flow.body(level.function),
                self.flow.machine,
                level.start,
                known={self.flow.convention.result: 0} if level is self.levels[0] else {},
                effects=self.flow.effects(level.function, ending=self.flow.execs),
                watch=sites,
            ).states
        return self._known[key]

    # ---- in one function ---------------------------------------------------------------------

    def _holds_new(self, function: Function, state: State, word: int) -> bool:
        held = state.cells.get((None, word))
        return held is not None and held.bits == 64 and self._is_fresh_value(function, held.value)

    def _passes_new(self, function: Function, state: State, word: int) -> bool:
        """Of what is passed, something lies in the new object, and nothing in the old one."""
        passed = [value for name in self.flow.convention.arguments if (value := state.register(name)) is not None]
        is_old = any(isinstance(v.base, Word) and v.base.address == word for v in passed)
        return not is_old and any(self._is_fresh_value(function, KnownValue(v.base, 0)) for v in passed)

    def _is_fresh_value(self, function: Function, value: KnownValue) -> bool:
        """It is the memory that a call of the function has just got."""
        if value.base is None and value.offset >= _MEMORY:
            return True
        if not isinstance(value.base, Result):
            return False
        targets = [Function(int(self.graph.target[e])) for e in self.flow.edges_at(function, value.base.site)]
        return bool(targets) and all(self._gives_memory(t) for t in targets)

    def _gives_memory(self, function: Function) -> bool:
        """Every way through a function returns memory that it has got: `new_logger()`."""
        function = self.flow.whole(function)
        if function in self.flow.allocating:
            return True
        if function not in self._fresh:
            self._fresh[function] = False  # of what calls itself
            if 0 <= int(self.flow.to_memory[function]) <= _NEAR:
                states = self._at_returns(function).values()
                results = [state.register(self.flow.convention.result) for state in states]
                self._fresh[function] = bool(results) and all(
                    r is not None and (r.base is None or r.offset == 0) and self._is_fresh_value(function, r)
                    for r in results
                )
        return self._fresh[function]

    # ---- by what it calls --------------------------------------------------------------------

    def _is_replaced_below(self, level: Level, site: int, word: int) -> bool:
        """Every way of the child's to a site comes to a call of what surely puts a new object there."""
        calls = {
            int(self.graph.site[e])
            for e in level.edges
            if int(self.graph.kind[e]) in CERTAIN and self._replaces(level, e, word)
        } - {site}
        return bool(calls) and comes_first(self.flow, level, calls, site)

    def _replaces(self, level: Level, edge: int, word: int) -> bool:
        """A call puts a new object there that it has made, or that it is given."""
        put = self._put(self.flow.whole(Function(int(self.graph.target[edge]))), word)
        if put is None or not isinstance(put.base, Entry):
            return put is not None
        state = self._states(level).get(int(self.graph.site[edge]))
        value = state.register(put.base.register) if state is not None else None
        return value is not None and self._is_fresh_value(level.function, value)

    def _put(self, function: Function, word: int) -> KnownValue | None:
        """What a function surely puts into a word: memory that it gets, or what it is passed."""
        key = function, word
        if key not in self._putting:
            is_maker = 0 < int(self.flow.to_memory[function]) <= _NEAR
            near = is_maker or self.flow.program.size_of(function) <= _SETTER
            states = self._at_returns(function).values() if near else ()
            held = [s.cells.get((None, word)) for s in states]
            found = held[0].value if held and held[0] is not None else None
            if is_maker:
                is_sure = all(self._holds_new(function, s, word) for s in states)
            else:
                is_plain = found is not None and isinstance(found.base, Entry) and found.offset == 0
                is_sure = is_plain and len(set(held)) == 1
            self._putting[key] = found if is_sure else None
        return self._putting[key]

    def _at_returns(self, function: Function) -> Mapping[int, State]:
        """What is known where a function returns; nothing of one that ends in a call."""
        body = self.flow.body(function)
        returns = {i.address for i in body.instructions for o in i.operations if isinstance(o, Return)}
        run = self.flow.explored(function)
        if any(transfer.is_jump for transfer in run.transfers) or not run.complete:
            return {}
        usual = self.flow.effects(function)

        def effect(site: int) -> CallEffect:
            """No allocation fails: a function that gives up then does not make the object that it was to make."""
            targets = [Function(int(self.graph.target[e])) for e in self.flow.edges_at(function, site)]
            is_memory = bool(targets) and all(t in self.flow.allocating for t in targets)
            return CallEffect(result=_MEMORY + site) if is_memory else usual(site)

        entry = self.flow.program.rva_of(function)
        return explore(body, self.flow.machine, entry, effects=effect, watch=returns).states


def _pointer(address: Value) -> tuple[int, int] | None:
    """The word of an object's data that leads to a lock, by way of fields or not."""
    base = address.base
    while isinstance(base, Content) and isinstance(base.base, Content):
        base = base.base
    if isinstance(base, Content) and isinstance(base.base, Object):
        return base.base.number, base.offset
    return None
