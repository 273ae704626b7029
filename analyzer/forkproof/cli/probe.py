"""`forkproof probe`: scan a program, run it, and confirm or refute each finding.

Owns: the command's options, and what it prints. Takes: a command line. Gives: a report with records of probes.
Must never: steer anything; that is `forkproof.probe`, which is imported when the command is checked.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from forkproof.cache import directory
from forkproof.cli import aside, output, running
from forkproof.cli.gate import FAIL_ON, exit_code, limit
from forkproof.cli.progress import QUIETLY, progress
from forkproof.model import Report
from forkproof.options import ScanOptions
from forkproof.report import formats, proof
from forkproof.report.layout import WIDTH


@click.command("probe", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@running.options
@click.option("--finding", metavar="ID", help="Probe only this finding.")
@click.option("--rule", metavar="RULE", help="Probe only findings of this rule.")
@click.option("--lock", metavar="NAME", help="Steer only acquires of this lock, where the code tells which they are.")
@click.option(
    "--sysroot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="With --write-plan: the directory that is / where CMD will run.",
)
@click.option("--write-plan", type=click.Path(path_type=Path), metavar="FILE", help="Scan only, for --plan elsewhere.")
@click.option(
    "--plan",
    "planned",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Probe what was scanned elsewhere.",
)
@click.option("--no-cache", is_flag=True, help="Neither use nor keep what a scan found: see `forkproof cache`.")
@click.option("--covered", is_flag=True, help="Probe allocators, too, that the scan calls protected.")
@output.format_option(formats.NAMES, explained=formats.HELP)
@click.option("--output", "-o", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead.")
@FAIL_ON
@click.option("--verbose", "-v", is_flag=True, help="Shorten nothing.")
@output.NO_COLOR
@QUIETLY
@click.pass_context
def probe_command(
    context: click.Context,
    /,
    **asked: Any,  # noqa: ANN401 - a field of Request each
) -> None:
    """Run CMD under ptrace and force what each finding claims: a fork while another thread holds the lock.

    The program runs several times: once unsteered, to see which locks it takes and where it forks; then, for each
    finding, with a thread held inside the critical section across the fork; then once more with the same thread
    stopped just before it. CMD runs as you, with all its effects.

    \b
    Examples:
      forkproof probe -- /usr/sbin/mydaemon --config test.conf
      forkproof probe --preload libtcmalloc.so.4 -- /usr/bin/qemu-system-x86_64 -machine none -daemonize
      forkproof probe --covered -- ./server        (is the protection that the scan sees real?)

    \b
    Verdicts:
      confirmed     the child was seen waiting for the lock whose owner it lacks, and did not hang in the control run
      refuted       the forking thread has the lock itself at the fork: protected
      inconclusive  neither; says what was reached instead

    A confirmed finding is high, whatever the scan ranked it: it makes the exit code 1 unless --fail-on never.

    \b
    Exit codes:
      0  nothing was confirmed, and no finding that was not refuted is at or above --fail-on
      1  confirmed, or findings at or above --fail-on that the probe did not refute
      2  the command line asks for something impossible
      3  something could not be analysed, or the program not be run or traced
      4  internal error: a bug in forkproof
      130, 143, 129  interrupted by Ctrl-C, SIGTERM, SIGHUP: nothing is written, and nothing of CMD is left
    """
    request = Request(**asked)
    request.check()
    report = request.report()
    if report is not None:
        output.deliver(request.rendered(report), request.file)
        aside.tell(report, request.form, request.file, quiet=request.quiet)
        context.exit(exit_code(report, request.fail_on))


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; a field for each option."""

    command: tuple[str, ...]
    preload: tuple[str, ...]
    library_path: tuple[str, ...]
    env: tuple[str, ...]
    stdin: str
    timeout: float
    finding: str | None
    rule: str | None
    lock: str | None
    sysroot: Path | None
    write_plan: Path | None
    planned: Path | None
    no_cache: bool
    covered: bool
    form: str
    file: Path | None
    fail_on: str
    verbose: bool
    no_color: bool
    quiet: bool

    def check(self) -> None:
        """Refuse what cannot be meant."""
        if self.sysroot is not None and self.write_plan is None:
            raise click.UsageError(
                "--sysroot is for --write-plan FILE, which scans and runs nothing: a probe runs CMD on this machine."
            )
        if self.write_plan is not None and self.planned is not None:
            raise click.UsageError("--write-plan makes the file that --plan reads: give one of them.")
        if self.rule is not None:
            from forkproof import rules
            from forkproof.cli.rules import unknown

            if rules.find(self.rule) is None:
                raise unknown(self.rule)
        for file in (self.file, self.write_plan):
            if file is not None:
                output.check(file)

    @property
    def options(self) -> ScanOptions:
        """Of the scan."""
        cache = None if self.no_cache else directory()
        jobs = len(os.sched_getaffinity(0))
        return ScanOptions(self.sysroot, self.library_path, self.preload, jobs=jobs, cache=cache)

    def report(self) -> Report | None:
        """Scan and probe; None where only a plan was asked for."""
        if self.write_plan is not None:
            from forkproof.probe.prepare import plan_text

            with progress(quiet=self.quiet, no_color=self.no_color) as watched:
                text = plan_text(self.command[0], self.options, watched)
            output.write(self.write_plan, text)
            return None
        from forkproof.probe import planfile
        from forkproof.probe.prepare import prepared
        from forkproof.probe.prove import Prover, Wanted

        what = running.command(
            self.command, preload=self.preload, library_path=self.library_path, env=self.env, stdin=self.stdin
        )
        with progress(quiet=self.quiet, no_color=self.no_color) as watched:
            if self.planned is not None:
                report, plan = planfile.load(self.planned.read_text(encoding="utf-8"), str(self.planned))
            else:
                report, plan = prepared(what.arguments[0], self.options, watched)
            if not self.covered:  # those are findings that only the probe makes
                self.check_finding(report)
            self.check_lock({lock.name for lock in plan.locks}, report)
            wanted = Wanted(what, self.timeout, self.finding, self.rule, self.lock, self.covered)
            findings = Prover(wanted, watched).prove(plan, list(report.findings))
        report = replace(report, findings=tuple(findings))
        self.check_finding(report)
        return report

    def check_finding(self, report: Report) -> None:
        """A finding that was asked for has to be there."""
        if self.finding is not None and all(f.id != self.finding for f in report.findings):
            known = ", ".join(sorted({f.id for f in report.findings})[:6]) or "none at all"
            raise click.UsageError(f"The scan has no finding {self.finding!r}. Findings that there are: {known}.")

    def check_lock(self, known: set[str], report: Report) -> None:
        """A lock that was asked for has to be one that the scan knows, or every lock would be steered."""
        named = known | {finding.lock.name for finding in report.findings if finding.lock is not None}
        if self.lock is not None and self.lock not in named:
            near = difflib.get_close_matches(self.lock, sorted(named), n=3) or sorted(named)[:3]
            raise click.UsageError(f"The scan knows no lock {self.lock!r}. Locks that there are: {', '.join(near)}.")

    def rendered(self, report: Report) -> str:
        """The text that was asked for."""
        width = WIDTH if self.file is not None else output.width()
        color = self.file is None and output.wants_color(self.no_color)
        if self.form == "text":
            return proof.render(report, verbose=self.verbose, width=width, color=color)
        return formats.render(report, self.form, formats.Look(self.verbose, width, color, limit(self.fail_on)))
