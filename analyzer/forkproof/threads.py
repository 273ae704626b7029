"""Whether another thread can exist when a fork window opens, and where it comes from.

Owns: the three sources of a thread before a fork: constructors, code that runs before the fork on the
      way from main, and fork handlers; and what those threads run.
Takes: `Flow`, fork windows and registrations. Gives: `ThreadSource`s and an answer for each window.
Must never: answer "no" where a start could not be followed: that is "unknown".
Wrong where: a path exists in the code but never runs with the program's real input (then "yes" is too
      strong); threads started through pointers are seen only as table edges (then "unknown").
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.atfork import Registration
from forkproof.callgraph import CERTAIN, CallGraph, EdgeKind, Reach
from forkproof.code.explore import CallEffect, Effects, Exploration, explore
from forkproof.columns import unique
from forkproof.flow import Flow
from forkproof.forks import ForkWindow, Level
from forkproof.given import Given
from forkproof.joins import Joins
from forkproof.model import Answer, WindowKind
from forkproof.program import Function
from forkproof.signals import Signals
from forkproof.tables import reached_loosely
from forkproof.thread_requests import requests

_IN_THREADS: Final = CERTAIN | {EdgeKind.THREAD}
JOINED: Final = "perhaps joined"
"""Why a thread that was started may not exist at the fork."""
_MAX_FUNCTIONS: Final = 60
"""Functions on the way to a window whose control flow is followed."""
_ROUNDS: Final = 3
"""Functions that are called later and register one another, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class _Registered:
    """Where what comes to a fork is registered to be called later: by an event loop, for a signal, at exit."""

    edges: frozenset[int]
    """From those who register it."""
    reach: Reach
    """Number of calls from each function to one that does."""


@dataclass(frozen=True, slots=True)
class ThreadSource:
    """A root from which a thread is started before (or at) a fork."""

    why: str
    """constructor, before the fork, fork handler, or forks from a thread; `JOINED`: it may be gone."""
    root: Function
    path: tuple[int, ...]
    """Edges from the root to the call that starts the thread."""
    starter: Function


class Threads:
    """Thread starts of one program."""

    def __init__(
        self,
        flow: Flow,
        registrations: Iterable[Registration],
        libc_objects: frozenset[int],
        roots: tuple[Function, ...],
    ) -> None:
        self.flow = flow
        self.roots, self.libc_objects = roots, libc_objects
        # libc's own tables (stdio, gconv, NSS) start no thread; the functions of libc that do are called by name.
        self.table_objects = [o for o in range(len(flow.program.codes)) if o not in libc_objects or o == 0]
        self.graph: CallGraph = flow.graph
        self.registrations = tuple(registrations)
        self.may_clone = False
        self.windows: tuple[ForkWindow, ...] = ()
        self._told: dict[int, bool] = {}
        self._run_with: dict[tuple[Function, tuple[tuple[str, int], ...]], Exploration] = {}
        self._loose: dict[tuple[Function, ...], npt.NDArray[np.bool_]] = {}
        self._ordered: dict[tuple[Function, ...], Reach] = {}
        self._to_windows: dict[Function, Reach] = {}

    @cached_property
    def starters(self) -> frozenset[Function]:
        """Functions that start a thread: the ones that signatures name, in whichever object."""
        # Those that must be asked call one of the others; `harmless` leaves out the calls that do not ask.
        known = self.flow.signatures.thread_starters
        return frozenset(self.flow.program.called([n for n, starter in known.items() if starter.structure is None]))

    @cached_property
    def are_hidden(self) -> bool:
        """Starts cannot be recognised: a library is missing, or a static program has no names."""
        return bool(self.flow.program.closure.missing) or self.flow.program.is_nameless

    def note_windows(self, windows: Iterable[ForkWindow]) -> None:
        """The program's forks, of which two things matter here.

        Clone calls of its own whose flags are not known may start threads as well as processes; and what only
        the child of a fork does is not done by its parent.
        """
        self.windows = tuple(windows)
        own = (w for w in self.windows if self.flow.program.object_of(w.function) == 0)
        self.may_clone = any(w.shares_memory is Answer.UNKNOWN for w in own)

    @cached_property
    def primitive_starters(self) -> frozenset[Function]:
        """pthread_create and its like: starters that do not themselves call a starter."""
        return frozenset(f for f in self.starters if not self._calls_starter(f)) or self.starters

    def _calls_starter(self, function: Function) -> bool:
        graph = self.graph
        return any(
            Function(int(graph.target[e])) in self.starters and graph.target[e] != function
            for e in graph.edges_from(function)
            if int(graph.kind[e]) in CERTAIN
        )

    @cached_property
    def to_start(self) -> Reach:
        """Distance of every function to the start of a thread."""
        return self.graph.distances(self.primitive_starters, backward=True, without=self.harmless)

    @cached_property
    def joins(self) -> Joins:
        """Which of the threads that are started have ended again."""
        return Joins(self.flow, self.to_start, self.harmless, lambda: self.signals)

    @cached_property
    def given(self) -> Given:
        """What threads and exit handlers are given."""
        return Given(self.flow)

    @cached_property
    def signals(self) -> Signals:
        """Who waits for what, and who wakes whom."""
        return Signals(self.flow, self.given, self.libc_objects)

    @cached_property
    def harmless(self) -> frozenset[int]:
        """Calls of functions that start a thread only if asked to, and are not shown to be: most timers."""
        unasked = frozenset(edge for edge, answer in self._asked.items() if answer is not Answer.YES)
        starts = [e for f in self.primitive_starters for e in self.graph.edges_to(f)]
        return unasked.union(e for e in starts if int(self.graph.kind[e]) in CERTAIN and self.flow.is_dead(e))

    @cached_property
    def may_ask(self) -> bool:
        """Something that may run calls such a function, and what it asks for is not known."""
        reached = self.loosely_reached(self.roots)
        unknown = [edge for edge, answer in self._asked.items() if answer is Answer.UNKNOWN]
        return any(reached[self.graph.source[edge]] for edge in unknown)

    @cached_property
    def _asked(self) -> Mapping[int, Answer]:
        return requests(self.flow)

    @cached_property
    def entries(self) -> tuple[Function, ...]:
        """Functions that threads begin in, where the call shows them and something may reach it."""
        graph = self.graph
        starts = np.flatnonzero(graph.kind == EdgeKind.THREAD)
        starts = starts[self.loosely_reached(self.roots)[graph.source[starts]]]
        return tuple(Function(f) for f in unique(graph.target[starts]).tolist())

    @cached_property
    def from_entries(self) -> Reach:
        """Distance of every function from a thread's entry."""
        return self.graph.distances(self.entries)

    @cached_property
    def constructors(self) -> tuple[ThreadSource, ...]:
        """Constructors that start threads: the program's own first, then libraries in load order."""
        return tuple(
            source
            for root in constructor_functions(self.flow)
            if (source := self._source("constructor", root)) is not None
        )

    @cached_property
    def handlers(self) -> tuple[ThreadSource, ...]:
        """Fork handlers that start threads."""
        found = {h.function for r in self.registrations if r.is_effective for h in r.handlers if h.function is not None}
        sources = (self._source("fork handler", root) for root in sorted(found))
        return tuple(s for s in sources if s is not None)

    def _to_window(self, window: ForkWindow) -> Reach:
        """Distance of every function to the one that forks."""
        known = self._to_windows.get(window.function)
        if known is None:
            known = self._to_windows[window.function] = self.graph.distances([window.function], backward=True)
        return known

    def _source(self, why: str, root: Function) -> ThreadSource | None:
        path = self.graph.path(root, self.to_start, without=self.harmless)
        if path is None:
            return None
        if not self.joins.leaves(root):
            return None
        starter = Function(int(self.graph.target[path[-1]])) if path else root
        return ThreadSource(why, root, tuple(path), starter)

    def before(
        self, window: ForkWindow, roots: tuple[Function, ...], from_roots: Reach
    ) -> tuple[Answer, ThreadSource | None]:
        """Whether a thread can exist when the window opens, with the evidence for yes."""
        if self.constructors:
            return Answer.YES, self.constructors[0]
        if self.from_entries[window.function] >= 0:
            return Answer.YES, ThreadSource("forks from a thread", window.function, (), window.function)
        happens_once = window.kind is WindowKind.DAEMONIZE
        found = self._on_the_way(window, from_roots, strictly=happens_once)
        if found is not None:
            return Answer.YES, found
        if happens_once and self._on_the_way(window, from_roots, strictly=False) is not None:
            return Answer.UNKNOWN, None  # only in a second round of a loop, but a program becomes a daemon once
        found = self._on_the_way(window, from_roots, strictly=False, perhaps_ended=True)
        if found is not None:
            return Answer.UNKNOWN, replace(found, why=JOINED)
        found = self._once_registered(window, from_roots)
        if found is not None:
            return Answer.UNKNOWN if found.why == JOINED else Answer.YES, found
        if self.are_hidden or self.may_clone or self.may_ask or self._may_come_first(window, roots):
            return Answer.UNKNOWN, None
        return Answer.NO, None

    @cached_property
    def early(self) -> frozenset[int]:
        """Calls that main makes only before it starts the first thread: no other thread runs meanwhile."""
        main = self.flow.main
        if main is None or self.constructors:
            return frozenset()
        sites = {e: int(self.graph.site[e]) for e in self.flow.outgoing(main)}
        starts = {site for e, site in sites.items() if self._starts_something(e)}
        run = self.flow.explored(main)
        late = {site for site in sites.values() if any(site == start or run.leads(start, site) for start in starts)}
        return frozenset(e for e, site in sites.items() if starts and site not in late)

    def is_later(self, window: ForkWindow, site: int) -> bool:
        """What main does at this site it does only after the fork: main runs once."""
        main, graph = self.flow.main, self.graph
        if main is None:
            return False
        to_window = self._to_window(window)
        edges = [e for e in self.flow.outgoing(main) if to_window[graph.target[e]] >= 0]
        forks = {int(graph.site[e]) for e in edges}
        forks |= {window.site} if main == window.function else set()
        if not forks or site in forks:  # one call of main does both
            return False
        if any(graph.kind[e] == EdgeKind.DEFERRED for e in edges):  # that is not when it forks
            return False
        run = self.flow.explored(main)
        return not any(run.leads(site, fork) for fork in forks)

    def entries_at(self, window: ForkWindow, roots: tuple[Function, ...]) -> Mapping[Function, Answer]:
        """What the threads that can exist at a fork begin in, the one that forks left out.

        Yes where a thread's start comes before the fork, unknown where its time is not known. Those that start only
        after the fork are not among them.
        """
        graph = self.graph
        from_roots = graph.distances(roots, _IN_THREADS, without=self.harmless)
        to_window = self._to_window(window)
        sure, doubtful = self._calls_before(window, from_roots, to_window)
        own = self._sites_of_child(window)
        if own is not None:
            return self._entries_in_child(frozenset(e for e in sure if int(graph.site[e]) in own))
        elsewhere = self._done_by_others(window, to_window) | self.harmless
        forks_in_thread = self.from_entries[window.function] >= 0
        first = [*constructor_functions(self.flow), *(roots if forks_in_thread else ())]
        is_before = self._reached(first, sure, elsewhere)
        may_be = self._reached(first, sure | doubtful, elsewhere) | (from_roots < 0)
        found: dict[Function, Answer] = {}
        if forks_in_thread and self.flow.main is not None:
            found[self.flow.main] = Answer.YES
        for edge, source, entry in self._starts(self.loosely_reached(roots)):
            is_other = not (forks_in_thread and to_window[entry] >= 0)
            if is_other and (is_before[source] or edge in sure):
                found[entry] = Answer.YES
            elif from_roots[window.function] < 0 or is_before[source] or may_be[source] or edge in doubtful:
                found.setdefault(entry, Answer.UNKNOWN)
        return found

    def calls_before(self, window: ForkWindow, roots: tuple[Function, ...]) -> frozenset[int]:
        """The calls that surely come before a fork, on the ways that lead to it."""
        from_roots = self.graph.distances(roots, _IN_THREADS, without=self.harmless)
        sure, _ = self._calls_before(window, from_roots, self._to_window(window))
        own = self._sites_of_child(window)
        return sure if own is None else frozenset(e for e in sure if int(self.graph.site[e]) in own)

    def _entries_in_child(self, sure: frozenset[int]) -> Mapping[Function, Answer]:
        """Only one thread came through the earlier fork; others are those that the child or a handler has started."""
        handlers = [r.handlers[2].function for r in self.registrations if r.is_effective]
        reached = self._reached((h for h in handlers if h is not None), sure, self.harmless)
        everything = np.ones(self.graph.size, bool)
        return {entry: Answer.YES for e, source, entry in self._starts(everything) if reached[source] or e in sure}

    def _starts(self, among: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int, Function]]:
        """Edges that start a thread, with the function that does and what the thread begins in."""
        graph = self.graph
        for edge in np.flatnonzero((graph.kind == EdgeKind.THREAD) & among[graph.source]).tolist():
            if self.flow.is_dead(edge):
                continue
            yield edge, int(graph.source[edge]), Function(int(graph.target[edge]))

    def _reached(
        self, first: Iterable[Function], edges: frozenset[int], elsewhere: frozenset[int]
    ) -> npt.NDArray[np.bool_]:
        """What runs from these functions on, and along these edges, in threads that are started there too."""
        targets = [int(self.graph.target[e]) for e in edges]
        found: npt.NDArray[np.bool_] = self.graph.distances([*first, *targets], _IN_THREADS, without=elsewhere) >= 0
        return found

    def _sites_of_child(self, window: ForkWindow) -> frozenset[int] | None:
        """If only the child of another fork makes this one, the calls of the same function that only it makes."""
        parts = [
            level.parted
            for other in self.windows
            for level in other.levels
            if level.function == window.function and level.site != window.site and window.site in level.parted
        ]
        return frozenset().union(*parts) if parts else None

    def _calls_before(
        self, window: ForkWindow, from_roots: Reach, to_window: Reach
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Edges that are taken before the fork on the way to it, and those that may be, but only in another round.

        What happens once, as becoming a daemon does, is not preceded by what a loop does after it.
        """
        graph, flow = self.graph, self.flow
        sure, doubtful = set[int](), set[int]()
        registered = self._registered(to_window)
        on_a_way = (from_roots >= 0) & ((to_window >= 0) | (registered.reach >= 0))
        on_a_way[window.function] = True  # who may call it is another matter
        between = np.flatnonzero(on_a_way)
        order = between[np.lexsort((between, from_roots[between]))]
        for number in order[:_MAX_FUNCTIONS].tolist():
            function = flow.whole(Function(number))
            edges = [e for e in flow.outgoing(function) if int(graph.kind[e]) in (*CERTAIN, EdgeKind.THREAD)]
            starts = [e for e in edges if self._starts_something(e)]
            forks = self._fork_sites(function, edges, window, to_window) if starts else set()
            for edge, answer in self._meanwhile(function, starts, registered).items():
                (sure if answer is Answer.YES else doubtful).add(edge)
            if not forks:
                continue
            run = self.flow.explored(function)
            starts = [e for e in starts if self._is_before(run, e, forks) and not self._is_told_not_to(e)]
            starts = [e for e in starts if e not in self.joins.told(function, starts, forks)]
            ended = self.joins.ended(function, starts, forks)
            is_once = window.kind is WindowKind.DAEMONIZE
            for edge in starts:
                again = is_once and self._is_after(run, edge, forks)
                if ended[edge] is not Answer.YES:
                    (doubtful if again or ended[edge] is Answer.UNKNOWN else sure).add(edge)
        return frozenset(sure), frozenset(doubtful - sure)

    # ---- forks of what is called later -------------------------------------------------------

    def _registered(self, to_window: Reach) -> _Registered:
        """Who registers what comes to a fork, or what registers that in its turn."""
        graph = self.graph
        deferred = np.flatnonzero(graph.kind == EdgeKind.DEFERRED)
        ends = graph.target[deferred]
        reach: Reach = np.full(graph.size, -1, np.int32)
        found = deferred[:0]
        for _ in range(_ROUNDS):
            edges = deferred[(to_window[ends] >= 0) | (reach[ends] >= 0)]
            if len(edges) == len(found):
                break
            found, reach = edges, graph.distances(graph.source[edges].tolist(), backward=True)
        return _Registered(frozenset(found.tolist()), reach)

    def _once_registered(self, window: ForkWindow, from_roots: Reach) -> ThreadSource | None:
        """A call that starts a thread, where what forks may be called at any time: before it was registered, or after.

        `JOINED` where the thread may have been joined by then, since the time of the fork is not known.
        """
        graph, flow = self.graph, self.flow
        registered = self._registered(self._to_window(window))
        if not registered.edges:
            return None
        between = np.flatnonzero((from_roots >= 0) & (registered.reach >= 0) & (self.to_start >= 0))
        order = between[np.lexsort((between, from_roots[between]))]
        perhaps: ThreadSource | None = None
        for number in order[:_MAX_FUNCTIONS].tolist():
            function = flow.whole(Function(number))
            edges = [e for e in flow.outgoing(function) if int(graph.kind[e]) in CERTAIN and e not in self.harmless]
            starts = [e for e in edges if self.to_start[graph.target[e]] >= 0]
            answers = self._meanwhile(function, starts, registered)
            for edge in sorted(answers, key=lambda e: (self.to_start[graph.target[e]], graph.site[e])):
                rest = graph.path(Function(int(graph.target[edge])), self.to_start, without=self.harmless) or []
                starter = Function(int(graph.target[rest[-1] if rest else edge]))
                source = ThreadSource("before the fork", function, (edge, *rest), starter)
                if answers[edge] is Answer.YES:
                    return source
                perhaps = perhaps or replace(source, why=JOINED)
        return perhaps

    def _meanwhile(self, function: Function, starts: Iterable[int], registered: _Registered) -> Mapping[int, Answer]:
        """Those of a function's calls that start a thread which it also makes on a way that registers what forks."""
        graph = self.graph
        sites = {
            int(graph.site[e])
            for e in self.flow.outgoing(function)
            if e in registered.edges or (int(graph.kind[e]) in CERTAIN and registered.reach[graph.target[e]] >= 0)
        }
        if not sites:
            return {}
        run = self.flow.explored(function)
        found = [
            e
            for e in starts
            if (self._is_before(run, e, sites) or self._is_after(run, e, sites)) and not self._is_told_not_to(e)
        ]
        ended = self.joins.ended(function, found, sites)
        leaves = self.joins.leaves(function)
        return {e: Answer.YES if leaves and ended[e] is Answer.NO else Answer.UNKNOWN for e in found}

    # ---- order -------------------------------------------------------------------------------

    def _is_before(self, run: Exploration, edge: int, sites: Iterable[int]) -> bool:
        """Control can go from a call to one of these sites."""
        return not self.flow.is_dead(edge) and any(run.leads(int(self.graph.site[edge]), site) for site in sites)

    def _is_after(self, run: Exploration, edge: int, sites: Iterable[int]) -> bool:
        """Control can come to a call from one of these sites."""
        return any(run.leads(site, int(self.graph.site[edge])) for site in sites)

    def _starts_something(self, edge: int) -> bool:
        """The edge is the start of a thread, or a call that leads to one."""
        return bool(int(self.graph.kind[edge]) == EdgeKind.THREAD or self.to_start[self.graph.target[edge]] >= 0)

    def _is_told_not_to(self, edge: int) -> bool:
        """The call passes constants with which its target starts no thread, as in `reload(false)`."""
        if edge not in self._told:
            self._told[edge] = self._starts_nothing(edge)
        return self._told[edge]

    def _starts_nothing(self, edge: int) -> bool:
        target = self.flow.whole(Function(int(self.graph.target[edge])))
        starts = {int(self.graph.site[e]) for e in self.flow.outgoing(target) if self._starts_something(e)}
        return bool(starts) and target not in self.starters and self._leads_past(edge, starts)

    def _fork_sites(self, function: Function, edges: Iterable[int], window: ForkWindow, to_window: Reach) -> set[int]:
        """Where a function forks, or calls what comes to the fork, unless it passes constants with which that does
        not, as in `start_up(0)` where 1 makes a daemon of the program."""
        found = {window.site} if function == window.function else set[int]()
        for edge in edges:
            target = int(self.graph.target[edge])
            if to_window[target] >= 0 and not (target == window.function and self._leads_past(edge, {window.site})):
                found.add(int(self.graph.site[edge]))
        return found

    def _leads_past(self, edge: int, sites: Collection[int]) -> bool:
        """The call passes constants with which its target comes to none of these instructions of its own."""
        flow, graph = self.flow, self.graph
        caller, target = flow.whole(Function(int(graph.source[edge]))), flow.whole(Function(int(graph.target[edge])))
        state = flow.state_before(caller, int(graph.site[edge])) if int(graph.kind[edge]) in CERTAIN else None
        if state is None:
            return False
        passed = {name: state.register(name) for name in flow.convention.arguments}
        constants = {name: value.offset for name, value in passed.items() if value is not None and value.base is None}
        if not constants:
            return False
        key = target, tuple(sorted(constants.items()))
        run = self._run_with.get(key)
        if run is None:
            run = self._run_with[key] = flow.explore_from(target, flow.program.rva_of(target), constants)
        return run.complete and run.visited.isdisjoint(sites)

    def _may_come_first(self, window: ForkWindow, roots: tuple[Function, ...]) -> bool:
        """A thread may be started, or the fork be made, by code whose time is not known.

        That is code which only an address leads to: a table, an event loop, a signal. Where it can fork, every start
        that the program makes may have come before.
        """
        starts = self.to_start >= 0
        from_roots = self._in_order(roots)
        only_loosely = self.loosely_reached(roots) & (from_roots < 0)
        if np.any(only_loosely & starts):
            return True
        to_window = self._to_window(window) >= 0
        return bool(np.any(only_loosely & to_window) and np.any((from_roots >= 0) & starts))

    def _in_order(self, roots: tuple[Function, ...]) -> Reach:
        """Distance of every function from the roots, by calls that are made when they stand there."""
        if roots not in self._ordered:
            self._ordered[roots] = self.graph.distances(roots, _IN_THREADS)
        return self._ordered[roots]

    def anywhere(self, roots: tuple[Function, ...]) -> Answer:
        """Whether the program starts threads at all, forks or not."""
        if any(self.to_start[r] >= 0 for r in roots):
            return Answer.YES
        return Answer.UNKNOWN if np.any(self.loosely_reached(roots) & (self.to_start >= 0)) else Answer.NO

    def _on_the_way(
        self, window: ForkWindow, from_roots: Reach, *, strictly: bool, perhaps_ended: bool = False
    ) -> ThreadSource | None:
        """A call that starts a thread and can come before the call that leads to the fork.

        `strictly`: and cannot come after it, as it can in a loop around both. `perhaps_ended`: also one whose thread is
        joined on some ways.

        1. take the functions that lie between a root and the window, nearest to a root first;
        2. in each, a call that reaches a start must be able to run before one that reaches the window.
        """
        graph, flow = self.graph, self.flow
        to_window = self._to_window(window)
        others = self._done_by_others(window, to_window)
        elsewhere = others | self.harmless
        to_start = self.to_start
        if others:
            to_start = graph.distances(self.primitive_starters, backward=True, without=elsewhere)
        on_a_way = (from_roots >= 0) & (to_window >= 0) & (to_start >= 0)
        on_a_way[window.function] = to_start[window.function] >= 0  # who may call it is another matter
        between = np.flatnonzero(on_a_way)
        order = between[np.lexsort((between, from_roots[between]))]
        for function in order[:_MAX_FUNCTIONS].tolist():
            edge = self._ordered_call(
                flow.whole(Function(function)), window, to_window, to_start, elsewhere, strictly, perhaps_ended
            )
            if edge is not None:
                rest = graph.path(Function(int(graph.target[edge])), to_start, without=elsewhere) or []
                last = rest[-1] if rest else edge
                path = (edge, *rest)
                return ThreadSource("before the fork", Function(function), path, Function(int(graph.target[last])))
        return None

    def _done_by_others(self, window: ForkWindow, to_window: Reach) -> frozenset[int]:
        """Calls that lead to a start, but are made only by children that never come to this window."""
        return frozenset().union(
            *(edges for other, edges in self._own_of_children if not self._comes_to(other, window, to_window))
        )

    def _comes_to(self, other: ForkWindow, window: ForkWindow, to_window: Reach) -> bool:
        """The child of one fork may make another, or it is not known."""
        graph = self.graph
        return not other.is_complete or any(
            to_window[graph.target[e]] >= 0 or (level.function == window.function and graph.site[e] == window.site)
            for level in other.levels
            for e in level.edges
        )

    @cached_property
    def _own_of_children(self) -> list[tuple[ForkWindow, frozenset[int]]]:
        """For each fork, the calls that lead to a start of a thread and are made by its child alone."""
        found = ((w, frozenset(e for level in w.levels for e in self._own_calls(level))) for w in self.windows)
        return [(window, edges) for window, edges in found if edges]

    def _own_calls(self, level: Level) -> list[int]:
        """What the child does here is its own if the parent cannot come there, neither before the fork nor after."""
        flow, graph = self.flow, self.graph
        calls = [e for e in level.edges if graph.site[e] in level.parted and self.to_start[graph.target[e]] >= 0]
        if not calls or not level.parent_values:  # where memory alone tells them apart, what went before is not known
            return []
        runs = [
            explore(
                flow.body(level.function),
                flow.machine,
                flow.program.rva_of(level.function),
                effects=_with_result(flow.effects(level.function), level.site, value),
            )
            for value in level.parent_values
        ]
        return [e for e in calls if not any(int(graph.site[e]) in run.visited for run in runs)]

    def _ordered_call(
        self,
        function: Function,
        window: ForkWindow,
        to_window: Reach,
        to_start: Reach,
        elsewhere: frozenset[int],
        strictly: bool,
        perhaps_ended: bool,
    ) -> int | None:
        graph = self.graph
        edges = [e for e in self.flow.outgoing(function) if int(graph.kind[e]) in CERTAIN]
        starts = [e for e in edges if to_start[graph.target[e]] >= 0 and e not in elsewhere]
        forks = self._fork_sites(function, edges, window, to_window) if starts else set()
        if not forks:
            return None
        run = self.flow.explored(function)
        ordered = [e for e in starts if self._is_before(run, e, forks) and not self._is_told_not_to(e)]
        if strictly:
            ordered = [e for e in ordered if not self._is_after(run, e, forks)]
        ended = self.joins.ended(function, ordered, forks)
        counted = (Answer.NO, Answer.UNKNOWN) if perhaps_ended else (Answer.NO,)
        ordered = [e for e in ordered if ended[e] in counted]
        return min(ordered, key=lambda e: (to_start[graph.target[e]], graph.site[e]), default=None)

    def loosely_reached(self, roots: tuple[Function, ...]) -> npt.NDArray[np.bool_]:
        """What the roots can reach when tables and deferred calls count; searched once for each set of roots."""
        if roots not in self._loose:
            kinds = CERTAIN | {EdgeKind.THREAD, EdgeKind.DEFERRED}
            self._loose[roots] = reached_loosely(self.graph, (*roots, *self._go_functions), kinds, self.table_objects)
        return self._loose[roots]

    @cached_property
    def _go_functions(self) -> tuple[Function, ...]:
        """All of them where the program is Go's: it calls through interfaces, whose tables are made at run time."""
        program = self.flow.program
        found = (program.function(0, rva) for rva in program.image(0).go_functions.value.tolist())
        return tuple(f for f in found if f is not None)


def constructor_functions(flow: Flow) -> list[Function]:
    """Constructors of all objects, the program's own first, then in load order."""
    program = flow.program
    found = []
    for item in program.closure.objects:
        for rva in item.image.constructors:
            function = program.function(item.index, rva)
            if function is not None:
                found.append(function)
    return list(dict.fromkeys(found))


def _with_result(effects: Effects, site: int, value: int) -> Effects:
    """The same calls, one of which returns a constant."""
    return lambda place: CallEffect(result=value) if place == site else effects(place)
