"""The function table that Go's linker writes into every program, stripped or not.

Owns: the layouts of `.gopclntab`.
Takes: the bytes of the section, and what the loader makes of a word in it. Gives: `GoFunctions`, or None.
Must never: read another section, or trust an offset.
Wrong where: Go before 1.16 (no table is read); Go 1.26 and later, which leave the start of the code out of the header,
      in programs whose entry is not Go's own.

Source: Go, src/runtime/symtab.go (pcHeader, functab), src/internal/abi/symtab.go (magic numbers); "Go 1.2 Runtime
Symbol Information" for what came before.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

_GO_1_16: Final = 0xFFFFFFFA
_SINCE_1_18: Final = (0xFFFFFFF0, 0xFFFFFFF1)
_HEADER: Final = 72
_START: Final = 24
"""Offset of the word that says where the code begins, since 1.18."""
_ENTRIES: Final = ("_rt0_amd64_linux", "_rt0_arm64_linux")
"""The functions that the kernel enters when Go's own linker made the program."""


@dataclass(frozen=True, slots=True, eq=False)
class GoFunctions:
    """Functions in order of address; `name` are offsets of NUL-terminated text in `strings`."""

    start: I64
    size: I64
    name: I64
    strings: bytes


def parse(table: U8, word_at: Callable[[int], int | None], entry: int) -> GoFunctions | None:
    """The functions of a table; None where it is damaged or of an unknown layout.

    `word_at` gives the relocated word at an offset of the table, `entry` is the program's entry point.
    """
    if len(table) < _HEADER:
        return None
    head = table[:_HEADER].tobytes()
    magic, pointer_size, count = struct.unpack_from("<I3xBQ", head)
    if pointer_size != 8 or not 0 < count < len(table) or magic not in (_GO_1_16, *_SINCE_1_18):
        return None
    has_start = magic in _SINCE_1_18
    names, end_of_names, _, _, functions = struct.unpack_from("<5Q", head, 32 if has_start else 24)
    wide = 4 if has_start else 8
    last = functions + wide * (2 * count + 1)
    if not names < end_of_names <= len(table) or last > len(table):
        return None
    rows = np.frombuffer(table[functions:last].tobytes(), f"<u{wide}").astype(np.int64)
    begin, place = rows[0:-1:2], functions + rows[1::2] + wide
    if np.any(place < 0) or np.any(place + 4 > len(table)):
        return None
    name = np.ascontiguousarray(table[place[:, None] + np.arange(4)]).view("<i4")[:, 0].astype(np.int64)
    strings = table[names:end_of_names].tobytes()
    if np.any(np.diff(rows[::2]) < 0) or np.any((name < 0) | (name >= len(strings))):
        return None
    text = 0
    if has_start:
        start = word_at(_START) or _from_entry(begin, name, strings, entry)
        if start is None:
            return None
        text = start
    return GoFunctions(begin + text, np.diff(rows[::2]), name, strings)


def _from_entry(begin: I64, name: I64, strings: bytes, entry: int) -> int | None:
    """Where the code begins, given that a program made by Go's own linker is entered in a function of known name."""
    for text in _ENTRIES:
        place = strings.find(b"\0" + text.encode() + b"\0") + 1
        found = begin[name == place]
        if place and len(found):
            return entry - int(found[0])
    return None
