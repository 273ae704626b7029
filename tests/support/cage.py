"""Run a program again and again until it hangs, and leave nothing behind: `python -m tests.support.cage`.

Daemons leave their parent, their session and their process group, so neither of these can be used to end them. This
process makes itself the reaper of all its descendants (PR_SET_CHILD_SUBREAPER): whoever is orphaned becomes its
child, and can be found and killed. That is why it is a process of its own and not a function of the test's.

A run is over when everyone has closed the pipe that is their standard output, that is, when all have ended.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Outcome:
    """How many runs there were, whether the last one hung, and the first exit status that was not 0."""

    runs: int
    hung: bool
    status: int


def observe(
    command: Sequence[str | Path], *, attempts: int, limit: float, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command in a cage, until it hangs or ends badly or `attempts` runs have ended."""
    cage = [sys.executable, "-m", "tests.support.cage", f"--attempts={attempts}", f"--limit={limit}", "--"]
    result = subprocess.run(
        [*cage, *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **(env or {})},
    )
    return Outcome(**json.loads(result.stdout))


def _children() -> Iterator[int]:
    """The living children of this process; the dead are reaped on the way."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # ended while we looked
            if int(parent) == os.getpid() and state != "Z":
                yield int(entry.name)


def _end_all() -> None:
    """Kill our children, and who becomes our child by that, until there is none."""
    while True:
        for child in _children():
            os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _once(command: Sequence[str], limit: float) -> tuple[bool, int]:
    """One run: did it hang, and the exit status of the first process."""
    reader, writer = os.pipe()
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer)
    os.close(writer)
    deadline = time.monotonic() + limit
    ended = False
    while not ended and (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            ended = not os.read(reader, 4096)
    os.close(reader)
    if not ended:
        _end_all()
        return True, 0
    status = program.wait()
    _end_all()
    return False, status


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attempts", type=int, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    outcome = Outcome(0, hung=False, status=0)
    for run in range(1, arguments.attempts + 1):
        hung, status = _once(arguments.command, arguments.limit)
        outcome = Outcome(run, hung, status)
        if hung or status != 0:
            break
    print(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
