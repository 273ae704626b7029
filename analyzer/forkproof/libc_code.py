"""The locks inside a C library, found from its code: who takes which, and which of them its fork quiesces.

Owns: the derivation of a libc's catalogue of locks: those that are words in libc's own data, with what only signatures
      can say (a FILE's lock, functions of the dynamic linker that libc calls through pointers).
Takes: `Flow`, the target's libc. Gives: a `Catalogue`.
Must never: decide by a function's name whether fork quiesces its lock: fork's code says that. Where the code cannot,
      the signature names its source. Nor depend on more of a program than what libc's code leads to
      (`forkproof.content`): programs share the catalogue.
Wrong where: a lock is taken through a pointer that the code computes; where fork quiesces a lock in a way that is
      neither an acquire, a store to the lock, nor a table that leads to it.

How a lock is found: libc's functions wait in the kernel in a handful of places, each of which waits on its own first
parameter (`__lll_lock_wait_private`, musl's `__lock`) or has a name (`pthread_mutex_lock`). Whoever calls one of these
with an address in writable data takes the lock at that address. An inlined lock's fast side is the block that leads to
the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from forkproof.arguments import data_arguments
from forkproof.callgraph import CALLS, CERTAIN
from forkproof.code.decode import Body
from forkproof.code.index import SCANNERS
from forkproof.code.operations import Memory, Register, Set
from forkproof.code.state import State
from forkproof.code.values import Entry, Value, Word
from forkproof.elf.names import plainness
from forkproof.program import Function

if TYPE_CHECKING:
    from forkproof.allocators import LibcFacts
    from forkproof.flow import Flow

_NUMBER_REACH: Final = 192
"""Bytes before a system call in which its number must stand."""
_FUTEX_OPERATION: Final = 0x7F
_FUTEX_WAITS: Final = frozenset({0, 6, 9, 11, 13})
"""WAIT, LOCK_PI, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2 (linux/futex.h)."""
_SIZES: Final[Mapping[str, int]] = {"mutex": 40, "rwlock": 56, "spin": 4, "sem": 32}
"""Bytes of the libc's lock objects: a store anywhere inside re-initialises them."""
_BARE: Final = 4
"""Bytes of a lock that is one word."""
_LOOK_BACK: Final = 8
"""Instructions before a call that may set its first argument."""
_OBJECT: Final = 4096
"""Bytes of the largest object with a lock that callers hold."""
_FORK_DEPTH: Final = 3
"""Calls below fork in which stores to locks are looked for."""
_TABLE: Final = 512
"""Bytes of a table that are followed, if nothing else begins before."""
_TABLE_DEPTH: Final = 2
"""Pointers from an entry of a table to a lock."""
ANY: Final = 1
"""The bit of `Catalogue.may_take` that stands for any lock at all."""


class Address(NamedTuple):
    """Where a lock lies: an object of the closure and an address in it."""

    object: int
    rva: int


@dataclass(frozen=True, eq=False)
class LibcLock:
    """One lock of libc's, or one that a signature describes; without an address where no code shows it."""

    address: Address | None
    name: str
    takers: frozenset[Function]
    """Functions that take it themselves."""
    writers: frozenset[Function]
    """Those of them that do not only read under it: a reader waits for no other reader."""
    quiesced: str
    """How fork quiesces it; empty when nothing does."""
    rare: str = ""
    """Why running programs hardly ever take it; empty where nothing is known."""
    seldom: str = ""
    """Why they seldom call what takes it; empty where nothing is known."""
    is_described: bool = False
    """That its takers take it is said by a signature, and not shown by their code."""


class MethodCall(NamedTuple):
    """A call of a function that waits for a lock until it has it."""

    function: Function
    site: int
    address: Address | None
    """The lock, where it is in data."""
    parameter: int | None
    """The argument of the calling function that points to the object which the lock is in."""


class Method(NamedTuple):
    """A function that waits for a lock until it has it."""

    kind: str
    shared: bool
    """A reader's lock, which waits for writers only."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The locks of one libc, and who takes them."""

    methods: Mapping[Function, Method]
    """Functions of libc that wait for the lock that their first parameter points to."""
    locks: tuple[LibcLock, ...]
    """Every lock: those found in the code, then those that signatures describe."""
    acquires: Mapping[Address, Mapping[Function, tuple[int, ...]]]
    """For every lock in data, the functions that take it, with the sites of the calls that wait."""
    may_take: Mapping[Function, int]
    """For libc's functions, a bit for each of `locks` that a call may take, the first being 2; `ANY` for any at all."""
    public: Mapping[Function, str]
    """libc's functions that programs call, with their plainest names."""
    of_objects: Mapping[Function, int]
    """Those of them that take the lock of an object of their caller's, and let it go: with the argument that it is."""

    def methods_of(self, flow: Flow, function: Function, sites: Iterable[int]) -> list[Method]:
        """What is called at these sites to wait."""
        return _methods_at(flow, self.methods, function, sites)


def derive(flow: Flow, libc: LibcFacts) -> Catalogue:
    """The catalogue of a libc, from its code."""
    found = _Derivation(flow, libc)
    return Catalogue(found.methods, found.locks, found.acquires, found.may_take(), found.public, found.of_objects)


def _methods_at(
    flow: Flow, methods: Mapping[Function, Method], function: Function, sites: Iterable[int]
) -> list[Method]:
    targets = [Function(int(flow.graph.target[e])) for site in sites for e in flow.edges_at(function, site)]
    return [methods[target] for target in targets if target in methods]


class _Derivation:
    """One derivation; each step is computed when the next asks for it."""

    def __init__(self, flow: Flow, libc: LibcFacts) -> None:
        self.flow, self.libc = flow, libc
        self.graph, self.program = flow.graph, flow.program

    # ---- who takes what --------------------------------------------------------------------

    @cached_property
    def methods(self) -> Mapping[Function, Method]:
        """Functions of libc that wait for the lock that their first parameter points to."""
        known = self.flow.signatures.locks
        others = self.program.called([n for n, f in known.items() if f.op != "acquire"], self.libc.objects)
        found = {f: Method("", shared=False) for f in self._waits_on_parameter() if f not in others}
        names = [n for n, f in known.items() if f.op == "acquire" and f.kind in _SIZES and not f.bounded]
        for function, name in self.program.called(sorted(names, key=plainness), self.libc.objects).items():
            found[function] = Method(known[name].kind, known[name].shared)
        return found

    def _waits_on_parameter(self) -> Iterator[Function]:
        """Functions that hand their first parameter to futex(2) to wait on."""
        flow, (pointer, operation) = self.flow, self.flow.convention.arguments[:2]
        for function, site in self._futex_sites():
            state = flow.state_before(function, site)
            if state is None or not _is_wait(state.register(operation)):
                continue
            address = state.register(pointer)
            if address == Value(Entry(pointer), 0):
                yield function

    def _futex_sites(self) -> Iterator[tuple[Function, int]]:
        flow, core = self.flow, self.libc.core
        if core is None:
            return
        numbers = [n for n, call in flow.signatures.wait_syscalls(flow.machine.value).items() if call.name == "futex"]
        image, code, base = self.program.image(core), self.program.codes[core], int(self.program.base[core])
        sites = code.sites.syscalls
        for site, owner in zip(sites.tolist(), code.owners(sites).tolist(), strict=True):
            before = image.read(max(site - _NUMBER_REACH, 0), min(site, _NUMBER_REACH)).tobytes()
            if owner < 0 or not SCANNERS[flow.machine].mentions(before, numbers):
                continue
            function = flow.whole(Function(base + owner))
            if flow.constant_before(function, site, flow.convention.syscall_number) in numbers:
                yield function, site

    @cached_property
    def acquires(self) -> Mapping[Address, dict[Function, tuple[int, ...]]]:
        """For every lock in data, the functions that take it, with the sites of the calls that wait."""
        found: dict[Address, dict[Function, tuple[int, ...]]] = {}
        for function, site, address, _ in self._method_calls:
            if address is not None:
                sites = found.setdefault(address, {})
                sites[function] = (*sites.get(function, ()), site)
        return dict(sorted(found.items()))

    @cached_property
    def _method_calls(self) -> tuple[MethodCall, ...]:
        """Every call of a method in libc."""
        graph, core, whole = self.graph, self.libc.core, self.flow.whole
        calls = [
            (Function(int(graph.source[e])), int(graph.site[e]))
            for method in sorted(self.methods)
            for e in graph.edges_to(method)
            if int(graph.kind[e]) in CALLS and self.program.object_of(Function(int(graph.source[e]))) == core
        ]
        calls = [(whole(f), site) for f, site in dict.fromkeys(calls) if f not in self.methods]
        if core is None or not calls:
            return ()
        passed = data_arguments(self.program, core, np.array([site for _, site in calls], np.int64), 0)
        plain = {
            site: self._loaded(core, word, 0) if is_load else self._in_data(core, word)
            for site, (word, is_load) in passed.items()
        }
        rest: dict[Function, list[int]] = {}
        for function, site in calls:
            if site not in plain and not self._is_loaded_from_object(function, site):
                rest.setdefault(function, []).append(site)
        states = {f: self.flow.states(f, sites) for f, sites in rest.items()}
        passed_on = {site: self._argument(states.get(f, {}).get(site)) for f, site in calls if site not in plain}
        return tuple(
            MethodCall(f, site, plain[site], None)
            if site in plain
            else MethodCall(f, site, self._address(passed_on[site]), self._parameter(passed_on[site]))
            for f, site in calls
        )

    def _argument(self, state: State | None) -> Value | None:
        """The first argument of a call, followed through the function.

        What was just loaded from an object that a register points to is no address that libc's data has.
        """
        return None if state is None else state.register(self.flow.convention.arguments[0])

    def _parameter(self, value: Value | None) -> int | None:
        """The argument in whose object an address lies; a lock that is passed itself is none."""
        base, names = value.base if value is not None else None, self.flow.convention.arguments
        if value is None or not isinstance(base, Entry) or base.register not in names:
            return None
        return names.index(base.register) if 0 <= value.offset < _OBJECT else None

    @cached_property
    def of_objects(self) -> Mapping[Function, int]:
        """Public functions that take the lock of an object that they are given, and let it go."""
        taken = {c.function: c.parameter for c in self._method_calls if c.parameter is not None}
        return {f: parameter for f, parameter in sorted(taken.items()) if f in self.public and f not in self.flow.dying}

    def _is_loaded_from_object(self, function: Function, site: int) -> bool:
        """The first argument was just loaded from an object: before the call, or, where the call that waits stands in a
        block apart, before the only branch that leads there."""
        body = self.flow.body(function)
        position = body.position(site) or 0
        loaded = self._is_loaded_before(body, position)
        if loaded is None:
            block = body.block_start(position)
            before = body.predecessors[block] if position - block <= _LOOK_BACK else ()
            loaded = len(before) == 1 and self._is_loaded_before(body, body.block_end(before[0]))
        return bool(loaded)

    def _is_loaded_before(self, body: Body, position: int) -> bool | None:
        """Whether what last sets the first argument is a load from an object; None where nothing near does."""
        argument = Register(self.flow.convention.arguments[0])
        for instruction in reversed(body.instructions[max(position - _LOOK_BACK, 0) : position]):
            for operation in reversed(instruction.operations):
                if getattr(operation, "destination", None) == argument:
                    source = operation.source if isinstance(operation, Set) else None
                    return isinstance(source, Memory) and source.base not in (None, "pc")
        return None

    def _address(self, value: Value | None) -> Address | None:
        core = self.libc.core
        if value is None or core is None:
            return None
        if isinstance(value.base, Word):
            return self._loaded(core, value.base.address, value.offset)
        return self._in_data(core, value.offset) if value.base is None else None

    def _loaded(self, obj: int, slot: int, offset: int) -> Address | None:
        """The address that a loader-filled word holds, and `offset` bytes on."""
        image = self.program.image(obj)
        if (symbol := image.slot_symbols.get(slot)) is not None:
            # A program may have a copy of libc's variable: which one that is does not depend on the program.
            table = image.dynamic_symbols
            if symbol < len(table) and table.defined[symbol]:
                return Address(obj, int(table.value[symbol]) + offset)
            binding = self.program.bindings.resolve(obj, symbol)
            return None if binding is None else Address(binding.object, binding.rva + offset)
        target = image.pointer_at(slot)
        return None if target is None else self._in_data(obj, target + offset)

    def _in_data(self, obj: int, rva: int) -> Address | None:
        segments = self.program.image(obj).segments
        inside = any(s.writable and s.rva <= rva < s.rva + s.memory_size for s in segments)
        return Address(obj, rva) if inside else None

    # ---- what fork does ----------------------------------------------------------------------

    @cached_property
    def forks(self) -> tuple[Function, ...]:
        """libc's own functions that fork, handlers and all; not those that call one of them (forkpty)."""
        found = {f for f, forker in self.flow.forkers.items() if forker.kind == "fork" and forker.handlers_run}
        graph = self.graph
        callers = {f for f in found if any(int(graph.target[e]) in found - {f} for e in graph.edges_from(f))}
        return tuple(sorted(found - callers or found))

    @cached_property
    def _below_fork(self) -> Mapping[Function, int]:
        """What fork calls on its way, with the number of calls between; not what it calls to die."""
        found = dict.fromkeys(self.forks, 0)
        pending = list(self.forks)
        for function in pending:
            for edge in self.flow.outgoing(function):
                target = Function(int(self.graph.target[edge]))
                if int(self.graph.kind[edge]) in CERTAIN and target not in found and self.flow.returns(target):
                    found[target] = found[function] + 1
                    pending.append(target)
        return found

    def _quiesced(self, address: Address, takers: Mapping[Function, tuple[int, ...]]) -> str:
        title = self.libc.title
        if any(f in self._below_fork for f in takers):
            return f"the fork of {title} takes it before it forks"
        methods = [m for f, sites in takers.items() for m in self._methods_of(f, sites)]
        size = max((_SIZES.get(m.kind, _BARE) for m in methods), default=_BARE)
        if any(obj == address.object and address.rva <= rva < address.rva + size for obj, rva in self._stores):
            return f"the fork of {title} re-initialises it in the child"
        if address in self._begin_fork_loops:
            return f"the fork of {title} takes it, in a loop that begins with it, before it forks"
        if address in self._in_fork_tables:
            return f"the fork of {title} takes it, through a table, before it forks"
        return ""

    @cached_property
    def _stores(self) -> frozenset[Address]:
        """Addresses in data that fork's own code stores to."""
        found: set[Address] = set()
        for function, depth in self._below_fork.items():
            if depth <= _FORK_DEPTH and self.program.object_of(function) == self.libc.core:
                found |= self._stored_by(function)
        return frozenset(found)

    def _stored_by(self, function: Function) -> set[Address]:
        body, stack = self.flow.body(function), self.flow.convention.stack
        stores: dict[int, list[tuple[Memory, int]]] = {}
        for i in body.instructions:
            for o in i.operations:
                if isinstance(o, Set) and isinstance(o.destination, Memory) and o.destination.base != stack:
                    # A list, for one instruction stores to two cells: stp.
                    stores.setdefault(i.address, []).append((o.destination, i.end))
        states = self.flow.states(function, stores) if stores else {}
        cells = ((state, cell, end) for site, state in states.items() for cell, end in stores[site])
        return {a for state, cell, end in cells if (a := self._stored_at(state, cell, end)) is not None}

    def _stored_at(self, state: State, cell: Memory, end: int) -> Address | None:
        """Where in data an instruction that ends at `end` stores to."""
        if cell.indexed:
            return None
        if cell.base is None or cell.base == "pc":
            return self._address(Value(None, cell.displacement + (end if cell.base == "pc" else 0)))
        base = state.register(cell.base)
        return None if base is None else self._address(Value(base.base, base.offset + cell.displacement))

    @cached_property
    def _fork_loops(self) -> frozenset[Function]:
        """Functions below fork that take locks whose addresses the code does not name: those of a list or table."""
        return frozenset(c.function for c in self._method_calls if c.address is None and c.function in self._below_fork)

    @cached_property
    def _begin_fork_loops(self) -> frozenset[Address]:
        """Addresses in data from which such functions set out (glibc: main_arena)."""
        core = self.libc.core
        if core is None:
            return frozenset()
        code, base = self.program.codes[core], int(self.program.base[core])
        owned = np.isin(code.data_owner + base, sorted(self._fork_loops))
        return frozenset(Address(core, rva) for rva in code.sites.data_target[owned].tolist())

    @cached_property
    def _in_fork_tables(self) -> frozenset[Address]:
        """What the constant tables of a fork that takes locks in a loop lead to (musl: atfork_locks)."""
        core = self.libc.core
        loops = self._fork_loops & set(self.forks)
        if core is None or not loops:
            return frozenset()
        code, base = self.program.codes[core], int(self.program.base[core])
        starts = np.unique(code.sites.data_target)
        owned = np.unique(code.sites.data_target[np.isin(code.data_owner + base, sorted(loops))])
        ends = np.append(starts, np.iinfo(np.int64).max)[np.searchsorted(starts, owned) + 1]
        image, found = self.program.image(core), set[Address]()
        pending = [
            (slot, _TABLE_DEPTH)
            for start, end in zip(owned.tolist(), ends.tolist(), strict=True)
            for slot in range(start, min(end, start + _TABLE), 8)
        ]
        while pending:
            slot, depth = pending.pop()
            target = image.pointer_at(slot)
            if target is None:
                continue
            found.add(Address(core, target))
            if depth:
                pending.append((target, depth - 1))
        return frozenset(found)

    # ---- the catalogue -----------------------------------------------------------------------

    @cached_property
    def locks(self) -> tuple[LibcLock, ...]:
        """Those found in the code, then those that signatures describe."""
        return (*(self._lock(address, takers) for address, takers in self.acquires.items()), *self._described())

    def _lock(self, address: Address, takers: Mapping[Function, tuple[int, ...]]) -> LibcLock:
        functions = frozenset(takers)
        readers = {f for f, sites in takers.items() if all(m.shared for m in self._methods_of(f, sites))}
        name, rare, seldom = self._name(address, functions)
        quiesced = self._quiesced(address, takers)
        return LibcLock(address, name, functions, functions - readers, quiesced, rare, seldom)

    def _methods_of(self, function: Function, sites: Iterable[int]) -> list[Method]:
        return _methods_at(self.flow, self.methods, function, sites)

    def _described(self) -> Iterator[LibcLock]:
        for entry in self.flow.signatures.libc_locks_for(self.libc.id, self.libc.version):
            takers = frozenset(self.program.called(entry.functions.exact, self.libc.objects))
            if takers:
                shown = frozenset(self.program.called([entry.same_as], self.libc.objects)) if entry.same_as else None
                address = next((a for a, own in self.acquires.items() if shown and shown & own.keys()), None)
                why = entry.quiesced, entry.rare, entry.seldom
                yield LibcLock(address, entry.name, takers, takers, *why, is_described=True)

    def _name(self, address: Address, takers: frozenset[Function]) -> tuple[str, str, str]:
        """What the lock guards, by the areas that signatures name, and why it is rare or seldom; else who takes it."""
        exported = self._exported(takers)
        areas = self.flow.signatures.libc_areas
        for name in exported:
            if name in areas:
                return f"the {areas[name].area} lock of {name}", areas[name].rare, areas[name].seldom
        return (f"the lock of {exported[0]}" if exported else f"a lock at {address.rva:#x}"), "", ""

    def _exported(self, takers: frozenset[Function]) -> list[str]:
        """Public names of functions that take a lock, or that lead to one that does; the nearest first."""
        distance = self.graph.distances(takers, backward=True, blocked=self.flow.dying, until=self.public)
        reached = np.array(list(self.public), np.int64)
        near = [(plainness(self.public[f]), self.public[f]) for f in reached[distance[reached] >= 0].tolist()]
        return [name for _, name in sorted(near)]  # all are as near: the search ends with them

    def may_take(self) -> Mapping[Function, int]:
        """Who may take which. Ways to die are left out.

        One pass over libc's own calls, repeated until nothing changes.
        """
        found: dict[Function, int] = dict.fromkeys([*(c.function for c in self._method_calls), *self.methods], ANY)
        for bit, lock in enumerate(self.locks, 1):
            for function in lock.takers:
                found[function] = found.get(function, 0) | 1 << bit
        callers = self._callers()
        pending = [f for f in found if f not in self.flow.dying]
        while pending:
            function = pending.pop()
            mask = found[function]
            for source in callers.get(function, ()):
                if mask & ~found.get(source, 0):
                    found[source] = found.get(source, 0) | mask
                    pending.append(source)
        return found

    def _callers(self) -> Mapping[Function, set[Function]]:
        """For each function, those of libc whose own control flow leads to it; not those by which programs die."""
        graph, core = self.graph, self.libc.core
        if core is None:
            return {}
        first, last = graph.source.searchsorted(self.program.base[core : core + 2])
        rows = np.flatnonzero(np.isin(graph.kind[first:last], [int(kind) for kind in CERTAIN])) + first
        found: dict[Function, set[Function]] = {}
        for source, target in zip(graph.source[rows].tolist(), graph.target[rows].tolist(), strict=True):
            caller = self.flow.whole(Function(source))
            if caller not in self.flow.dying:
                found.setdefault(Function(target), set()).add(caller)
        return found

    @cached_property
    def public(self) -> Mapping[Function, str]:
        """libc's functions that programs call, with their plainest names."""
        core = self.libc.core
        if core is None:
            return {}
        table = self.program.image(core).dynamic_symbols
        names = sorted({n for n, d in zip(table.names, table.defined.tolist(), strict=True) if d and n}, key=plainness)
        return self.program.called(names, [core])


def _is_wait(operation: Value | None) -> bool:
    """A futex operation that waits, or one that is not known."""
    if operation is None or operation.base is not None:
        return True
    return operation.offset & _FUTEX_OPERATION in _FUTEX_WAITS
