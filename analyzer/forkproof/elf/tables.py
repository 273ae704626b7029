"""The bulk tables of an ELF file as columns: symbols, their versions, relocations.

Owns: what a row of each table is, and the numbers that they use.
Takes: raw bytes, as `forkproof.elf.image` finds them. Gives: numpy columns; names are decoded on first use.
Must never: know where in a file a table is.
Wrong where: nothing known; a damaged table gives damaged rows, and it is for the reader to bound its size.

Source: the System V gABI, chapters 4 and 5; the x86-64 and AArch64 psABI; Drepper, "ELF Symbol Versioning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from forkproof.columns import among
from forkproof.elf.headers import Machine

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

SYMBOL: Final = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<i8"), ("size", "<i8")]
)
RELA: Final = np.dtype([("offset", "<i8"), ("info", "<u8"), ("addend", "<i8")])
MAX_TABLE: Final = 1 << 28
"""No table of a sane object is larger (bytes); a damaged header may claim any size."""


class RelocationKind(IntEnum):
    """Relocation types of both machines, reduced to what they do."""

    OTHER = 0
    ABSOLUTE = 1
    """S + A, a pointer to a symbol in data."""
    COPY = 2
    GOT = 3
    """GLOB_DAT: a GOT slot filled when the object is loaded."""
    PLT = 4
    """JUMP_SLOT: a GOT slot filled on first call, or at load under BIND_NOW."""
    RELATIVE = 5
    """B + A, a pointer into the same object."""
    IRELATIVE = 6
    """The result of calling the resolver at B + A."""
    TLS = 7
    """Where a variable of the thread is: its place, or a descriptor."""
    MODULE = 8
    """DTPMOD: the object whose variables of the thread are meant; the word beside it tells which one."""


RELOCATION_KINDS: Final[Mapping[Machine, Mapping[int, RelocationKind]]] = {
    Machine.X86_64: {
        1: RelocationKind.ABSOLUTE,
        5: RelocationKind.COPY,
        6: RelocationKind.GOT,
        7: RelocationKind.PLT,
        8: RelocationKind.RELATIVE,
        16: RelocationKind.MODULE,
        17: RelocationKind.TLS,
        18: RelocationKind.TLS,
        36: RelocationKind.TLS,
        37: RelocationKind.IRELATIVE,
    },
    Machine.AARCH64: {
        257: RelocationKind.ABSOLUTE,
        1024: RelocationKind.COPY,
        1025: RelocationKind.GOT,
        1026: RelocationKind.PLT,
        1027: RelocationKind.RELATIVE,
        1028: RelocationKind.MODULE,
        1029: RelocationKind.TLS,
        1030: RelocationKind.TLS,
        1031: RelocationKind.TLS,
        1032: RelocationKind.IRELATIVE,
    },
}

STB_LOCAL, STB_GLOBAL, STB_WEAK, STB_UNIQUE = 0, 1, 2, 10
STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_SECTION, STT_FILE, STT_COMMON, STT_TLS, STT_IFUNC = 0, 1, 2, 3, 4, 5, 6, 10
STV_DEFAULT, STV_INTERNAL, STV_HIDDEN, STV_PROTECTED = 0, 1, 2, 3
SHN_UNDEF, SHN_ABS = 0, 0xFFF1
VER_NDX_LOCAL, VER_NDX_GLOBAL = 0, 1


@dataclass(frozen=True, slots=True)
class VersionNeed:
    """One entry of DT_VERNEED: `version` is wanted from the object called `file`."""

    file: str
    version: str
    weak: bool


@dataclass(frozen=True, slots=True)
class Versions:
    """The symbol versions of one object, by version index (the low 15 bits of a versym entry)."""

    needs: Mapping[int, VersionNeed]
    definitions: Mapping[int, str]
    base: int | None
    """Index of the definition flagged VER_FLG_BASE (the object's own name), if any."""

    def name(self, index: int) -> str | None:
        """The version called by a versym entry; None for the two reserved indexes and the base."""
        index &= 0x7FFF
        if index in self.needs:
            return self.needs[index].version
        return None if index == self.base else self.definitions.get(index)


class SymbolTable:
    """A symbol table as columns; `names` are decoded on first use.

    `version_index` is the raw versym column (bit 15: hidden), or None where the object has no versions.
    """

    def __init__(
        self, table: npt.NDArray[np.void], strings: bytes, version_index: npt.NDArray[np.uint16] | None
    ) -> None:
        self._table = table
        self._strings = strings
        self.value: I64 = np.ascontiguousarray(table["value"])
        self.size: I64 = np.ascontiguousarray(table["size"])
        self.section: npt.NDArray[np.uint16] = np.ascontiguousarray(table["section"])
        self.binding: U8 = (table["info"] >> 4).astype(np.uint8)
        self.type: U8 = (table["info"] & 15).astype(np.uint8)
        self.visibility: U8 = (table["other"] & 3).astype(np.uint8)
        self.defined: npt.NDArray[np.bool_] = self.section != SHN_UNDEF
        self.version_index = version_index

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def names(self) -> list[str]:
        """Names in table order."""
        strings = self._strings
        start = self._table["name"].astype(np.int64)
        stops = np.append(np.flatnonzero(np.frombuffer(strings, np.uint8) == 0), len(strings))
        end = stops[np.minimum(stops.searchsorted(start), len(stops) - 1)]
        ranges = zip(start.tolist(), end.tolist(), strict=True)
        if strings.isascii():  # nearly always: decoded as a whole, then cut
            text = strings.decode("ascii")
            return [text[a:b] for a, b in ranges]
        return [strings[a:b].decode("utf-8", "backslashreplace") for a, b in ranges]

    @cached_property
    def by_name(self) -> Mapping[str, list[int]]:
        """Indexes of the symbols that bear each name, in table order."""
        result: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            result.setdefault(name, []).append(index)
        return result

    def is_hidden_version(self, index: int) -> bool:
        """True for `name@VERSION` (not the default `@@`)."""
        return self.version_index is not None and bool(self.version_index[index] & 0x8000)


@dataclass(frozen=True, slots=True, eq=False)
class Relocations:
    """The dynamic relocations as columns, DT_RELA first, then DT_RELR, then DT_JMPREL."""

    offset: I64
    kind: U8
    symbol: U32
    addend: I64

    def of(self, *kinds: RelocationKind) -> npt.NDArray[np.intp]:
        """Positions of the relocations of these kinds."""
        return np.flatnonzero(among(self.kind, kinds))


def records(raw: U8, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """View bytes as an array of records, dropping a partial last one."""
    whole = len(raw) // dtype.itemsize * dtype.itemsize
    return np.frombuffer(raw[:whole].tobytes(), dtype=dtype)
