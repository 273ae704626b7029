"""Blocks of memory that a function fills: a lock that lies in one is new afterwards.

Owns: which calls and instructions fill how much, from where on.
Takes: `Flow`. Gives: the words of each block, as values of `explore`.
Must never: name a block of which the beginning or the length is not a constant.
Wrong where: a block is longer than `_LONGEST` (the rest is left out); where it is filled with locks that are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Final, NamedTuple

from forkproof.code.decode import listing
from forkproof.code.operations import Forget, Register
from forkproof.code.values import Value, constant
from forkproof.elf.image import Machine
from forkproof.flow import Flow
from forkproof.program import Function

_LONGEST: Final = 1 << 14
_WORD: Final = 4
_STRINGS: Final = frozenset({"stos", "movs"})
_WIDTHS: Final = {"b": 1, "w": 2, "d": 4, "q": 8}


class _Fill(NamedTuple):
    """The registers that have the beginning and the count, and the bytes that are counted."""

    begin: str
    counter: str
    width: int


class Filled:
    """Asked of one function after the other."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def by(self, function: Function) -> Iterator[tuple[int, list[Value]]]:
        """Where a function fills a block of constant length, and each word of that."""
        fills = {**self._calls(function), **self._strings(function)}
        for site, state in self.flow.states(function, fills).items() if fills else ():
            start, count = state.register(fills[site].begin), constant(state.register(fills[site].counter))
            if start is not None and count is not None:
                size = min(count * fills[site].width, _LONGEST)
                yield site, [start._replace(offset=start.offset + at) for at in range(0, size - _WORD + 1, _WORD)]

    @cached_property
    def _filling(self) -> dict[Function, _Fill]:
        known, arguments = self.flow.signatures.fills, self.flow.convention.arguments
        called = self.flow.program.called(sorted(known))
        return {f: _Fill(arguments[known[n].block], arguments[known[n].length], 1) for f, n in called.items()}

    def _calls(self, function: Function) -> dict[int, _Fill]:
        graph = self.flow.graph
        rows = ((int(graph.site[e]), Function(int(graph.target[e]))) for e in self.flow.outgoing(function))
        return {site: self._filling[target] for site, target in rows if target in self._filling}

    def _strings(self, function: Function) -> dict[int, _Fill]:
        """x86-64's repeated string instructions, of which operations only say that rdi moves."""
        found: dict[int, _Fill] = {}
        if self.flow.machine is not Machine.X86_64:
            return found
        image = self.flow.program.image(self.flow.program.object_of(function))
        for address, size, operations in self.flow.body(function).instructions:
            if Forget(Register("rdi")) in operations:
                ((_, _, name, _),) = listing(image.read(address, size).tobytes(), address, image.machine)
                prefix, _, string = name.partition(" ")
                if prefix == "rep" and string[:-1] in _STRINGS:
                    found[address] = _Fill("rdi", "rcx", _WIDTHS[string[-1]])
        return found
