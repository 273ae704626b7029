"""The stages of a scan, in order: a table of contents.

    open → load → index → bind → call graph → fork windows, threads, handlers, allocators → rules → report

Owns: the order of the stages and what happens when one target fails. Each stage is a function with a
      frozen product. Must never: contain analysis.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from forkproof import artifacts, callgraph, closure, describe, facts, signatures
from forkproof.allocators import find_libc
from forkproof.callgraph import CallGraph
from forkproof.errors import ForkproofError, InputError
from forkproof.hazards import allocator, unsafe_call
from forkproof.model import Diagnostic, Finding, Report, Target
from forkproof.options import Progress, ScanOptions

_STAGES = 4

RULES: Final[tuple[Callable[[facts.Facts], list[Finding]], ...]] = (
    allocator.find,
    unsafe_call.find,
)
"""The rules, each a function of the facts. A rule computes what only it needs when the facts call for it."""

Prove = Callable[[facts.Facts, list[Finding]], list[Finding]]
"""Runs the program to confirm or refute findings; gives them back with their records."""


def scan(targets: Sequence[str], options: ScanOptions, progress: Progress, prove: Prove | None = None) -> Report:
    """Analyse every target; one that cannot be analysed costs only itself."""
    known = signatures.load()
    found: list[Target] = []
    findings: list[Finding] = []
    diagnostics: list[Diagnostic] = []
    errors: list[str] = []
    with artifacts.opened(targets, options.sysroot, options.only) as scopes:
        for scope in scopes:
            diagnostics += scope.diagnostics
            for error in scope.errors:
                errors.append(str(error))
                diagnostics.append(Diagnostic("error", error.path, str(error)))
            for start in scope.starts:
                name = f"{scope.prefix}{start.name}"
                try:
                    with _without_collector():
                        target, hazards, notes = scan_start(start, scope, options, known, progress, prove)
                except InputError as error:
                    # The file may lie in a temporary directory: the name that was asked for is the one to tell.
                    told = str(type(error)(name, error.reason, next_step=error.next_step))
                    errors.append(told)
                    diagnostics.append(Diagnostic("error", name, told))
                    continue
                found.append(target)
                findings += hazards
                diagnostics += notes
                lacking = "library {} was not found; what it holds was not analysed"
                errors += [f"{name}: {lacking.format(library)}" for library in target.missing]
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


def scan_start(
    start: artifacts.Start,
    scope: artifacts.Scope,
    options: ScanOptions,
    known: signatures.Signatures,
    progress: Progress,
    prove: Prove | None = None,
) -> tuple[Target, list[Finding], list[Diagnostic]]:
    """Analyse one program of a scope, as its unit or wrapper would start it."""
    options = replace(options, preload=(*start.preload, *options.preload))
    target, findings, notes = scan_one(start.name, options, known, progress, scope.sysroot, prove)
    path = f"{scope.prefix}{target.path}"
    if start.source:
        words = " ".join(start.preload)
        notes.append(Diagnostic("info", path, f"scanned with {words} preloaded, since {start.source} says so"))
    renamed = [replace(finding, target=path) for finding in findings]
    return replace(target, path=path, sysroot=scope.label), renamed, notes


def scan_one(
    name: str,
    options: ScanOptions,
    known: signatures.Signatures,
    progress: Progress,
    sysroot: closure.Sysroot | None = None,
    prove: Prove | None = None,
) -> tuple[Target, list[Finding], list[Diagnostic]]:
    """Analyse one program."""
    # What ld.so would map, and what every object's code calls.
    progress.stage(f"{name}: loading", 0, _STAGES)
    graph = call_graph(name, options, known, sysroot)
    # Forks, threads, handlers and allocators of that program.
    progress.stage(f"{name}: following forks", 1, _STAGES)
    libc = find_libc(graph.program, known)
    gathered = facts.gather(graph.program.closure.program.path, graph, known, libc)
    # The rules.
    progress.stage(f"{name}: checking rules", 2, _STAGES)
    findings = [finding for find in RULES for finding in find(gathered)]
    # The probe, where one is asked for: the only stage that runs anything.
    if prove is not None:
        progress.stage(f"{name}: probing", 3, _STAGES)
        findings = prove(gathered, findings)
    # The document.
    progress.stage(f"{name}: reporting", 3, _STAGES)
    result = describe.target(gathered, options), findings, describe.diagnostics(gathered)
    progress.stage(f"{name}: done", _STAGES, _STAGES)
    return result


def call_graph(
    name: str, options: ScanOptions, known: signatures.Signatures, sysroot: closure.Sysroot | None = None
) -> CallGraph:
    """Load, index and bind one program, and join its calls."""
    sysroot = sysroot or closure.DirectorySysroot(options.sysroot or Path("/"))
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
