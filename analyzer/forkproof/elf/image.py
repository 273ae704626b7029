"""One ELF file as a position-independent image: segments, dynamic tables, symbols, relocations.

Owns: opening a file safely, and every table of it that the analysis reads. The bulk tables (symbols,
      relocations, versions) are numpy views: a closure has 50 k symbols and 270 k relocations, and one
      Python object for each would cost more than the whole analysis.
Takes: a path. Gives: an `Image`, which maps the file and never copies it whole.
Must never: execute the file, resolve anything against another file, or decide what a name means.
Wrong where: see `forkproof.elf.headers`.

Addresses are RVAs: run-time addresses minus the load bias (`dlpi_addr` of dl_iterate_phdr(3)), which are
the numbers that objdump and nm print, also for executables with a fixed base, whose bias is 0.

Source: the System V gABI, chapters 4 and 5; the x86-64 and AArch64 psABI; Drepper, "ELF Symbol
Versioning"; the RELR proposal (generic-abi, 2017).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.columns import among
from forkproof.elf import gopclntab
from forkproof.elf.headers import DT as _DT
from forkproof.elf.headers import Headers, Machine, ObjectKind, Rva, Section, Segment, read_headers
from forkproof.elf.tables import (
    I64,
    MAX_TABLE,
    RELA,
    RELOCATION_KINDS,
    SHN_ABS,
    STB_LOCAL,
    STT_FUNC,
    STT_IFUNC,
    SYMBOL,
    U8,
    RelocationKind,
    Relocations,
    SymbolTable,
    VersionNeed,
    Versions,
    records,
)
from forkproof.errors import NotElf, UnreadableFile

__all__ = ["I64", "U8", "Image", "Machine", "ObjectKind", "Rva", "Section", "Segment", "load", "load_symbols"]

Text = bytes  # a name that the property `bytes` of Image does not hide
_NOT_GO: Final = 256
"""Bytes of code that Go's linker leaves around its functions."""


@dataclass(frozen=True, eq=False)
class Image:
    """One ELF file, mapped. Every field is a fact of this file alone."""

    path: Path
    machine: Machine
    kind: ObjectKind
    entry: Rva
    interpreter: str | None
    soname: str | None
    needed: tuple[str, ...]
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]
    build_id: str | None
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    dynamic: Mapping[int, int]
    """DT_* tag to its last value (DT_NEEDED excepted: see `needed`)."""
    eh_frame_header: Rva | None
    data: mmap.mmap | bytes
    relro: tuple[tuple[Rva, int], ...] = ()
    """(rva, size) of what is read-only once relocations are done."""
    thread_image: tuple[Rva, int] | None = None
    """(rva, size) of what the variables of a new thread are copied from; those beyond it begin as 0."""

    # ---- bytes -------------------------------------------------------------------------------

    @cached_property
    def bytes(self) -> U8:
        """The file as a byte column."""
        return np.frombuffer(self.data, dtype=np.uint8)

    @cached_property
    def sha256(self) -> str:
        """Content hash, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def release(self) -> None:
        """Give back the memory of the mapping; what is read again comes from the page cache."""
        if isinstance(self.data, mmap.mmap):
            self.data.madvise(mmap.MADV_DONTNEED)

    def read(self, rva: int, size: int) -> U8:
        """Up to `size` bytes at an address; fewer (perhaps none) where the file has no more."""
        for segment in self.segments:
            if segment.rva <= rva < segment.rva + segment.file_size:
                start = segment.offset + (rva - segment.rva)
                return self.bytes[start : min(start + size, segment.offset + segment.file_size)]
        return self.bytes[:0]

    def read_u64(self, rva: int) -> int | None:
        """The little-endian word stored at an address in the file."""
        raw = self.read(rva, 8)
        return int.from_bytes(raw.tobytes(), "little") if len(raw) == 8 else None

    def read_string(self, rva: int, limit: int = 4096) -> str | None:
        """The NUL-terminated string at an address; None where there is none."""
        raw = self.read(rva, limit).tobytes()
        end = raw.find(b"\0")
        return None if end < 0 else raw[:end].decode("utf-8", "backslashreplace")

    def is_executable(self, rva: int) -> bool:
        """True when the address lies in an executable segment."""
        return any(s.executable and s.rva <= rva < s.rva + s.memory_size for s in self.segments)

    def is_writable(self, rva: int) -> bool:
        """True when the address lies in a writable segment."""
        return any(s.writable and s.rva <= rva < s.rva + s.memory_size for s in self.segments)

    @cached_property
    def code_ranges(self) -> tuple[tuple[Rva, int], ...]:
        """(rva, size) of what holds instructions: executable sections, or segments where there are none."""
        from_sections = [(s.rva, s.size) for s in self.sections if s.executable and s.has_bits and s.size]
        inside = [(r, n) for r, n in from_sections if self.is_executable(r) and len(self.read(r, n)) == n]
        if inside:
            return tuple(sorted(inside))
        return tuple((s.rva, s.file_size) for s in self.segments if s.executable and s.file_size)

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return next((s for s in self.sections if s.name == name), None)

    # ---- symbols and relocations -----------------------------------------------------------

    @cached_property
    def dynamic_symbols(self) -> SymbolTable:
        """DT_SYMTAB, with versions."""
        count = self._dynamic_symbol_count()
        start = self.dynamic.get(_DT.SYMTAB)
        if start is None or not count:
            return SymbolTable(np.zeros(0, SYMBOL), b"\0", None)
        raw = self.read(start, count * SYMBOL.itemsize)
        table = records(raw, SYMBOL)
        versym = self.dynamic.get(_DT.VERSYM)
        versions = None
        if versym is not None:
            column = records(self.read(versym, 2 * len(table)), np.dtype("<u2"))
            versions = column if len(column) == len(table) else None
        return SymbolTable(table, self._dynamic_strings, versions)

    @cached_property
    def static_symbols(self) -> SymbolTable:
        """`.symtab`, empty when stripped."""
        section, strings = self.section(".symtab"), self.section(".strtab")
        if section is None or strings is None or section.size > MAX_TABLE:
            return SymbolTable(np.zeros(0, SYMBOL), b"\0", None)
        raw = self.bytes[section.offset : section.offset + section.size]
        text = self.bytes[strings.offset : strings.offset + strings.size].tobytes()
        return SymbolTable(records(raw, SYMBOL), text or b"\0", None)

    @cached_property
    def go_functions(self) -> SymbolTable:
        """The functions of Go's own table, which stripping leaves; empty for all other programs."""
        section = self.section(".gopclntab") or self.section(".data.rel.ro.gopclntab")
        found = None
        if section is not None and section.size <= MAX_TABLE:
            raw = self.bytes[section.offset : section.offset + section.size]
            found = gopclntab.parse(raw, lambda offset: self.pointer_at(section.rva + offset), self.entry)
        if found is None:
            return SymbolTable(np.zeros(0, SYMBOL), b"\0", None)
        table = np.zeros(len(found.start), SYMBOL)
        table["name"], table["value"], table["size"] = found.name, found.start, found.size
        table["info"], table["section"] = STB_LOCAL << 4 | STT_FUNC, SHN_ABS
        return SymbolTable(table, found.strings, None)

    @property
    def has_names(self) -> bool:
        """Some function of it has a name; null entries and section symbols say nothing.

        Go's own table counts where there is no other code than Go's.
        """
        tables = (self.dynamic_symbols, self.static_symbols)
        return self._is_all_go or any(bool((t.defined & among(t.type, (STT_FUNC, STT_IFUNC))).any()) for t in tables)

    @property
    def _is_all_go(self) -> bool:
        table, text = self.go_functions, self.section(".text")
        if not len(table) or text is None:
            return False
        return bool(text.size - int(table.size.sum()) <= _NOT_GO)

    @cached_property
    def versions(self) -> Versions:
        """DT_VERNEED and DT_VERDEF."""
        needs = {i: VersionNeed(f, v, w) for f, v, i, w in self._version_needs()}
        definitions: dict[int, str] = {}
        base = None
        for index, name, is_base in self._version_definitions():
            definitions[index] = name
            base = index if is_base else base
        return Versions(needs, definitions, base)

    @cached_property
    def relocations(self) -> Relocations:
        """Every dynamic relocation; for a static executable, its IRELATIVE table."""
        tables = [self._rela(_DT.RELA, _DT.RELASZ), self._relr(), self._rela(_DT.JMPREL, _DT.PLTRELSZ)]
        if not self.dynamic:
            tables = [self._rela_section(".rela.plt"), self._rela_section(".rela.iplt")]
        raw = np.concatenate(tables)
        types = (raw["info"] & 0xFFFFFFFF).astype(np.int64)
        kinds = np.zeros(len(raw), np.uint8)
        for number, kind in RELOCATION_KINDS[self.machine].items():
            kinds[types == number] = kind
        symbol = (raw["info"] >> 32).astype(np.uint32)
        return Relocations(raw["offset"].copy(), kinds, symbol, raw["addend"].copy())

    @cached_property
    def pointers(self) -> tuple[I64, I64]:
        """(slot, target) of words that the loader makes point into this same object, sorted by slot."""
        table = self.relocations
        chosen = table.of(RelocationKind.RELATIVE)
        chosen = chosen[np.argsort(table.offset[chosen], kind="stable")]
        return table.offset[chosen], table.addend[chosen]

    @cached_property
    def named_slots(self) -> tuple[I64, I64]:
        """(slot, dynamic symbol index) of GOT, PLT and pointer relocations that name a symbol, sorted by slot.

        Of several for one slot, the last comes last, and it is the one that counts.
        """
        table = self.relocations
        chosen = table.of(RelocationKind.GOT, RelocationKind.PLT, RelocationKind.ABSOLUTE)
        chosen = chosen[table.symbol[chosen] != 0]
        chosen = chosen[np.argsort(table.offset[chosen], kind="stable")]
        return table.offset[chosen], table.symbol[chosen].astype(np.int64)

    @cached_property
    def slot_symbols(self) -> Mapping[int, int]:
        """`named_slots` for single questions."""
        slots, symbols = self.named_slots
        return dict(zip(slots.tolist(), symbols.tolist(), strict=True))

    def symbols_at(self, slots: I64) -> I64:
        """The dynamic symbol that each slot names; -1 for none."""
        known, symbols = self.named_slots
        result = np.full(len(slots), -1, np.int64)
        position = known.searchsorted(slots, side="right") - 1
        hit = position >= 0
        hit[hit] = known[position[hit]] == slots[hit]
        result[hit] = symbols[position[hit]]
        return result

    @cached_property
    def thread_slots(self) -> Mapping[int, int]:
        """Slot to place in the object's own variables of the thread, of the words that tell where such a variable is.

        The word of a module has the place beside it: told by a relocation of its own, or known when it was linked.
        """
        table, symbols = self.relocations, self.dynamic_symbols
        chosen = table.of(RelocationKind.TLS, RelocationKind.MODULE)
        found, modules = {}, []
        for row in chosen.tolist():
            slot, symbol = int(table.offset[row]), int(table.symbol[row])
            if table.kind[row] == RelocationKind.MODULE:
                modules.append(slot)
            elif symbol == 0 or (symbol < len(symbols) and symbols.defined[symbol]):
                found[slot] = int(table.addend[row]) + (int(symbols.value[symbol]) if symbol else 0)
        beside = {slot: found.get(slot + 8, self.read_u64(slot + 8)) for slot in modules}
        return found | {slot: place for slot, place in beside.items() if place is not None}

    @cached_property
    def irelative_slots(self) -> Mapping[int, int]:
        """Slot to resolver for words that hold the result of an IFUNC resolver."""
        table = self.relocations
        chosen = table.of(RelocationKind.IRELATIVE)
        return dict(zip(table.offset[chosen].tolist(), table.addend[chosen].tolist(), strict=True))

    @property
    def binds_now(self) -> bool:
        """True when ld.so resolves PLT slots before any code of the object runs."""
        flags, flags_1 = self.dynamic.get(_DT.FLAGS, 0), self.dynamic.get(_DT.FLAGS_1, 0)
        return bool(flags & 8 or flags_1 & 1 or _DT.BIND_NOW in self.dynamic)

    @property
    def is_symbolic(self) -> bool:
        """True when the object's own definitions come first for its own references (-Bsymbolic)."""
        return bool(self.dynamic.get(_DT.FLAGS, 0) & 2 or _DT.SYMBOLIC in self.dynamic)

    @property
    def is_static(self) -> bool:
        """True for a program that no dynamic linker completes."""
        return self.kind is not ObjectKind.SHARED and self.interpreter is None and not self.needed

    @cached_property
    def constructors(self) -> tuple[Rva, ...]:
        """Functions run before main, in the order in which they run: preinit_array, DT_INIT, init_array.

        Slots whose content is a relocation against a symbol of another object are left out.
        Source: gABI, "Initialization and Termination Functions".
        """
        first = self._function_array(_DT.PREINIT_ARRAY, _DT.PREINIT_ARRAYSZ, ".preinit_array")
        init = self.dynamic.get(_DT.INIT)
        middle = [Rva(init)] if init else []
        return tuple(first + middle + self._function_array(_DT.INIT_ARRAY, _DT.INIT_ARRAYSZ, ".init_array"))

    @cached_property
    def destructors(self) -> tuple[Rva, ...]:
        """Functions run at exit: fini_array reversed, then DT_FINI."""
        array = self._function_array(_DT.FINI_ARRAY, _DT.FINI_ARRAYSZ, ".fini_array")
        fini = self.dynamic.get(_DT.FINI)
        return tuple(array[::-1] + ([Rva(fini)] if fini else []))

    # ---- private -----------------------------------------------------------------------------

    @cached_property
    def _dynamic_strings(self) -> Text:
        start, size = self.dynamic.get(_DT.STRTAB), self.dynamic.get(_DT.STRSZ, 0)
        if start is None or size > MAX_TABLE:
            return b"\0"
        return self.read(start, size).tobytes() or b"\0"

    def dynamic_string(self, offset: int) -> str:
        """The string at an offset of DT_STRTAB."""
        end = self._dynamic_strings.find(b"\0", offset)
        return self._dynamic_strings[offset : max(end, offset)].decode("utf-8", "backslashreplace")

    def _dynamic_symbol_count(self) -> int:
        """From the hash tables, as ld.so sees it; the section header is the last resort."""
        if (start := self.dynamic.get(_DT.HASH)) is not None:
            raw = records(self.read(start, 8), np.dtype("<u4"))
            if len(raw) == 2 and raw[1] * SYMBOL.itemsize < MAX_TABLE:
                return int(raw[1])
        if (start := self.dynamic.get(_DT.GNU_HASH)) is not None:
            count = self._gnu_hash_count(start)
            if count is not None:
                return count
        section = self.section(".dynsym")
        return min(section.size, MAX_TABLE) // SYMBOL.itemsize if section else 0

    def _gnu_hash_count(self, start: int) -> int | None:
        header = records(self.read(start, 16), np.dtype("<u4"))
        if len(header) != 4:
            return None
        buckets, first, bloom = int(header[0]), int(header[1]), int(header[2])
        if max(buckets, first, bloom) * 8 > MAX_TABLE:
            return None
        at = start + 16 + 8 * bloom
        column = records(self.read(at, 4 * buckets), np.dtype("<u4"))
        last = int(column.max()) if len(column) else 0
        if last < first:
            # No defined symbols: the table says nothing about the undefined ones before `first`.
            section = self.section(".dynsym")
            return max(first, section.size // SYMBOL.itemsize) if section else first
        chain = at + 4 * buckets + 4 * (last - first)
        while len(word := self.read(chain, 4)) == 4:
            last += 1
            chain += 4
            if word[0] & 1:
                return last
        return None

    def _version_needs(self) -> Iterator[tuple[str, str, int, bool]]:
        at = self.dynamic.get(_DT.VERNEED)
        for _ in range(self.dynamic.get(_DT.VERNEEDNUM, 0)):
            raw = self.read(at, 16).tobytes() if at is not None else b""
            if len(raw) < 16 or at is None:
                return
            _, count, file, aux, following = struct.unpack("<HHIII", raw)
            entry = at + aux
            for _ in range(count):
                raw = self.read(entry, 16).tobytes()
                if len(raw) < 16:
                    return
                _, flags, other, name, step = struct.unpack("<IHHII", raw)
                yield self.dynamic_string(file), self.dynamic_string(name), other & 0x7FFF, bool(flags & 2)
                if not step:
                    break
                entry += step
            if not following:
                return
            at += following

    def _version_definitions(self) -> Iterator[tuple[int, str, bool]]:
        at = self.dynamic.get(_DT.VERDEF)
        for _ in range(self.dynamic.get(_DT.VERDEFNUM, 0)):
            raw = self.read(at, 20).tobytes() if at is not None else b""
            if len(raw) < 20 or at is None:
                return
            _, flags, index, _, _, aux, following = struct.unpack("<HHHHIII", raw)
            name = self.read(at + aux, 4).tobytes()
            if len(name) == 4:
                yield index & 0x7FFF, self.dynamic_string(int.from_bytes(name, "little")), bool(flags & 1)
            if not following:
                return
            at += following

    def _rela(self, start_tag: int, size_tag: int) -> npt.NDArray[np.void]:
        start, size = self.dynamic.get(start_tag), self.dynamic.get(size_tag, 0)
        if start is None or not 0 < size < MAX_TABLE:
            return np.zeros(0, RELA)
        return records(self.read(start, size), RELA)

    def _rela_section(self, name: str) -> npt.NDArray[np.void]:
        section = self.section(name)
        if section is None or section.size > MAX_TABLE:
            return np.zeros(0, RELA)
        return records(self.bytes[section.offset : section.offset + section.size], RELA)

    def _relr(self) -> npt.NDArray[np.void]:
        """DT_RELR: an address, then bitmaps of the 63 words after it; the addends stand in place."""
        start, size = self.dynamic.get(_DT.RELR), self.dynamic.get(_DT.RELRSZ, 0)
        if start is None or not 0 < size < MAX_TABLE:
            return np.zeros(0, RELA)
        slots: list[int] = []
        base = 0
        for word in records(self.read(start, size), np.dtype("<u8")).tolist():
            if word & 1:
                slots += [base + 8 * bit for bit in range(63) if word >> (bit + 1) & 1]
                base += 63 * 8
            else:
                slots.append(word)
                base = word + 8
        relative = 8 if self.machine is Machine.X86_64 else 1027
        result = np.zeros(len(slots), RELA)
        result["offset"] = slots
        result["info"] = relative
        result["addend"] = [self.read_u64(slot) or 0 for slot in slots]
        return result

    def _function_array(self, start_tag: int, size_tag: int, section: str) -> list[Rva]:
        start, size = self.dynamic.get(start_tag), self.dynamic.get(size_tag, 0)
        if start is None and self.is_static and (found := self.section(section)):
            start, size = found.rva, found.size
        if start is None or size > MAX_TABLE:
            return []
        result = []
        for slot in range(start, start + size - 7, 8):
            target = self.pointer_at(slot)
            if target is not None and self.is_executable(target):
                result.append(Rva(target))
        return result

    def pointers_at(self, slots: I64) -> I64:
        """Where relocated words lead inside this object, as `pointer_at` without symbols; -1 for nowhere."""
        known, targets = self.pointers
        result = np.full(len(slots), -1, np.int64)
        if len(known):
            position = np.minimum(np.searchsorted(known, slots), len(known) - 1)
            hit = known[position] == slots
            result[hit] = targets[position[hit]]
        elif self.kind is ObjectKind.EXECUTABLE or self.is_static:
            result[:] = [self.pointer_at(slot) or -1 for slot in slots.tolist()]
        return result

    def pointer_at(self, slot: int) -> int | None:
        """Where the pointer stored at `slot` leads inside this object once relocated, or None.

        A relocation against a symbol that this object defines counts as its own definition, although
        another object may interpose it: callers that care ask the closure.
        """
        slots, targets = self.pointers
        position = int(np.searchsorted(slots, slot))
        if position < len(slots) and int(slots[position]) == slot:
            return int(targets[position])
        if (symbol := self.slot_symbols.get(slot)) is not None:
            table = self.dynamic_symbols
            if symbol < len(table) and table.defined[symbol]:
                return int(table.value[symbol])
            return None
        if self.kind is ObjectKind.EXECUTABLE or self.is_static:
            word = self.read_u64(slot)
            return word if word is not None and 0 < word < 1 << 47 else None
        return None


def load(path: Path | str) -> Image:
    """Open and decode one ELF file.

    Raises UnreadableFile, NotElf, UnsupportedElf or DamagedElf, each naming the file and the reason.
    """
    path = Path(path)
    data = _map(path)
    return _image(path, data, read_headers(path, data))


def load_symbols(data: bytes, path: Path) -> Image:
    """Decode a debug file, of which only names are wanted: its segments have no content.

    Raises the same errors as `load`.
    """
    return _image(path, data, read_headers(path, data, with_content=False))


def _image(path: Path, data: mmap.mmap | bytes, headers: Headers) -> Image:
    image = Image(
        path=path,
        machine=headers.machine,
        kind=headers.kind,
        entry=headers.entry,
        interpreter=headers.interpreter,
        soname=None,
        needed=(),
        rpath=(),
        runpath=(),
        build_id=headers.build_id,
        segments=headers.segments,
        sections=headers.sections,
        dynamic=headers.dynamic,
        eh_frame_header=headers.eh_frame_header,
        relro=headers.relro,
        thread_image=headers.thread_image,
        data=data,
    )
    return _with_names(image, headers.needed)


def _with_names(image: Image, needed: tuple[int, ...]) -> Image:
    """Fill the fields that are strings of DT_STRTAB, which only an Image can read."""

    def text(tag: int) -> str | None:
        return image.dynamic_string(image.dynamic[tag]) if tag in image.dynamic else None

    def search(tag: int) -> tuple[str, ...]:
        value = text(tag)
        return tuple(value.split(":")) if value else ()

    names = {
        "soname": text(_DT.SONAME),
        "needed": tuple(dict.fromkeys(image.dynamic_string(o) for o in needed)),
        "rpath": search(_DT.RPATH),
        "runpath": search(_DT.RUNPATH),
    }
    for name, value in names.items():
        object.__setattr__(image, name, value)
    return image


def _map(path: Path) -> mmap.mmap:
    try:
        # O_NONBLOCK: a FIFO among the targets must not stop the run before its type is known.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnreadableFile(path, _os_reason(error), next_step=_os_help(error)) from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableFile(path, "is a directory, expected an ELF file", next_step="Name a file inside it.")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile(path, "is not a regular file, expected an ELF file")
        if status.st_size == 0:
            raise NotElf(path, "is empty, expected an ELF file")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UnreadableFile(path, _os_reason(error)) from error
    finally:
        os.close(descriptor)


def _os_reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _os_help(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "Check the spelling; inside a sysroot give the path below it, for example /usr/bin/NAME."
    if isinstance(error, PermissionError):
        return "Run as a user who may read it, or copy it somewhere readable."
    return ""
