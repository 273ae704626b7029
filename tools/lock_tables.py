#!/usr/bin/env python3
"""Print what the analysis finds of the locks of Debian's allocators and libcs: found, taken by prepare, left.

    python tools/lock_tables.py                       every row of docs/locks.md (some minutes)
    python tools/lock_tables.py trixie-amd64 libtcmalloc.so.4        the rows of one sysroot, or of one library there
    python tools/lock_tables.py --locks trixie-amd64 libtcmalloc.so.4       each lock of it, and where it is taken

A row is what one library, alone with what it needs, shows: nothing runs. Sysroots come from tools/sysroot.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forkproof import facts, signatures
from forkproof.allocators import AllocatorFacts, find_libc
from forkproof.facts import Facts
from forkproof.locks.coverage import Cover
from forkproof.locks.identity import lock_of
from forkproof.locks.summary import step_frames
from forkproof.options import ScanOptions
from forkproof.pipeline import call_graph

TOOLS = Path(__file__).parent
SYSROOTS = tuple(f"{suite}-{arch}" for suite in ("bullseye", "bookworm", "trixie") for arch in ("amd64", "arm64"))
FLAVOURS = ("libtcmalloc_minimal", "libtcmalloc", "libtcmalloc_and_profiler", "libtcmalloc_debug")
LIBRARIES = (*(f"{name}.so.4" for name in FLAVOURS), "libjemalloc.so.2", "libc.so.6", "musl")
HEAD = ("system", "library", "handlers", "found", "held by prepare", "gated", "left", "rare", "not known")


@dataclass(frozen=True)
class Row:
    """One library on one system, counted in locks."""

    system: str
    library: str
    handlers: str
    found: int
    prepared: int
    """Exact, or the same field of an object of the same kind."""
    gated: int
    """Taken under another lock only: one that prepare holds, or one that is left itself."""
    left: int
    rare: int
    """Of those that are left."""
    unresolved: int

    def __str__(self) -> str:
        cells = (
            self.system, self.library, self.handlers, self.found, self.prepared, self.gated, self.left, self.rare,
            self.unresolved,
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


def analysed(root: Path, target: str) -> Facts:
    """The facts of one library in a sysroot."""
    known = signatures.load()
    graph = call_graph(target, ScanOptions(sysroot=root), known)
    return facts.gather(target, graph, known, find_libc(graph.program, known))


def path_of(system: str, library: str) -> str:
    """Where a library is in its sysroot."""
    machine = "x86_64" if system.endswith("amd64") else "aarch64"
    return f"/usr/lib/{machine}-linux-gnu/{library}" if library != "musl" else f"/usr/lib/ld-musl-{machine}.so.1"


def row(root: Path, system: str, library: str) -> Row | None:
    """The row of a library; None where the sysroot does not have it."""
    target = path_of(system, library)
    if not (root / target.lstrip("/")).exists():
        return None
    found = analysed(root, target)
    if library in ("libc.so.6", "musl"):
        return _of_libc(found, system, library)
    allocator = next(a for a in found.allocators if a.is_used)
    return _of_allocator(found, allocator, system, library)


def describe(found: Facts) -> Iterator[str]:
    """Each lock of the allocator in use: what becomes of it, how rarely it is taken, and a way to it."""
    allocator = next(a for a in found.allocators if a.is_used)
    locks = found.locks_of(allocator)
    for lock in locks.coverage.locks if locks is not None else ():
        address = lock.taken.address
        name = lock_of(found.flow.program, address, allocator.object).name
        cells = [lock.cover.value, name]
        if locks is not None and address in locks.occasions:
            occasion = locks.occasions[address]
            rare = "rare" if locks.is_rare(lock) else "open"
            cells.append(f"{rare}: {occasion.why or f'{locks.weights[address]} conditions'}")
        way = " > ".join(frame.function for frame in step_frames(found.flow, lock.taken.path))
        yield "; ".join([*cells, way])


def _of_allocator(found: Facts, allocator: AllocatorFacts, system: str, library: str) -> Row:
    locks = found.locks_of(allocator)
    assert locks is not None, f"{library}: no locks were looked at"
    count = Counter(lock.cover for lock in locks.coverage.locks)
    left = locks.coverage.uncovered
    return Row(
        system, f"{library} {allocator.version or ''}".strip(), str(found.hooks_of(allocator).value),
        len(locks.coverage.locks),
        count[Cover.COVERED] + count[Cover.ASSUMED],
        count[Cover.GATED] + count[Cover.NESTED],
        len(left), sum(locks.is_rare(lock) for lock in left), count[Cover.UNRESOLVED],
    )  # fmt: skip


def _of_libc(found: Facts, system: str, library: str) -> Row:
    locks = found.libc_locks.all
    left = [lock for lock in locks if not lock.quiesced]
    return Row(
        system, f"{library} {found.libc.version or ''}".strip(), "builtin",
        len(locks), len(locks) - len(left), 0, len(left), sum(bool(lock.rare) for lock in left), 0,
    )  # fmt: skip


def root_of(system: str) -> Path:
    """Where a sysroot is."""
    command = [sys.executable, str(TOOLS / "sysroot.py"), system]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def rows(systems: tuple[str, ...], libraries: tuple[str, ...]) -> Iterator[Row]:
    """Every row, system by system."""
    for system in systems:
        root = root_of(system)
        for library in libraries:
            if (found := row(root, system, library)) is not None:
                yield found


def main(arguments: list[str]) -> None:
    """Print the table, a row at a time; with --locks, the locks of one library."""
    if arguments and arguments[0] == "--locks":
        system, library = arguments[1:]
        print("\n".join(describe(analysed(root_of(system), path_of(system, library)))))
        return
    systems = tuple(a for a in arguments if a in SYSROOTS) or SYSROOTS
    libraries = tuple(a for a in arguments if a in LIBRARIES) or LIBRARIES
    unknown = set(arguments) - {*SYSROOTS, *LIBRARIES}
    if unknown:
        sys.exit(f"lock_tables: {', '.join(sorted(unknown))}: neither one of {SYSROOTS} nor of {LIBRARIES}")
    print(f"| {' | '.join(HEAD)} |\n|---|---|---|{'--:|' * (len(HEAD) - 3)}", flush=True)
    for found in rows(systems, libraries):
        print(found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
