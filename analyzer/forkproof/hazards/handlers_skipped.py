"""handlers-skipped: a process is created in a way that runs no fork handlers, and its child needs what they do.

Owns: which effective registrations matter to a child: it comes to code of the object that registered them.
Takes: `Facts`. Gives: one `Finding` for each function that forks and object that registers.
Must never: ask for handlers where nothing of the caller's runs (posix_spawn), or where the child only execs.
Wrong where: see the page of the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from forkproof.atfork import Registration
from forkproof.facts import Facts, WindowFacts
from forkproof.hazards.evidence import FOLLOWED, ChildCall, ChildCalls, dead_end, folded, fork_frame, frames_along
from forkproof.locks import lock_functions
from forkproof.model import Answer, Finding, Severity, Verdict, WindowKind
from forkproof.program import Function

_NEAR: Final = 1
"""A child that execs or exits soon goes no deeper as a matter of course."""
_LIVES_NEAR: Final = 4


def find(facts: Facts) -> list[Finding]:
    """All findings about forks that run no handlers."""
    registrations = [r for r in facts.registrations if r.is_effective and _does_something(r)]
    windows = [w for w in facts.windows if _matters(w)] if registrations else []
    return folded(f for w in windows for r in registrations if (f := _of(facts, w, r)) is not None)


def _does_something(registration: Registration) -> bool:
    return any(handler.function is not None or not handler.is_known for handler in registration.handlers)


def _matters(window: WindowFacts) -> bool:
    """A child with a memory of its own, or one of vfork that does not exec."""
    inner = window.window
    if inner.handlers_run or inner.kind not in FOLLOWED or not inner.levels or window.reachable is Answer.NO:
        return False
    return inner.shares_memory is not Answer.YES or inner.kind is not WindowKind.EXEC


def _of(facts: Facts, window: WindowFacts, registration: Registration) -> Finding | None:
    found = _need(facts, window, registration)
    if found is None:
        return None
    edges, call = found
    locks = _locks(facts, registration)
    fork, name = fork_frame(facts, window), facts.object_name(registration.object)
    near = call.depth <= (_LIVES_NEAR if window.window.kind is WindowKind.DAEMONIZE else _NEAR)
    # In shared memory the other threads go on, and give their locks back.
    is_certain = window.window.shares_memory is Answer.NO and window.reachable is Answer.YES
    needs_lock = bool(locks) and window.threads is Answer.YES
    severity = Severity.MEDIUM if near and is_certain and needs_lock else Severity.LOW
    what = "leave locks taken that another thread held" if locks else "leave state of the parent in place"
    handlers = ", ".join(_names(facts, registration))
    return Finding(
        rule="handlers-skipped",
        severity=severity,
        verdict=Verdict.REACHABLE if severity is Severity.MEDIUM else Verdict.SUSPECTED,
        target=facts.target,
        object=name,
        message=f"{window.window.forker} in {fork.function} runs no fork handlers, and its child uses {name}, "
        "which has some",
        why=f"{name} registers {handlers} with {registration.symbol}. Without them the child can {what}: it comes to "
        f"{facts.flow.name(Function(int(facts.flow.graph.target[edges[-1]])))} of {name}.",
        fix=f"Call fork instead of {window.window.forker}, or exec at once.",
        fork=fork,
        requester=frames_along(facts, edges, window.window.function),
    )


def _names(facts: Facts, registration: Registration) -> Iterator[str]:
    for handler in registration.handlers:
        if handler.function is not None:
            yield facts.flow.name(handler.function)
        elif not handler.is_known:
            yield "a handler that was not resolved"


def _need(facts: Facts, window: WindowFacts, registration: Registration) -> tuple[list[int], ChildCall] | None:
    """The shortest way of the child to code of the object that registers the handlers.

    The object that forks knows of its own handlers; there only what takes the same locks counts, which the
    rules about locks see.
    """
    if facts.flow.program.object_of(window.window.function) == registration.object:
        return None
    dead: set[Function] = set()
    while True:
        calls = ChildCalls(facts, window, [registration.object], dead)
        ordered = sorted(calls.all.items(), key=lambda item: (item[1].depth, item[0]))
        if not ordered:
            return None
        edges = calls.way(ordered[0][1])
        end = dead_end(facts, edges[:-1])
        if end is None or end in dead:
            return edges, ordered[0][1]
        dead.add(end)


def _locks(facts: Facts, registration: Registration) -> bool:
    """The prepare handler takes a lock."""
    prepare = registration.handlers[0].function
    if prepare is None:
        return False
    below = facts.flow.graph.distances([prepare])
    evidence = lock_functions(facts.flow, facts.flow.program.object_of(prepare), [prepare]).evidence
    return any(below[f] >= 0 for f in evidence)
