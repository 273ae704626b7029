#!/usr/bin/env python3
"""Measure forkproof, and print ratios, since machines are noisy: `python benchmarks/run.py`, or `make bench`.

    spine       a whole process that reads, links and follows a program up to its fork windows and fork handlers,
                against `objdump -d` of the same files in turns
    cold        a whole `forkproof scan --format json` process, with every rule and every lock, in the same turns
    linearity   reading and indexing sets of objects with 1, 10 and 50 times the code
    imports     what a command waits for before it begins

A run costs about a minute. Goals are printed beside the figures; nothing fails when one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bytecode import with_bytecode

PROGRAM: Final = "/usr/bin/qemu-system-x86_64"
RATIO_GOAL: Final = 0.2
MEMORY_GOAL: Final = 250
"""MiB."""
SCAN_GOAL: Final = 1.0
"""With every rule and every lock."""
SCAN_MEMORY_GOAL: Final = 400
GROWTH: Final = (1, 10, 50)
MODULES: Final = ("forkproof", "forkproof.cli", "numpy", "capstone", "networkx", "lief", "forkproof.pipeline")


@dataclass(frozen=True)
class Run:
    """One process, from its start to its end."""

    seconds: float
    cpu: float
    """User and system time, of all threads."""
    peak: float
    """MiB of resident memory at most."""


def measured(command: Sequence[str | Path], environment: Mapping[str, str]) -> Run:
    """Run a command with its output thrown away."""
    with Path(os.devnull).open("w") as nowhere:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=nowhere, stderr=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1, 3):  # 1: findings, 3: something is missing; both are whole scans
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def closure(target: str, sysroot: str, preload: Sequence[str]) -> list[Path]:
    """The files of a program's closure, on this machine."""
    command = [sys.executable, "-m", "forkproof", "closure", "--format", "json", "--sysroot", sysroot, target]
    command += [f"--preload={library}" for library in preload]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode not in (0, 3):
        raise SystemExit(f"cannot measure {target}: {found.stderr.strip()}")
    root = Path(sysroot)
    paths = [Path(item["path"]) for item in json.loads(found.stdout)["objects"]]
    return [path if root == Path("/") else root / path.relative_to("/") for path in paths]


# ---- cold --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cold:
    """Medians of runs taken in turns."""

    objects: int
    bytes: int
    spine: Run
    scan: Run
    objdump: Run
    spine_ratio: float
    ratio: float


def cold(target: str, sysroot: str, preload: Sequence[str], files: Sequence[Path], rounds: int) -> Cold:
    """A scan without any cache of forkproof's own, and objdump, one after the other, `rounds` times.

    One of each comes first and does not count: files are then in the page cache, and modules compiled.
    """
    scan = [sys.executable, "-m", "forkproof", "scan", "--format", "json", "--sysroot", sysroot, target]
    scan += [f"--preload={library}" for library in preload]
    spine = [sys.executable, Path(__file__).with_name("spine.py"), sysroot, target, *preload]
    spines, scans, dumps = [], [], []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as empty:
            environment = with_bytecode(XDG_CACHE_HOME=f"{empty}/cache")
            spines.append(measured(spine, environment))
            scans.append(measured(scan, environment))
            dumps.append(measured([_objdump(files[0]), "--disassemble", *files], environment))
    way, ours, theirs = _median(spines[1:]), _median(scans[1:]), _median(dumps[1:])
    size = sum(path.stat().st_size for path in files)
    ratios = way.seconds / theirs.seconds, ours.seconds / theirs.seconds
    return Cold(len(files), size, way, ours, theirs, *ratios)


def _objdump(path: Path) -> str:
    """The objdump for the machine of a file."""
    with path.open("rb") as file:
        machine = {62: "x86_64", 183: "aarch64"}[int.from_bytes(file.read(20)[18:], "little")]
    return "objdump" if machine == platform.machine() else f"{machine}-linux-gnu-objdump"


def _median(runs: Sequence[Run]) -> Run:
    return Run(*(median(getattr(run, name) for run in runs) for name in ("seconds", "cpu", "peak")))


# ---- linearity ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Reading and indexing one set of objects."""

    growth: int
    objects: int
    code: int
    seconds: float

    @property
    def rate(self) -> float:
        """MB of code a second."""
        return self.code / 1e6 / self.seconds


def linearity(files: Sequence[Path], rounds: int) -> list[Stage]:
    """Sets of 1, 10 and 50 times a fiftieth of all code, small and large objects mixed in each."""
    sizes = _stage([[path] for path in files], 1)
    order = list(zip((code for code, _ in sizes), files, strict=True))
    Random(1).shuffle(order)  # noqa: S311 - the same order each time is the point
    total = sum(code for code, _ in order)
    sets = [_prefix(order, total * growth / GROWTH[-1]) for growth in GROWTH]
    return [
        Stage(growth, len(chosen), code, seconds)
        for growth, chosen, (code, seconds) in zip(GROWTH, sets, _stage(sets, rounds), strict=True)
    ]


def _prefix(order: Sequence[tuple[int, Path]], wanted: float) -> list[Path]:
    """The first objects that together have the wanted code."""
    chosen: list[Path] = []
    reached = 0
    for code, path in order:
        if reached >= wanted:
            break
        chosen.append(path)
        reached += code
    return chosen


def _stage(sets: Sequence[Sequence[Path]], rounds: int) -> list[tuple[int, float]]:
    """(bytes of code, seconds) of each set, the fastest of some rounds, in a process of their own."""
    request = json.dumps({"sets": [[str(path) for path in chosen] for chosen in sets], "rounds": rounds})
    command = [sys.executable, __file__, "--stage"]
    found = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
    return [(int(code), float(seconds)) for code, seconds in json.loads(found.stdout)]


def stage() -> None:
    """The other side of `_stage`."""
    from forkproof.code.index import index_code
    from forkproof.elf.image import load

    request = json.load(sys.stdin)
    result = []
    for chosen in request["sets"]:
        code, best = 0, float("inf")
        for _ in range(request["rounds"]):
            start = time.perf_counter()
            images = [load(path) for path in chosen]
            indexes = [index_code(image) for image in images]
            best = min(best, time.perf_counter() - start)
            code = sum(size for image in images for _, size in image.code_ranges)
            del images, indexes
        result.append((code, best))
    json.dump(result, sys.stdout)


# ---- imports -----------------------------------------------------------------------------------


def imports(rounds: int) -> dict[str, float]:
    """Seconds to import each module in a new interpreter, beyond an empty one; and `forkproof --help` whole."""

    def waited(*arguments: str) -> float:
        command, environment = [sys.executable, *arguments], with_bytecode(XDG_CACHE_HOME=f"{os.devnull}/cache")
        measured(command, environment)  # compiles
        return median(measured(command, environment).seconds for _ in range(rounds))

    empty = waited("-c", "")
    found = {module: waited("-c", f"import {module}") - empty for module in MODULES}
    return {"(an empty interpreter)": empty, **found, "forkproof --help, whole": waited("-m", "forkproof", "--help")}


# ---- the report --------------------------------------------------------------------------------


def report(target: str, scan: Cold, stages: Sequence[Stage], waits: Mapping[str, float]) -> Iterator[str]:
    """Tables in Markdown."""
    yield f"`{target}` and its libraries: {scan.objects} objects, {scan.bytes / 1e6:.1f} MB of files"
    yield ""
    yield "| cold | seconds | CPU seconds | peak, MiB |"
    yield "|---|--:|--:|--:|"
    rows = (("up to windows and handlers", scan.spine), ("`forkproof scan`", scan.scan), ("`objdump -d`", scan.objdump))
    for name, run in rows:
        yield f"| {name} | {run.seconds:.2f} | {run.cpu:.2f} | {run.peak:.0f} |"
    cpu = scan.spine.cpu / scan.objdump.cpu, scan.scan.cpu / scan.objdump.cpu
    goal = f"goal {RATIO_GOAL}; {MEMORY_GOAL} MiB"
    yield f"| ratio, windows and handlers ({goal}) | {scan.spine_ratio:.3f} | {cpu[0]:.3f} | |"
    yield f"| ratio, scan (goal {SCAN_GOAL:.0f}; {SCAN_MEMORY_GOAL} MiB) | {scan.ratio:.3f} | {cpu[1]:.3f} | |"
    yield ""
    yield "| code | objects | MB of code | seconds | MB/s |"
    yield "|--:|--:|--:|--:|--:|"
    for one in stages:
        yield f"| {one.growth}x | {one.objects} | {one.code / 1e6:.2f} | {one.seconds:.3f} | {one.rate:.0f} |"
    yield ""
    yield "| import | seconds |"
    yield "|---|--:|"
    for module, seconds in waits.items():
        yield f"| {module} | {seconds:.3f} |"


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="Measure forkproof against objdump.")
    parser.add_argument("target", nargs="?", default=PROGRAM, help=f"the program to scan (default: {PROGRAM})")
    parser.add_argument("--sysroot", default="/", help="where it lies")
    parser.add_argument("--preload", action="append", default=[], metavar="LIB", help="as for forkproof scan")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each, of which the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    arguments = _parsed()
    if arguments.stage:
        stage()
        return 0
    files = closure(arguments.target, arguments.sysroot, arguments.preload)
    scan = cold(arguments.target, arguments.sysroot, arguments.preload, files, arguments.rounds)
    stages = linearity(files, arguments.rounds)
    waits = imports(arguments.rounds)
    print("\n".join(report(arguments.target, scan, stages, waits)))
    if arguments.json:
        document: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "target": arguments.target,
            "cold": asdict(scan),
            "linearity": [asdict(one) for one in stages],
            "imports": waits,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
