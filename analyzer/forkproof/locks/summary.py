"""What functions do with locks, composed over the call graph.

Owns: which functions are worth following, their summaries, and the substitution of arguments at calls.
Takes: `Flow`. Gives: `Summaries`, a memoised service.
Must never: follow a function that neither acquires nor calls one whose locks depend on its arguments: the locks of
      such a function are those of its callees.
Wrong where: functions call each other in a circle (a function that is being summarised counts as doing nothing);
      where a lock's address passes through memory that one function writes and another reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CALLS, EdgeKind
from forkproof.code.operations import Atomic, Call, Memory, Return
from forkproof.code.values import Result
from forkproof.code.values import Word as KnownWord
from forkproof.elf.tables import RelocationKind
from forkproof.flow import Flow
from forkproof.locks.branches import Attempts
from forkproof.locks.data import STEPS, Data
from forkproof.locks.evidence import ObjectEvidence
from forkproof.locks.identity import Arrays
from forkproof.locks.interpret import interpret
from forkproof.locks.runs import NOTHING, Effect, Exit, Held, Run
from forkproof.locks.state import State
from forkproof.locks.survivors import Survivors
from forkproof.locks.values import (
    Base,
    Content,
    Entry,
    Foreign,
    Object,
    Substitution,
    Value,
    root,
    substituted,
    unrooted,
)
from forkproof.model import Frame
from forkproof.program import Function
from forkproof.signature_values import LockFunction

_FOLLOWED: Final = CALLS | {EdgeKind.IFUNC, EdgeKind.CALLBACK}
_ASKS: Final = 2
"""Calls between a function that gets the time and the clock: a program has names of its own for it."""
_SMALL: Final = 120
"""Bytes of a function that may be an unlock method with a plain store."""
_GETTER: Final = 24
"""Bytes of a function that may do no more than give the address of a variable, or what one holds;"""
_MAKER: Final = 512
"""and of one that gives the address of a static object, which it makes when it first runs."""
_NEAR: Final = 2
"""Calls between such a function and the allocation, at most."""
_MOST: Final = 160
"""Locks that one summary keeps."""


class Step(NamedTuple):
    """A call on the way to an acquisition: the calling function, and where."""

    function: Function
    site: int


def step_frames(flow: Flow, path: Sequence[Step]) -> tuple[Frame, ...]:
    """A way to an acquire site as a report shows it; the last step is the site itself."""
    frames = []
    for step in path:
        kinds = [int(flow.graph.kind[e]) for e in flow.edges_at(step.function, step.site)]
        edge = EdgeKind(min(kinds)).name.lower() if kinds else EdgeKind.CALLBACK.name.lower()
        frames.append(flow.frame(step.function, step.site, "" if step is path[-1] else edge))
    return tuple(frames)


class Taken(NamedTuple):
    """A lock that a function takes, itself or through calls."""

    address: Value
    kind: str
    blocking: bool
    gates: Held
    """Locks that are held each time that it is taken."""
    path: tuple[Step, ...]
    """From the function to the acquire site."""


def openness(taken: Taken) -> tuple[bool, int, int]:
    """What orders the ways to one lock: first those that wait, with few locks held, and short."""
    return not taken.blocking, len(taken.gates), len(taken.path)


@dataclass(frozen=True, eq=False)
class Summary:
    """The locks of one function, in its own terms."""

    taken: tuple[Taken, ...]
    exits: tuple[Exit, ...] = (Exit(NOTHING, None),)
    releases: frozenset[Value] = frozenset()
    is_complete: bool = True

    @cached_property
    def addresses(self) -> frozenset[Value]:
        """The locks that it takes."""
        return frozenset(t.address for t in self.taken)

    @cached_property
    def entering(self) -> tuple[Taken, ...]:
        """Those that it reaches through an argument."""
        return tuple(t for t in self.taken if isinstance(root(t.address.base), Entry))

    @cached_property
    def fixed(self) -> frozenset[Value]:
        """Of what it releases, that which lies in objects."""
        return frozenset(r for r in self.releases if isinstance(root(r.base), Object))

    @cached_property
    def passed(self) -> frozenset[Value]:
        """Of what it releases, the rest."""
        return self.releases - self.fixed

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Registers on entry that its locks are reached through."""
        exits = (h for e in self.exits for h in e.held)
        values = (*(t.address for t in self.taken), *(g for t in self.taken for g in t.gates), *exits, *self.releases)
        roots = (root(value.base) for value in values)
        return frozenset(r.register for r in roots if isinstance(r, Entry))

    @cached_property
    def depends_on_caller(self) -> bool:
        """Its locks are the caller's arguments, or it leaves something locked or unlocked."""
        return (
            bool(self.entering)
            or any(e.held for e in self.exits)
            or any(isinstance(root(r.base), Entry) for r in self.releases)
        )


EMPTY: Final = Summary(())


class Summaries:
    """Summaries of functions, made when they are asked for."""

    def __init__(
        self,
        flow: Flow,
        libc_objects: frozenset[int],
        objects: Iterable[int],
        among: npt.NDArray[np.bool_] | None = None,
        using: Mapping[Function, LockFunction] | None = None,
        libc: npt.NDArray[np.bool_] | None = None,
        counted: frozenset[Value] = frozenset(),
    ) -> None:
        """Only functions of these objects are followed: the allocators and whoever registers fork handlers.

        Or, where the caller knows better, only those in `among`, to which it adds. `using`: lock functions that no
        signature names. `libc`: libc's own functions, if they are not all that its objects hold. `counted`: semaphores
        that are locks, whoever posts them.
        """
        self.among, self.using, self.libc, self.counted = among, using or {}, libc, counted
        self.objects = frozenset(objects) - (libc_objects if libc is None else frozenset())
        self.flow, self.graph, self.program = flow, flow.graph, flow.program
        self.libc_objects = libc_objects
        self.known: dict[Function, Summary] = {}
        self.runs: dict[Function, Run] = {}
        self._stores: dict[Function, Mapping[Value, frozenset[Value]]] = {}
        self._places: dict[Value, dict[Function, tuple[Step, ...]]] = {}
        self._indexed = 0
        self._descriptors: dict[int, frozenset[int]] = {}
        self._given: dict[Function, Value | None] = {}
        self.prepared: dict[Function, tuple[Held, bool]] = {}
        self.forking: frozenset[Function] = frozenset(flow.forkers)
        """Functions of which calls are noted for what is held there."""

    # ---- which functions matter ------------------------------------------------------------

    @cached_property
    def library(self) -> dict[int, LockFunction]:
        """The lock functions of the closure, by number."""
        locks = self.flow.signatures.locks
        # Of the names of one function, one that releases tells more than one that makes a lock new.
        names = sorted(locks, key=lambda name: (locks[name].op == "init", name))
        named = {int(f): locks[name] for f, name in self.program.called(names).items()}
        return {**{int(f): lock for f, lock in self.using.items()}, **named}

    @cached_property
    def survivors(self) -> Survivors:
        """What calls leave in registers."""
        return Survivors(self.flow)

    @cached_property
    def arrays(self) -> Arrays:
        """Sameness of addresses in this program."""
        return Arrays(self.program)

    @cached_property
    def thread_cells(self) -> frozenset[Function]:
        """`__tls_get_addr`, wherever it is."""
        return frozenset(self.program.called(["__tls_get_addr"]))

    def descriptors(self, obj: int) -> frozenset[int]:
        """Words that ld.so fills in for variables of the thread."""
        if obj not in self._descriptors:
            table = self.program.image(obj).relocations
            self._descriptors[obj] = frozenset(
                table.offset[table.of(RelocationKind.TLS, RelocationKind.MODULE)].tolist()
            )
        return self._descriptors[obj]

    @cached_property
    def evidence(self) -> tuple[ObjectEvidence, ...]:
        """What waits and what is atomic, object by object."""
        return tuple(ObjectEvidence(self.flow, obj) for obj in range(len(self.program.codes)))

    @cached_property
    def direct(self) -> npt.NDArray[np.bool_]:
        """Functions that use a lock function or an atomic operation themselves; libc's own insides left out."""
        found = np.zeros(self.graph.size, bool)
        for target in self.library:
            for edge in self.graph.edges_to(Function(target)):
                if int(self.graph.kind[edge]) in CALLS:
                    found[self.flow.whole(Function(int(self.graph.source[edge])))] = True
        for obj in sorted(self.objects):
            found[list(self.evidence[obj].atomics)] = True
        base = self.program.base
        for obj in self.libc_objects if self.libc is None else ():
            found[base[obj] : base[obj + 1]] = False
        return found if self.libc is None else found & ~self.libc

    @cached_property
    def relevant(self) -> npt.NDArray[np.bool_]:
        """Functions that lead to a direct one, if the caller has not chosen."""
        if self.among is not None:
            return self.among
        roots = np.flatnonzero(self.direct).tolist()
        reach = self.graph.distances(roots, _FOLLOWED, backward=True, blocked=self.flow.dying)
        found = reach >= 0
        found[list(self.library)] = False
        base = self.program.base
        for obj in range(len(self.program.codes)):  # libc's own locks are `forkproof.libc_locks`'
            if obj not in self.objects:
                found[base[obj] : base[obj + 1]] = False
        return found if self.libc is None else found & ~self.libc

    @cached_property
    def clocks(self) -> npt.NDArray[np.bool_]:
        """Functions that tell the time, and those that get it from one within `_ASKS` calls."""
        reach = self.graph.distances(
            self.program.called(sorted(self.flow.signatures.clocks.exact)), CALLS, backward=True
        )
        return (reach >= 0) & (reach <= _ASKS)

    def add(self, function: Function) -> None:
        """Follow one more function, as if it had been among the chosen ones all along."""
        self.relevant[function] = True
        self.known.pop(function, None)

    def forget(self, function: Function) -> None:
        """What one of its callees does is known better now: it is followed again when it is asked about."""
        self.known.pop(function, None)
        self.runs.pop(function, None)

    # ---- summaries -------------------------------------------------------------------------

    def of(self, function: Function) -> Summary:
        """The summary of a function; an empty one for what cannot lock, and in a circle of calls."""
        known = self.known.get(function)
        if known is None:
            if not self.relevant[function]:
                return EMPTY
            self.known[function] = EMPTY
            known = self.known[function] = self._make(function)
        return known

    def _make(self, function: Function) -> Summary:
        callees = [c for c in self._callees(function) if self.relevant[c]]
        summaries = [self.of(callee) for callee in callees]
        if not (self.direct[function] or any(summary.depends_on_caller for summary in summaries)):
            return Summary(
                self._merged(function, (t for c, s in self._sites(function) for t in self._lifted(function, s, c)))
            )
        run = self.run(function)
        taken = [Taken(a.address, a.kind, a.blocking, a.held, (Step(function, a.site),)) for a in run.acquires]
        noted = {(c.site, c.target) for c in run.calls}
        passed = [
            t._replace(blocking=True) if c.site in run.waiting_calls else t
            for c in run.calls
            for t in self._passed(function, c.site, Function(c.target), c.arguments, c.held)
        ]
        others = [
            t
            for callee, site in self._sites(function)
            if (site, callee) not in noted and not self._is_call(callee, function, site)
            for t in self._lifted(function, site, callee)
        ]
        # What only this function can name, no caller can release: it is a release that was missed.
        exits = tuple(
            dict.fromkeys(e._replace(held=frozenset(h for h in e.held if self._is_rooted(h))) for e in run.exits)
        )
        return Summary(self._merged(function, [*taken, *passed, *others]), exits, run.releases, run.complete)

    def _is_call(self, callee: Function, function: Function, site: int) -> bool:
        """The callee is called here by an instruction: had it been feasible, the run would have noted it."""
        return any(self.graph.target[e] == callee for e in self.flow.edges_at(function, site))

    def run(self, function: Function, held: Held = NOTHING) -> Run:
        """The function followed on its own."""
        known = self.runs.get(function) if not held else None
        if known is None:
            known = self.interpreted_run(function, held)
            if not held:
                self.runs[function] = known
        return known

    def held_at(self, function: Function, site: int) -> Held:
        """What a function holds whenever it makes a call, whatever is called; its callers' locks are not among it."""
        body, calls = self.flow.body(function), _AllCalls(self, function)
        run = interpret(body, self.flow.convention, calls.obj, calls, NOTHING)
        held = [call.held for call in run.calls if call.site == site]
        return frozenset.intersection(*held) if held else NOTHING

    def interpreted_run(
        self,
        function: Function,
        held: Held,
        watched: Held | None = None,
        *,
        joined: bool = False,
        calls: FunctionCalls | None = None,
        flagged: bool = False,
    ) -> Run:
        """The function followed with locks held on entry, and with `calls` of another kind; `flagged`: `interpret`."""
        calls = calls or FunctionCalls(self, function)
        body = self.flow.body(function)
        return interpret(body, self.flow.convention, calls.obj, calls, held, watched, joined=joined, flagged=flagged)

    def stores(self, function: Function) -> Mapping[Value, frozenset[Value]]:
        """What a function stores into words of objects.

        Where it has no run yet it is followed alone: to make its summary would take those of all that it calls.
        """
        known = self.runs.get(function)
        if known is not None:
            return known.stores
        if function not in self._stores:
            self._stores[function] = self.interpreted_run(function, NOTHING, calls=Alone(self, function)).stores
        return self._stores[function]

    def _callees(self, function: Function) -> list[Function]:
        return list(dict.fromkeys(c for c, _ in self._sites(function)))

    def _sites(self, function: Function) -> Iterator[tuple[Function, int]]:
        for edge in self.flow.outgoing(function):
            if int(self.graph.kind[edge]) in _FOLLOWED:
                yield Function(int(self.graph.target[edge])), int(self.graph.site[edge])

    def _lifted(self, function: Function, site: int, callee: Function) -> Iterator[Taken]:
        """The callee's locks that do not depend on arguments."""
        for taken in self.of(callee).taken:
            if not isinstance(root(taken.address.base), Entry):
                yield Taken(*taken[:4], (Step(function, site), *taken.path))

    def _passed(
        self, function: Function, site: int, callee: Function, arguments: tuple[Value, ...], held: Held
    ) -> Iterator[Taken]:
        """The callee's locks in the caller's terms."""
        replace = self._replacement(callee, arguments)
        for taken in self.of(callee).taken:
            gates = held | {substituted(g, replace) for g in taken.gates}
            yield Taken(
                substituted(taken.address, replace),
                taken.kind,
                taken.blocking,
                gates,
                (Step(function, site), *taken.path),
            )

    def places(self, address: Value) -> dict[Function, tuple[Step, ...]]:
        """The functions in which the lock at an address is known to be that one, with the steps on to where it waits.

        Those that acquire it themselves, and those that pass it to a function that locks what it is given.
        """
        while self._indexed < len(self.runs):  # asking about a callee may add one
            new = list(self.runs.items())[self._indexed :]
            self._indexed += len(new)
            self._index(new)
        return dict(self._places.get(address, {}))

    def _index(self, runs: Iterable[tuple[Function, Run]]) -> None:
        found = self._places
        for function, run in runs:
            for call in run.calls:
                callee = Function(call.target)
                for taken in self.of(callee).entering:
                    if taken.blocking or call.site in run.waiting_calls:
                        passed = self._settled(function, self.replaced(callee, call.arguments, taken.address))
                        found.setdefault(passed, {}).setdefault(function, (Step(function, call.site), *taken.path))
            for acquire in run.acquires:
                if acquire.blocking:
                    settled = self._settled(function, acquire.address)
                    found.setdefault(settled, {}).setdefault(function, (Step(function, acquire.site),))

    def replaced(self, callee: Function, arguments: tuple[Value, ...], value: Value) -> Value:
        """One of a callee's values in its caller's terms."""
        return substituted(value, self._replacement(callee, arguments))

    def _replacement(self, callee: Function, arguments: tuple[Value, ...]) -> Substitution:
        names = self.flow.convention.arguments

        def replace(base: Base) -> Value:
            if isinstance(base, Entry) and base.register in names:
                position = names.index(base.register)
                if position < len(arguments):
                    return arguments[position]
            return Value(base if isinstance(base, Foreign) else Foreign(callee), 0)

        return replace

    def _settled(self, function: Function, value: Value) -> Value:
        """A value as a summary keeps it: what only this function knows is cut to the field that it is."""
        if self._is_rooted(value):
            return value
        begin = root(value.base)
        return unrooted(value, begin if isinstance(begin, Foreign) else Foreign(function))

    def _is_rooted(self, value: Value) -> bool:
        """The value means something to callers: a global, or reached through an argument."""
        begin = root(value.base)
        return isinstance(begin, Object) or (
            isinstance(begin, Entry) and begin.register in self.flow.convention.arguments
        )

    def _merged(self, function: Function, taken: Iterable[Taken]) -> tuple[Taken, ...]:
        """One entry for each lock: the most open way to it, and what is held on all ways."""
        found: dict[Value, Taken] = {}
        settled = cache(partial(self._settled, function))
        for each in taken:
            key = settled(each.address)
            one = Taken(key, each.kind, each.blocking, frozenset(map(settled, each.gates)), each.path)
            old = found.get(key)
            if old is None:
                if len(found) < _MOST:
                    found[key] = one
                continue
            better = min(old, one, key=openness)
            found[key] = better._replace(gates=old.gates & one.gates, blocking=old.blocking or one.blocking)
        return tuple(found.values())

    # ---- effects ---------------------------------------------------------------------------

    def effect(self, function: Function, arguments: tuple[Value, ...]) -> Effect | None:
        """What a call does to the locks of its caller, in the caller's terms."""
        summary = self.of(function) if self.relevant[function] else self._small(function)
        if summary is EMPTY or not (summary.releases or any(e.held for e in summary.exits)):
            return None
        replace = self._replacement(function, arguments)
        exits = tuple(Exit(frozenset(substituted(h, replace) for h in e.held), e.result) for e in summary.exits)
        return Effect(exits, frozenset(substituted(r, replace) for r in summary.passed), summary.fixed)

    def given(self, function: Function) -> Value | None:
        """What every call of a function returns, if all that it does is to give a variable: its address or content."""
        if function not in self._given:
            size = self.program.size_of(function)
            find = self._find_given if size <= _GETTER else self._find_made if size <= _MAKER else None
            self._given[function] = None if find is None else find(function)
        return self._given[function]

    def _find_made(self, function: Function) -> Value | None:
        """The static object of a function that makes it once, or what the variable holds that keeps one, if that is
        what it returns on every way; what it has just made is kept there."""
        callees = self._callees(function)
        is_maker = not self._making.isdisjoint(callees) or 0 <= int(self.flow.to_memory[function]) <= _NEAR
        if not is_maker:
            return None
        obj = self.program.object_of(function)
        image = self.program.image(obj)
        results = self.flow.explore_from(function, self.program.rva_of(function), {}).results
        kept = {r.base.address for r in results if r is not None and isinstance(r.base, KnownWord) and r.offset == 0}
        if len(kept) == 1 and all(r is None or isinstance(r.base, KnownWord | Result) for r in results):
            (word,) = kept
            return Value(Content(Object(obj), word), 0) if image.is_writable(word) else None
        value = results[0] if len(results) == 1 and not self.guards.isdisjoint(callees) else None
        is_address = value is not None and value.base is None and image.is_writable(value.offset)
        return Value(Object(obj), value.offset) if value is not None and is_address else None

    @cached_property
    def _making(self) -> frozenset[Function]:
        """The same, and g_once_init_enter."""
        return self.guards | {Function(f) for f, k in self.library.items() if k.kind == "once" and k.op == "acquire"}

    @cached_property
    def guards(self) -> frozenset[Function]:
        """What lets one thread make a static object, and keeps others waiting for that."""
        return frozenset(Function(f) for f, k in self.library.items() if k.kind == "guard" and k.op == "acquire")

    def _find_given(self, function: Function) -> Value | None:
        calls, convention, state = FunctionCalls(self, function), self.flow.convention, State()
        data = Data(convention, calls.obj, calls, Attempts())
        for instruction in self.flow.body(function).instructions:
            for operation in instruction.operations:
                if isinstance(operation, Return):
                    value = data.address_of(state.register(convention.result))
                    return value if isinstance(root(value.base), Object) else None
                step = STEPS.get(type(operation))
                if step is None or isinstance(getattr(operation, "destination", None), Memory):
                    return None
                step(data, instruction, operation, state)
        return None

    def _small(self, function: Function) -> Summary:
        """A small function without atomic operations may still unlock, with a plain store."""
        known = self.known.get(function)
        if known is None:
            known = self.known[function] = EMPTY  # in a circle of tail calls
            if self.program.size_of(function) <= _SMALL:
                body = self.flow.body(function)
                operations = [o for i in body.instructions for o in i.operations]
                if not any(isinstance(o, Call) for o in operations):
                    run = self.interpreted_run(function, NOTHING)
                    known = Summary((), run.exits, run.releases)
            self.known[function] = known
        return known


class FunctionCalls:
    """What the interpretation of one function asks."""

    def __init__(self, summaries: Summaries, function: Function) -> None:
        self.summaries, self.function, self.flow = summaries, function, summaries.flow
        self.obj = self.flow.program.object_of(function)
        self.image = self.flow.program.image(self.obj)
        self.effects = self.flow.effects(function)
        segments = [s for s in self.image.segments if not s.executable]
        self.ranges = [(s.rva, s.rva + s.memory_size) for s in segments]

    def targets(self, site: int) -> tuple[int, ...]:
        return tuple(self.flow.graph.target[self.flow.edges_at(self.function, site)].tolist())

    def comes_back(self, site: int) -> bool:
        return self.effects(site).returns

    def is_lock(self, semaphore: Value) -> bool:
        counted = self.summaries.counted
        return semaphore in counted or (bool(counted) and isinstance(root(semaphore.base), Entry))

    def keeps(self, site: int) -> frozenset[str]:
        return self.summaries.survivors.after(self.function, site)

    def library(self, target: int) -> LockFunction | None:
        return self.summaries.library.get(target)

    def helper(self, target: int) -> Atomic | None:
        evidence = self.summaries.evidence[self.flow.program.object_of(Function(target))]
        if Function(target) not in evidence.helpers:
            return None
        operations = (o for i in self.flow.body(Function(target)).instructions for o in i.operations)
        return next((o for o in operations if isinstance(o, Atomic)), None)

    def effect(self, target: int, arguments: tuple[Value, ...]) -> Effect | None:
        return self.summaries.effect(Function(target), arguments)

    def is_relevant(self, target: int) -> bool:
        return bool(self.summaries.relevant[target]) or target in self.summaries.forking

    def parameters(self, target: int) -> frozenset[int]:
        wanted = self.summaries.of(Function(target)).parameters
        return frozenset(i for i, name in enumerate(self.flow.convention.arguments) if name in wanted)

    def chosen(self, pointer: Value) -> tuple[int, ...]:
        del pointer
        return ()

    def given(self, target: int) -> Value | None:
        function = Function(target)
        return self.summaries.given(function) if self.flow.program.object_of(function) == self.obj else None

    def gives_thread_cell(self, target: int) -> bool:
        return Function(target) in self.summaries.thread_cells

    def is_descriptor(self, address: int) -> bool:
        return address in self.summaries.descriptors(self.obj)

    def waits(self, target: int) -> bool:
        return Function(target) in self.summaries.evidence[self.flow.program.object_of(Function(target))].waiting

    def tells_time(self, target: int) -> bool:
        return bool(self.summaries.clocks[target])

    def enters_wait(self) -> bool:
        return self.function in self.summaries.evidence[self.obj].waiting

    def slot(self, address: int) -> Value | None:
        image = self.image
        symbol = image.slot_symbols.get(address)
        if symbol is not None:
            binding = self.flow.program.bindings.resolve(self.obj, symbol)
            return None if binding is None else Value(Object(binding.object), binding.rva)
        is_writable = any(s.writable and s.rva <= address < s.rva + s.memory_size for s in image.segments)
        if is_writable and not self._is_relocated_once(address):
            return None
        target = image.pointer_at(address)
        return None if target is None else Value(Object(self.obj), target)

    def _is_relocated_once(self, address: int) -> bool:
        section = self.image.section(".got")
        return section is not None and section.rva <= address < section.rva + section.size

    def is_data(self, address: int) -> bool:
        return any(low <= address < high for low, high in self.ranges) and address >= 0x200


class Alone(FunctionCalls):
    """The calls of a function of which only its own code matters: nothing that it calls is followed for it."""

    def parameters(self, target: int) -> frozenset[int]:
        """None: whatever is passed."""
        del target
        return frozenset()

    def effect(self, target: int, arguments: tuple[Value, ...]) -> Effect | None:
        """None: locks change nothing about what is stored or called."""
        del target, arguments
        return None


class _AllCalls(FunctionCalls):
    """The same, where what is held at each call is asked about."""

    def is_relevant(self, target: int) -> bool:
        del target
        return True
