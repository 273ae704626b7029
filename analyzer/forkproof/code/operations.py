"""What an instruction does, reduced to what fork analysis asks: values, memory cells and control flow.

Owns: the small operation language that both machines are lifted to.
Takes: nothing. Gives: frozen values. Must never: grow towards a full semantics; whatever is not needed
      to follow constants, parameters and a fork's result is `Forget`.

Registers are canonical 64-bit names ("rax", "x0", "sp"); the hardware zero register is `Const(0)`.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Const(NamedTuple):
    """A literal."""

    value: int


class Register(NamedTuple):
    """The content of a register."""

    name: str


class Memory(NamedTuple):
    """A cell at base + displacement; base "pc" is the end of the instruction; None is absolute."""

    base: str | None
    displacement: int
    indexed: bool = False
    """True when an index register makes the address unknown."""
    by: str | None = None
    """That register, where it is one."""
    thread: bool = False
    """True when the cell belongs to the thread: the base counts from the thread pointer. `indexed` is true then."""


Operand = Const | Register | Memory


class Condition(Enum):
    """Branch conditions on the last comparison of a and b (signed unless named otherwise)."""

    __hash__ = object.__hash__  # an enumeration's own hashes the name, in Python
    EQ = "=="
    NE = "!="
    LT = "<"
    GE = ">="
    GT = ">"
    LE = "<="
    BELOW = "u<"
    ABOVE_EQ = "u>="
    ABOVE = "u>"
    BELOW_EQ = "u<="
    NEGATIVE = "a-b < 0"
    NOT_NEGATIVE = "a-b >= 0"
    UNKNOWN = "?"


class Set(NamedTuple):
    """destination := the low `bits` of source; in a register zero-extended, or sign-extended if `signed`."""

    destination: Register | Memory
    source: Operand
    bits: int = 64
    signed: bool = False


class Address(NamedTuple):
    """destination := address of the memory operand (lea)."""

    destination: Register
    source: Memory
    bits: int = 64


class Add(NamedTuple):
    """destination := left + value, of which `bits` remain."""

    destination: Register
    left: Register
    value: int
    bits: int = 64


class Sum(NamedTuple):
    """destination := left + right; right None is a multiple of something: a step through an array."""

    destination: Register
    left: Operand
    right: Operand | None
    bits: int = 64


class BitsOf(Enum):
    """Which bits of a value an instruction leaves."""

    __hash__ = object.__hash__
    AND = "those of a mask"
    AND_NOT = "those not of a mask"
    OR = "all, and those of a mask"
    SOME = "some, moved"
    """A shift to the right, or the extraction of a field."""


class Bits(NamedTuple):
    """left, and a mask, of which `bits` count; 0: nothing but the flags."""

    kind: BitsOf
    left: Operand
    right: Operand
    bits: int
    flags: bool = False
    """The flags tell whether anything is left."""


class Forget(NamedTuple):
    """The register gets a value that is not followed, or one `among` several, by a condition (cmov, csel)."""

    destination: Register
    among: tuple[Operand, ...] = ()
    made: Bits | None = None
    """What its bits are, for the few who ask."""


class Insert(NamedTuple):
    """The 16 bits of the register from `shift` on become `value` (movk)."""

    destination: Register
    value: int
    shift: int
    bits: int


class SetIf(NamedTuple):
    """destination := 1 if the condition holds for the flags, else 0 (setcc, cset)."""

    destination: Register
    condition: Condition


class Compare(NamedTuple):
    """Flags from left - right."""

    left: Operand
    right: Operand
    bits: int
    carry: bool = True
    """False when the flags are those of an addition: they say nothing of unsigned order."""


class Test(NamedTuple):
    """Flags from left & right."""

    left: Operand
    right: Operand
    bits: int
    carry: bool = True
    """False where the carry of a test does not mean what it means after a comparison with 0 (AArch64)."""


class CompareIf(NamedTuple):
    """Flags from left - right if the condition holds for the flags before, else only zero or not (ccmp)."""

    left: Operand
    right: Operand
    bits: int
    condition: Condition
    zero: bool


class ForgetFlags(NamedTuple):
    """Flags get a value that is not followed."""


class Call(NamedTuple):
    """A call; target None when it is not a literal address."""

    target: int | None
    through: Operand | None


class Jump(NamedTuple):
    """Unconditional jump to a literal address."""

    target: int


class JumpUnknown(NamedTuple):
    """Jump through a register or memory."""

    through: Operand | None


class Bit(NamedTuple):
    """One bit of a register, and whether it is to be set."""

    register: Register
    number: int
    is_set: bool


class Branch(NamedTuple):
    """Jump if the condition holds; `operand`, if given, is compared with zero instead of the flags."""

    condition: Condition
    target: int
    operand: Register | None = None
    bits: int = 64
    """Of the operand."""
    bit: Bit | None = None
    """Where the condition is no more than one bit in the middle of a register: it is UNKNOWN then."""


class Return(NamedTuple):
    """Back to the caller."""


class Stop(NamedTuple):
    """Control does not come here (ud2, hlt, brk)."""


class Syscall(NamedTuple):
    """Enter the kernel."""


class AtomicKind(Enum):
    """What an atomic read-modify-write does to its word."""

    __hash__ = object.__hash__
    COMPARE_SWAP = "compare and swap"
    SWAP = "swap"
    ADD = "add"
    """Fetch and add."""
    SET_BITS = "set bits"
    """Fetch and or; x86-64's bit test and set, which leaves the old bit in the carry."""
    CLEAR_BITS = "clear bits"
    EXCLUSIVE = "store exclusive"
    """The second half of a load-exclusive, store-exclusive pair."""
    OTHER = "other"


class Atomic(NamedTuple):
    """An atomic read-modify-write of `cell`; `stores` is the new value, `expects` a compare-and-swap's old one."""

    cell: Memory
    stores: Operand | None
    expects: Operand | None
    kind: AtomicKind = AtomicKind.OTHER
    result: Register | None = None
    """Gets what the word held before; a store-exclusive's status (0: stored)."""


class Reserve(NamedTuple):
    """The load of an exclusive pair; the value itself is a Set."""

    destination: Register
    cell: Memory


class Pause(NamedTuple):
    """A spin-wait hint (pause, yield, wfe, isb)."""


Operation = (
    Set
    | Address
    | Add
    | Sum
    | Forget
    | Insert
    | SetIf
    | Compare
    | Test
    | CompareIf
    | ForgetFlags
    | Call
    | Jump
    | JumpUnknown
    | Branch
    | Return
    | Stop
    | Syscall
    | Atomic
    | Reserve
    | Pause
)
