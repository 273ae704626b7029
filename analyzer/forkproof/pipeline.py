"""The stages of a scan, in order: a table of contents.

    load → index → bind → call graph → fork windows, threads, handlers, allocators → rules → report

Owns: the order of the stages and what happens when one target fails. Each stage is a function with a
      frozen product. Must never: contain analysis.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from forkproof import callgraph, closure, describe, facts, signatures
from forkproof.allocators import find_libc
from forkproof.callgraph import CallGraph
from forkproof.errors import ForkproofError, InputError
from forkproof.hazards import allocator
from forkproof.model import Diagnostic, Finding, Report, Target
from forkproof.options import Progress, ScanOptions

_STAGES = 4

RULES: Final[tuple[Callable[[facts.Facts], list[Finding]], ...]] = (allocator.find,)
"""The rules, each a function of the facts. A rule computes what only it needs when the facts call for it."""


def scan(targets: Sequence[str], options: ScanOptions, progress: Progress) -> Report:
    """Analyse every target; one that cannot be analysed costs only itself."""
    known = signatures.load()
    found: list[Target] = []
    findings: list[Finding] = []
    diagnostics: list[Diagnostic] = []
    errors: list[str] = []
    for name in targets:
        try:
            with _without_collector():
                target, hazards, notes = scan_one(name, options, known, progress)
        except InputError as error:
            errors.append(str(error))
            diagnostics.append(Diagnostic("error", name, str(error)))
            continue
        found.append(target)
        findings += hazards
        diagnostics += notes
        errors += [f"{name}: library {m} was not found; what it holds was not analysed" for m in target.missing]
    findings.sort(key=lambda f: (f.severity.rank, f.target, f.rule, f.id))
    return Report(tuple(found), tuple(findings), tuple(diagnostics), tuple(errors))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Leave cyclic garbage until a target is done: collecting meanwhile costs a tenth of the time, for nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def scan_one(
    name: str, options: ScanOptions, known: signatures.Signatures, progress: Progress
) -> tuple[Target, list[Finding], list[Diagnostic]]:
    """Analyse one program."""
    # What ld.so would map, and what every object's code calls.
    progress.stage(f"{name}: loading", 0, _STAGES)
    graph = call_graph(name, options, known)
    # Forks, threads, handlers and allocators of that program.
    progress.stage(f"{name}: following forks", 1, _STAGES)
    libc = find_libc(graph.program, known)
    gathered = facts.gather(graph.program.closure.program.path, graph, known, libc)
    # The rules.
    progress.stage(f"{name}: checking rules", 2, _STAGES)
    findings = [finding for find in RULES for finding in find(gathered)]
    # The document.
    progress.stage(f"{name}: reporting", 3, _STAGES)
    result = describe.target(gathered, options), findings, describe.diagnostics(gathered)
    progress.stage(f"{name}: done", _STAGES, _STAGES)
    return result


def call_graph(name: str, options: ScanOptions, known: signatures.Signatures) -> CallGraph:
    """Load, index and bind one program, and join its calls."""
    sysroot = closure.DirectorySysroot(options.sysroot or Path("/"))
    loaded = closure.load(
        closure.LoadRequest(
            sysroot=sysroot,
            target=name,
            library_path=options.library_path,
            preload=options.preload,
            also=options.also,
        )
    )
    return callgraph.build(callgraph.link(loaded, sysroot), known)


__all__ = ["ForkproofError", "call_graph", "scan", "scan_one"]
