"""Fork handlers: who registers which functions, along which calls, and whether that ever happens here.

Owns: the resolution of every call of pthread_atfork / __register_atfork to the three functions that it
      registers, through wrappers that pass their parameters on.
Takes: `Flow`. Gives: `Registration`s.
Must never: take an import for a registration: only a reference that binds registers anything.
Wrong where: a handler is loaded from memory that the program writes at run time (then it is unknown).

Source: pthread_atfork(3); glibc nptl/pthread_atfork.c (a static stub that forwards to
__register_atfork, so that the handlers can be dropped when the object is closed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from forkproof.callgraph import CALLS, Reach
from forkproof.columns import position_in, unique
from forkproof.elf.tables import STB_WEAK
from forkproof.flow import Flow, Passed
from forkproof.program import Function

REGISTRARS: Final = ("__register_atfork", "pthread_atfork")
"""Functions whose first three arguments are prepare, parent and child."""
_MAX_DEPTH: Final = 5


@dataclass(frozen=True, slots=True)
class Handler:
    """One of the three functions of a registration."""

    function: Function | None
    """None when no function is registered, or when it is not known which."""
    is_known: bool


@dataclass(frozen=True, slots=True)
class Registration:
    """One registration of fork handlers."""

    object: int
    symbol: str
    """What the code calls: pthread_atfork or __register_atfork."""
    version: str | None
    binds_to: int | None
    """libc's object that provides it; None where the call never gets there."""
    swallowed_by: int | None
    """Object to which the reference binds instead, when its definition passes nothing on to libc."""
    is_weak: bool
    chain: tuple[tuple[Function, int], ...]
    """(function, site) from the outermost function that fixes the handlers to the call itself."""
    handlers: tuple[Handler, Handler, Handler]
    lacking: str = ""
    """A library that was not found and could define the symbol: whether the call gets to libc is not known."""

    @property
    def outermost(self) -> Function:
        """The function whose call decides which handlers are registered."""
        return self.chain[0][0]

    @property
    def is_effective(self) -> bool:
        """The registration reaches libc."""
        return self.binds_to is not None


_Chain = tuple[tuple[Function, int], ...]
_Wanted = tuple[int | None, int | None, int | None]
"""Which parameter of the function at the head of a chain becomes each handler; None: already settled."""
_Passed = tuple[Passed, Passed, Passed]


@dataclass(frozen=True, slots=True)
class _Call:
    symbol: str
    version: str | None
    binds_to: int | None
    swallowed_by: int | None
    is_weak: bool
    function: Function
    site: int


def find_registrations(flow: Flow, libc_objects: frozenset[int]) -> tuple[Registration, ...]:
    """Every registration of every object of the closure, libc's own stubs left out.

    What another object defines under a registrar's name (a static stub, a shim, an interposer) is a
    wrapper: it registers what it passes on to libc, and nothing if it passes nothing on.
    """
    result = []
    missing = could_define(flow)
    for call in _calls(flow, libc_objects):
        for chain, passed in _origins(flow, call):
            handlers = tuple(_handler(p) for p in passed)
            result.append(
                Registration(
                    flow.program.object_of(chain[0][0]),
                    call.symbol,
                    call.version,
                    call.binds_to,
                    call.swallowed_by,
                    call.is_weak,
                    chain,
                    (handlers[0], handlers[1], handlers[2]),
                    missing if call.binds_to is None and call.swallowed_by is None else "",
                )
            )
    return tuple(result)


def could_define(flow: Flow) -> str:
    """A missing library, libc first: any may define what binds to nothing. glibc's ld.so has no registrar."""
    names = [item.name.rpartition("/")[2] for item in flow.program.closure.missing]
    able = [name for name in names if not name.startswith("ld-linux")]
    return min(able, key=lambda name: not name.startswith(("libc.", "ld-musl-", "libpthread.")), default="")


def _calls(flow: Flow, libc_objects: frozenset[int]) -> list[_Call]:
    """Calls of the registrars: by import (bound to libc or not at all), and within libc's own object."""
    program = flow.program
    providers = program.called(REGISTRARS, libc_objects or None)
    passing_on = flow.graph.distances(providers, backward=True)
    found = {(call.function, call.site): call for call in _imported_calls(flow, set(providers), passing_on)}
    for target, name in providers.items():
        for edge in flow.graph.edges_to(target):
            source, site = Function(int(flow.graph.source[edge])), int(flow.graph.site[edge])
            if int(flow.graph.kind[edge]) in CALLS:
                call = _Call(name, None, program.object_of(target), None, False, source, site)
                found.setdefault((source, site), call)
    # A stub of libc's own that calls another registrar: whoever called the stub is who registers.
    return [call for _, call in sorted(found.items()) if call.function not in providers]


def _imported_calls(flow: Flow, providers: set[Function], passing_on: Reach) -> Iterator[_Call]:
    program, imports = flow.program, flow.graph.imports
    for obj in range(len(program.codes)):
        table = program.image(obj).dynamic_symbols
        rows = np.flatnonzero(imports.object == obj)
        called = [i for i in unique(imports.symbol[rows]).tolist() if i < len(table)]
        wanted = {i: table.names[i] for i in called if table.names[i] in REGISTRARS}
        mine = rows[position_in(np.array(sorted(wanted), np.int64), imports.symbol[rows]) >= 0]
        for row in mine.tolist():
            symbol, target = int(imports.symbol[row]), Function(int(imports.target[row]))
            is_bound = target in providers
            if target >= 0 and not is_bound and passing_on[target] >= 0:
                continue  # a wrapper: its own call of libc is the registration
            version = None
            if table.version_index is not None:
                version = program.image(obj).versions.name(int(table.version_index[symbol]))
            provider = program.object_of(target) if target >= 0 else None
            yield _Call(
                wanted[symbol], version, provider if is_bound else None, None if is_bound else provider,
                bool(table.binding[symbol] == STB_WEAK), Function(int(imports.caller[row])), int(imports.site[row]),
            )  # fmt: skip


def _origins(flow: Flow, call: _Call) -> list[tuple[_Chain, _Passed]]:
    """Where the three arguments come from: each chain of calls that fixes them."""
    start = flow.whole(call.function)
    pending: list[tuple[_Chain, _Wanted, _Passed]] = [
        (((start, call.site),), (0, 1, 2), (Passed(), Passed(), Passed()))
    ]
    result: list[tuple[_Chain, _Passed]] = []
    while pending:
        chain, wanted, so_far = pending.pop()
        function, site = chain[0]
        state = flow.state_before(function, site)
        now = list(so_far)
        onward: list[int | None] = [None, None, None]
        for slot, argument in enumerate(wanted):
            if argument is None:
                continue
            passed = flow.passed(function, state, argument) if state is not None else Passed()
            now[slot], onward[slot] = passed, passed.parameter
        values = (now[0], now[1], now[2])
        callers = _callers(flow, function) if any(o is not None for o in onward) else []
        if not callers or len(chain) > _MAX_DEPTH:
            result.append((chain, values))
            continue
        for caller, place in callers:
            pending.append((((caller, place), *chain), (onward[0], onward[1], onward[2]), values))
    return sorted(result, key=lambda item: item[0])


def _callers(flow: Flow, function: Function) -> list[tuple[Function, int]]:
    graph = flow.graph
    return sorted(
        {
            (flow.whole(Function(int(graph.source[e]))), int(graph.site[e]))
            for e in graph.edges_to(function)
            if int(graph.kind[e]) in CALLS
        }
    )


def _handler(passed: Passed) -> Handler:
    if passed.function is not None:
        return Handler(passed.function, True)
    return Handler(None, passed.constant == 0)
