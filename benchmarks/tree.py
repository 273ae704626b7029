#!/usr/bin/env python3
"""Measure scans of a whole root file system: `python benchmarks/tree.py`, or `make bench-tree`.

    cold        `forkproof scan DIRECTORY --no-cache`: one process on one processor, then two on two
    filled      the same with an empty cache
    cached      again, with what that left

The same report must come from each; a difference ends the benchmark. MB are those of the ELF files below the directory:
programs and the libraries that they load. Nothing fails when a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bytecode import with_bytecode

SYSROOT: Final = "bookworm-amd64-tree"
SPEEDUP_GOAL: Final = 1.7
CACHED_GOAL: Final = 5.0


@dataclass(frozen=True)
class Run:
    """One scan of the tree, its worker processes included."""

    name: str
    processes: int
    seconds: float
    cpu: float
    peak: float
    """MiB of the largest process."""


def elf_files(tree: Path) -> tuple[int, int]:
    """Number and bytes of the ELF files below a directory, links left out."""
    count = size = 0
    for path in tree.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(4) == b"\x7fELF":
                count, size = count + 1, size + path.stat().st_size
    return count, size


def measured(name: str, tree: Path, processes: int, home: Path, arguments: Sequence[str]) -> tuple[Run, bytes]:
    """Scan the tree; the run and the report."""
    command = [sys.executable, "-m", "forkproof", "scan", "--format", "json", "--jobs", str(processes), str(tree)]
    command += ["--sysroot", str(tree), *arguments]
    report = home.parent / "report.json"
    allowed = set(sorted(os.sched_getaffinity(0))[:processes])
    with report.open("wb") as file:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.DEVNULL, env=with_bytecode(XDG_CACHE_HOME=str(home)),
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),  # noqa: PLW1509 - this program has one thread
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1, 3):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    run = Run(name, processes, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
    return run, report.read_bytes()


def measure(tree: Path) -> Iterator[Run]:
    """All runs; SystemExit where two reports differ."""
    reports = set()
    with tempfile.TemporaryDirectory() as place:
        plan = [(name, n, arguments) for name, arguments in (("cold", ["--no-cache"]), ("filled", []), ("cached", []))
                for n in (1, 2) if n <= len(os.sched_getaffinity(0))]  # fmt: skip
        for name, processes, arguments in plan:
            home = Path(place) / f"cache-{processes}"
            run, report = measured(name, tree, processes, home, arguments)
            reports.add(report)
            if len(reports) > 1:
                raise SystemExit(f"{name}, {processes} processes: the report is another")
            print(f"{name}, {processes}: {run.seconds:.1f} s", file=sys.stderr)
            yield run


def table(count: int, size: int, runs: Sequence[Run]) -> Iterator[str]:
    """The figures in Markdown."""
    yield f"{count} ELF files, {size / 1e6:.0f} MB"
    yield ""
    yield "| | processes | seconds | CPU seconds | largest process, MiB | MB/s | MB per CPU second |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for run in runs:
        rates = f"{size / 1e6 / run.seconds:.1f} | {size / 1e6 / run.cpu:.1f}"
        yield f"| {run.name} | {run.processes} | {run.seconds:.1f} | {run.cpu:.1f} | {run.peak:.0f} | {rates} |"
    yield ""
    by = {(run.name, run.processes): run for run in runs}
    if ("cold", 2) in by:
        speedup = by["cold", 1].seconds / by["cold", 2].seconds
        yield f"two processes against one, cold: {speedup:.2f} times as fast (goal {SPEEDUP_GOAL})"
    again = by["filled", 1].seconds / by["cached", 1].seconds
    yield f"the second run against the first, one process: {again:.1f} times as fast (goal {CACHED_GOAL:.0f})"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks/tree.py", description="Measure scans of a root file system.")
    parser.add_argument("tree", nargs="?", type=Path, help=f"a directory (default: the sysroot {SYSROOT})")
    tree: Path | None = parser.parse_args().tree
    if tree is None:
        maker = Path(__file__).resolve().parents[1] / "tools" / "sysroot.py"
        tree = Path(
            subprocess.run([sys.executable, maker, SYSROOT], capture_output=True, text=True, check=True).stdout.strip()
        )
    print("\n".join(table(*elf_files(tree), list(measure(tree)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
