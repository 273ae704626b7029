"""handler-unsafe: a fork handler does what can block the fork, or its child, for ever.

Owns: what handlers must not do: wait, load or close libraries, register handlers, start threads, allocate over
      an allocator that is locked meanwhile; what they must do, let go again, is `handlers_keep`'s.
Takes: `Facts`. Gives: one `Finding` for each handler and kind of deed.
Must never: blame a handler for taking a lock: that is what handlers are for.
Wrong where: see the page of the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from forkproof.atfork import REGISTRARS, Registration
from forkproof.callgraph import Reach
from forkproof.facts import Facts
from forkproof.hazards import handlers_keep
from forkproof.hazards.evidence import dead_end, folded, frames_along
from forkproof.model import Finding, Hooks, Severity, Verdict
from forkproof.program import Function

_ROLES: Final = ("prepare", "parent", "child")
_NEAR: Final = 3
"""Calls below a handler that it makes as a matter of course; deeper ways are mostly what it does on errors."""
_EARLY: Final = ("a constructor", "the first allocation")
"""When allocators register that are locked last and unlocked first, as handlers that allocate need it."""


@dataclass(frozen=True, slots=True)
class _Deed:
    """Something that a handler should not do here."""

    what: str
    functions: frozenset[Function]
    severity: Severity
    why: str
    fix: str


def find(facts: Facts) -> list[Finding]:
    """All findings about registered handlers."""
    if not any(registration.is_effective for registration in facts.registrations):
        return []
    deeds = (
        finding
        for registration in facts.registrations
        if registration.is_effective and registration.object not in facts.libc.objects - {0}
        for role, handler in zip(_ROLES, registration.handlers, strict=True)
        if handler.function is not None
        for finding in _of_handler(facts, registration, role, handler.function)
    )
    return folded((*deeds, *handlers_keep.find(facts)))


def _of_handler(facts: Facts, registration: Registration, role: str, handler: Function) -> Iterator[Finding]:
    ahead = facts.flow.graph.distances([handler])
    for deed in _deeds(facts, registration, role):
        edges = _way(facts, handler, deed.functions, ahead)
        if edges is None:
            continue
        name = facts.flow.name(handler)
        severity = deed.severity if len(edges) <= _NEAR else Severity.LOW
        if deed.severity is Severity.NOTE and len(edges) > _NEAR:
            continue
        yield Finding(
            rule="handler-unsafe",
            severity=severity,
            verdict=Verdict.REACHABLE if severity is Severity.HIGH else Verdict.SUSPECTED,
            target=facts.target,
            object=facts.object_name(registration.object),
            message=f"the {role} handler {name} {deed.what}",
            why=deed.why,
            fix=deed.fix,
            fork=facts.flow.frame(handler, None, ""),
            requester=frames_along(facts, edges, handler),
        )


def _way(facts: Facts, handler: Function, goals: frozenset[Function], ahead: Reach) -> list[int] | None:
    """The shortest way from a handler to one of the goals, neither to die nor inside a lock function.

    `ahead`: what the handler leads to, which is little: the goals, such as malloc, are called from everywhere.

    Locking is what handlers are for, and what libc's own lock functions do for rare kinds of mutexes is not.
    """
    locks = facts.flow.signatures.locks
    names = [n for n, f in locks.items() if f.op in ("acquire", "try", "release")]
    dead: set[Function] = set(facts.flow.program.called(names))
    if not any(ahead[goal] >= 0 for goal in goals):
        return None
    while True:
        blocked = ahead < 0
        blocked[[f for f in (*facts.flow.dying, *dead) if f not in goals]] = True
        reach = facts.flow.graph.distances(goals, backward=True, blocked=blocked, until=[handler])
        edges = facts.flow.graph.path(handler, reach)
        if not edges:
            return None
        end = dead_end(facts, edges[:-1])
        if end is None or end in dead:
            return edges
        dead.add(end)


def _deeds(facts: Facts, registration: Registration, role: str) -> Iterator[_Deed]:
    yield from _under_the_list_lock(facts)
    yield _waits(facts, role)
    if role == "child":
        yield _starts_threads(facts)
    yield from _allocates(facts, registration, role)


def _named(facts: Facts, names: tuple[str, ...]) -> frozenset[Function]:
    return frozenset(facts.flow.program.called(names))


def _under_the_list_lock(facts: Facts) -> Iterator[_Deed]:
    """What takes the lock of the list of handlers, which some versions of libc hold while they run."""
    held = facts.flow.signatures.holds_handler_lock(facts.libc.id, facts.libc.version)
    title = facts.libc.title
    if held is None:
        return
    waits = f"{title} holds the lock of its list of handlers while it runs them, and this takes the same lock"
    dropped = f"{title} drops the lock of its list of handlers around each handler; earlier versions hold it, and hang"
    severity = Severity.HIGH if held else Severity.NOTE
    yield _Deed(
        "registers fork handlers", _named(facts, REGISTRARS), severity, f"{waits if held else dropped}.",
        "Register handlers where the library starts, never from a handler.",
    )  # fmt: skip
    if facts.libc.id == "glibc":
        yield _Deed(
            "closes a library", _named(facts, ("dlclose",)), severity,
            f"dlclose removes the fork handlers of what it closes. {waits if held else dropped}.",
            "Close libraries outside of fork handlers.",
        )  # fmt: skip


def _waits(facts: Facts, role: str) -> _Deed:
    """Waiting for another thread: in the child there is none, in the parent it may wait for the fork."""
    names = sorted(facts.flow.signatures.blocking.exact)
    why = (
        "The child has one thread: what it waits for never comes."
        if role == "child"
        else "The fork waits as long as this waits; a thread that it waits for may itself wait for a lock that an "
        "earlier handler took."
    )
    severity = Severity.MEDIUM if role == "child" else Severity.LOW
    return _Deed("waits for another thread or for time", frozenset(facts.flow.program.called(names)), severity, why,
                 "Quiesce by taking locks; let handlers neither wait for threads nor sleep.")  # fmt: skip


def _starts_threads(facts: Facts) -> _Deed:
    return _Deed(
        "starts a thread",
        facts.threads.primitive_starters,
        Severity.LOW,
        "The new thread runs at once, in a child that still has the locks which threads of the parent held; "
        "pthread_create itself allocates. A second fork then happens in a program with threads.",
        "Start threads in the child's own code, after the fork has returned.",
    )


def _allocates(facts: Facts, registration: Registration, role: str) -> Iterator[_Deed]:
    """Allocating over an allocator whose own handlers run around this one, while it is locked.

    Prepare handlers run in the reverse order of registration, the others in the order: an allocator that
    registered first is locked last and unlocked first.
    """
    for allocator in facts.allocators:
        is_locked_meanwhile = (
            allocator.is_used
            and allocator.hooks is Hooks.EFFECTIVE
            and allocator.object != registration.object
            and allocator.registered_from not in _EARLY
        )
        if is_locked_meanwhile:
            name = facts.object_name(allocator.object)
            yield _Deed(
                f"allocates, while {name} may be locked",
                frozenset(allocator.entries),
                Severity.MEDIUM if role == "prepare" else Severity.LOW,
                f"{name} registers its own handlers late, from {allocator.registered_from}. If that comes after this "
                f"handler's registration, it is locked before this handler runs, and the allocation waits for ever.",
                f"Register the handlers of {name} first, at its first allocation, or allocate nothing in handlers.",
            )  # fmt: skip
