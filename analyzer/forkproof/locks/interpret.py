"""One function, followed with the locks that it holds.

Owns: the abstract interpretation that tells where a function acquires and releases which addresses, what it
      calls while it holds them, and what it still holds when it returns.
Takes: a decoded body, what its calls do (`Calls`), and the locks held on entry. Gives: a `Run`.
Must never: call an atomic operation an acquire whose failing side does not wait (then it is a try).
Wrong where: a lock's address is changed behind the analysis' back (memory other than the stack is believed not
      to change); where more than `_KEYS` different sets of held locks meet at one block (the rest are joined).

States are kept apart by what is held (property simulation: Das, Lerner, Seigle, "ESP", PLDI 2002), so that
`if (p) lock(p->l)` does not look like holding p->l always. Within one set, registers are joined: what differs gets
the name of the block, and what differs by a constant step is an element of an array.

An atomic operation is an attempt. It acquires on the edges that show its success:
  compare-and-swap  what was found equals what was expected (x86-64: the zero flag), if that is the constant 0
  swap              what was found is 0, if something else was stored
  add               what was found equals a word that is loaded again and again: a ticket
  set bits          the bit was clear before
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any, Final, NamedTuple, Protocol

from forkproof.code.decode import Body, Instruction
from forkproof.code.explore import Convention
from forkproof.code.operations import (
    Add,
    Address,
    Atomic,
    AtomicKind,
    Branch,
    Call,
    Compare,
    CompareIf,
    Condition,
    Const,
    Forget,
    ForgetFlags,
    Insert,
    Jump,
    JumpUnknown,
    Memory,
    Operand,
    Operation,
    Pause,
    Register,
    Reserve,
    Return,
    Set,
    SetIf,
    Sum,
    Syscall,
    Test,
)
from forkproof.locks.values import (
    ZERO,
    Base,
    Content,
    Element,
    Entry,
    Named,
    Object,
    Old,
    Status,
    Value,
    Won,
    Word,
    content,
    root,
    stepped,
)
from forkproof.signatures import LockFunction

Held = frozenset[Value]
NOTHING: Final[Held] = frozenset()
_KEYS: Final = 8
_VARIANTS: Final = 3
"""Sets of arguments that are told apart at one call."""
_SMALL: Final = 24
"""Instructions of a function that may be there to unlock with a plain store; elsewhere a cleared word is no unlock."""
_VISITS: Final = 4
"""Joins at one block under one set before everything in registers is named anew."""
_BESIDE: Final = 64
"""Bytes between the two words of a ticket lock."""
_FAR: Final = 64
"""Blocks after a failed attempt in which its wait is looked for."""


class Exit(NamedTuple):
    """One way to return: what is held then, and what the result tells of it (zero, nonzero, or None)."""

    held: Held
    result: str | None


class Effect(NamedTuple):
    """What a call of a function does to the locks of its caller, in the callee's terms."""

    exits: tuple[Exit, ...]
    releases: frozenset[Value]


class Calls(Protocol):
    """What an interpretation asks about the functions that are called."""

    def targets(self, site: int) -> tuple[int, ...]:
        """Functions that the call or tail call at a site may lead to."""

    def comes_back(self, site: int) -> bool:
        """False when the call is known not to return."""

    def library(self, target: int) -> LockFunction | None:
        """What the target does, if it is a lock function of a library."""

    def helper(self, target: int) -> Atomic | None:
        """The atomic operation that an outline-atomics helper does on its caller's registers."""

    def effect(self, target: int, arguments: tuple[Value, ...]) -> Effect | None:
        """What the target does to locks, in the caller's terms; None: nothing."""

    def is_relevant(self, target: int) -> bool:
        """Whether calls of the target are to be noted."""

    def parameters(self, target: int) -> frozenset[int]:
        """Which arguments the target's locks depend on."""

    def waits(self, target: int) -> bool:
        """Whether the target waits: futex, sched_yield, nanosleep and what calls them."""

    def enters_wait(self) -> bool:
        """Whether the function's own system calls enter a wait."""

    def slot(self, address: int) -> Value | None:
        """What a loader-filled word holds for good."""

    def is_data(self, address: int) -> bool:
        """Whether a number is an address in the object."""


class Acquire(NamedTuple):
    """One acquisition. `blocking` is False for tries, which never wait."""

    site: int
    address: Value
    kind: str
    blocking: bool
    held: Held


class CallSite(NamedTuple):
    """A call of a function that matters, with what is passed and held."""

    site: int
    target: int
    arguments: tuple[Value, ...]
    held: Held


class Turn(NamedTuple):
    """A branch that neither arguments nor an attempt decide: what must hold on one side of it."""

    target: int
    """The block on that side."""
    value: Value
    other: Value
    equal: bool | None
    """The value equals the other there, or not; None for orders and tests of bits."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The feasible control flow of one function, by positions of blocks."""

    entry: int
    successors: Mapping[int, frozenset[int]]
    ends: frozenset[int]
    """Blocks from which the function returns."""
    turns: Mapping[int, tuple[Turn, ...]]

    def surely_reaches(self, goals: Collection[int]) -> bool:
        """Every way from the entry to a return leads through a goal, if arguments are chosen so that one does.

        The least solution of: a goal reaches; a block whose branch an argument decides, or an attempt at a lock, if
        one of its successors does; any other if all do, and it does not return.
        """
        sure = set(goals)
        blocks = set(self.successors) | {t for targets in self.successors.values() for t in targets}
        changed = True
        while changed:
            changed = False
            for block in blocks - sure:
                after = self.successors.get(block, frozenset())
                if block in self.ends or not after:
                    continue
                if (all if block in self.turns else any)(a in sure for a in after):
                    sure.add(block)
                    changed = True
        return self.entry in sure

    def requires(self, goal: int) -> tuple[Turn, ...]:
        """The sides of branches without which a block cannot be reached: they all lie on any way to it."""
        way = self._way(goal, None)
        if way is None:
            return ()
        steps = [
            (block, turn)
            for block, after in pairwise(way)
            for turn in self.turns.get(block, ())
            if turn.target == after
        ]
        return tuple(turn for block, turn in steps if self._way(goal, (block, turn.target)) is None)

    def _way(self, goal: int, without: tuple[int, int] | None) -> list[int] | None:
        """Blocks of a shortest way from the entry to a block that does not use one edge."""
        came: dict[int, int] = {self.entry: self.entry}
        frontier = [self.entry]
        for here in frontier:
            if here == goal:
                way = [here]
                while way[-1] != self.entry:
                    way.append(came[way[-1]])
                return way[::-1]
            for after in self.successors.get(here, ()):
                if after not in came and (here, after) != without:
                    came[after] = here
                    frontier.append(after)
        return None


@dataclass(frozen=True, eq=False)
class Run:
    """What one function does with locks."""

    acquires: tuple[Acquire, ...]
    calls: tuple[CallSite, ...]
    exits: tuple[Exit, ...]
    releases: frozenset[Value]
    """Addresses that it may release without having acquired them."""
    let_go: frozenset[Value]
    """Addresses that it releases after it has acquired them, or held them on entry."""
    again: tuple[Acquire, ...]
    """Blocking acquisitions of what is held already."""
    waiting_calls: frozenset[int]
    """Sites of calls that try, in a function that waits when they fail."""
    blocks: Blocks
    stores: Mapping[Value, frozenset[int]]
    """Constants that it stores into words of objects."""
    body: Body
    complete: bool

    def block_of(self, site: int) -> int:
        """The block that holds an instruction."""
        position = self.body.position(site) or 0
        return self.body.leaders[max(bisect_right(self.body.leaders, position) - 1, 0)]


def _balanced(exits: set[Exit], let_go: set[Value]) -> set[Exit]:
    """Exits without the locks that the function lets go on another way to the same result.

    Ways on which it seems to keep them are ways that no input takes: a state that is always one of two, a flag that
    was set where the lock was taken.
    """
    found = set()
    for held, result in exits:
        others = [h for h, r in exits if r == result]
        found.add(Exit(frozenset(x for x in held if x not in let_go or all(x in h for h in others)), result))
    return found


def _joined_exits(exits: set[Exit]) -> tuple[Exit, ...]:
    """The ways to return, as few as tell what is held; too many are one that holds what any of them holds."""
    by_result: dict[str | None, set[Held]] = {}
    for held, result in exits:
        by_result.setdefault(result, set()).add(held)
    if len({held for held, _ in exits}) <= 1:
        return tuple(Exit(held, None) for held in {held for held, _ in exits})
    if len(exits) <= _KEYS:
        return tuple(sorted(exits, key=_in_order))
    return (Exit(frozenset().union(*(held for held, _ in exits)), None),)


def _is_beside(served: Base, ticket: Value) -> bool:
    """What is compared with a ticket is the word beside it, or a part of the word itself."""
    if not isinstance(served, Content | Word) or served.base != ticket.base:
        return False
    return abs(served.offset - ticket.offset) <= _BESIDE


def _in_order(exit_: tuple[Held, str | None]) -> tuple[list[str], str]:
    """A key that does not depend on the order of a set."""
    return sorted(map(repr, exit_[0])), exit_[1] or ""


class _Attempt(NamedTuple):
    """An atomic operation that may acquire; `by_status` if a store-exclusive's status tells its success."""

    address: Value
    kind: str
    expected: int = 0
    by_status: bool = False
    is_token: bool = True
    """The result alone tells success. Not so where a pointer is swapped in, or a ticket drawn."""


class _Flags(NamedTuple):
    """What the flags were made by: cmp, test, won (an attempt's own), bit (the carry is the old bit)."""

    kind: str
    left: Value
    right: Value
    bits: int
    site: int = 0
    before: _Flags | None = None
    """For a conditional comparison: what was compared before it,"""
    condition: Condition = Condition.UNKNOWN
    """the condition under which it was made,"""
    zero: bool = False
    """and whether the flags say equal otherwise."""


@dataclass(slots=True)
class _State:
    registers: dict[str, Value] = field(default_factory=dict)
    frame: dict[Value, Value] = field(default_factory=dict)
    flags: _Flags | None = None
    known: dict[int, int] = field(default_factory=dict)
    """Constants that exclusive loads were found to have given."""
    reserved: int = 0
    """Site of the last exclusive load."""
    failed: int = 0
    """Site of a call that has just come back without the lock that it may return with."""
    pending: int = 0
    """Site of an attempt of which the code has not yet looked whether it succeeded."""

    def copy(self) -> _State:
        copied = _State(dict(self.registers), dict(self.frame), self.flags, dict(self.known), self.reserved)
        copied.pending = self.pending
        return copied


_Step = Callable[[Instruction, Any, "_State"], None]
_Key = tuple[int, Held, int]
"""A block, what is held there, and the attempt whose outcome is still open."""
_Next = list[tuple[int, Held, _State]]


def interpret(
    body: Body,
    machine: Convention,
    obj: int,
    calls: Calls,
    held: Held = NOTHING,
    watched: Held | None = None,
    *,
    joined: bool = False,
) -> Run:
    """Follow a function from its entry. With `watched`, only those locks are followed: the others are let go.

    `joined` keeps one state a block, which holds what any way to it holds: right for a handler that takes everything
    in loops, where each round would make a set of its own.
    """
    return _Interpreter(body, machine, obj, calls, watched, joined=joined).run(held)


class _Interpreter:
    """The worklist; one instance runs once."""

    def __init__(
        self, body: Body, convention: Convention, obj: int, calls: Calls, watched: Held | None, *, joined: bool
    ) -> None:
        self.body, self.convention, self.calls, self.watched = body, convention, calls, watched
        self.union: dict[_Key, Held] | None = {} if joined else None
        self.object = Object(obj)
        self.inputs: dict[_Key, _State] = {}
        self.keys: dict[int, list[_Key]] = {}
        self.visits: dict[_Key, int] = {}
        self.pending: list[tuple[int, int, _Key]] = []
        self.queued: set[_Key] = set()
        self.order = 0
        self.attempts: dict[int, _Attempt] = {}
        self.failing: dict[int, set[int]] = {}
        self.waiting: set[int] = set()
        self.successors: dict[int, set[int]] = {}
        self.block = 0
        self.attempt_blocks: dict[int, int] = {}
        self.split_calls: dict[int, int] = {}
        self.acquires: dict[tuple[int, Value], Acquire] = {}
        self.again: dict[tuple[int, Value], Acquire] = {}
        self.noted: dict[tuple[int, int], dict[tuple[Value, ...], Held]] = {}
        self.exits: set[Exit] = set()
        self.ends: set[int] = set()
        self.stores: dict[Value, set[int]] = {}
        self.turns: dict[int, dict[Turn, None]] = {}
        self.releases: set[Value] = set()
        self.let_go: set[Value] = set()
        self.complete = True
        self.stack = Entry(convention.stack)
        # Operations that change registers and flags only.
        self.data: Mapping[type, _Step] = {
            Set: self._set,
            Address: self._address,
            Add: self._add,
            Sum: self._add_values,
            Forget: self._forget,
            Insert: self._insert,
            SetIf: self._set_if,
            Compare: self._compare,
            Test: self._compare,
            CompareIf: self._compare_if,
            ForgetFlags: self._forget_flags,
            Syscall: self._syscall,
            Pause: self._pause,
            Reserve: self._reserve,
        }

    def run(self, held: Held) -> Run:
        start = self.body.position(self.body.entry)
        if start is not None:
            self._enter(start, held, _State())
        while self.pending:
            _, _, key = heappop(self.pending)
            self.queued.discard(key)
            self._run_block(key)
        return Run(
            tuple(self._settled(a) for _, a in sorted(self.acquires.items(), key=repr)),
            tuple(CallSite(*c, a, h) for c, variants in self.noted.items() for a, h in variants.items()),
            _joined_exits(_balanced(self.exits, self.let_go)),
            frozenset(self.releases),
            frozenset(self.let_go),
            tuple(a for _, a in sorted(self.again.items(), key=repr) if self._settled(a).blocking),
            frozenset(s for s, b in self.split_calls.items() if self._waits_after_failure(s, b, may_repeat=True)),
            Blocks(
                start or 0,
                {b: frozenset(t) for b, t in self.successors.items()},
                frozenset(self.ends),
                {b: tuple(t) for b, t in self.turns.items()},
            ),
            {address: frozenset(constants) for address, constants in self.stores.items()},
            self.body,
            self.complete,
        )

    def _settled(self, acquire: Acquire) -> Acquire:
        """An attempt blocks when its failing side waits, or comes back to it."""
        if acquire.site not in self.attempts:
            return acquire
        may_repeat = not isinstance(acquire.address.base, Element)
        block = self.attempt_blocks[acquire.site]
        return acquire._replace(blocking=self._waits_after_failure(acquire.site, block, may_repeat=may_repeat))

    def _waits_after_failure(self, site: int, block: int, *, may_repeat: bool) -> bool:
        frontier, seen = set(self.failing.get(site, ())), set[int]()
        while frontier and len(seen) < _FAR:
            if frontier & self.waiting or (may_repeat and block in frontier):
                return True
            seen |= frontier
            frontier = {n for b in frontier for n in self.successors.get(b, ())} - seen
        return False

    # ---- worklist --------------------------------------------------------------------------

    def _enter(self, position: int, held: Held, state: _State) -> None:
        if position >= len(self.body.instructions):
            return
        if position <= self.block and held:
            held = self._widened(position, held, state)
        key = position, held, state.pending
        grown = False
        if self.union is not None:
            key = position, NOTHING, 0
            before = self.union.get(key, NOTHING)
            self.union[key] = before | held
            grown = not held <= before
        old = self.inputs.get(key)
        if old is None:
            known = self.keys.setdefault(position, [])
            if len(known) >= _KEYS:
                key = known[0]
                old = self.inputs[key]
            else:
                known.append(key)
        if old is None:
            self.inputs[key] = state.copy()
        else:
            self.visits[key] = self.visits.get(key, 0) + 1
            if not self._join(old, state, position, keep=self.visits[key] <= _VISITS) and not grown:
                return
        if key not in self.queued:
            self.queued.add(key)
            self.order += 1
            heappush(self.pending, (position, self.order, key))

    def _widened(self, position: int, held: Held, state: _State) -> Held:
        """A loop that has locked what a register pointed to, and moved on by a step, locks the elements of an array."""
        known = self.keys.get(position, ())
        if self.union is not None:
            old = next((self.inputs[k] for k in known if self.union[k] < held), None)
        else:
            old = next((self.inputs[k] for k in known if k[1] < held), None)
        if old is None:
            return held
        for name, now in list(state.registers.items()):
            before = old.registers.get(name)
            if before is None or before.base != now.base or before == now or before not in held:
                continue
            if isinstance(now.base, Object) or self._is_pointer(now.base):
                element = Value(Element(before.base, before.offset, abs(now.offset - before.offset)), 0)
                state.registers[name] = element
                held = (held - {before}) | {element}
        return held

    def _join(self, old: _State, new: _State, position: int, *, keep: bool) -> bool:
        changed = False
        mine, theirs = old.registers, new.registers
        for name in mine.keys() | theirs.keys():
            a = mine.get(name) or Value(Entry(name), 0)
            b = theirs.get(name) or Value(Entry(name), 0)
            if a != b or not keep:
                joined = self._joined(a, b, position, name, keep=keep)
                if joined != a:
                    mine[name] = joined
                    changed = True
        for cell, a in list(old.frame.items()):
            other = new.frame.get(cell)
            if other is None:
                del old.frame[cell]
                changed = True
            elif a != other:
                joined = self._joined(a, other, position, str(cell.offset), keep=keep)
                if joined != a:
                    old.frame[cell] = joined
                    changed = True
        if old.flags is not None and old.flags != new.flags:
            old.flags = None
            changed = True
        if old.known != new.known:
            old.known = {k: v for k, v in old.known.items() if new.known.get(k) == v}
        return changed

    def _joined(self, a: Value, b: Value, position: int, name: str, *, keep: bool) -> Value:
        """What two values have in common: themselves, an array that both are elements of, or a new name."""
        phi = Value(Named(-1 - position, name), 0)
        if a == b and (keep or isinstance(a.base, Object | Element | Entry)):
            return a
        if not keep or a == phi:
            return phi
        if isinstance(a.base, Element):
            base = a.base
            if (base.base, base.stride) == (b.base, 0) or (b.base == base.base and base.stride):
                step = b.offset - base.offset - a.offset
                return a if base.stride and step % base.stride == 0 else phi
            if isinstance(b.base, Element) and b.base[:2] == base[:2]:
                step = b.base.stride or b.offset - a.offset
                return a if step == 0 or (base.stride and step % base.stride == 0) else phi
            return phi
        if a.base == b.base and (isinstance(a.base, Object) or self._is_pointer(a.base)):
            return Value(Element(a.base, a.offset, abs(b.offset - a.offset)), 0)
        return phi

    def _is_pointer(self, base: Base) -> bool:
        return isinstance(base, Content) or (isinstance(base, Entry) and base.register in self.convention.arguments)

    def _run_block(self, key: _Key) -> None:
        position, held, _ = key
        if self.union is not None:
            held = self.union[key]
        self.block = position
        states = [(held, self.inputs[key].copy())]
        end = self.body.block_end(position)
        for here in range(position, end):
            instruction = self.body.instructions[here]
            onward: list[tuple[Held, _State]] = []
            for locks, state in states:
                targets = self._instruction(instruction, here, locks, state, onward)
                for target, now, then in targets:
                    self._go(position, target, now, then)
            states = onward
            if not states:
                return
        for locks, state in states:
            self._go(position, end, locks, state)

    def _go(self, block: int, position: int, held: Held, state: _State) -> None:
        self.successors.setdefault(block, set()).add(position)
        if state.failed:
            self.failing.setdefault(state.failed, set()).add(position)
        self._enter(position, held, state)

    # ---- instructions ----------------------------------------------------------------------

    def _instruction(
        self, instruction: Instruction, here: int, held: Held, state: _State, onward: list[tuple[Held, _State]]
    ) -> _Next:
        """Apply one instruction. What goes on after it is added to `onward`; what jumps is returned."""
        for operation in instruction.operations:
            kind = type(operation)
            if kind is Atomic:
                held = self._atomic(instruction, operation, held, state)  # type: ignore[arg-type]
                return self._after_atomic(instruction, operation, held, state, onward)  # type: ignore[arg-type]
            if kind is Set and type(operation.destination) is Memory:  # type: ignore[union-attr]
                held = self._store(instruction, operation, held, state)  # type: ignore[arg-type]
                continue
            step = self.data.get(kind)
            if step is not None:
                step(instruction, operation, state)
                continue
            return self._control(instruction, operation, here, held, state, onward)
        onward.append((held, state))
        return []

    def _control(
        self,
        instruction: Instruction,
        operation: Operation,
        here: int,
        held: Held,
        state: _State,
        onward: list[tuple[Held, _State]],
    ) -> _Next:
        match operation:
            case Call():
                for locks, then in self._call(instruction.address, held, state):
                    onward.append((locks, then))
            case Branch():
                return self._branch(instruction, operation, here, held, state)
            case Jump(target):
                position = self.body.position(target)
                if position is not None:
                    return [(position, held, state)]
                self._leave(instruction.address, held, state)
            case JumpUnknown():
                if self.body.orphans:
                    self.complete = False
                    return [(p, held, state.copy()) for p in self.body.orphans]
                self._leave(instruction.address, held, state)
            case Return():
                self._exit(held, state)
        return []

    def _exit(self, held: Held, state: _State) -> None:
        """Return: a result that is an attempt's outcome tells what is held."""
        self.ends.add(self.block)
        result = self._register(state, self.convention.result)
        base = result.base
        if base is None:
            self.exits.add(Exit(held, "zero" if result.offset == 0 else "nonzero"))
        elif (
            isinstance(base, Won | Old | Status)
            and result.offset == 0
            and (attempt := self.attempts.get(base.site)) is not None
            and attempt.is_token
        ):
            success = ("zero" if base.inverted else "nonzero") if isinstance(base, Won) else "zero"
            failure = "nonzero" if success == "zero" else "zero"
            self.exits.add(Exit(self._acquired(base.site, attempt.address, attempt.kind, held), success))
            self.exits.add(Exit(held, failure))
        else:
            self.exits.add(Exit(held, None))

    def _leave(self, site: int, held: Held, state: _State) -> None:
        for locks, then in self._call(site, held, state):
            self._exit(locks, then)

    # ---- calls -----------------------------------------------------------------------------

    def _call(self, site: int, held: Held, state: _State) -> list[tuple[Held, _State]]:
        """The states after a call: several where the callee holds different locks by its result."""
        calls = self.calls
        targets = calls.targets(site)
        for target in targets:
            if (helper := calls.helper(target)) is not None:
                return [(self._helped(site, helper, held, state), state)]
        arguments = tuple(self._address_of(self._register(state, name)) for name in self.convention.arguments)
        found: dict[tuple[Held, str | None], None] = {}
        for target in targets:
            if calls.waits(target):
                self.waiting.add(self.block)
            library = calls.library(target)
            if library is not None:
                found |= dict.fromkeys(self._library(site, library, arguments, held))
                continue
            if calls.is_relevant(target):
                self._note(site, target, arguments, held)
            found |= dict.fromkeys(self._local(target, arguments, held))
        if not calls.comes_back(site):
            return []
        if len({locks for locks, _ in found}) > 1:
            self.split_calls[site] = self.block
        most = max((len(locks) for locks, _ in found), default=0)
        after = [self._returned(site, locks, result, state) for locks, result in found or {(held, None): None}]
        for locks, then in after:
            then.failed = site if len(locks) < most else 0
            then.pending = site if len(after) > 1 and len(locks) < most else 0
        return after

    def _note(self, site: int, target: int, arguments: tuple[Value, ...], held: Held) -> None:
        """A call, by those arguments that matter; what is held is what always is."""
        wanted = self.calls.parameters(target)
        passed = tuple(a if i in wanted else ZERO for i, a in enumerate(arguments))
        variants = self.noted.setdefault((site, target), {})
        if passed not in variants and len(variants) >= _VARIANTS:
            passed = next(iter(variants))
        variants[passed] = variants[passed] & held if passed in variants else held

    def _returned(self, site: int, held: Held, result: str | None, state: _State) -> tuple[Held, _State]:
        after = state.copy()
        registers = after.registers
        for name in self.convention.destroyed:
            registers[name] = Value(Named(site, name), 0)
        after.flags = None
        if result == "zero":
            registers[self.convention.result] = ZERO
        elif result is not None:
            value = Value(Old(site), 0) if result == "try" else Value(Named(site, result), 0)
            registers[self.convention.result] = value
        return held, after

    def _library(
        self, site: int, library: LockFunction, arguments: tuple[Value, ...], held: Held
    ) -> list[tuple[Held, str | None]]:
        address = arguments[library.argument] if library.argument < len(arguments) else Value(Named(site, "?"), 0)
        if library.kind in ("sem", "once", "barrier"):
            self.waiting.add(self.block)
            return [(held, None)]
        match library.op:
            case "acquire":
                self.waiting.add(self.block)
                blocking = not library.bounded
                return [(self._acquired(site, address, library.kind, held, blocking=blocking), None)]
            case "try":
                self.attempts[site] = _Attempt(address, library.kind)
                self.attempt_blocks[site] = self.block
                return [(held, "try")]
            case "release" | "init":
                return [(self._released(address, held), None)]
            case "wait" if library.mutex is not None:
                self.waiting.add(self.block)
                mutex = arguments[library.mutex]
                self._acquired(site, mutex, "mutex", held - {mutex}, blocking=True)
        return [(held, None)]

    def _local(self, target: int, arguments: tuple[Value, ...], held: Held) -> list[tuple[Held, str | None]]:
        effect = self.calls.effect(target, arguments)
        if effect is None:
            return [(held, None)]
        rest = held
        for address in effect.releases:
            rest = self._released(address, rest) if address in rest else self._passed_release(address, rest)
        exits = {(self._kept(rest | e.held), e.result) for e in effect.exits}
        return sorted(exits, key=_in_order) or [(rest, None)]

    def _kept(self, held: Held) -> Held:
        return held if self.watched is None else held & self.watched

    def _passed_release(self, address: Value, held: Held) -> Held:
        self._release_of_caller(address)
        return held

    # ---- locks -----------------------------------------------------------------------------

    def _acquired(self, site: int, address: Value, kind: str, held: Held, *, blocking: bool = True) -> Held:
        event = Acquire(site, address, kind, blocking, held)
        key = site, address
        old = self.acquires.get(key)
        self.acquires[key] = event if old is None else event._replace(held=old.held & held)
        if address in held and not isinstance(address.base, Element):
            self.again[key] = event
        return self._kept(held | {address})

    def _released(self, address: Value, held: Held) -> Held:
        if address not in held:
            self._release_of_caller(address)
            return held
        self.let_go.add(address)
        return held - {address}

    def _release_of_caller(self, address: Value) -> None:
        begin = root(address.base)
        if isinstance(begin, Object) or (isinstance(begin, Entry) and begin != self.stack):
            self.releases.add(address)

    def _store(self, instruction: Instruction, operation: Set, held: Held, state: _State) -> Held:
        """A store of a constant into a lock's word releases it; of 0, perhaps one of the caller's."""
        assert isinstance(operation.destination, Memory)
        address = self._cell(instruction, operation.destination, state)
        value = self._read(instruction, operation.source, state)
        if self._is_frame(address.base):
            state.frame[address] = value
        elif value.base is None:
            if isinstance(address.base, Object):
                self.stores.setdefault(address, set()).add(value.offset)
            if address in held:
                return self._released(address, held)
            if value.offset == 0 and len(self.body.instructions) <= _SMALL:
                self._release_of_caller(address)
        return held

    def _atomic(self, instruction: Instruction, atomic: Atomic, held: Held, state: _State) -> Held:
        site = instruction.address
        address = self._cell(instruction, atomic.cell, state)
        stores = None if atomic.stores is None else self._read(instruction, atomic.stores, state)
        expects = None if atomic.expects is None else self._read(instruction, atomic.expects, state)
        return self._attempt(site, atomic.kind, address, stores, expects, held, state)

    def _attempt(
        self,
        site: int,
        kind: AtomicKind,
        address: Value,
        stores: Value | None,
        expects: Value | None,
        held: Held,
        state: _State,
    ) -> Held:
        """Note what an atomic operation attempts; the locks held after it, if it releases."""
        by_status = kind is AtomicKind.EXCLUSIVE and state.reserved in state.known
        if kind is AtomicKind.EXCLUSIVE:
            kind, expects, site = self._exclusive(stores, state)
        if address in held:
            return held if kind is AtomicKind.COMPARE_SWAP and expects == ZERO else self._released(address, held)
        tries = {
            AtomicKind.COMPARE_SWAP: expects == ZERO and stores != ZERO,
            AtomicKind.SWAP: stores != ZERO,
            AtomicKind.ADD: True,
            AtomicKind.SET_BITS: True,
        }.get(kind, False)
        if tries:
            state.pending = site
            shape = "ticket" if kind is AtomicKind.ADD else "spin"
            is_token = kind is not AtomicKind.ADD and (
                kind is not AtomicKind.SWAP or (stores is not None and stores.base is None)
            )
            self.attempts[site] = _Attempt(address, shape, by_status=by_status, is_token=is_token)
            self.attempt_blocks[site] = self.block
        elif stores == ZERO:
            self._release_of_caller(address)
        return held

    def _exclusive(self, stores: Value | None, state: _State) -> tuple[AtomicKind, Value | None, int]:
        """What a load- and a store-exclusive do together, and the site of the load, which names the old value."""
        load = state.reserved
        if load in state.known:
            return AtomicKind.COMPARE_SWAP, Value(None, state.known[load]), load
        if stores is not None and isinstance(stores.base, Old):
            return AtomicKind.ADD, None, load
        if stores is not None and isinstance(stores.base, Named):
            return AtomicKind.OTHER, None, load
        return AtomicKind.SWAP, None, load

    def _after_atomic(
        self, instruction: Instruction, atomic: Atomic, held: Held, state: _State, onward: list[tuple[Held, _State]]
    ) -> _Next:
        """Registers and flags after an atomic operation."""
        site = instruction.address
        for operation in instruction.operations:
            if isinstance(operation, Forget):
                state.registers[operation.destination.name] = Value(Named(site, operation.destination.name), 0)
        if atomic.kind is AtomicKind.EXCLUSIVE:
            if atomic.result is not None:
                state.registers[atomic.result.name] = Value(Status(state.reserved), 0)
            onward.append((held, state))
            return []
        if atomic.result is not None:
            state.registers[atomic.result.name] = Value(Old(site), 0)
        if any(isinstance(operation, ForgetFlags) for operation in instruction.operations):
            kind = {AtomicKind.COMPARE_SWAP: "won", AtomicKind.SET_BITS: "bit"}.get(atomic.kind)
            state.flags = None if kind is None else _Flags(kind, ZERO, ZERO, 64, site)
        onward.append((held, state))
        return []

    def _helped(self, site: int, helper: Atomic, held: Held, state: _State) -> Held:
        """An outline-atomics helper works on its caller's argument registers."""

        def register(operand: Operand | None) -> Value | None:
            if isinstance(operand, Const):
                return Value(None, operand.value)
            return self._register(state, operand.name) if isinstance(operand, Register) else None

        assert helper.cell.base is not None
        address = self._address_of(self._register(state, helper.cell.base))
        held = self._attempt(site, helper.kind, address, register(helper.stores), register(helper.expects), held, state)
        for name in ("x15", "x16", "x17", "x30"):
            state.registers[name] = Value(Named(site, name), 0)
        state.registers[self.convention.result] = Value(Old(site), 0)
        return held

    # ---- branches --------------------------------------------------------------------------

    def _branch(self, instruction: Instruction, branch: Branch, here: int, held: Held, state: _State) -> _Next:
        decided = self._decide(branch, state)
        if decided is None:
            self._turn(branch, here, state)
        found: _Next = []
        if decided is not False:
            target = self.body.position(branch.target)
            locks, then = self._refined(branch, state, held, taken=True)
            if target is not None:
                self._failed(branch, state, target, taken=True)
                found.append((target, locks, then))
            elif not self.body.contains(branch.target):
                self._leave(instruction.address, locks, then)
        if decided is not True:
            locks, then = self._refined(branch, state, held, taken=False)
            self._failed(branch, state, here + 1, taken=False)
            found.append((here + 1, locks, then))
        return found

    def _turn(self, branch: Branch, here: int, state: _State) -> None:
        """Note a branch that depends on more than arguments and attempts."""
        flags = self._compared(branch, state) or state.flags
        left, right = (flags.left, flags.right) if flags is not None else (Value(Named(here, "?"), 0), ZERO)
        if (
            self._outcome(branch, state, taken=True) is not None
            or self._outcome(branch, state, taken=False) is not None
        ):
            return
        if self._is_argument(left.base) and self._is_argument(right.base):
            return
        turns = self.turns.setdefault(self.block, {})
        for position, taken in ((self.body.position(branch.target), True), (here + 1, False)):
            if position is not None:
                for value, other, equal in self._shown(branch, flags, left, right, taken=taken):
                    turns[Turn(position, value, other, equal)] = None

    @staticmethod
    def _shown(
        branch: Branch, flags: _Flags | None, left: Value, right: Value, *, taken: bool
    ) -> list[tuple[Value, Value, bool | None]]:
        """What one side of a branch shows: two values, and whether they are equal there if that is told.

        Behind a conditional comparison, the side that its other outcome excludes shows both comparisons.
        """
        equal = (branch.condition is Condition.EQ) is taken
        if flags is None or branch.condition not in (Condition.EQ, Condition.NE):
            return [(left, right, None)]
        if flags.kind != "both":
            return [(left, right, equal if flags.kind == "cmp" else None)]
        if flags.zero is equal:
            return [(left, right, None)]
        found: list[tuple[Value, Value, bool | None]] = [(left, right, equal)]
        first = flags.before
        if first is not None and first.kind == "cmp" and flags.condition in (Condition.EQ, Condition.NE):
            found.insert(0, (first.left, first.right, flags.condition is Condition.EQ))
        return found

    def _is_argument(self, base: Base) -> bool:
        return base is None or (isinstance(base, Entry) and base.register in self.convention.arguments)

    def _compared(self, branch: Branch, state: _State) -> _Flags | None:
        if branch.operand is not None:
            return _Flags("cmp", self._register(state, branch.operand.name), ZERO, branch.bits)
        flags = state.flags
        if flags is not None and flags.kind == "test":
            return flags._replace(kind="cmp", right=ZERO) if flags.left == flags.right else None
        return flags

    def _decide(self, branch: Branch, state: _State) -> bool | None:
        flags = self._compared(branch, state)
        if flags is None or flags.kind != "cmp":
            return None
        a, b = flags.left, flags.right
        if branch.condition in (Condition.EQ, Condition.NE):
            if a.base is None and b.base is None:
                mask = (1 << flags.bits) - 1
                return ((a.offset ^ b.offset) & mask == 0) is (branch.condition is Condition.EQ)
            named = a.base
            if b == ZERO and isinstance(named, Named) and named.register == "nonzero":
                return branch.condition is Condition.NE
        return None

    def _outcome(self, branch: Branch, state: _State, *, taken: bool) -> tuple[int, bool] | None:
        """(site of an attempt, whether it succeeded) on one side of a branch."""
        flags = self._compared(branch, state)
        if flags is None:
            return None
        if flags.kind == "bit":
            if branch.condition in (Condition.BELOW, Condition.ABOVE_EQ):
                return flags.site, (branch.condition is Condition.ABOVE_EQ) is taken
            return None
        if branch.condition not in (Condition.EQ, Condition.NE) or flags.kind == "both":
            return None
        equal = (branch.condition is Condition.EQ) is taken
        if flags.kind == "won":
            return flags.site, equal
        return self._tested(flags.left, flags.right, equal=equal) or self._tested(flags.right, flags.left, equal=equal)

    def _tested(self, value: Value, other: Value, *, equal: bool) -> tuple[int, bool] | None:
        base = value.base
        if isinstance(base, Won) and other.base is None:
            return base.site, (equal is (other.offset != 0)) is not base.inverted
        if not isinstance(base, Old | Status):
            return None
        attempt = self.attempts.get(base.site)
        if attempt is not None and attempt.kind == "ticket":
            return (base.site, equal) if _is_beside(other.base, attempt.address) else None
        if other.base is not None or value.offset != 0:
            return None
        if isinstance(base, Status):
            return (base.site, equal) if attempt is not None and attempt.by_status else None
        if attempt is None or attempt.by_status:  # a look before the attempt can only show that it would fail
            return None if equal else (base.site, False)
        if other.offset == attempt.expected:
            return base.site, equal
        return (base.site, False) if equal else None

    def _refined(self, branch: Branch, state: _State, held: Held, *, taken: bool) -> tuple[Held, _State]:
        """The state on one side of a branch, with what the side shows."""
        after = state.copy()
        flags = self._compared(branch, state)
        equal = (branch.condition is Condition.EQ) is taken
        if flags is not None and flags.kind == "cmp" and branch.condition in (Condition.EQ, Condition.NE) and equal:
            self._equate(after, flags)
        outcome = self._outcome(branch, state, taken=taken)
        if flags is not None and (outcome is not None or flags.left == Value(Named(after.pending, "nonzero"), 0)):
            after.pending = 0
        if outcome is not None and outcome[1] and outcome[0] in self.attempts:
            attempt = self.attempts[outcome[0]]
            held = self._acquired(outcome[0], attempt.address, attempt.kind, held, blocking=False)
        return held, after

    def _equate(self, state: _State, flags: _Flags) -> None:
        """What is equal to a constant is that constant from here on."""
        value, other = flags.left, flags.right
        if value.base is None:
            value, other = other, value
        if value.base is None or other.base is not None:
            return
        if isinstance(value.base, Old):
            state.known[value.base.site] = other.offset - value.offset
        for name, held in state.registers.items():
            if held == value:
                state.registers[name] = other
        if isinstance(value.base, Entry) and value.offset == 0 and value.base.register not in state.registers:
            state.registers[value.base.register] = other

    def _failed(self, branch: Branch, state: _State, target: int, *, taken: bool) -> None:
        outcome = self._outcome(branch, state, taken=taken)
        if outcome is not None and not outcome[1]:
            self.failing.setdefault(outcome[0], set()).add(target)

    # ---- data ------------------------------------------------------------------------------

    def _register(self, state: _State, name: str) -> Value:
        return state.registers.get(name) or Value(Entry(name), 0)

    def _is_frame(self, base: Base) -> bool:
        return base == self.stack or (isinstance(base, Named) and base.register == self.stack.register)

    def _address_of(self, value: Value) -> Value:
        """A number that lies in the object is an address of it."""
        if value.base is None and self.calls.is_data(value.offset):
            return Value(self.object, value.offset)
        return value

    def _cell(self, instruction: Instruction, memory: Memory, state: _State) -> Value:
        """The address of a memory operand."""
        if memory.base == "pc":
            return Value(self.object, instruction.end + memory.displacement)
        base = ZERO if memory.base is None else self._register(state, memory.base)
        if memory.indexed:
            if memory.by is None:
                return Value(Named(instruction.address, "segment"), memory.displacement)
            index = self._register(state, memory.by)
            return self._sum(Value(base.base, base.offset + memory.displacement), index, instruction.address)
        return self._address_of(Value(base.base, base.offset + memory.displacement))

    def _sum(self, a: Value, b: Value, site: int) -> Value:
        """A pointer and a step: an element of the array that begins there."""
        if a.base is None and not self.calls.is_data(a.offset):
            a, b = b, a
        if b.base is None and not self.calls.is_data(b.offset):
            return Value(a.base, a.offset + b.offset)
        a, b = self._address_of(a), self._address_of(b)
        if isinstance(a.base, Content | Entry) and isinstance(b.base, Content | Entry):
            return Value(Named(site, "sum"), 0)
        if isinstance(b.base, Object) or (not self._may_point(a.base) and self._may_point(b.base)):
            a, b = b, a
        if not self._may_point(a.base):
            return Value(Named(site, "sum"), 0)
        if isinstance(a.base, Element):
            return a
        return Value(Element(a.base, a.offset, 0), 0)

    @staticmethod
    def _may_point(base: Base) -> bool:
        return isinstance(base, Object | Content | Element | Entry)

    def _read(self, instruction: Instruction, operand: Operand, state: _State) -> Value:
        if isinstance(operand, Const):
            return Value(None, operand.value)
        if isinstance(operand, Register):
            return self._register(state, operand.name)
        return self._load(self._cell(instruction, operand, state), instruction.address, state)

    def _load(self, address: Value, site: int, state: _State) -> Value:
        known = state.frame.get(address)
        if known is not None:
            return known
        if address.base == self.object and (slot := self.calls.slot(address.offset)) is not None:
            return slot
        if self._is_frame(address.base) and address.base != self.stack:
            return Value(Named(site, "frame"), 0)
        return content(address, Named(site, "deep"))

    def _set(self, instruction: Instruction, operation: Set, state: _State) -> None:
        value = self._read(instruction, operation.source, state)
        bits = operation.bits
        if bits < 64 and value.base is None:
            sign = 1 << (bits - 1)
            low = value.offset & ((1 << bits) - 1)
            value = Value(None, (low & (sign - 1)) - (low & sign) if operation.signed else low)
        elif bits < 64 and isinstance(value.base, Content) and value.offset == 0:
            value = Value(Word(*value.base), 0)
        state.registers[operation.destination.name] = value  # type: ignore[union-attr]

    def _address(self, instruction: Instruction, operation: Address, state: _State) -> None:
        cell = self._cell(instruction, operation.source, state)
        state.registers[operation.destination.name] = cell

    def _add(self, _: Instruction, operation: Add, state: _State) -> None:
        old = self._register(state, operation.left.name)
        value = Value(old.base, old.offset + operation.value)
        if value.base is None and operation.bits < 64:
            value = Value(None, value.offset & ((1 << operation.bits) - 1))
        state.registers[operation.destination.name] = stepped(value)

    def _add_values(self, instruction: Instruction, operation: Sum, state: _State) -> None:
        left = self._read(instruction, operation.left, state)
        right = Value(Named(instruction.address, "step"), 0)
        if operation.right is not None:
            right = self._read(instruction, operation.right, state)
        state.registers[operation.destination.name] = self._sum(left, right, instruction.address)

    def _forget(self, instruction: Instruction, operation: Forget, state: _State) -> None:
        name = operation.destination.name
        state.registers[name] = Value(Named(instruction.address, name), 0)

    def _insert(self, instruction: Instruction, operation: Insert, state: _State) -> None:
        old = self._register(state, operation.destination.name)
        value = Value(Named(instruction.address, operation.destination.name), 0)
        if old.base is None:
            value = Value(None, old.offset & ~(0xFFFF << operation.shift) | operation.value << operation.shift)
        state.registers[operation.destination.name] = value

    def _set_if(self, instruction: Instruction, operation: SetIf, state: _State) -> None:
        flags = state.flags
        value = Value(Named(instruction.address, operation.destination.name), 0)
        if flags is not None and operation.condition in (Condition.EQ, Condition.NE):
            if flags.kind == "test" and flags.left == flags.right:
                flags = flags._replace(kind="cmp", right=ZERO)
            outcome = (flags.site, True) if flags.kind == "won" else None
            if flags.kind == "cmp":
                outcome = self._tested(flags.left, flags.right, equal=True)
            if outcome is not None and outcome[1]:
                value = Value(Won(outcome[0], operation.condition is Condition.NE), 0)
        elif flags is not None and flags.kind == "bit" and operation.condition is Condition.BELOW:
            value = Value(Won(flags.site, True), 0)
        state.registers[operation.destination.name] = value

    def _compare(self, instruction: Instruction, operation: Compare | Test, state: _State) -> None:
        left = self._read(instruction, operation.left, state)
        right = self._read(instruction, operation.right, state)
        state.flags = _Flags("cmp" if isinstance(operation, Compare) else "test", left, right, operation.bits)

    def _compare_if(self, instruction: Instruction, operation: CompareIf, state: _State) -> None:
        left = self._read(instruction, operation.left, state)
        right = self._read(instruction, operation.right, state)
        before, condition, zero = state.flags, operation.condition, operation.zero
        state.flags = _Flags("both", left, right, operation.bits, 0, before, condition, zero)

    def _forget_flags(self, _: Instruction, __: Operation, state: _State) -> None:
        state.flags = None

    def _syscall(self, instruction: Instruction, _: Operation, state: _State) -> None:
        if self.calls.enters_wait():
            self.waiting.add(self.block)
        state.registers[self.convention.result] = Value(Named(instruction.address, "syscall"), 0)

    def _pause(self, *_: object) -> None:
        self.waiting.add(self.block)

    def _reserve(self, instruction: Instruction, operation: Reserve, state: _State) -> None:
        state.reserved = instruction.address
        state.known.pop(instruction.address, None)
        state.registers[operation.destination.name] = Value(Old(instruction.address), 0)


__all__ = ["NOTHING", "Acquire", "CallSite", "Calls", "Effect", "Exit", "Held", "Run", "interpret"]
