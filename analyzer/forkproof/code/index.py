"""The code of one object, indexed: its functions, its PLT stubs and its sites by function.

Owns: the merge of unwind extents with symbol tables into one function table, the telling of stubs from
      functions, and the attribution of every site to the function that contains it.
Takes: an `Image`. Gives: a `CodeIndex`, position independent and free of names and neighbours, so that
      it can be cached by content.
Must never: read another object, or a signature.
Wrong where: code has neither unwind tables nor symbols (then a function is what is called directly);
      two functions overlap (a site belongs to the nearest start at or before it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from forkproof.code import aarch64, x86_64
from forkproof.code.decode import boundaries
from forkproof.code.sites import EntryMap, Landmarks, Sites, Stores, Stubs, concatenate
from forkproof.columns import among, position_in, unique
from forkproof.elf import unwind
from forkproof.elf.image import I64, Image, Machine, ObjectKind
from forkproof.elf.tables import STT_FUNC, STT_IFUNC, STT_OBJECT, STT_TLS, RelocationKind, SymbolTable

SCANNERS: Final[dict[Machine, ModuleType]] = {Machine.X86_64: x86_64, Machine.AARCH64: aarch64}


@dataclass(frozen=True, eq=False)
class CodeIndex:
    """Functions and sites of one object.

    `owner` columns hold function indexes, or -1 where a site lies in no function.
    """

    start: I64
    size: I64
    stubs: Stubs
    sites: Sites
    ifunc_resolvers: I64
    """Function indexes whose result, not whose code, a symbol names."""

    def __len__(self) -> int:
        return len(self.start)

    def function_at(self, rva: int) -> int:
        """Index of the function that contains an address, or -1."""
        return int(self.owners(np.array([rva], np.int64))[0])

    def function_starting(self, rva: int) -> int:
        """Index of the function that begins at an address, or -1."""
        index = int(np.searchsorted(self.start, rva))
        return index if index < len(self.start) and int(self.start[index]) == rva else -1

    def owners(self, sites: I64) -> npt.NDArray[np.int64]:
        """Function index of each address; -1 outside functions."""
        if not len(self.start):
            return np.full(len(sites), -1, np.int64)
        if len(sites) > len(self.start) and not np.any(sites[1:] < sites[:-1]):
            # Sorted, as nearly all columns are: to look for the starts among the sites is the shorter way.
            first = sites.searchsorted(self.start)
            index = np.repeat(np.arange(-1, len(self.start)), np.diff(first, prepend=0, append=len(sites)))
        else:
            index = self.start.searchsorted(sites, side="right") - 1
        inside = (index >= 0) & (sites < self.start[index] + self.size[index])
        return np.where(inside, index, -1)

    @cached_property
    def direct_owner(self) -> npt.NDArray[np.int64]:
        """Function of each direct site."""
        return self.owners(self.sites.direct_site)

    @cached_property
    def slot_owner(self) -> npt.NDArray[np.int64]:
        """Function of each call through a slot."""
        return self.owners(self.sites.slot_site)

    @cached_property
    def taken_owner(self) -> npt.NDArray[np.int64]:
        """Function of each place where a function's address is taken."""
        return self.owners(self.sites.taken_site)

    @cached_property
    def loaded_owner(self) -> npt.NDArray[np.int64]:
        """Function of each load of a word at a known address."""
        return self.owners(self.sites.loaded_site)

    @cached_property
    def data_owner(self) -> npt.NDArray[np.int64]:
        """Function of each place where the address of data is taken."""
        return self.owners(self.sites.data_site)

    @cached_property
    def all_calls(self) -> I64:
        """Sites of all calls and tail calls, sorted."""
        return np.sort(np.concatenate([self.sites.direct_site, self.sites.slot_site, self.sites.indirect]))

    @cached_property
    def calls_outside(self) -> I64:
        """Those of them that do not call a function of this object by name, sorted."""
        sites = self.sites
        is_outside = sites.direct_jump | np.isin(sites.direct_target, self.stubs.start)
        return np.sort(np.concatenate([sites.direct_site[is_outside], sites.slot_site, sites.indirect]))

    @cached_property
    def unknown_calls(self) -> npt.NDArray[np.int64]:
        """Number of calls with unknown targets, by function."""
        owner = self.owners(self.sites.indirect)
        return np.bincount(owner[owner >= 0], minlength=len(self.start))


_GAP = 32
"""Bytes between two known functions that may hold another."""


def index_code(image: Image) -> CodeIndex:
    """Functions, stubs and sites of one object."""
    slots = _slot_map(image)
    stubs = _all_stubs(image, slots)
    start, size, resolvers = _functions(image, stubs)
    start, size = _with_called_gaps(image, start, size, stubs)
    landmarks = _landmarks(image, start, stubs.start)
    scanner = SCANNERS[image.machine]
    parts = [scanner.scan(image.read(rva, n), rva, landmarks) for rva, n in _joined_ranges(image)]
    index = CodeIndex(start, size, stubs, concatenate(parts or [Sites()]), np.searchsorted(start, resolvers))
    return _without_chance_hits(image, _without_stub_sites(index))


def find_stores(image: Image, first: I64, last: I64, offsets: I64, addresses: I64) -> Stores:
    """What may store a word at one of these offsets or addresses, in ranges (from, to) of code."""
    found = [Stores(first[:0], first[:0], np.zeros(0, bool))]
    for rva, size in _joined_ranges(image):
        code = image.read(rva, size)
        inside = (first >= rva) & (first < rva + len(code))
        ranges = first[inside] - rva, np.minimum(last[inside], rva + len(code)) - rva
        if inside.any():
            found.append(SCANNERS[image.machine].find_stores(code, rva, ranges, offsets, addresses))
    return concatenate(found)


def _joined_ranges(image: Image) -> list[tuple[int, int]]:
    """The code ranges, those joined that only padding separates: .init, .plt, .text and .fini are one to a scanner."""
    joined: list[tuple[int, int]] = []
    for rva, size in image.code_ranges:
        start, length = joined[-1] if joined else (rva, 0)
        if 0 <= rva - (start + length) <= _PADDING and len(image.read(start, rva + size - start)) == rva + size - start:
            joined[-1:] = [(start, rva + size - start)]
        else:
            joined.append((rva, size))
    return joined


def _slot_map(image: Image) -> EntryMap:
    """The GOT slots that some relocation fills."""
    table = image.relocations
    chosen = table.of(RelocationKind.GOT, RelocationKind.PLT, RelocationKind.IRELATIVE, RelocationKind.RELATIVE)
    slots = table.offset[chosen]
    named = table.offset[table.of(RelocationKind.GOT, RelocationKind.PLT, RelocationKind.IRELATIVE)]
    if not len(named):
        return EntryMap(0, 0, slots, slots)
    low, high = int(named.min()), int(named.max()) + 8
    if high - low > 1 << 27:  # hostile tables only: a GOT is contiguous
        low = high - (1 << 27)
    return EntryMap(low, high, slots, slots[:0])


def _all_stubs(image: Image, slots: EntryMap) -> Stubs:
    """Stubs in `.plt*` sections; without section headers, candidates outside any unwound function."""
    scanner = SCANNERS[image.machine]
    sections = [(s.rva, s.size) for s in image.sections if s.name.startswith((".plt", ".iplt")) and s.executable]
    ranges = sections or list(image.code_ranges)
    found = [scanner.find_stubs(image.read(rva, n), rva, slots) for rva, n in ranges]
    start = np.concatenate([f.start for f in found]) if found else np.zeros(0, np.int64)
    slot = np.concatenate([f.slot for f in found]) if found else np.zeros(0, np.int64)
    if not sections and len(start):
        keep = ~_inside_own_function(image, start)
        start, slot = start[keep], slot[keep]
    order = np.argsort(start, kind="stable")
    return Stubs(start[order], slot[order])


def _inside_own_function(image: Image, start: I64) -> npt.NDArray[np.bool_]:
    """True for candidates in an extent that holds fewer than two of them: a tail call, not a PLT."""
    extents = unwind.extents(image)
    if not len(extents):
        return np.zeros(len(start), bool)
    index = np.searchsorted(extents.start, start, side="right") - 1
    inside = (index >= 0) & (start < extents.start[index] + extents.size[index])
    counts = np.bincount(index[inside], minlength=len(extents))
    return inside & (counts[np.maximum(index, 0)] < 2)


def _functions(image: Image, stubs: Stubs) -> tuple[I64, I64, I64]:
    """(start, size, ifunc resolver starts) merged from unwind tables, symbols and known entry points."""
    extents = unwind.extents(image)
    keep = ~_holds_stub(extents, stubs.start)
    starts, sizes = [extents.start[keep]], [extents.size[keep]]
    resolvers = []
    for table in (image.dynamic_symbols, image.static_symbols, image.go_functions):
        start, size, resolver = _function_symbols(image, table)
        starts.append(start)
        sizes.append(size)
        resolvers.append(resolver)
    irelative = image.relocations
    resolvers.append(irelative.addend[irelative.of(RelocationKind.IRELATIVE)])
    known = [image.entry, *image.constructors, *image.destructors]
    # An entry of 0 is how a library says that it has none, even where address 0 holds code.
    extra = np.concatenate([np.array([k for k in known if k and image.is_executable(k)], np.int64), *resolvers])
    starts.append(extra)
    sizes.append(np.zeros(len(extra), np.int64))
    start, size = _merged(np.concatenate(starts), np.concatenate(sizes))
    outside = position_in(stubs.start, start) < 0
    start, size = start[outside], size[outside]
    found = unique(np.concatenate(resolvers))
    return start, _filled(image, start, size), found[position_in(start, found) >= 0]


def _holds_stub(extents: unwind.Extents, stub: I64) -> npt.NDArray[np.bool_]:
    """Extents that are a PLT: linkers write one FDE for it."""
    first = np.searchsorted(stub, extents.start)
    last = np.searchsorted(stub, extents.start + extents.size)
    return last > first


def _function_symbols(image: Image, table: SymbolTable) -> tuple[I64, I64, I64]:
    chosen = table.defined & ((table.type == STT_FUNC) | (table.type == STT_IFUNC))
    inside = np.zeros(len(table), bool)
    for segment in image.segments:
        if segment.executable:
            inside |= (table.value >= segment.rva) & (table.value < segment.rva + segment.file_size)
    chosen &= inside
    resolver = table.value[chosen & (table.type == STT_IFUNC)]
    return table.value[chosen], table.size[chosen], resolver


def _merged(start: I64, size: I64) -> tuple[I64, I64]:
    """Sorted by start; of several at one start, the longest."""
    if not len(start):
        return start, size
    order = np.argsort(start, kind="stable")  # quick, since the columns are runs that are nearly sorted
    start = start[order]
    first = np.ones(len(start), bool)
    first[1:] = start[1:] != start[:-1]
    return start[first], np.maximum.reduceat(size[order], np.flatnonzero(first))


def _filled(image: Image, start: I64, size: I64) -> I64:
    """Give functions of unknown size the room up to the next start or the end of their code range."""
    if not len(start):
        return size
    limit = np.append(start[1:], start[-1])
    for rva, length in image.code_ranges:
        inside = (start >= rva) & (start < rva + length)
        limit[inside] = np.minimum(np.where(limit[inside] > start[inside], limit[inside], rva + length), rva + length)
    return np.where(size > 0, size, np.maximum(limit - start, 0))


def _with_called_gaps(image: Image, start: I64, size: I64, stubs: Stubs) -> tuple[I64, I64]:
    """Add what is called directly but lies in no known function (assembly or Go without tables)."""
    scanner = SCANNERS[image.machine]
    gaps = _gaps(image, start, size, stubs)
    if sum(n for _, n in gaps) < 64:
        return start, size
    low = min(rva for rva, _ in gaps)
    high = max(rva + n for rva, n in gaps)
    if high - low > 1 << 28:
        return start, size
    candidates = np.concatenate([np.arange(r, r + n, 16 if image.machine is Machine.X86_64 else 4) for r, n in gaps])
    entries = EntryMap(low, high, candidates, candidates[:0])
    targets = [scanner.call_targets(image.read(rva, n), rva, entries) for rva, n in _joined_ranges(image)]
    new = unique(np.concatenate(targets)) if targets else candidates[:0]
    merged_start, merged_size = _merged(
        np.concatenate([start, new]), np.concatenate([size, np.zeros(len(new), np.int64)])
    )
    return merged_start, _filled(image, merged_start, merged_size)


def _gaps(image: Image, start: I64, size: I64, stubs: Stubs) -> list[tuple[int, int]]:
    """Aligned holes between known functions that are larger than padding (musl has small functions without tables)."""
    result = []
    for rva, length in image.code_ranges:
        inside = (start >= rva) & (start < rva + length)
        begins = np.append(start[inside], rva + length)
        ends = np.maximum.accumulate(np.concatenate([[rva], (start + size)[inside]]))
        for gap in np.flatnonzero(begins - ends >= _GAP).tolist():
            low = (int(ends[gap]) + 15) & ~15
            if not np.any((stubs.start >= low) & (stubs.start < begins[gap])):
                result.append((low, int(begins[gap]) - low))
    return result


def _landmarks(image: Image, start: I64, stubs: I64) -> Landmarks:
    """Tables of pointers lie in writable segments, except in an executable with a fixed base."""
    is_fixed = image.kind is ObjectKind.EXECUTABLE
    low = min(s.rva for s in image.segments)
    fixed = range(max(low, 1), max(s.rva + s.memory_size for s in image.segments)) if is_fixed else range(0)
    data = tuple(
        (int(s.rva), s.rva + s.memory_size) for s in image.segments if not s.executable and (s.writable or is_fixed)
    )
    return Landmarks(_entry_map(image, start, stubs), fixed, data, _function_words(image, start))


def _function_words(image: Image, start: I64) -> I64:
    """Words that the loader fills with the address of a function, or of a symbol that may be one, sorted."""
    slots, symbols = image.named_slots
    types = image.dynamic_symbols.type
    known = np.minimum(symbols, max(len(types) - 1, 0))
    named = slots[~among(types[known], (STT_OBJECT, STT_TLS))] if len(types) else slots
    words, targets = image.pointers
    return np.sort(np.concatenate([named, words[position_in(start, targets) >= 0]]))


def _entry_map(image: Image, start: I64, stubs: I64) -> EntryMap:
    ranges = image.code_ranges
    if not ranges:
        return EntryMap(0, 0, start, stubs)
    return EntryMap(min(r for r, _ in ranges), max(r + n for r, n in ranges), start, stubs)


def _without_stub_sites(index: CodeIndex) -> CodeIndex:
    """Drop what the scanners saw inside the PLT itself, and jumps of a function to its own start (loops)."""
    sites = index.sites
    owner = index.owners(sites.direct_site)
    own_start = index.start[np.maximum(owner, 0)] if len(index.start) else owner
    keep = (owner >= 0) & ~(sites.direct_jump & (sites.direct_target == own_start))
    slot_keep = index.owners(sites.slot_site) >= 0
    return _with_sites(
        index,
        direct_site=sites.direct_site[keep],
        direct_target=sites.direct_target[keep],
        direct_jump=sites.direct_jump[keep],
        slot_site=sites.slot_site[slot_keep],
        slot_address=sites.slot_address[slot_keep],
        slot_jump=sites.slot_jump[slot_keep],
    )


def _without_chance_hits(image: Image, index: CodeIndex) -> CodeIndex:
    """Drop branches that are bytes of another instruction, where there is reason to doubt them.

    A short jump's one byte of displacement may well hit a neighbour by chance, and of two branches that
    overlap one is none. These few (a hundred in a closure) are verified by decoding their functions up to
    them.
    """
    sites = index.sites
    doubtful = _doubtful(image, sites.direct_site)
    keep = np.ones(len(sites.direct_site), bool)
    owners = index.owners(sites.direct_site[doubtful])
    for owner in unique(owners).tolist():
        mine = doubtful[owners == owner]
        start, last = int(index.start[owner]), int(sites.direct_site[mine[-1]])
        known = boundaries(image, start, last + _LONGEST - start)
        keep[mine] = [site in known for site in sites.direct_site[mine].tolist()]
    return _with_sites(
        index,
        direct_site=sites.direct_site[keep],
        direct_target=sites.direct_target[keep],
        direct_jump=sites.direct_jump[keep],
    )


_PADDING: Final = 64
"""Bytes at most between two sections that are scanned as one."""
_LONGEST: Final = 15
"""Bytes of the longest x86-64 instruction."""


def _doubtful(image: Image, site: I64) -> npt.NDArray[np.intp]:
    """Positions, among sorted sites, of short jumps and of branches that overlap; x86-64 only."""
    doubtful = np.zeros(len(site), bool)
    if image.machine is Machine.X86_64:
        for rva, size in _joined_ranges(image):
            first, last = np.searchsorted(site, [rva, rva + size])
            doubtful[first:last] = image.read(rva, size)[site[first:last] - rva] == x86_64.SHORT_JUMP
        overlaps = np.flatnonzero((np.diff(site) < 5) & ~doubtful[:-1])
        doubtful[overlaps] = doubtful[overlaps + 1] = True
    return np.flatnonzero(doubtful)


def _with_sites(index: CodeIndex, **changed: npt.NDArray[Any]) -> CodeIndex:
    return CodeIndex(index.start, index.size, index.stubs, replace(index.sites, **changed), index.ifunc_resolvers)
