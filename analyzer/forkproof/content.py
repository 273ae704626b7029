"""What an analysis of some objects can depend on, as one digest.

Owns: which objects the code of others leads to, and the key of what was found about them.
Takes: `Flow`, numbers of objects. Gives: `Part`: a key, and names of functions and addresses that mean the same in
      every program that has these objects.
Must never: leave out what an analysis can read. It follows calls forward, so it reads the bytes, the separate debug
      files and the outgoing edges of objects that calls lead to, and what the words that ld.so fills hold. Of these, an
      analysis must take a symbol that the object defines for that one, wherever it is bound (a copy relocation: each
      program has its copy of libc's variable), and one that is bound outside of the part for unbound.

A libc whose malloc an allocator replaces leads to that allocator: it is another part than the same libc alone, and
programs that share both share what is known of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from forkproof.callgraph import CallGraph
from forkproof.program import Function

if TYPE_CHECKING:
    from forkproof.flow import Flow

_STT_OBJECT: Final = 1
Place = tuple[int, int]
"""An object, by its number in the part, and an address in it."""


@dataclass(frozen=True, eq=False)
class Part:
    """Objects of a program from which no call leads out, in the order of loading."""

    graph: CallGraph
    objects: tuple[int, ...]
    key: str

    def holds(self, function: Function) -> bool:
        """The function is in the part."""
        return self.graph.program.object_of(function) in self.objects

    def place(self, function: Function) -> Place:
        """A function in terms of the part. ValueError for one that is not in it."""
        obj = self.graph.program.object_of(function)
        return self.objects.index(obj), self.graph.program.rva_of(function)

    def functions(self, places: Iterable[Place]) -> list[Function]:
        """The functions at these places."""
        rows = np.array(list(places), np.int64).reshape(-1, 2)
        objects = np.array(self.objects, np.int64)[rows[:, 0]]
        found: list[Function] = self.graph.program.functions(objects, rows[:, 1]).tolist()
        return found


def part_of(flow: Flow, roots: Iterable[int], *told: object, outwards: bool = False) -> Part:
    """The objects that the code of `roots` leads to, with a key over all that they are made of and `told`.

    `outwards`: the analysis follows what words hold, so what ld.so binds words of the roots to is part of it as well.
    """
    graph, copied = flow.graph, list[tuple[int, int, str]]()
    roots = _bound(flow, roots, copied) if outwards else roots
    objects = _led_to(graph, roots)
    digest = hashlib.sha256(repr(told).encode("utf-8", "surrogatepass"))
    for obj in objects:
        _describe(flow, obj, objects, digest)
    names = flow.program.closure.objects
    digest.update(repr([(names[obj].name, slot, name) for obj, slot, name in sorted(copied)]).encode())
    return Part(graph, objects, digest.hexdigest())


def _bound(flow: Flow, roots: Iterable[int], copied: list[tuple[int, int, str]]) -> tuple[int, ...]:
    """The roots, and the objects that ld.so binds their words to, and those of these.

    The copy that a program has of a variable of another object is `copied` by its name: (object, slot, name), for the
    roots. Code of the part that stores there is none of the program's.
    """
    program, found, pending = flow.program, set[int](), list(roots)
    own = frozenset(pending)
    while pending:
        obj = pending.pop()
        if obj in found:
            continue
        found.add(obj)
        image = program.image(obj)
        for slot, symbol in image.slot_symbols.items():
            binding = program.bindings.resolve(obj, symbol)
            if binding is None or binding.object in found:
                continue
            name = image.dynamic_symbols.names[symbol]
            if binding.object == 0 and any(_has_variable(flow, other, name) for other in range(1, len(program.codes))):
                copied += [(obj, slot, name)] if obj in own else []
            else:
                pending.append(binding.object)
    return tuple(sorted(found))


def _has_variable(flow: Flow, obj: int, name: str) -> bool:
    table = flow.program.image(obj).dynamic_symbols
    return any(table.defined[s] and table.type[s] == _STT_OBJECT for s in table.by_name.get(name, ()))


def _rows(graph: CallGraph, obj: int) -> slice:
    """The edges that leave an object."""
    base = graph.program.base
    first, last = graph.source.searchsorted([base[obj], base[obj + 1]])
    return slice(int(first), int(last))


def _led_to(graph: CallGraph, roots: Iterable[int]) -> tuple[int, ...]:
    found, pending = set[int](), list(roots)
    while pending:
        obj = pending.pop()
        if obj not in found:
            found.add(obj)
            targets = graph.target[_rows(graph, obj)]
            pending += np.unique(graph.program.base.searchsorted(targets, side="right") - 1).tolist()
    return tuple(sorted(found))


def _describe(flow: Flow, obj: int, objects: tuple[int, ...], digest: hashlib._Hash) -> None:
    """Feed everything about one object to a digest."""
    graph, program = flow.graph, flow.graph.program
    image, rows = program.image(obj), _rows(graph, obj)
    digest.update(f"{program.closure.objects[obj].name}\0{image.sha256}\0{program.names[obj].debug_digests}\0".encode())
    homes = program.base.searchsorted(graph.target[rows], side="right") - 1
    numbers = np.array(objects, np.int64).searchsorted(homes)
    for column in (graph.source[rows] - program.base[obj], numbers, graph.target[rows] - program.base[homes]):
        digest.update(np.ascontiguousarray(column, np.int64).tobytes())
    digest.update(graph.site[rows].tobytes() + graph.kind[rows].tobytes())
    table = image.dynamic_symbols
    foreign = [(slot, s) for slot, s in sorted(image.slot_symbols.items()) if s < len(table) and not table.defined[s]]
    bound = [(slot, program.bindings.resolve(obj, symbol)) for slot, symbol in foreign]
    known = [(s, objects.index(b.object), b.rva) for s, b in bound if b is not None and b.object in objects]
    digest.update(repr(known).encode())
