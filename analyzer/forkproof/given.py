"""What functions that run later are given: the arguments of threads, the objects of exit handlers.

Owns: exit handlers (atexit, destructors), and the data that a start of a thread or a registration passes along.
Takes: `Flow`. Gives: `ExitHandler`s, and arguments by function.
Must never: give an argument that one caller of several passes as the only one.
Wrong where: data is made again and again at one place (then all of it is one); where a handler is registered by a
      function that passes it on from further away than one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from forkproof.arguments import address_arguments, data_arguments
from forkproof.callgraph import CALLS, EdgeKind, Start
from forkproof.code.state import State
from forkproof.code.values import Entry, Result, Word
from forkproof.code.values import Value as KnownValue
from forkproof.flow import Flow
from forkproof.locks.values import Content, Made, Object, Value
from forkproof.program import Function

_REGISTRARS: Final = ("atexit", "__cxa_atexit", "on_exit")
_DATA: Final = 1
"""Which argument of those is passed on to the handler."""


@dataclass(frozen=True, slots=True)
class ExitHandler:
    """A function that exit runs."""

    function: Function
    registered_by: Function | None
    """None: the object's file lists it as a destructor."""


class Given:
    """Functions that others start or keep for later, in one program."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.graph, self.program = flow, flow.graph, flow.program

    @cached_property
    def exit_handlers(self) -> tuple[ExitHandler, ...]:
        """What exit runs, the destructors of objects included."""
        listed = [
            ExitHandler(function, None)
            for item in self.program.closure.objects
            for rva in item.image.destructors
            if (function := self.program.function(item.index, rva)) is not None
        ]
        return (*dict.fromkeys([h for h, _ in self._registered] + listed),)

    @cached_property
    def arguments(self) -> Mapping[Function, frozenset[Value]]:
        """The first arguments of threads and exit handlers that code passes as constants, from variables, or made."""
        found: dict[Function, set[Value]] = {}
        for handler, value in self._registered:
            if value is not None:
                found.setdefault(handler.function, set()).add(value)
        for function, value in self._started():
            found.setdefault(function, set()).add(value)
        return {function: frozenset(values) for function, values in found.items()}

    @cached_property
    def _registered(self) -> list[tuple[ExitHandler, Value | None]]:
        registrars = set(self.program.called(_REGISTRARS))
        registrars |= {f for f in self._callers(registrars) if self._passes_on(f, registrars)}
        found: list[tuple[ExitHandler, Value | None]] = []
        for obj, edges in self._by_object([e for f in registrars for e in self._calls_of(f)]).items():
            sites = self.graph.site[np.array(edges, np.int64)]
            handlers = address_arguments(self.program, obj, sites, 0).tolist()
            data = self._data(obj, edges, _DATA)
            for edge, handler in zip(edges, handlers, strict=True):
                if handler >= 0:
                    by = self.flow.whole(Function(int(self.graph.source[edge])))
                    value = data.get(int(self.graph.site[edge]))
                    found.append((ExitHandler(Function(handler), by), value))
        return sorted(found, key=repr)

    def _started(self) -> Iterator[tuple[Function, Value]]:
        graph, starters = self.graph, self.flow.signatures.thread_starters
        named = {f: starters[n] for f, n in self.program.called(sorted(starters)).items()}
        starts = np.flatnonzero(graph.kind == EdgeKind.THREAD).tolist()
        for obj, edges in self._by_object(starts).items():
            places: dict[int, set[int]] = {}
            for edge in edges:
                called = self.flow.edges_at(self.flow.whole(Function(int(graph.source[edge]))), int(graph.site[edge]))
                starting = [named[t] for e in called if (t := Function(int(graph.target[e]))) in named]
                places[edge] = {starter.data for starter in starting if starter.data is not None}
            asked = {place: [e for e in edges if place in places[e]] for place in set().union(*places.values())}
            data = {place: self._data(obj, asked[place], place) for place in sorted(asked)}
            for edge in edges:
                site, source = int(graph.site[edge]), Function(int(graph.source[edge]))
                begin = Function(int(graph.target[edge]))
                values = [data[place].get(site) for place in sorted(places[edge])]
                given = graph.given.get(Start(source, site, begin)) if not places[edge] else None
                if given is not None:
                    function = self.flow.whole(source)
                    values.append(
                        self._as_address(given[0], function, given[1], self.flow.state_before(function, site))
                    )
                yield from ((begin, value) for value in values if value is not None)

    def _data(self, obj: int, edges: list[int], argument: int) -> dict[int, Value]:
        """What calls pass, by site: an address that an instruction forms nearby, or that the function keeps."""
        graph, place = self.graph, Object(obj)
        passed = data_arguments(self.program, obj, graph.site[np.array(edges, np.int64)], argument)
        found = {s: Value(Content(place, a), 0) if is_load else Value(place, a) for s, (a, is_load) in passed.items()}
        for edge in edges:
            site, function = int(graph.site[edge]), self.flow.whole(Function(int(graph.source[edge])))
            state = self.flow.state_before(function, site) if site not in found else None
            value = state.register(self.flow.convention.arguments[argument]) if state is not None else None
            address = None if state is None or value is None else self._as_address(obj, function, value, state)
            if address is not None:
                found[site] = address
        return found

    def _as_address(self, obj: int, function: Function, value: KnownValue, state: State | None) -> Value | None:
        """A variable, what one holds, or an object that the function makes."""
        if value.base is None:
            return Value(Object(obj), value.offset) if self.program.image(obj).is_writable(value.offset) else None
        if isinstance(value.base, Word):
            return Value(Content(Object(obj), value.base.address), value.offset)
        if isinstance(value.base, Result) or value.base == Entry(self.flow.convention.stack):
            kept = None if state is None else self.kept_in(obj, state, value)
            return kept or _made(function, value)
        return None

    def kept_in(self, obj: int, state: State, value: KnownValue) -> Value | None:
        """A variable that holds the same: what the function has stored there before."""
        image = self.program.image(obj)
        cells = (
            a
            for (base, a), held in state.cells.items()
            if base is None and held is not None and held.value.base == value.base and held.value.offset == 0
        )
        kept = min((a for a in cells if image.is_writable(a)), default=None)
        return None if kept is None else Value(Content(Object(obj), kept), value.offset)

    def by_callers(self, function: Function) -> frozenset[Value]:
        """What callers pass first, where each passes a variable, or an object that it has made."""
        found = set[Value]()
        for obj, edges in self._by_object(self._calls_of(function)).items():
            data = self._data(obj, edges, 0)
            if len(data) < len(edges):
                return frozenset()
            found.update(data.values())
        return frozenset(found)

    def _calls_of(self, function: Function) -> list[int]:
        return [e for e in self.graph.edges_to(function) if int(self.graph.kind[e]) in CALLS]

    def _callers(self, functions: set[Function]) -> set[Function]:
        return {self.flow.whole(Function(int(self.graph.source[e]))) for f in functions for e in self._calls_of(f)}

    def _passes_on(self, function: Function, registrars: set[Function]) -> bool:
        """It registers its own first parameter: libc's static atexit, which has no name in a stripped file."""
        sites = {int(self.graph.site[e]) for e in self.flow.outgoing(function) if self.graph.target[e] in registrars}
        states = self.flow.states(function, sites) if len(self.flow.body(function).instructions) < _SMALL else {}
        return any(self.flow.passed(function, state, 0).parameter == 0 for state in states.values())

    def _by_object(self, edges: list[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for edge in edges:
            found.setdefault(self.program.object_of(Function(int(self.graph.source[edge]))), []).append(edge)
        return {obj: sorted(found[obj], key=lambda e: int(self.graph.site[e])) for obj in sorted(found)}


def _made(function: Function, value: KnownValue) -> Value:
    return Value(Made(function, value.base.site if isinstance(value.base, Result) else -1), value.offset)


_SMALL: Final = 64
"""Instructions of a function that only passes a handler on, at most."""
