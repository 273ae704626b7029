"""Progress on standard error: a bar that leaves nothing behind on a terminal, plain lines for a log.

Owns: the bar, the lines, and `--quiet`. Takes: calls of the `Progress` protocol. Gives: something to look at.
Must never: write to standard output, stop a scan since nobody reads, or judge: what it tells is before any policy.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

import click

from forkproof.options import QUIET, Progress, Scanned
from forkproof.report.layout import clean, shorten

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_LONG: Final = 10.0
"""Seconds after which a log is told that something still goes on."""

QUIETLY: Final = click.option("--quiet", "-q", is_flag=True, help="Tell nothing of progress on standard error.")
"""For every command that can take long."""


@contextmanager
def progress(*, quiet: bool = False, no_color: bool = False) -> Iterator[Progress]:
    """Somebody to tell how far it is while the block runs."""
    stream: TextIO | None = sys.stderr  # None where the caller has closed it (`2>&-`), which its type does not say
    if quiet or stream is None:
        yield QUIET
    elif not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield _Lines(stream)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        text = TextColumn("{task.description}", markup=False)
        console = Console(stderr=True, no_color=no_color or bool(os.environ.get("NO_COLOR")))
        with Bars(BarColumn(20), text, console=console, transient=True) as bars:
            yield _Bar(bars, bars.add_task("starting", total=None))


class _Bar:
    """One bar for the stage at hand, or for all programs."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task
        self._findings = 0

    def stage(self, name: str, done: int, total: int) -> None:
        """Show it."""
        self._bars.update(self._task, description=shorten(name, 60), completed=done, total=total or None)

    def scanned(self, program: Scanned, done: int, total: int) -> None:
        """Show how many findings there are so far."""
        self._findings += program.findings
        self.stage(f"{_counted(self._findings)}; {program.name}", done, total)


class _Lines:
    """A line for each of several programs, and for whatever takes long."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = self._said = time.monotonic()

    def stage(self, name: str, done: int, total: int) -> None:  # noqa: ARG002 - the protocol's
        """Only where nothing was said for long."""
        now = time.monotonic()
        if now - self._said >= _LONG:
            self._say(f"{name}, after {now - self._begun:.0f} s")

    def scanned(self, program: Scanned, done: int, total: int) -> None:
        """How it came out; nobody waits for one program that is quickly done."""
        if total == 1 and (program.seconds or 0) < _LONG:
            return
        found = "" if program.gap and not program.findings else _counted(program.findings)
        worst = f"the worst {program.worst}" if program.worst else ""
        seconds = "" if program.seconds is None else f"{program.seconds:.1f} s"
        told = ", ".join(filter(None, (found, worst, program.gap, seconds)))
        self._say(f"{f'{done} of {total}: ' if total > 1 else ''}{program.name}: {told}")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        try:
            self._stream.write(f"forkproof: {clean(text)}\n")
            self._stream.flush()
        except (OSError, ValueError):  # a reader that has left, a full device: the result is what counts
            return


def _counted(number: int) -> str:
    return f"{number or 'no'} finding{'s' * (number > 1)}"
