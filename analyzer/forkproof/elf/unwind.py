"""Function extents from `.eh_frame_hdr` and `.eh_frame`.

Owns: the sorted table of the header, the PC range of each frame description entry (FDE), and the walk
      over `.eh_frame` when there is no header.
Takes: an `Image`. Gives: `Extents`, two columns (start, size), sorted by start.
Must never: interpret call frame instructions (that is the probe's unwinder), or name a function.
Wrong where: code has no FDE (hand-written assembly without CFI, Go): symbol tables fill that in.

A `.cold` part that the compiler moved away has an FDE, and therefore an extent, of its own.

Source: Linux Standard Base Core 5.0, chapter 10.6 (.eh_frame and .eh_frame_hdr).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from forkproof.elf.image import I64, U8, Image

_PE_OMIT: Final = 0xFF
_DATAREL_SDATA4: Final = 0x3B
_LIMIT: Final = 1 << 47
"""No user address is larger."""
_FIXED_SIZES: Final = {0x00: 8, 0x02: 2, 0x03: 4, 0x04: 8, 0x0A: 2, 0x0B: 4, 0x0C: 8}


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Start RVA and size in bytes of ranges of code, sorted by start, without duplicates of a start."""

    start: I64
    size: I64

    def __len__(self) -> int:
        return len(self.start)


EMPTY: Final = Extents(np.zeros(0, np.int64), np.zeros(0, np.int64))


def extents(image: Image) -> Extents:
    """Every range that an FDE describes; empty when the object has no unwind tables."""
    table = _header_table(image)
    if table is None:
        return _sorted_unique(*_walk(image))
    start, fde = table
    size, verified = _ranges(image, start, fde)
    for index in np.flatnonzero(~verified).tolist():
        size[index] = _slow_range(image, int(fde[index]))
    return _sorted_unique(start, size)


def search_table(image: Image) -> tuple[I64, I64] | None:
    """(function start, FDE address) columns, sorted by start; None when the object has no usable table."""
    return _header_table(image) or _walked_table(image)


def _walked_table(image: Image) -> tuple[I64, I64] | None:
    rows = sorted((start, fde) for start, _, fde in _walk_section(image))
    if not rows:
        return None
    return np.array([r[0] for r in rows], np.int64), np.array([r[1] for r in rows], np.int64)


def _sorted_unique(start: I64, size: I64) -> Extents:
    """Sort by start; of several ranges at one start keep the longest; drop empty ones."""
    if np.any(start[1:] <= start[:-1]):  # the header's table is sorted, as a rule
        order = np.lexsort((-size, start))
        start, size = start[order], size[order]
    keep = np.ones(len(start), bool)
    keep[1:] = start[1:] != start[:-1]
    keep &= (size > 0) & (start >= 0)
    return Extents(start[keep], size[keep])


def _header_table(image: Image) -> tuple[I64, I64] | None:
    """(function start, FDE address) columns of the binary search table, when it has the usual encoding."""
    at = image.eh_frame_header
    if at is None:
        return None
    head = image.read(at, 12).tobytes()
    if len(head) < 12 or head[0] != 1 or head[3] != _DATAREL_SDATA4 or head[2] != 0x03:
        return None
    pointer_size = _FIXED_SIZES.get(head[1] & 0x0F)
    if pointer_size is None or head[1] == _PE_OMIT:
        return None
    count_at = at + 4 + pointer_size
    count = int.from_bytes(image.read(count_at, 4).tobytes(), "little")
    raw = image.read(count_at + 4, min(count, 1 << 25) * 8)
    pairs = np.frombuffer(raw[: len(raw) // 8 * 8].tobytes(), "<i4").reshape(-1, 2).astype(np.int64)
    return pairs[:, 0] + at, pairs[:, 1] + at


def _ranges(image: Image, start: I64, fde: I64) -> tuple[I64, np.typing.NDArray[np.bool_]]:
    """PC ranges of all FDEs in one gather, for those whose pointers are PC-relative sdata4.

    An entry is verified when its own PC begin, decoded so, equals the table's: no other encoding can
    meet that by accident for more than a stray entry.
    """
    size = np.zeros(len(start), np.int64)
    verified = np.zeros(len(start), bool)
    if not len(fde):
        return size, verified
    low, high = int(fde.min()), int(fde.max()) + 16
    raw = image.read(low, high - low)
    if len(raw) < high - low:
        return size, verified
    begin = _gather_i32(raw, fde - low + 8)
    size = _gather_i32(raw, fde - low + 12)
    verified = (begin + fde + 8 == start) & (size > 0)
    return size, verified


def _gather_i32(raw: U8, at: I64) -> I64:
    words = raw[at[:, None] + np.arange(4)]
    return np.ascontiguousarray(words).view("<i4")[:, 0].astype(np.int64)


def _slow_range(image: Image, fde: int) -> int:
    """PC range of one FDE by decoding its CIE; 0 when it cannot be decoded."""
    decoded = _decode_fde(image, fde)
    return decoded[1] if decoded else 0


def _decode_fde(image: Image, fde: int) -> tuple[int, int] | None:
    head = image.read(fde, 8).tobytes()
    if len(head) < 8:
        return None
    cie_offset = int.from_bytes(head[4:], "little")
    encoding = _pointer_encoding(image, fde + 4 - cie_offset)
    width = _FIXED_SIZES.get(encoding & 0x0F)
    if width is None or encoding & 0x60:
        return None
    raw = image.read(fde + 8, 2 * width).tobytes()
    if len(raw) < 2 * width:
        return None
    begin = int.from_bytes(raw[:width], "little", signed=encoding & 0x08 != 0 or encoding & 0x10 != 0)
    begin += fde + 8 if encoding & 0x10 else 0
    size = int.from_bytes(raw[width:], "little")
    return (begin, size) if 0 <= begin < _LIMIT and size < _LIMIT else None


def _pointer_encoding(image: Image, cie: int) -> int:
    """The 'R' augmentation of a CIE; DW_EH_PE_absptr when it has none."""
    raw = image.read(cie, 64).tobytes()
    end = raw.find(b"\0", 9)
    if end < 0:
        return 0
    augmentation, at = raw[9:end], end + 1
    if not augmentation.startswith(b"z"):
        return 0
    for _ in range(3):  # code alignment, data alignment, return address register
        at = _skip_leb(raw, at)
    at = _skip_leb(raw, at)  # length of the augmentation data
    for letter in augmentation[1:].decode("latin-1"):
        if at >= len(raw):
            return 0
        if letter == "R":
            return raw[at]
        if letter == "L":
            at += 1
        elif letter == "P":
            at += 1 + _FIXED_SIZES.get(raw[at] & 0x0F, 8)
    return 0


def _skip_leb(raw: bytes, at: int) -> int:
    while at < len(raw) and raw[at] & 0x80:
        at += 1
    return at + 1


def _walk(image: Image) -> tuple[I64, I64]:
    pairs = list(_walk_section(image))
    starts = np.array([p[0] for p in pairs], np.int64)
    return starts, np.array([p[1] for p in pairs], np.int64)


def _walk_section(image: Image) -> Iterator[tuple[int, int, int]]:
    """Start, size and address of every FDE of `.eh_frame` in file order, for objects without a usable header."""
    section = image.section(".eh_frame")
    if section is None:
        return
    at, end = int(section.rva), int(section.rva) + section.size
    while at + 8 <= end:
        raw = image.read(at, 8).tobytes()
        if len(raw) < 8:
            return
        length, cie = struct.unpack("<II", raw)
        if length in (0, 0xFFFFFFFF):
            return
        if cie and (decoded := _decode_fde(image, at)):
            yield (*decoded, at)
        at += 4 + length
