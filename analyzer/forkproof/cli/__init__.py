"""The command `forkproof`: a group whose commands are imported when they are called, one file each.

Owns: the list of commands, the options of the group. Takes: argv. Gives: an exit code (see `forkproof.errors`).
Must never: import lief, numpy or rich by itself, directly or through a module: `--help` is to be instant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

import click

import forkproof
from forkproof.cli.group import Entry, LazyGroup

# numpy comes with a library for linear algebra, of which nothing is used here: without this it starts a thread for
# each processor, which costs 0.02 s and memory.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Commands(LazyGroup):
    """What there is; the words beside each are here, so that showing them imports nothing."""

    entries: ClassVar[Mapping[str, Entry]] = {
        "scan": Entry("forkproof.cli.scan:scan_command", "Find the locks that a child of fork can hang on."),
        "probe": Entry(
            "forkproof.cli.probe:probe_command", "Run a program and show the hang, or that it is protected."
        ),
        "observe": Entry("forkproof.cli.observe:observe_command", "Run a program and show its forks and threads."),
        "mitigate": Entry(
            "forkproof.cli.mitigate:mitigate_command", "Build a library that registers what an allocator does not."
        ),
        "report": Entry("forkproof.cli.report:report_command", "Show a saved report in another format."),
        "diff": Entry("forkproof.cli.diff:diff_command", "Compare two reports, programs, packages or images."),
        "matrix": Entry(
            "forkproof.cli.matrix:matrix_command", "Try programs with allocators, in systems: what would hang."
        ),
        "closure": Entry("forkproof.cli.closure:closure_command", "Show what ld.so would load, and bind to what."),
        "graph": Entry("forkproof.cli.graph:graph_command", "Show the call graph of a program and its libraries."),
        "cache": Entry("forkproof.cli.cache:cache_command", "Show or empty the cache of results."),
        "rules": Entry("forkproof.cli.rules:rules_command", "List the rules, or show what one of them means."),
    }
    meant: ClassVar[Mapping[str, Sequence[str]]] = {
        "explain": ("rules RULE", "scan TARGET --explain ID"),
        "rule": ("rules",),
        "check": ("scan",),
        "analyze": ("scan",),
        "analyse": ("scan",),
    }


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"forkproof {forkproof.__version__}")
        context.exit()


@click.group(
    cls=Commands,
    epilog="Exit codes: 0 nothing that counts, 1 findings, 2 usage, 3 something could not be analysed, 4 a bug in "
    "forkproof; 130, 143, 129 after Ctrl-C, SIGTERM, SIGHUP. `forkproof COMMAND --help` says what counts.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--version", is_flag=True, callback=_version, expose_value=False, is_eager=True, help="Show the version.")
@click.option(
    "--traceback",
    is_flag=True,
    envvar="FORKPROOF_TRACEBACK",
    expose_value=False,
    callback=lambda context, _, wanted: context.meta.__setitem__("forkproof.traceback", wanted),
    help="After an internal error, show Python's traceback (or set FORKPROOF_TRACEBACK=1).",
)
def main() -> None:
    """Can a child made by fork() hang on a lock that nobody will ever release?

    forkproof reads a program and the libraries that ld.so would load with it, without running anything, and finds
    such locks: the allocator's first. It explains each with two stacks: who can hold the lock when the fork comes,
    and how the child comes to want it.

    \b
    Examples:
      forkproof scan /usr/sbin/named
      forkproof scan --sysroot /srv/bookworm-arm64 /usr/bin/qemu-system-aarch64
      forkproof scan --format json --output report.json /usr/sbin
      forkproof rules inherited-lock
    """
