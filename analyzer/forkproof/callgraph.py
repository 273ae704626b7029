"""The call graph of a whole closure: every object's edges with their kind, in one set of columns.

Owns: global function numbers, the resolution of sites to functions through PLT, GOT, bindings and
      callback arguments, and searches over the result.
Takes: the linked program (closure, bindings, code indexes) and the signatures of callbacks.
Gives: a `CallGraph`.
Must never: treat an unknown target as no target: unknown calls are counted by function.
Wrong where: a callback's address reaches the call through a variable (then the edge is missing and the
      call stands as unknown); where a table is filled at run time; where code is generated.

A *function number* indexes all functions of all objects: object i's are base[i] .. base[i+1].
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Final, NewType
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from forkproof.closure import Bindings, Closure, Sysroot, TypeClass
from forkproof.code.decode import decode, keep_register
from forkproof.code.explore import CONVENTIONS
from forkproof.code.index import SCANNERS, CodeIndex, index_code
from forkproof.code.register_calls import arguments_at
from forkproof.columns import position_in, spans, unique
from forkproof.elf.image import I64, Image
from forkproof.elf.names import FunctionNames
from forkproof.errors import InputError
from forkproof.signatures import Signatures

Function = NewType("Function", int)
"""A function number; -1 is never one."""
Columns = npt.NDArray[np.int64]
Reach = npt.NDArray[np.int32]
"""A distance in edges for every function; -1 where there is no path."""


class EdgeKind(IntEnum):
    """How a caller leads to a callee; the names are the report's words."""

    DIRECT = 1
    """A call instruction that names the function."""
    JUMP = 2
    """A tail call, or a jump to the function's cold part."""
    PLT = 3
    GOT = 4
    """A call through a GOT slot (-fno-plt, weak references)."""
    CALLBACK = 5
    """The callee is passed to a function that calls it before it returns."""
    IFUNC = 6
    """The callee may be chosen by an IFUNC resolver."""
    THREAD = 7
    """The callee is started in a new thread."""
    DEFERRED = 8
    """The callee is passed to a function that keeps it for later (exit, event loop)."""
    TABLE = 9
    """The caller refers to a constant table that holds the callee: low confidence."""


CERTAIN: Final = frozenset(
    {EdgeKind.DIRECT, EdgeKind.JUMP, EdgeKind.PLT, EdgeKind.GOT, EdgeKind.CALLBACK, EdgeKind.IFUNC}
)
"""Edges of one thread's own control flow."""
CALLS: Final = frozenset({EdgeKind.DIRECT, EdgeKind.JUMP, EdgeKind.PLT, EdgeKind.GOT})
"""Edges of instructions that transfer control to the callee themselves."""
_BLOCKED: Final = -2
_NO_REGISTER: Final = -2
_FOLLOWED_BYTES: Final = 1 << 15
"""Bytes of a function that is followed for what it passes."""
_CALLBACK_REACH: Final = 160
"""Bytes before a call in which its function argument is looked for."""


@dataclass(frozen=True, eq=False)
class Program:
    """A linked program: a closure with its bindings and the code of each object."""

    closure: Closure
    bindings: Bindings
    codes: tuple[CodeIndex, ...]
    names: tuple[FunctionNames, ...]
    _slots: dict[tuple[int, int], Function | None] = field(default_factory=dict, repr=False)

    @cached_property
    def base(self) -> I64:
        """First function number of each object, then the number of all functions."""
        return np.concatenate([[0], np.cumsum([len(code) for code in self.codes])]).astype(np.int64)

    @cached_property
    def start(self) -> I64:
        """RVA of every function."""
        return np.concatenate([code.start for code in self.codes]) if self.codes else np.zeros(0, np.int64)

    def image(self, obj: int) -> Image:
        """The image of an object."""
        return self.closure.objects[obj].image

    def object_of(self, function: Function) -> int:
        """Index of the object that holds a function."""
        return bisect_right(self._bases, function) - 1

    @cached_property
    def _bases(self) -> list[int]:
        bases: list[int] = self.base.tolist()
        return bases

    def rva_of(self, function: Function) -> int:
        """Start address of a function in its object."""
        return int(self.start[function])

    def function(self, obj: int, rva: int) -> Function | None:
        """The function that begins at an address, if one does."""
        index = self.codes[obj].function_starting(rva)
        return Function(int(self.base[obj]) + index) if index >= 0 else None

    def functions(self, objects: Columns, rvas: Columns) -> Columns:
        """The function numbers that begin at addresses of objects; -1 where none does."""
        # One search in all functions of the closure, by object and then address: addresses stay below 2**48.
        position = position_in(self._ordered, objects << 48 | rvas)
        position[(rvas < 0) | (rvas >= 1 << 48)] = -1
        return position

    @cached_property
    def _ordered(self) -> I64:
        """Object and start of every function as one rising number."""
        counts = np.diff(self.base)
        return np.repeat(np.arange(len(counts), dtype=np.int64) << 48, counts) | self.start

    def name_of(self, function: Function) -> str:
        """The plainest linker name of a function."""
        obj = self.object_of(function)
        return self.names[obj].name(self.rva_of(function))

    def called(self, names: Iterable[str], objects: Iterable[int] | None = None) -> dict[Function, str]:
        """The functions of the closure that bear one of these names, exported or local."""
        wanted = list(names)
        result: dict[Function, str] = {}
        for obj in range(len(self.codes)) if objects is None else objects:
            for name in self.names[obj].known(wanted):
                for rva in self.names[obj].addresses(name):
                    if (function := self.function(obj, rva)) is not None:
                        result.setdefault(function, name)
        return result

    def slot_target(self, obj: int, slot: int) -> Function | None:
        """The function that a loader-filled word leads to, through the closure's bindings."""
        key = obj, slot
        if key not in self._slots:
            self._slots[key] = self._slot_target(obj, slot)
        return self._slots[key]

    def _slot_target(self, obj: int, slot: int) -> Function | None:
        image = self.image(obj)
        if (symbol := image.slot_symbols.get(slot)) is not None:
            return self.symbol_target(obj, symbol)
        if (target := image.pointer_at(slot)) is not None:
            return self.function(obj, target)
        return None

    def stub_target(self, obj: int, rva: int) -> Function | None:
        """The function that a PLT stub leads to: the address of an import, in code that is not PIC."""
        stubs = self.codes[obj].stubs
        index = int(np.searchsorted(stubs.start, rva))
        if index < len(stubs.start) and int(stubs.start[index]) == rva:
            return self.slot_target(obj, int(stubs.slot[index]))
        return None

    def symbol_target(self, obj: int, symbol: int) -> Function | None:
        """The function that a dynamic symbol reference binds to; None for data, or when nothing binds.

        Sought as a call is (TypeClass.PLT): where a fixed-base executable lends its PLT entry as the
        address of a function, the function itself is wanted.
        """
        binding = self.bindings.resolve(obj, symbol, type_class=TypeClass.PLT)
        return None if binding is None else self.function(binding.object, binding.rva)


_INDEXED: Final[WeakKeyDictionary[Image, CodeIndex]] = WeakKeyDictionary()
"""The index of every image that is open: programs of one scan share libraries (`forkproof.shared`)."""


def _index_all(images: list[Image], threads: int) -> tuple[CodeIndex, ...]:
    """Index every image, on one thread or two: the scanners spend their time in numpy, which lets go of the
    interpreter lock. The largest go first, so that no long one is left for the end."""
    waiting = sorted(range(len(images)), key=lambda i: len(images[i].data))
    found: dict[int, CodeIndex] = {}
    failures: list[BaseException] = []

    def work() -> None:
        while waiting and not failures:
            try:
                position = waiting.pop()
            except IndexError:  # the other thread took the last one
                return
            try:
                image = images[position]
                known = _INDEXED.get(image)
                found[position] = known if known is not None else index_code(image)
                _INDEXED[image] = found[position]
                _ = image.sha256  # a report wants it: here the other thread can work meanwhile
                image.release()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                failures.append(error)

    helpers = [Thread(target=work, name="indexer") for _ in range(1, threads)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return tuple(found[i] for i in range(len(images)))


def link(closure: Closure, sysroot: Sysroot, threads: int = 2) -> Program:
    """Index the code of every object and join it with the closure's bindings."""

    def finder(path: str) -> Path | None:
        try:
            return sysroot.host_path(path)
        except (OSError, InputError):
            return None

    codes = _index_all([item.image for item in closure.objects], threads)
    names = tuple(FunctionNames(item.image, item.path, finder) for item in closure.objects)
    return Program(closure, Bindings(closure), codes, names)


@dataclass(frozen=True, eq=False)
class ImportCalls:
    """Calls through loader-filled slots that name a symbol, bound or not, as parallel columns."""

    object: Columns
    caller: Columns
    site: Columns
    symbol: Columns
    target: Columns
    """Function number, or -1 where the reference binds to no function."""


@dataclass(frozen=True, eq=False)
class CallGraph:
    """Edges as parallel columns, sorted by source and site."""

    program: Program
    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    site: Columns
    kind: npt.NDArray[np.uint8]
    imports: ImportCalls

    @property
    def size(self) -> int:
        """Number of functions."""
        return int(self.program.base[-1])

    @cached_property
    def _out(self) -> Columns:
        return np.searchsorted(self.source, np.arange(self.size + 1))

    @cached_property
    def _by_target(self) -> npt.NDArray[np.int32]:
        # Sorting packed numbers is several times faster than argsort.
        packed = self.target.astype(np.int64) << 32 | np.arange(len(self.target))
        packed.sort()
        return (packed & 0xFFFFFFFF).astype(np.int32)

    @cached_property
    def _numbers(self) -> npt.NDArray[np.int32]:
        return np.arange(len(self.target), dtype=np.int32)

    @cached_property
    def _in(self) -> Columns:
        return np.searchsorted(self.target[self._by_target], np.arange(self.size + 1))

    def edges_from(self, function: Function) -> range:
        """Edge positions that leave a function, in site order."""
        return range(int(self._out[function]), int(self._out[function + 1]))

    def rows_from(self, function: Function) -> Iterator[tuple[int, int, int, int]]:
        """(edge position, target, site, kind) of what leaves a function, as plain numbers: for loops."""
        first, last = int(self._out[function]), int(self._out[function + 1])
        columns = (column[first:last].tolist() for column in (self.target, self.site, self.kind))
        return zip(range(first, last), *columns, strict=True)

    def rows_of(self, functions: Columns) -> Columns:
        """Edge positions that leave any of these functions."""
        return spans(self._out[functions], self._out[functions + 1])

    def edges_to(self, function: Function) -> list[int]:
        """Edge positions that lead to a function."""
        found: list[int] = self._by_target[self._in[function] : self._in[function + 1]].tolist()
        return found

    def distances(
        self,
        roots: Iterable[int],
        kinds: Iterable[EdgeKind] = CERTAIN,
        *,
        backward: bool = False,
        blocked: Iterable[int] = (),
        without: Collection[int] = (),
    ) -> Reach:
        """Number of edges from the nearest root to each function (or from it to a root); -1: no path.

        No path leads through a `blocked` function, or along an edge of `without`.

        Breadth first, one vectorised step a level: O(edges) in all.
        """
        pointers, end = (self._in, self.source) if backward else (self._out, self.target)
        order = self._by_target if backward else None
        allowed = np.zeros(max(EdgeKind) + 1, bool)
        allowed[[int(k) for k in kinds]] = True
        usable = allowed[self.kind] if without else None
        if usable is not None:
            usable[list(without)] = False
        distance = np.full(self.size, -1, np.int32)
        distance[list(blocked)] = _BLOCKED
        frontier = unique(np.fromiter((int(r) for r in roots), np.int64))
        distance[frontier] = 0
        place = np.empty(self.size, np.int32)
        level = 0
        while len(frontier):
            level += 1
            edges = spans(pointers[frontier], pointers[frontier + 1])
            positions = edges if order is None else order[edges]
            ends = end[positions[allowed[self.kind[positions]] if usable is None else usable[positions]]]
            new = ends[distance[ends] == -1]
            # Each once, in any order: the last that put its number in the function's place. Sorting costs more.
            numbers = self._numbers[: len(new)]
            place[new] = numbers
            frontier = new[place[new] == numbers]
            distance[frontier] = level
        distance[distance == _BLOCKED] = -1
        return distance

    def spread(self, reached: npt.NDArray[np.bool_], new: Columns, kinds: Iterable[EdgeKind]) -> None:
        """Add to `reached` the functions `new` and what leads on from them."""
        allowed = np.zeros(max(EdgeKind) + 1, bool)
        allowed[[int(k) for k in kinds]] = True
        while len(new):
            reached[new] = True
            edges = spans(self._out[new], self._out[new + 1])
            ends = self.target[edges[allowed[self.kind[edges]]]]
            new = unique(ends[~reached[ends]])

    def path(
        self,
        start: Function,
        distance: Reach,
        kinds: Iterable[EdgeKind] = CERTAIN,
        *,
        without: Collection[int] = (),
        slack: int = 0,
    ) -> list[int] | None:
        """Edge positions of a shortest path from `start` along falling `distance` (backward distances).

        Among equals, the more certain kind and then the first site win, so the answer is stable. With `slack`, the
        path may be longer by as many edges, and the first site wins: what is called first is asked for first.
        """
        allowed = frozenset(kinds)
        if distance[start] < 0:
            return None
        result = []
        here = start
        while distance[here] > 0:
            steps = [
                e
                for e in self.edges_from(here)
                if 0 <= distance[self.target[e]] < distance[here] + slack
                and EdgeKind(self.kind[e]) in allowed
                and e not in without
            ]
            best = min(steps, key=lambda e: (0 if slack else self.kind[e], self.site[e]))
            slack -= int(distance[self.target[best]] - distance[here]) + 1
            result.append(best)
            here = Function(int(self.target[best]))
        return result


# ---- building ---------------------------------------------------------------------------------

EdgeColumns = tuple[Columns, Columns, Columns, npt.NDArray[np.uint8]]


def build(program: Program, signatures: Signatures) -> CallGraph:
    """Resolve every site of every object.

    1. direct branches, and branches to stubs;
    2. calls through GOT slots;
    3. IFUNC resolvers to what they choose from;
    4. calls through registers, of the few functions on which all depends, and of what leads to those;
    5. callbacks: address arguments of functions that call them;
    6. what is handed over in closures, and by way of wrappers of what starts threads.
    Table edges are left to `forkproof.tables`: most questions do not need them.
    """
    # Imported here, since they take what this module makes.
    from forkproof.handed import handed_edges
    from forkproof.registers import edges_leading_on, register_edges

    parts: list[EdgeColumns] = []
    imports: list[ImportCalls] = []
    for obj in range(len(program.codes)):
        edges, calls = _object_edges(program, obj)
        parts += edges
        imports.append(calls)
    parts += register_edges(program, signatures)
    joined = ImportCalls(*(np.concatenate([getattr(c, n) for c in imports]) for n in ImportCalls.__dataclass_fields__))
    parts += _callback_edges(program, concatenated(parts), signatures)
    graph = sorted_graph(program, parts, joined)
    for more in (edges_leading_on, handed_edges):
        if new := more(graph, signatures):
            parts += new
            graph = sorted_graph(program, parts, joined)
    return graph


def concatenated(parts: list[EdgeColumns]) -> EdgeColumns:
    source, target, site, kind = (np.concatenate(column) for column in zip(*parts, strict=True))
    return source, target, site, kind


def sorted_graph(program: Program, parts: list[EdgeColumns], imports: ImportCalls) -> CallGraph:
    source, target, site, kind = concatenated(parts)
    # One key instead of two: function numbers stay below 2**22, addresses below 2**41.
    order = np.argsort(source << 41 | site, kind="stable").astype(np.int32)
    callers, callees = source[order].astype(np.int32), target[order].astype(np.int32)
    return CallGraph(program, callers, callees, site[order], kind[order].astype(np.uint8), imports)


def known_edges(source: Columns, target: Columns, site: Columns, kind: npt.NDArray[np.integer]) -> EdgeColumns:
    known = (source >= 0) & (target >= 0)
    return source[known], target[known], site[known], kind[known].astype(np.uint8)


def _object_edges(program: Program, obj: int) -> tuple[list[EdgeColumns], ImportCalls]:
    code, base = program.codes[obj], int(program.base[obj])
    sites = code.sites
    to_function = np.searchsorted(code.start, sites.direct_target)
    is_start = to_function < len(code.start)
    is_start[is_start] = code.start[to_function[is_start]] == sites.direct_target[is_start]
    local = np.where(is_start, to_function + base, -1)
    caller = np.where(code.direct_owner >= 0, code.direct_owner + base, -1)
    plain = np.where(sites.direct_jump, int(EdgeKind.JUMP), int(EdgeKind.DIRECT))
    edges = [known_edges(caller, local, sites.direct_site, plain)]

    stub = np.searchsorted(code.stubs.start, sites.direct_target)
    is_stub = ~is_start & (stub < len(code.stubs.start))
    is_stub[is_stub] = code.stubs.start[stub[is_stub]] == sites.direct_target[is_stub]
    slot_caller = np.where(code.slot_owner >= 0, code.slot_owner + base, -1)
    via = np.concatenate([code.stubs.slot[stub[is_stub]], sites.slot_address])
    callers = np.concatenate([caller[is_stub], slot_caller])
    places = np.concatenate([sites.direct_site[is_stub], sites.slot_site])
    kinds = np.concatenate([np.full(int(is_stub.sum()), EdgeKind.PLT), np.full(len(slot_caller), EdgeKind.GOT)])
    symbol, target = slot_columns(program, obj, via)
    edges.append(known_edges(callers, target, places, kinds))
    named = (symbol >= 0) & (callers >= 0)
    calls = ImportCalls(np.full(int(named.sum()), obj), callers[named], places[named], symbol[named], target[named])
    edges += _resolver_edges(program, obj)
    return edges, calls


def slot_columns(program: Program, obj: int, slots: Columns) -> tuple[Columns, Columns]:
    """(dynamic symbol or -1, function number or -1) for each slot address."""
    image = program.image(obj)
    distinct = unique(slots)
    symbols = image.symbols_at(distinct)
    owner = np.full(len(distinct), obj, np.int64)
    place = image.pointers_at(distinct)
    for slot, resolver in image.irelative_slots.items():
        place[distinct == slot] = resolver
    named = symbols >= 0
    owner[named], place[named] = program.bindings.resolve_all(obj, symbols[named], type_class=TypeClass.PLT)
    inverse = distinct.searchsorted(slots)
    return symbols[inverse], program.functions(owner, place)[inverse]


def _resolver_edges(program: Program, obj: int) -> list[EdgeColumns]:
    """IFUNC resolvers lead to every function whose address they take."""
    code, base = program.codes[obj], int(program.base[obj])
    chosen = position_in(code.ifunc_resolvers, code.taken_owner) >= 0
    target = np.searchsorted(code.start, code.sites.taken_target[chosen])
    kind = np.full(len(target), EdgeKind.IFUNC)
    return [known_edges(code.taken_owner[chosen] + base, target + base, code.sites.taken_site[chosen], kind)]


# ---- callbacks --------------------------------------------------------------------------------

_WHEN_KINDS: Final[Mapping[str, EdgeKind | None]] = {
    "during": EdgeKind.CALLBACK,
    "later": EdgeKind.DEFERRED,
    "exit": EdgeKind.DEFERRED,
    "thread-exit": EdgeKind.DEFERRED,
    "new-thread": EdgeKind.THREAD,
    "new-process": None,
    "prepare": None,
    "parent": None,
    "child": None,
}


def callback_roles(signatures: Signatures) -> dict[str, list[tuple[int, EdgeKind]]]:
    """Argument index and edge kind for every function that calls or starts its argument."""
    roles: dict[str, list[tuple[int, EdgeKind]]] = {}
    for name, callback in signatures.callbacks.items():
        for argument, when in zip(callback.arguments, callback.when, strict=True):
            if (kind := _WHEN_KINDS[when]) is not None:
                roles.setdefault(name, []).append((argument, kind))
    for name, starter in signatures.thread_starters.items():
        if starter.callback is not None:
            roles.setdefault(name, []).append((starter.callback, EdgeKind.THREAD))
    return roles


def _callback_edges(program: Program, edges: EdgeColumns, signatures: Signatures) -> list[EdgeColumns]:
    """Edges from callers of functions with a role to the functions that they pass."""
    source, target, site, kind = edges
    roles = callback_roles(signatures)
    start = program.function(0, program.image(0).entry)
    by_target = {int(f): roles[name] for f, name in program.called(roles).items()}
    has_role = np.zeros(int(program.base[-1]), bool)
    has_role[list(by_target)] = True
    groups: dict[tuple[int, int, EdgeKind], list[int]] = {}
    # Whatever crt1 calls is given main as its first argument: that is how main is found in stripped
    # static programs, whose __libc_start_main has no name.
    groups[0, 0, EdgeKind.CALLBACK] = np.flatnonzero(source == (-1 if start is None else start)).tolist()
    for edge in np.flatnonzero(has_role[target] & (kind != EdgeKind.IFUNC)).tolist():
        obj = program.object_of(Function(int(source[edge])))
        for argument, role in by_target[int(target[edge])]:
            groups.setdefault((obj, argument, role), []).append(edge)
    parts = []
    for (obj, argument, role), members in sorted(groups.items()):
        chosen = np.array(members, np.int64)
        passed = address_arguments(program, obj, site[chosen], argument)
        if role is EdgeKind.THREAD:
            passed = _followed_arguments(program, obj, site[chosen], argument, passed)
        parts.append(known_edges(source[chosen], passed, site[chosen], np.full(len(chosen), role)))
    return parts


def address_arguments(program: Program, obj: int, sites: Columns, argument: int) -> Columns:
    """Function numbers whose address the nearest earlier instruction puts into an argument register.

    The instruction must lie in the same function, within `_CALLBACK_REACH` bytes, and no other call may
    come in between (calls destroy argument registers). -1 where none is found.
    """
    result = np.full(len(sites), -1, np.int64)
    passed = _addresses_passed(program, obj, sites, argument)
    function = program.functions(np.full(len(passed.row), obj), passed.word)
    stubs = program.codes[obj].stubs
    stub = position_in(stubs.start, passed.word)
    slot = np.where(passed.is_load, passed.word, stubs.slot[stub] if len(stubs.slot) else -1)
    through = passed.is_load | (stub >= 0)
    function[through] = slot_columns(program, obj, slot[through])[1]
    found = passed.kept(np.flatnonzero(function >= 0))
    result[passed.row[found]] = function[found]
    return result


def _followed_arguments(program: Program, obj: int, sites: Columns, argument: int, passed: Columns) -> Columns:
    """`passed`, and where that has none what functions that form addresses hold in the argument's register.

    Two threads that begin in one function get its address from a register that is kept.
    """
    code, image = program.codes[obj], program.image(obj)
    names = CONVENTIONS[image.machine].arguments
    owner = code.owners(sites)
    missing = np.flatnonzero((passed < 0) & (owner >= 0) & np.isin(owner, code.taken_owner))
    if argument >= len(names) or not len(missing):
        return passed
    found = passed.copy()
    for caller in unique(owner[missing]).tolist():
        if int(code.size[caller]) > _FOLLOWED_BYTES:
            continue
        rows = missing[owner[missing] == caller]
        body = decode(image, [(int(code.start[caller]), int(code.size[caller]))])
        for site, address in arguments_at(body, image.machine, sites[rows].tolist(), names[argument]):
            function = program.function(obj, address)
            found[rows[sites[rows] == site]] = -1 if function is None else function
    return found


def string_arguments(program: Program, obj: int, sites: Columns, argument: int) -> dict[int, str]:
    """Site to the constant string whose address is passed there, found in the same way."""
    image = program.image(obj)
    passed = _addresses_passed(program, obj, sites, argument)
    result = {}
    for found in passed.kept(np.flatnonzero(~passed.is_load)).tolist():
        text = image.read_string(int(passed.word[found]))
        if text and text.isprintable():
            result[int(sites[passed.row[found]])] = text
    return result


def data_arguments(program: Program, obj: int, sites: Columns, argument: int) -> dict[int, tuple[int, bool]]:
    """Site to the address that is passed there, and whether it is loaded from there, found in the same way."""
    passed = _addresses_passed(program, obj, sites, argument)
    return {
        int(sites[passed.row[found]]): (int(passed.word[found]), bool(passed.is_load[found]))
        for found in passed.kept(np.arange(len(passed.row))).tolist()
    }


@dataclass(frozen=True, eq=False)
class _Passed:
    """Instructions that put an address into an argument register shortly before a call, as parallel columns."""

    image: Image
    register: str
    row: Columns
    """Which of the call sites that were asked about."""
    call: Columns
    place: Columns
    word: Columns
    """The address, or where the argument is loaded from."""
    is_load: npt.NDArray[np.bool_]

    def kept(self, rows: Columns) -> Columns:
        """Those of these rows whose register nothing sets again before the call.

        The columns of sites hold only some of the instructions that write registers; a plain move is not
        among them. So what lies between is decoded.
        """
        between = list(zip(self.place[rows].tolist(), (self.call - self.place)[rows].tolist(), strict=True))
        return rows[keep_register(self.image, between, self.register)]


def _addresses_passed(program: Program, obj: int, sites: Columns, argument: int) -> _Passed:
    """The nearest earlier instruction of each call that forms or loads an address for the argument."""
    code, image = program.codes[obj], program.image(obj)
    names = CONVENTIONS[image.machine].arguments
    numbers = SCANNERS[image.machine].ARGUMENT_REGISTERS
    register = numbers[argument] if argument < len(numbers) else _NO_REGISTER
    place, address, is_load = _register_writes(code, register)
    position = place.searchsorted(sites) - 1
    row = np.flatnonzero(position >= 0)
    position, call = position[row], sites[row]
    at, calls = place[position], code.all_calls
    before = calls.searchsorted(call) - 1
    previous_call = np.where(before >= 0, calls[before], -1) if len(calls) else np.full(len(row), -1)
    good = (at > previous_call) & (call - at <= _CALLBACK_REACH) & (code.owners(at) == code.owners(call))
    row, call, position = row[good], call[good], position[good]
    name = names[argument] if argument < len(names) else ""
    return _Passed(image, name, row, call, at[good], address[position], is_load[position])


def _register_writes(code: CodeIndex, register: int) -> tuple[Columns, Columns, npt.NDArray[np.bool_]]:
    """(site, address, whether it is loaded from there) of what puts an address into a register, by site."""
    sites = code.sites
    columns = []
    for prefix, address in (("taken", "target"), ("data", "target"), ("loaded", "address")):
        mine = getattr(sites, f"{prefix}_register") == register
        place = getattr(sites, f"{prefix}_site")[mine]
        columns.append((place, getattr(sites, f"{prefix}_{address}")[mine], np.full(len(place), prefix == "loaded")))
    place, value, is_load = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(place, kind="stable")
    return place[order], value[order], is_load[order]
