"""threads-lost: threads that were started before a fork do not exist in its child, which waits for them.

Owns: the threads that a daemonizing fork loses, whether its child starts them again, and what shows that it
      relies on them; for any other child only what shows that.
Takes: `Facts`. Gives: one `Finding` for each function that forks and thread that is lost.
Must never: speak of a child that execs or exits soon for losing threads alone: it is not meant to have its parent's.
Wrong where: see the page of the rule.

The evidence that a child relies on a thread, strongest first: it waits, without end, for a condition variable or a
semaphore that only the thread signals, or at a barrier that the thread comes to; others signal it too; it waits for one
and the thread signals one, and which is not known; none was found. A semaphore that begins with something to take is a
lock, which is `inherited-lock`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from forkproof.callgraph import CALLS, CERTAIN, EdgeKind, Reach
from forkproof.facts import Facts, WindowFacts
from forkproof.flow import Flow
from forkproof.hazards.evidence import (
    FOLLOWED,
    ChildCall,
    ChildCalls,
    comes_first,
    dead_end,
    existing_threads,
    folded,
    fork_frame,
    frames_along,
)
from forkproof.model import Answer, Finding, Frame, Severity, Verdict, WindowKind
from forkproof.program import Function
from forkproof.signals import Call, reached
from forkproof.threads import ThreadSource

_LEAVES: Final = 1
"""Calls below the own code of a child that execs or exits soon at which it waits as a matter of course."""
_LIVES: Final = 4
"""The same for one that lives on,"""
_RUNS: Final = 5
"""and at which a thread signals."""
_FAR: Final = 8
"""Calls below the child's own code at which a team of threads is asked for, at most."""
_TEAM: Final = 2
"""Which argument of libgomp's functions says how many threads are wanted (libgomp_g.h of GCC 12)."""
_TOLD_HOW_MANY: Final = ("omp_set_num_threads",)
"""What tells a library otherwise how many."""
_BARRIER: Final = "pthread_barrier_init"
_PARTIES: Final = 2
"""Which argument of that says how many it waits for."""


class _Reliance(NamedTuple):
    """What shows that a child relies on a thread."""

    severity: Severity
    evidence: str
    wait: Call | None = None
    depth: int = 0


def find(facts: Facts) -> list[Finding]:
    """All findings about threads that children leave behind and wait for."""
    windows = [w for w in facts.windows if _matters(w)]
    return folded(finding for window in windows for finding in _of_window(facts, window))


def _matters(window: WindowFacts) -> bool:
    inner = window.window
    is_apart = inner.kind in FOLLOWED and inner.shares_memory is Answer.NO and bool(inner.levels)
    return is_apart and window.threads is Answer.YES and window.reachable is Answer.YES


def _of_window(facts: Facts, window: WindowFacts) -> Iterator[Finding]:
    child = ChildCalls(facts, window, ())
    yield from _pools(facts, window, child)
    waits = _waits(facts, window, child)
    if not waits and window.window.kind is not WindowKind.DAEMONIZE:
        return
    for entry in _lost(facts, window, child):
        reliance = _reliance(facts, window, child, waits, entry)
        if reliance is not None:
            yield _finding(facts, window, child, entry, reliance)


def _pools(facts: Facts, window: WindowFacts, child: ChildCalls) -> Iterator[Finding]:
    """Threads that a library keeps for the next call of it, which the child makes: it waits for all of them."""
    flow, graph = facts.flow, facts.flow.graph
    asking = [
        e
        for function in flow.program.called(sorted(flow.signatures.pools.exact))
        for e in graph.edges_to(function)
        if int(graph.kind[e]) in CALLS and not _is_alone(flow, e)
    ]
    calls = sorted(
        (0 if e in child.own else int(child.ahead[graph.source[e]]) + 1, e)
        for e in asking
        if e in child.own or child.ahead[graph.source[e]] >= 0
    )
    if not calls:
        return
    # Each thread that calls has a team of its own: another one's is not missed.
    to_asking = graph.distances({int(graph.source[e]) for e in asking}, backward=True)
    before = facts.threads.calls_before(window.window, facts.roots)
    if not any(e in asking or (int(graph.kind[e]) in CERTAIN and to_asking[graph.target[e]] >= 0) for e in before):
        return
    effective = [r for r in facts.registrations if r.is_effective and r.handlers[2].function is not None]
    renewed = {flow.program.object_of(r.outermost) for r in effective} | facts.libc.objects
    is_daemon = window.window.kind is WindowKind.DAEMONIZE
    home_of = flow.program.object_of
    may_be_told = any(
        home_of(Function(int(graph.source[e]))) != home_of(f)
        for f in flow.program.called(_TOLD_HOW_MANY)
        for e in graph.edges_to(f)
    )
    for entry, exists in facts.threads.entries_at(window.window, facts.roots).items():
        home = flow.program.object_of(entry)
        mine = [(d, e) for d, e in calls if flow.program.object_of(Function(int(graph.target[e]))) == home]
        if mine and mine[0][0] <= _FAR and home not in renewed:
            depth, edge = mine[0]
            is_sure = exists is Answer.YES and not window.is_deferred and not may_be_told
            is_sure = is_sure and depth <= (_LIVES if is_daemon else _LEAVES)
            name = flow.name(Function(int(graph.target[edge])))
            evidence = f"{name} counts on those of its library's last call, and waits until each has done its part"
            wait = Call(edge, "pool", frozenset())
            severity = Severity.HIGH if is_sure else Severity.MEDIUM
            yield _finding(facts, window, child, entry, _Reliance(severity, evidence, wait, depth))
            return


def _is_alone(flow: Flow, edge: int) -> bool:
    """A call that asks for one thread."""
    site, caller = int(flow.graph.site[edge]), flow.whole(Function(int(flow.graph.source[edge])))
    return flow.constant_calls.passed(caller, site).get(flow.convention.arguments[_TEAM]) == 1


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


def _waits(facts: Facts, window: WindowFacts, child: ChildCalls) -> list[tuple[int, Call]]:
    """Where the child waits without end, with the calls between its own code and there; the nearest first."""
    graph, own = facts.flow.graph, set(child.own)
    limit = _LIVES if window.window.kind is WindowKind.DAEMONIZE else _LEAVES + 1
    found = []
    for call in facts.signals.waits(lambda e: e in own or child.ahead[graph.source[e]] >= 0):
        depth = 0 if call.edge in own else int(child.ahead[graph.source[call.edge]]) + 1
        is_near = depth <= limit or (window.window.kind is WindowKind.DAEMONIZE and bool(call.cells))
        if is_near and dead_end(facts, child.way(ChildCall(call.edge, depth))[:-1]) is None:
            found.append((depth, call))
    return sorted(found, key=lambda each: (each[0], each[1].edge))


def _reliance(
    facts: Facts,
    window: WindowFacts,
    child: ChildCalls,
    waits: list[tuple[int, Call]],
    entry: Function,
) -> _Reliance | None:
    """The strongest evidence that the child waits for what only this thread gives."""
    is_daemon = window.window.kind is WindowKind.DAEMONIZE
    best = _Reliance(Severity.LOW, "whether it relies on the thread was not found") if is_daemon else None
    below = facts.flow.graph.distances([entry])
    wakes = facts.signals.wakes(reached(below, facts.flow)) if waits else []
    source = facts.flow.graph.source
    others = facts.signals.wakes(lambda e: below[source[e]] < 0) if wakes else []
    for depth, wait in waits:
        mine = [w for w in wakes if w.kind == wait.kind]
        if any(_is_same(wait, w) for w in mine) and not wait.cells & facts.signals.counted:
            rivals = [o for o in others if o.kind == wait.kind and (_is_same(wait, o) or not o.cells)]
            if wait.kind == "barrier" and _is_for_one(facts, window, child, ChildCall(wait.edge, depth)):
                continue
            own = [o for o in rivals if _is_childs(facts, child, o)]
            if wait.kind == "sem" and any(_is_same(wait, o) for o in own):
                continue  # it posts what it waits for: a lock, or a signal of its own
            rivals = [o for o in rivals if wait.kind == "sem" or o not in own]  # nobody wakes himself
            is_hidden = wait.kind == "sem" and facts.signals.may_count_more
            is_sure = not rivals and not is_hidden
            is_sure = is_sure and not window.is_deferred and not _may_end(facts, window)
            is_sure = is_sure and (is_daemon or depth <= _LEAVES)
            found = _Reliance(
                Severity.HIGH if is_sure else Severity.MEDIUM,
                f"it waits for {_NOUNS[wait.kind]} that {'only ' if not rivals else ''}this thread was seen to signal",
                wait,
                depth,
            )
        elif is_daemon and depth <= _LIVES and any(_may_be_same(facts, wait, w, below) for w in mine):
            evidence = f"it waits for {_NOUNS[wait.kind]}, and whether this thread signals that one is not known"
            found = _Reliance(Severity.MEDIUM, evidence, wait, depth)
        else:
            continue
        if best is None or found.severity.rank < best.severity.rank:
            best = found
    return best


_NOUNS: Final = {"condvar": "a condition", "sem": "a semaphore", "barrier": "a barrier"}


def _is_same(wait: Call, wake: Call) -> bool:
    return bool(wait.cells & wake.cells)


def _may_be_same(facts: Facts, wait: Call, wake: Call, below: Reach) -> bool:
    """One of the two words is not known, and the thread comes to its call as a matter of course."""
    is_open = not wait.cells or not wake.cells
    return wait.kind != "sem" and is_open and int(below[facts.flow.graph.source[wake.edge]]) <= _RUNS


def _is_childs(facts: Facts, child: ChildCalls, call: Call) -> bool:
    return call.edge in child.own or child.ahead[facts.flow.graph.source[call.edge]] >= 0


def _is_for_one(facts: Facts, window: WindowFacts, child: ChildCalls, wait: ChildCall) -> bool:
    """Every way of the child's to a barrier makes it anew first, for one: who waits there waits for nobody."""
    flow, graph, begin = facts.flow, facts.flow.graph, child.way(wait)[0]
    making, cells = flow.program.called([_BARRIER]), facts.signals.cells(wait.edge)
    made = {e for e in child.own if graph.target[e] in making and len(cells) == 1 and facts.signals.cells(e) == cells}
    for level in window.window.levels:
        calls = {int(graph.site[e]) for e in made if e in level.edges}
        states = flow.states(level.function, calls)
        alone = {s for s in calls if s in states and flow.passed(level.function, states[s], _PARTIES).constant == 1}
        if begin in level.edges and alone:
            return comes_first(flow, level, alone, int(graph.site[begin]))
    return False


def _finding(facts: Facts, window: WindowFacts, child: ChildCalls, entry: Function, reliance: _Reliance) -> Finding:
    name, fork, severity = facts.flow.name(entry), fork_frame(facts, window), reliance.severity
    is_daemon = window.window.kind is WindowKind.DAEMONIZE
    what = f"the daemon forks in {fork.function}" if is_daemon else f"{fork.function} forks"
    where = "in it" if is_daemon else "in the child, which waits for it"
    fix = "Start threads after the daemon has forked, or again in it: in its own code, or in a child handler."
    if reliance.wait is None or reliance.wait.kind != "pool":
        again = f"nothing that this one was seen to run, no fork handler included, starts {name} again"
        reliance = reliance._replace(evidence=f"{again}; {reliance.evidence}")
    if not is_daemon:
        fix = "Keep what needs the thread out of the child: ask it before the fork, or in the parent."
    return Finding(
        rule="threads-lost",
        severity=severity,
        verdict=Verdict.REACHABLE if severity is Severity.HIGH else Verdict.SUSPECTED,
        target=facts.target,
        object=facts.object_name(facts.flow.program.object_of(entry)),
        message=f"the thread {name} is started before {what}, and does not exist {where}",
        why=f"{_where(facts, window.source)} starts it. A child of fork has one thread; {reliance.evidence}.",
        fix=fix,
        fork=fork,
        holder=facts.flow.frames(window.source.path, entry) if window.source is not None else (),
        requester=_way(facts, window, child, reliance),
    )


def _where(facts: Facts, source: ThreadSource | None) -> str:
    return f"{facts.flow.name(source.root)} ({source.why})" if source is not None else "A constructor"


def _way(facts: Facts, window: WindowFacts, child: ChildCalls, reliance: _Reliance) -> tuple[Frame, ...]:
    if reliance.wait is None:
        return ()
    way = child.way(ChildCall(reliance.wait.edge, reliance.depth))
    return frames_along(facts, way, window.window.function)


def _may_end(facts: Facts, window: WindowFacts) -> bool:
    """Threads are joined or cancelled on the way to the fork: this one may have ended before."""
    graph = facts.flow.graph
    ends = facts.flow.program.called([*sorted(facts.flow.signatures.joins.exact), "pthread_cancel"])
    reach = graph.distances(ends, backward=True)
    way = [Function(int(graph.source[e])) for e in window.path]
    return any(
        reach[graph.target[e]] >= 0 for f in way for e in facts.flow.outgoing(f) if int(graph.kind[e]) in CERTAIN
    )
