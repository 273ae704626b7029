"""`forkproof scan`: analyse programs and report what was found.

Owns: the command's options, the choice of rendering, and the exit code.
Takes: targets, or one saved report to explain a finding of. Gives: a report in some format, and an exit code.
Must never: analyse; that is `forkproof.pipeline`, which is imported when a scan begins.
"""

from __future__ import annotations

import gc
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from forkproof import rules
from forkproof.cli import aside, gate, output, running, world
from forkproof.cli.group import ends_process
from forkproof.cli.progress import QUIETLY, progress
from forkproof.cli.rules import unknown
from forkproof.cli.saved import known_findings, read_if_report
from forkproof.model import Report
from forkproof.options import Progress, ScanOptions
from forkproof.report import formats
from forkproof.report.explain import explanation, page_lines
from forkproof.report.layout import WIDTH, Line, painted

if TYPE_CHECKING:
    from forkproof.rules import Rule

_ID: Final = re.compile(r"[a-z-]+-[0-9a-f]{10}")


@click.command("scan")
@click.argument("targets", nargs=-1, metavar="TARGET...")
@world.options
@output.format_option(formats.NAMES, explained=formats.HELP)
@click.option(
    "--output",
    "-o",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write there instead: the complete report, or nothing.",
)
@click.option("--probe", metavar="CMD", help="Run this command line under ptrace and confirm or refute the findings.")
@gate.options
@click.option("--explain", metavar="ID|RULE", help="All the evidence of one finding, or the page of a rule.")
@click.option("--verbose", "-v", is_flag=True, help="Shorten nothing.")
@output.NO_COLOR
@QUIETLY
@click.pass_context
def scan_command(context: click.Context, /, **asked: Any) -> None:  # noqa: ANN401 - a field of Request each
    """Find the locks that a child of fork can hang on, in each TARGET and its libraries.

    Nothing is run, unless --probe gives a command line.

    A TARGET is an ELF program or library, a directory, a .deb, a .rpm, a tar archive, or a container image (OCI layout,
    docker-save archive). Several packages make one world: libraries are looked for among them, then in --sysroot.

    With --explain ID a TARGET can also be a report that --format json has saved.

    \b
    Examples:
      forkproof scan /usr/sbin/named
      forkproof scan /usr/bin/qemu-system-x86_64 --preload libtcmalloc.so.4
      forkproof scan ./qemu.deb ./gperftools.deb --sysroot /srv/bookworm-arm64
      forkproof scan image.tar --only '/usr/sbin/*'
      forkproof scan --sysroot /srv/arm64 /usr/sbin/slapd --format json -o report.json
      forkproof scan report.json --explain inherited-lock-1fa34cc5a1
      forkproof scan ./daemon --probe "./daemon --foreground" --format json
      forkproof scan --explain atfork-unbound

    \b
    Exit codes:
      0  nothing at or above --fail-on, and everything was analysed
      1  findings at or above --fail-on (whatever else happened; refuted ones do not count)
      2  the command line asks for something impossible
      3  something could not be analysed, or the result not be written; the rest was
      4  internal error: a bug in forkproof
      130, 143, 129  interrupted by Ctrl-C, SIGTERM, SIGHUP: nothing is written
    """
    scanned = world.World.taken(asked)
    judged = gate.Gate(*(asked.pop(name) for name in ("fail_on", "config", "no_config", "baseline")))
    request = Request(world=scanned, gate=judged, **asked)
    rule = rules.find(request.explain) if request.explain is not None else None
    request.check(rule)
    if rule is not None:
        request.deliver(painted(page_lines(rule.page, request.width), color=request.color))
        return
    report = request.report(is_last=ends_process(context))
    request.deliver(request.rendered(report))
    aside.tell(report, request.form, request.file, quiet=request.quiet)
    gc.freeze()  # the process ends: nothing is worth a search for cycles, which takes 0.04 s
    context.exit(judged.exit_code(report))


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; a field for each option."""

    targets: tuple[str, ...]
    world: world.World
    gate: gate.Gate
    form: str
    file: Path | None
    probe: str | None
    explain: str | None
    verbose: bool
    no_color: bool
    quiet: bool

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
        if self.explain is not None and self.form != "text":
            raise click.UsageError("--explain is text; the JSON report holds all of the evidence anyway.")
        if self.explain is not None and rule is None and not _ID.fullmatch(self.explain):
            raise unknown(self.explain)
        if not self.targets and rule is None:
            raise click.UsageError("Missing argument 'TARGET...'.")
        if self.probe is not None and (len(self.targets) != 1 or self.world.sysroot is not None):
            raise click.UsageError("--probe runs one TARGET, on this machine: give one, and no --sysroot.")
        if self.file is not None:
            output.check(self.file)
        self.gate.check()

    def report(self, *, is_last: bool) -> Report:
        """Of a scan, or a saved one where one finding of it is to be explained; `is_last`: the process ends then."""
        if self.explain is not None and len(self.targets) == 1:
            saved = read_if_report(Path(self.targets[0]))
            if saved is not None:
                return saved
        from forkproof import pipeline

        options = self.world.asked(self.gate.policy)
        with progress(quiet=self.quiet, no_color=self.no_color) as watched:
            targets = tuple(dict.fromkeys(self.targets))
            if self.probe is None:
                found = pipeline.scan(targets, options, watched, is_last=is_last)
            else:
                found = probed(targets[0], self.probe, options, watched)
        return self.gate.marked(found)

    def rendered(self, report: Report) -> str:
        """The text that was asked for."""
        if self.explain is not None:
            lines = explained(report, self.explain, self.width)
            return painted(lines, color=self.color)
        look = formats.Look(self.verbose, self.width, self.color, self.gate.limit)
        return formats.render(report, self.form, look)

    def deliver(self, result: str) -> None:
        """To the file, or to standard output."""
        output.deliver(result, self.file)


def probed(target: str, command_line: str, options: ScanOptions, watched: Progress) -> Report:
    """The report of a scan, with what running this command line proved."""
    from forkproof.probe.prepare import prepared
    from forkproof.probe.prove import Prover, Wanted

    command = running.command(shlex.split(command_line), preload=options.preload, library_path=options.library_path)
    report, plan = prepared(target, options, watched)
    findings = Prover(Wanted(command), watched).prove(plan, list(report.findings))
    return replace(report, findings=tuple(findings))


def explained(report: Report, wanted: str, width: int) -> Iterator[Line]:
    """Every finding of this id: there are several if two targets have one name."""
    found = known_findings(report, wanted)
    for finding in found:
        last = finding is found[-1]
        yield from explanation(report, finding, rules.find(finding.rule) if last else None, width)
