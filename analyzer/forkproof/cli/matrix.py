"""`forkproof matrix`: one table of programs, allocators and systems: what would hang.

Owns: the command and its table. Takes: targets, allocators, sysroots. Gives: a table; exit code 1 if something hangs.
Must never: judge; each cell is a scan.
"""

from __future__ import annotations

import json as stdlib_json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click

from forkproof.cli import output
from forkproof.cli.progress import progress
from forkproof.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_INPUT
from forkproof.model import Hooks, Report, Severity, Target
from forkproof.options import ScanOptions
from forkproof.report.layout import WIDTH, Line, Span, line, painted, table

OWN: Final = "own"
KNOWN: Final = (
    "libtcmalloc.so.4",
    "libtcmalloc_minimal.so.4",
    "libjemalloc.so.2",
    "libmimalloc.so.2",
    "libtbbmalloc_proxy.so.2",
)
"""What people preload; those that a sysroot has are tried if none are named."""
_STYLES: Final = {"hangs": "high", "may hang": "medium", "unlikely": "low", "unknown": "unknown", "ok": "good"}


@dataclass(frozen=True, slots=True)
class Cell:
    """What a scan of one program with one allocator gave."""

    target: str
    machine: str
    libc: str
    allocator: str
    outcome: str
    findings: tuple[str, ...]


@click.command("matrix")
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--allocators", metavar="LIB,…", help="Libraries to preload in turn (default: those known and there).")
@click.option(
    "--sysroot",
    "sysroots",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Try this system, too: another machine, another release; repeatable.",
)
@click.option("--format", "form", type=click.Choice(["text", "markdown", "json"]), default="text", show_default=True)
@click.option("--no-cache", is_flag=True, help="Neither use nor keep results: see `forkproof cache`.")
@click.pass_context
def matrix_command(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    allocators: str | None,
    sysroots: tuple[Path, ...],
    form: str,
    no_cache: bool,
) -> None:
    """Scan each TARGET with its own malloc and with each allocator preloaded, in each system.

    \b
      hangs      a finding of severity high
      may hang   of severity medium
      unlikely   of severity low or note
      unknown    none, but whether the allocator's handlers are effective is not known, or something was not analysed
      ok         none

    \b
    Examples:
      forkproof matrix /usr/bin/qemu-system-aarch64 --sysroot /srv/bookworm-arm64 --sysroot /srv/trixie-arm64
      forkproof matrix /usr/sbin/named --allocators libjemalloc.so.2,/opt/new/libtcmalloc.so.4
    """
    from forkproof.cache import directory

    cache = None if no_cache else directory()
    cells = []
    errors: dict[str, None] = {}
    for sysroot in sysroots or (None,):
        chosen = tuple(allocators.split(",")) if allocators else tuple(_there(sysroot))
        cells += list(_cells(targets, chosen, ScanOptions(sysroot=sysroot, cache=cache), errors))
    output.emit(_rendered(cells, form))
    for message in errors:
        click.echo(f"forkproof: {message}", err=True)
    hangs = any(cell.outcome == "hangs" for cell in cells)
    context.exit(EXIT_FINDINGS if hangs else EXIT_INPUT if errors else EXIT_CLEAN)


def _there(sysroot: Path | None) -> Iterator[str]:
    """Allocators that this system has, in its usual directories."""
    from forkproof.closure import DirectorySysroot

    root = DirectorySysroot(sysroot or Path("/"))
    places = [
        "/usr/lib",
        "/usr/lib64",
        *(f"/usr/lib/{name}" for name in root.names_in("/usr/lib") if "-linux-" in name),
    ]
    for name in KNOWN:
        if any(root.resolve(f"{place}/{name}") is not None for place in places):
            yield name


def _cells(
    targets: tuple[str, ...], allocators: tuple[str, ...], options: ScanOptions, errors: dict[str, None]
) -> Iterator[Cell]:
    """A cell for each target and allocator; notes what could not be analysed, once each."""
    from forkproof import pipeline

    for allocator in (OWN, *allocators):
        preload = () if allocator == OWN else (allocator,)
        with progress() as watched:
            report = pipeline.scan(targets, replace(options, preload=preload), watched)
        errors |= dict.fromkeys(report.errors)
        vain = [f"{d.object}: {d.message}" for d in report.diagnostics if (d.level, d.object) == ("error", allocator)]
        errors |= dict.fromkeys(vain)
        for target in report.targets:
            found = [finding for finding in report.findings if finding.target == target.path and finding.is_open]
            worst = min((f.severity.rank for f in found), default=None)
            outcome = "not analysed" if vain else _outcome(target, worst)
            yield Cell(target.path, target.machine, target.libc, allocator, outcome, tuple(f.id for f in found))
        yield from _failed(targets, report, allocator)


def _failed(targets: tuple[str, ...], report: Report, allocator: str) -> Iterator[Cell]:
    """Targets that gave nothing."""
    if not report.targets:
        yield from (Cell(name, "", "", allocator, "not analysed", ()) for name in targets)


def _outcome(target: Target, worst: int | None) -> str:
    if worst is not None:
        return {Severity.HIGH.rank: "hangs", Severity.MEDIUM.rank: "may hang"}.get(worst, "unlikely")
    doubtful = any(each.active and each.hooks is Hooks.UNKNOWN for each in target.allocators)
    return "unknown" if doubtful or target.missing else "ok"


def _rendered(cells: list[Cell], form: str) -> str:
    if form == "json":
        rows = [
            {
                "target": cell.target,
                "machine": cell.machine,
                "libc": cell.libc,
                "allocator": cell.allocator,
                "outcome": cell.outcome,
                "findings": list(cell.findings),
            }
            for cell in cells
        ]
        return stdlib_json.dumps({"version": 1, "cells": rows}, indent=2) + "\n"
    allocators = list(dict.fromkeys(cell.allocator for cell in cells))
    rows_of: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell in cells:
        rows_of.setdefault((cell.target.rsplit("/", 1)[-1], cell.machine, cell.libc), {})[cell.allocator] = cell.outcome
    head = ("program", "machine", "libc", *map(_short, allocators))
    body = [(*row, *(outcomes.get(each, "") for each in allocators)) for row, outcomes in rows_of.items()]
    if form == "markdown":
        lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body)]
        return "\n".join([*lines, ""])
    return painted(_lines(head, body), color=output.wants_color())


def _short(library: str) -> str:
    """tcmalloc for libtcmalloc.so.4."""
    return library.rsplit("/", 1)[-1].removeprefix("lib").partition(".so")[0]


def _lines(head: tuple[str, ...], body: list[tuple[str, ...]]) -> Iterator[Line]:
    rows = [[Span(cell, _STYLES.get(cell, "")) for cell in row] for row in body]
    yield from table([[Span(cell, "quiet") for cell in head], *rows], WIDTH, indent=0)
    yield line()
    yield line(Span("One cell in full: forkproof scan TARGET --preload LIB", "quiet"))
