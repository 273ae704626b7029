"""What several rules ask of a program: which threads exist at a fork, what its child calls, in which words.

Owns: the parts of a finding's evidence that do not depend on which lock it is about.
Takes: `Facts`. Gives: functions, call edges, frames and sentences.
Must never: rank: that is each rule's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.ahead import Ahead
from forkproof.callgraph import CALLS, CERTAIN, Reach
from forkproof.code.explore import Exploration
from forkproof.columns import among
from forkproof.facts import Facts, WindowFacts
from forkproof.flow import Flow
from forkproof.forks import Level
from forkproof.model import Answer, Finding, Frame, Severity, Verdict, WindowKind
from forkproof.program import Function
from forkproof.threads import JOINED, ThreadSource

FOLLOWED = frozenset({WindowKind.DAEMONIZE, WindowKind.EXEC, WindowKind.EXIT, WindowKind.UNKNOWN})
"""Kinds of windows in which code of the caller's runs."""
_STARTED_NEAR: Final = 6
"""Calls between main and pthread_create, at most, where a thread counts as started in any case."""


def existing_threads(facts: Facts, source: ThreadSource | None) -> list[Function]:
    """What threads that exist at the fork begin in: those of the known source and of constructors."""
    sources = [s for s in (source, *facts.threads.constructors) if s is not None and s.why != JOINED]
    found = [e for s in sources for e in facts.entries_of(s)]
    if source is not None and source.why == "forks from a thread" and facts.flow.main is not None:
        found.append(facts.flow.main)
    return list(dict.fromkeys(found))


def too_early(facts: Facts, source: ThreadSource | None) -> frozenset[int]:
    """Calls by which main holds nothing when another thread forks: it makes them before it starts the first."""
    is_other = source is not None and source.why == "forks from a thread"
    return facts.threads.early if is_other else frozenset()


def other_threads(facts: Facts) -> list[Function]:
    """What any other thread of the program begins in; helper threads of libc's own exist only if asked for."""
    objects, libc = facts.flow.program.object_of, facts.libc.objects
    return [e for e in facts.threads.entries if objects(e) not in libc or len(facts.flow.program.codes) == 1]


def threads_sentence(facts: Facts, window: WindowFacts) -> str:
    """The first condition, in words."""
    if window.threads is Answer.UNKNOWN:
        because = facts.gaps[0] if facts.gaps else "starts of threads are reached through tables only"
        if window.source is not None:
            started = facts.flow.frame(window.source.root, None, "")
            because = f"what {started.function} in {started.object} starts is joined on some ways to the fork"
        return f"whether another thread exists at the fork is not known: {because}"
    source = window.source
    if source is None:
        return "another thread can exist"
    root = facts.flow.frame(source.root, None, "")
    where = f"{root.function} in {root.object}"
    return {
        "forks from a thread": f"{root.function} itself runs in a thread",
        "constructor": f"the constructor {where} starts a thread before main",
        "before the fork": f"{where} starts a thread before it leads to the fork",
        "fork handler": f"the fork handler {where} starts a thread",
    }[source.why]


def starts_near(window: WindowFacts) -> bool:
    """The thread's start is something that the program does as a matter of course before it forks.

    What lies deep below main is mostly started when it is first needed: a logger that connects to its daemon.
    """
    source = window.source
    return source is None or source.why != "before the fork" or len(source.path) <= _STARTED_NEAR


@dataclass(frozen=True, slots=True)
class ChildCall:
    """A call that the child can make, of a function in one of the chosen objects."""

    edge: int
    depth: int
    """Calls between the child's own code and the function that makes it."""


class ChildCalls:
    """What a child calls in some objects from others, each function with the shortest way to it.

    Ways through exec, forkers and ways to die (`dead`: more functions that do not return) end there. `first` are
    functions that the child runs before its own code. No way goes along an edge of `without`. Calls of what makes
    processes count where they lie in the chosen objects and come back in the child itself: system(3), popen(3).
    """

    def __init__(
        self,
        facts: Facts,
        window: WindowFacts,
        objects: Collection[int],
        dead: Collection[Function] = (),
        first: Collection[Function] = (),
        without: Collection[int] = (),
    ) -> None:
        self.graph = facts.flow.graph
        inside = _of_objects(facts, objects)
        ends = [*facts.flow.dying, *facts.flow.execs, *facts.flow.forkers, *dead]
        blocked = np.zeros(self.graph.size, bool)
        blocked[ends] = True
        spawning = [f for f, forker in facts.flow.forkers.items() if forker.kind == "spawn"]
        may_call = ~blocked
        may_call[spawning] |= inside[spawning]
        self.without = frozenset(without)
        edges = [e for f in first for e in facts.flow.outgoing(f) if int(self.graph.kind[e]) in CERTAIN]
        edges += [e for level in window.window.levels for e in level.edges]
        self.own = [e for e in edges if may_call[self.graph.target[e]] and e not in self.without]
        starts = [int(self.graph.target[e]) for e in self.own if not inside[self.graph.target[e]]]
        self.ahead = self.graph.distances(starts, blocked=blocked | inside, without=self.without)
        self._before: dict[Function, int] = {}
        self._begins = {int(self.graph.target[e]): e for e in reversed(self.own)}
        self.all: dict[Function, ChildCall] = {}
        for edge in self.own:
            if inside[self.graph.target[edge]]:
                self.all.setdefault(Function(int(self.graph.target[edge])), ChildCall(edge, 0))
        self._add_farther(inside & may_call)

    def _add_farther(self, wanted: npt.NDArray[np.bool_]) -> None:
        graph, source = self.graph, self.graph.source
        rows = graph.rows_of(np.flatnonzero(self.ahead >= 0))
        called = rows[wanted[graph.target[rows]] & among(graph.kind[rows], _KINDS)]
        called = called[~np.isin(called, list(self.without))]
        order = called[np.lexsort((graph.site[called], source[called], self.ahead[source[called]]))]
        depths = self.ahead[source[order]].tolist()
        for edge, function, depth in zip(order.tolist(), graph.target[order].tolist(), depths, strict=True):
            if function not in self.all:
                self.all[Function(function)] = ChildCall(edge, depth + 1)

    def way(self, call: ChildCall) -> list[int]:
        """The edges from the child's own code to a call, which is the last of them."""
        edges = [call.edge]
        if not call.depth:
            return edges
        here = Function(int(self.graph.source[call.edge]))
        while self.ahead[here] > 0:
            edge = self._before.get(here)
            if edge is None:
                edge = self._before[here] = self._find_before(here)
            edges.append(edge)
            here = Function(int(self.graph.source[edge]))
        edges.append(self._begins[here])
        return edges[::-1]

    def _find_before(self, function: Function) -> int:
        """The first edge by which a shortest way comes to a function: ways to many calls share their beginnings."""
        incoming = self.graph.rows_to(function)
        nearer = self.ahead[self.graph.source[incoming]] == self.ahead[function] - 1
        found: list[int] = incoming[nearer & among(self.graph.kind[incoming], _KINDS)].tolist()
        return min(edge for edge in found if edge not in self.without)


_KINDS: Final = [int(kind) for kind in CERTAIN]


def _of_objects(facts: Facts, objects: Collection[int]) -> npt.NDArray[np.bool_]:
    base = facts.flow.program.base
    inside = np.zeros(facts.flow.graph.size, bool)
    for obj in objects:
        inside[base[obj] : base[obj + 1]] = True
    return inside


def dead_end(facts: Facts, edges: Iterable[int], bodies: Collection[Function] = ()) -> Function | None:
    """The first function on a way that never comes back: a failed assertion, an error handler that exits.

    One that goes round in a loop, as threads do, does not come back either, but the way goes on from there again and
    again. `bodies`: what a child is there to run.
    """
    way = list(edges)
    graph = facts.flow.graph
    for place, edge in enumerate(way):
        following = way[place + 1] if place + 1 < len(way) else None
        target = Function(int(graph.target[edge]))
        site = None if following is None else int(graph.site[following])
        if not facts.flow.returns(target) and target not in bodies and not facts.flow.loops(target, site):
            return target
    return None


def bodies_of_child(facts: Facts, window: WindowFacts) -> list[Function]:
    """The functions that never come back and are all that the child does: `child_main`, and what that ends in.

    Not what is called when something has gone wrong: nothing else ends the child, neither exec nor a call that does not
    come back, and no loop around the call does anything else.
    """
    flow, found = facts.flow, list[Function]()
    for level in window.window.levels:
        own = [e for e in level.edges if Function(int(flow.graph.target[e])) not in flow.dying]
        if level.returns or not any(flow.ends_on(edge) for edge in own):
            continue
        runs, edges = level.runs, list(level.edges)
        while not any(run.returns for run in runs):
            end = _only_end(facts, runs, edges)
            if end is None or end in found or end in flow.dying:
                break
            found.append(end)
            runs, edges = (flow.explored(end),), flow.outgoing(end)
    return found


def _only_end(facts: Facts, runs: Collection[Exploration], edges: Iterable[int]) -> Function | None:
    """The only call of these that does not come back, or execs, but for what is called after a failure."""
    flow, graph = facts.flow, facts.flow.graph
    visited = {t.site for run in runs for t in run.transfers}
    ends, others = set[tuple[Function, int]](), set[int]()
    for edge in edges:
        source, target, site = Function(int(graph.source[edge])), Function(int(graph.target[edge])), graph.site[edge]
        if int(graph.kind[edge]) not in CALLS or int(site) not in visited or int(site) in facts.failures.sites(source):
            continue
        if target in flow.execs or flow.ends_on(edge):
            ends.add((target, int(site)))
        elif flow.program.object_of(target) not in facts.libc.objects:
            others.add(int(site))
    loops_on = any((block := run.block_of(site)) in run.onward(block) for run in runs for site in others)
    return None if loops_on or len(ends) != 1 else next(iter(ends))[0]


def comes_first(flow: Flow, level: Level, first: Collection[int], site: int) -> bool:
    """Every way of the child's in a level to an instruction meets one of some others before it."""
    body = flow.body(level.function)
    return bool(level.runs) and all(
        run.complete and not Ahead(body, level.start, run).comes_to({site}, first) for run in level.runs
    )


def frames_along(facts: Facts, edges: Iterable[int], start: Function) -> tuple[Frame, ...]:
    """Frames of a way that begins in `start`."""
    way = list(edges)
    return facts.flow.frames(way, Function(int(facts.flow.graph.target[way[-1]])) if way else start)


def nearest(candidates: Iterable[Function], reach: Reach) -> Function | None:
    """The candidate from which the way is shortest; the first among equals."""
    reaching = [(int(reach[f]), i, f) for i, f in enumerate(candidates) if reach[f] >= 0]
    return min(reaching)[2] if reaching else None


def child_handlers(facts: Facts, window: WindowFacts) -> list[Function]:
    """What fork runs in the child before it returns there."""
    if not window.window.handlers_run:
        return []
    handlers = (r.handlers[2].function for r in facts.registrations if r.is_effective)
    return [handler for handler in handlers if handler is not None]


def fork_frame(facts: Facts, window: WindowFacts) -> Frame:
    """The call that forks."""
    return facts.flow.frame(window.window.function, window.window.site, "fork")


def folded(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each id, the most severe, with the number that it stands for."""
    kept: dict[str, Finding] = {}
    for finding in findings:
        old = kept.get(finding.id)
        if old is None:
            kept[finding.id] = finding
        else:
            best = min(old, finding, key=lambda f: (f.severity.rank, f.verdict is not Verdict.REACHABLE))
            kept[finding.id] = replace(best, count=old.count + finding.count)
    return list(kept.values())


def rank(answers: Collection[Answer], window: WindowFacts, *, is_ordinary: bool) -> tuple[Severity, Verdict]:
    """High needs every condition, on ways that a program goes while it runs normally.

    Whether the fork is reached counts as a condition; what a library that merely lies in the closure could
    do is never more than low.
    """
    unknown = sum(a is Answer.UNKNOWN for a in answers)
    if window.reachable is not Answer.YES:
        unknown = max(unknown, 1) if window.threads is not Answer.UNKNOWN else unknown
        if not window.is_own or unknown > 1:
            return Severity.LOW, Verdict.SUSPECTED
    if unknown:
        return (Severity.MEDIUM if unknown == 1 and is_ordinary else Severity.LOW), Verdict.SUSPECTED
    ordinary = is_ordinary and not window.is_deferred
    return (Severity.HIGH if ordinary else Severity.MEDIUM), Verdict.REACHABLE


def names_of(values: Iterable[str], limit: int = 8) -> str:
    """A list of names for a sentence, cut where it grows long."""
    names = sorted(set(values))
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
