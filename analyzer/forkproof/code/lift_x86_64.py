"""x86-64 assembly text (capstone's Intel syntax) to operations.

Owns: which mnemonics matter and how their operands read.
Takes: mnemonic and operand text; the text is address free but for branch targets, so the result is
      memoised. Gives: a tuple of operations, in order.
Must never: guess: an unknown instruction forgets its first operand and the flags.

Source: Intel SDM volume 2; capstone 5's printer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Final

from forkproof.code.operations import (
    Add,
    Address,
    Atomic,
    AtomicKind,
    Bits,
    BitsOf,
    Branch,
    Call,
    Compare,
    Condition,
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
    SetIf,
    Stop,
    Sum,
    Syscall,
    Test,
)

RESULT: Final = "rax"
STACK: Final = "rsp"
ARGUMENTS: Final = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
CALL_DESTROYS: Final = frozenset({"rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11"})
SYSCALL_NUMBER: Final = "rax"


def _register_table() -> dict[str, tuple[str, int]]:
    table: dict[str, tuple[str, int]] = {}
    for letter in "abcd":
        full = f"r{letter}x"
        table |= {full: (full, 64), f"e{letter}x": (full, 32), f"{letter}x": (full, 16)}
        table |= {f"{letter}l": (full, 8)}
    for name in ("si", "di", "bp", "sp"):
        full = f"r{name}"
        table |= {full: (full, 64), f"e{name}": (full, 32), name: (full, 16), f"{name}l": (full, 8)}
    for number in range(8, 16):
        full = f"r{number}"
        table |= {full: (full, 64), f"{full}d": (full, 32), f"{full}w": (full, 16), f"{full}b": (full, 8)}
    return table


_REGISTERS: Final = _register_table()
_MEMORY: Final = re.compile(r"^(?:(\w+) ptr )?(?:(\w+):)?\[(.*)\]$")
_BITS: Final = {"byte": 8, "word": 16, "dword": 32, "qword": 64, "xmmword": 128, "ymmword": 256, "zmmword": 512}
_HIGH_BYTE: Final = {"ah": "rax", "bh": "rbx", "ch": "rcx", "dh": "rdx"}
_STRING: Final = re.compile(r"(stos|lods|movs|scas|cmps)[bwdq]$")
_BASES: Final = {"rip": "pc"} | {name: full for name, (full, bits) in _REGISTERS.items() if bits >= 32}
_CONDITIONS: Final = {
    "e": Condition.EQ, "ne": Condition.NE, "l": Condition.LT, "ge": Condition.GE, "g": Condition.GT,
    "le": Condition.LE, "b": Condition.BELOW, "ae": Condition.ABOVE_EQ, "a": Condition.ABOVE,
    "be": Condition.BELOW_EQ, "s": Condition.NEGATIVE, "ns": Condition.NOT_NEGATIVE,
}  # fmt: skip
BRANCHES: Final[Mapping[bytes, Callable[[int], Operation]]] = {
    b"call": lambda target: Call(target, None),
    b"jmp": Jump,
    **{b"j" + name.encode(): partial(Branch, condition) for name, condition in _CONDITIONS.items()},
}
"""Branches to a place that the text names: each differs from all others, so they are lifted without remembering."""
TARGET: Final = b"0x"
"""How the text of such a place begins."""
_NO_EFFECT: Final = frozenset({"nop", "endbr64", "prefetcht0", "prefetchnta", "mfence", "lfence", "sfence", "cld"})
_COMMON: Final = frozenset(
    {"mov", "lea", "cmp", "test", "movzx", "movsxd", "add", "sub", "and", "or", "xor", "push", "pop"}
)
"""What most instructions are: no more than `_data` needs to look at them."""
_ATOMICS: Final = {"bts": AtomicKind.SET_BITS, "btr": AtomicKind.CLEAR_BITS, "and": AtomicKind.CLEAR_BITS}
_MASKED: Final = {"and": BitsOf.AND, "or": BitsOf.OR, "shr": BitsOf.SOME, "sar": BitsOf.SOME}
_FLAGS_ONLY: Final = frozenset({"bt", "comisd", "ucomisd", "comiss", "ucomiss"})
_KEEPS_FLAGS: Final = re.compile(r"cmov|set|mov|(lea|not|bswap|xchg|mulx|rorx|sarx|shlx|shrx|pdep|pext)$")


def _number(text: str) -> int | None:
    # Asking first is what makes this cheap: an exception costs ten times the conversion.
    if not text or not (text[0].isdigit() or text[0] == "-"):
        return None
    try:
        return int(text, 0)
    except ValueError:
        return None


@lru_cache(maxsize=1 << 14)
def _operand(text: str) -> tuple[Operand | None, int]:
    """(operand, width in bits); None for vector registers and the like."""
    if (found := _REGISTERS.get(text)) is not None:
        return Register(found[0]), found[1]
    if (value := _number(text)) is not None:
        return Const(value), 0
    if (match := _MEMORY.match(text)) is not None:
        width, segment, inside = match.groups()
        return _memory(inside, segment or ""), _BITS.get(width or "", 64)
    return None, 0


def operand(text: str) -> Operand | None:
    """One operand, for who lifts what this module does not; None for vector registers."""
    return _operand(text)[0]


def _memory(inside: str, segment: str) -> Memory:
    first, _, rest = inside.partition(" + ")
    if not segment and rest[:2] == "0x" and first in _BASES:  # most are no more
        return Memory(_BASES[first], int(rest, 16))
    base: str | None = None
    index: str | None = None
    displacement = 0
    indexed = segment != ""
    for sign, term in re.findall(r"([+-]?)\s*([^\s+-]+)", inside):
        if (value := _number(term)) is not None:
            displacement += -value if sign == "-" else value
        elif term == "rip":
            base = "pc"
        elif base is None and term in _REGISTERS:
            base = _REGISTERS[term][0]
        else:
            indexed = True
            factor = _REGISTERS.get(term.partition("*")[0])
            index = None if factor is None else factor[0]
    if segment:  # with an index as well, nobody follows the address
        return Memory(base, displacement, indexed, None, segment == "fs" and index is None)
    return Memory(base, displacement, indexed, index)


def lift(mnemonic: str, text: str) -> tuple[Operation, ...]:
    """Operations of one instruction."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if mnemonic in _COMMON and _HIGH_BYTE.keys().isdisjoint(parts):
        return _data(mnemonic, [_operand(part) for part in parts], locked=False)
    words = mnemonic.split()
    name = words[-1]
    if name in _NO_EFFECT:
        return ()
    if (string := _STRING.match(name)) and "xmm" not in text:
        return _string(string[1], words[0])
    operands = [_operand(part) for part in parts]
    if name == "pause":
        return (Pause(),)
    control = _control(name, operands)
    if control is not None:
        return control
    if not _HIGH_BYTE.keys().isdisjoint(parts):
        return _high_byte(name, text)
    return _data(name, operands, "lock" in words)


_CHANGED: Final = {
    "stos": ("rdi",),
    "lods": ("rsi", "rax"),
    "movs": ("rdi", "rsi"),
    "scas": ("rdi",),
    "cmps": ("rdi", "rsi"),
}
"""The registers that string operations change: pointers move, lods loads."""


def _string(name: str, prefix: str) -> tuple[Operation, ...]:
    """rep counts down, scas and cmps compare; what is stored where is not followed."""
    changed = _CHANGED[name] + (("rcx",) if prefix.startswith("rep") else ())
    forgotten = tuple(Forget(Register(register)) for register in changed)
    return (*forgotten, ForgetFlags()) if name in ("scas", "cmps") else forgotten


def _high_byte(name: str, text: str) -> tuple[Operation, ...]:
    """ah to dh are bits 8 to 15, which nobody follows: forget what the instruction changes."""
    first, *others = (part.strip() for part in text.split(","))
    changed = () if name in ("cmp", "test") else (first, *(others if name in ("xchg", "xadd", "cmpxchg") else ()))
    forgotten: list[Operation] = []
    for part in changed:
        place = Register(_HIGH_BYTE[part]) if part in _HIGH_BYTE else _operand(part)[0]
        forgotten += _forgotten(place, 64)
    if name in ("cmpxchg", "mul", "div", "imul", "idiv"):
        forgotten.append(Forget(Register("rax")))
    return (*forgotten, ForgetFlags())


_Operands = list[tuple[Operand | None, int]]


def _control(name: str, operands: _Operands) -> tuple[Operation, ...] | None:
    if name == "call":
        target = operands[0][0]
        return (Call(target.value, None) if isinstance(target, Const) else Call(None, target),)
    if name == "jmp":
        target = operands[0][0]
        return (Jump(target.value) if isinstance(target, Const) else JumpUnknown(target),)
    if name[0] == "j" or name in ("loop", "loope", "loopne", "xbegin"):
        target = operands[0][0]
        condition = _CONDITIONS.get(name[1:], Condition.UNKNOWN) if name[0] == "j" else Condition.UNKNOWN
        counts: tuple[Operation, ...] = (Forget(Register("rcx")),) if name.startswith("loop") else ()
        return (*counts, Branch(condition, target.value)) if isinstance(target, Const) else ()
    if name in ("ret", "retf", "iretq"):
        return (Return(),)
    if name in ("ud2", "hlt", "int3", "ud1", "ud0"):
        return (Stop(),)
    if name == "syscall":
        return (Forget(Register("rcx")), Forget(Register("r11")), Syscall())
    return None


def _data(name: str, operands: _Operands, locked: bool) -> tuple[Operation, ...]:
    if not operands:
        return _implicit(name)
    first, bits = operands[0]
    second = operands[1][0] if len(operands) > 1 else None
    if isinstance(first, Memory) and (locked or name == "xchg"):
        return _atomic(name, first, second)
    if name == "xchg" and isinstance(second, Memory):
        return (
            Atomic(second, first, None, AtomicKind.SWAP, first if isinstance(first, Register) else None),
            *_forgotten(first, 64),
        )
    if name in ("mov", "movabs", "movzx", "movsxd", "movsx"):
        source_bits = operands[1][1] if len(operands) > 1 else 0
        return _move(first, second, bits or 64, min(bits or 64, source_bits or 64), signed=name.startswith("movsx"))
    if name == "lea" and isinstance(first, Register) and isinstance(second, Memory):
        return (Address(first, second, bits),) if bits >= 32 else (Forget(first),)
    if name == "cmp":
        return (Compare(first, second, bits or 64),) if first is not None and second is not None else (ForgetFlags(),)
    if name == "test":
        return (Test(first, second, bits or 64),) if first is not None and second is not None else (ForgetFlags(),)
    if name in ("push", "pop"):
        return _stack(name, first)
    return _arithmetic(name, first, second, bits)


def _stack(name: str, operand: Operand | None) -> tuple[Operation, ...]:
    top, down, up = Memory(STACK, 0), *(Add(Register(STACK), Register(STACK), n) for n in (-8, 8))
    if name == "push":
        # A cell that is pushed may be addressed by the stack pointer, which has moved by then.
        return (down, Set(top, operand if isinstance(operand, Register | Const) else Register("?")))
    if isinstance(operand, Register):
        return (Set(operand, top), up) if operand.name != STACK else (Forget(operand),)
    return (up, *_forgotten(operand, 64))


def _move(
    first: Operand | None, second: Operand | None, bits: int, source_bits: int, *, signed: bool
) -> tuple[Operation, ...]:
    """A move of `source_bits`, extended to `bits`; below 32 bits the rest of a register stays, so that is forgotten."""
    if (
        second is None
        or (isinstance(first, Register) and bits < 32)
        or (isinstance(first, Memory) and isinstance(second, Memory))
    ):
        return _forgotten(first, bits)
    if isinstance(first, Memory):
        return (Set(first, second, bits),)
    if not isinstance(first, Register):
        return ()
    extended: tuple[Operation, ...] = (Set(first, second, source_bits, signed),)
    return (*extended, Set(first, first, 32)) if signed and bits == 32 else extended


def _arithmetic(name: str, first: Operand | None, second: Operand | None, bits: int) -> tuple[Operation, ...]:
    if name.startswith("set") and isinstance(first, Memory):
        return (Set(first, Register("?"), 8),)
    if isinstance(first, Register):
        if name.startswith("set"):
            return (SetIf(first, _CONDITIONS.get(name[3:], Condition.UNKNOWN)),)
        if name.startswith("cmov") and bits == 64 and second is not None:
            return (Forget(first, (first, second)),)
        if name in ("xor", "sub") and first == second:
            cleared = Set(first, Const(0)) if bits >= 32 else Forget(first)
            return (cleared, Compare(Const(0), Const(0), 64))
        if name in ("add", "sub", "inc", "dec"):
            return _sum(name, first, second, bits)
        if name in ("and", "or") and first == second:
            return (Test(first, first, bits),)
        if name == "or" and isinstance(second, Const) and bits >= 32 and ~second.value & 0xFFFFFFFF == 0:
            return (Set(first, Const(-1 if bits == 64 else 0xFFFFFFFF)), ForgetFlags())  # shorter than a move of -1
        if name in _MASKED and second is not None:
            whole = bits if bits >= 32 or name == "and" else 0
            return (ForgetFlags(), Forget(first, (), Bits(_MASKED[name], first, second, whole, name == "and")))
    if name in _FLAGS_ONLY:
        return (ForgetFlags(),)
    if name in ("mul", "div", "idiv") or (name == "imul" and second is None):
        return (Forget(Register("rax")), Forget(Register("rdx")), ForgetFlags())
    flags: tuple[Operation, ...] = () if _KEEPS_FLAGS.match(name) else (ForgetFlags(),)
    if name in ("xchg", "xadd", "cmpxchg", "mulx"):
        accumulator: tuple[Operation, ...] = (Forget(Register("rax")),) if name == "cmpxchg" else ()
        return (*_forgotten(first, bits), *_forgotten(second, bits), *accumulator, *flags)
    return (*_forgotten(first, bits), *flags)


def _sum(name: str, first: Register, second: Operand | None, bits: int) -> tuple[Operation, ...]:
    """Flags compare the old value: r - c with 0 is r with c, and r + c with 0 is r with -c but for the carry."""
    step = Const(1) if name in ("inc", "dec") else second
    if not isinstance(step, Const):
        compared: Operation = Compare(first, step, bits) if name == "sub" and step is not None else ForgetFlags()
        moved: Operation = Sum(first, first, step, bits) if name == "add" and step is not None else Forget(first)
        return (compared, moved)
    change = step.value if name in ("add", "inc") else -step.value
    result = Add(first, first, change, bits) if bits >= 32 else Forget(first)
    if abs(change) == 1 << (bits - 1):  # is its own negative: the overflow flag differs
        return (ForgetFlags(), result)
    return (Compare(first, Const(-change), bits, carry=name == "sub"), result)


def _forgotten(operand: Operand | None, bits: int) -> tuple[Operation, ...]:
    if isinstance(operand, Register):
        return (Forget(operand),)
    if isinstance(operand, Memory):
        # An unknown value in a known cell: a register that is never followed stands for it.
        return (Set(operand, Register("?"), bits or 64),)
    return ()


def _atomic(name: str, cell: Memory, source: Operand | None) -> tuple[Operation, ...]:
    if name.startswith("cmpxchg"):
        pair: tuple[Operation, ...] = (Forget(Register("rdx")),) if name != "cmpxchg" else ()
        rax = Register("rax")
        swap = Atomic(cell, source, rax, AtomicKind.COMPARE_SWAP, rax)
        return (swap, Forget(rax), *pair, ForgetFlags())
    result = source if isinstance(source, Register) else None
    if name == "xchg":
        return (Atomic(cell, source, None, AtomicKind.SWAP, result), *_forgotten(source, 64))
    if name == "xadd":
        return (Atomic(cell, None, None, AtomicKind.ADD, result), *_forgotten(source, 64), ForgetFlags())
    return (Atomic(cell, None, None, _ATOMICS.get(name, AtomicKind.OTHER)), ForgetFlags())


_CHANGES: Final = {
    "cdq": ("rdx",), "cqo": ("rdx",), "cwd": ("rdx",), "cpuid": ("rax", "rbx", "rcx", "rdx"), "rdtsc": ("rax", "rdx"),
    "rdtscp": ("rax", "rcx", "rdx"), "xgetbv": ("rax", "rdx"), "rdpmc": ("rax", "rdx"), "lahf": ("rax",),
}  # fmt: skip


def _implicit(name: str) -> tuple[Operation, ...]:
    stack, accumulator = Register(STACK), Register(RESULT)
    match name:
        case "leave":
            return (Add(stack, Register("rbp"), 0), Set(Register("rbp"), Memory(STACK, 0)), Add(stack, stack, 8))
        case "cdqe":
            return (Set(accumulator, accumulator, 32, signed=True),)
        case "cwde":
            return (Set(accumulator, accumulator, 16, signed=True), Set(accumulator, accumulator, 32))
        case "cbw":
            return (Forget(accumulator),)
        case "pushfq":
            return _stack("push", None)
        case "popfq":
            return (*_stack("pop", None), ForgetFlags())
        case "clc" | "stc" | "cmc" | "sahf":
            return (ForgetFlags(),)
        case _:
            return tuple(Forget(Register(changed)) for changed in _CHANGES.get(name, ()))
