"""`forkproof report`: a saved report in another format.

Owns: the command. Takes: a file that `--format json` has saved. Gives: text, and the exit code of a scan.
Must never: analyse.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from forkproof.cli import gate, output
from forkproof.cli.saved import known_findings, read
from forkproof.report import formats
from forkproof.report.layout import WIDTH


@click.command("report")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.json")
@output.format_option(formats.NAMES, explained=formats.HELP, into="target")
@click.option("--finding", metavar="ID", help="This finding only.")
@click.option("--output", "-o", "target", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead.")
@gate.saved_options
@click.option("--verbose", "-v", is_flag=True, help="Shorten nothing.")
@output.NO_COLOR
@click.pass_context
def report_command(
    context: click.Context,
    /,
    file: Path,
    form: str,
    finding: str | None,
    target: Path | None,
    fail_on: str | None,
    config: Path | None,
    baseline: Path | None,
    verbose: bool,
    no_color: bool,
) -> None:
    """Show a report that `forkproof scan --format json` has saved in another format.

    Its suppressions, severities and what was left out are those of the scan. forkproof.toml of the working directory is
    not read again: --config forkproof.toml applies one, its fail-on included, --baseline another baseline.

    The exit code is that of a scan: 0, or 1 if something counts (--fail-on, default high), or 3 if something was not
    analysed.

    \b
    Examples:
      forkproof report report.json
      forkproof report report.json --format html -o report.html
      forkproof report report.json --format svg --finding inherited-lock-c18eae6e61 -o hang.svg
    """
    if target is not None:
        output.check(target)
    judged = gate.Gate(fail_on, config, False, baseline, looks_around=False)
    judged.check()
    report = judged.marked(read(file))
    if finding is not None:
        report = replace(report, findings=tuple(known_findings(report, finding)))
    look = formats.Look(
        verbose=verbose,
        width=WIDTH if target is not None else output.width(),
        color=target is None and output.wants_color(no_color),
        fail_on=judged.limit,
    )
    output.deliver(formats.render(report, form, look), target)
    context.exit(judged.exit_code(report))
