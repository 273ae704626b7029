"""Who waits for a signal, and who gives it: condition variables, semaphores and barriers, told by their addresses.

Owns: the calls that wait without end and that wake, by what a set of functions can run, and the words they name.
Takes: `Flow`, and what threads are given. Gives: `Call`s with `Cells`.
Must never: name a word that code only may pass; a call whose word is not known has none.
Wrong where: the word is passed through memory that one function writes and another reads, or by more than `_CALLERS`
      callers, or from further away than `_FAR` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from typing import Final, NamedTuple

from forkproof.callgraph import CALLS, Reach
from forkproof.code.state import State
from forkproof.code.values import Behind, Entry, Result, Word
from forkproof.code.values import Value as KnownValue
from forkproof.flow import Flow
from forkproof.given import Given
from forkproof.locks.values import Content, Made, Object, Value, root
from forkproof.program import Function

Cells = frozenset[Value]
"""The words that a call may name; empty: not known."""

_WAKES: Final = (
    "pthread_cond_signal",
    "pthread_cond_broadcast",
    "cnd_signal",
    "cnd_broadcast",
    "g_cond_signal",
    "g_cond_broadcast",
    "uv_cond_signal",
    "uv_cond_broadcast",
    "_ZNSt18condition_variable10notify_oneEv",
    "_ZNSt18condition_variable10notify_allEv",
)
_COUNTS: Final = "sem_init"
_COUNT: Final = 2
"""Which argument of that is the count that a semaphore begins with."""
_COUNT_BITS: Final = 0xFFFFFFFF
_CALLERS: Final = 4
_FAR: Final = 3


class Call(NamedTuple):
    """A call that waits, or that wakes who waits."""

    edge: int
    kind: str
    """condvar, sem or barrier."""
    cells: Cells


class Signals:
    """The waits and wakes of one program."""

    def __init__(self, flow: Flow, given: Given, libc_objects: frozenset[int]) -> None:
        self.flow, self.given, self.libc_objects = flow, given, libc_objects
        self.graph, self.program = flow.graph, flow.program
        locks = flow.signatures.locks
        endless = [n for n, f in locks.items() if f.op == "wait" and not f.bounded]
        semaphores = [n for n, f in locks.items() if f.kind == "sem" and f.op == "acquire" and not f.bounded]
        posts = [n for n, f in locks.items() if f.kind == "sem" and f.op == "release"]
        barriers = [n for n, f in locks.items() if f.kind == "barrier" and f.op == "wait"]
        self._kinds: dict[Function, str] = {
            f: locks[n].kind for f, n in self.program.called(sorted([*endless, *semaphores])).items()
        }
        self._wakers: dict[Function, str] = dict.fromkeys(self.program.called(_WAKES), "condvar")
        self._wakers |= dict.fromkeys(self.program.called(sorted(posts)), "sem")
        self._wakers |= dict.fromkeys(self.program.called(sorted(barriers)), "barrier")
        self._resolved: dict[int, Cells] = {}

    def waits(self, is_asked: Callable[[int], bool]) -> list[Call]:
        """The calls that wait without end, among the edges that are asked for."""
        return self._calls(self._kinds, is_asked)

    def wakes(self, is_asked: Callable[[int], bool] = lambda _: True) -> list[Call]:
        """The calls that wake, among the edges that are asked for; who comes to a barrier wakes the others."""
        return self._calls(self._wakers, is_asked)

    def _calls(self, targets: dict[Function, str], is_asked: Callable[[int], bool]) -> list[Call]:
        edges = [(e, kind) for t, kind in sorted(targets.items()) for e in self.graph.edges_to(t)]
        return [
            Call(e, kind, self.cells(e))
            for e, kind in sorted(edges)
            if int(self.graph.kind[e]) in CALLS
            and is_asked(e)
            and self.program.object_of(Function(int(self.graph.source[e]))) not in self.libc_objects - {0}
        ]

    @cached_property
    def counted(self) -> Cells:
        """Semaphores that begin with something to take: whoever waits for one takes it, as a lock."""
        return frozenset(cell for cells in self._filled for cell in cells)

    @property
    def may_count_more(self) -> bool:
        """The program fills semaphores whose addresses are not known."""
        return not all(self._filled)

    @cached_property
    def emptied(self) -> Cells:
        """Semaphores that are made with nothing to take, and nowhere with something."""
        named = self.program.called([_COUNTS])
        made = frozenset(cell for target in named for e in self.graph.edges_to(target) for cell in self.cells(e))
        return frozenset() if self.may_count_more else made - self.counted

    @cached_property
    def _filled(self) -> tuple[Cells, ...]:
        """What each sem_init names whose count is not 0; only of a call that is seen is the count known."""
        found = []
        for target in self.program.called([_COUNTS]):
            for edge in self.graph.edges_to(target):
                function, state = self._before(edge)
                count = None if state is None else self.flow.passed(function, state, _COUNT).constant
                if count is None or count & _COUNT_BITS:
                    found.append(self.cells(edge))
        return tuple(found)

    # ---- addresses -------------------------------------------------------------------------

    def cells(self, edge: int) -> Cells:
        """What a call passes first."""
        if edge not in self._resolved:
            function, state = self._before(edge)
            self._resolved[edge] = self._argument(function, state, 0, _FAR)
        return self._resolved[edge]

    def _before(self, edge: int) -> tuple[Function, State | None]:
        function = self.flow.whole(Function(int(self.graph.source[edge])))
        site = int(self.graph.site[edge])
        return function, self.flow.states(function, [site], fields=True).get(site)

    def _argument(self, function: Function, state: State | None, argument: int, far: int) -> Cells:
        value = None if state is None else state.register(self.flow.convention.arguments[argument])
        return frozenset() if value is None or state is None else frozenset(self._told(function, state, value, far))

    def _told(self, function: Function, state: State, value: KnownValue, far: int) -> Collection[Value]:
        obj, base, offset = self.program.object_of(function), value.base, value.offset
        if base is None:
            return [Value(Object(obj), offset)] if self.program.image(obj).is_writable(offset) else []
        if isinstance(base, Word):
            return [Value(w.base, w.offset + offset) for w in self._held(obj, base.address)]
        if isinstance(base, Behind):
            inner = self._told(function, state, KnownValue(base.base, base.offset), far)
            # What lies in an object that a function made may be any pointer.
            return [Value(Content(*each), offset) for each in inner if not isinstance(root(each.base), Made)]
        if isinstance(base, Result):
            kept = self.given.kept_in(obj, state, value)
            return [Value(Made(function, base.site), offset) if kept is None else kept]
        if not isinstance(base, Entry):
            return []
        if base.register == self.flow.convention.stack:
            return [Value(Made(function, -1), offset)]
        if base.register not in self.flow.convention.arguments:
            return []
        given = self._passed(function, self.flow.convention.arguments.index(base.register), far)
        return [Value(each.base, each.offset + offset) for each in given]

    def _held(self, obj: int, slot: int) -> Iterable[Value]:
        """What a word holds: the address that the loader puts there for good, or whatever the run stores."""
        image = self.program.image(obj)
        symbol = image.slot_symbols.get(slot)
        binding = None if symbol is None else self.program.bindings.resolve(obj, symbol)
        if binding is not None:
            return [Value(Object(binding.object), binding.rva)]
        target, table = image.pointer_at(slot), image.section(".got")
        if target is not None and table is not None and table.rva <= slot < table.rva + table.size:
            return [Value(Object(obj), target)]
        return [Value(Content(Object(obj), slot), 0)]

    def _passed(self, function: Function, argument: int, far: int) -> Cells:
        """What callers pass, and what a thread is given."""
        found = set(self.given.arguments.get(function, ())) if argument == 0 else set()
        edges = [e for e in self.graph.edges_to(function) if int(self.graph.kind[e]) in CALLS]
        if far == 0 or len(edges) > _CALLERS:
            return frozenset(found)
        for edge in edges:
            caller, state = self._before(edge)
            found |= self._argument(caller, state, argument, far - 1)
        return frozenset(found)


def reached(distances: Reach, flow: Flow) -> Callable[[int], bool]:
    """Whether an edge begins in what a search has reached."""
    return lambda edge: bool(distances[flow.graph.source[edge]] >= 0)
