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
3. the operation repeats itself, on the same word, until it succeeds: it exchanges and looks at what it
   got, it sets a bit (by a compare-and-swap, too) and looks whether that was clear,
   or it is a compare-and-swap that expects 0 every
   time, or what it has looked at until it was 0. A lock-free retry expects what it has just read; a
   search for a free slot goes on to the next word; an atomic store (`xchg` on x86-64) does not look at
   what it got. The loop in which AArch64 repeats a store-exclusive that failed is none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from forkproof.callgraph import CALLS
from forkproof.code import aarch64, x86_64
from forkproof.code.decode import Body, Instruction
from forkproof.code.disassembler import starts
from forkproof.code.explore import Exploration, explore
from forkproof.code.index import SCANNERS
from forkproof.code.operations import (
    Add,
    Atomic,
    AtomicKind,
    Branch,
    Call,
    Compare,
    Condition,
    Const,
    Forget,
    Jump,
    JumpUnknown,
    Memory,
    Operand,
    Register,
    Return,
    Set,
    Sum,
    Test,
)
from forkproof.code.state import State
from forkproof.code.values import Entry, Value, Word
from forkproof.elf.image import I64, Machine
from forkproof.flow import Flow
from forkproof.locks.looks import LOOP_BLOCKS, expects_what_was_0, waits_for_bits, waits_for_memory, waits_for_turn
from forkproof.program import Function
from forkproof.signature_values import WaitSyscall

_BLOCKING_KINDS: Final = frozenset({"mutex", "rwlock", "spin", "sem"})
_RAW_SYSCALL: Final = "syscall"
"""syscall(2): a wait only when its first argument is the number of one."""

_NUMBER_REACH: Final = 192
"""Bytes before a system call in which its number must stand."""
_FUTEX_OPERATION: Final = 0x7F
_FUTEX_WAITS: Final = frozenset({0, 6, 9, 11, 13})
"""WAIT, LOCK_PI, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2; without FUTEX_PRIVATE_FLAG and its like (linux/futex.h)."""


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
    doubtful: Mapping[Function, str]
    """Functions that wait for memory to change, or try a lock, in a way that is not a known acquire. Looked
    for only where no function acquires: it decides whether "no lock" may be claimed."""


NO_LOCKS: Final = LockFunctions({}, {}, lambda _: frozenset(), frozenset(), {})


def lock_functions(flow: Flow, obj: int, roots: Iterable[Function]) -> LockFunctions:
    """Every function of an object that takes a lock that waits and that `roots` can lead to."""
    return ObjectEvidence(flow, obj, roots).result()


class ObjectEvidence:
    """The search in one object, among the functions that `roots` can lead to; among all of them without roots."""

    def __init__(self, flow: Flow, obj: int, roots: Iterable[Function] | None = None) -> None:
        self.flow, self.obj = flow, obj
        everywhere = np.broadcast_to(np.int32(0), flow.graph.size)  # takes no room: there is one search an object
        self.reach = flow.graph.distances(roots) if roots is not None else everywhere
        self.known_words: dict[Function, frozenset[int]] = {}
        self.graph, self.program = flow.graph, flow.program
        self.evidence: dict[Function, str] = {}
        self.waits: dict[Function, tuple[int, ...]] = {}
        self._spinning: dict[Function, bool] = {}
        self._drawing: dict[Function, bool] = {}

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
            if function not in self.evidence and self.spins(function):
                self.evidence[function] = "atomic operation repeated until it succeeds"
        rest = frozenset(f for f in atomics if f not in self.evidence)
        doubtful = {} if self.evidence else dict(self._doubtful())
        return LockFunctions(self.evidence, self.waits, self.words, rest, doubtful)

    def _doubtful(self) -> Iterator[tuple[Function, str]]:
        tries = [n for n, f in self.flow.signatures.locks.items() if f.op == "try" and f.kind in _BLOCKING_KINDS]
        for _, source, name in self._callers_of(tries):
            yield self.flow.whole(source), f"calls {name}"
        first, last = self.program.base[self.obj : self.obj + 2].tolist()
        for number in (np.flatnonzero(self.reach[first:last] >= 0) + first).tolist():
            function = self.flow.whole(Function(number))
            if waits_for_memory(self.flow.body(function), self.flow.convention.stack):
                yield function, "repeats a load until the word changes"

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
                if int(self.graph.kind[edge]) in CALLS and is_here:
                    yield edge, source, name

    @cached_property
    def waiting(self) -> dict[Function, str]:
        """Functions that spin or enter a wait themselves."""
        found = dict.fromkeys(self._functions_of(self._scan("find_pauses")), "spins with a pause instruction")
        names = self.flow.signatures.waiters.exact - {_RAW_SYSCALL}
        for _, source, name in self._callers_of(names):
            found.setdefault(self.flow.whole(source), f"waits in {name}")
        numbers = self.flow.signatures.wait_syscalls(self.flow.machine.value)
        arguments = self.flow.convention.arguments
        for edge, source, _ in self._callers_of([_RAW_SYSCALL]):
            self._note_syscall(found, source, int(self.graph.site[edge]), (arguments[0], arguments[2]), numbers)
        sites = self.program.codes[self.obj].sites.syscalls
        for site, index in zip(sites.tolist(), self.program.codes[self.obj].owners(sites).tolist(), strict=True):
            if index >= 0 and self._mentions(site, numbers):
                source = Function(int(self.program.base[self.obj]) + index)
                registers = self.flow.convention.syscall_number, arguments[1]
                self._note_syscall(found, source, site, registers, numbers)
        return found

    def _mentions(self, site: int, numbers: Mapping[int, WaitSyscall]) -> bool:
        """One of the numbers stands before a system call, which on x86-64 is two bytes that chance finds often."""
        code = self.program.image(self.obj).read(max(site - _NUMBER_REACH, 0), min(site, _NUMBER_REACH))
        return bool(SCANNERS[self.flow.machine].mentions(code.tobytes(), numbers))

    def _note_syscall(
        self,
        found: dict[Function, str],
        source: Function,
        site: int,
        registers: tuple[str, str],
        numbers: Mapping[int, WaitSyscall],
    ) -> None:
        """A wait when the call's number is one of a wait; a futex(2) that is known to wake is none.

        `registers` hold the number and, for futex(2), the operation.
        """
        function = self.flow.whole(source)
        if function in found or self.reach[source] < 0:
            return
        number = self.flow.constant_before(function, site, registers[0])
        call = numbers.get(number) if number is not None else None
        if call is None:
            return
        operation = self.flow.constant_at(function, site, registers[1]) if call.name == "futex" else None
        if operation is None or operation & _FUTEX_OPERATION in _FUTEX_WAITS:
            found[function] = f"waits in a {call.name} system call"

    # ---- atomic operations -----------------------------------------------------------------

    @cached_property
    def atomics(self) -> set[Function]:
        """Functions that hold an atomic operation, or call an outline-atomics helper that holds it for them."""
        return {f for f in self.may_be_atomics if self.holds_atomic(f)}

    @cached_property
    def may_be_atomics(self) -> set[Function]:
        """Functions that may be such, told without decoding them."""
        return self._exchanging | self._adding

    def holds_atomic(self, function: Function) -> bool:
        """Whether a function is such. An addition counts only if it draws a ticket: each counted reference is one."""
        return function in self._exchanging or self._draws_ticket(function)

    @cached_property
    def _exchanging(self) -> set[Function]:
        direct = self._functions_of(self._scan("find_atomics")) | self._ticket_locks
        return (direct | self._helped) - self.helpers.keys()

    @cached_property
    def _helped(self) -> set[Function]:
        """Functions that call a helper."""
        edges = (e for helper in self.helpers for e in self.graph.edges_to(helper))
        return {self.flow.whole(Function(int(self.graph.source[e]))) for e in edges}

    @cached_property
    def _adding(self) -> set[Function]:
        """Functions that add, and wait: few do both."""
        adding = self._functions_of(self._scan("find_additions")) | self._helped
        if not adding:
            return set()
        waiting = self.waiting
        chosen = adding & self._functions_of(self._scan("find_short_loops"))
        chosen |= {f for f in adding if f in waiting or any(self._target(e) in waiting for e in self._calls(f))}
        return chosen - self.helpers.keys()

    def _draws_ticket(self, function: Function) -> bool:
        """What an addition found is compared, in a loop, with what is loaded there."""
        if function not in self._drawing:
            self._drawing[function] = function in self._adding and self._find_drawing(function)
        return self._drawing[function]

    def _find_drawing(self, function: Function) -> bool:
        additions = {site for site, helper in self.helper_sites(function) if helper.kind is AtomicKind.ADD}
        return waits_for_turn(self.flow.body(function), additions, self.flow.convention)

    @property
    def _ticket_locks(self) -> set[Function]:
        """Functions that pause and hold an atomic operation that the scanners pass over: fetch-and-add."""
        return {
            f
            for f in self._functions_of(self._scan("find_pauses"))
            if any(isinstance(o, Atomic) for i in self.flow.body(f).instructions for o in i.operations)
        }

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
                value = address_of(atomics[site].cell, state, body.instructions[body.index[site]].end)
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

    def spins(self, function: Function) -> bool:
        """An atomic operation is repeated until it succeeds, and it is not a lock-free retry."""
        if function not in self._spinning:
            self._spinning[function] = self._find_spin(function)
        return self._spinning[function]

    def _may_attempt(self, function: Function) -> bool:
        """Its code holds an atomic operation, or calls a helper's; what only looks like one need not be lifted."""
        if self.flow.machine is not Machine.X86_64 or self.flow.is_decoded(function):
            return True
        image = self.program.image(self.obj)
        codes = (image.read(start, size) for start, size in self.flow.ranges(function))
        return any(
            x86_64.may_hold_atomic(code) and x86_64.holds_atomic(code, starts(Machine.X86_64, code.tobytes()))
            for code in codes
        )

    def _find_spin(self, function: Function) -> bool:
        if not self._may_attempt(function):
            return False
        if self._draws_ticket(function):
            return True
        flow, body = self.flow, self.flow.body(function)
        found = [a for i, instruction in enumerate(body.instructions) if (a := _attempt(body, i, instruction))]
        found += [a for site, helper in self.helper_sites(function) if (a := _helped(body, site, helper, flow))]
        bits = [
            _Attempt(site, cell, None, None, True, site)
            for site, cell in waits_for_bits(body, dict(self.helper_sites(function)))
        ]
        found = [a for a in found if a.tells]
        if not found and not bits:
            return False
        run = explore(
            body,
            flow.machine,
            flow.program.rva_of(function),
            effects=flow.effects(function),
            watch=frozenset(a.site for a in (*found, *bits)),
        )
        if any((at := run.states.get(a.site)) is not None and self._is_same_word(function, a, at) for a in bits):
            return True
        return any(
            (state := run.states.get(a.site)) is not None
            and (_is_acquire(a, state) or expects_what_was_0(body, run, a.site, a.expects))
            and _in_small_loop(run, a)
            and self._is_same_word(function, a, state)
            for a in found
        )

    def _is_same_word(self, function: Function, attempt: _Attempt, state: State) -> bool:
        """The word is the same in each round: its address does not change between two visits of the site."""
        if attempt.cell.indexed:
            return False
        base = attempt.cell.base
        if base is None or base == "pc" or state.register(base) is not None:
            return True
        again = explore(
            self.flow.body(function),
            self.flow.machine,
            attempt.site,
            effects=self.flow.effects(function),
            watch=[attempt.site],
        )
        return again.states[attempt.site].register(base) == Value(Entry(base), 0)

    def helper_sites(self, function: Function) -> Iterator[tuple[int, Atomic]]:
        """The calls of helpers in a function, with what each does to the caller's registers."""
        for edge in self._calls(function):
            helper = self._target(edge)
            if helper in self.helpers:
                operations = (o for i in self.flow.body(helper).instructions for o in i.operations)
                atomic = next((o for o in operations if isinstance(o, Atomic)), None)
                if atomic is not None:
                    yield int(self.graph.site[edge]), atomic

    # ---- plumbing --------------------------------------------------------------------------

    def _calls(self, function: Function) -> Iterator[int]:
        return (e for e in self.flow.outgoing(function) if int(self.graph.kind[e]) in CALLS)

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


def address_of(cell: Memory, state: State, end: int) -> Value | None:
    """The address of a memory operand in a state; `end` is where its instruction ends."""
    if cell.base is None:
        return Value(None, cell.displacement)
    if cell.base == "pc":
        return Value(None, end + cell.displacement)
    base = state.register(cell.base)
    return None if base is None else Value(base.base, base.offset + cell.displacement)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One atomic exchange or compare-and-swap, whatever instructions or helper it is made of."""

    site: int
    cell: Memory
    stores: Operand | None
    expects: Operand | None
    tells: bool
    """Something looks at what the operation found in the word."""
    begin: int
    """Where the operation begins: its load-exclusive, or `site`."""
    sets_bits: bool = False
    """It sets bits, and what is looked at is whether they were set."""


def _attempt(body: Body, position: int, instruction: Instruction) -> _Attempt | None:
    """The atomic operation that an instruction is, or completes."""
    atomic = next((o for o in instruction.operations if isinstance(o, Atomic)), None)
    if atomic is None:
        return None
    result = next((o.destination for o in instruction.operations if isinstance(o, Forget)), None)
    if (load := _load_exclusive(body, position, atomic)) is not None:
        return _exclusive(body, position, load, atomic)
    sets_bits = atomic.kind is AtomicKind.SET_BITS
    tells = atomic.expects is not None or (result is not None and _is_looked_at(body, position + 1, result))
    tells = tells or (sets_bits and _carry_decides(body, position + 1))
    site = instruction.address
    return _Attempt(site, atomic.cell, atomic.stores, atomic.expects, tells, site, sets_bits)


def _helped(body: Body, site: int, helper: Atomic, flow: Flow) -> _Attempt | None:
    """The atomic operation that an outline-atomics helper does for its caller, on the same registers."""
    position = body.position(site)
    if position is None:
        return None
    result = Register(flow.convention.result)
    tells = helper.expects is not None or _is_looked_at(body, position + 1, result)
    return _Attempt(site, helper.cell, helper.stores, helper.expects, tells, site, helper.kind is AtomicKind.SET_BITS)


_PAIR_REACH: Final = 12
"""Instructions between a load-exclusive and its store-exclusive."""


def _load_exclusive(body: Body, position: int, atomic: Atomic) -> int | None:
    """Position of the load that a store-exclusive belongs to; None for other atomic operations.

    A store-exclusive is told by what it forgets: its status, which it does not store.
    """
    instruction = body.instructions[position]
    if atomic.expects is not None or not any(isinstance(o, Forget) for o in instruction.operations):
        return None
    for before in range(position - 1, max(position - _PAIR_REACH, 0) - 1, -1):
        for operation in body.instructions[before].operations:
            match operation:
                case Set(Register(), Memory() as source) if source == atomic.cell:
                    return before
                case Call() | Return() | Atomic():
                    return None
    return None


def _exclusive(body: Body, position: int, load: int, atomic: Atomic) -> _Attempt | None:
    """What a load-exclusive and a store-exclusive do together; None for arithmetic on the word."""
    first = body.instructions[load]
    old = next(o.destination for o in first.operations if isinstance(o, Set) and o.source == atomic.cell)
    expects: Operand | None = None
    for instruction in body.instructions[load + 1 : position]:
        for operation in instruction.operations:
            match operation:
                case Compare(left, right) if old in (left, right):
                    expects = right if left == old else left
                case Branch(_, _, operand, bits) if operand == old and bits > 1:
                    expects = Const(0)
                case Set(destination) | Add(destination) | Sum(destination) | Forget(destination) if (
                    destination == atomic.stores
                ):
                    return None
    if atomic.stores == old:
        return None
    tells = expects is not None or (isinstance(old, Register) and _is_looked_at(body, position + 1, old))
    return _Attempt(body.instructions[position].address, atomic.cell, atomic.stores, expects, tells, first.address)


_LOOK_REACH: Final = 12
"""Instructions after an exchange within which what it got is compared."""


def _is_looked_at(body: Body, position: int, result: Register) -> bool:
    """What an operation left in a register is compared, or decides a branch, before it is lost."""
    holders: set[Operand] = {result}
    for instruction in body.instructions[position : position + _LOOK_REACH]:
        for operation in instruction.operations:
            match operation:
                case Compare(left, right) | Test(left, right):
                    if left in holders or right in holders:
                        return True
                case Branch(_, _, operand) if operand in holders:
                    return True
                case Set(destination, source):
                    holders = holders | {destination} if source in holders else holders - {destination}
                case Sum(destination):
                    holders = holders - {destination}
                case Add(destination, left):
                    holders = holders | {destination} if left in holders else holders - {destination}
                case Return() | Jump() | JumpUnknown() | Call():
                    return False
    return False


def _carry_decides(body: Body, position: int) -> bool:
    """The bit that x86-64's bts found, which the carry flag holds, decides the next branch."""
    carries = (Condition.BELOW, Condition.ABOVE_EQ)
    following = body.instructions[position : position + 1]
    return any(isinstance(o, Branch) and o.condition in carries for i in following for o in i.operations)


def _is_acquire(attempt: _Attempt, state: State) -> bool:
    """An exchange that stores something else than 0, a compare-and-swap that expects the constant 0, or bits set."""
    if attempt.sets_bits:
        return True
    if attempt.expects is not None:
        return _value(attempt.expects, state) == Value(None, 0)
    stores = _value(attempt.stores, state)
    return stores is not None and stores != Value(None, 0)


def _value(operand: Operand | None, state: State) -> Value | None:
    if isinstance(operand, Const):
        return Value(None, operand.value)
    return state.register(operand.name) if isinstance(operand, Register) else None


def _in_small_loop(run: Exploration, attempt: _Attempt) -> bool:
    """The operation can be reached from itself within a few blocks, its own repetition left out."""
    begin, end = run.block_of(attempt.begin), run.block_of(attempt.site)
    if begin is None or end is None:
        return False
    # AArch64 repeats the pair when the store fails: from its last block to its first.
    frontier = set(run.successors[end])
    if attempt.begin != attempt.site:
        frontier = (frontier - {begin}) | (set(run.successors[begin]) - {end} if begin != end else set())
    for _ in range(LOOP_BLOCKS):
        if begin in frontier:
            return True
        frontier = {n for b in frontier for n in run.successors.get(b, ())}
    return False
