"""What a report is worth to a script: the policy's options, and the exit code.

Owns: `--fail-on`, `--config`, `--no-config`, `--baseline`. Takes: a Report. Gives: a Report with the policy's marks,
and an exit code of `forkproof.errors`.
Must never: count what is refuted, suppressed, or in the baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from forkproof.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_INPUT
from forkproof.model import Report, Severity

if TYPE_CHECKING:
    from forkproof.policy import Policy

NEVER: Final = "never"
_FILE: Final = "forkproof.toml"

FAIL_ON: Final = click.option(
    "--fail-on",
    type=click.Choice([*(severity.value for severity in Severity), NEVER]),
    default=Severity.HIGH.value,
    show_default=True,
    help="The mildest severity that makes the exit code 1.",
)
"""For a command that has no policy."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


_FAIL_ON: Final = click.option(
    "--fail-on",
    type=click.Choice([*(severity.value for severity in Severity), NEVER]),
    help="The mildest severity that makes the exit code 1 (default: high).",
)
_BASELINE: Final = click.option(
    "--baseline",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A saved JSON report: only what is new, or worse, since then counts.",
)


def _config(meaning: str) -> Callable[[_Command], _Command]:
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option("--config", type=kind, metavar="FILE", help=meaning)


def options(command: _Command) -> _Command:
    """The options, for a command that gives a `Gate` their values."""
    no_config = click.option("--no-config", is_flag=True, help=f"Do not read {_FILE} of the working directory.")
    config = _config(f"Policy and defaults; without it, {_FILE} if there is one.")
    return _FAIL_ON(config(no_config(_BASELINE(command))))


def saved_options(command: _Command) -> _Command:
    """The options for a command that shows what a scan has judged already."""
    no_config = click.option("--no-config", is_flag=True, hidden=True, expose_value=False)
    return _FAIL_ON(
        _config(f"Policy to apply now, such as {_FILE}; none is read without it.")(no_config(_BASELINE(command)))
    )


@dataclass(frozen=True)
class Gate:
    """The options' values."""

    given: str | None
    """--fail-on."""
    config: Path | None
    no_config: bool
    baseline: Path | None
    looks_around: bool = True
    """Whether a file in the working directory counts without being named."""

    @cached_property
    def policy(self) -> Policy:
        """The file's, or that of no file."""
        from forkproof.policy import Policy, load

        path = self.config or (Path(_FILE) if self.looks_around and Path(_FILE).is_file() else None)
        return Policy() if path is None or self.no_config else load(path)

    @cached_property
    def fail_on(self) -> str:
        """What was asked for, else the file's, else high."""
        return self.given or self.policy.fail_on or Severity.HIGH.value

    @property
    def limit(self) -> Severity | None:
        """The mildest severity that fails; None if nothing does."""
        return limit(self.fail_on)

    def check(self) -> None:
        """Read all files of the policy now: an error in one must not come after a long scan."""
        _ = self.fail_on, self._old

    @cached_property
    def _old(self) -> Report | None:
        from forkproof.cli.saved import read

        return None if self.baseline is None else read(self.baseline)

    def marked(self, report: Report) -> Report:
        """The report with suppressions, severities and what is new."""
        if self.policy.path:
            from forkproof.policy.apply import apply, today

            report = apply(report, self.policy, today())
        if self._old is not None:
            from forkproof.policy import against

            report = against(self._old, report)
        return report

    def exit_code(self, report: Report) -> int:
        """For a marked report."""
        return exit_code(report, self.fail_on)


def limit(fail_on: str) -> Severity | None:
    """The mildest severity that fails; None if nothing does."""
    return None if fail_on == NEVER else Severity(fail_on)


def exit_code(report: Report, fail_on: str) -> int:
    """Findings win over what could not be analysed: both fail a gate."""
    mildest = limit(fail_on)
    if mildest is not None and any(f.is_open and f.severity.rank <= mildest.rank for f in report.findings):
        return EXIT_FINDINGS
    incomplete = is_incomplete(report)
    return EXIT_INPUT if incomplete else EXIT_CLEAN


def is_incomplete(report: Report) -> bool:
    """Something was not analysed: a target, a library, a preload."""
    from forkproof.report.text import is_partial

    return is_partial(report) or any(target.missing for target in report.targets)
