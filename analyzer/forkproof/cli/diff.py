"""`forkproof diff`: did this upgrade make it worse?

Owns: the command. Takes: two saved reports, or two targets to scan. Gives: what came, what went, what stayed; exit
code 1 if something came that `--fail-on` counts.
Must never: compare findings; `forkproof.policy.compare` does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from forkproof.cli import gate, output, world
from forkproof.cli.progress import QUIETLY, progress
from forkproof.cli.saved import read_if_report
from forkproof.model import Report
from forkproof.options import Progress
from forkproof.report.layout import WIDTH


@click.command("diff")
@click.argument("old")
@click.argument("new")
@click.option("--with", "beside", multiple=True, metavar="ARTIFACT", help="Scan both beside this one; repeatable.")
@world.options
@output.format_option(("text", "markdown", "json"))
@click.option("--output", "-o", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead.")
@gate.options
@output.NO_COLOR
@QUIETLY
@click.pass_context
def diff_command(
    context: click.Context,
    /,
    old: str,
    new: str,
    beside: tuple[str, ...],
    form: str,
    file: Path | None,
    no_color: bool,
    quiet: bool,
    **asked: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Compare OLD and NEW: saved reports, programs, packages, images or directories.

    A finding is the same in both if a rebuild would not tell them apart; one that has become more severe is introduced.
    Of a program that one side does not tell everything of, nothing is called introduced, or fixed, on its word.

    \b
    Examples:
      forkproof diff old.json new.json
      forkproof diff gperftools_2.10.deb gperftools_2.15.deb --with qemu.deb --preload libtcmalloc.so.4 --sysroot /srv/r
      forkproof diff image-old.tar image-new.tar --format markdown

    \b
    Exit codes: 0 nothing introduced at or above --fail-on; 1 something; 3 something could not be analysed, or compared.
    """
    scanned = world.World.taken(asked)
    judged = gate.Gate(*(asked.pop(name) for name in ("fail_on", "config", "no_config", "baseline")))
    if file is not None:
        output.check(file)
    judged.check()
    with progress(quiet=quiet, no_color=no_color) as watched:
        before, after = (_report(name, beside, scanned, judged, watched) for name in (old, new))

    from forkproof.policy import compare
    from forkproof.report import comparison

    found = compare(before, after)
    width = WIDTH if file is not None else output.width()
    color = file is None and output.wants_color(no_color)
    output.deliver(comparison.render(found, form, width, color=color), file)
    unsure = (*found.errors, *(gap.reason for gap in found.gaps))
    context.exit(judged.exit_code(replace(after, findings=found.introduced, errors=unsure)))


def _report(name: str, beside: tuple[str, ...], scanned: world.World, judged: gate.Gate, watched: Progress) -> Report:
    """Saved, or scanned now."""
    saved = read_if_report(Path(name))
    if saved is not None:
        return judged.marked(saved)
    from forkproof import pipeline

    return judged.marked(pipeline.scan((name, *beside), scanned.asked(judged.policy), watched))
