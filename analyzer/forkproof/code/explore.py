"""Following one function's control flow with the values that are known.

Owns: the abstract state (registers, cells, the last comparison), its join, and the worklist.
Takes: a `Body`, where to begin, what is known there, and what each call does (`Effects`).
Gives: an `Exploration`: which instructions can run, how the function ends, values at chosen sites.
Must never: claim that a path cannot run unless the values on it decide the branch.
Wrong where: a callee or a pointer changes a cell that is followed here (cells are kept across calls,
      which is what lets a fork's result be found again in a local, a global or a field).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from typing import Any, Final, NamedTuple

from forkproof.code import vectors
from forkproof.code.conventions import CONVENTIONS
from forkproof.code.decode import Body, Instruction
from forkproof.code.operations import (
    Add,
    Address,
    Atomic,
    Branch,
    Call,
    Compare,
    CompareIf,
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
from forkproof.code.state import FlagKind, Flags, State, absorb, compared, holds, joined
from forkproof.code.values import Behind, Cell, Entry, Held, Result, Success, Value, Word, as_signed, depth
from forkproof.elf.image import Machine

_POINTER: Final = 64
"""Bits of one."""
_DEEPEST: Final = 4
"""Loads that lead to a value, at most."""
_RUNS: Final = 12
"""Joins at one block before everything there is forgotten, which ends any loop's refinement."""


class CallEffect(NamedTuple):
    """What a call does to its caller: whether it comes back, with which constant, and whether it is to succeed."""

    returns: bool = True
    result: int | None = None
    succeeds: bool = False


Effects = Callable[[int], CallEffect]
"""Gives the effect of the call (or tail call) at a site."""


Words = Callable[[int, int], int | None]
"""What so many bits at an address hold for good, where nothing writes them."""


Changes = Callable[[int, State], None]
"""Takes out of the state before the call at a site what the call may change."""


class Transfer(NamedTuple):
    """A call, or a jump that leaves the function."""

    site: int
    is_jump: bool


@dataclass(frozen=True, eq=False)
class Exploration:
    """What can run, from where the exploration began."""

    visited: frozenset[int]
    """Addresses of instructions."""
    transfers: tuple[Transfer, ...]
    """Calls and tail calls that can happen, by address."""
    returns: bool
    """True when a return to the caller can happen (a tail call that returns counts)."""
    results: tuple[Value | None, ...]
    """The possible return values, deduplicated; None stands for unknown."""
    states: Mapping[int, State]
    """State before each watched instruction, joined over all paths."""
    successors: Mapping[int, tuple[int, ...]]
    """Feasible control flow between instructions' block starts, by address."""
    complete: bool
    """False when a computed jump was met, whose targets are only guessed."""
    final: State | None = None
    """What holds where it returns: the result and the cells, joined over all returns; kept with `fields` only."""
    _onward: dict[int, frozenset[int]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _starts(self) -> list[int]:
        return sorted(self.successors)

    def block_of(self, site: int) -> int | None:
        """Where the block begins that an instruction stands in."""
        position = bisect_right(self._starts, site)
        return self._starts[position - 1] if position else None

    def onward(self, block: int | None) -> frozenset[int]:
        """The blocks that control can come to from the end of a block: the block itself only around a loop."""
        if block is None:
            return frozenset()
        found = self._onward.get(block)
        if found is None:
            seen: set[int] = set()
            pending = [*self.successors.get(block, ())]
            while pending:
                here = pending.pop()
                if here not in seen:
                    seen.add(here)
                    pending += self.successors.get(here, ())
            found = self._onward[block] = frozenset(seen)
        return found

    def leads(self, site: int, goal: int) -> bool:
        """Control can go from one instruction to another, later in the same block or through others."""
        block, other = self.block_of(site), self.block_of(goal)
        return other in self.onward(block) or (block is not None and block == other and goal > site)


def explore(
    body: Body,
    machine: Machine,
    start: int,
    *,
    known: Mapping[str, int] | None = None,
    effects: Effects | None = None,
    watch: Collection[int] = (),
    within: Collection[int] | None = None,
    fields: bool = False,
    begin: State | None = None,
    changes: Changes | None = None,
    words: Words | None = None,
) -> Exploration:
    """Run all feasible paths from the instruction at `start`.

    `known` gives registers that hold a constant there, `begin` all that is known. O(blocks · _RUNS). `within`: only
    these blocks are run, by position; the states before watched instructions are the same if they are all that
    `Body.leading_to` names. `words`: what is not written at all.
    `fields`: loads behind pointers have values too (`Behind`), which costs time and decides no branch.
    `changes`: what calls change in memory; without it, cells are kept over all of them.
    """
    explorer = Explorer(body, machine, effects or (lambda _: CallEffect()), frozenset(watch))
    explorer.within, explorer.fields, explorer.changes, explorer.words = within, fields, changes, words
    return explorer.run(start, known or {}, begin)


class Explorer:
    """The worklist; one instance explores once."""

    def __init__(self, body: Body, machine: Machine, effects: Effects, watch: frozenset[int]) -> None:
        self.body, self.effects, self.watch = body, effects, watch
        self.addresses = body.addresses
        self.convention = CONVENTIONS[machine]
        self.destroyed = dict.fromkeys(self.convention.destroyed)
        self.inputs: dict[int, State] = {}
        self.runs: dict[int, int] = {}
        self.visited: set[int] = set()
        self.transfers: set[Transfer] = set()
        self.results: set[Value | None] = set()
        self.returns = False
        self.complete = True
        self.states: dict[int, State] = {}
        self.successors: dict[int, set[int]] = {}
        self.within: Collection[int] | None = None
        self.fields = False
        self.changes: Changes | None = None
        self.final: State | None = None
        self.words: Words | None = None
        self.pending: list[tuple[int, int, int]] = []
        self.queued: dict[int, int] = {}
        self.ranks = body.ranks
        self.sweep, self.rank = 0, -2

    def run(self, start: int, known: Mapping[str, int], begin: State | None = None) -> Exploration:
        position = self.body.position(start)
        if position is not None:
            state = State() if begin is None else begin.copy()
            state.registers.update({name: Value(None, value) for name, value in known.items()})
            self._enter(position, state)
        while self.pending:
            sweep, rank, position = heappop(self.pending)
            if self.queued.get(position) == sweep:
                del self.queued[position]
                self.sweep, self.rank = sweep, rank
                self.runs[position] = self.runs.get(position, 0) + 1
                self._block(position)
        return Exploration(
            frozenset(self.visited),
            tuple(sorted(self.transfers)),
            self.returns,
            tuple(sorted(self.results, key=repr)),
            self.states,
            {a: tuple(sorted(b)) for a, b in self.successors.items()},
            self.complete,
            self.final,
        )

    def _enter(self, position: int, state: State, *, is_last: bool = True) -> None:
        """Arrive at a block; queue it when that teaches something new. Nobody else uses a state that is the last."""
        if self.within is not None and position not in self.within:
            return
        old = self.inputs.get(position)
        if old is None:
            self.inputs[position] = state if is_last else state.copy()
        elif not absorb(old, state, keep=self.runs.get(position, 0) < _RUNS):
            return
        # In sweeps over the blocks in order: what leads back waits for the next, so that the head of a loop is run once
        # for all that lead back to it (Cooper, Harvey, Kennedy, "Iterative data-flow analysis, revisited", 2004).
        rank = self.ranks.get(position, -1)  # the start may lie in a block
        sweep = self.sweep + (rank <= self.rank)
        if self.queued.get(position, sweep + 1) > sweep:
            self.queued[position] = sweep
            heappush(self.pending, (sweep, rank, position))

    def _block(self, position: int) -> None:
        instructions = self.body.instructions
        end = self.body.block_end(position)
        state = self.inputs[position].copy()
        outgoing = self.successors.setdefault(instructions[position].address, set())
        targets: list[int] | None = None
        for here in range(position, end):
            instruction = instructions[here]
            if instruction.address in self.watch:
                self._look(instruction.address, state)
            targets = self._instruction(instruction, here, state)
            if targets is not None:
                end = here + 1
                break
        self.visited.update(self.addresses[position:end])
        onward = [p for p in ([end] if targets is None else targets) if p < len(instructions)]
        for target in onward:
            outgoing.add(self.addresses[target])
            self._enter(target, state, is_last=target is onward[-1])

    def _look(self, address: int, state: State) -> None:
        """Remember what is known before a watched instruction."""
        seen = self.states.get(address)
        if seen is None:
            self.states[address] = state.copy()
        else:
            absorb(seen, state, keep=True)

    def _instruction(self, instruction: Instruction, position: int, state: State) -> list[int] | None:
        """Apply an instruction; the positions that follow it, or None for simply the next one."""
        for operation in instruction.operations:
            step = _STEPS.get(type(operation))
            if step is not None:
                step(self, instruction, operation, state)
            elif not (isinstance(operation, Call) and self._call(instruction, state)):
                return self._control(instruction, operation, position, state)
        return None

    def _control(self, instruction: Instruction, operation: Operation, position: int, state: State) -> list[int]:
        """The positions that follow what may go elsewhere, or does not come back."""
        match operation:
            case Jump():
                return self._jump(instruction, operation.target, state)
            case JumpUnknown():
                return self._jump_unknown(instruction, state)
            case Branch():
                return self._branch(instruction, operation, position, state)
            case Return():
                result = state.register(self.convention.result)
                self._return(_settled(result), result, state)
                return []
            case _:
                return []

    def _effect(self, site: int, state: State) -> CallEffect:
        """What a call (or a tail call) does, in the state before it."""
        if self.changes is not None:
            self.changes(site, state)
        return self.effects(site)

    def _call(self, instruction: Instruction, state: State) -> bool:
        self.transfers.add(Transfer(instruction.address, False))
        effect = self._effect(instruction.address, state)
        state.registers.update(self.destroyed)
        if not vectors.NAMES.isdisjoint(state.registers):
            for name in vectors.NAMES.intersection(state.registers):
                del state.registers[name]
        base = Success(instruction.address) if effect.succeeds else Result(instruction.address)
        result = Value(base, 0) if effect.result is None else Value(None, effect.result)
        state.registers[self.convention.result] = result
        state.flags = None
        return effect.returns

    def _jump(self, instruction: Instruction, target: int, state: State) -> list[int]:
        position = self.body.position(target)
        if position is not None:
            return [position]
        self._leave(instruction.address, state)
        return []

    def _jump_unknown(self, instruction: Instruction, state: State) -> list[int]:
        """A switch goes to leaders that nothing else explains; without any it is a tail call."""
        if self.body.orphans:
            self.complete = False
            return list(self.body.orphans)
        self._leave(instruction.address, state)
        return []

    def _leave(self, site: int, state: State) -> None:
        self.transfers.add(Transfer(site, True))
        effect = self._effect(site, state)
        if effect.returns:
            result = None if effect.result is None else Value(None, effect.result)
            self._return(result, result, state)

    def _return(self, settled: Value | None, result: Value | None, state: State) -> None:
        self.returns = True
        self.results.add(settled)
        if self.fields:
            self.final = joined([self.final, State({self.convention.result: result}, state.cells)])

    def _branch(self, instruction: Instruction, branch: Branch, position: int, state: State) -> list[int]:
        decided = self._decide(branch, state)
        result = []
        if decided is not True:
            result.append(position + 1)
        if decided is not False:
            target = self.body.position(branch.target)
            if target is not None:
                result.append(target)
            elif not self.body.contains(branch.target):
                self._leave(instruction.address, state)
        return result

    def _decide(self, branch: Branch, state: State) -> bool | None:
        if branch.operand is not None:
            return compared(branch.condition, state.register(branch.operand.name), Value(None, 0), branch.bits)
        return holds(branch.condition, state)

    # ---- data ------------------------------------------------------------------------------

    def set(self, instruction: Instruction, operation: Set, state: State) -> None:
        destination, source, bits, signed = operation
        value = self._read(instruction, source, bits, state)
        if bits < 64:
            value = _narrow(value, bits, signed=signed)
        self._store(instruction, destination, value, bits, state)

    def address(self, instruction: Instruction, operation: Address, state: State) -> None:
        cell = self._cell(instruction, operation.source, state)
        state.registers[operation.destination.name] = None if cell is None else _narrow(Value(*cell), operation.bits)

    def add(self, _: Instruction, operation: Add, state: State) -> None:
        old = state.register(operation.left.name)
        known = None if old is None else _narrow(Value(old.base, old.offset + operation.value), operation.bits)
        state.registers[operation.destination.name] = known

    def forget(self, _: Instruction, operation: Forget | Sum, state: State) -> None:
        state.registers[operation.destination.name] = None

    def insert(self, _: Instruction, operation: Insert, state: State) -> None:
        known = _inserted(state.register(operation.destination.name), operation.value, operation.shift)
        state.registers[operation.destination.name] = _narrow(known, operation.bits)

    def set_if(self, _: Instruction, operation: SetIf, state: State) -> None:
        known = holds(operation.condition, state)
        state.registers[operation.destination.name] = None if known is None else Value(None, int(known))

    def compare(self, instruction: Instruction, operation: Compare, state: State) -> None:
        left, right, bits, carry = operation
        state.flags = self._flags(FlagKind(False, carry), instruction, (left, right), bits, state)

    def test(self, instruction: Instruction, operation: Test, state: State) -> None:
        left, right, bits, carry = operation
        state.flags = self._flags(FlagKind(True, carry), instruction, (left, right), bits, state)

    def forget_flags(self, _: Instruction, __: ForgetFlags | CompareIf, state: State) -> None:
        state.flags = None

    def atomic(self, instruction: Instruction, operation: Atomic, state: State) -> None:
        self._store(instruction, operation.cell, None, 64, state)

    def syscall(self, instruction: Instruction, _: Syscall, state: State) -> None:
        state.registers[self.convention.result] = Value(Result(instruction.address), 0)

    def pause(self, _: Instruction, __: Pause | Reserve, state: State) -> None:
        """A hint: nothing changes."""

    def _flags(
        self, kind: FlagKind, instruction: Instruction, operands: tuple[Operand, Operand], bits: int, state: State
    ) -> Flags:
        left, right = (self._read(instruction, operand, bits, state) for operand in operands)
        return kind, left, right, bits

    def _store(
        self, instruction: Instruction, place: Register | Memory, value: Value | None, bits: int, state: State
    ) -> None:
        if isinstance(place, Register):
            state.registers[place.name] = value
        elif (cell := self._cell(instruction, place, state)) is not None:
            _overwrite(state.cells, cell, bits)
            state.cells[cell] = None if value is None else Held(value, bits)

    def _read(self, instruction: Instruction, operand: Operand, bits: int, state: State) -> Value | None:
        """What `bits` of an operand hold; of a register all of it."""
        if isinstance(operand, Const):
            return Value(None, operand.value)
        if isinstance(operand, Register):
            return state.register(operand.name)
        cell = self._cell(instruction, operand, state)
        if cell is None:
            return None
        if cell in state.cells:
            held = state.cells[cell]
            return held.value if held is not None and held.bits >= bits else None
        if cell[0] is None:
            known = None if self.words is None else self.words(cell[1], bits)
            return Value(Word(cell[1]), 0) if known is None else Value(None, known)
        is_followed = self.fields and bits == _POINTER and depth(cell[0]) < _DEEPEST
        return Value(Behind(*cell), 0) if is_followed else None

    def _cell(self, instruction: Instruction, memory: Memory, state: State) -> Cell | None:
        if memory.indexed:
            return None
        if memory.base is None:
            return None, memory.displacement
        if memory.base == "pc":
            return None, instruction.end + memory.displacement
        base = state.register(memory.base)
        return None if base is None else (base.base, base.offset + memory.displacement)


_STEPS: Final[Mapping[type, Callable[[Explorer, Instruction, Any, State], None]]] = {
    Set: Explorer.set,
    Address: Explorer.address,
    Add: Explorer.add,
    Forget: Explorer.forget,
    Sum: Explorer.forget,
    Insert: Explorer.insert,
    SetIf: Explorer.set_if,
    Compare: Explorer.compare,
    Test: Explorer.test,
    ForgetFlags: Explorer.forget_flags,
    CompareIf: Explorer.forget_flags,
    Atomic: Explorer.atomic,
    Syscall: Explorer.syscall,
    Pause: Explorer.pause,
    Reserve: Explorer.pause,
}
"""What does not change where control goes. A table, since matching tries the classes one after the other."""


_TOLD: Final = (Word, Entry)


def _settled(value: Value | None) -> Value | None:
    """A return value as a caller can use it: constants, parameters and words, nothing of this frame."""
    return value if value is None or value.base is None or isinstance(value.base, _TOLD) else None


def _narrow(value: Value | None, bits: int, *, signed: bool = False) -> Value | None:
    """The low bits of a value. What is no constant is an int or a pointer: 32 bits are taken to be all of it."""
    if value is None or bits >= 64:
        return value
    if value.base is None:
        return Value(None, as_signed(value.offset, bits) if signed else value.offset & ((1 << bits) - 1))
    return value if bits == 32 else None


def _overwrite(cells: dict[Cell, Held | None], cell: Cell, bits: int) -> None:
    """Forget the other cells that a store into this one touches, and those of which it is a part.

    Cells are aligned words of 4 or 8 bytes, unless something narrower is stored.
    """
    base, offset = cell
    size, step = bits // 8, 4 if bits >= 32 else 1
    for near in range(offset - 8 + step, offset + size, step):
        held = cells.get((base, near))
        if held is not None and near != offset and (near > offset or near + held.bits // 8 > offset):
            cells[base, near] = None


def _inserted(old: Value | None, value: int, shift: int) -> Value | None:
    """A constant with 16 of its bits replaced."""
    if old is None or old.base is not None:
        return None
    return Value(None, old.offset & ~(0xFFFF << shift) | value << shift)
