"""Functions reached by address: constant tables, data that points to data, addresses that code forms.

Owns: reading stored pointers out of an object's data, and every question in which knowing an address
      counts as being able to call it.
Takes: a linked program, or its call graph. Gives: table edges, sets of functions.
Must never: be taken for evidence that a call happens: these edges tell "unknown" from "no".
Wrong where: a table is filled at run time, or an address is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CallGraph, EdgeColumns, EdgeKind, known_edges, sorted_graph
from forkproof.closure import TypeClass
from forkproof.columns import among, position_in, spans, unique
from forkproof.elf.headers import ObjectKind
from forkproof.elf.image import Image
from forkproof.elf.tables import STT_OBJECT, RelocationKind
from forkproof.program import Columns, Function, Program, slot_columns

_TABLE_LIMIT: Final = 4096
"""A constant table ends here at the latest (bytes)."""
_LARGEST: Final = 1 << 30
"""Bytes of one object that are looked at; a forged header may spread a small file over any range."""


def reached_loosely(
    graph: CallGraph, roots: Iterable[int], kinds: Iterable[EdgeKind], objects: Iterable[int]
) -> npt.NDArray[np.bool_]:
    """Which functions can be reached when knowing an address counts as calling it.

    A function whose address code of these objects forms can be called by whoever gets it; one whose address
    stands in data, by whoever refers to the data, also through data that points to data: a module's table
    of tables. This is the widest guess there is, good for telling "unknown" from "no". Alternates searches
    of the graph with steps through addresses until nothing is added, which spares sorting all edges again.
    """
    kinds, program = frozenset(kinds), graph.program
    reached = np.zeros(graph.size, bool)
    graph.spread(reached, unique(np.fromiter((int(r) for r in roots), np.int64)), kinds)
    chosen = list(objects)
    blocks = [_data_blocks(program, obj) for obj in chosen]
    taken = [_taken_addresses(program, obj) for obj in chosen]
    counts = [-1] * len(chosen)
    while True:
        found = []
        for place, obj in enumerate(chosen):
            # An object whose functions are those of the last time leads to nothing that it did not lead to then.
            count = int(np.count_nonzero(reached[program.base[obj] : program.base[obj + 1]]))
            if count != counts[place]:
                counts[place] = count
                owner, target = taken[place]
                found += [blocks[place].step(reached), target[reached[owner] & ~reached[target]]]
        new = unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
        if not len(new):
            return reached
        graph.spread(reached, new, kinds)


def _taken_addresses(program: Program, obj: int) -> tuple[Columns, Columns]:
    """(function, function whose address its code forms, or loads from the GOT other than to call it)."""
    code, base = program.codes[obj], int(program.base[obj])
    target = program.functions(np.full(len(code.sites.taken_target), obj), code.sites.taken_target)
    words = code.sites.loaded_address
    is_kept = (position_in(np.sort(code.sites.slot_address), words) < 0) & (program.image(obj).symbols_at(words) >= 0)
    _, loaded = slot_columns(program, obj, words[is_kept])
    owner = np.concatenate([code.taken_owner, code.loaded_owner[is_kept]])
    target = np.concatenate([target, loaded])
    known = (owner >= 0) & (target >= 0)
    return owner[known] + base, target[known]


class _DataBlocks:
    """The data of one object, cut at every address that code or data refers to."""

    def __init__(
        self, count: int, users: tuple[Columns, Columns], links: tuple[Columns, Columns], held: tuple[Columns, Columns]
    ) -> None:
        self.users, self.links, self.held = users, links, held
        self.reached = np.zeros(count, bool)

    def step(self, functions: npt.NDArray[np.bool_]) -> Columns:
        """The functions that are newly reached through this data, given those reached so far."""
        (user, used), (source, target), (holder, function) = self.users, self.links, self.held
        self.reached[used[functions[user]]] = True
        while True:
            new = target[self.reached[source] & ~self.reached[target]]
            if not len(new):
                return function[self.reached[holder] & ~functions[function]]
            self.reached[new] = True


def _data_blocks(program: Program, obj: int) -> _DataBlocks:
    code, base = program.codes[obj], int(program.base[obj])
    sites = code.sites
    pointer_slot, pointer_target = _data_pointers(program, obj)
    owner = np.concatenate([code.data_owner, code.loaded_owner])
    address = np.concatenate([sites.data_target, sites.loaded_address])
    slot, function = function_pointers(program, obj)
    low, high = _mapped(program.image(obj))
    known = (owner >= 0) & (address >= low) & (address < high)
    owner, address = owner[known], address[known]
    kept = (pointer_target >= low) & (pointer_target < high) & (pointer_slot >= low) & (pointer_slot < high)
    pointer_slot, pointer_target = pointer_slot[kept], pointer_target[kept]
    kept = (slot >= low) & (slot < high)
    slot, function = slot[kept], function[kept]
    # The number of a block is how many eight-byte cells at or before it begin one: a lookup, no search.
    begins = np.zeros((high - low >> 3) + 1, np.int32)
    begins[address - low >> 3] = 1
    begins[pointer_target - low >> 3] = 1
    numbers = np.cumsum(begins, dtype=np.int32)

    def block(place: Columns) -> Columns:
        found: Columns = numbers[place - low >> 3]
        return found

    return _DataBlocks(
        int(numbers[-1]) + 1,
        (owner + base, block(address)),
        (block(pointer_slot), block(pointer_target)),
        (block(slot), function),
    )


def with_tables(graph: CallGraph) -> CallGraph:
    """The same graph with edges from functions that refer to constant tables to what the tables hold."""
    objects = range(len(graph.program.codes))
    parts = [edges(graph.program, obj) for obj in objects for edges in (_table_edges, _named_table_edges)]
    return sorted_graph(
        graph.program,
        [(graph.source.astype(np.int64), graph.target.astype(np.int64), graph.site, graph.kind), *parts],
        graph.imports,
    )


def addresses_held(program: Program, obj: int) -> frozenset[Function]:
    """Functions of other objects whose addresses stand in an object's data, or are loaded other than to be called."""
    _, stored = function_pointers(program, obj)
    code = program.codes[obj]
    called = set(code.stubs.slot.tolist()) | set(code.sites.slot_address.tolist())
    loaded = {s for s in unique(code.sites.loaded_address).tolist() if s not in called}
    found = {program.slot_target(obj, slot) for slot in loaded if slot in program.image(obj).slot_symbols}
    return frozenset(Function(f) for f in stored.tolist()) | frozenset(f for f in found if f is not None)


def table_targets(program: Program, function: Function) -> list[Function]:
    """The functions in constant tables that a function refers to: the virtual functions of what it makes."""
    obj = program.object_of(function)
    tables = (_table_edges(program, obj), _named_table_edges(program, obj))
    found = np.concatenate([target[source == function] for source, target, _, _ in tables])
    return [Function(f) for f in unique(found).tolist()]


def _table_edges(program: Program, obj: int) -> EdgeColumns:
    """From each function that forms the address of constant data to the functions that the data holds.

    A table reaches from the address to the next address that any code forms, or `_TABLE_LIMIT` bytes.
    """
    code, image, base = program.codes[obj], program.image(obj), int(program.base[obj])
    slots, functions = function_pointers(program, obj)
    if not len(slots) or not len(code.sites.data_target):
        nothing = np.zeros(0, np.int64)
        return nothing, nothing, nothing, nothing.astype(np.uint8)
    tables = unique(code.sites.data_target)
    end = np.minimum(np.append(tables[1:], np.iinfo(np.int64).max), tables + _TABLE_LIMIT)
    first, last = np.searchsorted(slots, tables), np.searchsorted(slots, end)
    reference = np.searchsorted(tables, code.sites.data_target)
    held = last[reference] > first[reference]
    reference = reference[held]
    count = last[reference] - first[reference]
    entries = spans(first[reference], last[reference])
    source = np.repeat(np.where(code.data_owner[held] >= 0, code.data_owner[held] + base, -1), count)
    site = np.repeat(code.sites.data_site[held], count)
    del image
    return known_edges(source, functions[entries], site, np.full(len(entries), EdgeKind.TABLE))


def _named_table_edges(program: Program, obj: int) -> EdgeColumns:
    """The same for tables that a word of the GOT names: the virtual table of an exported class.

    Such a table reaches as far as its symbol does.
    """
    code, base, image = program.codes[obj], int(program.base[obj]), program.image(obj)
    words = code.sites.loaded_address
    symbols = image.symbols_at(words)
    known = np.flatnonzero((symbols >= 0) & (code.loaded_owner >= 0))
    known = known[among(image.dynamic_symbols.type[symbols[known]], (STT_OBJECT,))]
    held: dict[int, list[tuple[int, int, int]]] = {}
    for row in known.tolist():
        binding = program.bindings.resolve(obj, int(symbols[row]))
        size = 0 if binding is None else int(program.image(binding.object).dynamic_symbols.size[binding.symbol])
        if binding is not None and size:
            held.setdefault(binding.object, []).append((row, binding.rva, min(size, _TABLE_LIMIT)))
    found: list[tuple[int, int, int]] = []
    for owner, rows in held.items():
        slots, functions = function_pointers(program, owner)
        for row, rva, size in rows:
            first, last = slots.searchsorted([rva, rva + size])
            site, source = int(code.sites.loaded_site[row]), int(code.loaded_owner[row]) + base
            found += [(source, function, site) for function in functions[first:last].tolist()]
    columns = np.array(found, np.int64).reshape(-1, 3)
    return known_edges(columns[:, 0], columns[:, 1], columns[:, 2], np.full(len(found), EdgeKind.TABLE))


def _mapped(image: Image) -> tuple[int, int]:
    """The range of addresses that an object's file content is mapped to."""
    low = min(s.rva for s in image.segments)
    return low, min(max(s.rva + s.file_size for s in image.segments), low + _LARGEST)


def _stored_pointers(program: Program, obj: int) -> tuple[Columns, Columns]:
    """(slot, target) of words in data that point into the same object.

    They are relocations, except in an executable with a fixed base, whose data holds plain addresses.
    """
    image = program.image(obj)
    slots, targets = image.pointers
    if image.kind is not ObjectKind.EXECUTABLE:
        return slots, targets
    low, high = _mapped(image)
    found = [(slots, targets)]
    for segment in image.segments:
        if segment.writable and not segment.executable:
            raw = image.read(segment.rva, segment.file_size)
            skip = -segment.rva % 8
            words = np.frombuffer(raw[skip : skip + (len(raw) - skip) // 8 * 8].tobytes(), "<i8")
            at = np.flatnonzero((words >= low) & (words < high))
            found.append((at * 8 + segment.rva + skip, words[at]))
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def _data_pointers(program: Program, obj: int) -> tuple[Columns, Columns]:
    """(slot, target) of stored pointers that do not point to functions."""
    slots, targets = _stored_pointers(program, obj)
    other = program.functions(np.full(len(targets), obj), targets) < 0
    return slots[other], targets[other]


def function_pointers(program: Program, obj: int) -> tuple[Columns, Columns]:
    """(slot, function number) of words in data that point to functions, sorted by slot."""
    image = program.image(obj)
    slots, targets = _stored_pointers(program, obj)
    function = program.functions(np.full(len(targets), obj), targets)
    table = image.relocations
    named = table.of(RelocationKind.ABSOLUTE)
    owner, rva = program.bindings.resolve_all(obj, table.symbol[named].astype(np.int64), type_class=TypeClass.PLT)
    far = program.functions(owner, rva)
    slot = np.concatenate([slots[function >= 0], table.offset[named][far >= 0]])
    function = np.concatenate([function[function >= 0], far[far >= 0]])
    order = np.argsort(slot, kind="stable")
    return slot[order], function[order]
