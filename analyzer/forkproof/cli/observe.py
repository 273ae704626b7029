"""`forkproof observe`: run a program and show its forks, beside which threads, and what the children did.

Owns: the command's options. Takes: a command line. Gives: text or JSON.
Must never: judge, or hold anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forkproof.cache import directory
from forkproof.cli import output, running
from forkproof.options import ScanOptions
from forkproof.report.layout import WIDTH

if TYPE_CHECKING:
    from forkproof.probe.plan import Plan


@click.command("observe", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@running.options
@click.option("--follow", is_flag=True, help="Go on in programs that its children exec.")
@click.option("--locks", is_flag=True, help="Scan it first, and say which allocator locks are taken at each fork.")
@click.option("--no-cache", is_flag=True, help="With --locks: neither use nor keep what a scan found.")
@output.format_option(("text", "json"))
@click.option("--output", "-o", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead.")
@click.option("--verbose", "-v", is_flag=True, help="Shorten nothing.")
@output.NO_COLOR
def observe_command(
    command: tuple[str, ...],
    preload: tuple[str, ...],
    library_path: tuple[str, ...],
    env: tuple[str, ...],
    stdin: str,
    timeout: float,
    follow: bool,
    locks: bool,
    no_cache: bool,
    form: str,
    file: Path | None,
    verbose: bool,
    no_color: bool,
) -> None:
    """Run CMD under ptrace and count: processes, forks with the stacks of all threads, execs, endless waits.

    Nothing is steered. The run is over when all of it has ended or come to rest, or after --timeout; what is still
    there then is killed.

    \b
    Examples:
      forkproof observe -- ./server --daemonize
      forkproof observe --follow -- /bin/bash -c "ls | wc"
      forkproof observe --locks --format json -- ./server
    """
    from forkproof.probe.observe import Observer
    from forkproof.probe.stage import Stage
    from forkproof.report import observation

    what = running.command(command, preload=preload, library_path=library_path, env=env, stdin=stdin)
    if file is not None:
        output.check(file)
    plan = _plan(what.arguments[0], library_path, preload, None if no_cache else directory()) if locks else None
    sites = tuple(site for name in plan.active for site in plan.sites[name]) if plan is not None else ()
    known = plan.known if plan is not None else {}
    census = running.census_of(what, sites, known, timeout) if sites else None
    with Stage(what, (), None, known) as stage:
        seen = Observer(stage, census, follow=follow).run(timeout)
    if form == "json":
        text = observation.render_json(seen)
    else:
        width = WIDTH if file is not None else output.width()
        color = file is None and output.wants_color(no_color)
        text = observation.render(seen, width=width, color=color, verbose=verbose)
    output.deliver(text, file)


def _plan(program: str, library_path: tuple[str, ...], preload: tuple[str, ...], cache: Path | None) -> Plan:
    """Where its locks are taken."""
    from forkproof.probe.prepare import prepared

    return prepared(program, ScanOptions(library_path=library_path, preload=preload, cache=cache))[1]
