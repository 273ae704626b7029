"""Which functions of an object take a lock that waits, and which global words they lock.

Owns: the evidence that a function acquires: a call of a library lock function, or an atomic operation
      with a waiting side; and the addresses of the words, where the code names them.
Takes: `Flow` and an object. Gives: `LockFunctions`.
Must never: call an atomic operation a lock because it is atomic: reference counts, statistics and
      lock-free lists never wait, and nothing can be inherited taken from them.
Wrong where: a function holds a lock-free operation and, for another reason, a wait (it then counts as
      taking a lock); where a lock waits in a way that no signature names and no loop shows.

The evidence for an atomic operation being an acquire, strongest first:
1. the function, or one that it calls directly, spins (`pause`, `yield`) or enters a wait (futex,
   sched_yield, nanosleep);
2. it calls a lock method: a function of kind 1 whose atomic operation works on its own first parameter;
3. the operation repeats itself until it succeeds, and it exchanges, or it expects 0 every time. A
   lock-free retry expects what it has just read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from forkproof.callgraph import EdgeKind, Function
from forkproof.code import aarch64
from forkproof.code.explore import Entry, Exploration, State, Value, Word, explore
from forkproof.code.index import SCANNERS
from forkproof.code.operations import Atomic, Const, Operand, Register
from forkproof.elf.image import I64, Machine
from forkproof.flow import Flow

_BLOCKING_KINDS: Final = frozenset({"mutex", "rwlock", "spin", "sem"})
_CALL_KINDS: Final = frozenset({EdgeKind.DIRECT, EdgeKind.JUMP, EdgeKind.PLT, EdgeKind.GOT})
_RAW_SYSCALL: Final = "syscall"
"""syscall(2): a wait only when its first argument is the number of one."""


@dataclass(frozen=True, slots=True)
class LockFunctions:
    """Functions of one object that acquire."""

    evidence: Mapping[Function, str]
    """In words, by function."""
    waits: Mapping[Function, tuple[int, ...]]
    """The call edges by which a function enters its wait, where that is another function."""
    words: Callable[[Function], frozenset[int]]
    """Addresses of the global words that a function locks. A lock that is reached through a parameter or
    a heap object has none. Computed when asked for."""
    atomic_only: frozenset[Function]
    """Functions with atomic operations for which no waiting side was found."""


NO_LOCKS: Final = LockFunctions({}, {}, lambda _: frozenset(), frozenset())


def lock_functions(flow: Flow, obj: int, roots: Iterable[Function]) -> LockFunctions:
    """Every function of an object that takes a lock that waits and that `roots` can lead to."""
    return _Object(flow, obj, roots).result()


class _Object:
    """The search in one object."""

    def __init__(self, flow: Flow, obj: int, roots: Iterable[Function]) -> None:
        self.flow, self.obj = flow, obj
        self.reach = flow.graph.distances(roots)
        self.known_words: dict[Function, frozenset[int]] = {}
        self.graph, self.program = flow.graph, flow.program
        self.evidence: dict[Function, str] = {}
        self.waits: dict[Function, tuple[int, ...]] = {}

    def result(self) -> LockFunctions:
        for function, edge, name in self._library_lockers():
            self.evidence.setdefault(function, f"calls {name}")
            self.waits[function] = (*self.waits.get(function, ()), edge)
        atomics = sorted(self.atomics)
        for function in atomics:
            self._accept(function, self.waiting, "atomic operation, {}")
        methods = {f: self.evidence[f] for f in atomics if f in self.evidence and self._is_lock_method(f)}
        for function in atomics:
            self._accept(function, methods, "atomic operation, then a lock method: {}")
        for function in atomics:
            if function not in self.evidence and self._spins(function):
                self.evidence[function] = "atomic operation repeated until it succeeds"
        rest = frozenset(f for f in atomics if f not in self.evidence)
        return LockFunctions(self.evidence, self.waits, self.words, rest)

    def words(self, function: Function) -> frozenset[int]:
        """Addresses of the global words that a function locks."""
        if function not in self.known_words:
            self.known_words[function] = frozenset(self._words(function))
        return self.known_words[function]

    def _accept(self, function: Function, waiting: Mapping[Function, str], text: str) -> None:
        """Note a function whose waiting side is itself or one that it calls."""
        if function in self.evidence:
            return
        edges = tuple(e for e in self._calls(function) if self._target(e) in waiting and self._target(e) != function)
        if edges:
            self.waits[function] = edges
            target = self._target(edges[0])
            self.evidence[function] = text.format(f"{waiting[target]} in {self.flow.name(target)}")
        elif function in waiting:
            self.evidence[function] = text.format(waiting[function])

    # ---- who waits -------------------------------------------------------------------------

    def _library_lockers(self) -> Iterator[tuple[Function, int, str]]:
        """Calls of pthread_mutex_lock and its like, which a static program may define itself."""
        locks = self.flow.signatures.locks
        names = [n for n, f in locks.items() if f.op == "acquire" and f.kind in _BLOCKING_KINDS]
        for edge, source, name in self._callers_of(names):
            yield self.flow.whole(source), edge, name

    def _callers_of(self, names: Iterable[str]) -> Iterator[tuple[int, Function, str]]:
        for target, name in sorted(self.program.called(sorted(names)).items()):
            for edge in self.graph.edges_to(target):
                source = Function(int(self.graph.source[edge]))
                is_here = self.reach[source] >= 0 and self.program.object_of(source) == self.obj
                if self.graph.kind[edge] in _CALL_KINDS and is_here:
                    yield edge, source, name

    @cached_property
    def waiting(self) -> dict[Function, str]:
        """Functions that spin or enter a wait themselves."""
        found = dict.fromkeys(self._functions_of(self._scan("find_pauses")), "spins with a pause instruction")
        names = self.flow.signatures.waiters.exact - {_RAW_SYSCALL}
        for _, source, name in self._callers_of(names):
            found.setdefault(self.flow.whole(source), f"waits in {name}")
        numbers = self.flow.signatures.wait_syscalls(self.flow.machine.value)
        for edge, source, _ in self._callers_of([_RAW_SYSCALL]):
            self._note_syscall(found, source, int(self.graph.site[edge]), self.flow.convention.arguments[0], numbers)
        sites = self.program.codes[self.obj].sites.syscalls
        for site, index in zip(sites.tolist(), self.program.codes[self.obj].owners(sites).tolist(), strict=True):
            if index >= 0:
                source = Function(int(self.program.base[self.obj]) + index)
                self._note_syscall(found, source, site, self.flow.convention.syscall_number, numbers)
        return found

    def _note_syscall(
        self, found: dict[Function, str], source: Function, site: int, register: str, numbers: Mapping[int, object]
    ) -> None:
        """A wait when the nearest earlier instruction that sets `register` gives it a wait's number."""
        function = self.flow.whole(source)
        if function in found or self.reach[source] < 0:
            return
        if self.flow.constant_before(function, site, register) in numbers:
            found[function] = "waits in a futex system call"

    # ---- atomic operations -----------------------------------------------------------------

    @cached_property
    def atomics(self) -> set[Function]:
        """Functions that hold an atomic operation, or call an outline-atomics helper that holds it for them."""
        direct = self._functions_of(self._scan("find_atomics"))
        callers = {
            self.flow.whole(Function(int(self.graph.source[e]))) for h in self.helpers for e in self.graph.edges_to(h)
        }
        return (direct | callers) - self.helpers.keys()

    @cached_property
    def helpers(self) -> dict[Function, int]:
        """GCC's helpers for AArch64 atomics, known by their code, with the argument that is the address."""
        image, code = self.program.image(self.obj), self.program.codes[self.obj]
        if image.machine is not Machine.AARCH64:
            return {}
        base, found = int(self.program.base[self.obj]), {}
        for index in np.flatnonzero((code.size > 0) & (code.size <= 64)).tolist():
            pointer = aarch64.outline_atomic_pointer(image.read(int(code.start[index]), 24))
            if pointer is not None:
                found[Function(base + index)] = pointer
        return found

    def _cells(self, function: Function) -> Iterator[Value]:
        """The addresses on which a function's atomic operations work, where they are known."""
        flow, body = self.flow, self.flow.body(function)
        atomics = {i.address: o for i in body.instructions for o in i.operations if isinstance(o, Atomic)}
        calls = {
            int(self.graph.site[e]): self.helpers[self._target(e)]
            for e in self._calls(function)
            if self._target(e) in self.helpers
        }
        for site, state in flow.states(function, [*atomics, *calls]).items():
            value = None
            if site in calls:
                value = state.register(flow.convention.arguments[calls[site]])
            elif not atomics[site].cell.indexed:
                value = _address(atomics[site], state, body.instructions[body.index[site]].end)
            if value is not None:
                yield value

    def _is_lock_method(self, function: Function) -> bool:
        first = Entry(self.flow.convention.arguments[0])
        return any(cell.base == first for cell in self._cells(function))

    def _words(self, function: Function) -> Iterator[int]:
        first = self.flow.convention.arguments[0]
        sites = [int(self.graph.site[e]) for e in self.waits.get(function, ())]
        passed = (s.register(first) for s in self.flow.states(function, sites).values()) if sites else ()
        for value in (*passed, *self._cells(function)):
            word = self._global(value)
            if word is not None:
                yield word

    def _global(self, value: Value | None) -> int | None:
        """The address that a value is, if it lies in the object's data; through the GOT too."""
        if value is None:
            return None
        image = self.program.image(self.obj)
        if isinstance(value.base, Word):
            target = image.pointer_at(value.base.address)
            return None if target is None else target + value.offset
        inside = any(s.writable and s.rva <= value.offset < s.rva + s.memory_size for s in image.segments)
        return value.offset if value.base is None and inside else None

    # ---- spinning --------------------------------------------------------------------------

    def _spins(self, function: Function) -> bool:
        """An atomic operation is repeated until it succeeds, and it is not a lock-free retry."""
        flow, body = self.flow, self.flow.body(function)
        found = {i.address: o for i in body.instructions for o in i.operations if isinstance(o, Atomic)}
        found |= dict.fromkeys(self._helper_sites(function), _HELPER_CAS)
        if not found:
            return False
        run = explore(
            body, flow.machine, flow.program.rva_of(function), effects=flow.effects(function), watch=frozenset(found)
        )
        return any(
            site in run.states and _in_small_loop(run, site) and _is_acquire(atomic, run.states[site])
            for site, atomic in found.items()
        )

    def _helper_sites(self, function: Function) -> Iterator[int]:
        for edge in self._calls(function):
            if self.helpers.get(self._target(edge)) == 2:
                yield int(self.graph.site[edge])

    # ---- plumbing --------------------------------------------------------------------------

    def _calls(self, function: Function) -> Iterator[int]:
        return (e for e in self.flow.outgoing(function) if self.graph.kind[e] in _CALL_KINDS)

    def _target(self, edge: int) -> Function:
        return Function(int(self.graph.target[edge]))

    def _functions_of(self, sites: I64) -> set[Function]:
        base = int(self.program.base[self.obj])
        owners = set(self.program.codes[self.obj].owners(sites).tolist())
        whole = (self.flow.whole(Function(base + i)) for i in owners if i >= 0)
        return {f for f in whole if self.reach[f] >= 0}

    def _scan(self, name: str) -> I64:
        image = self.program.image(self.obj)
        finder = getattr(SCANNERS[image.machine], name)
        parts = [finder(image.read(rva, size), rva) for rva, size in image.code_ranges]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


_HELPER_CAS: Final = Atomic(cell=None, stores=Register("x1"), expects=Register("x0"))  # type: ignore[arg-type]
"""A call of a compare-and-swap helper, as an operation on its argument registers."""


def _address(atomic: Atomic, state: State, end: int) -> Value | None:
    cell = atomic.cell
    if cell.base is None:
        return Value(None, cell.displacement)
    if cell.base == "pc":
        return Value(None, end + cell.displacement)
    base = state.register(cell.base)
    return None if base is None else Value(base.base, base.offset + cell.displacement)


def _is_acquire(atomic: Atomic, state: State) -> bool:
    """An exchange that stores something else than 0, or a compare-and-swap that expects the constant 0."""
    if atomic.expects is not None:
        return _value(atomic.expects, state) == Value(None, 0)
    stores = _value(atomic.stores, state)
    return stores is not None and stores != Value(None, 0)


def _value(operand: Operand | None, state: State) -> Value | None:
    if isinstance(operand, Const):
        return Value(None, operand.value)
    return state.register(operand.name) if isinstance(operand, Register) else None


def _in_small_loop(run: Exploration, site: int) -> bool:
    """The block that holds `site` can be reached from itself within a few blocks."""
    start = max((b for b in run.successors if b <= site), default=None)
    if start is None:
        return False
    frontier = set(run.successors[start])
    for _ in range(4):
        if start in frontier:
            return True
        frontier = {n for b in frontier for n in run.successors.get(b, ())}
    return False
