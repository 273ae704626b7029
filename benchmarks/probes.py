#!/usr/bin/env python3
"""Probe every fixture many times, and time the probes: `python benchmarks/probes.py`, or `make probe-runs`.

    verdicts    each fixture that hangs is to be confirmed in every run, each clean twin, asked the same question, in
                none; after each run nothing of the program is to be left, running or stopped. Each is scanned once.
                --machine aarch64 does it in the laboratory's virtual machine.
    time        a whole `forkproof probe` process, median; the same for a program that nobody has seen while its
                libraries are known, and for files that were scanned before; the scan and the probe alone; beside it
                a loop that only runs the program, for as long as one probe takes, and how many of its runs hung.
                --machine aarch64: the incident in the virtual machine, from the start of the machine, whose image is
                there, to the report

Figures depend on the machine and on what else runs there: the load average is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures.build import DEFAULT_OUTPUT, Result, build
from forkproof.options import ScanOptions
from forkproof.probe.prepare import plan_text
from tools import laboratory, probe_fixtures
from tools.brute_force import brute_force
from tools.bytecode import with_bytecode
from tools.sysroot import find

HERE: Final = Path(__file__).resolve().parents[1]
TIMED: Final = "daemon_mutex"
_IN_A_BOOT: Final = 12


# Verdicts.


def planner(machine: str, built: Result, folder: Path) -> probe_fixtures.Planner:
    """Scans the fixtures where they are, or, for another machine, where its root will have them."""
    if machine == platform.machine():
        return probe_fixtures.Planner(built)
    system = find("bookworm-arm64")
    if system is None:
        sys.exit(laboratory.missing())
    return probe_fixtures.for_guest(built, folder / "root", system)


def results(machine: str, jobs: Sequence[dict[str, Any]], plans: Path, fixtures: Path) -> Iterator[dict[str, Any]]:
    """Run them: here in a process each, there some in a boot, so that the table grows while one looks."""
    script, out = HERE / "tools" / "probe_jobs.py", plans / "results.json"
    at_once = 1 if machine == platform.machine() else _IN_A_BOOT
    for first in range(0, len(jobs), at_once):
        (plans / "jobs.json").write_text(json.dumps(jobs[first : first + at_once]), encoding="utf-8")
        if machine == platform.machine():
            command = [sys.executable, str(script), plans / "jobs.json", out]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            yield from json.loads(out.read_text(encoding="utf-8"))
            continue
        files = {"plans": plans, "probe_jobs.py": script, "fixtures": fixtures}
        done = laboratory.run("python3 probe_jobs.py plans/jobs.json /work/out/results.json\n", files, seconds=7200)
        if "results.json" not in done.files:
            sys.exit(f"the machine brought nothing back:\n{done.console[-3000:]}")
        yield from json.loads(done.files["results.json"])


def verdicts(machine: str, runs: int, only: Sequence[str], kept: Path | None) -> bool:
    """The table of all fixtures; true when all are as they should be."""
    built = build(machine, DEFAULT_OUTPUT)
    with tempfile.TemporaryDirectory(prefix="forkproof-probes-") as scratch:
        folder = Path(scratch)
        plans = kept or folder / "plans"
        plans.mkdir(parents=True, exist_ok=True)
        jobs = []
        for job, plan in (*fixture_jobs(planner(machine, built, folder)), *incident_jobs(machine)):
            if not only or job["name"] in only:
                if not (path := plans / f"{job['name']}.json").exists():
                    path.write_text(plan(), encoding="utf-8")
                jobs.append({**job, "plan": path.name, "runs": runs, "covered": True})
        guest = folder / "root" / probe_fixtures.GUEST.lstrip("/")
        wanted = {job["name"]: job["wanted"] for job in jobs}
        right = [show(found, wanted[found["name"]]) for found in results(machine, jobs, plans, guest)]
    print(f"{machine}: {sum(right)} of {len(right)} programs as they should be")
    return all(right)


Job = tuple[dict[str, Any], Callable[[], str]]
"""What `tools/probe_jobs.py` takes, and what makes its plan."""


def fixture_jobs(scans: probe_fixtures.Planner) -> Iterator[Job]:
    """Those that hang, then the clean ones."""
    known, machine = scans.built.fixtures, scans.built.tree.machine
    for wanted, fixtures in (("confirmed", probe_fixtures.hanging), ("", probe_fixtures.clean)):
        for fixture in fixtures(known, machine):
            job = {"name": fixture.name, "command": [scans.program(fixture)], "wanted": wanted}
            yield job, partial(scans.text, fixture)


def incident_jobs(machine: str) -> Iterator[Job]:
    """QEMU as a daemon over tcmalloc, as Debian ships it and without fork handlers. arm64's is in the tests."""
    root = find("bookworm-amd64")
    if machine != "x86_64" or root is None:
        return
    for name, wanted in (("qemu", "refuted"), ("qemu_hookless", "confirmed")):
        daemon = qemu(root, is_hooked=wanted == "refuted")
        job = {
            "name": name, "wanted": wanted, "command": daemon.command, "preload": daemon.preload,
            "environment": {"LD_LIBRARY_PATH": ":".join(daemon.places)},
        }  # fmt: skip
        options = ScanOptions(library_path=tuple(daemon.places), preload=tuple(daemon.preload))
        yield job, partial(plan_text, daemon.command[0], options)


def strongest(found: Sequence[str]) -> str:
    """Of a run's verdicts."""
    return next((v for v in ("confirmed", "refuted", "inconclusive") if v in found), "nothing to probe")


def show(result: dict[str, Any], wanted: str) -> bool:
    """A line of the table, and the reasons of runs that are not as they should be.

    A clean twin's are, when they are not confirmed.
    """
    words = Counter(map(strongest, result["verdicts"]))
    left = [line for lines in result["left"] for line in lines]
    is_right = set(words) == {wanted} if wanted else not words["confirmed"]
    counts = ", ".join(f"{n} {v}" for v, n in words.most_common())
    figures = f"{median(result['seconds']):6.2f} s  {median(result['cpu']):5.2f} CPU s  left {len(left)}"
    name = f"{result['name']} ({wanted or 'clean'})"
    print(
        f"{name:<34} {counts:<34} {figures}{'' if is_right and not left else '  <-- NOT AS IT SHOULD BE'}", flush=True
    )
    reasons = Counter(
        why
        for lines, seen in zip(result["why"], result["verdicts"], strict=True)
        if wanted and wanted not in seen
        for why in lines
    )
    for line, times in (*reasons.items(), *Counter(left).items()):
        print(f"    {times}x {line}", flush=True)
    return is_right and not left


# Time.


@dataclass(frozen=True)
class Timed:
    """One whole process."""

    verdict: str
    seconds: float
    cpu: float


def timed(arguments: Sequence[str]) -> Timed:
    """`forkproof probe` with these arguments."""
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "forkproof", "probe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_bytecode())
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    if not done.stdout:
        return Timed(f"exit code {done.returncode}", seconds, cpu)
    found = json.loads(done.stdout)["findings"]
    return Timed(strongest([f["probe"]["verdict"] for f in found if f["probe"]]), seconds, cpu)


@dataclass(frozen=True)
class Daemon:
    """QEMU over tcmalloc, which daemonizes."""

    command: list[str]
    preload: list[str]
    places: list[str]
    """Directories of its libraries."""

    @property
    def options(self) -> list[str]:
        """Of `forkproof probe`."""
        return [f"--library-path={p}" for p in self.places] + [f"--preload={p}" for p in self.preload]

    @property
    def environment(self) -> dict[str, str]:
        """Of the bare program."""
        return {"LD_LIBRARY_PATH": ":".join(self.places), "LD_PRELOAD": " ".join(self.preload)}


def qemu(root: Path, *, is_hooked: bool) -> Daemon:
    """Debian's, or with a pthread_atfork that does nothing."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    folder = DEFAULT_OUTPUT.parent / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "hookless.c"
    source.write_text(
        "int pthread_atfork(void (*a)(void), void (*b)(void), void (*c)(void)) { return !a && !b && !c; }\n"
    )
    if not (library := folder / "libhookless.so").exists():
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    command = [str(root / "usr/bin/qemu-system-x86_64"), "-S", "-no-user-config", "-nodefaults", "-nographic"]
    preload = [] if is_hooked else [str(library)]
    return Daemon(
        [*command, "-machine", "none", "-daemonize"],
        [*preload, str(libraries / "libtcmalloc.so.4")],
        [str(libraries), *map(str, libraries.glob("pulseaudio"))],
    )


def unseen(command: Sequence[str], options: Sequence[str]) -> Timed:
    """The same of a program whose file is like no other: of its own name, it is found where its libraries are."""
    program = Path(command[0])
    copy = program.with_name(f"{program.name}-{time.time_ns()}")
    shutil.copy(program, copy)
    try:
        with copy.open("ab") as file:
            file.write(copy.name.encode())
        return timed([*options, "--format=json", "--", str(copy), *command[1:]])
    finally:
        copy.unlink()


def times(small: Path) -> None:
    """Time to verdict, beside brute force."""
    cases: list[tuple[str, list[str], list[str], dict[str, str]]] = [("small program", [str(small)], [], {})]
    root = find("bookworm-amd64")
    if root is not None:
        daemon = qemu(root, is_hooked=False)
        cases.append(("QEMU", daemon.command, daemon.options, daemon.environment))
    for name, command, options, environment in cases:
        whole = [*options, "--format=json", "--", *command]
        rows = {"whole": [timed(["--no-cache", *whole]) for _ in range(5)]}
        rows["new program, known libraries"] = [unseen(command, options) for _ in range(6)][1:]
        timed(whole)
        rows["again"] = [timed(whole) for _ in range(5)]
        with tempfile.TemporaryDirectory(prefix="forkproof-probes-") as folder:
            plan = f"{folder}/plan.json"
            rows["scan alone"] = [
                timed(["--no-cache", *options, f"--write-plan={plan}", "--", *command]) for _ in range(5)
            ]
            by_plan = [*options, f"--plan={plan}", "--format=json", "--", *command]
            rows["probe alone"] = [timed(by_plan) for _ in range(5)]
        print(f"{name}, medians of 5, load average {os.getloadavg()[0]:.1f}")
        for what, row in rows.items():
            found = "" if what == "scan alone" else f"  {dict(Counter(r.verdict for r in row))}"
            print(
                f"  {what:<28} {median(r.seconds for r in row):6.2f} s {median(r.cpu for r in row):6.2f} CPU s{found}"
            )
        seconds = median(r.seconds for r in rows["whole"])
        runs, hung = brute_force(command, seconds, environment, lives_on=name == "QEMU")
        print(f"  a loop of the bare program for {seconds:.1f} s: {runs} runs, {hung} hung", flush=True)


_INCIDENT: Final = (
    "/usr/bin/qemu-system-aarch64", "-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none",
    "-daemonize",
)  # fmt: skip
_ALLOCATOR: Final = "libtcmalloc.so.4"


def guest_times() -> None:
    """The same for the incident on arm64, each time in a machine that is started for it."""
    system = find("bookworm-arm64")
    if system is None or laboratory.missing() is not None:
        sys.exit(laboratory.missing())
    laboratory.base()
    tools = HERE / "tools"
    with tempfile.TemporaryDirectory(prefix="forkproof-probes-") as scratch:
        plans, start = Path(scratch), time.perf_counter()
        (plans / "plan").write_text(
            plan_text(_INCIDENT[0], ScanOptions(system, preload=(_ALLOCATOR,))), encoding="utf-8"
        )
        scan = time.perf_counter() - start
        job = {"name": "incident", "plan": "plan", "command": _INCIDENT, "preload": [_ALLOCATOR], "runs": 1}
        (plans / "jobs.json").write_text(json.dumps([{**job, "rule": "atfork-unbound"}]), encoding="utf-8")
        files = {"plans": plans, "probe_jobs.py": tools / "probe_jobs.py", "brute_force.py": tools / "brute_force.py"}
        rows, verdicts = [], Counter[str]()
        for _ in range(5):
            done = laboratory.run("python3 probe_jobs.py plans/jobs.json /work/out/results.json\n", files)
            (result,) = json.loads(done.files["results.json"])
            rows.append((done.seconds, result["seconds"][0]))
            verdicts[strongest(result["verdicts"][0])] += 1
        whole = median(seconds for seconds, _ in rows)
        print(f"the incident on arm64, medians of 5, load average {os.getloadavg()[0]:.1f}")
        print(f"  machine, probe and report {whole:6.2f} s  {dict(verdicts)}")
        print(f"  of that the probe's runs  {median(seconds for _, seconds in rows):6.2f} s")
        print(f"  scan, here, once          {scan:6.2f} s")
        script = f"python3 brute_force.py {whole} LD_PRELOAD={_ALLOCATOR} {' '.join(_INCIDENT)} > /work/out/found\n"
        found = laboratory.run(script, files).files["found"].decode().strip()
        print(f"  a loop of the bare program for {whole:.1f} s in the machine: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Probe every fixture many times, and time the probes.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--machine", choices=("x86_64", "aarch64"), default=platform.machine())
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="Keep the plans, and use those that are there.")
    parser.add_argument("--no-verdicts", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    asked = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors; {asked.runs} runs each")
    is_right = asked.no_verdicts or verdicts(asked.machine, asked.runs, asked.only, asked.plans)
    if not asked.no_times and asked.machine != platform.machine():
        guest_times()
    elif not asked.no_times:
        built = build(asked.machine, DEFAULT_OUTPUT)
        times(built.tree.path(built.fixtures[TIMED]))
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
