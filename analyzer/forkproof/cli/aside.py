"""What is told on standard error of a report that goes where nobody reads it at once.

Owns: which reports those are, and how much is told. Takes: a report, its format and its file.
Must never: tell twice what a terminal shows anyway, or be the only place that tells it: the report has all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from forkproof.cli import output
from forkproof.model import Report

_READ: Final = ("text", "brief")
_MOST: Final = 10


def tell(report: Report, form: str, file: Path | None, *, quiet: bool) -> None:
    """What could not be analysed; and of a file what it holds, unless that is not wanted."""
    if file is None and form in _READ:
        return
    for error in report.errors[:_MOST]:
        output.tell(error)
    if len(report.errors) > _MOST:
        output.tell(f"and {len(report.errors) - _MOST} more that could not be analysed: the report has them")
    if file is not None and not quiet:
        from forkproof.report.text import summary

        output.tell(f"{file}: {summary(report)}")
