"""What instructions do to registers, the frame and the flags.

Owns: the data side of the interpretation: values of operands, addresses, loads, arithmetic, comparisons.
Takes: decoded operations and a `State`, which it changes. Gives: values.
Must never: decide where control goes, or touch what is held: `forkproof.locks.interpret` does.
Wrong where: memory other than the stack changes between two loads (it is believed not to).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from forkproof.code.conventions import Convention
from forkproof.code.decode import Instruction
from forkproof.code.operations import (
    Add,
    Address,
    Bits,
    BitsOf,
    Compare,
    CompareIf,
    Condition,
    Const,
    Forget,
    ForgetFlags,
    Insert,
    Memory,
    Operand,
    Operation,
    Register,
    Reserve,
    Set,
    SetIf,
    Sum,
    Test,
)
from forkproof.locks.branches import EQ, EQUALITY, NE, Attempts
from forkproof.locks.runs import Calls
from forkproof.locks.state import Flags, State
from forkproof.locks.values import (
    ZERO,
    Base,
    Content,
    Element,
    Entry,
    Flag,
    Joined,
    Masked,
    Named,
    Object,
    Old,
    Part,
    Thread,
    Value,
    Won,
    Word,
    content,
    stepped,
)

THREAD: Final = Value(Thread(None), 0)
"""The thread pointer."""


_LOADED: Final = (Content, Entry)
_WORDS: Final = (Content, Word, Old, Masked, Joined, Named)
_POINTING: Final = (Object, Content, Element, Entry)


def of_thread(offset: Value) -> Value | None:
    """The cell at an offset from the thread pointer: a number, or one that ld.so puts into the object."""
    if offset.base is None:
        return Value(Thread(None), offset.offset - (1 << 64) if offset.offset >> 63 else offset.offset)
    is_told = isinstance(offset.base, Content) and isinstance(offset.base.base, Object)
    return Value(Thread(offset.base), offset.offset) if is_told else None


class Data:
    """The operations that change registers and flags only, for one function."""

    def __init__(self, convention: Convention, obj: int, calls: Calls, attempts: Attempts) -> None:
        self.calls, self.attempts = calls, attempts
        self.object = Object(obj)
        self.stack = Entry(convention.stack)
        self.choices: dict[Value, set[Value]] = {}
        """What the values may be that a condition chooses."""

    def is_frame(self, base: Base) -> bool:
        return base == self.stack or (isinstance(base, Named) and base.register == self.stack.register)

    def address_of(self, value: Value) -> Value:
        """A number that lies in the object is an address of it."""
        if value.base is None and self.calls.is_data(value.offset):
            return Value(self.object, value.offset)
        return value

    def cell(self, instruction: Instruction, memory: Memory, state: State) -> Value:
        """The address of a memory operand."""
        if memory.thread:
            base = ZERO if memory.base is None else state.register(memory.base)
            cell = Value(base.base, base.offset + memory.displacement)
            return of_thread(cell) or Value(Named(instruction.address, "segment"), memory.displacement)
        if memory.base == "pc":
            return Value(self.object, instruction.end + memory.displacement)
        base = ZERO if memory.base is None else state.register(memory.base)
        if memory.indexed:
            if memory.by is None:
                return Value(Named(instruction.address, "segment"), memory.displacement)
            index = state.register(memory.by)
            return self._sum(Value(base.base, base.offset + memory.displacement), index, instruction.address)
        cell = tuple.__new__(Value, (base.base, base.offset + memory.displacement))  # the quickest way to make one
        return self.address_of(cell)

    def _sum(self, a: Value, b: Value, site: int) -> Value:
        """A pointer and a step: an element of the array that begins there."""
        if a.base is None and not self.calls.is_data(a.offset):
            a, b = b, a
        if b.base is None and not self.calls.is_data(b.offset):
            return Value(a.base, a.offset + b.offset)
        a, b = self.address_of(a), self.address_of(b)
        if THREAD.base in (a.base, b.base):
            offset = b if a.base == THREAD.base else a
            return of_thread(Value(offset.base, a.offset + b.offset)) or Value(Named(site, "sum"), 0)
        if isinstance(a.base, _LOADED) and isinstance(b.base, _LOADED):
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
        return isinstance(base, _POINTING)

    def read(self, instruction: Instruction, operand: Operand, state: State) -> Value:
        if isinstance(operand, Const):
            return Value(None, operand.value)
        if isinstance(operand, Register):
            return state.register(operand.name)
        return self._load(self.cell(instruction, operand, state), instruction.address, state)

    def _load(self, address: Value, site: int, state: State) -> Value:
        known = state.frame.get(address)
        if known is not None:
            return known
        if isinstance(address.base, Thread):
            return self._load_of_thread(address, state)
        if address.base == self.object and (slot := self.calls.slot(address.offset)) is not None:
            return slot
        if self.is_frame(address.base) and address.base != self.stack:
            return Value(Named(site, "frame"), 0)
        return content(address, Named(site, "deep"))

    def _load_of_thread(self, address: Value, state: State) -> Value:
        """On x86-64 the first word is the thread pointer itself; a flag that is known is its constant."""
        if address == THREAD and self.stack.register == "rsp":
            return THREAD
        for fact in state.facts:
            flag = fact.base
            if isinstance(flag, Flag) and (flag.base, flag.offset) == address:
                return Value(None, flag.constant)
        return Value(Content(*address), 0)

    def is_descriptor(self, pointer: Value, argument: Value) -> bool:
        """AArch64 asks the function of a descriptor for a variable's offset, and all other registers stay."""
        base = pointer.base
        if not isinstance(base, Content) or base != Content(*self.address_of(argument)) or base.base != self.object:
            return False
        return self.calls.is_descriptor(base.offset)

    @staticmethod
    def thread_cell(site: int, argument: Value) -> Value:
        """What `__tls_get_addr` gives: a cell of the thread, told by the words that it was passed."""
        if isinstance(argument.base, Object):
            return Value(Thread(Content(*argument)), 0)
        return Value(Named(site, "segment"), 0)

    def set(self, instruction: Instruction, operation: Set, state: State) -> None:
        value = self.read(instruction, operation.source, state)
        bits = operation.bits
        if bits < 64 and value.base is None:
            sign = 1 << (bits - 1)
            low = value.offset & ((1 << bits) - 1)
            value = Value(None, (low & (sign - 1)) - (low & sign) if operation.signed else low)
        elif bits < 64 and isinstance(value.base, Content) and value.offset == 0:
            value = Value(Word(*value.base), 0)
        state.registers[operation.destination.name] = value  # type: ignore[union-attr]

    def address(self, instruction: Instruction, operation: Address, state: State) -> None:
        cell = self.cell(instruction, operation.source, state)
        state.registers[operation.destination.name] = cell

    def add(self, _: Instruction, operation: Add, state: State) -> None:
        old = state.register(operation.left.name)
        value = Value(old.base, old.offset + operation.value)
        if value.base is None and operation.bits < 64:
            value = Value(None, value.offset & ((1 << operation.bits) - 1))
        state.registers[operation.destination.name] = stepped(value)

    def add_values(self, instruction: Instruction, operation: Sum, state: State) -> None:
        left = self.read(instruction, operation.left, state)
        right = Value(Named(instruction.address, "step"), 0)
        if operation.right is not None:
            right = self.read(instruction, operation.right, state)
        state.registers[operation.destination.name] = self._sum(left, right, instruction.address)

    def forget(self, instruction: Instruction, operation: Forget, state: State) -> None:
        name = operation.destination.name
        value = Value(Named(instruction.address, name), 0)
        if operation.made is not None:
            value = self._bits(instruction, operation.made, state) or value
        if operation.among:
            one, *others = (self.address_of(self.read(instruction, o, state)) for o in operation.among)
            if all(other == one for other in others):
                value = one
            else:
                self.choices.setdefault(value, set()).update((one, *others))
        state.registers[name] = value

    def _bits(self, instruction: Instruction, made: Bits, state: State) -> Value | None:
        """What a mask leaves of a word, or of what was found in it; the flags, where they tell of it."""
        value, mask = (self.read(instruction, o, state) for o in (made.left, made.right))
        if made.kind is BitsOf.SOME:
            return Value(Part(value), 0) if isinstance(value.base, _WORDS) else None
        if not isinstance(value.base, _WORDS):
            value, mask = mask, value
        if not isinstance(value.base, _WORDS) or (value.base == mask.base):
            return None
        if mask.base is None:
            mask = Value(None, mask.offset & ((1 << (made.bits or 32)) - 1))
        if made.flags:
            state.flags = Flags("test", value, mask, made.bits)
        if not made.bits or isinstance(value.base, Joined):
            return None
        if made.kind is BitsOf.OR:
            return Value(Joined(value, mask), 0)
        return None if isinstance(value.base, Masked) else Value(Masked(value, mask, made.kind is BitsOf.AND_NOT), 0)

    def insert(self, instruction: Instruction, operation: Insert, state: State) -> None:
        old = state.register(operation.destination.name)
        value = Value(Named(instruction.address, operation.destination.name), 0)
        if old.base is None:
            value = Value(None, old.offset & ~(0xFFFF << operation.shift) | operation.value << operation.shift)
        state.registers[operation.destination.name] = value

    def set_if(self, instruction: Instruction, operation: SetIf, state: State) -> None:
        flags = state.flags
        value = Value(Named(instruction.address, operation.destination.name), 0)
        if flags is not None and operation.condition in EQUALITY:
            if flags.kind == "test" and flags.left == flags.right:
                flags = flags._replace(kind="cmp", right=ZERO)
            outcome = (flags.site, True) if flags.kind == "won" else None
            if flags.kind == "cmp" and flags.left.base is None and flags.right.base is None:
                is_equal = (flags.left.offset ^ flags.right.offset) & ((1 << flags.bits) - 1) == 0
                value = Value(None, int(is_equal is (operation.condition is EQ)))
            elif flags.kind == "cmp":
                outcome = self.attempts.tested(flags.left, flags.right, equal=True)
            if outcome is not None and outcome[1]:
                value = Value(Won(outcome[0], operation.condition is NE), 0)
        elif flags is not None and flags.kind == "bit" and operation.condition is Condition.BELOW:
            value = Value(Won(flags.site, True), 0)
        state.registers[operation.destination.name] = value

    def compare(self, instruction: Instruction, operation: Compare | Test, state: State) -> None:
        left = self.read(instruction, operation.left, state)
        right = self.read(instruction, operation.right, state)
        state.flags = Flags("cmp" if isinstance(operation, Compare) else "test", left, right, operation.bits)

    def compare_if(self, instruction: Instruction, operation: CompareIf, state: State) -> None:
        left = self.read(instruction, operation.left, state)
        right = self.read(instruction, operation.right, state)
        before, condition, zero = state.flags, operation.condition, operation.zero
        state.flags = Flags("both", left, right, operation.bits, 0, before, condition, zero)

    def forget_flags(self, _: Instruction, __: Operation, state: State) -> None:
        state.flags = None

    def reserve(self, instruction: Instruction, operation: Reserve, state: State) -> None:
        state.reserved = instruction.address
        state.known.pop(instruction.address, None)
        state.registers[operation.destination.name] = Value(Old(instruction.address), 0)


STEPS: Final[Mapping[type, Callable[[Data, Instruction, Any, State], None]]] = {
    Set: Data.set,
    Address: Data.address,
    Add: Data.add,
    Sum: Data.add_values,
    Forget: Data.forget,
    Insert: Data.insert,
    SetIf: Data.set_if,
    Compare: Data.compare,
    Test: Data.compare,
    CompareIf: Data.compare_if,
    ForgetFlags: Data.forget_flags,
    Reserve: Data.reserve,
}
"""Of the class, not of each instance: one that holds its own methods is freed by the collector only."""
