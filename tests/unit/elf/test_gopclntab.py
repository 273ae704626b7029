"""Go's function table, in each layout that is read, and damaged."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from forkproof.elf.gopclntab import GoFunctions, parse

GO_1_2, GO_1_16, GO_1_18, GO_1_20 = 0xFFFFFFFB, 0xFFFFFFFA, 0xFFFFFFF0, 0xFFFFFFF1
TEXT = 0x401000
FUNCTIONS = {"_rt0_amd64_linux": 0x0, "main.main": 0x40, "syscall.forkAndExecInChild": 0x1C0}
END = 0x200


def table(magic: int, text: int = TEXT) -> bytes:
    """A table of FUNCTIONS as Go's linker lays it out."""
    is_relative = magic != GO_1_16
    word = "<I" if is_relative else "<Q"
    base = 0 if is_relative else text
    names = b"\0" + b"".join(name.encode() + b"\0" for name in FUNCTIONS)
    header = 72 if is_relative else 64
    functab = header + (len(names) + 7) // 8 * 8
    width = struct.calcsize(word)
    first = width * (2 * len(FUNCTIONS) + 1)
    rows, infos, place = b"", b"", 1
    for name, start in FUNCTIONS.items():
        rows += struct.pack(word, base + start) + struct.pack(word, first + len(infos))
        infos += struct.pack(word, base + start) + struct.pack("<i", place) + bytes(4)
        place += len(name) + 1
    rows += struct.pack(word, base + END)
    head = struct.pack("<IHBBQQ", magic, 0, 1, 8, len(FUNCTIONS), 1) + (struct.pack("<Q", text) if is_relative else b"")
    head += struct.pack("<5Q", header, header + len(names), 0, 0, functab)
    return head + names.ljust(functab - header, b"\0") + rows + infos


def parsed(raw: bytes, entry: int = 0) -> GoFunctions | None:
    return parse(np.frombuffer(raw, np.uint8), lambda o: int.from_bytes(raw[o : o + 8], "little") or None, entry)


def named(found: GoFunctions) -> dict[str, int]:
    starts = [found.strings[n : found.strings.index(b"\0", n)].decode() for n in found.name.tolist()]
    return dict(zip(starts, found.start.tolist(), strict=True))


@pytest.mark.parametrize("magic", [GO_1_16, GO_1_18, GO_1_20])
def test_layouts(magic: int) -> None:
    found = parsed(table(magic))
    assert found is not None
    assert named(found) == {name: TEXT + start for name, start in FUNCTIONS.items()}
    assert found.size.tolist() == [0x40, 0x180, 0x40]


def test_a_start_that_the_header_leaves_out_follows_from_the_entry() -> None:
    found = parsed(table(GO_1_20, text=0), entry=TEXT)
    assert found is not None
    assert named(found)["main.main"] == TEXT + 0x40


@pytest.mark.parametrize("magic", [GO_1_2, 0, 0x7F454C46])
def test_an_unknown_layout_is_no_table(magic: int) -> None:
    assert parsed(table(magic)) is None


@pytest.mark.parametrize("magic", [GO_1_16, GO_1_20])
def test_truncated_anywhere(magic: int) -> None:
    raw = table(magic)
    last = 12 if magic == GO_1_16 else 8
    for size in range(len(raw) - last + 4):
        assert parsed(raw[:size]) is None or size >= len(raw) - 4, size


def test_offsets_that_lead_out_of_it() -> None:
    raw = bytearray(table(GO_1_20))
    for offset in range(8, 72, 8):
        for value in (1 << 63, (1 << 64) - 1, len(raw)):
            if offset == 24:
                continue  # the start of the code may be anywhere
            damaged = bytearray(raw)
            damaged[offset : offset + 8] = value.to_bytes(8, "little")
            found = parsed(bytes(damaged))
            assert found is None or len(found.start) == len(FUNCTIONS)
