"""Everything that the rules may ask about one program, linked and analysed.

Owns: the assembly of the analyses into `Facts`, in the order in which they need each other.
Takes: a linked program. Gives: `Facts`.
Must never: judge: that is the rules' work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from forkproof import golang
from forkproof.allocators import AllocatorFacts, LibcFacts, find_allocators, is_program
from forkproof.atfork import Registration, could_define, find_registrations
from forkproof.callgraph import CERTAIN, CallGraph, EdgeKind, Reach
from forkproof.closure import TypeClass
from forkproof.failures import Failures
from forkproof.flow import Flow
from forkproof.forks import ForkWindow, find_forkers, find_windows
from forkproof.model import Answer, Hooks, Lock
from forkproof.program import Function, Program
from forkproof.signatures import Signatures
from forkproof.tables import addresses_held, table_targets
from forkproof.threads import Threads, ThreadSource, constructor_functions

# What follows single locks is imported by what asks for it: most programs never do.
if TYPE_CHECKING:
    from forkproof.cache import Parts
    from forkproof.given import Given
    from forkproof.libc_locks import LibcLocks
    from forkproof.locks.goals import AllocatorLocks, Goal
    from forkproof.locks.others import OtherLocks
    from forkproof.locks.summary import Step, Summaries
    from forkproof.signals import Signals


_THREAD: Final = int(EdgeKind.THREAD)


@dataclass(frozen=True, eq=False)
class WindowFacts:
    """A fork window with what surrounds it."""

    window: ForkWindow
    reachable: Answer
    threads: Answer
    source: ThreadSource | None
    path: tuple[int, ...]
    """Edges from a root of the program to the function that forks."""
    root: Function | None
    is_own: bool
    """The program's own code forks, not a library's."""
    is_deferred: bool
    """The path leads through a function that is kept for later: an exit handler, an event loop."""


@dataclass(frozen=True, eq=False)
class Facts:
    """One analysed program."""

    target: str
    flow: Flow
    libc: LibcFacts
    roots: tuple[Function, ...]
    registrations: tuple[Registration, ...]
    threads: Threads
    allocators: tuple[AllocatorFacts, ...]
    windows: tuple[WindowFacts, ...]
    is_program: bool
    parts: Parts | None = None
    """What is known of parts of the program from others."""

    @cached_property
    def libc_locks(self) -> LibcLocks:
        """The locks inside the C library; computed when a rule asks."""
        from forkproof.cache import Parts
        from forkproof.libc_locks import LibcLocks

        return LibcLocks(self.flow, self.libc, self.parts or Parts())

    def keep(self) -> None:
        """Keep for other programs what has become known of the parts that they may share."""
        if "libc_locks" in self.__dict__:
            self.libc_locks.keep()

    @cached_property
    def failures(self) -> Failures:
        """What runs only when a system call has failed."""
        return Failures(self.flow, self.libc.objects)

    @cached_property
    def gaps(self) -> tuple[str, ...]:
        """What is missing from the picture, so that "no" would claim too much."""
        closure = self.flow.program.closure
        found = [f"{m.name} is missing: what it does is not known" for m in closure.missing]
        if self.flow.program.is_nameless:
            found.append(
                "a static program without symbols: calls of malloc, fork and pthread_create inside it were not "
                "recognised, only system calls were, and its own locks were not judged; scan an unstripped copy, or "
                "give its debug file"
            )
        return tuple(found)

    @cached_property
    def libc_functions(self) -> npt.NDArray[np.bool_] | None:
        """Membership in libc of every function; None where a static program does not tell which are libc's."""
        program = self.flow.program
        if program.is_nameless:
            return None
        if program.closure.program.image.is_static:
            from forkproof.libc_inside import libc_functions

            return libc_functions(self.flow)
        found = np.zeros(self.flow.graph.size, bool)
        for obj in self.libc.objects:
            found[program.base[obj] : program.base[obj + 1]] = True
        return found

    @property
    def not_known(self) -> tuple[str, ...]:
        """Questions that no rule could ask, and whose answers could be findings."""
        if self.libc_functions is not None or not self.has_forks_among_threads:
            return self.lost_forks
        own = "which of its own locks a child can inherit: they were not told from those of the libc that is in it"
        return (*self.lost_forks, own)

    @cached_property
    def lost_forks(self) -> tuple[str, ...]:
        """Forks that the code asks for, and that nothing which was found defines: no window tells of them."""
        lacking, program = could_define(self.flow), self.flow.program
        if not lacking:
            return ()
        names = {forker.name for forker in self.flow.signatures.forkers if forker.kind != "spawn"}
        asked, users = dict[str, None](), dict[str, None]()
        for obj in range(len(program.codes)):
            table = program.image(obj).dynamic_symbols
            for name in sorted(names & table.by_name.keys()):
                undefined = [symbol for symbol in table.by_name[name] if not table.defined[symbol]]
                if undefined and program.bindings.resolve(obj, undefined[0], type_class=TypeClass.PLT) is None:
                    asked[name] = users[self.object_name(obj)] = None
        if not asked:
            return ()
        ask = "asks" if len(users) == 1 else "ask"
        them = "it" if len(asked) == 1 else "them"
        where = f"{lacking}, which could define {them}, is missing"
        return (f"what children of {', '.join(asked)} can hang on: {', '.join(users)} {ask} for {them}, and {where}",)

    @cached_property
    def undecided(self) -> str:
        """Why it is not known which fork handlers are registered, if that is so."""
        for each in self.registrations:
            if each.lacking:
                return f"whether {each.symbol} binds is not known: {each.lacking}, which could define it, is missing"
        return ""

    @cached_property
    def hidden_forkers(self) -> tuple[str, ...]:
        """Forkers whose address the program's own code or data holds: who calls them is not known."""
        flow = self.flow
        held = addresses_held(flow.program, 0)
        kinds = {f: forker for f, forker in flow.forkers.items() if forker.kind in ("fork", "vfork", "daemon")}
        return tuple(sorted({forker.name for f, forker in kinds.items() if f in held}))

    @cached_property
    def summaries(self) -> Summaries:
        """What functions do with locks; costs nothing until it is asked."""
        program = self.flow.program
        used = [a for a in self.allocators if a.is_used]
        homes = {program.object_of(f) for a in used for f in (*a.entries, *a.locks.evidence)}
        registering = {r.object for r in self.registrations if r.is_effective}
        from forkproof.locks.summary import Summaries

        if program.closure.program.image.is_static and self.libc_functions is not None:
            return Summaries(self.flow, self.libc.objects, registering, libc=self.libc_functions)
        return Summaries(self.flow, self.libc.objects, homes | registering)

    @cached_property
    def other_locks(self) -> OtherLocks:
        """The locks of the program and its libraries; what is not asked about costs nothing."""
        from forkproof.locks.others import OtherLocks

        program, owned = self.flow.program, set[Function]()
        for allocator in self.allocators:
            if allocator.object == 0:
                reach = self.flow.graph.distances(allocator.entries)
                owned |= {Function(f) for f in np.flatnonzero(reach >= 0).tolist()}
            else:
                base = program.base
                owned |= {Function(f) for f in range(int(base[allocator.object]), int(base[allocator.object + 1]))}
        using = self.libc_locks.using if self.libc.core is not None and len(program.codes) > 1 else {}
        given = dict(self.given.arguments)
        for function in {w.window.function for w in self.windows if w.threads is not Answer.NO and w.is_own}:
            if values := self.given.by_callers(function):
                given[function] = given.get(function, frozenset()) | values
        libc = self.libc_functions
        # Where it is not known which are libc's, none is looked at, and the report says so.
        libc = np.ones(self.flow.graph.size, bool) if libc is None else libc
        return OtherLocks(self.flow, self.libc.objects, libc, owned, given, using, self.signals.counted)

    @cached_property
    def may_run(self) -> npt.NDArray[np.bool_]:
        """What may run at all, tables and callbacks included."""
        return self.threads.loosely_reached(self.roots)

    @cached_property
    def given(self) -> Given:
        """What threads and exit handlers are given."""
        return self.threads.given

    @cached_property
    def signals(self) -> Signals:
        """Who waits for what, and who wakes whom."""
        return self.threads.signals

    @cached_property
    def _allocator_locks(self) -> dict[int, AllocatorLocks]:
        return {}

    @cached_property
    def has_forks_among_threads(self) -> bool:
        """Some fork may happen while another thread exists: only then do single locks matter."""
        return not self.is_program or any(
            w.reachable is not Answer.NO and w.threads is not Answer.NO for w in self.windows
        )

    def has_own_locks(self, allocator: AllocatorFacts) -> bool:
        """Its locks are looked into: it has some, and they are not libc's own."""
        judged = allocator.hooks in (Hooks.EFFECTIVE, Hooks.UNBOUND, Hooks.ABSENT)
        return judged and allocator.object not in self.libc.objects

    def locks_of(self, allocator: AllocatorFacts, *, even_without_forks: bool = False) -> AllocatorLocks | None:
        """The locks of an allocator that is used; None for libc's own, which its fork answers for.

        Without a fork among threads nothing can be inherited, and nothing is looked into unless it is asked for.
        """
        if not self.has_own_locks(allocator):
            return None
        if not (self.has_forks_among_threads or even_without_forks):
            return None
        known = self._allocator_locks.get(allocator.object)
        if known is None:
            from forkproof.locks.goals import allocator_locks

            registration = allocator.registration
            handlers: tuple[Function | None, Function | None] = (None, None)
            if registration is not None and allocator.hooks is not Hooks.ABSENT:
                handlers = (registration.handlers[0].function, registration.handlers[2].function)
            obj = self.flow.program.object_of(next(iter(allocator.locks.evidence), allocator.entries[0]))
            known = self._allocator_locks[allocator.object] = allocator_locks(
                self.summaries, obj, allocator.entries, handlers, is_effective=allocator.hooks is Hooks.EFFECTIVE
            )
        return known

    def hooks_of(self, allocator: AllocatorFacts) -> Hooks:
        """The verdict on an allocator's handlers, single locks included."""
        locks = self.locks_of(allocator) if allocator.hooks is Hooks.EFFECTIVE else None
        return Hooks.INCOMPLETE if locks is not None and locks.goals else allocator.hooks

    def goals_of(self, allocator: AllocatorFacts, window: WindowFacts) -> tuple[Goal, ...]:
        """The locks that the child of a fork may inherit taken.

        All of the allocator's as one, where they have no names, or where the forker runs none of its handlers.
        """
        locks = self.locks_of(allocator)
        runs_handlers = window.window.handlers_run or allocator.hooks is not Hooks.EFFECTIVE
        if allocator.hooks is Hooks.EFFECTIVE and runs_handlers:
            return locks.goals if locks is not None else ()
        if locks is not None and runs_handlers and locks.goals:
            return locks.goals
        return self._any_lock_of(allocator)

    def _any_lock_of(self, allocator: AllocatorFacts) -> tuple[Goal, ...]:
        known = self._any_locks.get(allocator.object)
        if known is None:
            known = self._any_locks[allocator.object] = (self._any_lock(allocator),)
        return known

    @cached_property
    def _any_locks(self) -> dict[int, tuple[Goal, ...]]:
        return {}

    def _any_lock(self, allocator: AllocatorFacts) -> Goal:
        title = allocator.title if allocator.signature else self.object_name(allocator.object)
        lock = Lock(self.object_name(allocator.object), f"a lock of {title}", None, "allocator")
        waits = allocator.locks.waits
        places = {f: self._wait_steps(f, waits.get(f, ())) for f in sorted(allocator.telling_locks)}
        from forkproof.locks.goals import Goal
        from forkproof.locks.ordinary import Occasion, Rank

        return Goal(lock, None, places, Occasion(Rank.ALWAYS, ""), False, True, self.flow)

    def _wait_steps(self, function: Function, waits: tuple[int, ...]) -> tuple[Step, ...]:
        graph = self.flow.graph
        if not waits:
            return ()
        target = Function(int(graph.target[waits[0]]))
        from forkproof.locks.summary import Step

        return Step(function, int(graph.site[waits[0]])), Step(target, self.flow.program.rva_of(target))

    def object_name(self, obj: int) -> str:
        """The soname of an object, or its file name."""
        return self.flow.program.closure.objects[obj].name

    def fix(self, allocator: AllocatorFacts, rule: str) -> str:
        """What to do, for this library and version."""
        found = self.flow.signatures.fix_for(allocator.signature, rule, allocator.version)
        return found.text if found else ""

    def entries_of(self, source: ThreadSource) -> tuple[Function, ...]:
        """Functions that the threads of a source begin in, those given to the innermost starter first."""
        known = self._entries.get(source.path)
        if known is None:
            known = self._entries[source.path] = self._find_entries(source)
        return known

    @cached_property
    def _entries(self) -> dict[tuple[int, ...], tuple[Function, ...]]:
        return {}

    def _find_entries(self, source: ThreadSource) -> tuple[Function, ...]:
        graph = self.flow.graph
        sources = [int(graph.source[e]) for e in source.path]
        found: list[Function] = []
        for function in reversed(sources):
            rows = graph.rows_from(Function(function))
            found += [Function(target) for _, target, _, kind in rows if kind == _THREAD]
        starters = self.flow.signatures.thread_starters
        hidden = graph.program.called(
            [name for name, starter in starters.items() if starter.callback is None and starter.structure is None]
        )
        starts = [e for e in source.path if int(graph.target[e]) in hidden]
        if any(not self._is_handed(int(graph.source[e]), int(graph.site[e])) for e in starts):
            # std::thread and its like: what runs is a virtual function of an object that the caller made.
            found += [t for f in reversed(sources) for t in table_targets(graph.program, Function(f))]
        return tuple(dict.fromkeys(found))

    def _is_handed(self, function: int, site: int) -> bool:
        """What begins in the thread that is started there was followed from there."""
        rows = self.flow.graph.rows_from(Function(function))
        return any(place == site and kind == _THREAD for _, _, place, kind in rows)


def gather(target: str, graph: CallGraph, signatures: Signatures, libc: LibcFacts, parts: Parts | None = None) -> Facts:
    """Run every analysis of one program."""
    program = graph.program
    flow = Flow(graph, signatures, find_forkers(program, signatures, libc.id, libc.version, libc.objects))
    roots = _roots(flow)
    reach = graph.distances(roots, CERTAIN | {EdgeKind.THREAD, EdgeKind.DEFERRED})
    registrations = find_registrations(flow, libc.objects)
    threads = Threads(flow, registrations, libc.objects, roots)
    windows = find_windows(flow, libc.objects, reach, threads.loosely_reached(roots))
    threads.note_windows(windows)
    allocators = find_allocators(flow, libc, registrations)
    around = _Surroundings(flow, threads, roots, reach)
    startable = is_program(program.closure.program.image)
    return Facts(
        target, flow, libc, roots, registrations, threads, allocators,
        tuple(around.of(w) for w in windows), startable, parts,
    )  # fmt: skip


def _roots(flow: Flow) -> tuple[Function, ...]:
    """Where the program's own threads of control begin: its entry, main and every constructor.

    A library analysed alone is entered through whatever it exports.
    """
    program = flow.program
    image = program.closure.program.image
    found = [flow.main] if flow.main is not None else []
    entry = program.function(0, image.entry)
    found += [entry] if entry is not None else []
    found += program.called(golang.ENTRIES, [0])
    found += constructor_functions(flow)
    if not is_program(image):
        table = image.dynamic_symbols
        exported = table.value[table.defined & (table.type == 2)].tolist()
        found += [f for rva in exported if (f := program.function(0, rva)) is not None]
    return tuple(dict.fromkeys(found))


class _Surroundings:
    """What is true around each window; shares the searches between them."""

    def __init__(self, flow: Flow, threads: Threads, roots: tuple[Function, ...], reach: Reach) -> None:
        self.flow, self.threads, self.roots, self.reach = flow, threads, roots, reach

    def of(self, window: ForkWindow) -> WindowFacts:
        """Reachability, threads and the path to one window."""
        reachable = self._reachable(window.function)
        if reachable is Answer.NO:
            threads, source = Answer.UNKNOWN, None
        else:
            threads, source = self.threads.before(window, self.roots, self.reach)
            if self.flow.is_go(window.function):
                threads = Answer.YES  # the runtime starts some before it calls the program's main
        path, root = self._path(window) if reachable is Answer.YES else ((), None)
        is_own = self.flow.program.object_of(window.function) == 0
        deferred = any(self.flow.graph.kind[e] == EdgeKind.DEFERRED for e in path)
        return WindowFacts(window, reachable, threads, source, path, root, is_own, deferred)

    def _reachable(self, function: Function) -> Answer:
        if self.reach[function] >= 0:
            return Answer.YES
        may_run = self.threads.loosely_reached(self.roots)[function] or self.flow.program.is_nameless
        return Answer.UNKNOWN if may_run else Answer.NO

    def _path(self, window: ForkWindow) -> tuple[tuple[int, ...], Function | None]:
        graph = self.flow.graph
        kinds = CERTAIN | {EdgeKind.THREAD, EdgeKind.DEFERRED}
        distance = graph.distances([window.function], kinds, backward=True)
        candidates = [(int(distance[r]), i, r) for i, r in enumerate(self.roots) if distance[r] >= 0]
        if not candidates:
            return (), None
        root = min(candidates)[2]
        return tuple(graph.path(root, distance, kinds) or ()), root


def unknown_calls(program: Program) -> int:
    """Calls with unknown targets in the whole closure."""
    return int(sum(np.sum(code.unknown_calls) for code in program.codes))
