"""Locks that a prepare handler takes and that stay taken, in the child or in the parent: a part of handler-unsafe.

Owns: the comparison of what prepare handlers hold with what the other handlers let go.
Takes: `Facts`. Gives: a `Finding` for each lock and side.
Must never: speak of a lock that anything lets go which it has not taken, or of handlers that were not followed to their
      end: code after the fork may do it as well as a handler.
Wrong where: a lock is let go by an object that does not name it; where the child execs, or ends, without asking for it.

Allocators have a rule of their own for this, atfork-incomplete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from forkproof.atfork import Registration
from forkproof.facts import Facts
from forkproof.locks.chosen import Stores
from forkproof.locks.coverage import prepared_by
from forkproof.locks.identity import Match, is_resolved, lock_of
from forkproof.locks.runs import Held
from forkproof.locks.summary import Summaries, step_frames
from forkproof.locks.values import Object, Value
from forkproof.model import Answer, Finding, Severity, Verdict
from forkproof.program import Function

_SIDES: Final = ("parent", 1), ("child", 2)
_WAITS: Final = {
    "parent": "The thread that forked keeps it: the next that asks for it waits for ever, and so does the next fork.",
    "child": "The child gets it taken by a thread that does not exist there: whoever asks for it first waits for ever.",
}


def find(facts: Facts) -> Iterator[Finding]:
    """What stays locked after a fork that runs handlers."""
    if not any(w.window.handlers_run and w.reachable is not Answer.NO for w in facts.windows):
        return
    effective = [r for r in facts.registrations if r.is_effective]
    allocators = {id(a.registration) for a in facts.allocators}
    own = [r for r in effective if r.object not in facts.libc.objects - {0} and id(r) not in allocators]
    for registration in own:
        prepare = registration.handlers[0].function
        for address in _held(facts, prepare) if prepare is not None else ():
            sides = [side for side, which in _SIDES if not _is_let_go(facts, effective, which, address)]
            if sides and prepare is not None:
                yield _finding(facts, registration, prepare, address, sides)


def _held(facts: Facts, prepare: Function) -> list[Value]:
    """The locks in data that a prepare handler holds at its end, one after the other."""
    held, is_complete = prepared_by(facts.summaries, prepare) if facts.summaries.relevant[prepare] else (Held(), True)
    in_data = [a for a in held if is_complete and is_resolved(a) and isinstance(a.base, Object)]
    return sorted(in_data, key=repr)


def _is_let_go(facts: Facts, registrations: Iterable[Registration], which: int, address: Value) -> bool:
    """A handler of this side lets the lock go, or may; or code outside of handlers does."""
    summaries, handlers = facts.summaries, [r.handlers[which] for r in registrations]
    functions = {h.function for h in handlers if h.function is not None}
    if any(not h.is_known for h in handlers) or any(_calls_unknown(facts, f) for f in functions):
        return True
    others = {h.function for r in registrations for h in r.handlers if h.function is not None} - functions
    naming = Stores(summaries, lambda f: f not in others).naming(address)
    return any(_lets_go(summaries, f, address) for f in sorted({*functions, *naming}))


def _calls_unknown(facts: Facts, function: Function) -> bool:
    program = facts.flow.program
    obj = program.object_of(function)
    return bool(program.codes[obj].unknown_calls[function - int(program.base[obj])])


def _lets_go(summaries: Summaries, function: Function, address: Value) -> bool:
    """A function may let go of a lock that it has not taken, or make it new; or not all of it was seen."""
    run = summaries.interpreted_run(function, frozenset({address}), frozenset({address}), joined=True)
    freed = {*run.releases, *run.let_go, *run.stores}
    taken = {acquire.address for acquire in run.acquires}
    return not run.complete or any(
        summaries.arrays.same(address, f) is not Match.NO for f in freed if f not in taken or f in run.stores
    )


def _finding(facts: Facts, registration: Registration, prepare: Function, address: Value, sides: list[str]) -> Finding:
    flow = facts.flow
    lock = lock_of(flow.program, address, registration.object)
    name = flow.name(prepare)
    path = next((t.path for t in facts.summaries.of(prepare).taken if t.address == address), ())
    waits = " ".join(_WAITS[side] for side in sides)
    missing = " and no ".join(f"{side} handler" for side in sides)
    return Finding(
        rule="handler-unsafe",
        severity=Severity.MEDIUM,
        verdict=Verdict.REACHABLE,
        target=facts.target,
        object=facts.object_name(registration.object),
        message=f"the prepare handler {name} takes {lock.name}, and no {missing} lets it go",
        why=f"{waits} Nothing else was found that lets go of {lock.name} without having taken it.",
        fix=f"Let {lock.name} go in the parent handler and in the child handler: pthread_atfork(lock, unlock, unlock).",
        lock=lock,
        fork=flow.frame(prepare, None, ""),
        requester=step_frames(flow, path),
    )
