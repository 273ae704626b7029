"""What a scan is asked for, and how it says how far it is.

Owns: the request's type and the protocol by which progress leaves the analysis.
Takes: plain values. Gives: frozen ones.
Must never: look at a file, or know a terminal; `forkproof.cli.progress` draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """In which world the targets would be started; the defaults are this machine with a clean environment."""

    sysroot: Path | None = None
    """The directory that is `/` for the targets; None is this machine's own."""
    library_path: tuple[str, ...] = ()
    """LD_LIBRARY_PATH, one directory an element."""
    preload: tuple[str, ...] = ()
    """LD_PRELOAD, one library an element."""
    also: tuple[str, ...] = ()
    """Libraries that the program opens with dlopen, in this order."""
    replace: tuple[tuple[str, Path], ...] = ()
    """Libraries by file name, and the files of this machine that stand in their places."""
    jobs: int = 1
    """Processes that scan programs side by side."""
    cache: Path | None = None
    """Where results are kept and looked for; None: nowhere."""
    only: tuple[str, ...] = ()
    """Of the programs that directories and artifacts hold, those whose paths match a pattern; all if there is none."""
    as_named: bool = False
    """Files are started as they are named: what units and wrappers of the system preload into them does not count."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """A program that a scan is done with, told before there is a report: no policy has looked at it yet."""

    name: str
    findings: int = 0
    worst: str = ""
    """The severity of the worst finding; empty if there is none."""
    gap: str = ""
    """"not analysed", "not everything was analysed", or nothing."""
    seconds: float | None = None
    """None where nobody knows: its process died."""


class Progress(Protocol):
    """Where a scan reports how far it is."""

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` steps of the stage `name` are over; 0 of 0 if their number is not known."""

    def scanned(self, program: Scanned, done: int, total: int) -> None:
        """It is the `done`-th of `total` programs that are over, in whatever order that comes."""


class _Quiet:
    """Progress that nobody watches."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Nothing to do."""

    def scanned(self, program: Scanned, done: int, total: int) -> None:
        """Nothing to do."""


QUIET: Final[Progress] = _Quiet()
