"""Locks of the program and its libraries, allocators' and libc's own left out: who takes which, where asked.

Owns: the choice of the few functions that are worth interpreting for such locks, and the places where each lock is
      taken, with what is held there.
Takes: `Flow`, and sets of functions: what a thread can run, what a child can run. Gives: `Places` by address.
Must never: interpret a function that is in neither set, or name a lock whose address is not reached from a global: two
      of those cannot be told to be one.
Wrong where: a lock is passed through memory, or through more than `_WRAPPERS` functions; where `libc_inside` is, of the
      functions of a static program.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CALLS, CERTAIN, EdgeKind
from forkproof.code.operations import Atomic, AtomicKind, Const, Memory, Operand, Register, Set
from forkproof.code.state import State
from forkproof.code.values import Entry as KnownEntry
from forkproof.code.values import Result, Word
from forkproof.code.values import Value as KnownValue
from forkproof.columns import unique
from forkproof.flow import Flow
from forkproof.locks.cells import Cells, begin_of, near
from forkproof.locks.chosen import Stores
from forkproof.locks.evidence import address_of
from forkproof.locks.filled import Filled
from forkproof.locks.identity import is_element, is_resolved
from forkproof.locks.runs import Held
from forkproof.locks.summary import Step, Summaries
from forkproof.locks.values import Content, Entry, Made, Named, Object, Value, root, substituted
from forkproof.model import Answer
from forkproof.program import Columns, Function
from forkproof.signature_values import LockFunction

Functions = npt.NDArray[np.bool_]
"""Membership of every function."""

_ONE: Final = Value(None, 1)
_IS_ONE: Final = Const(1)
KINDS: Final = frozenset({"mutex", "rwlock", "spin", "ticket", "sem", "count", "permit", "object"})
"""What can be held by a thread that does not exist; a count is a semaphore that is posted elsewhere. A once or a guard
is taken once, a FILE is libc's."""
_TAKES: Final = frozenset({"acquire", "try", "wait"})
_FEW: Final = 40
"""Functions that are sooner interpreted than compared with others first."""
_LARGE: Final = 1000
"""Instructions of a function beyond which its plain stores are not looked at: what makes a lock new is small."""
_LETTING_GO: Final = frozenset(
    {AtomicKind.ADD, AtomicKind.CLEAR_BITS, AtomicKind.OTHER, AtomicKind.EXCLUSIVE, AtomicKind.SWAP}
)
_SHARED_INITS: Final = frozenset({"sem_init", "pthread_spin_init"})
_SHARING: Final = (
    "pthread_mutexattr_setpshared",
    "pthread_rwlockattr_setpshared",
    *sorted(_SHARED_INITS),
)
"""What makes a lock, or its attributes, for several processes if its second argument says so."""
_TYPING: Final = ("pthread_mutexattr_settype", "pthread_mutexattr_setkind_np")
_OWNED: Final = frozenset({1, 2})
"""PTHREAD_MUTEX_RECURSIVE and PTHREAD_MUTEX_ERRORCHECK, in glibc and musl."""
_KIND: Final = 16
"""Where a pthread_mutex_t of glibc tells its type: bits/struct_mutex.h."""
_WRAPPER: Final = 256
"""Bytes of a function that may do no more than make a lock new."""
_NEAR: Final = 2
"""Calls between a function that returns new memory and the allocation, at most."""
_WRAPPERS: Final = 4
"""Functions that pass a lock on to one another."""


class Place(NamedTuple):
    """One acquisition of a lock, in a function that names it."""

    function: Function
    steps: tuple[Step, ...]
    """From the function to where it waits."""
    blocking: bool
    is_shared: bool
    """A reader's, which waits for writers only."""
    gates: Held
    """What is held already."""

    @property
    def site(self) -> int:
        """Where in the function."""
        return self.steps[0].site


class OtherLocks:
    """The places where locks are taken, found among the functions that are asked about."""

    def __init__(
        self,
        flow: Flow,
        libc_objects: frozenset[int],
        libc: Functions,
        owned: Collection[Function],
        given: Mapping[Function, Collection[Value]] | None = None,
        using: Mapping[Function, LockFunction] | None = None,
        counted: frozenset[Value] = frozenset(),
    ) -> None:
        """`libc`: libc's own functions, those inside a static program among them. `owned`: functions of allocators,
        whose locks have rules of their own. `given`: first arguments that threads and handlers get. `using`: functions
        of libc that take the lock of an object that they are given. `counted`: semaphores that begin with something to
        take, which makes locks of them."""
        self.flow, self.graph = flow, flow.graph
        self.given, self.using = given or {}, using or {}
        self.made = frozenset(
            begin for values in self.given.values() for v in values if isinstance(begin := root(v.base), Made)
        )
        self.usable = ~libc
        self.usable[list(owned)] = False
        self.summaries = Summaries(flow, libc_objects, (), np.zeros(flow.graph.size, bool), self.using, libc, counted)

    # ---- what is worth a look --------------------------------------------------------------

    @cached_property
    def library_takers(self) -> Functions:
        """Functions that call a lock function which can leave a lock taken."""
        found = np.zeros(self.graph.size, bool)
        found[self.graph.source[self._taking_edges]] = True
        return found & self.usable

    @cached_property
    def _taking_edges(self) -> Columns:
        locks = self.flow.signatures.locks
        names = [n for n, f in locks.items() if f.op in _TAKES and (f.kind in KINDS or f.op == "wait")]
        return self._calls_of([*self.flow.program.called(sorted(names)), *self.using])

    def _calls_of(self, functions: Iterable[Function]) -> Columns:
        graph, wanted = self.graph, np.zeros(self.graph.size, bool)
        wanted[list(functions)] = True
        return np.flatnonzero(wanted[graph.target] & np.isin(graph.kind, [int(k) for k in CALLS]))

    def spinners(self, reached: Functions) -> set[Function]:
        """Functions that hold an atomic operation, and repeat it until it succeeds, or wait, or call what waits."""
        found: set[Function] = set()
        base = self.flow.program.base
        reached = reached & self.usable
        for obj in range(len(self.flow.program.codes)):
            if reached[base[obj] : base[obj + 1]].any():
                found |= {f for f in self._spinning(obj) if reached[f]}
                evidence = self.summaries.evidence[obj]
                found |= {f for f in evidence.may_be_atomics if reached[f] and f not in found and evidence.spins(f)}
        return found

    def _spinning(self, obj: int) -> set[Function]:
        known = self._spinners.get(obj)
        if known is None:
            evidence = self.summaries.evidence[obj]
            waiting = evidence.waiting
            callers = {c for f in waiting for c in self._callers(f)}
            known = self._spinners[obj] = {f for f in {*waiting, *callers} if evidence.holds_atomic(f)}
        return known

    @cached_property
    def _spinners(self) -> dict[int, set[Function]]:
        return {}

    def follow(self, one: Functions, two: Functions, always: Functions) -> None:
        """Interpret what may use a lock that functions of both sets use, and what passes locks to it.

        The set with fewer users of locks comes first; of the other, those that refer to where its locks are, and of
        `always`, the fork handlers, likewise.
        """
        one, two, always = one & self.usable, two & self.usable, always & self.usable
        spinning = self.spinners(one)
        spinning |= self.spinners(two) if spinning else set()
        self.summaries.direct[list(spinning)] = True
        cells = Cells(self.flow, self.summaries.library, spinning, self.given)
        few, many = sorted((one, two), key=lambda side: int(np.count_nonzero(self.summaries.direct & side)))
        is_small = int(np.count_nonzero(self.summaries.direct & few)) <= _FEW
        self._follow(few, cells, None if is_small else self._words(many, cells))
        words = [begin for address in self.places(few) if (begin := begin_of(address)) >= 0]
        if words:
            self._follow(many | always, cells, unique(np.array(words, np.int64)))

    def _follow(self, among: Functions, cells: Cells, words: Columns | None) -> None:
        """Functions of a set that may name a lock near one of these words, with what they pass it to."""
        pending = [Function(f) for f in np.flatnonzero(self.summaries.direct & among).tolist()]
        for _ in range(_WRAPPERS):
            chosen = [f for f in pending if not self.summaries.relevant[f] and self._may_name(f, cells, words, among)]
            for function in chosen:
                self.summaries.add(function)
            telling = [f for f in pending if self.summaries.of(f).depends_on_caller]
            pending = sorted({c for f in telling for c in self._callers(f) if among[c]})

    def _words(self, among: Functions, cells: Cells) -> Columns:
        """What the functions of a set that use locks refer to, and those that may pass locks to them."""
        direct = [Function(f) for f in np.flatnonzero(self.summaries.direct & among).tolist()]
        callers = {c for f in direct if not cells.is_exact(f) for c in self._callers(f) if among[c]}
        return unique(np.concatenate([np.zeros(0, np.int64), *(cells.of(f) for f in {*direct, *callers})]))

    def _may_name(
        self, function: Function, cells: Cells, words: Columns | None, among: Functions, depth: int = 2
    ) -> bool:
        """It refers to where a lock may be, or uses what it is given by a function that does."""
        if words is None or near(cells.of(function), words) or near(self._given_by(function), words):
            return True
        if not depth or cells.is_exact(function):
            return False
        callers = [c for c in self._callers(function) if among[c]]
        return any(near(cells.of(c), words) for c in callers) or any(
            self._may_name(c, cells, words, among, depth - 1) for c in callers if not len(cells.of(c))
        )

    def _given_by(self, function: Function) -> Columns:
        """Where the variables are that functions of its own object give to it."""
        base = self.flow.program.base
        obj = self.flow.program.object_of(function)
        own = [c for c in self._callees(function) if base[obj] <= c < base[obj + 1]]
        values = [value for callee in own if (value := self.summaries.given(callee)) is not None]
        return unique(np.array([begin for value in values if (begin := begin_of(value)) >= 0], np.int64))

    def _callers(self, function: Function) -> list[Function]:
        graph = self.graph
        edges = [e for e in graph.edges_to(function) if int(graph.kind[e]) in CERTAIN]
        return sorted({self.flow.whole(Function(f)) for f in unique(graph.source[edges]).tolist()})

    def _callees(self, function: Function) -> list[Function]:
        return [Function(int(self.graph.target[e])) for e in self.flow.outgoing(function)]

    # ---- who takes what --------------------------------------------------------------------

    def places(self, among: Functions) -> Mapping[Value, tuple[Place, ...]]:
        """Where the functions of a set take locks that have an identity."""
        found: dict[Value, list[Place]] = {}
        functions = np.flatnonzero(among & self.summaries.relevant).tolist()
        for number in functions:
            for address, place in self.taken_in(Function(number)):
                found.setdefault(address, []).append(place)
        return {address: tuple(places) for address, places in found.items()}

    def taken_in(self, function: Function) -> list[tuple[Value, Place]]:
        """The locks that a function takes and names itself, or passes to what takes them."""
        if function not in self._taken:
            self._taken[function] = self._find_taken(function)
        return self._taken[function]

    @cached_property
    def _taken(self) -> dict[Function, list[tuple[Value, Place]]]:
        return {}

    def _find_taken(self, function: Function) -> list[tuple[Value, Place]]:
        summaries, found = self.summaries, []
        run = summaries.run(function)
        for acquire in run.acquires:
            step, address = Step(function, acquire.site), self._told(function, acquire.address)
            if self._is_lock(acquire.kind, address):
                held = self._all_told(function, acquire.held)
                found.append((address, Place(function, (step,), acquire.blocking, self._is_shared(step), held)))
        for call in run.calls:
            callee = Function(call.target)
            for taken in summaries.of(callee).taken:
                if taken.kind not in KINDS or not isinstance(root(taken.address.base), Entry):
                    continue
                address = self._told(function, summaries.replaced(callee, call.arguments, taken.address))
                if self._is_lock(taken.kind, address):
                    steps = (Step(function, call.site), *taken.path)
                    blocking = taken.blocking or call.site in run.waiting_calls
                    held = self._all_told(function, call.held)
                    found.append((address, Place(function, steps, blocking, self._is_shared(steps[-1]), held)))
        for value in sorted(self.given.get(function, ()), key=repr):
            found += self._taken_of(function, value)
        return found

    def _is_lock(self, kind: str, address: Value) -> bool:
        """It has an identity, and is something that others can hold."""
        is_held = kind in KINDS and (kind != "count" or address in self.summaries.counted)
        is_held = is_held and (kind != "permit" or self._is_single(address))
        return is_held and (is_resolved(address) or is_element(address))

    def _is_single(self, address: Value) -> bool:
        """A word that begins with 1, at once or by a constructor: one has the permit, and the others wait."""
        if not isinstance(address.base, Object):
            return False
        word = self.flow.program.image(address.base.number).read(address.offset, 4)
        first = Value(None, int.from_bytes(word.tobytes(), "little"))
        return (self._constructed.of(address) or {first}) == {_ONE}

    @cached_property
    def _constructed(self) -> Stores:
        """What constructors store into words."""
        program = self.flow.program
        constructors = {
            program.function(obj, rva) for obj in range(len(program.codes)) for rva in program.image(obj).constructors
        }
        return Stores(self.summaries, constructors.__contains__)

    def _told(self, function: Function, value: Value) -> Value:
        """A value of one function's, where it begins at something that the function hands to a thread as well."""
        begin, convention = root(value.base), self.flow.convention
        is_result = isinstance(begin, Named) and begin.register == convention.result
        made = Made(function, begin.site if is_result and isinstance(begin, Named) else -1)
        if not self.made or made not in self.made or not (is_result or begin == Entry(convention.stack)):
            return value
        return substituted(value, lambda base: Value(made if base == begin else base, 0))

    def _all_told(self, function: Function, held: Held) -> Held:
        return frozenset(self._told(function, h) for h in held) if self.made else held

    def _taken_of(self, function: Function, first: Value) -> Iterator[tuple[Value, Place]]:
        """The locks that a thread or a handler takes by way of its first argument."""
        for taken in self.summaries.of(function).taken:
            if taken.kind in KINDS and isinstance(root(taken.address.base), Entry):
                address = self.summaries.replaced(function, (first,), taken.address)
                if self._is_lock(taken.kind, address):
                    is_shared = self._is_shared(taken.path[-1])
                    yield address, Place(function, taken.path, taken.blocking, is_shared, frozenset())

    def _is_shared(self, step: Step) -> bool:
        targets = [Function(int(self.graph.target[e])) for e in self.flow.edges_at(step.function, step.site)]
        library = self.summaries.library
        return any(t in library and library[t].shared for t in targets)

    # ---- what undoes an inheritance --------------------------------------------------------

    def held_at(self, function: Function, site: int) -> Held:
        """What a function holds whenever it makes a call; its callers' locks are not among it."""
        callees = self._callees(function)
        for callee in callees:  # that neither a thread nor the child runs, but the parent before it forks
            if self.library_takers[callee] and not self.summaries.relevant[callee]:
                self.summaries.add(callee)
                self.summaries.forget(function)
        if not self.summaries.relevant[function]:
            is_taker = self.library_takers[function]
            if not is_taker and not any(self.summaries.relevant[c] and self.keeps(c) for c in callees):
                return frozenset()
            self.summaries.add(function)
        held = [call.held for call in self.summaries.run(function).calls if call.site == site]
        return self._all_told(function, frozenset.intersection(*held)) if held else frozenset()

    @cached_property
    def makers(self) -> Functions:
        """Functions that make a lock new."""
        found = np.zeros(self.graph.size, bool)
        found[self._callers_of(self._inits)] = True
        return found & self.usable

    @cached_property
    def once(self) -> frozenset[int]:
        """Edges to what `pthread_once` and its kin call."""
        graph, library = self.graph, self.summaries.library
        calls = [e for f, lock in library.items() if lock.kind == "once" for e in graph.edges_to(Function(f))]
        sites = {(int(graph.source[e]), int(graph.site[e])) for e in calls}
        found = (e for source in {s for s, _ in sites} for e in graph.edges_from(Function(source)))
        callbacks = (e for e in found if graph.kind[e] == EdgeKind.CALLBACK)
        return frozenset(e for e in callbacks if (int(graph.source[e]), int(graph.site[e])) in sites)

    def _guarded(self, function: Function) -> frozenset[int]:
        """What a function executes only while it makes a static object of its own, which happens once."""
        guards = self.summaries.guards
        if guards.isdisjoint(self._callees(function)):
            return frozenset()
        run = self.flow.explore_from(function, self.flow.program.rva_of(function), {}, guards)
        return frozenset(self.flow.body(function).addresses) - run.visited

    def _callers_of(self, functions: Iterable[Function]) -> list[Function]:
        graph = self.graph
        edges = [e for f in functions for e in graph.edges_to(f) if int(graph.kind[e]) in CALLS]
        return sorted({self.flow.whole(Function(f)) for f in graph.source[edges].tolist()})

    def is_shared_memory(self, address: Value) -> Answer:
        """The lock lies in memory that the child has in common with its parent, where the thread lets it go."""
        known, objects = self._shared
        begin = root(address.base)
        if address in known:
            return Answer.YES
        behind = isinstance(address.base, Content) and isinstance(begin, Object) and begin.number in objects
        return Answer.UNKNOWN if behind else Answer.NO

    @cached_property
    def _shared(self) -> tuple[frozenset[Value], frozenset[int]]:
        """Locks that are made for several processes, and the objects that make such whose addresses are not known."""
        flow, found, objects = self.flow, set[Value](), set[int]()
        makers = flow.program.called(_SHARING)
        for function in self._callers_of(makers):
            calls = [(int(self.graph.site[e]), Function(int(self.graph.target[e]))) for e in flow.outgoing(function)]
            sites = {site: target for site, target in calls if target in makers}
            states = flow.states(function, sites)
            asked = [s for s, state in states.items() if _is_asked(flow.passed(function, state, 1).constant)]
            named = [s for s in asked if makers[sites[s]] in _SHARED_INITS]
            made = [addresses for _, addresses, _ in self._made_at(function)] if len(named) < len(asked) else []
            for addresses in [*made, *(self._first_of(function, states[s]) for s in named)]:
                found.update(addresses)
                if not addresses:
                    objects.add(flow.program.object_of(function))
        return frozenset(found), frozenset(objects)

    def is_owned(self, address: Value) -> bool:
        """A mutex that only its owner may let go, recursive or checked: after a fork the child's thread is another."""
        if address in self._owned:
            return True
        begin = address.base
        if not isinstance(begin, Object) or begin.number >= len(self.flow.program.codes):
            return False
        kind = self.flow.program.image(begin.number).read(address.offset + _KIND, 4).tobytes()
        return int.from_bytes(kind, "little") in _OWNED

    @cached_property
    def _owned(self) -> frozenset[Value]:
        """Those of them that code makes: with attributes, in a function that sets such a type."""
        flow, found = self.flow, set[Value]()
        setters = flow.program.called(_TYPING)
        for function in self._callers_of(setters):
            targets = {int(self.graph.site[e]): Function(int(self.graph.target[e])) for e in flow.outgoing(function)}
            states = flow.states(function, [s for s, t in targets.items() if t in setters or t in self._inits])
            types = {flow.passed(function, st, 1).constant for s, st in states.items() if targets[s] in setters}
            if types and types <= _OWNED:
                plain = {s for s, st in states.items() if flow.passed(function, st, 1).constant == 0}
                found.update(a for s, addresses, _ in self._made_at(function) if s not in plain for a in addresses)
        return frozenset(found)

    def _first_of(self, function: Function, state: State) -> list[Value]:
        """What is passed first, as addresses."""
        value = state.register(self.flow.convention.arguments[0])
        return self._addresses(function, value)

    def made_by(self, function: Function) -> set[Value]:
        """The locks that a function makes new by a call, whenever it runs."""
        made = self._made(function)
        guarded = self._guarded(function) if made else frozenset()
        return {value for site, value in made if site not in guarded}

    def makes_another(self, function: Function) -> bool:
        """It makes a lock new whose address is not known: a parameter's, or one that some other way leads to. In
        memory that it has just got, that is nobody else's lock."""
        return any(not addresses and not is_fresh for _, addresses, is_fresh in self._made_at(function))

    def cleared_in(self, function: Function) -> list[tuple[int, Value]]:
        """Where a function makes a lock new, by a call or by filling a word that it takes no lock at."""
        if function not in self._cleared:
            found = [*self._made(function), *self._stored(function)]
            guarded = self._guarded(function) if found else frozenset()
            self._cleared[function] = [(site, value) for site, value in found if site not in guarded]
        return self._cleared[function]

    @cached_property
    def _cleared(self) -> dict[Function, list[tuple[int, Value]]]:
        return {}

    def cleared_by(self, function: Function) -> set[Value]:
        """The locks that a function makes new in one way or another, and does not take itself."""
        every = frozenset(int(self.graph.site[e]) for e in self.flow.outgoing(function))
        return {value for _, value in self.cleared_in(function)} | self.remade_in(function, every)

    def remade_in(self, function: Function, sites: Collection[int]) -> Held:
        """The elements of lists that a function makes new in turns, at these sites only; the first stands for all."""
        graph, flow = self.graph, self.flow
        calls = [(int(graph.site[e]), Function(int(graph.target[e]))) for e in flow.outgoing(function)]
        known = {site: self._inits[target].argument for site, target in calls if target in self._inits}
        known |= {
            s: lock.argument for s, t in calls if (lock := self.summaries.library.get(t)) and lock.op == "release"
        }
        if not any(site in sites and flow.loops(function, site) for site in known):
            return frozenset()
        states = flow.states(function, known)
        passed = {s: state.register(flow.convention.arguments[known[s]]) for s, state in states.items()}
        if not any(value is None for value in passed.values()):
            return frozenset()
        if any(value is None and s not in sites for s, value in passed.items()) or self._guarded(function):
            return frozenset()
        named = {address for value in passed.values() for address in self._addresses(function, value)}
        self.summaries.add(function)
        run = self.summaries.run(function)
        return run.releases - named - {a.address for a in run.acquires}

    def _made(self, function: Function) -> list[tuple[int, Value]]:
        return [(site, value) for site, values, _ in self._made_at(function) for value in values]

    def _made_at(self, function: Function) -> list[tuple[int, list[Value], bool]]:
        """Where a function makes locks new by a call: what is known of the address, and whether it is new memory's."""
        graph, flow = self.graph, self.flow
        targets = {int(graph.site[e]): Function(int(graph.target[e])) for e in flow.outgoing(function)}
        arguments = {s: self._inits[t].argument for s, t in targets.items() if t in self._inits}
        found = []
        for site, state in flow.states(function, arguments).items():
            value = state.register(flow.convention.arguments[arguments[site]])
            addresses = self._addresses(function, value)
            library = self.summaries.library.get(targets[site])
            if library is not None and library.op == "release" and self.summaries.relevant[function]:
                own = {address for address, _ in self.taken_in(function)}
                addresses = [address for address in addresses if address not in own]
            found.append((site, addresses, value is not None and self._is_fresh(function, value)))
        return found

    def _is_fresh(self, function: Function, value: KnownValue) -> bool:
        """A call has returned it that allocates, or does so not far below."""
        if not isinstance(value.base, Result):
            return False
        targets = [int(self.graph.target[e]) for e in self.flow.edges_at(function, value.base.site)]
        return bool(targets) and all(0 <= int(self.flow.to_memory[t]) <= _NEAR for t in targets)

    @cached_property
    def _inits(self) -> Mapping[Function, LockFunction]:
        """What makes a lock new. In glibc for x86-64 pthread_spin_init is also pthread_spin_unlock."""
        locks = self.flow.signatures.locks
        called = self.flow.program.called(sorted(name for name, f in locks.items() if f.op == "init"))
        found = {f: locks[name] for f, name in called.items()}
        fresh = dict(found)
        for _ in range(_WRAPPERS):
            fresh = {f: made for f, made in self._passing(fresh).items() if f not in found}
            found |= fresh
        return found

    def _passing(self, inits: Mapping[Function, LockFunction]) -> dict[Function, LockFunction]:
        """Functions that make new what they are given: rb_native_mutex_initialize."""
        flow, graph, found = self.flow, self.graph, dict[Function, LockFunction]()
        names = {KnownEntry(register): i for i, register in enumerate(flow.convention.arguments)}
        for function in self._callers_of(inits):
            if flow.program.size_of(function) > _WRAPPER:
                continue
            targets = {int(graph.site[e]): Function(int(graph.target[e])) for e in flow.outgoing(function)}
            sites = {site: inits[target] for site, target in targets.items() if target in inits}
            for site, state in flow.states(function, sites).items():
                value = state.register(flow.convention.arguments[sites[site].argument])
                if value is not None and value.offset == 0 and value.base in names:
                    found[function] = replace(sites[site], argument=names[value.base])
        return found

    def _stored(self, function: Function) -> list[tuple[int, Value]]:
        flow, body = self.flow, self.flow.body(function)
        if len(body.instructions) > _LARGE:
            return []
        own = {address for address, _ in self.taken_in(function)} if self.summaries.relevant[function] else set()
        atomics = dict(self._let_go_at(function))
        stores: dict[int, list[Memory]] = {site: [atomic.cell] for site, atomic in atomics.items()}
        ones = {
            i.address for i in body.instructions for o in i.operations if isinstance(o, Set) and o.source == _IS_ONE
        }
        for i in body.instructions:
            for o in i.operations:  # a pair of registers is two
                if isinstance(o, Set) and isinstance(o.destination, Memory) and not o.destination.indexed:
                    is_new = o.source in (Const(0), Const(1)) or isinstance(o.source, Register)
                    if is_new and o.destination.base != flow.convention.stack:
                        cell = o.destination
                        words = range(0, max(o.bits // 8, 1), 4)  # of vectors, four or more
                        stores.setdefault(i.address, []).extend(
                            cell._replace(displacement=cell.displacement + word) for word in words
                        )
        found = []
        for site, state in flow.states(function, stores).items():
            atomic = atomics.get(site)
            if atomic is not None and atomic.kind is AtomicKind.SWAP and not _may_be_zero(atomic.stores, state):
                continue
            for cell in stores[site]:
                value = address_of(cell, state, body.instructions[body.index[site]].end)
                addresses = [address for address in self._addresses(function, value) if address not in own]
                found += [(site, a) for a in addresses if site not in ones or self._is_single(a)]
        for site, values in self._filled.by(function):
            found += [(site, a) for value in values for a in self._addresses(function, value) if a not in own]
        return found

    @cached_property
    def _filled(self) -> Filled:
        return Filled(self.flow)

    def _let_go_at(self, function: Function) -> Iterator[tuple[int, Atomic]]:
        """Atomic operations that may let go a bit or a ticket: those that add, clear bits, or that nothing tells; and
        exchanges, whose value is looked at later."""
        helpers = self.summaries.evidence[self.flow.program.object_of(function)].helper_sites(function)
        found = [(i.address, o) for i in self.flow.body(function).instructions for o in i.operations]
        for site, operation in (*found, *helpers):
            if isinstance(operation, Atomic) and operation.kind in _LETTING_GO and not operation.cell.indexed:
                yield site, operation

    def _addresses(self, function: Function, value: KnownValue | None) -> list[Value]:
        """A value of `explore` as an address: through a pointer that the loader fills, both ways to write it."""
        obj = self.flow.program.object_of(function)
        if value is None:
            return []
        made = Made(function, value.base.site if isinstance(value.base, Result) else -1)
        if made in self.made and (
            isinstance(value.base, Result) or value.base == KnownEntry(self.flow.convention.stack)
        ):
            return [Value(made, value.offset)]
        if value.base is None:
            return [Value(Object(obj), value.offset)]
        if not isinstance(value.base, Word):
            return []
        target = self.flow.program.image(obj).pointer_at(value.base.address)
        found = [Value(Content(Object(obj), value.base.address), value.offset)]
        return found if target is None else [*found, Value(Object(obj), target + value.offset)]

    def let_go_by(self, function: Function) -> set[Value]:
        """The locks that a function makes new, clears, or releases without having taken them."""
        found = self.cleared_by(function)
        if self.summaries.relevant[function]:
            run = self.summaries.run(function)
            found |= run.releases - {a.address for a in run.acquires}
        return found

    def keeps(self, function: Function) -> bool:
        """The function returns with a lock."""
        return any(e.held for e in self.summaries.of(function).exits)


def _may_be_zero(operand: Operand | None, state: State) -> bool:
    """What is exchanged for may be 0: an atomic store on x86-64, which makes the word new as a plain one does.

    Compilers take fork's result for the 0, which nothing but the branch before tells.
    """
    if not isinstance(operand, Register):
        return operand == Const(0)
    value = state.register(operand.name)
    return value is None or value.base is not None or value.offset == 0


def _is_asked(constant: int | None) -> bool:
    return constant is not None and constant & 0xFFFFFFFF != 0
