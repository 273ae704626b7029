"""What commands that run a program have in common: how it is run.

Owns: the options for its surroundings, and the check that it is a program. Takes: the command line. Gives: a `Command`.
Must never: run it.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click

from forkproof.cli import output
from forkproof.errors import NotElf, UnreadableFile, UnsupportedElf

if TYPE_CHECKING:
    from forkproof.probe.census import Census
    from forkproof.probe.sites import AcquireSite
    from forkproof.probe.stage import Command

_F = TypeVar("_F", bound=Callable[..., object])
SECONDS: Final = 60.0
_MACHINES: Final = {b"\x3e\0": "x86_64", b"\xb7\0": "aarch64"}
"""e_machine, and what uname calls that."""

_OPTIONS: Final = (
    click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD..."),
    click.option("--preload", multiple=True, metavar="LIB", help="A library of LD_PRELOAD; repeatable."),
    click.option("--library-path", multiple=True, metavar="DIR", help="A directory of LD_LIBRARY_PATH; repeatable."),
    click.option("--env", multiple=True, metavar="NAME=VALUE", help="A variable of its environment; repeatable."),
    click.option(
        "--stdin",
        type=click.Path(exists=True, dir_okay=False),
        default=os.devnull,
        metavar="FILE",
        help="What it reads from standard input.  [default: nothing]",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=1),
        default=SECONDS,
        show_default=True,
        metavar="S",
        help="Seconds that one run may take.",
    ),
)


def options(function: _F) -> _F:
    """The options, in this order."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def command(
    arguments: Sequence[str],
    *,
    preload: Sequence[str] = (),
    library_path: Sequence[str] = (),
    env: Sequence[str] = (),
    stdin: str = os.devnull,
) -> Command:
    """The command line as a probe takes it, its program found and looked at."""
    from forkproof.probe.stage import Command

    variables = dict(os.environ)
    for each in env:
        name, separator, value = each.partition("=")
        if not separator or not name:
            raise click.UsageError(f"--env {each}: NAME=VALUE was expected.")
        variables[name] = value
    if library_path:
        before = variables.get("LD_LIBRARY_PATH")
        variables["LD_LIBRARY_PATH"] = ":".join([*library_path, *([before] if before else [])])
    if not arguments:
        raise click.UsageError("There is no command to run.")
    program = _program(arguments[0])
    return Command((program, *arguments[1:]), variables, stdin, tuple(preload))


def _program(name: str) -> str:
    """The path of an ELF program; a script is refused, with what to do."""
    path = name if "/" in name else shutil.which(name)
    if path is None:
        raise UnreadableFile(name, "no such program on PATH", next_step="Give its path.")
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(20)
    except OSError as error:
        step = "Give a program's path."
        if isinstance(error, PermissionError):
            step = "Run as a user who may read it: a program is scanned before it is run."
        raise UnreadableFile(path, f"cannot be read: {error.strerror or error}", next_step=step) from error
    if head[:2] == b"#!":
        raise NotElf(path, "is a script, and its interpreter would be probed", next_step="Give the ELF program itself.")
    if head[:4] != b"\x7fELF":
        raise NotElf(path, "not an ELF file", next_step="Give an ELF program.")
    machine = _MACHINES.get(head[18:])
    if machine is not None and machine != platform.machine():
        step = (
            "Do this on such a machine. What a probe needs of a scan can be made here, from an unpacked system:\n  "
            "forkproof probe --sysroot DIR --write-plan FILE -- CMD, and there: forkproof probe --plan FILE -- CMD"
        )
        raise UnsupportedElf(
            path, f"is a program for {machine}, and this machine is {platform.machine()}", next_step=step
        )
    _tell_of_rights(path)
    return path


def _tell_of_rights(path: str) -> None:
    """The kernel leaves the owner's rights out where the tracer is not root: the run is another one than users see."""
    if os.geteuid() != 0 and Path(path).stat().st_mode & (stat.S_ISUID | stat.S_ISGID):
        message = (
            "is a set-user-ID or set-group-ID program: under ptrace it runs with your rights; to probe it, be root"
        )
        output.tell(f"{path}: {message}")


def census_of(
    what: Command, sites: tuple[AcquireSite, ...], known: Mapping[tuple[str, int], str], seconds: float
) -> Census:
    """Which locks a run takes."""
    from forkproof.probe import census
    from forkproof.probe.stage import Stage

    with Stage(what, sites, None, known) as stage:
        return census.take(stage, seconds)
