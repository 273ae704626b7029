"""An observed run as text and JSON.

Owns: both. Takes: an `Observation`. Gives: text.
Must never: judge: a fork beside threads is shown as what it is.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from typing import Any

from forkproof import __version__
from forkproof.model import Frame, ProbeThread
from forkproof.probe.observe import Observation, SeenFork, SeenProcess
from forkproof.report import stacks
from forkproof.report.layout import Line, Span, line, painted, shorten, wrapped

_FRAMES = 8
_OTHERS = 6


def document(seen: Observation) -> dict[str, Any]:
    """The observation as plain values; processes by their ordinals."""
    return {
        "version": 1,
        "tool": {"name": "forkproof", "version": __version__},
        "processes": [dataclasses.asdict(p) for p in seen.processes.values()],
        "forks": [dataclasses.asdict(f) for f in seen.forks],
        "forks_without_stacks": seen.uncounted,
        "waiters": [dataclasses.asdict(w) for w in seen.waiters],
        "cost": {"stops": seen.stops, "seconds": round(seen.seconds, 3), "tracer_seconds": round(seen.busy, 3)},
    }


def render_json(seen: Observation) -> str:
    """The same as text."""
    return json.dumps(document(seen), indent=2) + "\n"


def render(seen: Observation, *, width: int, color: bool, verbose: bool) -> str:
    """Text for people."""
    return painted(_lines(seen, width, verbose=verbose), color=color)


def _lines(seen: Observation, width: int, *, verbose: bool) -> Iterator[Line]:
    yield line(Span("PROCESSES", "heading"))
    yield from _tree(seen, 0, 1, width)
    yield line()
    for number, fork in enumerate(seen.forks, 1):
        yield from _fork(number, fork, width, verbose=verbose)
    if seen.uncounted:
        yield line(f"... and {seen.uncounted} more forks, without stacks")
        yield line()
    if seen.waiters:
        yield line(Span("WAITING ON A FUTEX, WITHOUT A TIME LIMIT, WHEN ALL WAS AT REST", "heading"))
        for waiter in seen.waiters:
            yield from _thread(f"process {waiter.process}, ", waiter.thread, width, verbose=verbose)
        yield line()
    each = f", {seen.seconds / seen.stops * 1e6:.0f} us each at most" if seen.stops else ""
    text = (
        f"cost: {seen.stops} stops in {seen.seconds:.2f} s{each}; {seen.busy:.2f} s of it for stacks and other looking"
    )
    yield from wrapped(text, width, style="quiet")


def _tree(seen: Observation, parent: int, depth: int, width: int) -> Iterator[Line]:
    for process in seen.processes.values():
        if process.parent == parent:
            yield from _process(process, depth, width)
            yield from _tree(seen, process.number, depth + 1, width)


def _process(process: SeenProcess, depth: int, width: int) -> Iterator[Line]:
    indent = "  " * depth
    threads = f", {process.threads} threads" if process.threads > 1 else ""
    command = shlex.join(process.command) or "?"
    yield line(shorten(f"{indent}{process.number}  {command}  ({process.end}{threads})", width))
    for command_line in process.execs:
        yield line(shorten(f"{indent}     exec {shlex.join(command_line)}", width))


def _fork(number: int, fork: SeenFork, width: int, *, verbose: bool) -> Iterator[Line]:
    others = len(fork.others)
    beside = f"beside {others} other thread{'s' if others != 1 else ''}" if others else "with no other thread"
    yield line(
        Span(f"FORK {number}", "heading"),
        f"  process {fork.parent} -> {fork.child}: {fork.call}, {fork.kind}, handlers {fork.handlers}, {beside}",
    )
    yield from _frames(f"{fork.thread}, which forks", fork.stack, width, verbose=verbose)
    shown = fork.others if verbose else fork.others[:_OTHERS]
    for thread in shown:
        yield from _thread("", thread, width, verbose=verbose)
    if others > len(shown):
        yield line(f"    ... and {others - len(shown)} more threads: --verbose")
    for lock in fork.held:
        yield line("    ", Span("taken at that moment: ", "unknown"), shorten(lock, width - 26))
    yield line()


def _thread(prefix: str, thread: ProbeThread, width: int, *, verbose: bool) -> Iterator[Line]:
    yield from _frames(f"{prefix}{thread.name}: {thread.doing}", thread.stack, width, verbose=verbose)


def _frames(title: str, frames: tuple[Frame, ...], width: int, *, verbose: bool) -> Iterator[Line]:
    yield line("  ", Span(shorten(title, width - 2), "name"))
    inner = list(reversed(frames))
    for number, frame in enumerate(inner if verbose else inner[:_FRAMES]):
        yield line("    ", shorten(f"#{number:<2} {stacks.name(frame)}  {frame.object}", width - 4))
    if not verbose and len(inner) > _FRAMES:
        yield line(f"    ... {len(inner) - _FRAMES} more frames: --verbose")
