#!/usr/bin/env python3
"""Probe every fixture many times, and time the probes: `python benchmarks/probes.py`, or `make probe-runs`.

    verdicts    each fixture that hangs is to be confirmed in every run, each clean twin in none; after each run nothing
                of the program is to be left, running or stopped
    time        a whole `forkproof probe` process, median; beside it a loop that only runs the program, for as long as
                one probe takes, and how many of its runs hung

Figures depend on the machine and on what else runs there: the load average is printed beside them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures.build import DEFAULT_OUTPUT, build

HANGING: Final = (
    "daemon_unhooked", "daemon_mutex", "daemon_futex", "daemon_decoy", "daemon_call", "daemon_partial", "cxx_new",
    "daemon_lockable", "child_localtime",
)  # fmt: skip
CLEAN: Final = (
    "daemon_hooked", "daemon_mutex_hooked", "daemon_futex_hooked", "daemon_once", "daemon_shimmed", "cxx_new_hooked",
    "daemon_lockable_shimmed", "child_write", "own_mutex_hooked", "reentry_ends",
)  # fmt: skip
TIMED: Final = "daemon_mutex"
_SETTLE: Final = 1.0
"""Seconds after which a run of the bare program that has not ended counts as hung: it takes milliseconds."""


@dataclass
class Row:
    """The runs of one program."""

    verdicts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    left: int = 0


def verdict(output: str) -> str:
    """Of a whole report: the strongest of its findings' verdicts."""
    found = {f["probe"]["verdict"] for f in json.loads(output)["findings"] if f["probe"]}
    return next((v for v in ("confirmed", "refuted", "inconclusive") if v in found), "nothing to probe")


def probe(command: Sequence[str], options: Sequence[str] = ()) -> tuple[str, float, float]:
    """One whole process: verdict, seconds, CPU seconds."""
    before, start = os.times(), time.perf_counter()
    whole = [sys.executable, "-m", "forkproof", "probe", "--covered", "--format", "json", *options, "--", *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return verdict(done.stdout) if done.stdout else f"exit {done.returncode}", seconds, cpu


def processes_of(paths: Sequence[str]) -> Iterator[int]:
    """Processes that run one of these files."""
    for link in Path("/proc").glob("[0-9]*/exe"):
        with suppress(OSError):
            if str(link.readlink()) in paths:
                yield int(link.parent.name)


def measured(command: Sequence[str], runs: int, options: Sequence[str] = ()) -> Row:
    """Probe one program so often."""
    row = Row()
    for _ in range(runs):
        found, seconds, cpu = probe(command, options)
        row.verdicts[found] += 1
        row.seconds.append(seconds)
        row.cpu.append(cpu)
        row.left += len(list(processes_of([command[0]])))
    return row


def brute_force(
    command: Sequence[str], seconds: float, environment: dict[str, str], *, lives_on: bool
) -> tuple[int, int]:
    """Run the bare program again and again for so long: runs, and how many of them hung.

    A daemon that lives on has not hung: of such a program, the process that was started is to end.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # a subreaper: daemons come back to us
    end, runs, hung = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        runs += 1
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, **environment},
        ) as process:  # fmt: skip
            limit = time.monotonic() + _SETTLE
            while process.poll() is None or (not lives_on and list(processes_of([command[0]]))):
                if time.monotonic() > limit:
                    hung += 1
                    break
                time.sleep(0.002)
            for pid in [*processes_of([command[0]])]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return runs, hung


def qemu(root: Path) -> tuple[list[str], list[str], dict[str, str]]:
    """Debian's QEMU as a daemon over tcmalloc, whose pthread_atfork does nothing: command, options, environment."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    folder = DEFAULT_OUTPUT.parent / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "hookless.c"
    source.write_text(
        "int pthread_atfork(void (*a)(void), void (*b)(void), void (*c)(void)) { return !a && !b && !c; }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libhookless.so", source], check=True)
    command = [str(root / "usr/bin/qemu-system-x86_64"), "-S", "-no-user-config", "-nodefaults", "-nographic"]
    places = [str(libraries), *map(str, libraries.glob("pulseaudio"))]
    preload = [str(folder / "libhookless.so"), str(libraries / "libtcmalloc.so.4")]
    options = [f"--library-path={p}" for p in places] + [f"--preload={p}" for p in preload]
    environment = {"LD_LIBRARY_PATH": ":".join(places), "LD_PRELOAD": " ".join(preload)}
    return [*command, "-machine", "none", "-daemonize"], options, environment


def show(name: str, row: Row, wanted: str) -> None:
    """A line of the table."""
    words = ", ".join(f"{n} {v}" for v, n in row.verdicts.most_common())
    is_right = set(row.verdicts) == {"confirmed"} if wanted == "confirmed" else not row.verdicts["confirmed"]
    mark = "" if is_right and not row.left else "  <-- NOT AS IT SHOULD BE"
    figures = f"{median(row.seconds):6.2f} s  {median(row.cpu):5.2f} CPU s  left {row.left}"
    print(f"{name:<26} {words:<34} {figures}{mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Probe every fixture many times, and time the probes.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", action="append", metavar="FIXTURE")
    parser.add_argument("--no-times", action="store_true")
    asked = parser.parse_args()
    built = build("x86_64", DEFAULT_OUTPUT)
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors; {asked.runs} runs each")
    for wanted, names in (("confirmed", HANGING), ("clean", CLEAN)):
        for name in names if not asked.only else [n for n in names if n in asked.only]:
            show(name, measured([str(built.tree.path(built.fixtures[name]))], asked.runs), wanted)
    if not asked.no_times:
        times(built.tree.path(built.fixtures[TIMED]))


def times(small: Path) -> None:
    """Time to verdict, beside brute force."""
    from tools.sysroot import find

    cases: list[tuple[str, list[str], list[str], dict[str, str]]] = [("small program", [str(small)], [], {})]
    root = find("bookworm-amd64")
    if root is not None:
        cases.append(("QEMU", *qemu(root)))
    for name, command, options, environment in cases:
        row = measured(command, 5, options)
        seconds = median(row.seconds)
        runs, hung = brute_force(command, seconds, environment, lives_on=name == "QEMU")
        words = f"time to verdict {seconds:.2f} s, {median(row.cpu):.2f} CPU s, medians of 5 ({dict(row.verdicts)})"
        loop = f"a loop of the bare program for as long: {runs} runs, {hung} hung"
        print(f"{name}: {words}; {loop}; load average {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
