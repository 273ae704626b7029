"""`forkproof matrix`: one table of programs, allocators and systems: what would hang.

Owns: the command and its table. Takes: targets, allocators, sysroots. Gives: a table; exit code 1 if something hangs.
Must never: judge; each cell is a scan.
"""

from __future__ import annotations

import json as stdlib_json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click

from forkproof.cli import output, world
from forkproof.cli.progress import QUIETLY, progress
from forkproof.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_INPUT
from forkproof.model import Hooks, Report, Severity, Target
from forkproof.options import Progress, Scanned, ScanOptions
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
_PARTLY: Final = "* not everything was analysed: it can be worse"
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
    sysroot: str = "/"
    is_partial: bool = False
    """Not everything was analysed: what is missing can only make it worse."""


_Row = tuple[str, str, str, str]
"""Path, machine, libc and sysroot of a program."""


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
@world.options_but_sysroot
@output.format_option(("text", "markdown", "json"))
@click.option("--output", "-o", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead.")
@output.NO_COLOR
@QUIETLY
@click.pass_context
def matrix_command(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    allocators: str | None,
    sysroots: tuple[Path, ...],
    form: str,
    file: Path | None,
    no_color: bool,
    quiet: bool,
    **asked: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Scan each TARGET with its own malloc and with each allocator preloaded, in each system.

    What --preload names is preloaded in every cell, behind the allocator.

    \b
      hangs      a finding of severity high
      may hang   of severity medium
      unlikely   of severity low or note
      unknown    none, but whether the allocator's handlers are effective is not known, or something was not analysed
      ok         none
      *          behind any of these: not everything was analysed, it can be worse; standard error says why

    Exit codes: 0 nothing hangs; 1 something hangs; 3 something was not analysed.

    \b
    Examples:
      forkproof matrix /usr/bin/qemu-system-aarch64 --sysroot /srv/bookworm-arm64 --sysroot /srv/trixie-arm64
      forkproof matrix /usr/sbin/named --allocators libjemalloc.so.2,/opt/new/libtcmalloc.so.4
    """
    from forkproof.policy import Policy

    if file is not None:
        output.check(file)
    options = world.World.taken({**asked, "sysroot": None}).asked(Policy())
    cells = []
    errors: dict[str, None] = {}
    named = tuple(allocators.split(",")) if allocators else None
    systems = [(sysroot, (OWN, *(named or _there(sysroot)))) for sysroot in sysroots or (None,)]
    with progress(quiet=quiet, no_color=no_color) as watched:
        told = _Tried(watched, sum(len(chosen) for _, chosen in systems))
        for sysroot, chosen in systems:
            cells += list(_cells(targets, chosen, replace(options, sysroot=sysroot), errors, told))
    output.deliver(_rendered(cells, form, color=file is None and output.wants_color(no_color)), file)
    for message in errors:
        output.tell(message)
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


class _Tried:
    """Progress of all scans as if they were one: each has the same programs, with another allocator."""

    def __init__(self, watched: Progress, scans: int) -> None:
        self._watched, self._scans = watched, scans
        self._before = 0
        self._with = ""

    def next(self, allocator: str, sysroot: Path | None) -> None:
        """A scan begins."""
        self._before += 1
        self._with = f" with {'its own malloc' if allocator == OWN else allocator}{f' in {sysroot}' if sysroot else ''}"

    def stage(self, name: str, done: int, total: int) -> None:
        """As a scan says it."""
        self._watched.stage(f"{name}{self._with}", done, total)

    def scanned(self, program: Scanned, done: int, total: int) -> None:
        """Which of all cells it is, should each scan have as many."""
        number = (self._before - 1) * total + done
        self._watched.scanned(replace(program, name=f"{program.name}{self._with}"), number, total * self._scans)


def _cells(
    targets: tuple[str, ...],
    allocators: tuple[str, ...],
    options: ScanOptions,
    errors: dict[str, None],
    watched: _Tried,
) -> Iterator[Cell]:
    """A cell for each target and allocator; notes what could not be analysed, once each."""
    from forkproof import pipeline

    for allocator in allocators:
        preload = () if allocator == OWN else (allocator,)
        watched.next(allocator, options.sysroot)
        report = pipeline.scan(targets, replace(options, preload=(*preload, *options.preload)), watched)
        errors |= dict.fromkeys(report.errors)
        vain = [f"{d.object}: {d.message}" for d in report.diagnostics if (d.level, d.object) == ("error", allocator)]
        errors |= dict.fromkeys(each for each in vain if not any(each in message for message in report.errors))
        for target in report.targets:
            found = [finding for finding in report.findings if finding.target == target.path and finding.is_open]
            worst = min((f.severity.rank for f in found), default=None)
            outcome = "not analysed" if vain else _outcome(target, worst)
            found_ids = tuple(f.id for f in found)
            is_partial = bool(target.gap) and outcome not in ("not analysed", "unknown")
            machine, libc = target.machine, target.libc
            yield Cell(target.path, machine, libc, allocator, outcome, found_ids, target.sysroot, is_partial)
        yield from _failed(targets, report, allocator, str(options.sysroot or "/"))


def _failed(targets: tuple[str, ...], report: Report, allocator: str, sysroot: str) -> Iterator[Cell]:
    """Targets that gave nothing."""
    if not report.targets:
        yield from (Cell(name, "", "", allocator, "not analysed", (), sysroot) for name in targets)


def _outcome(target: Target, worst: int | None) -> str:
    if worst is not None:
        return {Severity.HIGH.rank: "hangs", Severity.MEDIUM.rank: "may hang"}.get(worst, "unlikely")
    doubtful = any(each.active and each.hooks is Hooks.UNKNOWN for each in target.allocators)
    return "unknown" if doubtful or target.missing else "ok"


def _rendered(cells: list[Cell], form: str, *, color: bool) -> str:
    if form == "json":
        rows = [
            {
                "target": cell.target,
                "machine": cell.machine,
                "libc": cell.libc,
                "sysroot": cell.sysroot,
                "allocator": cell.allocator,
                "outcome": cell.outcome,
                "incomplete": cell.is_partial,
                "findings": list(cell.findings),
            }
            for cell in cells
        ]
        return stdlib_json.dumps({"version": 1, "cells": rows}, indent=2) + "\n"
    allocators = list(dict.fromkeys(cell.allocator for cell in cells))
    rows_of: dict[_Row, dict[str, Cell]] = {}
    for cell in cells:
        rows_of.setdefault((cell.target, cell.machine, cell.libc, cell.sysroot), {})[cell.allocator] = cell
    head = ("program", "machine", "libc", *_distinct(allocators, _short))
    shown = [tuple(_shown(found.get(each)) for each in allocators) for found in rows_of.values()]
    body = [
        (name, row[1], row[2], *outcomes) for name, row, outcomes in zip(_names(rows_of), rows_of, shown, strict=True)
    ]
    is_partial = any(cell.is_partial for cell in cells)
    if form == "markdown":
        from forkproof.report.markdown import escaped

        rows_told = [tuple(map(escaped, head)), ("---",) * len(head), *(tuple(map(escaped, row)) for row in body)]
        lines = ["| " + " | ".join(row) + " |" for row in rows_told]
        return "\n".join([*lines, *(["", escaped(_PARTLY)] if is_partial else []), ""])
    return painted(_lines(head, body, is_partial=is_partial), color=color)


def _shown(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.outcome}{'*' if cell.is_partial else ''}"


def _names(rows: Iterable[_Row]) -> list[str]:
    """What tells the rows apart: the file's name, its path where several are called so, and the system at last."""
    rows = list(rows)
    names = [path.rsplit("/", 1)[-1] for path, *_ in rows]
    for more in ([path for path, *_ in rows], [f"{sysroot}:{path}" for path, _, _, sysroot in rows]):
        common = Counter((name, *row[1:3]) for name, row in zip(names, rows, strict=True))
        names = [m if common[(n, *row[1:3])] > 1 else n for n, m, row in zip(names, more, rows, strict=True)]
    return names


def _distinct(names: Sequence[str], short: Callable[[str], str]) -> list[str]:
    """Short names, but for those that two share."""
    common = Counter(map(short, names))
    return [short(name) if common[short(name)] == 1 else name for name in names]


def _short(library: str) -> str:
    """tcmalloc for libtcmalloc.so.4."""
    return library.rsplit("/", 1)[-1].removeprefix("lib").partition(".so")[0]


def _lines(head: tuple[str, ...], body: list[tuple[str, ...]], *, is_partial: bool) -> Iterator[Line]:
    rows = [[Span(cell, _STYLES.get(cell.removesuffix("*"), "")) for cell in row] for row in body]
    yield from table([[Span(cell, "quiet") for cell in head], *rows], WIDTH, indent=0)
    yield line()
    if is_partial:
        yield line(Span(_PARTLY, "unknown"))
    yield line(Span("One cell in full: forkproof scan TARGET --preload LIB", "quiet"))
