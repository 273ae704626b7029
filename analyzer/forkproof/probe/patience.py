"""How long is long enough, where others must be given time: in turns of theirs, not in seconds.

Owns: the count of ticks in which threads had the chance to do something. Takes: threads that may run. Gives: a number.
Must never: end a wait because the machine was busy with something else: a thread that wants to run and is not let would
      then be taken for one that does nothing, and a lock that it has for one that is never given back.
Wrong where: the kernel does not say how long a thread has run (/proc/TID/schedstat): then every tick counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from forkproof.probe.tracee import Thread, where

_STARVED: Final = 0.1
"""What a tick counts in which a thread was kept from running: little, but every wait ends."""


class Patience:
    """Counts from 0."""

    def __init__(self) -> None:
        self.ticks = 0.0
        self._ran: dict[int, int] = {}

    def tick(self, threads: Iterable[Thread]) -> None:
        """A tick has passed, in which these could have run."""
        # A list, since every thread is to be looked at: what it has run is compared in the next tick.
        starved = [self._is_starved(thread) for thread in threads]
        self.ticks += _STARVED if any(starved) else 1

    def _is_starved(self, thread: Thread) -> bool:
        """It wants to run, and has not since the last tick."""
        ran = _nanoseconds(thread)
        if ran is None:
            return False
        before, self._ran[thread.tid] = self._ran.get(thread.tid), ran
        seen = where(thread.process.pid, thread.tid)
        return ran == before and seen is not None and seen.state == "R"


def _nanoseconds(thread: Thread) -> int | None:
    """How long a thread has been on a processor; see proc_pid_schedstat in the kernel's scheduler/sched-stats.rst."""
    try:
        return int(Path(f"/proc/{thread.process.pid}/task/{thread.tid}/schedstat").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return None
