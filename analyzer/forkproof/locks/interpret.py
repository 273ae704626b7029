"""One function, followed with the locks that it holds.

Owns: the abstract interpretation that tells where a function acquires and releases which addresses, what it
      calls while it holds them, and what it still holds when it returns.
Takes: a decoded body, what its calls do (`Calls`), and the locks held on entry. Gives: a `Run`.
Must never: call an atomic operation an acquire whose failing side does not wait (then it is a try).
Wrong where: a lock's address is changed behind the analysis' back (memory other than the stack is believed not
      to change).

States are kept apart by what is held (property simulation: Das, Lerner, Seigle, "ESP", PLDI 2002), so that
`if (p) lock(p->l)` does not look like holding p->l always. Within one set, registers are joined: what differs gets
the name of the block, and what differs by a constant step is an element of an array.

An atomic operation is an attempt. It acquires on the edges that show its success:
  compare-and-swap  what was found equals what was expected (x86-64: the zero flag), if that is the constant 0
  swap              what was found is 0, if something else was stored
  add               what was found equals a word that is loaded again and again: a ticket
  set bits          the bits were clear before: those that were found, or those that a compare-and-swap expects
  count down        the word was not 0: a permit of a semaphore, which is a lock if there is one permit
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from forkproof.code.conventions import Convention
from forkproof.code.decode import Body, Instruction
from forkproof.code.operations import (
    Atomic,
    AtomicKind,
    Branch,
    Call,
    Const,
    Forget,
    ForgetFlags,
    Jump,
    JumpUnknown,
    Memory,
    Operand,
    Operation,
    Pause,
    Register,
    Return,
    Set,
    Syscall,
)
from forkproof.locks.branches import EQ, EQUALITY, Attempts, Outcome, decided, equate, exclusive, look, plain, shown
from forkproof.locks.choices import Choices
from forkproof.locks.data import STEPS, Data
from forkproof.locks.ledger import Ledger
from forkproof.locks.rounds import Rounds
from forkproof.locks.runs import NOTHING, Acquire, Blocks, Calls, CallSite, Exit, Held, Run, Turn, in_order, told_exits
from forkproof.locks.state import Attempt, Flags, Joins, State
from forkproof.locks.values import (
    ZERO,
    Base,
    Content,
    Element,
    Entry,
    Joined,
    Masked,
    Named,
    Object,
    Old,
    Status,
    Thread,
    Value,
    Won,
    Word,
    root,
)
from forkproof.locks.worklist import KEYS, Worklist
from forkproof.signature_values import LockFunction

_VARIANTS: Final = 3
"""Sets of arguments that are told apart at one call."""
_SMALL: Final = 24
"""Instructions of a function that may be there to unlock with a plain store; elsewhere a cleared word is no unlock."""
_NOT_SEEN: Final[Mapping[bool, frozenset[Masked]]] = {True: frozenset(), False: frozenset()}
_UNKNOWN: Final = Entry("?")
"""What an instruction makes of a word in memory: x86-64 adds there."""
_Next = list[tuple[int, Held, State]]


def interpret(
    body: Body,
    machine: Convention,
    obj: int,
    calls: Calls,
    held: Held = NOTHING,
    watched: Held | None = None,
    *,
    joined: bool = False,
    flagged: bool = False,
) -> Run:
    """Follow a function from its entry. With `watched`, only those locks are followed: the others are let go.

    `joined` keeps one state a block, which holds what any way to it holds: right for a handler that takes everything
    in loops, where each round would make a set of its own.

    `flagged` follows constants in the thread's own storage too: a `Flag` is held from the store on, until another
    store; what is loaded there is that constant. So a flag that keeps a visitor out decides the branch that tests it.
    """
    return _Interpreter(body, machine, obj, calls, watched, joined=joined, flagged=flagged).run(held)


@lru_cache(maxsize=1 << 10)
def _destroyed(names: frozenset[str], site: int) -> Mapping[str, Value]:
    """Names for registers that a call leaves; functions are followed again for other locks."""
    return {name: Value(Named(site, name), 0) for name in names}


def _is_changed(address: Value, value: Value) -> bool:
    """What is stored is what the word held, but for a bit or a number: so are bits and tickets let go."""
    base = value.base.of.base if isinstance(value.base, Masked) else value.base
    return (isinstance(base, Content | Word) and Value(base.base, base.offset) == address) or base == _UNKNOWN


class _Interpreter:
    """One instance runs once."""

    def __init__(
        self,
        body: Body,
        convention: Convention,
        obj: int,
        calls: Calls,
        watched: Held | None,
        *,
        joined: bool,
        flagged: bool,
    ) -> None:
        self.body, self.convention, self.calls = body, convention, calls
        self.joins = Joins(convention)
        self.blocks = Worklist(body, self.joins, joined=joined)
        self.attempts = Attempts()
        self.data = Data(convention, obj, calls, self.attempts)
        self.ledger = Ledger(self.data.stack, watched)
        self.flagged, self.joined = flagged, joined
        self.waiting: set[int] = set()
        self.successors: dict[int, set[int]] = {}
        self.block = 0
        self.split_calls: dict[int, int] = {}
        self.clocks: set[int] = set()
        """Blocks with a call that tells the time."""
        self.locking: set[int] = set()
        """Blocks with a call that comes back with a lock, or works on one that it is given."""
        self.destroyed: dict[int, Mapping[str, Value]] = {}
        self.noted: dict[tuple[int, int, bool], dict[tuple[Value, ...], Held]] = {}
        self.exits: set[Exit] = set()
        self.ends: set[int] = set()
        self.stores: dict[Value, set[Value]] = {}
        self.own_stores: dict[Value, set[Value]] = {}
        self.turns: dict[int, dict[Turn, None]] = {}
        self.complete = True

    def run(self, held: Held) -> Run:
        self.ledger.on_entry = held
        start = self.body.position(self.body.entry)
        if start is not None:
            self.blocks.enter(start, held, State())
        while self.blocks:
            self._run_block(*self.blocks.next())
        choices = Choices(self.data, self.joins, self.body, self.convention)
        unposted = self.ledger.waited - self.ledger.posted
        signals = {a for a in unposted if not self.calls.is_lock(a)}
        self.exits = {Exit(e.held - signals, e.result) for e in self.exits} if signals else self.exits
        return Run(
            tuple(
                self._settled(a._replace(kind="count") if a.address in unposted else a)
                for _, each in sorted(self.ledger.acquires.items(), key=repr)
                if each.address not in signals
                for a in choices.acquired(each)
            ),
            tuple(
                CallSite(*c[:2], a, choices.held(h), c[2])
                for c, known in sorted(self.noted.items())
                for passed, h in known.items()
                for a in choices.passed(passed)
            ),
            told_exits(self.exits, self.ledger.let_go, KEYS),
            frozenset(self.ledger.releases),
            frozenset(self.ledger.let_go),
            tuple(
                a
                for _, a in sorted(self.ledger.again.items(), key=repr)
                if a.kind != "sem" and self._settled(a).blocking
            ),
            frozenset(s for s, b in self.split_calls.items() if self._waits(s, b, may_repeat=True)),
            Blocks(
                start or 0,
                {b: tuple(sorted(t)) for b, t in self.successors.items()},
                frozenset(self.ends),
                {b: tuple(t) for b, t in self.turns.items()},
            ),
            {address: frozenset(values) for address, values in self.stores.items()},
            {address: frozenset(values) for address, values in self.own_stores.items()},
            self.joins.met(v for turns in self.turns.values() for turn in turns for v in (turn.value, turn.other)),
            self._touched(),
            self.body,
            self.complete,
        )

    def _touched(self) -> frozenset[Value]:
        ledger = self.ledger
        taken = (address for _, address in ledger.acquires)
        tried = (attempt.address for attempt in self.attempts.known.values())
        return frozenset((*taken, *tried, *ledger.releases, *ledger.let_go, *ledger.left_out, *self.stores))

    def _settled(self, acquire: Acquire) -> Acquire:
        """An attempt blocks when its failing side waits, or comes back to it."""
        if acquire.site not in self.attempts.known:
            return acquire
        may_repeat = not isinstance(acquire.address.base, Element)
        block = self.attempts.blocks[acquire.site]
        if acquire.kind == "ticket":
            waits = self.attempts.waits_for_turn(acquire.site, self.waiting, self.successors, self.ends)
        else:
            waits = self._waits(acquire.site, block, may_repeat=may_repeat)
            waits = waits and (acquire.kind != "permit" or self.attempts.comes_back(acquire.site, self.successors))
        return acquire._replace(blocking=waits)

    def _waits(self, site: int, block: int, *, may_repeat: bool) -> bool:
        attempts = self.attempts
        if not attempts.waits_after_failure(site, block, self.waiting, self.successors, may_repeat=may_repeat):
            return False
        alike = attempts.at_same_lock(site)
        tries = {block, *(attempts.blocks[s] for s in alike if s in attempts.blocks)}
        won = {edge for s in alike for edge in attempts.hopes(s)}
        tries |= {looking for looking, _ in won}
        rounds = Rounds(
            self.body, self.convention, self.successors, tries, self.waiting, self.clocks, self.ends, won, self.locking
        )
        return not rounds.gives_up(attempts.failing.get(site, ()))

    # ---- blocks ----------------------------------------------------------------------------

    def _run_block(self, position: int, held: Held, state: State) -> None:
        self.block = position
        states = [(held, state)]
        end = self.body.block_end(position)
        for here in range(position, end):
            instruction = self.body.instructions[here]
            onward: list[tuple[Held, State]] = []
            for locks, then in states:
                targets = self._instruction(instruction, here, locks, then, onward)
                for target, now, after in targets:
                    self._go(position, target, now, after)
            states = onward if len(onward) <= KEYS else self._met(onward, here + 1)
            if not states:
                return
        for locks, then in states:
            self._go(position, end, locks, then)

    def _met(self, states: list[tuple[Held, State]], position: int) -> list[tuple[Held, State]]:
        """As many states as are told apart where ways meet: calls of one block that come back with different locks
        would double them each time."""
        found: dict[Held, State] = {}
        every = frozenset[Value]().union(*(held for held, _ in states))
        for held, state in states:
            key = every if self.joined else held if held in found or len(found) < KEYS else next(iter(found))
            old = found.setdefault(key, state)
            if old is not state:
                self.joins.join(old, state, position, keep=True)
                old.pending = old.pending if old.pending == state.pending else 0
                old.failed = old.failed if old.failed == state.failed else 0
        return list(found.items())

    def _go(self, block: int, position: int, held: Held, state: State) -> None:
        self.successors.setdefault(block, set()).add(position)
        if state.failed:
            self.attempts.failing.setdefault(state.failed, set()).add(position)
        self.blocks.enter(position, held, state)

    # ---- instructions ----------------------------------------------------------------------

    def _instruction(
        self, instruction: Instruction, here: int, held: Held, state: State, onward: list[tuple[Held, State]]
    ) -> _Next:
        """Apply one instruction. What goes on after it is added to `onward`; what jumps is returned."""
        if self.flagged:
            state.facts = held
        for operation in instruction.operations:
            kind = type(operation)
            if kind is Atomic:
                held = self._atomic(instruction, operation, held, state)  # type: ignore[arg-type]
                return self._after_atomic(instruction, operation, held, state, onward)  # type: ignore[arg-type]
            if kind is Set and type(operation.destination) is Memory:  # type: ignore[union-attr]
                held = self._store(instruction, operation, held, state)  # type: ignore[arg-type]
                continue
            step = STEPS.get(kind)
            if step is not None:
                step(self.data, instruction, operation, state)
            elif kind is Syscall:
                self._syscall(instruction, state)
            elif kind is Pause:
                self.waiting.add(self.block)
            else:
                return self._control(instruction, operation, here, held, state, onward)
        onward.append((held, state))
        return []

    def _control(
        self,
        instruction: Instruction,
        operation: Operation,
        here: int,
        held: Held,
        state: State,
        onward: list[tuple[Held, State]],
    ) -> _Next:
        match operation:
            case Call():
                onward += self._call(instruction, operation.through, held, state)
            case Branch():
                return self._branch(instruction, operation, here, held, state)
            case Jump(target):
                position = self.body.position(target)
                if position is not None:
                    return [(position, held, state)]
                self._leave(instruction, None, held, state)
            case JumpUnknown():
                if self.body.orphans:
                    self.complete = False
                    return [(p, held, state.copy()) for p in self.body.orphans]
                self._leave(instruction, operation.through, held, state)
            case Return():
                self._exit(held, state)
        return []

    def _exit(self, held: Held, state: State) -> None:
        """Return: a result that is an attempt's outcome tells what is held."""
        self.ends.add(self.block)
        result = state.register(self.convention.result)
        base = result.base
        if base is None:
            self.exits.add(Exit(held, "zero" if result.offset == 0 else "nonzero"))
        elif (
            isinstance(base, Won | Old | Status)
            and result.offset == 0
            and (attempt := self.attempts.known.get(base.site)) is not None
            and attempt.is_token
        ):
            success = ("zero" if base.inverted else "nonzero") if isinstance(base, Won) else "zero"
            failure = "nonzero" if success == "zero" else "zero"
            self.exits.add(Exit(self.ledger.acquired(base.site, attempt.address, attempt.kind, held), success))
            self.exits.add(Exit(held, failure))
        else:
            self.exits.add(Exit(held, None))

    def _leave(self, instruction: Instruction, through: Operand | None, held: Held, state: State) -> None:
        for locks, then in self._call(instruction, through, held, state):
            self._exit(locks, then)

    # ---- calls -----------------------------------------------------------------------------

    def _call(
        self, instruction: Instruction, through: Operand | None, held: Held, state: State
    ) -> list[tuple[Held, State]]:
        """The states after a call: several where the callee holds different locks by its result."""
        calls, site = self.calls, instruction.address
        targets = calls.targets(site)
        for target in targets:
            if (helper := calls.helper(target)) is not None:
                return [(self._helped(site, helper, held, state), state)]
        known = frozenset(targets)
        if through is not None:
            pointer = self.data.read(instruction, through, state)
            if self.data.is_descriptor(pointer, state.register(self.convention.result)):
                state.registers[self.convention.result] = Value(pointer.base, 0)
                return [(held, state)]
            targets = (*targets, *(t for t in calls.chosen(pointer) if t not in known))
        arguments = tuple(self.data.address_of(state.register(name)) for name in self.convention.arguments)
        found: dict[tuple[Held, str | None], None] = {}
        for target in targets:
            if calls.waits(target):
                self.waiting.add(self.block)
            if calls.tells_time(target):
                self.clocks.add(self.block)
            library = calls.library(target)
            if library is not None:
                found |= dict.fromkeys(self._library(site, library, arguments, held))
                continue
            if calls.is_relevant(target):
                self._note((site, target, target not in known), arguments, held)
            elif isinstance(arguments[0].base, Object):  # it may set what it is given
                self._stored_unknown(arguments[0], site)
            found |= dict.fromkeys(self._local(target, arguments, held))
        if not calls.comes_back(site):
            return []
        if len({locks for locks, _ in found}) > 1:
            self.split_calls[site] = self.block
        elif any(held < locks for locks, _ in found) or self._locks_what_it_is_given(targets):
            self.locking.add(self.block)
        most = max((len(locks) for locks, _ in found), default=0)
        keeps = calls.keeps(site) if through is None else frozenset[str]()
        after = [self._returned(site, locks, result, state, keeps) for locks, result in found or {(held, None): None}]
        if targets and calls.gives_thread_cell(targets[0]):
            given: Value | None = self.data.thread_cell(site, arguments[0])
        else:
            given = calls.given(targets[0]) if len(targets) == 1 else None
        if given is not None:
            for _, then in after:
                then.registers[self.convention.result] = given
        for locks, then in after:
            then.failed = site if len(locks) < most else 0
            then.pending = site if len(after) > 1 and len(locks) < most else 0
        return after

    def _locks_what_it_is_given(self, targets: tuple[int, ...]) -> bool:
        return any(self.calls.is_relevant(target) and self.calls.parameters(target) for target in targets)

    def _note(self, call: tuple[int, int, bool], arguments: tuple[Value, ...], held: Held) -> None:
        """A call, by those arguments that matter; what is held is what always is."""
        wanted = self.calls.parameters(call[1])
        passed = tuple(a if i in wanted else ZERO for i, a in enumerate(arguments))
        variants = self.noted.setdefault(call, {})
        if passed not in variants and len(variants) >= _VARIANTS:
            passed = next(iter(variants))
        variants[passed] = variants[passed] & held if passed in variants else held

    def _returned(
        self, site: int, held: Held, result: str | None, state: State, keeps: frozenset[str]
    ) -> tuple[Held, State]:
        after = state.copy()
        registers = after.registers
        registers.update(self._destroyed(site))
        if keeps:
            registers.update({name: value for name, value in state.registers.items() if name in keeps})
        after.flags = None
        if result == "zero":
            registers[self.convention.result] = ZERO
        elif result is not None:
            value = Value(Old(site), 0) if result == "try" else Value(Named(site, result), 0)
            registers[self.convention.result] = value
        return held, after

    def _destroyed(self, site: int) -> Mapping[str, Value]:
        """The registers that a call leaves with names of its own."""
        known = self.destroyed.get(site)
        if known is None:
            known = self.destroyed[site] = _destroyed(self.convention.destroyed, site)
        return known

    def _library(
        self, site: int, library: LockFunction, arguments: tuple[Value, ...], held: Held
    ) -> list[tuple[Held, str | None]]:
        address = arguments[library.argument] if library.argument < len(arguments) else Value(Named(site, "?"), 0)
        if library.kind in ("once", "barrier"):
            self.waiting.add(self.block)
            return [(held, None)]
        if library.kind == "sem":
            return [(self._semaphore(site, library, address, held), None)]
        match library.op:
            case "acquire" if library.bounded:  # who does so again and again, without an end, waits
                self.attempts.note(site, Attempt(address, library.kind), self.block)
                return [(held, "try")]
            case "acquire":
                self.waiting.add(self.block)
                taken = self.ledger.acquired(site, address, library.kind, held, blocking=True)
                # Who waits for a guard gets it only if what it guards is still to be made.
                return [(taken, "nonzero"), (held, "zero")] if library.kind == "guard" else [(taken, None)]
            case "try":
                self.attempts.note(site, Attempt(address, library.kind), self.block)
                return [(held, "try")]
            case "use":
                self.waiting.add(self.block)
                self.ledger.acquired(site, address, library.kind, held, blocking=True)
            case "release" | "init":
                return [(self.ledger.released(address, held), None)]
            case "wait" if library.mutex is not None:
                self.waiting.add(self.block)
                mutex = arguments[library.mutex]
                self.ledger.acquired(site, mutex, "mutex", held - {mutex}, blocking=True)
        return [(held, None)]

    def _semaphore(self, site: int, library: LockFunction, address: Value, held: Held) -> Held:
        """It is followed as a lock; whether it is one is told at the end."""
        self.waiting.add(self.block)
        if library.op == "acquire":
            self.ledger.waited.add(address)
            return self.ledger.acquired(site, address, library.kind, held, blocking=not library.bounded)
        if library.op == "release":
            self.ledger.posted.add(address)
        return self.ledger.released(address, held) if library.op in ("release", "init") else held

    def _local(self, target: int, arguments: tuple[Value, ...], held: Held) -> list[tuple[Held, str | None]]:
        effect = self.calls.effect(target, arguments)
        if effect is None:
            return [(held, None)]
        rest = self.ledger.released_in_callee(effect.fixed, held)
        for address in effect.releases:
            rest = self.ledger.released(address, rest)
        exits = {(self.ledger.kept(rest | e.held), e.result) for e in effect.exits}
        return sorted(exits, key=in_order) or [(rest, None)]

    # ---- locks -----------------------------------------------------------------------------

    def _store(self, instruction: Instruction, operation: Set, held: Held, state: State) -> Held:
        """A store of a constant into a lock's word releases it; of 0, perhaps one of the caller's."""
        assert isinstance(operation.destination, Memory)
        address = self.data.cell(instruction, operation.destination, state)
        value = self.data.read(instruction, operation.source, state)
        if self.data.is_frame(address.base):
            state.frame[address] = value
        elif isinstance(address.base, Thread):
            self.own_stores.setdefault(address, set()).add(value)
            return self.ledger.stored(address, value, held) if self.flagged else held
        elif isinstance(address.base, Object) and isinstance(root(value.base), Object):
            self.stores.setdefault(address, set()).add(value)
        elif value.base is None:
            if isinstance(address.base, Object):
                self.stores.setdefault(address, set()).add(value)
            if address in held:
                return self.ledger.released(address, held)
            if value.offset == 0 and len(self.body.instructions) <= _SMALL:
                self.ledger.release_of_caller(address)
        elif _is_changed(address, value):
            if address in held:
                return self.ledger.released(address, held)
            if len(self.body.instructions) <= _SMALL:
                self.ledger.release_of_caller(address)
        if value.base is not None and isinstance(address.base, Object) and not isinstance(root(value.base), Object):
            self._stored_unknown(address, instruction.address)
        return held

    def _stored_unknown(self, address: Value, site: int) -> None:
        self.stores.setdefault(address, set()).add(Value(Named(site, "stored"), 0))

    def _atomic(self, instruction: Instruction, atomic: Atomic, held: Held, state: State) -> Held:
        site = instruction.address
        address = self.data.cell(instruction, atomic.cell, state)
        stores = None if atomic.stores is None else self.data.read(instruction, atomic.stores, state)
        expects = None if atomic.expects is None else self.data.read(instruction, atomic.expects, state)
        return self._attempt(site, atomic.kind, address, stores, expects, held, state)

    def _attempt(
        self,
        site: int,
        kind: AtomicKind,
        address: Value,
        stores: Value | None,
        expects: Value | None,
        held: Held,
        state: State,
    ) -> Held:
        """Note what an atomic operation attempts; the locks held after it, if it releases."""
        by_status = kind is AtomicKind.EXCLUSIVE and state.reserved in state.known
        if kind is AtomicKind.EXCLUSIVE:
            kind, expects, site = exclusive(stores, state)
            if kind is AtomicKind.SET_BITS and stores is not None and isinstance(stores.base, Joined):
                stores = stores.base.mask
        attempt = self.attempts.tried(site, kind, address, stores, expects, state, by_status=by_status)
        is_again = attempt is not None and kind in (AtomicKind.COMPARE_SWAP, AtomicKind.SET_BITS)
        if address in held and not (is_again and address in self.ledger.on_entry):
            return held if is_again else self.ledger.released(address, held)
        if attempt is not None:
            state.pending = site
            self.attempts.note(site, attempt, self.block)
        elif stores == ZERO or kind is AtomicKind.CLEAR_BITS:
            self.ledger.release_of_caller(address)
        return held

    def _after_atomic(
        self, instruction: Instruction, atomic: Atomic, held: Held, state: State, onward: list[tuple[Held, State]]
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
            state.flags = None if kind is None else Flags(kind, ZERO, ZERO, 64, site)
        onward.append((held, state))
        return []

    def _helped(self, site: int, helper: Atomic, held: Held, state: State) -> Held:
        """An outline-atomics helper works on its caller's argument registers."""

        def register(operand: Operand | None) -> Value | None:
            if isinstance(operand, Const):
                return Value(None, operand.value)
            return state.register(operand.name) if isinstance(operand, Register) else None

        assert helper.cell.base is not None
        address = self.data.address_of(state.register(helper.cell.base))
        held = self._attempt(site, helper.kind, address, register(helper.stores), register(helper.expects), held, state)
        for name in ("x15", "x16", "x17", "x30"):
            state.registers[name] = Value(Named(site, name), 0)
        state.registers[self.convention.result] = Value(Old(site), 0)
        return held

    # ---- branches --------------------------------------------------------------------------

    def _branch(self, instruction: Instruction, branch: Branch, here: int, held: Held, state: State) -> _Next:
        branch, flags = plain(branch, state)
        way = decided(branch, flags)
        if way is None:
            self._turn(branch, flags, here, state)
        found: _Next = []
        clear = self._looked(branch, flags, here)
        self.attempts.note_zero(branch, flags, self.block, self.body.position(branch.target), here + 1)
        if way is not False:
            target = self.body.position(branch.target)
            outcome = self.attempts.outcome(branch, flags, taken=True)
            locks, then = self._refined(branch, flags, outcome, state.copy(), held, taken=True)
            then.clear |= clear[True]
            if target is not None:
                self.attempts.note_outcome(outcome, self.block, target)
                found.append((target, locks, then))
            elif not self.body.contains(branch.target):
                self._leave(instruction, None, locks, then)
        if way is not True:
            outcome = self.attempts.outcome(branch, flags, taken=False)
            state.failed = 0
            locks, then = self._refined(branch, flags, outcome, state, held, taken=False)
            then.clear |= clear[False]
            self.attempts.note_outcome(outcome, self.block, here + 1)
            found.append((here + 1, locks, then))
        return found

    def _looked(self, branch: Branch, flags: Flags | None, here: int) -> Mapping[bool, frozenset[Masked]]:
        """What is known of a word's bits where a branch is taken, and where it is not."""
        seen = look(branch, flags)
        if seen is None:
            return _NOT_SEEN
        target = here + 1 if seen.if_clear else self.body.position(branch.target)
        fact = self.attempts.note_look(seen, target) if target is not None else None
        return _NOT_SEEN if fact is None else {seen.if_clear: frozenset({fact}), not seen.if_clear: frozenset()}

    def _turn(self, branch: Branch, looked_at: Flags | None, here: int, state: State) -> None:
        """Note a branch that depends on more than arguments and attempts."""
        flags = looked_at or state.flags
        left, right = (flags.left, flags.right) if flags is not None else (Value(Named(here, "?"), 0), ZERO)
        if any(self.attempts.outcome(branch, looked_at, taken=taken) is not None for taken in (True, False)):
            return
        if self._is_argument(left.base) and self._is_argument(right.base):
            return
        turns = self.turns.setdefault(self.block, {})
        bits = flags.bits if flags is not None and flags.kind == "cmp" and branch.condition in EQUALITY else 64
        for position, taken in ((self.body.position(branch.target), True), (here + 1, False)):
            if position is not None:
                for value, other, equal in shown(branch, flags, left, right, taken=taken):
                    turns[Turn(position, value, other, equal, bits)] = None

    def _is_argument(self, base: Base) -> bool:
        return base is None or (isinstance(base, Entry) and base.register in self.convention.arguments)

    def _refined(
        self, branch: Branch, flags: Flags | None, outcome: Outcome | None, after: State, held: Held, *, taken: bool
    ) -> tuple[Held, State]:
        """The state on one side of a branch, with what the side shows."""
        equal = (branch.condition is EQ) is taken
        if flags is not None and flags.kind == "cmp" and branch.condition in EQUALITY and equal:
            equate(after, flags)
        if (stored := self.attempts.exchanged(branch, flags, taken=taken)) and (
            (was := self.attempts.known[stored].was) is not None
        ):
            after.replace(was, Value(Old(stored), 0))
        tried = self.attempts.known.get(outcome[0]) if outcome is not None else None
        is_plain = tried is None or (tried.kind == "spin" and tried.bits is None and tried.was is None)
        if outcome is not None and not outcome[1] and outcome[0] == after.reserved and is_plain:
            # An exclusive load gave something else: code that tests it again takes the same side.
            after.replace(Value(Old(outcome[0]), 0), Value(Named(outcome[0], "nonzero"), 0))
        pending = Value(Named(after.pending, "nonzero"), 0) if after.pending else None
        if pending is not None and flags is not None and (outcome is not None or flags.left == pending):
            after.pending = 0
        if outcome is not None and outcome[1] and tried is not None:
            if is_plain:  # what was found is what was expected
                after.replace(Value(Old(outcome[0]), 0), ZERO)
            held = self.ledger.acquired(outcome[0], tried.address, tried.kind, held, blocking=False)
        return held, after

    def _syscall(self, instruction: Instruction, state: State) -> None:
        if self.calls.enters_wait():
            self.waiting.add(self.block)
        state.registers[self.convention.result] = Value(Named(instruction.address, "syscall"), 0)
