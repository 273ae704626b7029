"""Reports that were saved as JSON: recognising, reading, and finding one finding.

Owns: the errors that name the file. Takes: paths and ids. Gives: Reports and Findings.
Must never: take something else for a report, or guess which finding was meant.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import click

from forkproof.errors import InputError
from forkproof.model import Finding, Report
from forkproof.report import json


def read(path: Path) -> Report:
    """The report in this file."""
    try:
        return json.parse(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        next_step = "Name a file that was made with: forkproof scan TARGET --format json --output FILE"
        raise InputError(path, f"cannot be read: {error.strerror or error}", next_step=next_step) from error
    except json.BadReport as error:
        raise InputError(path, error.problem, next_step=error.next_step) from error


def read_if_report(path: Path) -> Report | None:
    """None for what does not begin as a report, and is therefore to be scanned."""
    try:
        with path.open("rb") as stream:
            if not stream.read(64).lstrip().startswith(b"{"):
                return None
    except OSError:
        return None
    return read(path)


def known_findings(report: Report, wanted: str) -> list[Finding]:
    """Every finding of this id: there are several if two targets have one name."""
    found = [finding for finding in json.in_order(report.findings) if finding.id == wanted]
    if not found:
        known = [finding.id for finding in report.findings]
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0)
        hint = f"Findings that there are: {', '.join(near)}." if near else "There are no findings at all."
        raise click.UsageError(f"There is no finding {wanted!r} in this report. {hint}")
    return found
