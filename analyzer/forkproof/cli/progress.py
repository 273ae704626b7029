"""Progress on a terminal: a bar on stderr that leaves nothing behind.

Owns: the bar. Takes: calls of the `Progress` protocol. Gives: something to look at.
Must never: write to anything but a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from forkproof.options import QUIET, Progress
from forkproof.report.layout import shorten

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar while the block runs, if somebody can see it."""
    if not sys.stderr.isatty():
        yield QUIET
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    text = TextColumn("{task.description}", markup=False)
    with Bars(BarColumn(20), text, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(bars, bars.add_task("starting", total=None))


class _Bar:
    """One bar for the stage at hand."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def stage(self, name: str, done: int, total: int) -> None:
        """Show it."""
        self._bars.update(self._task, description=shorten(name, 60), completed=done, total=total or None)
