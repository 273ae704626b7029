"""`forkproof cache`: what is kept of earlier scans.

Owns: the command. Takes: a verb. Gives: a line or two.
Must never: touch anything but the cache's own files.
"""

from __future__ import annotations

import re
from typing import Final

import click

from forkproof.cache import Cache, directory
from forkproof.cli import output

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@click.group("cache")
def cache_command() -> None:
    """Results are kept by the content of everything that they were made from, below $XDG_CACHE_HOME or ~/.cache.

    They are never wrong by age: a new forkproof, a changed library or signature is another entry.
    """


@cache_command.command("info")
def info() -> None:
    """Where it is, and how large."""
    entries = Cache(directory()).entries()
    total = sum(size for _, size, _ in entries)
    output.emit(f"{directory()}: {len(entries)} results, {total / 1e6:.1f} MB\n")


@cache_command.command("clear")
def clear() -> None:
    """Remove everything."""
    _said(*Cache(directory()).prune(largest=-1, days=-1))


@cache_command.command("prune")
@click.option("--max-size", default="1G", show_default=True, metavar="SIZE", help="What may stay, such as 500M.")
@click.option("--max-age", type=click.FloatRange(min=0), default=30, show_default=True, metavar="DAYS")
def prune(max_size: str, max_age: float) -> None:
    """Remove what was not used for long, then the longest unused until the rest fits."""
    match = re.fullmatch(r"(\d+)([KMG]?)", max_size)
    if match is None:
        raise click.BadParameter(f"{max_size!r} is no size, such as 500M or 2G", param_hint="--max-size")
    _said(*Cache(directory()).prune(largest=int(match[1]) * _UNITS[match[2]], days=max_age))


def _said(count: int, size: int) -> None:
    output.emit(f"{count} results removed, {size / 1e6:.1f} MB\n")
