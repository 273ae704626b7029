"""What a report is worth to a script: the exit code, and the option that sets it.

Owns: `--fail-on`. Takes: a Report. Gives: an exit code of `forkproof.errors`.
Must never: count what is refuted, suppressed, or in the baseline.
"""

from __future__ import annotations

from typing import Final

import click

from forkproof.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_INPUT
from forkproof.model import Report, Severity

NEVER: Final = "never"

FAIL_ON: Final = click.option(
    "--fail-on",
    type=click.Choice([*(severity.value for severity in Severity), NEVER]),
    default=Severity.HIGH.value,
    show_default=True,
    help="The mildest severity that makes the exit code 1.",
)


def limit(fail_on: str) -> Severity | None:
    """The mildest severity that fails; None if nothing does."""
    return None if fail_on == NEVER else Severity(fail_on)


def exit_code(report: Report, fail_on: str) -> int:
    """Findings win over what could not be analysed: both fail a gate."""
    mildest = limit(fail_on)
    if mildest is not None and any(f.is_open and f.severity.rank <= mildest.rank for f in report.findings):
        return EXIT_FINDINGS
    incomplete = (
        bool(report.errors)
        or any(target.missing for target in report.targets)
        or any(diagnostic.level == "error" for diagnostic in report.diagnostics)
    )
    return EXIT_INPUT if incomplete else EXIT_CLEAN
