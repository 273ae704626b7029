"""Facts of one program to the result document.

Owns: the choice of what a report says of a program, and the names that it uses.
Takes: `Facts`. Gives: `Target` and `Diagnostic`s.
Must never: analyse anything.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from forkproof.allocators import AllocatorFacts
from forkproof.arguments import string_arguments
from forkproof.callgraph import CERTAIN
from forkproof.closure import Closure
from forkproof.closure.load import PRELOAD_FILE
from forkproof.facts import Facts, WindowFacts, unknown_calls
from forkproof.locks.coverage import Cover
from forkproof.locks.identity import lock_of
from forkproof.model import (
    Allocator,
    Answer,
    ClosureEntry,
    Diagnostic,
    Frame,
    Hooks,
    Launch,
    Lock,
    Target,
    Window,
)
from forkproof.options import ScanOptions
from forkproof.program import Function
from forkproof.threads import ThreadSource

_MAX_SOURCES: Final = 16


def target(facts: Facts, options: ScanOptions) -> Target:
    """What the report says of a program."""
    closure = facts.flow.program.closure
    image = closure.program.image
    return Target(
        path=facts.target,
        machine=image.machine.value,
        build_id=image.build_id,
        interpreter=image.interpreter,
        libc=_libc(facts),
        closure=tuple(ClosureEntry(o.name, o.path, o.image.build_id, o.image.sha256) for o in closure.objects),
        missing=tuple(m.name for m in closure.missing),
        allocators=tuple(_allocator(facts, a) for a in facts.allocators),
        threads=_threads(facts),
        thread_sources=_thread_sources(facts),
        windows=tuple(_window(facts, w) for w in facts.windows),
        sysroot=str(options.sysroot or "/"),
        library_path=options.library_path,
        preload=options.preload,
        also=options.also,
        launches=_launches(closure),
        not_known=facts.not_known,
    )


def _launches(closure: Closure) -> tuple[Launch, ...]:
    """What ld.so reads by itself."""
    found = tuple(o.path for o in closure.objects if o.why.startswith(f"preload ({PRELOAD_FILE})"))
    return (Launch(PRELOAD_FILE, found),) if found else ()


def _libc(facts: Facts) -> str:
    """Its name and version; Go's programs may well have none."""
    is_go = facts.libc.id is None and len(facts.flow.program.image(0).go_functions) > 0
    return "no C library (Go)" if is_go and not facts.flow.program.closure.missing else facts.libc.title


def diagnostics(facts: Facts) -> list[Diagnostic]:
    """What could not be resolved, and what a reader should know."""
    found = list(facts.flow.program.closure.diagnostics)
    program = facts.target.rsplit("/", 1)[-1]
    blind = unknown_calls(facts.flow.program)
    found.append(Diagnostic("info", program, f"{blind} calls in the closure have targets that are not known"))
    found += [Diagnostic("warning", program, gap) for gap in facts.gaps]
    found += [Diagnostic("warning", program, f"not known: {each}") for each in facts.lost_forks]
    found += [
        Diagnostic("warning", program, f"the address of {name} is kept: forks made through it are not followed")
        for name in facts.hidden_forkers
    ]
    found += _dlopens(facts)
    for window in facts.windows:
        if not window.window.is_complete and window.reachable is Answer.YES:
            name = facts.flow.name(window.window.function)
            found.append(
                Diagnostic("warning", program, f"the child of the fork in {name} was not followed through all callers")
            )
    return found


def _dlopens(facts: Facts) -> list[Diagnostic]:
    """Libraries that the code opens by constant names, and that are therefore not in the closure."""
    program, graph = facts.flow.program, facts.flow.graph
    openers = program.called(["dlopen", "dlmopen", "__libc_dlopen_mode"])
    here = {name for o in program.closure.objects for name in (o.name, o.path.rsplit("/", 1)[-1])}
    names: dict[str, set[str]] = {}
    for opener, name in openers.items():
        edges = [e for e in graph.edges_to(opener) if int(graph.kind[e]) in CERTAIN]
        for obj in sorted({program.object_of(Function(int(graph.source[e]))) for e in edges}):
            mine = [e for e in edges if program.object_of(Function(int(graph.source[e]))) == obj]
            sites = np.array([int(graph.site[e]) for e in mine], np.int64)
            for library in string_arguments(program, obj, sites, 1 if name == "dlmopen" else 0).values():
                if library.rsplit("/", 1)[-1] not in here:
                    names.setdefault(library, set()).add(facts.object_name(obj))
    return [
        Diagnostic("info", min(users), f"may open {library} with dlopen; add it with --also {library}")
        for library, users in sorted(names.items())
    ]


def _threads(facts: Facts) -> Answer:
    """Whether a thread can exist at a fork that may be reached; without forks, whether any is started."""
    answers = {w.threads for w in facts.windows if w.reachable is not Answer.NO}
    if facts.gaps:
        answers.add(Answer.UNKNOWN)
    if not answers:
        answers.add(facts.threads.anywhere(facts.roots))
    if facts.threads.constructors or Answer.YES in answers:
        return Answer.YES
    return Answer.UNKNOWN if Answer.UNKNOWN in answers else Answer.NO


def _thread_sources(facts: Facts) -> tuple[tuple[Frame, ...], ...]:
    """Constructors and fork handlers that start threads, then starts on the way to a fork."""
    sources: list[ThreadSource] = [*facts.threads.constructors, *facts.threads.handlers]
    sources += [w.source for w in facts.windows if w.source is not None]
    unique = {(s.root, s.path): s for s in sources if s.path}
    return tuple(facts.flow.frames(s.path, s.starter) for s in list(unique.values())[:_MAX_SOURCES])


def _allocator(facts: Facts, allocator: AllocatorFacts) -> Allocator:
    flow = facts.flow
    registration = allocator.registration
    chain: tuple[Frame, ...] = ()
    handlers: tuple[str, ...] = ()
    if registration is not None:
        chain = tuple(flow.frame(f, site, "direct") for f, site in registration.chain)
        handlers = tuple(
            flow.name(h.function) if h.function is not None else ("none" if h.is_known else "?")
            for h in registration.handlers
        )
    prepared, uncovered, coverage = _locks(facts, allocator)
    return Allocator(
        object=facts.object_name(allocator.object),
        family=allocator.family,
        version=allocator.version,
        defines=allocator.defines,
        active=allocator.is_active,
        hooks=facts.hooks_of(allocator) if allocator.is_used else allocator.hooks,
        registered_by=chain,
        handlers=handlers,
        registered_from=allocator.registered_from,
        prepare_locks=prepared,
        uncovered_locks=uncovered,
        why=allocator.why,
        coverage=coverage,
    )


def _locks(facts: Facts, allocator: AllocatorFacts) -> tuple[tuple[Lock, ...], tuple[Lock, ...], str]:
    """What the prepare handler takes, what it leaves, and how far that was looked into."""
    locks = facts.locks_of(allocator) if allocator.is_used else None
    if locks is None:
        return (), (), "not judged" if allocator.hooks is Hooks.EFFECTIVE else ""
    program, home = facts.flow.program, allocator.object
    prepared = dict.fromkeys(lock_of(program, value, home) for value in locks.coverage.prepared)
    uncovered = dict.fromkeys(lock_of(program, lock.taken.address, home) for lock in locks.coverage.uncovered)
    unresolved = sum(lock.cover is Cover.UNRESOLVED for lock in locks.coverage.locks)
    return tuple(prepared), tuple(uncovered), f"{unresolved} locks unresolved" if unresolved else "judged"


def _window(facts: Facts, window: WindowFacts) -> Window:
    flow, inner = facts.flow, window.window
    path = flow.frames(window.path, inner.function) if window.root is not None else ()
    return Window(
        forker=inner.forker,
        function=flow.name(inner.function),
        kind=inner.kind,
        handlers_run=inner.handlers_run,
        call_site=flow.frame(inner.function, inner.site, "fork"),
        reachable=window.reachable,
        threads=window.threads,
        path=path,
        outcomes=inner.outcomes,
    )
