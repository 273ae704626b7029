"""`forkproof scan`: analyse programs and report what was found.

Owns: the command's options, the choice of rendering, and the exit code.
Takes: targets, or one saved report to explain a finding of. Gives: text or JSON, and an exit code.
Must never: analyse; that is `forkproof.pipeline`, which is imported when a scan begins.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from forkproof import rules
from forkproof.cli import output
from forkproof.cli.progress import progress
from forkproof.cli.rules import unknown
from forkproof.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_INPUT, InputError
from forkproof.model import Report, Severity, Verdict
from forkproof.options import ScanOptions
from forkproof.report import json, text
from forkproof.report.explain import explanation, page_lines
from forkproof.report.layout import WIDTH, Line, painted

if TYPE_CHECKING:
    from forkproof.rules import Rule

NEVER: Final = "never"
_ID: Final = re.compile(r"[a-z-]+-[0-9a-f]{10}")


@click.command("scan")
@click.argument("targets", nargs=-1, metavar="TARGET...")
@click.option(
    "--sysroot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="The directory that is / for the targets: an unpacked image, packages of another machine.",
)
@click.option("--library-path", multiple=True, metavar="DIR", help="A directory of LD_LIBRARY_PATH; repeatable.")
@click.option("--preload", multiple=True, metavar="LIB", help="A library of LD_PRELOAD; repeatable.")
@click.option("--also", multiple=True, metavar="LIB", help="A library that the program dlopens; repeatable.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Text for people, or canonical JSON.",
)
@click.option(
    "--output",
    "-o",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write there instead: the complete report, or nothing.",
)
@click.option(
    "--fail-on",
    type=click.Choice([*(severity.value for severity in Severity), NEVER]),
    default=Severity.HIGH.value,
    show_default=True,
    help="The mildest severity that makes the exit code 1.",
)
@click.option("--explain", metavar="ID|RULE", help="All the evidence of one finding, or the page of a rule.")
@click.option("--verbose", "-v", is_flag=True, help="Shorten nothing.")
@click.option("--no-color", is_flag=True, help="No colours, even on a terminal.")
@click.pass_context
def scan_command(context: click.Context, /, **asked: Any) -> None:  # noqa: ANN401 - a field of Request each
    """Find the locks that a child of fork can hang on, in each TARGET and its libraries; nothing is run.

    A TARGET is an ELF program or library. With --explain ID it can also be a report that --format json has saved.

    \b
    Examples:
      forkproof scan /usr/sbin/named
      forkproof scan /usr/bin/qemu-system-x86_64 --preload libtcmalloc.so.4
      forkproof scan --sysroot /srv/arm64 /usr/sbin/slapd --format json -o report.json
      forkproof scan report.json --explain inherited-lock-1fa34cc5a1
      forkproof scan --explain atfork-unbound

    \b
    Exit codes:
      0  nothing at or above --fail-on, and everything was analysed
      1  findings at or above --fail-on (whatever else happened; refuted ones do not count)
      2  the command line asks for something impossible
      3  something could not be analysed, or the result not be written; the rest was
      4  internal error: a bug in forkproof
    """
    request = Request(**asked)
    rule = rules.find(request.explain) if request.explain is not None else None
    request.check(rule)
    if rule is not None:
        request.deliver(painted(page_lines(rule.page, request.width), color=request.color))
        return
    report = request.report()
    request.deliver(request.rendered(report))
    context.exit(exit_code(report, request.fail_on))


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; a field for each option."""

    targets: tuple[str, ...]
    sysroot: Path | None
    library_path: tuple[str, ...]
    preload: tuple[str, ...]
    also: tuple[str, ...]
    form: str
    file: Path | None
    fail_on: str
    explain: str | None
    verbose: bool
    no_color: bool

    @property
    def color(self) -> bool:
        """Colours are for a terminal."""
        return self.file is None and output.wants_color(self.no_color)

    @property
    def width(self) -> int:
        """A file is as wide as can be."""
        return WIDTH if self.file is not None else output.width()

    def check(self, rule: Rule | None) -> None:
        """Refuse, before anything takes long, what cannot be meant or cannot work."""
        if self.explain is not None and self.form == "json":
            raise click.UsageError("--explain is text; the JSON report holds all of the evidence anyway.")
        if self.explain is not None and rule is None and not _ID.fullmatch(self.explain):
            raise unknown(self.explain)
        if not self.targets and rule is None:
            raise click.UsageError("Missing argument 'TARGET...'.")
        if self.file is not None:
            output.check(self.file)

    def report(self) -> Report:
        """Of a scan, or a saved one where one finding of it is to be explained."""
        if self.explain is not None and len(self.targets) == 1:
            saved = saved_report(Path(self.targets[0]))
            if saved is not None:
                return saved
        from forkproof import pipeline

        options = ScanOptions(self.sysroot, self.library_path, self.preload, self.also)
        with progress() as watched:
            return pipeline.scan(tuple(dict.fromkeys(self.targets)), options, watched)

    def rendered(self, report: Report) -> str:
        """The text that was asked for."""
        if self.explain is not None:
            lines = explained(report, self.explain, self.width)
            return painted(lines, color=self.color)
        if self.form == "json":
            return json.render(report)
        return text.render(report, verbose=self.verbose, width=self.width, color=self.color)

    def deliver(self, result: str) -> None:
        """To the file, or to standard output."""
        if self.file is None:
            output.emit(result)
        else:
            output.write(self.file, result)


def exit_code(report: Report, fail_on: str) -> int:
    """What the report is worth to a script. Findings win over what could not be analysed: both fail a gate."""
    if fail_on != NEVER:
        limit = Severity(fail_on).rank
        if any(f.severity.rank <= limit and f.verdict is not Verdict.REFUTED for f in report.findings):
            return EXIT_FINDINGS
    incomplete = (
        bool(report.errors)
        or any(target.missing for target in report.targets)
        or any(diagnostic.level == "error" for diagnostic in report.diagnostics)
    )
    return EXIT_INPUT if incomplete else EXIT_CLEAN


def saved_report(path: Path) -> Report | None:
    """The report in this file, or None for what does not begin as one and is therefore to be scanned."""
    try:
        with path.open("rb") as stream:
            if not stream.read(64).lstrip().startswith(b"{"):
                return None
        return json.parse(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    except json.BadReport as error:
        raise InputError(path, error.problem, next_step=error.next_step) from error


def explained(report: Report, wanted: str, width: int) -> Iterator[Line]:
    """Every finding of this id: there are several if two targets have one name."""
    found = [finding for finding in json.in_order(report.findings) if finding.id == wanted]
    if not found:
        known = [finding.id for finding in report.findings]
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0)
        hint = f"Findings that there are: {', '.join(near)}." if near else "There are no findings at all."
        raise click.UsageError(f"There is no finding {wanted!r} in this report. {hint}")
    for finding in found:
        last = finding is found[-1]
        yield from explanation(report, finding, rules.find(finding.rule) if last else None, width)
