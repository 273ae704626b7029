"""A program in a loop, to see how often it hangs by itself: `tools/brute_force.py SECONDS [NAME=VALUE…] COMMAND…`.

It needs nothing but Python, so that it can be put into the laboratory. Prints the runs and how many of them hung. The
program is one that becomes a daemon, and is then killed; a run has hung when the process that was started does not end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Final

SETTLE: Final = 1.0
"""Seconds after which a run that has not ended counts as hung: it takes milliseconds."""
_SUBREAPER: Final = 36
"""PR_SET_CHILD_SUBREAPER: daemons come back to us."""


def brute_force(
    command: Sequence[str], seconds: float, environment: Mapping[str, str], *, lives_on: bool, settle: float = SETTLE
) -> tuple[int, int]:
    """Run the bare program again and again for so long: runs, and how many of them hung.

    A daemon that lives on has not hung: of such a program, the process that was started is to end.
    """
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    end, runs, hung = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        runs += 1
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, **environment},
        ) as process:  # fmt: skip
            limit = time.monotonic() + settle
            while process.poll() is None or (not lives_on and list(_processes_of(command[0]))):
                if time.monotonic() > limit:
                    hung += 1
                    break
                time.sleep(0.002)
            for pid in list(_processes_of(command[0])):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return runs, hung


def _processes_of(path: str) -> Iterator[int]:
    """Processes that run this file."""
    for link in Path("/proc").glob("[0-9]*/exe"):
        with suppress(OSError):
            if str(link.readlink()) == path:
                yield int(link.parent.name)


if __name__ == "__main__":
    # An emulated machine takes seconds for what this one does in milliseconds.
    words = sys.argv[2:]
    names = list(takewhile(lambda word: "=" in word, words))
    variables = dict(word.split("=", 1) for word in names)
    found = brute_force(words[len(names) :], float(sys.argv[1]), variables, lives_on=True, settle=20 * SETTLE)
    print(f"{found[0]} runs, {found[1]} hung")
