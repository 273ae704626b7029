#!/usr/bin/env python3
"""The two-minute tour: a hazard, its clean twin, and a daemon of this machine. Run it by `make demo`."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKPROOF = Path(sys.executable).with_name("forkproof")
#: What a machine usually has, the most interesting first.
PROGRAMS = (
    "/usr/sbin/sshd",
    "/usr/bin/qemu-system-x86_64",
    "/usr/sbin/cron",
    "/usr/lib/systemd/systemd",
    "/usr/bin/dbus-daemon",
    "/bin/bash",
)


def show(title: str, target: Path, expected: int | None, *remarks: str) -> bool:
    """Scan one target, and compare the exit code if one is expected."""
    print(f"\n== {title}\n$ forkproof scan {target}\n", flush=True)
    code = subprocess.run([FORKPROOF, "scan", target], check=False).returncode
    print(f"\n(exit code {code}{'' if expected is None else f', expected {expected}'})")
    for remark in remarks:
        print(f"  {remark}")
    return expected is None or code == expected


def main() -> int:
    built = ROOT / "build" / "fixtures"
    names = ("daemon_unhooked", "daemon_hooked")
    subprocess.run([sys.executable, "-m", "fixtures.build", "--quiet", *names], cwd=ROOT, check=True)
    programs = built / platform.machine()
    good = show(
        "A daemon with threads, and an allocator that registers no fork handlers",
        programs / "daemon_unhooked",
        1,
        "The finding shows two stacks: who can hold the lock when main forks, and how the child comes to want it.",
    )
    good &= show(
        "Its twin: the same program, the same allocator, with pthread_atfork handlers",
        programs / "daemon_hooked",
        0,
        "No hang is left: the prepare handler takes the lock before every fork, so no child inherits it held. That the",
        "daemon loses a thread is true, and low: exit code 0.",
    )
    real = next((Path(program) for program in PROGRAMS if Path(program).exists()), None)
    if real is not None:
        show(
            "A program of this machine",
            real,
            None,
            "Look at which allocator is active and whether its handlers are effective, at the fork windows, and",
            "at what each finding says is unknown. Exit codes: 0 nothing high, 1 findings, 3 partly analysed.",
        )
    print(f"\nThe command is {FORKPROOF}: see its --help, and README.md.")
    print("demo: as expected" if good else "\ndemo: NOT as expected: see the exit codes above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
