"""Calls made under a lock that come back for the same lock, in the same thread.

Owns: the search for such calls, function by function, with the lock held on entry.
Takes: `Summaries`, and locks that have one address. Gives: `Reentry`s.
Must never: report a callee that lets the lock go before it takes it again.
Wrong where: a flag that another function has set keeps the second acquisition from being reached (then it is found and
      cannot happen); where the call goes through a table that no instruction nearby names (then it is missed).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from forkproof.callgraph import Function
from forkproof.locks.summary import Step, Summaries
from forkproof.locks.values import Element, Object, Value

_DEEPEST: Final = 16


@dataclass(frozen=True, slots=True)
class Reentry:
    """A way from a function that holds a lock back to an acquisition of it."""

    address: Value
    path: tuple[Step, ...]
    """From the call under the lock to the acquire site."""


class Reentries:
    """The search; remembers what it knows of each function."""

    def __init__(self, summaries: Summaries) -> None:
        self.summaries = summaries
        self._known: dict[tuple[Function, Value], tuple[Step, ...] | None] = {}

    def of(self, addresses: Iterable[Value], among: Iterable[Function]) -> list[Reentry]:
        """The shortest re-entry for each lock, begun in one of these functions."""
        found = []
        functions = sorted(set(among) & self.summaries.runs.keys())
        for address in addresses:
            if not isinstance(address.base, Object) or isinstance(address.base, Element):
                continue
            ways = [way for f in functions for way in self._from(f, address)]
            if ways:
                found.append(Reentry(address, min(ways, key=lambda way: (len(way), way))))
        return found

    def _from(self, function: Function, address: Value) -> list[tuple[Step, ...]]:
        """Ways that begin with a call in a function that has taken the lock itself."""
        run = self.summaries.runs[function]
        return [
            (Step(function, call.site), *way)
            for call in run.calls
            if address in call.held and (way := self._in(Function(call.target), address, 0)) is not None
        ]

    def _in(self, function: Function, address: Value, depth: int) -> tuple[Step, ...] | None:
        """The way from a function that is entered with the lock held to where it waits for it."""
        key = function, address
        if key not in self._known:
            self._known[key] = None  # in a circle of calls: another way will do
            if depth < _DEEPEST and self._can_take(function, address):
                self._known[key] = self._search(function, address, depth)
        return self._known[key]

    def _can_take(self, function: Function, address: Value) -> bool:
        return any(t.blocking and t.address == address for t in self.summaries.of(function).taken)

    def _search(self, function: Function, address: Value, depth: int) -> tuple[Step, ...] | None:
        held = frozenset([address])
        run = self.summaries.interpreted_run(function, held, held)
        if run.again:
            return (Step(function, run.again[0].site),)
        ways = []
        for call in run.calls:
            callee = Function(call.target)
            if address not in call.held:
                continue
            if self._locks_what_it_is_given(callee, call.arguments, address):
                return Step(function, call.site), *self._tail(callee)
            if (way := self._in(callee, address, depth + 1)) is not None:
                ways.append((Step(function, call.site), *way))
        return min(ways, key=lambda way: (len(way), way)) if ways else None

    def _locks_what_it_is_given(self, callee: Function, arguments: tuple[Value, ...], address: Value) -> bool:
        summaries = self.summaries
        return any(
            t.blocking and t.address != address and summaries.replaced(callee, arguments, t.address) == address
            for t in summaries.of(callee).taken
        )

    def _tail(self, callee: Function) -> tuple[Step, ...]:
        taken = min((t for t in self.summaries.of(callee).taken if t.blocking), key=lambda t: len(t.path))
        return taken.path
