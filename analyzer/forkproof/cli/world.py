"""In which world programs would be started: the options that all commands share which scan.

Owns: `--sysroot`, `--library-path`, `--preload`, `--also`, `--only`, and how forkproof.toml's defaults meet them.
Takes: the command line's values. Gives: `ScanOptions`.
Must never: look at a target.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from forkproof.errors import UsageError
from forkproof.options import ScanOptions

if TYPE_CHECKING:
    from forkproof.policy import Policy

_Command = TypeVar("_Command", bound=Callable[..., Any])


def options(command: _Command) -> _Command:
    """The options, for a command that gives a `World` their values."""
    sysroot = click.option(
        "--sysroot",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="The directory that is / for the targets: an unpacked image, packages of another machine.",
    )
    return sysroot(options_but_sysroot(command))


def options_but_sysroot(command: _Command) -> _Command:
    """All but `--sysroot`, for a command that has several, and an option of its own for them."""
    for option in (
        click.option("--no-cache", is_flag=True, help="Neither use nor keep results: see `forkproof cache`."),
        click.option(
            "--jobs",
            "-j",
            type=click.IntRange(min=1),
            metavar="N",
            help="Processes that scan programs side by side (default: one for each core).",
        ),
        click.option("--only", multiple=True, metavar="PATTERN", help="Of packages, images, trees: these; repeatable."),
        click.option("--also", multiple=True, metavar="LIB", help="A library that the program dlopens; repeatable."),
        click.option(
            "--libc",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            metavar="DIR",
            help="What if the C library were that of this directory: its libraries in place of the system's.",
        ),
        click.option(
            "--replace",
            multiple=True,
            metavar="NAME=FILE",
            help="What if this library were that file: libx.so.1=./new/libx.so.1; repeatable.",
        ),
        click.option("--preload", multiple=True, metavar="LIB", help="A library of LD_PRELOAD; repeatable."),
        click.option("--library-path", multiple=True, metavar="DIR", help="Of LD_LIBRARY_PATH; repeatable."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class World:
    """The options' values."""

    sysroot: Path | None
    library_path: tuple[str, ...]
    preload: tuple[str, ...]
    also: tuple[str, ...]
    only: tuple[str, ...]
    replace: tuple[str, ...]
    libc: Path | None
    jobs: int | None
    no_cache: bool

    @classmethod
    def taken(cls, asked: dict[str, Any]) -> World:
        """Out of a command's arguments."""
        return cls(**{field.name: asked.pop(field.name) for field in fields(cls)})

    def asked(self, policy: Policy) -> ScanOptions:
        """An option that was given stands for itself; one that was not, for what forkproof.toml says."""
        from forkproof.cache import directory

        sysroot = self.sysroot or policy.sysroot
        if sysroot is not None and not sysroot.is_dir():
            raise UsageError(f"{policy.path}: scan.sysroot {sysroot} is no directory", next_step="Correct it.")
        return ScanOptions(
            sysroot,
            self.library_path or policy.library_path,
            self.preload or policy.preload,
            self.also or policy.also,
            only=self.only or policy.only,
            replace=tuple(self._replaced()),
            jobs=self.jobs or len(os.sched_getaffinity(0)),
            cache=None if self.no_cache else directory(),
        )

    def _replaced(self) -> Iterator[tuple[str, Path]]:
        """Names and files of --libc, then of --replace, which wins."""
        if self.libc is not None:
            found = sorted(path for path in self.libc.iterdir() if ".so" in path.name and path.is_file())
            if not any(path.name.startswith(("libc.so", "ld-musl-")) for path in found):
                help_text = "Name the directory that holds libc.so.6 and the dynamic linker."
                raise UsageError(f"--libc {self.libc}: no C library in it", next_step=help_text)
            yield from ((path.name, path.resolve()) for path in found)
        for each in self.replace:
            name, is_pair, file = each.partition("=")
            reason = ""
            if not is_pair or not name or not file:
                reason = "is no pair of a name and a file"
            elif "/" in name:
                reason = f"{name} is a path, and libraries are exchanged by the name that their users ask for"
            elif not Path(file).is_file():
                reason = f"{file} is a directory" if Path(file).is_dir() else f"there is no file {file} on this machine"
            if reason:
                name = name.rsplit("/", 1)[-1] or "libx.so.1"
                help_text = f"Give a library's file name and a file of this machine: --replace {name}=./new/{name}"
                raise UsageError(f"--replace {each}: {reason}", next_step=help_text)
            yield name, Path(file).resolve()
