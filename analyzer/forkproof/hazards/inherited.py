"""inherited-lock for locks that are neither an allocator's nor libc's: the program's own, and its libraries'.

Owns: the four conditions for such a lock, the ranking, and the wording.
Takes: `Facts`. Gives: `Finding`s: one for each lock and function that forks, the low ones of an object as one.
Must never: speak of a lock whose address does not begin at a global, or of a thread that starts after the fork.
Wrong where: see the page of the rule.

The order is that of cost: sets of functions first (what threads run, what the child runs), then the locks that both
take, then what quiesces them, and ways to them last. Where the sets have no use of locks, nothing is interpreted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from forkproof.allocators import looks_up_registrar
from forkproof.callgraph import CALLS, CERTAIN, EdgeKind, Reach
from forkproof.code.operations import Return
from forkproof.columns import among
from forkproof.facts import Facts, WindowFacts
from forkproof.forks import Level
from forkproof.hazards.anew import Anew
from forkproof.hazards.evidence import (
    FOLLOWED,
    bodies_of_child,
    dead_end,
    existing_threads,
    folded,
    fork_frame,
    names_of,
    rank,
    starts_near,
    threads_sentence,
    too_early,
)
from forkproof.hazards.guards import handlers_at
from forkproof.hazards.unusual import Unusual
from forkproof.locks.coverage import prepared_by, surely_lets_go, tried_by
from forkproof.locks.identity import Match, lock_of
from forkproof.locks.others import Functions, Place
from forkproof.locks.runs import Held
from forkproof.locks.summary import step_frames
from forkproof.locks.values import Content, Element, Made, Object, Value, root
from forkproof.model import Answer, Conditions, Finding, Frame, Lock, Severity, Verdict, WindowKind
from forkproof.program import Function
from forkproof.threads import constructor_functions

_LEAVES: Final = 1, 2
"""Calls below a child's own code at which it asks for a lock as a matter of course, and beyond which hardly anybody
goes, so that nobody looks: for a child that may exec soon,"""
_WORKS: Final = 2, 8
"""for one that works and then exits,"""
_LIVES: Final = 4, 8
"""and for one that lives on;"""
_LEAVES_AT_HOME: Final = 4
"""and for one that may exec, where all of these functions are the program's own, and it forks itself."""
_HELD: Final = 5, 8
"""The same for a thread, from where it begins."""
_SUSPECTED: Final = frozenset({EdgeKind.FIELD, EdgeKind.DYNAMIC})
_FOLLOWED: Final = CERTAIN | _SUSPECTED
"""What leads a thread, or the child, to a lock; some of it is suspected."""
_MUTEX: Final = ("pthread_mutex_lock", "__pthread_mutex_lock")
_EXITS: Final = ("exit",)
"""What runs exit handlers before it ends the process. quick_exit runs others."""
_ENDS_BY_ITSELF: Final = WindowKind.EXIT, WindowKind.UNKNOWN
"""Children whose calls of exit are how they end; a daemon's are what it does when something goes wrong."""
_HANDLER_DEPTH: Final = 2
"""Calls below a child handler in which it makes locks new."""
_RENEWER: Final = 512
"""Bytes of a function that may be there to make locks new by filling their words."""
_CALLERS: Final = 3
"""Calls above a function that forks at which its callers are asked what they hold."""
_HANDLER_ASKS: Final = 3
"""Calls below a child handler beyond which what it asks for is not followed."""
_ABOUT: Final = 2
"""Calls by which a way may be longer than the shortest and still be preferred for coming first."""
_TRIES: Final = 12
"""Ways that turn out to end the program before another one is no longer looked for."""


_Position = tuple[int, int]
"""Where in the child's life: which level, and the site there."""


def find(facts: Facts) -> list[Finding]:
    """All findings about locks that are neither an allocator's nor libc's."""
    windows = [w for w in facts.windows if _matters(w)]
    return _gathered(folded(f for window in windows for f in _Window(facts, window).findings()))


def _matters(window: WindowFacts) -> bool:
    inner = window.window
    lives_apart = inner.kind in FOLLOWED and inner.shares_memory is not Answer.YES and bool(inner.levels)
    return lives_apart and window.threads is not Answer.NO and window.reachable is not Answer.NO


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to where a lock is taken."""

    edges: tuple[int, ...]
    place: Place
    depth: int
    """Calls between where it begins and the function that names the lock."""
    exit_site: _Position | None = None
    """The call of exit that runs the handler in which the way begins."""
    is_sure: bool = True
    """False where it is not known that the handler is registered by then, or that the child does not _exit."""
    rare: str = ""
    """When a program goes there at all, if it is only where something is wrong."""


@dataclass(frozen=True, slots=True)
class _Request:
    """How the child asks for a lock; `level` is where in its own code, -1 in a child handler, which comes first."""

    way: _Way
    level: int
    position: _Position


class _Begin(NamedTuple):
    """Where a way of the child's to a lock begins: at a place of its own, a call, a handler that fork or exit runs."""

    distance: int
    position: _Position
    edge: int | None = None
    function: Function | None = None
    """Where it goes on."""
    place: Place | None = None


class _Window:
    """The findings about one window."""

    def __init__(self, facts: Facts, window: WindowFacts) -> None:
        self.facts, self.window = facts, window
        self.flow, self.graph, self.others = facts.flow, facts.flow.graph, facts.other_locks
        self.levels = window.window.levels
        self.fork = fork_frame(facts, window)
        self.dead: set[Function] = set()
        self.dying = {*self.flow.dying, *facts.failures.texts}  # they lock nothing in ordinary running
        self.ends = [*self.dying, *self.flow.execs, *self.flow.forkers]
        self.same = self.others.summaries.arrays.same
        self.anew = Anew(self.flow, self.levels)
        self.unusual = Unusual(facts, self.anew, self.levels)

    def findings(self) -> Iterator[Finding]:
        """One for each lock that a thread and the child both take, and that nothing quiesces."""
        if not self._is_worth_a_look():
            return
        self.others.follow(self.by_threads, self.by_child, self.by_handlers)
        held = self._alive(self.others.places(self.by_threads))
        asked = self._asked(self._alive(self.others.places(self.by_child)))
        for address in sorted(asked, key=repr):
            holders = [p for other, places in held.items() if self._is_one(address, other) for p in places]
            finding = self._finding(address, asked[address], holders) if holders else None
            if finding is not None:
                yield finding

    def _alive(self, places: Mapping[Value, tuple[Place, ...]]) -> Mapping[Value, tuple[Place, ...]]:
        """Those that some input leads to."""
        dead = self.flow.dead
        return {
            a: tuple(p for p in each if all(s.site not in dead(s.function) for s in p.steps))
            for a, each in places.items()
        }

    def _is_one(self, address: Value, other: Value) -> bool:
        """Two locks are one, or elements of one table."""
        return address == other or self.same(address, other) is Match.EXACT

    def _is_worth_a_look(self) -> bool:
        """The child takes locks, and threads exist that do. Which of them exist at the fork is asked last."""
        reach = self.graph.distances(self.facts.threads.entries, _FOLLOWED, blocked=self.dying)
        main = self.flow.main
        any_thread = (reach >= 0) & (reach <= _HELD[1])
        if main is not None and self.window.source is not None and self.window.source.why == "forks from a thread":
            any_thread |= self.graph.distances([main], blocked=self.dying) >= 0
        table = [f for f in existing_threads(self.facts, self.window.source) if not any_thread[f]]
        any_thread |= self.graph.distances(table, blocked=self.dying) >= 0
        if not (self._both_take(any_thread) or self._child_spins):
            return False
        if not self.threads:
            return False
        threads = self.by_threads
        return self._both_take(threads) or (self._child_spins and bool(self.others.spinners(threads)))

    def _both_take(self, threads: Functions) -> bool:
        takers = self.others.library_takers
        return bool(np.any(threads & takers) and np.any(self.by_child & takers))

    @cached_property
    def _child_spins(self) -> bool:
        """Asked before whether threads do: a child is a few functions, and threads may be thousands."""
        return bool(self.others.spinners(self.by_child))

    # ---- who runs what ---------------------------------------------------------------------

    @cached_property
    def threads(self) -> Mapping[Function, Answer]:
        """What the other threads at the fork begin in, none of libc's own; if any is known to exist, only such."""
        facts = self.facts
        found = dict(facts.threads.entries_at(self.window.window, facts.roots))
        shown = {int(t) for t in self.graph.target[self.graph.kind == EdgeKind.THREAD]}
        for entry in existing_threads(facts, self.window.source):
            if entry not in shown:  # std::thread's: what runs was found in a table
                found.setdefault(entry, Answer.YES)
        libc = facts.libc_functions
        found = {f: a for f, a in found.items() if libc is None or not libc[f]}
        known = {f: a for f, a in found.items() if a is Answer.YES}
        return known or found

    @cached_property
    def by_threads(self) -> Functions:
        """What those threads can run, on ways that are not too long."""
        reach = self.graph.distances(self.threads, _FOLLOWED, blocked=self.dying)
        found: Functions = (reach >= 0) & (reach <= _HELD[1])
        if Answer.YES not in self.threads.values():
            # Most of what libraries could do does not happen; of threads that may not exist, that would be a guess.
            found[self.flow.program.base[1] :] = False
        return found

    @cached_property
    def bodies(self) -> list[Function]:
        """What the child is there to run, where that never comes back."""
        return bodies_of_child(self.facts, self.window)

    @cached_property
    def by_child(self) -> Functions:
        """What the child can run before it execs or exits, its own part of the functions that fork included."""
        starts = [int(self.graph.target[e]) for level in self.levels for e in self._edges(level)]
        found = self._near(starts)
        found[self._level_functions()] = True
        if self.bodies:
            edges = [e for f in self.bodies for e in self.flow.outgoing(f) if self.graph.kind[e] in _FOLLOWED]
            found |= self._near([int(self.graph.target[e]) for e in edges])
        if self.exits:
            at_exit = self.graph.distances(self.exit_handlers, blocked=self.ends)
            found |= (at_exit >= 0) & (at_exit <= _LIVES[0])
        handlers = self.graph.distances(self._handlers(2), blocked=self.ends)
        return found | ((handlers >= 0) & (handlers <= _HANDLER_ASKS))

    def _near(self, starts: Collection[int]) -> Functions:
        """What calls of the child's own code lead to, if that is not too far."""
        reach = self.graph.distances(starts, _FOLLOWED, blocked=self.ends)
        found: Functions = (reach >= 0) & (reach < self._limits[1])
        if not self.window.is_own:
            return found
        outside = np.ones(self.graph.size, bool)
        outside[: self.flow.program.base[1]] = False
        outside[self.ends] = True
        reach = self.graph.distances([f for f in starts if not outside[f]], _FOLLOWED, blocked=outside)
        return found | ((reach >= 0) & (reach < _LEAVES_AT_HOME))

    def _edges(self, level: Level, kinds: Collection[EdgeKind] = _FOLLOWED) -> list[int]:
        """What the child calls itself there; with the suspected kinds, by way of fields too."""
        more = _SUSPECTED.intersection(kinds)
        if not more or not self._suspects.intersection([level.function, *self.flow.cold_parts(level.function)]):
            return list(level.edges)
        rows = self.flow.outgoing_rows(level.function)
        return [*level.edges, *(e for e, _, site, kind in rows if kind in more and site in level.visited)]

    @cached_property
    def _suspects(self) -> frozenset[int]:
        """Functions that call through fields."""
        return frozenset(self.graph.source[among(self.graph.kind, _SUSPECTED)].tolist())

    @cached_property
    def exits(self) -> list[_Position]:
        """Where the child, in its own code, ends by a call that runs exit handlers, or by returning from main."""
        running = set(self.flow.program.called(_EXITS) if self.window.window.kind in _ENDS_BY_ITSELF else ())
        called = [
            (depth, int(self.graph.site[e]))
            for depth, level in enumerate(self.levels)
            for e in level.edges
            if self.graph.target[e] in running
        ]
        return [*called, *self._returns_from_main]

    @cached_property
    def _returns_from_main(self) -> list[_Position]:
        outer = self.levels[-1]
        if outer.function != self.flow.main or not outer.returns:
            return []
        instructions = self.flow.body(outer.function).instructions
        returns = {i.address for i in instructions if any(isinstance(o, Return) for o in i.operations)}
        return [(len(self.levels) - 1, site) for site in sorted(returns & outer.visited)]

    @cached_property
    def exit_handlers(self) -> Mapping[Function, bool]:
        """What the child's exit runs, and whether that is sure."""
        skipping = {f for f in self.flow.dying if f not in self.flow.program.called(_EXITS)}
        ends_otherwise = any(self.graph.target[e] in skipping for level in self.levels for e in level.edges)
        early = {self.flow.main, None, *constructor_functions(self.flow)}
        found: dict[Function, bool] = {}
        for handler in self.facts.given.exit_handlers:
            by = handler.registered_by
            if self.others.usable[handler.function] and (by is None or self.facts.may_run[by]):
                is_sure = by in early and not ends_otherwise
                found[handler.function] = found.get(handler.function, False) or is_sure
        return found

    @property
    def _limits(self) -> tuple[int, int]:
        return {WindowKind.DAEMONIZE: _LIVES, WindowKind.EXIT: _WORKS}.get(self.window.window.kind, _LEAVES)

    def _level_functions(self) -> list[Function]:
        return [level.function for level in self.levels]

    @cached_property
    def by_handlers(self) -> Functions:
        """What fork handlers can run, where they run at all."""
        return self.graph.distances([*self._handlers(0), *self._handlers(2)], blocked=self.dying) >= 0

    def _handlers(self, which: int) -> list[Function]:
        return [f for f in handlers_at(self.facts, self.window, which) if self.others.usable[f]]

    def _asked(self, places: Mapping[Value, tuple[Place, ...]]) -> dict[Value, list[Place]]:
        """Those of the child's locks that it waits for, in code that it comes to."""
        own = {f: self._own_sites(f) for f in self._level_functions()}
        found: dict[Value, list[Place]] = {}
        for address, all_places in places.items():
            mine = [p for p in all_places if p.blocking and (p.function not in own or p.site in own[p.function])]
            if mine:
                found[address] = mine
        return found

    def _own_sites(self, function: Function) -> frozenset[int]:
        """What the child executes in a function that forked, or that a fork returned to."""
        levels = [level for level in self.levels if level.function == function]
        return frozenset().union(*(level.visited for level in levels))

    # ---- what quiesces a lock --------------------------------------------------------------

    @cached_property
    def prepared(self) -> Held:
        """What prepare handlers hold when the fork comes."""
        summaries = self.others.summaries
        handlers = [prepare for prepare in self._handlers(0) if summaries.relevant[prepare]]
        held = frozenset[Value]().union(*(prepared_by(summaries, prepare)[0] for prepare in handlers))
        return held - self.tried

    @cached_property
    def tried(self) -> Held:
        """What they try to take, and go on without: a thread may have it."""
        summaries = self.others.summaries
        handlers = [prepare for prepare in self._handlers(0) if summaries.relevant[prepare]]
        return frozenset[Value]().union(*(tried_by(summaries, prepare) for prepare in handlers))

    def _is_left_owned(self, address: Value, request: _Request) -> bool:
        """The child cannot let the lock go, whoever held it across the fork: it has to be made new."""
        last = request.way.place.steps[-1]
        called = {Function(int(self.graph.target[e])) for e in self.flow.edges_at(last.function, last.site)}
        if self.facts.libc.id != "glibc" or called.isdisjoint(self.flow.program.called(_MUTEX)):
            return False
        near = self._near_child_handlers()
        return self.others.is_owned(address) and not any(address in self.others.made_by(f) for f in near)

    def _is_quiesced(self, address: Value, request: _Request) -> bool:
        if self._is_left_owned(address, request):
            return False
        if any(self.same(address, p) is not Match.NO for p in self.prepared) or self._is_renewed(address):
            return True
        is_held = [address in self.others.held_at(level.function, level.site) for level in self.levels]
        if request.level < 0:
            return is_held[0]
        if any(is_held[: request.level + 1]) or self._is_held_above(request.level, is_held):
            return True
        return len(self.levels) == 1 and self._is_held_by_callers(self.levels[0].function, address, _CALLERS)

    def _is_held_by_callers(self, function: Function, address: Value, depth: int) -> bool:
        """Whoever calls a function holds the lock at the call, or is called so: `lock(); spawn(); unlock();`."""
        edges = [e for e in self.graph.edges_to(function) if self.facts.may_run[self.graph.source[e]]]
        if not edges or len(edges) > _TRIES or any(int(self.graph.kind[e]) not in CALLS for e in edges):
            return False
        calls = {(self.flow.whole(Function(int(self.graph.source[e]))), int(self.graph.site[e])) for e in edges}
        return all(
            address in self.others.held_at(caller, site)
            or (depth > 1 and self._is_held_by_callers(caller, address, depth - 1))
            for caller, site in calls
        )

    def _is_renewed(self, address: Value) -> bool:
        """A child handler of the lock's object lets the lock go, or makes it new."""
        begin, handlers = root(address.base), self._handlers(2)
        if address in self.tried:  # they may let it go only if the try succeeded
            return any(surely_lets_go(self.others.summaries, handler, address) for handler in handlers)
        return isinstance(begin, Object) and any(
            self._is_among(address, self.others.let_go_by(f))
            for f in self._near_child_handlers()
            if self.flow.program.object_of(f) == begin.number
        )

    def _is_among(self, address: Value, others: Collection[Value]) -> bool:
        """The lock is one of these; of a table, some element stands for all, as it does where handlers hold them."""
        if address in others:
            return True
        return isinstance(address.base, Element) and any(self.same(address, o) is Match.EXACT for o in others)

    def _near_child_handlers(self) -> list[Function]:
        """The child handlers, and what they call in which they make locks new."""
        reach = self.graph.distances(self._handlers(2), blocked=self.dying)
        return [Function(f) for f in np.flatnonzero((reach >= 0) & (reach <= _HANDLER_DEPTH)).tolist()]

    def _is_held_above(self, level: int, is_held: list[bool]) -> bool:
        """Every caller that the child returns to from this level held the lock when it made the call."""
        function = self.levels[level].function
        above = [
            i
            for i, outer in enumerate(self.levels)
            if i > level
            and any(self.graph.target[e] == function for e in self.flow.edges_at(outer.function, outer.site))
        ]
        return bool(above) and all(is_held[i] or self._is_held_above(i, is_held) for i in above)

    def _is_made_new(self, address: Value, first: _Position) -> bool:
        """The child makes the lock new before it asks for it."""
        if address.base is None:
            return False
        for depth, level in enumerate(self.levels):
            visited = level.visited
            for place, value in self._cleared(level):
                if place in visited and value == address and (depth, place) < first:
                    return True
            if address in self.others.remade_in(level.function, {s for s in visited if (depth, s) < first}):
                return True
        makers = [Function(f) for f in np.flatnonzero(self.by_child & self.others.makers).tolist()]
        making = [f for f in makers if f not in self._level_functions() and address in self.others.made_by(f)]
        if making and (position := self._first(making)) is not None and position <= first:
            return True
        return any(address in self.others.cleared_by(f) for f in self._called_before(first))

    def _called_before(self, first: _Position) -> list[Function]:
        """What the child calls itself before it first asks, where that is small and may be there to make locks new."""
        calls = [
            Function(int(self.graph.target[e]))
            for depth, level in enumerate(self.levels)
            for e in level.edges
            if (depth, int(self.graph.site[e])) < first
        ]
        return [f for f in dict.fromkeys(calls) if self.others.usable[f] and self.flow.program.size_of(f) <= _RENEWER]

    def _may_be_made_new(self, address: Value, first: _Position) -> bool:
        """The child first makes locks of that object's new which are not known; a field may be one by another way."""
        if isinstance(address.base, Object):
            return False
        home = self._home(address)
        makers = [Function(f) for f in np.flatnonzero(self.by_child & self.others.makers).tolist()]
        making = [f for f in makers if self.flow.program.object_of(f) == home and self.others.makes_another(f)]
        return bool(making) and (position := self._first(making)) is not None and position <= first

    def _home(self, address: Value) -> int:
        """The object whose code a lock belongs to."""
        begin = root(address.base)
        if isinstance(begin, Made):
            return self.flow.program.object_of(Function(begin.function))
        return begin.number if isinstance(begin, Object) else -1

    def _cleared(self, level: Level) -> list[tuple[int, Value]]:
        return self.others.cleared_in(level.function)

    def _first(self, functions: Iterable[Function]) -> _Position | None:
        """The first of the child's own calls that can lead to one of these functions, other than once in a process or
        until something is set up: the parent has come there when a thread of it has the lock."""
        functions, without = list(functions), set(self.others.once)
        for _ in range(_TRIES):
            reach = self.graph.distances(functions, backward=True, blocked=self.ends, without=without)
            found = [
                ((depth, int(self.graph.site[e])), e)
                for depth, level in enumerate(self.levels)
                for e in level.edges
                if reach[self.graph.target[e]] >= 0 and e not in without
            ]
            if not found:
                return None
            position, edge = min(found)
            way = self.graph.path(Function(int(self.graph.target[edge])), reach, without=without) or []
            rare = self.unusual.among([edge, *way])
            if not rare:
                return position
            without.update(rare)
        return None

    # ---- ways --------------------------------------------------------------------------------

    def _request(self, address: Value, places: list[Place]) -> tuple[_Request, _Position] | None:
        """Of the ways that are about the shortest, the one that the child comes to first; and where any first asks.

        Ways that need no failure come before others, and sure calls before suspected ones.
        """
        failing, seldom = set[int](), None
        for kinds in self._ways:
            for _ in range(_TRIES):
                by_function = {p.function: p for p in reversed(places)}
                blocked = [*self.ends, *self.dead]
                reach = self.graph.distances(by_function, kinds, backward=True, blocked=blocked, without=failing)
                own = [*self._own_requests(places), *self._calls(reach, failing, kinds)]
                own = [begin for begin in own if not self._is_of_new_object(address, begin)]
                found = [*own, *self._at_exit(reach), *self._at_fork(reach)]
                if not found:
                    break
                shortest = min(begin.distance for begin in found)
                best = min((b for b in found if b.distance <= shortest + _ABOUT), key=lambda begin: begin.position)
                edges = [] if best.edge is None else [best.edge]
                if best.function is not None:
                    edges += self.graph.path(best.function, reach, kinds, without=failing) or []
                last = Function(int(self.graph.target[edges[-1]])) if edges else best.function
                place = best.place or by_function[last] if last is not None else best.place
                end = dead_end(self.facts, edges, self.bodies)
                if self._is_refused(edges, end, failing):
                    continue
                assert place is not None
                if edges and best.edge is not None and self.unusual.rules_out(best.position, edges, place):
                    failing.add(edges[-1])
                    continue
                way = self._way(edges, place, end)
                if best.edge is None and best.function is not None and best.position[0] >= 0:
                    is_sure = self.exit_handlers[best.function]
                    way = replace(way, depth=way.depth + 1, exit_site=best.position, is_sure=is_sure)
                request = _Request(way, best.position[0], best.position), min(b.position for b in found)
                after = self.unusual.among(edges)
                if not after:
                    return request
                seldom = seldom or request
                failing.update(after)
        return seldom

    def _is_refused(self, edges: Collection[int], end: Function | None, failing: set[int]) -> bool:
        """Nobody goes that way: it ends in a function that never comes back, or makes a call that no input leads to.

        What was found so is left out of the next search.
        """
        if end is not None and end not in self.dead:
            self.dead.add(end)
            return True
        unmade = {edge for edge in edges if self.flow.is_dead(edge)} | self.facts.failures.last(edges)
        failing.update(unmade)
        return bool(unmade)

    def _is_of_new_object(self, address: Value, begin: _Begin) -> bool:
        """What the child asks for there lies in an object that it has made itself."""
        return self.anew.is_new(address, *begin.position, is_own=begin.place is not None)

    def _own_requests(self, places: list[Place]) -> Iterator[_Begin]:
        for place in places:
            for depth, level in enumerate(self.levels):
                if place.function == level.function and place.site in level.visited:
                    yield _Begin(0, (depth, place.site), place=place)

    def _at_fork(self, reach: Reach) -> Iterator[_Begin]:
        """Child handlers run before the child's own code does."""
        for number, handler in enumerate(self._handlers(2)):
            if 0 <= reach[handler] <= _HANDLER_ASKS:
                yield _Begin(int(reach[handler]), (-1, number), function=handler)

    def _calls(self, reach: Reach, failing: Collection[int], kinds: Collection[EdgeKind]) -> Iterator[_Begin]:
        own = set(self._level_functions())
        for depth, level in enumerate(self.levels):
            for edge in self._edges(level, kinds):
                target = Function(int(self.graph.target[edge]))
                if reach[target] < 0 or edge in failing:
                    continue
                if target not in own and target not in self.flow.forkers:
                    yield _Begin(int(reach[target]) + 1, (depth, int(self.graph.site[edge])), edge, target)

    def _at_exit(self, reach: Reach) -> Iterator[_Begin]:
        for handler in self.exit_handlers if self.exits else ():
            if reach[handler] >= 0:
                yield from (_Begin(int(reach[handler]) + 1, position, None, handler) for position in self.exits)

    def _holder(self, places: list[Place]) -> tuple[_Way, Function, Answer] | None:
        """The shortest way of a thread to the lock: of one that surely exists, or else of another; by sure calls if
        they lead there and not too far, or else by suspected ones."""
        early = frozenset(too_early(self.facts, self.window.source))
        failing, seldom = set[int](), None
        for answer in (Answer.YES, Answer.UNKNOWN):
            starts = [f for f, a in self.threads.items() if a is answer]
            for kinds in self._ways if starts else ():
                for _ in range(_TRIES):
                    by_function = {p.function: p for p in reversed(places)}
                    without = early | failing
                    reach = self.graph.distances(
                        by_function, kinds, backward=True, blocked=[*self.dying, *self.dead], without=without
                    )
                    farthest = _HELD[1] if kinds is not self._ways[-1] else self.graph.size
                    found = [(int(reach[f]), f) for f in starts if 0 <= reach[f] <= farthest]
                    if not found:
                        break
                    start = min(found)[1]
                    edges = self.graph.path(start, reach, kinds, without=without) or []
                    end = dead_end(self.facts, edges)
                    if self._is_refused(edges, end, failing):
                        continue
                    last = Function(int(self.graph.target[edges[-1]])) if edges else start
                    holder = self._way(edges, by_function[last], end), start, answer
                    after = self.unusual.among(edges)
                    if not after:
                        return holder
                    seldom = seldom or holder
                    failing.update(after)
        return seldom

    @cached_property
    def _ways(self) -> list[frozenset[EdgeKind]]:
        """Kinds of edges by which somebody may come to a lock, the surest first; what no edge is of adds nothing."""
        more = [kind for kind in (EdgeKind.FIELD, EdgeKind.DYNAMIC) if np.any(self.graph.kind == kind)]
        return [CERTAIN.union(more[:count]) for count in range(len(more) + 1)]

    def _way(self, edges: list[int], place: Place, end: Function | None) -> _Way:
        """A function that returns with the lock is as good as the lock function that it calls; `end` never returns."""
        is_method = bool(edges) and self.others.keeps(place.function)
        rare = ""
        if end is not None and self.facts.failures.is_fatal(end):
            rare = "only where the program ends because something is wrong"
        else:
            rare = next(iter(self.unusual.among(edges).values()), "")
        return _Way(tuple(edges), place, len(edges) - is_method, rare=rare)

    def _frames(self, way: _Way) -> tuple[Frame, ...]:
        before = self.flow.frames(way.edges, way.place.function)[:-1] if way.edges else ()
        if way.exit_site is not None:
            level, site = way.exit_site
            before = (self.flow.frame(self.levels[level].function, site, "exit handler"), *before)
        return (*before, *step_frames(self.flow, way.place.steps))

    # ---- the finding -------------------------------------------------------------------------

    def _finding(self, address: Value, asked: list[Place], holders: list[Place]) -> Finding | None:
        open_holders = [p for p in holders if not self._is_gated(p)]
        if all(p.is_shared for p in open_holders):  # readers wait for writers only
            asked = [p for p in asked if not p.is_shared]
        found = self._request(address, asked) if asked and open_holders else None
        if found is None:
            return None
        request, first = found
        if self._is_quiesced(address, request) or self._is_made_new(address, first):
            return None
        is_common = self.others.is_shared_memory(address)
        holder = self._holder(open_holders) if is_common is not Answer.YES else None
        doubt, begin = self.facts.undecided, root(address.base)
        if self._may_be_made_new(address, first):
            doubt = "the child makes locks new whose addresses are not known"
        elif isinstance(begin, Object) and looks_up_registrar(self.flow, begin.number):
            doubt = "its object looks pthread_atfork up by name, and what it registers is not known"
        elif isinstance(begin, Made) and self._handlers(0):
            doubt = "fork handlers may reach it by another way"
        elif is_common is Answer.UNKNOWN:
            doubt = "the program makes locks that processes share, whose addresses are not known"
        return None if holder is None else self._told(address, request, holder, doubt)

    def _is_gated(self, place: Place) -> bool:
        """Each time that a thread takes it there, it holds a lock that is quiesced."""
        return any(self.same(gate, p) is not Match.NO for gate in place.gates for p in self.prepared)

    def _told(
        self, address: Value, request: _Request, holder: tuple[_Way, Function, Answer], may_be_quiesced: str
    ) -> Finding:
        facts, flow = self.facts, self.flow
        way, start, exists = holder
        lock = lock_of(flow.program, address, flow.program.object_of(request.way.place.function))
        thread, child = self._frames(way), self._frames(request.way)
        rare = self._rare(request.way, address) or self._rare(way, address)
        answers = (self.window.threads, exists, Answer.YES, Answer.UNKNOWN if may_be_quiesced else Answer.YES)
        severity, verdict = self._rank(answers, address, request.way, way, rare=bool(rare))
        doubt = "" if exists is Answer.YES else "; whether that thread exists at the fork is not known"
        if kept := self._kept(way):
            verdict, answers = Verdict.SUSPECTED, (answers[0], Answer.UNKNOWN, *answers[2:])
            doubt += f"; {kept}"
        if asks_if := self._kept(request.way):
            verdict, answers = Verdict.SUSPECTED, (*answers[:2], Answer.UNKNOWN, answers[3])
            asks_if = f"; {asks_if}"
        verb = "lives on and" if self.window.window.kind is WindowKind.DAEMONIZE else "before it ends or execs"
        quiesced = self._not_quiesced(lock)
        if self.prepared and self._is_left_owned(address, request):
            quiesced = f"only its owner may let {lock.name} go, which the child's thread is not, whoever holds it there"
        asks = f"the child {verb} asks for it in {child[-1].function}, {self._whence(request.way, child)}{asks_if}"
        if request.level < 0:
            quiesced = f"no prepare handler takes {lock.name}"
            asks = f"the child handler {child[0].function} asks for it before fork returns"
        if may_be_quiesced:
            quiesced += f", but {may_be_quiesced}"
        conditions = Conditions(
            threads=threads_sentence(facts, self.window),
            holder=f"the thread that begins in {flow.name(start)} takes it in {thread[-1].function}{doubt}",
            requester=asks,
            not_quiesced=quiesced,
            answers=answers,
        )
        can = "can" if verdict is Verdict.REACHABLE else "may"
        seldom = f" It is rare: {rare}." if rare else ""
        return Finding(
            rule="inherited-lock",
            severity=severity,
            verdict=verdict,
            target=facts.target,
            object=lock.object,
            message=f"a child forked in {self.fork.function} {can} hang for ever on {lock.name} of {lock.object}",
            why=f"{quiesced}. A thread that does not exist in the child can own the lock there.{seldom}",
            fix=self._fix(lock, request),
            lock=lock,
            fork=self.fork,
            holder=thread,
            requester=child,
            conditions=conditions,
        )

    def _kept(self, way: _Way) -> str:
        """What must be the case for a way that leads through a field, or an object, if it does: which is not known."""
        kept = [e for e in way.edges if self.graph.kind[e] in _SUSPECTED]
        if not kept:
            return ""
        name = self.flow.name(Function(int(self.graph.target[kept[0]])))
        if self.graph.kind[kept[0]] == EdgeKind.DYNAMIC:
            return f"it calls {name} if it has an object whose function that is, of which the program has several"
        return f"it calls {name} if that is what it finds in a field, where the program puts it"

    def _rare(self, way: _Way, address: Value) -> str:
        """What must be the case for the lock to be taken there, if it is something rare."""
        return way.rare or self.unusual.occasions.rare_lock(way.place.steps, address)

    def _rank(
        self, answers: tuple[Answer, Answer, Answer, Answer], address: Value, child: _Way, thread: _Way, *, rare: bool
    ) -> tuple[Severity, Verdict]:
        """High needs one lock for sure, and two ordinary ways of calls that are sure."""
        edges = (*child.edges, *thread.edges)
        is_sure = _is_sure(address) and child.is_sure and all(int(self.graph.kind[e]) in CALLS for e in edges)
        is_ordinary = is_sure and child.depth <= self._limits[0] and thread.depth <= _HELD[0] and not rare
        severity, verdict = rank(answers, self.window, is_ordinary=is_ordinary)
        is_doubtful = rare or Answer.UNKNOWN in answers or not starts_near(self.window)
        is_doubtful |= self.window.window.kind is WindowKind.EXIT and child.depth > _HELD[0]
        is_doubtful |= any(self.graph.kind[e] == EdgeKind.DYNAMIC for e in edges)
        # What is found in a field is a guess, and what that comes to far below it is another.
        far = thread.depth > _HELD[0] or child.depth > _LIVES[0]
        guesses = {(int(self.graph.target[e]), int(self.graph.site[e])) for e in edges if self._is_field(e)}
        is_doubtful |= bool(guesses) and (far or len(guesses) > 1)
        is_doubtful |= any(self._is_field(e) and self._is_one_of_several(e) for e in child.edges)
        if is_doubtful and severity.rank < Severity.LOW.rank:
            severity = Severity.LOW
        return severity, verdict

    def _is_field(self, edge: int) -> bool:
        return bool(self.graph.kind[edge] == EdgeKind.FIELD)

    def _is_one_of_several(self, edge: int) -> bool:
        """The field holds other functions too: which of them the child's object has, and which a thread's, is open."""
        source, site = Function(int(self.graph.source[edge])), self.graph.site[edge]
        others = (e for e in self.flow.outgoing(source) if self.graph.site[e] == site and self._is_field(e))
        return len({int(self.graph.target[e]) for e in others}) > 1

    def _not_quiesced(self, lock: Lock) -> str:
        if not self.window.window.handlers_run:
            return f"{self.window.window.forker} runs no fork handlers"
        if not any(r.is_effective and self.facts.may_run[r.outermost] for r in self.facts.registrations):
            return f"no fork handler is registered that could take {lock.name}"
        return f"no fork handler that is registered takes {lock.name} or makes it new"

    def _whence(self, way: _Way, frames: tuple[Frame, ...]) -> str:
        if way.exit_site is None:
            return f"from {frames[0].function}"
        end = "return from" if way.exit_site in self._returns_from_main else "call of exit in"
        return f"by an exit handler that the {end} {frames[0].function} runs"

    def _fix(self, lock: Lock, request: _Request) -> str:
        if request.level < 0:
            return f"Take {lock.name} in a prepare handler, and let the parent and the child handler let it go."
        if request.way.exit_site is not None:
            return f"End the child with _exit, which runs no handlers, or hold {lock.name} across the fork."
        if self.window.window.kind is WindowKind.DAEMONIZE:
            return f"Fork before the first thread is started, or hold {lock.name} across the fork with pthread_atfork."
        return f"Keep what takes {lock.name} out of the child, or hold it across the fork with pthread_atfork."


def _is_sure(address: Value) -> bool:
    """A word of an object's data, or a field of what a word of it points to: one lock, not one of many."""
    base = address.base
    return isinstance(base, Object) or (isinstance(base, Content) and isinstance(base.base, Object))


def _gathered(findings: list[Finding]) -> list[Finding]:
    """The low ones of one object and fork as one: the first, which names the others."""
    kept, low = list[Finding](), dict[tuple[str, str], list[Finding]]()
    for finding in findings:
        assert finding.fork is not None
        if finding.severity is Severity.LOW:
            low.setdefault((finding.object, finding.fork.function), []).append(finding)
        else:
            kept.append(finding)
    for group in low.values():
        first = min(group, key=lambda f: (len(f.requester) + len(f.holder), f.id))
        names = names_of(f.lock.name for f in group if f is not first and f.lock is not None)
        more = f" The same is so for {names}." if names else ""
        kept.append(replace(first, why=first.why + more, count=sum(f.count for f in group)))
    return kept
