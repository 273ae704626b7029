"""The catalogue of libc's locks against running: `python -m tools.libc_stress [LIBC…]` prints docs/libc.md's tables.

Each row of tools/libc_stress.c is a function of libc. It is run (two threads call it, the main thread forks up to 200
times, each child calls it twice), and asked of the catalogue that `forkproof.libc_locks` derives from the libc's code.
The libcs are those of this machine: glibc, musl (musl-gcc, Debian: musl-tools) and glibc for aarch64 under qemu-user.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forkproof import facts, signatures
from forkproof.allocators import find_libc
from forkproof.facts import Facts
from forkproof.options import ScanOptions
from forkproof.pipeline import call_graph
from forkproof.program import Function

SOURCE: Final = Path(__file__).with_suffix(".c")
_TIME: Final = 60.0
"""Seconds for one row; forks of a program under qemu-user are slow."""
_CROSS: Final = Path("/usr/aarch64-linux-gnu")


@dataclass(frozen=True)
class Libc:
    """A C library to build for, and how what was built is run."""

    name: str
    compiler: tuple[str, ...]
    runner: tuple[str, ...] = ()
    sysroot: Path | None = None

    def missing(self) -> str | None:
        """A program that this needs and that is not installed."""
        return next((p for p in (self.compiler[0], *self.runner[:1]) if shutil.which(p) is None), None)


LIBCS: Final = (
    Libc("glibc", ("gcc", "-pthread")),
    Libc("musl", ("musl-gcc", "-pthread")),
    Libc("glibc-aarch64", ("aarch64-linux-gnu-gcc", "-pthread"), ("qemu-aarch64", "-L", str(_CROSS)), _CROSS),
)


def built(libc: Libc, directory: Path) -> Path:
    """The stress program for a libc."""
    output = directory / f"libc_stress-{libc.name}"
    subprocess.run([*libc.compiler, "-O2", "-w", "-o", str(output), str(SOURCE)], check=True)
    return output


def rows(libc: Libc, program: Path) -> list[str]:
    """The names of all rows."""
    return subprocess.run([*libc.runner, str(program)], check=True, capture_output=True, text=True).stdout.split()


def run(libc: Libc, program: Path, row: str) -> str:
    """What running a row shows: `ok N`, `hang H N`, or why there is no result."""
    try:
        done = subprocess.run(
            [*libc.runner, str(program), row], capture_output=True, text=True, timeout=_TIME, check=False
        )
    except subprocess.TimeoutExpired:
        return "no result (time)"
    return done.stdout.strip() if done.returncode == 0 else f"no result (status {done.returncode})"


def analysed(libc: Libc, program: Path) -> Facts:
    """The facts of a stress program."""
    known = signatures.load()
    target, sysroot = str(program), None
    if libc.sysroot is not None:
        sysroot = program.parent / f"root-{libc.name}"
        shutil.copytree(libc.sysroot / "lib", sysroot / "lib", symlinks=True, ignore=lambda _, names: [
            n for n in names if not n.startswith(("libc.so", "ld-linux"))
        ])  # fmt: skip
        shutil.copyfile(program, sysroot / "program")
        target = "/program"
    graph = call_graph(target, ScanOptions(sysroot=sysroot), known)
    return facts.gather(target, graph, known, find_libc(graph.program, known))


def catalogued(found: Facts, row: str) -> tuple[str, tuple[str, ...]]:
    """What the catalogue says of a row, and of which locks: hang (as a matter of course), perhaps, or ok."""
    program, graph, locks = found.flow.program, found.flow.graph, found.libc_locks
    (start,) = program.called([f"f_{row}"], [0])
    called = {Function(int(graph.target[e])) for e in graph.edges_from(start)}
    mine = [f for f in called if program.object_of(f) == found.libc.core]
    inherited = [(lock, f) for f in mine for lock in locks.taken_by(f) if not lock.quiesced]
    usual = sorted({lock.name for lock, f in inherited if locks.is_usual(f, lock) and _blocks(found, lock, f)})
    if usual:
        return "hang", tuple(usual)
    return ("perhaps", tuple(sorted({lock.name for lock, _ in inherited}))) if inherited else ("ok", ())


def _blocks(found: Facts, lock: object, function: Function) -> bool:
    """A call that only reads waits for no other call of the same."""
    from forkproof.libc_code import LibcLock

    assert isinstance(lock, LibcLock)
    return lock.writers == lock.takers or found.libc_locks.is_usual(function, lock, writing=True)


def table(libc: Libc, directory: Path) -> Iterator[str]:
    """The lines of one libc's table."""
    program = built(libc, directory)
    found = analysed(libc, program)
    yield f"## {libc.name}: {found.libc.title}"
    yield ""
    yield "| function | run | catalogue | locks that fork leaves alone |"
    yield "|---|---|---|---|"
    for row in rows(libc, program):
        says, names = catalogued(found, row)
        shown = "; ".join(names[:2]) + (f"; {len(names) - 2} more" if len(names) > 2 else "")
        result = run(libc, program, row)
        print(libc.name, row, result, says, file=sys.stderr)
        yield f"| {row} | {result} | {says} | {shown} |"
    yield ""


def main() -> int:
    """Print a table for each libc that can be built here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libc", nargs="*", help=", ".join(libc.name for libc in LIBCS))
    wanted = parser.parse_args().libc
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for libc in LIBCS:
            if wanted and libc.name not in wanted:
                continue
            if (program := libc.missing()) is not None:
                print(f"{libc.name}: {program} is not installed", file=sys.stderr)
                continue
            print("\n".join(table(libc, Path(name))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
