#!/usr/bin/env python3
"""Write the manual page and the shells' completions from the command itself: `make manual`, or
`python tools/manual.py DIRECTORY`.

    forkproof.1                                     the manual page, a section for each command
    completion/forkproof.bash, _forkproof, .fish    what click completes with

Packagers run it at build time; nothing generated is in the repository, so nothing can be out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from forkproof import __version__
from forkproof.cli import main

VARIABLES = {
    "NO_COLOR": "No colours, unless it is empty.",
    "TERM": "dumb: no colours, and lines in place of a progress bar.",
    "XDG_CACHE_HOME": "Where the cache is; without it, ~/.cache.",
    "SOURCE_DATE_EPOCH": "The day on which suppressions expire or do not, in seconds since 1970.",
    "FORKPROOF_TRACEBACK": "1: after an internal error, show Python's traceback.",
}
FILES = {
    "forkproof.toml": "Policy and defaults, read from the working directory.",
    "$XDG_CACHE_HOME/forkproof": "Results of earlier scans.",
}
SHELLS = {"bash": "forkproof.bash", "zsh": "_forkproof", "fish": "forkproof.fish"}


def escaped(text: str) -> str:
    """Text in which troff sees no request and no escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in text.split("\n"))


def page() -> str:
    """The whole manual page."""
    lines = [f'.TH FORKPROOF 1 "" "forkproof {__version__}" "User Commands"', ".SH NAME"]
    lines += ["forkproof \\- find the locks that a child of fork() can hang on", ".SH SYNOPSIS", ".B forkproof"]
    lines += ["[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGS\\fR]...", ".SH DESCRIPTION", *described(main)]
    context = click.Context(main, info_name="forkproof", **main.context_settings)
    lines += [".SH OPTIONS", *options(main, context), ".SH COMMANDS"]
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        lines += command_lines(f"forkproof {name}", command, context)
    lines += [".SH EXIT STATUS"]
    for code, meaning in (
        (0, "nothing that counts"),
        (1, "findings"),
        (2, "the command line asks for something impossible"),
        (3, "something could not be analysed, or the result not be written"),
        (4, "a bug in forkproof"),
        (130, "interrupted by Ctrl-C (SIGINT); nothing was written"),
        (143, "ended by SIGTERM, a pipeline's time limit for example; nothing was written"),
        (129, "ended by SIGHUP; nothing was written"),
    ):
        lines += [".TP", f".B {code}", meaning]
    for title, rows in (("ENVIRONMENT", VARIABLES), ("FILES", FILES)):
        lines.append(f".SH {title}")
        for name, meaning in rows.items():
            lines += [".TP", f".B {escaped(name)}", escaped(meaning)]
    return "\n".join(lines) + "\n"


def command_lines(name: str, command: click.Command, parent: click.Context) -> Iterator[str]:
    """A section for a command, and for those below it."""
    context = click.Context(command, info_name=name.rpartition(" ")[2], parent=parent)
    yield f'.SS "{escaped(name)} {escaped(" ".join(command.collect_usage_pieces(context)))}"'
    yield from described(command)
    yield from options(command, context)
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            below = command.get_command(context, each)
            assert below is not None
            yield from command_lines(f"{name} {each}", below, context)


def described(command: click.Command) -> Iterator[str]:
    """The help text; what click shows as it is, unfilled."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        if paragraph.startswith("\b"):
            yield from (".PP", ".nf", escaped(paragraph.removeprefix("\b").strip("\n")), ".fi")
        else:
            yield from (".PP", escaped(" ".join(paragraph.split())))


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """Each option with its help."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (".TP", f".B {escaped(record[0])}", escaped(record[1]))


def write(directory: Path) -> None:
    """Everything, below a directory."""
    (directory / "completion").mkdir(parents=True, exist_ok=True)
    (directory / "forkproof.1").write_text(page(), encoding="utf-8")
    for shell, name in SHELLS.items():
        found = get_completion_class(shell)
        assert found is not None
        source = found(main, {}, "forkproof", "_FORKPROOF_COMPLETE").source()
        (directory / "completion" / name).write_text(source, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: tools/manual.py DIRECTORY")
    write(Path(sys.argv[1]))
