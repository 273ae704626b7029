"""The headers of one ELF file: segments, sections, dynamic section, interpreter, build-id.

Owns: decoding Elf64_Ehdr, Elf64_Phdr, Elf64_Shdr, Elf64_Dyn and the build-id note, and saying what is
      wrong with a file that cannot be analysed.
Takes: the bytes of a file. Gives: `Headers`, or one of the errors of `forkproof.errors`.
Must never: trust a size, an offset or a count before it was compared with the length of the file.
Wrong where: section headers are forged (they are hints; segments and DT_* decide).

Why not lief here: importing it costs 0.29 s and 49 MiB, and it reads each file whole, which together is
more than the whole scan of a 50-object closure needs for its headers (0.02 s this way). lief explains core
files (`forkproof.elf.core`), and the tests compare every field of this module with what lief decodes.

Source: System V gABI, chapters 4 and 5; psABI of both machines; gnu-gabi "build-id".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, NewType, Protocol, overload

import numpy as np
import numpy.typing as npt

from forkproof.errors import DamagedElf, NotElf, UnsupportedElf

Rva = NewType("Rva", int)

_PROGRAM_HEADER: Final = np.dtype(
    [("type", "<u4"), ("flags", "<u4"), ("offset", "<u8"), ("vaddr", "<u8"), ("paddr", "<u8"),
     ("filesz", "<u8"), ("memsz", "<u8"), ("align", "<u8")]
)  # fmt: skip
_SECTION_HEADER: Final = np.dtype(
    [("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("addr", "<u8"), ("offset", "<u8"), ("size", "<u8"),
     ("link", "<u4"), ("info", "<u4"), ("align", "<u8"), ("entsize", "<u8")]
)  # fmt: skip
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE, _PT_TLS = 1, 2, 3, 4, 7
_PT_GNU_EH_FRAME, _PT_GNU_RELRO = 0x6474E550, 0x6474E552
_ET_CORE: Final = 4
_SHT_NOBITS: Final = 8
_NT_GNU_BUILD_ID: Final = 3
_MAX_SECTIONS: Final = 1 << 16
_LIMIT: Final = 1 << 47
"""No user address and no sane offset is larger."""


class Data(Protocol):
    """What the decoders need of bytes and of a mapping of a file alike."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> bytes: ...


class Machine(Enum):
    """An instruction set that forkproof analyses; values are the report's words."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"


class ObjectKind(Enum):
    """What the ELF header says that the file is."""

    EXECUTABLE = "executable"
    PIE = "pie"
    SHARED = "shared"
    CORE = "core"


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD program header."""

    rva: Rva
    offset: int
    file_size: int
    memory_size: int
    readable: bool
    writable: bool
    executable: bool


@dataclass(frozen=True, slots=True)
class Section:
    """A section header; a hint only, since stripping may remove them all."""

    name: str
    rva: Rva
    offset: int
    size: int
    executable: bool
    allocated: bool
    has_bits: bool


@dataclass(frozen=True, slots=True)
class Headers:
    """Everything that stands in fixed places of the file."""

    machine: Machine
    kind: ObjectKind
    entry: Rva
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    dynamic: Mapping[int, int]
    """DT_* tag to its last value (DT_NEEDED excepted)."""
    needed: tuple[int, ...]
    """Offsets into DT_STRTAB, in order."""
    interpreter: str | None
    build_id: str | None
    eh_frame_header: Rva | None
    relro: tuple[tuple[Rva, int], ...]
    """(rva, size) of what is read-only once relocations are done."""
    thread_image: tuple[Rva, int] | None
    """(rva, size) of what the variables of a new thread are copied from; those beyond it begin as 0."""


class DT:
    """Tags of the dynamic section (gABI; GNU extensions)."""

    NEEDED, STRTAB, SYMTAB, RELA, RELASZ, STRSZ, INIT, FINI, SONAME = 1, 5, 6, 7, 8, 10, 12, 13, 14
    HASH, RPATH, SYMBOLIC, PLTRELSZ, JMPREL, BIND_NOW = 4, 15, 16, 2, 23, 24
    INIT_ARRAY, FINI_ARRAY, INIT_ARRAYSZ, FINI_ARRAYSZ, RUNPATH, FLAGS = 25, 26, 27, 28, 29, 30
    PREINIT_ARRAY, PREINIT_ARRAYSZ, RELRSZ, RELR = 32, 33, 35, 36
    GNU_HASH, VERSYM, FLAGS_1 = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFB
    VERDEF, VERDEFNUM, VERNEED, VERNEEDNUM = 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF


_DF_1_PIE: Final = 0x08000000
_MACHINES: Final = {62: Machine.X86_64, 183: Machine.AARCH64}
_OTHER_MACHINES: Final = {
    2: "SPARC", 3: "i386", 8: "MIPS", 20: "PowerPC", 21: "ppc64", 22: "s390x", 40: "ARM", 243: "RISC-V",
    258: "LoongArch",
}  # fmt: skip
_KINDS: Final = {1: "a relocatable object (.o), not linked yet"}


def read_headers(path: Path, data: Data, *, with_content: bool = True) -> Headers:
    """Decode the headers of a file.

    `with_content` False is for debug files, whose loadable segments have no bytes in the file.
    Raises NotElf, UnsupportedElf or DamagedElf.
    """
    machine, elf_type = _identify(path, data)
    table = _program_headers(path, data)
    segments = tuple(_segments(table))
    if with_content and elf_type != _ET_CORE:  # a core maps the vsyscall page, and is often cut short
        _check_segments(path, segments, len(data))
    dynamic, needed = _dynamic(table, data) if with_content else ({}, ())
    has_interpreter = bool(np.any(table["type"] == _PT_INTERP))
    return Headers(
        machine=machine,
        kind=_kind(elf_type, dynamic, has_interpreter),
        entry=Rva(struct.unpack_from("<Q", data[:64], 24)[0]),
        segments=segments,
        sections=tuple(_sections(data)),
        dynamic=dynamic,
        needed=needed,
        interpreter=_interpreter(table, data),
        build_id=_build_id(table, data),
        eh_frame_header=next((Rva(a) for a in table["vaddr"][table["type"] == _PT_GNU_EH_FRAME].tolist()), None),
        relro=tuple((Rva(int(h["vaddr"])), int(h["memsz"])) for h in table[table["type"] == _PT_GNU_RELRO]),
        thread_image=next(((Rva(int(h["vaddr"])), int(h["filesz"])) for h in table[table["type"] == _PT_TLS]), None),
    )


def _instead(head: bytes) -> str:
    """What to do with what is no ELF file."""
    if head[:2] == b"#!":
        return "A shell script stands for the ELF program that it starts, if that is in the sysroot: --sysroot DIR."
    if head[:21] == b"!<arch>\ndebian-binary":
        return "Packages are read by scan, matrix and diff; or unpack it, and name its program with --sysroot DIR."
    is_json = head.lstrip()[:1] == b"{"
    return "If it is a saved report, show it: forkproof report FILE." if is_json else ""


def _identify(path: Path, data: Data) -> tuple[Machine, int]:
    head = data[:64]
    if head[:4] != b"\x7fELF":
        looks = "a script" if head[:2] == b"#!" else "an archive" if head[:7] == b"!<arch>" else "not ELF"
        raise NotElf(path, f"is {looks}: expected an ELF program or shared object", next_step=_instead(head))
    if len(head) < 64:
        raise DamagedElf(path, f"is truncated: {len(head)} bytes, an ELF64 header has 64")
    if head[4] != 2:
        raise UnsupportedElf(path, "is a 32-bit ELF file; forkproof analyses ELF64")
    if head[5] != 1:
        raise UnsupportedElf(path, "is a big-endian ELF file; forkproof analyses little-endian ones")
    elf_type, number = struct.unpack_from("<HH", head, 16)
    if number not in _MACHINES:
        name = _OTHER_MACHINES.get(number, f"machine {number}")
        raise UnsupportedElf(path, f"is for {name}; forkproof analyses x86-64 and aarch64")
    if elf_type not in (2, 3, 4):
        what = _KINDS.get(elf_type, f"ELF type {elf_type}")
        raise UnsupportedElf(path, f"is {what}; expected a program, a shared object or a core")
    return _MACHINES[number], elf_type


def _program_headers(path: Path, data: Data) -> npt.NDArray[Any]:
    head = data[:64]
    (offset,) = struct.unpack_from("<Q", head, 32)
    entry, count = struct.unpack_from("<HH", head, 54)
    if entry != _PROGRAM_HEADER.itemsize or count == 0:
        raise DamagedElf(path, f"has no program headers of 56 bytes ({count} of {entry})")
    if offset + entry * count > len(data):
        raise DamagedElf(path, "is truncated: its program headers lie beyond the end of the file")
    return np.frombuffer(data[offset : offset + entry * count], _PROGRAM_HEADER)


def _segments(table: npt.NDArray[Any]) -> Iterator[Segment]:
    for header in table[table["type"] == _PT_LOAD]:
        flags = int(header["flags"])
        yield Segment(
            rva=Rva(int(header["vaddr"])),
            offset=int(header["offset"]),
            file_size=int(header["filesz"]),
            memory_size=int(header["memsz"]),
            readable=bool(flags & 4),
            writable=bool(flags & 2),
            executable=bool(flags & 1),
        )


def _check_segments(path: Path, segments: tuple[Segment, ...], size: int) -> None:
    if not segments:
        raise DamagedElf(path, "has no loadable segment", next_step="A debug file (.debug) has none: name the program.")
    for segment in segments:
        if segment.rva + max(segment.memory_size, segment.file_size) > _LIMIT:
            raise DamagedElf(path, f"maps a segment at {segment.rva:#x}, beyond any user address")
        if segment.offset + segment.file_size > size:
            missing = segment.offset + segment.file_size - size
            raise DamagedElf(path, f"is truncated: {missing} bytes of a loadable segment are missing")


def _kind(elf_type: int, dynamic: Mapping[int, int], has_interpreter: bool) -> ObjectKind:
    if elf_type == _ET_CORE:
        return ObjectKind.CORE
    if elf_type == 2:
        return ObjectKind.EXECUTABLE
    if dynamic.get(DT.FLAGS_1, 0) & _DF_1_PIE or (has_interpreter and DT.SONAME not in dynamic):
        return ObjectKind.PIE
    return ObjectKind.SHARED


def _content(header: np.void, data: Data, limit: int) -> bytes:
    start, size = int(header["offset"]), int(header["filesz"])
    return data[start : start + min(size, limit)] if start < len(data) else b""


def _dynamic(table: npt.NDArray[Any], data: Data) -> tuple[dict[int, int], tuple[int, ...]]:
    tags: dict[int, int] = {}
    needed: list[int] = []
    for header in table[table["type"] == _PT_DYNAMIC][:1]:
        raw = _content(header, data, 1 << 20)
        words = np.frombuffer(raw[: len(raw) // 16 * 16], "<u8").reshape(-1, 2)
        for tag, value in words.tolist():
            if tag == 0:
                break
            if tag == DT.NEEDED:
                needed.append(value)
            elif value < _LIMIT:
                tags[tag] = value
    return tags, tuple(needed)


def _interpreter(table: npt.NDArray[Any], data: Data) -> str | None:
    for header in table[table["type"] == _PT_INTERP]:
        return _content(header, data, 4096).split(b"\0")[0].decode("utf-8", "backslashreplace")
    return None


def _build_id(table: npt.NDArray[Any], data: Data) -> str | None:
    for header in table[table["type"] == _PT_NOTE]:
        raw = _content(header, data, 1 << 20)
        align = 8 if int(header["align"]) == 8 else 4
        at = 0
        while at + 12 <= len(raw):
            name_size, size, kind = struct.unpack_from("<III", raw, at)
            name = at + 12
            start = (name + name_size + align - 1) // align * align
            if kind == _NT_GNU_BUILD_ID and raw[name : name + name_size] == b"GNU\0":
                return raw[start : start + size].hex()
            at = (start + size + align - 1) // align * align
    return None


def _sections(data: Data) -> Iterator[Section]:
    """Section headers that lie inside the file; none where the table itself does not."""
    head = data[:64]
    (offset,) = struct.unpack_from("<Q", head, 40)
    entry, count, names_index = struct.unpack_from("<HHH", head, 58)
    if entry != _SECTION_HEADER.itemsize or not 0 < offset <= len(data) - entry:
        return
    if count == 0:  # more than 0xff00 sections: the number stands in the first header
        (count,) = struct.unpack_from("<Q", data[offset : offset + entry], 32)
    end = offset + entry * min(count, _MAX_SECTIONS)
    if end > len(data):
        return
    table = np.frombuffer(data[offset:end], _SECTION_HEADER)
    if names_index >= len(table):
        return
    start, size = int(table[names_index]["offset"]), int(table[names_index]["size"])
    names = data[start : start + min(size, 1 << 22)] if start < len(data) else b""
    for row in table.tolist():
        name, kind, flags, address, place, length = row[:6]
        has_bits = kind != _SHT_NOBITS
        if (has_bits and place + length > len(data)) or address + length > _LIMIT:
            continue
        text = names[name : max(names.find(b"\0", name), name)].decode("utf-8", "backslashreplace")
        yield Section(text, Rva(address), place, length, bool(flags & 4), bool(flags & 2), has_bits)
