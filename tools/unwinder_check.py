"""Compare forkproof's unwinder with gdb's, on real programs at chance states: `make unwinder-check`.

    python -m tools.unwinder_check                     all programs, both machines
    python -m tools.unwinder_check --machine x86_64 --states 60 --only xz

x86-64 programs run natively under gdb; arm64 programs of the sysroot bookworm-arm64 run by qemu-user, whose gdbstub
gdb-multiarch talks to. A state is one thread, stopped; its two stacks agree when all their addresses are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.sysroot import find

HERE = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("unwinder_in_gdb.py")
SQL = (
    "with recursive c(n) as (select 1 union all select n+1 from c where n<99999999) "
    "select sum(n*7%11) from c group by n%7;"
)
PYTHON = 'import re,itertools; [re.sub("(1|2)+","c",str(sorted(range(999)))) for _ in itertools.count()]'
BIG = "/usr/lib/x86_64-linux-gnu/libc.a"


@dataclass(frozen=True)
class Subject:
    """A program to be stopped."""

    name: str
    program: str
    arguments: str
    threads: int = 3
    steps: int = 12
    """Instructions that are stepped at most; 1: none, where signals come so often that gdb's steps do not end."""


X86_64 = (
    Subject("xz", "xz", "-9 -T3 -k -c /usr/bin/gdb"),
    Subject("sort", "sort", f"--parallel=3 -R {BIG}"),
    Subject("perl", "perl", "-e 'while(1){@a=sort map{$_*7%1001}1..999;%h=map{$_=>1}@a;s/(.)(.)/$2$1/g for %h}'"),
    Subject("bash", "bash", "-c 'while :; do x=$(( (x*7+1) % 99991 )); y=${x//1/22}; z=($y $x {1..50}); done'"),
    Subject("python", str(Path(sys.executable).resolve()), f"-S -c '{PYTHON}'"),
    Subject("sqlite", "sqlite3", f":memory: '{SQL}'"),
    Subject("openssl", "openssl", "speed -seconds 100 rsa2048"),
    Subject("git", "git", "-C /usr/share grep --no-index -E 'a(b|c)*d[ef]+g.*zz'"),
    Subject("find", "find", "/usr /etc /usr /etc -regex '.*a.*b.*c.*zzz'"),
    Subject("cc1", "/usr/lib/gcc/x86_64-linux-gnu/12/cc1", f"-quiet -O2 -o /dev/null {HERE}/build/unwinder.c"),
    Subject("signals", f"{HERE}/build/unwinder-x86_64", "", steps=1),
)
AARCH64 = (
    Subject("signals", f"{HERE}/build/unwinder-aarch64", "", steps=1),
    Subject("python", "usr/bin/python3.11", f"-S -c '{PYTHON}'"),
    Subject(
        "perl", "usr/bin/perl", "-e 'while(1){@a=sort map{$_*7%1001}1..999;%h=map{$_=>1}@a;s/(.)(.)/$2$1/g for %h}'"
    ),
    Subject("bash", "usr/bin/bash", "-c 'while :; do x=$(( (x*7+1) % 99991 )); y=${x//1/22}; z=($y $x {1..50}); done'"),
    Subject(
        "mawk", "usr/bin/mawk", '\'BEGIN{while(1){s="";for(i=0;i<999;i++)s=s i;gsub(/[13]+/,"x",s);split(s,a,/x/)}}\''
    ),
)


@dataclass
class Tally:
    """What one program gave."""

    states: int = 0
    equal: int = 0
    beyond: int = 0
    """Equal, but gdb goes on where no code is: behind ld.so's first instruction, whose CFI says no end."""
    frames: int = 0
    differences: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, row: dict[str, Any]) -> None:
        self.states += 1
        self.equal += row["equal"]
        self.beyond += row.get("beyond", False)
        self.frames += row["depth"]
        if not row["equal"] and not row.get("beyond"):
            kind = explained(row["gdb"], row["ours"])
            self.differences[kind] += 1
            self.examples.setdefault(kind, row)


def explained(theirs: list[str], ours: list[str]) -> str:
    """In which way two stacks differ, and where."""
    same = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    at = (theirs[same - 1] if same else theirs[0]).rsplit("+", 1)[0]
    if same == len(theirs):
        return f"gdb ends in {at}"
    return f"forkproof ends in {at}" if same == len(ours) else f"different callers of {at}"


def missing(machine: str) -> str | None:
    """Why it cannot be done here, or None."""
    if machine == "x86_64":
        return None if shutil.which("gdb") else "gdb is not installed"
    if not shutil.which("gdb-multiarch") or not shutil.which("qemu-aarch64"):
        return "gdb-multiarch and qemu-user are needed"
    return None if find("bookworm-arm64") else "no sysroot bookworm-arm64: make sysroots SYSROOTS=bookworm-arm64"


def check(machine: str, subject: Subject, states: int, seed: int, seconds: float) -> Tally | None:
    """All states of one program; None where it is not installed."""
    root = str(find("bookworm-arm64")) if machine == "aarch64" else ""
    own = subject.program.startswith(str(HERE))
    program = f"{root}/{subject.program}" if root and not own else shutil.which(subject.program)
    if program is None or not Path(program).exists():
        return None
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="forkproof-unwinder-") as folder:
        out = Path(folder, "states.json")
        wanted: dict[str, Any] = {
            "machine": machine, "program": program, "arguments": subject.arguments, "states": states, "seed": seed,
            "seconds": seconds, "pause": [0.005, 0.12], "out": str(out), "threads": subject.threads,
            "steps": subject.steps,
            "path": [str(HERE / "analyzer"), *(p for p in sys.path if p.endswith("-packages"))],
        }  # fmt: skip
        if root:
            _remote(wanted, root, program, subject, folder)
        else:
            _gdb("gdb", wanted)
        for row in json.loads(out.read_text()) if out.exists() else ():
            tally.note(row)
    return tally


def _remote(wanted: dict[str, Any], root: str, program: str, subject: Subject, folder: str) -> None:
    """The same by qemu-user's gdbstub."""
    socket = f"{folder}/gdb"
    command = f"exec qemu-aarch64 -cpu cortex-a57 -g {socket} -L {root} {program} {subject.arguments}"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as guest:
        for _ in range(100):
            if Path(socket).exists():
                break
            try:
                guest.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        _gdb("gdb-multiarch", {**wanted, "remote": socket, "root": root, "pid": guest.pid})
        guest.kill()


def _gdb(name: str, wanted: dict[str, Any]) -> None:
    environment = {**os.environ, "FORKPROOF_UNWINDER": json.dumps(wanted), "OPENBLAS_NUM_THREADS": "1"}
    log = None if os.environ.get("FORKPROOF_UNWINDER_LOG") else subprocess.DEVNULL
    with subprocess.Popen(
        [name, "-nx", "-batch", "-x", SCRIPT], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=log, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            process.wait(wanted["seconds"] + 30)
        except subprocess.TimeoutExpired:
            process.kill()  # gdb's tracees go with it
            print(f"{wanted['program']}: gdb did not come to an end; killed", file=sys.stderr)


SIGNALS = """
#include <signal.h>
#include <stdlib.h>
#include <sys/time.h>
static volatile long n;
static unsigned next(void) { static volatile unsigned state; return state = state * 1103515245u + 12345u; }
static int compare(const void *a, const void *b) { n++; return *(const int *)a - *(const int *)b; }
static void work(int size) { int v[size]; for (int i = 0; i < size; i++) v[i] = next() >> 8;
    qsort(v, size, sizeof *v, compare); }
static void handler(int number) { work(4999 + (number & 1)); }
int main(void)
{
    struct itimerval often = {{0, 50000}, {0, 50000}};
    signal(SIGALRM, handler);
    setitimer(ITIMER_REAL, &often, 0);
    for (;;)
        work(200);
}
"""


def write_sources() -> None:
    """Something for cc1 to chew on, and a program that is mostly in signal handlers."""
    folder = HERE / "build"
    folder.mkdir(exist_ok=True)
    line = "int f{n}(int a, int *b) {{ for (int i = 0; i < a; i++) b[i] += b[i ^ {n}] * {n}; return b[a]; }}\n"
    (folder / "unwinder.c").write_text("".join(line.format(n=n) for n in range(3000)))
    (folder / "unwinder-signals.c").write_text(SIGNALS)
    for machine in ("x86_64", "aarch64"):
        compiler, result = f"{machine}-linux-gnu-gcc", folder / f"unwinder-{machine}"
        if shutil.which(compiler):
            subprocess.run([compiler, "-O2", "-o", result, folder / "unwinder-signals.c"], check=True)


def report(machine: str, found: dict[str, Tally]) -> Iterator[str]:
    """The table of one machine, and what differs."""
    yield f"{machine}: program, states, frames, equal, equal until gdb leaves all code"
    for name, tally in found.items():
        yield f"  {name:<10} {tally.states:>5} {tally.frames:>7} {tally.equal:>5} {tally.beyond:>5}"
    states, equal = sum(t.states for t in found.values()), sum(t.equal for t in found.values())
    beyond = sum(t.beyond for t in found.values())
    yield f"  {'all':<10} {states:>5} {sum(t.frames for t in found.values()):>7} {equal:>5} {beyond:>5}"
    for name, tally in found.items():
        for kind, count in tally.differences.most_common():
            row = tally.examples[kind]
            yield f"  {name}: {count} times: {kind}"
            yield f"      gdb       {' < '.join(row['gdb'][:10])}"
            yield f"      forkproof {' < '.join(row['ours'][:10])}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare forkproof's unwinder with gdb's.")
    parser.add_argument("--machine", choices=["x86_64", "aarch64"], action="append")
    parser.add_argument("--states", type=int, default=140, help="of each program")
    parser.add_argument("--seconds", type=float, default=60, help="for each program, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", metavar="PROGRAM")
    asked = parser.parse_args()
    write_sources()
    for machine in asked.machine or ["x86_64", "aarch64"]:
        if (reason := missing(machine)) is not None:
            print(f"{machine}: skipped: {reason}")
            continue
        found = {}
        for subject in X86_64 if machine == "x86_64" else AARCH64:
            if asked.only and subject.name not in asked.only:
                continue
            tally = check(machine, subject, asked.states, asked.seed, asked.seconds)
            if tally is not None:
                found[subject.name] = tally
        print("\n".join(report(machine, found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
