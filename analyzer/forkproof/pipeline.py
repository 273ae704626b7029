"""The stages of a scan, in order: a table of contents.

    open → load → index → bind → call graph → fork windows, threads, handlers, allocators → rules → report

Owns: the order of the stages and what happens when one target fails. Each stage is a function with a
      frozen product. Must never: contain analysis.
"""

from __future__ import annotations

import difflib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from forkproof import artifacts, cache, callgraph, closure, describe, facts, schedule, signatures
from forkproof.allocators import find_libc
from forkproof.cache import Cache, Parts
from forkproof.callgraph import CallGraph
from forkproof.errors import ForkproofError, InputError, bug
from forkproof.hazards import (
    allocator,
    go_runtime,
    handler_unsafe,
    handlers_skipped,
    inherited,
    order,
    reentry,
    threads_lost,
    unsafe_call,
    vfork_misuse,
)
from forkproof.model import Diagnostic, Finding, Launch, Report, Target
from forkproof.options import QUIET, Progress, Scanned, ScanOptions
from forkproof.program import link
from forkproof.report.json import in_order
from forkproof.shared import SharedImages

_STAGES = 4

RULES: Final[tuple[Callable[[facts.Facts], list[Finding]], ...]] = (
    allocator.find,
    inherited.find,
    reentry.find,
    order.find,
    unsafe_call.find,
    threads_lost.find,
    handlers_skipped.find,
    handler_unsafe.find,
    vfork_misuse.find,
    go_runtime.find,
)
"""The rules, each a function of the facts. A rule computes what only it needs when the facts call for it."""

Note = Callable[[facts.Facts, list[Finding]], None]
"""Sees the facts and findings of a program before they are let go: what a probe is planned from."""


def scan(
    targets: Sequence[str],
    options: ScanOptions,
    progress: Progress,
    note: Note | None = None,
    *,
    is_last: bool = False,
) -> Report:
    """Analyse every target; one that cannot be analysed costs only itself.

    `is_last`: the process ends after it. Then what a single program leaves is not searched for cyclic garbage, which
    takes a twentieth of the time, and the collector stays off.
    """
    found: list[Target] = []
    findings: list[Finding] = []
    diagnostics: list[Diagnostic] = []
    errors: list[str] = []
    gaps: dict[str, list[str]] = {}
    with artifacts.opened(targets, options.sysroot, options.only, as_named=options.as_named) as scopes:
        for scope in scopes:
            diagnostics += scope.diagnostics
            for error in scope.errors:
                errors.append(str(error))
                diagnostics.append(Diagnostic("error", error.path, str(error)))
        for name, outcome in _outcomes(scopes, options, progress, note, is_last=is_last):
            if isinstance(outcome, str):
                errors.append(outcome)
                diagnostics.append(Diagnostic("error", name, outcome))
                continue
            target, hazards, notes = outcome
            found.append(target)
            findings += hazards
            diagnostics += notes
            errors += lacking(name, target, options)
            for gap in target.incomplete:
                gaps.setdefault(gap, []).append(name)
    errors += [_gap(message, names) for message, names in gaps.items()]
    return Report(tuple(found), tuple(in_order(tuple(findings))), tuple(diagnostics), tuple(errors))


def _in_vain(name: str, names: Sequence[str]) -> str:
    """An exchange that changed nothing, with the library that may have been meant."""
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"--replace {name} changes nothing here: nothing that it loads is called so{meant}"


def _gap(message: str, names: Sequence[str]) -> str:
    """What programs were scanned without, such as a preload that is not there; many can share one."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    help_text = f"What is loaded, and where it was looked for: forkproof closure {names[0]}, with the same options."
    return f"{names[0]}{others}: {message}\n  {help_text}"


def lacking(name: str, target: Target, options: ScanOptions) -> list[str]:
    """A message for libraries that were asked for and one for those that are needed, with what to do about each."""
    names = list({library.rsplit("/", 1)[-1]: library for library in reversed(target.missing)}.values())[::-1]
    asked = [library for library in names if library in options.also]
    messages = [
        f"{name}: --also {library}: not found; what it holds was not analysed\n"
        "  Check the spelling: it is a soname, or a path inside the sysroot. "
        f"Where it was looked for: forkproof closure TARGET --also {library}."
        for library in asked
    ]
    needed = [library for library in names if library not in asked]
    return [*messages, *_needed(name, needed, options, is_file=target.sysroot in ("/", str(options.sysroot)))]


def _needed(name: str, names: Sequence[str], options: ScanOptions, *, is_file: bool) -> list[str]:
    """`is_file`: there is such a program in the sysroot, not in a package."""
    if not names:
        return []
    several = len(names) > 1
    them = "them" if several else "it"
    what = f"{'libraries' if several else 'library'} {', '.join(names)} {'were' if several else 'was'} not found"
    closure = f" Where {'they were' if several else 'it was'} looked for: forkproof closure TARGET." if is_file else ""
    if options.sysroot is not None:
        place = f"packages that hold {them} beside the target, or the directory inside the sysroot: --library-path DIR"
    elif is_file:
        place = f"the directory that holds {them}: --library-path DIR; for files of another system, that: --sysroot DIR"
    else:
        place = (
            f"packages that hold {them}, too, or the system behind it: --sysroot DIR, which is --sysroot / for this one"
        )
    help_text = f"Name {place}.{closure}"
    return [f"{name}: {what}; what {'they hold' if several else 'it holds'} was not analysed\n  {help_text}"]


_DEEP: Final = 10_000
"""Calls of Python inside each other: summaries follow calls of the program as deep as they go."""


@contextmanager
def _room_to_follow(*, is_last: bool) -> Iterator[None]:
    """Deep calls; and cyclic garbage stays until a target is done: collecting meanwhile costs a tenth of the time."""
    was_enabled, depth = gc.isenabled(), sys.getrecursionlimit()
    gc.disable()
    sys.setrecursionlimit(max(depth, _DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(depth)
        if was_enabled and not is_last:
            gc.enable()


Result = tuple[Target, list[Finding], list[Diagnostic]]
Outcome = Result | str
"""What a scan of one program gave, or why it gave nothing."""
_Task = tuple[int, artifacts.Start]
"""A program, and which scope it is of."""


def _outcomes(
    scopes: Sequence[artifacts.Scope], options: ScanOptions, progress: Progress, note: Note | None, *, is_last: bool
) -> Iterator[tuple[str, Outcome]]:
    """Name and outcome of every program, in the order of the scopes."""
    tasks: list[_Task] = [(i, start) for i, scope in enumerate(scopes) for start in scope.starts]
    names = [f"{start.prefix}{start.name}" for i, start in tasks]
    if note is not None or schedule.is_for_one(tasks, options.jobs):
        is_for_one = len(tasks) == 1
        one = _Scanner(scopes, options, progress, note, is_for_one=is_for_one, is_last=is_last and is_for_one)
        for done, (name, task) in enumerate(zip(names, tasks, strict=True), 1):
            outcome, told = one.timed(name, task)
            progress.scanned(told, done, len(tasks))
            yield name, outcome
        return
    several = schedule.results(_serve, (tuple(scopes), options), tasks, names, options.jobs, progress)
    yield from zip(names, several, strict=True)


def _serve(setup: tuple[tuple[artifacts.Scope, ...], ScanOptions]) -> Callable[[_Task], schedule.Done[Result]]:
    """What a worker does: one of several, so it stays on its own processor."""
    scopes, options = setup
    scanner = _Scanner(scopes, replace(options, jobs=1), QUIET, None)

    def work(task: _Task) -> schedule.Done[Result]:
        return scanner.timed(f"{task[1].prefix}{task[1].name}", task)

    return work


class _Scanner:
    """Scans programs of some scopes, one after the other; what they share is kept."""

    def __init__(
        self,
        scopes: Sequence[artifacts.Scope],
        options: ScanOptions,
        progress: Progress,
        note: Note | None,
        *,
        is_for_one: bool = False,
        is_last: bool = False,
    ) -> None:
        self.is_for_one, self.is_last = is_for_one, is_last
        self.scopes, self.options, self.progress, self.note = scopes, options, progress, note
        self.known = signatures.load()
        self.images = SharedImages()
        kept = Cache(options.cache) if options.cache is not None else None
        self.cache = kept if note is None else None
        self.parts = Parts(kept)

    def timed(self, name: str, task: _Task) -> schedule.Done[Result]:
        """One program, and what to tell of it now."""
        begun = time.monotonic()
        outcome = self.scan(task)
        seconds = time.monotonic() - begun
        if isinstance(outcome, str):
            return schedule.Done(outcome, Scanned(name, gap="not analysed", seconds=seconds))
        target, findings, _ = outcome
        worst = min((finding.severity for finding in findings), key=lambda each: each.rank, default=None)
        gap = "not everything was analysed" if target.gap else ""
        told = Scanned(name, len(findings), worst.value if worst is not None else "", gap, seconds)
        return schedule.Done(outcome, told)

    def scan(self, task: _Task) -> Outcome:
        """One program; whatever is wrong with its file is its outcome."""
        number, start = task
        scope = self.scopes[number]
        try:
            with _room_to_follow(is_last=self.is_last):
                return self._start(start, scope)
        except InputError as error:
            # The file may lie in a temporary directory: the name that was asked for is the one to tell.
            name = f"{start.prefix}{start.name}"
            return str(type(error)(name, error.reason, next_step=error.next_step))
        except Exception as error:
            if self.is_for_one:
                raise
            # It costs this program alone. Whoever scans it alone sees all that there is to see.
            return f"{start.prefix}{start.name}: {bug(error)} To report it, scan this program alone."

    def _start(self, start: artifacts.Start, scope: artifacts.Scope) -> Result:
        """As its unit or wrapper would start it, and as the report calls it."""
        options = replace(
            self.options,
            preload=(*start.preload, *self.options.preload),
            library_path=(*self.options.library_path, *start.library_path),
        )
        sysroot = artifacts.ReplacedSysroot(scope.sysroot, dict(options.replace)) if options.replace else scope.sysroot
        target, findings, notes = self._one(start.name, options, sysroot)
        path = f"{start.prefix}{target.path}"
        launches = (Launch(start.source, start.preload), *target.launches) if start.source else target.launches
        names = sorted({Path(o.path).name for o in target.closure})
        unused = [name for name, _ in options.replace if name not in names]
        notes = [*notes, *(Diagnostic("warning", path, _in_vain(name, names)) for name in unused)]
        gaps = dict.fromkeys(f"{note.object}: {note.message}" for note in notes if note.level == "error")
        return (
            replace(target, path=path, sysroot=scope.label, launches=launches, incomplete=tuple(gaps)),
            [replace(finding, target=path) for finding in findings],
            notes,
        )

    def _one(self, name: str, options: ScanOptions, sysroot: closure.Sysroot) -> Result:
        """From the cache, or analysed now."""
        self.progress.stage(f"{name}: loading", 0, _STAGES)
        loaded = load(name, options, sysroot, self.images)
        if self.cache is None:
            return scan_one(loaded, sysroot, options, self.known, self.progress, self.note, self.parts)
        key = cache.key(loaded, sysroot, options)
        result = self.cache.get(key)
        if result is None:
            result = scan_one(loaded, sysroot, options, self.known, self.progress, None, self.parts)
            self.cache.put(key, result)
        return result


def scan_one(
    loaded: closure.Closure,
    sysroot: closure.Sysroot,
    options: ScanOptions,
    known: signatures.Signatures,
    progress: Progress,
    note: Note | None = None,
    parts: Parts | None = None,
) -> Result:
    """Analyse one program that has been loaded."""
    name = loaded.program.path
    # What every object's code calls.
    graph = callgraph.build(link(loaded, sysroot, threads=min(options.jobs, 2)), known)
    # Forks, threads, handlers and allocators of that program.
    progress.stage(f"{name}: following forks", 1, _STAGES)
    libc = find_libc(graph.program, known)
    gathered = facts.gather(name, graph, known, libc, parts)
    # The rules.
    progress.stage(f"{name}: checking rules", 2, _STAGES)
    findings = [finding for find in RULES for finding in find(gathered)]
    if note is not None:
        note(gathered, findings)
    # The document.
    progress.stage(f"{name}: reporting", 3, _STAGES)
    result = describe.target(gathered, options), findings, describe.diagnostics(gathered)
    gathered.keep()
    progress.stage(f"{name}: done", _STAGES, _STAGES)
    return result


def load(
    name: str, options: ScanOptions, sysroot: closure.Sysroot, images: SharedImages | None = None
) -> closure.Closure:
    """What ld.so would map for a program."""
    request = closure.LoadRequest(
        sysroot=sysroot,
        target=name,
        library_path=options.library_path,
        preload=options.preload,
        also=options.also,
    )
    return closure.load(request) if images is None else closure.load(request, open_image=images.load)


def call_graph(name: str, options: ScanOptions, known: signatures.Signatures) -> CallGraph:
    """Load, index and bind one program, and join its calls."""
    sysroot = closure.DirectorySysroot(options.sysroot or Path("/"))
    return callgraph.build(link(load(name, options, sysroot), sysroot), known)


__all__ = ["ForkproofError", "call_graph", "scan", "scan_one"]
