"""threads-lost: threads that were started before a daemon forked do not exist in the daemon, which needs them.

Owns: the threads that a daemonizing fork loses, whether its child starts them again, and what shows that it
      relies on them.
Takes: `Facts`. Gives: one `Finding` for each function that forks and thread that is lost.
Must never: speak of a child that execs or exits soon: it is not meant to have its parent's threads.
Wrong where: see the page of the rule.

The evidence that a daemon relies on a thread, strongest first: it waits for a condition variable that the
thread signals; it waits for some condition variable, and the thread signals one; none was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from forkproof.arguments import data_arguments
from forkproof.callgraph import CERTAIN, EdgeKind
from forkproof.facts import Facts, WindowFacts
from forkproof.hazards.evidence import ChildCall, ChildCalls, existing_threads, folded, fork_frame, frames_along
from forkproof.model import Answer, Finding, Frame, Severity, Verdict, WindowKind
from forkproof.program import Function
from forkproof.threads import ThreadSource

_WAKES: Final = ("pthread_cond_signal", "pthread_cond_broadcast", "cnd_signal", "cnd_broadcast", "sem_post")


def find(facts: Facts) -> list[Finding]:
    """All findings about threads that daemons leave behind."""
    windows = [w for w in facts.windows if _matters(w)]
    return folded(finding for window in windows for finding in _of_window(facts, window))


def _matters(window: WindowFacts) -> bool:
    is_daemon = window.window.kind is WindowKind.DAEMONIZE and window.window.shares_memory is Answer.NO
    return is_daemon and window.threads is Answer.YES and window.reachable is Answer.YES and bool(window.window.levels)


def _of_window(facts: Facts, window: WindowFacts) -> Iterator[Finding]:
    child = ChildCalls(facts, window, ())
    for entry in _lost(facts, window, child):
        yield _finding(facts, window, child, entry)


def _lost(facts: Facts, window: WindowFacts, child: ChildCalls) -> list[Function]:
    """What threads begin in that exist at the fork and that neither the child nor a child handler starts again."""
    if window.source is not None and window.source.why == "forks from a thread":
        return []  # the thread that forks lives on; which others there are is not known
    graph = facts.flow.graph
    handlers = [r.handlers[2].function for r in facts.registrations if r.is_effective]
    from_handlers = graph.distances([h for h in handlers if h is not None])
    reached = (child.ahead >= 0) | (from_handlers >= 0)
    for edge in child.own:
        reached[graph.target[edge]] = True
    own = {level.function: {int(graph.site[e]) for e in level.edges} for level in window.window.levels}
    lost = []
    for entry in existing_threads(facts, window.source):
        starts = [e for e in graph.edges_to(entry) if graph.kind[e] == EdgeKind.THREAD]
        again = any(
            reached[graph.source[e]]
            or int(graph.site[e]) in own.get(facts.flow.whole(Function(int(graph.source[e]))), ())
            for e in starts
        )
        if starts and not again and facts.flow.program.object_of(entry) not in facts.libc.objects - {0}:
            lost.append(entry)
    return lost


def _finding(facts: Facts, window: WindowFacts, child: ChildCalls, entry: Function) -> Finding:
    waits, wakes = _waits(facts, child), _wakes(facts, entry)
    same = sorted({cell for cell, _ in waits if cell is not None} & {cell for cell in wakes if cell is not None})
    name, fork = facts.flow.name(entry), fork_frame(facts, window)
    if same:
        severity = Severity.MEDIUM if window.is_deferred or _may_end(facts, window) else Severity.HIGH
        evidence = "it waits for a condition that only this thread was seen to signal"
        edge = next(e for cell, e in waits if cell == same[0])
    else:
        severity = Severity.LOW
        evidence = "whether it relies on the thread was not found"
        edge = None
    return Finding(
        rule="threads-lost",
        severity=severity,
        verdict=Verdict.REACHABLE if severity is Severity.HIGH else Verdict.SUSPECTED,
        target=facts.target,
        object=facts.object_name(facts.flow.program.object_of(entry)),
        message=f"the thread {name} is started before the daemon forks in {fork.function}, and does not exist in it",
        why=f"{_where(facts, window.source)} starts it. A child of fork has one thread; nothing that this one was seen "
        f"to run, no fork handler included, starts {name} again; {evidence}.",
        fix="Start threads after the daemon has forked, or again in it: in its own code, or in a child handler.",
        fork=fork,
        holder=facts.flow.frames(window.source.path, entry) if window.source is not None else (),
        requester=_way(facts, window, child, edge),
    )


def _where(facts: Facts, source: ThreadSource | None) -> str:
    return f"{facts.flow.name(source.root)} ({source.why})" if source is not None else "A constructor"


def _way(facts: Facts, window: WindowFacts, child: ChildCalls, edge: int | None) -> tuple[Frame, ...]:
    if edge is None:
        return ()
    source = Function(int(facts.flow.graph.source[edge]))
    depth = 0 if edge in child.own else int(child.ahead[source]) + 1
    return frames_along(facts, child.way(ChildCall(edge, depth)), window.window.function)


_Cell = tuple[int, int]


def _waits(facts: Facts, child: ChildCalls) -> list[tuple[_Cell | None, int]]:
    """Calls of the child that wait for a condition, with the variable where the code names it."""
    graph = facts.flow.graph
    names = [n for n, f in facts.flow.signatures.locks.items() if f.op == "wait" and f.kind == "condvar"]
    targets = facts.flow.program.called(sorted(names))
    edges = {
        e
        for t in targets
        for e in graph.edges_to(t)
        if child.ahead[graph.source[e]] >= 0 and int(graph.kind[e]) in CERTAIN
    }
    edges |= {e for e in child.own if Function(int(graph.target[e])) in targets}
    return _with_cells(facts, sorted(edges))


def _wakes(facts: Facts, entry: Function) -> list[_Cell | None]:
    """The condition variables that a thread signals."""
    graph = facts.flow.graph
    below = graph.distances([entry])
    targets = facts.flow.program.called(_WAKES)
    edges = [
        e for t in targets for e in graph.edges_to(t) if below[graph.source[e]] >= 0 and int(graph.kind[e]) in CERTAIN
    ]
    return [cell for cell, _ in _with_cells(facts, sorted(edges))]


def _with_cells(facts: Facts, edges: list[int]) -> list[tuple[_Cell | None, int]]:
    program, graph = facts.flow.program, facts.flow.graph
    found: list[tuple[_Cell | None, int]] = []
    for obj in sorted({program.object_of(Function(int(graph.source[e]))) for e in edges}):
        mine = [e for e in edges if program.object_of(Function(int(graph.source[e]))) == obj]
        passed = data_arguments(program, obj, graph.site[np.array(mine, np.int64)], 0)
        for edge in mine:
            word = passed.get(int(graph.site[edge]))
            found.append(((obj, word[0]) if word is not None else _followed(facts, obj, edge), edge))
    return found


def _followed(facts: Facts, obj: int, edge: int) -> _Cell | None:
    """The same, for an address that the function keeps in a register."""
    flow, site = facts.flow, int(facts.flow.graph.site[edge])
    function = flow.whole(Function(int(flow.graph.source[edge])))
    state = flow.state_before(function, site)
    value = state.register(flow.convention.arguments[0]) if state is not None else None
    return (obj, value.offset) if value is not None and value.base is None else None


def _may_end(facts: Facts, window: WindowFacts) -> bool:
    """Threads are joined or cancelled on the way to the fork: this one may have ended before."""
    graph = facts.flow.graph
    ends = facts.flow.program.called([*sorted(facts.flow.signatures.joins.exact), "pthread_cancel"])
    reach = graph.distances(ends, backward=True)
    way = [Function(int(graph.source[e])) for e in window.path]
    return any(
        reach[graph.target[e]] >= 0 for f in way for e in facts.flow.outgoing(f) if int(graph.kind[e]) in CERTAIN
    )
