"""Load damaged copies of one ELF file and use everything that they offer: `python -m tests.unit.elf.mutants FILE...`.

A process of its own, with limits on memory and time, since what is tested is that damaged files are refused or read,
whatever stands in them: never another exception, never a crash, never a run without end. hypothesis makes the
damage, and shrinks it; what it found is printed as the bytes that were changed.
"""

from __future__ import annotations

import contextlib
import resource
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from forkproof.code.decode import decode
from forkproof.code.explore import explore
from forkproof.code.index import index_code
from forkproof.elf import unwind
from forkproof.elf.image import load
from forkproof.elf.names import FunctionNames
from forkproof.errors import InputError

MEMORY = 3 << 30
SECONDS = 240
EXAMPLES = 600
#: What is worth writing over a number in a header.
WORDS = (
    0,
    1,
    7,
    8,
    0x7F,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 47) - 1,
    1 << 47,
    (1 << 63) - 1,
    2**64 - 1,
)


def use(path: Path) -> None:
    """Everything that an analysis asks of a file."""
    image = load(path)
    for table in (image.dynamic_symbols, image.static_symbols):
        assert len(table.names) == len(table)
        assert sum(map(len, table.by_name.values())) == len(table)
    assert len(image.relocations.offset) == len(image.relocations.kind)
    versions = image.versions
    for number in range(min(len(image.dynamic_symbols), 64)):
        versions.name(number)
    assert image.sha256
    assert image.constructors is not None
    assert image.destructors is not None
    assert image.slot_symbols is not None
    assert image.irelative_slots is not None
    image.pointer_at(image.entry)
    extents = unwind.extents(image)
    assert bool(np.all(np.diff(extents.start) > 0))
    index = index_code(image)
    assert bool(np.all(index.size >= 0))
    names = FunctionNames(image, str(path))
    for start, size in list(zip(index.start.tolist(), index.size.tolist(), strict=True))[:4]:
        names.name(start)
        explore(decode(image, [(start, min(size, 4096))]), image.machine, start)


def _regions(data: bytes) -> list[tuple[int, int]]:
    """(offset, size) of what is worth damaging: headers, tables, the dynamic section, a bit of everything."""
    program, section = struct.unpack_from("<QQ", data, 32)
    size, count, _, sections = struct.unpack_from("<HHHH", data, 54)
    found = [(0, 64), (program, size * count), (section, 64 * sections), (0, len(data))]
    for index in range(count):
        kind, _, offset, *_, length, _, _ = struct.unpack_from("<IIQQQQQQ", data, program + 56 * index)
        if kind in (2, 0x6474E550):  # PT_DYNAMIC, PT_GNU_EH_FRAME
            found.append((offset, length))
    return [(start, length) for start, length in found if length and start + length <= len(data)]


def _changes(data: bytes) -> st.SearchStrategy[list[tuple[int, bytes]]]:
    word = st.sampled_from(WORDS).map(lambda w: struct.pack("<Q", w)) | st.binary(min_size=1, max_size=8)
    places = [st.integers(start, start + length - 1) for start, length in _regions(data)]
    return st.lists(st.tuples(st.one_of(*places), word | word.map(lambda w: w[:4])), min_size=1, max_size=6)


def check(original: Path, directory: Path) -> None:
    """Raise when some damaged copy does more than raise an InputError."""
    data = original.read_bytes()
    copy = directory / original.name

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(_changes(data), st.none() | st.integers(0, len(data)))
    def survives(changes: list[tuple[int, bytes]], length: int | None) -> None:
        damaged = bytearray(data)
        for at, content in changes:
            damaged[at : at + len(content)] = content[: len(data) - at]
        copy.unlink(missing_ok=True)  # a new file: the old one may still be mapped
        copy.write_bytes(damaged[:length])
        with contextlib.suppress(InputError):
            use(copy)

    survives()


def main() -> None:
    """Check each file."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as directory:
        for name in sys.argv[1:]:
            check(Path(name), Path(directory))


if __name__ == "__main__":
    main()
