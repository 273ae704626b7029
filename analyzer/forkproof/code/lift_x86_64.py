"""x86-64 assembly text (capstone's Intel syntax) to operations.

Owns: which mnemonics matter and how their operands read.
Takes: mnemonic and operand text; the text is address free but for branch targets, so the result is
      memoised. Gives: a tuple of operations, in order.
Must never: guess: an unknown instruction forgets its first operand and the flags.

Source: Intel SDM volume 2; capstone 5's printer.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from forkproof.code.operations import (
    Add,
    Address,
    Atomic,
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
    Stop,
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
        table |= {f"{letter}l": (full, 8), f"{letter}h": (full, 8)}
    for name in ("si", "di", "bp", "sp"):
        full = f"r{name}"
        table |= {full: (full, 64), f"e{name}": (full, 32), name: (full, 16), f"{name}l": (full, 8)}
    for number in range(8, 16):
        full = f"r{number}"
        table |= {full: (full, 64), f"{full}d": (full, 32), f"{full}w": (full, 16), f"{full}b": (full, 8)}
    return table


_REGISTERS: Final = _register_table()
_MEMORY: Final = re.compile(r"^(?:(\w+) ptr )?(?:(\w+):)?\[(.*)\]$")
_BITS: Final = {"byte": 8, "word": 16, "dword": 32, "qword": 64}
_CONDITIONS: Final = {
    "e": Condition.EQ, "ne": Condition.NE, "l": Condition.LT, "ge": Condition.GE, "g": Condition.GT,
    "le": Condition.LE, "b": Condition.BELOW, "ae": Condition.ABOVE_EQ, "a": Condition.ABOVE,
    "be": Condition.BELOW_EQ, "s": Condition.NEGATIVE, "ns": Condition.NOT_NEGATIVE,
}  # fmt: skip
_NO_EFFECT: Final = frozenset({"nop", "endbr64", "prefetcht0", "prefetchnta", "mfence", "lfence", "sfence", "cld"})
_FLAGS_ONLY: Final = frozenset({"bt", "comisd", "ucomisd", "comiss", "ucomiss", "clc", "stc"})
_KEEPS_FLAGS: Final = frozenset({"cmov", "set", "mov", "lea", "push", "pop", "not", "bswap", "xchg"})


def _number(text: str) -> int | None:
    # Asking first is what makes this cheap: an exception costs ten times the conversion.
    if not text or not (text[0].isdigit() or text[0] == "-"):
        return None
    try:
        return int(text, 0)
    except ValueError:
        return None


def _operand(text: str) -> tuple[Operand | None, int]:
    """(operand, width in bits); None for vector registers and the like."""
    if (found := _REGISTERS.get(text)) is not None:
        return Register(found[0]), found[1]
    if (value := _number(text)) is not None:
        return Const(value), 0
    if (match := _MEMORY.match(text)) is not None:
        width, segment, inside = match.groups()
        return _memory(inside, segment is not None), _BITS.get(width or "", 64)
    return None, 0


def _memory(inside: str, segmented: bool) -> Memory:
    base: str | None = None
    displacement = 0
    indexed = segmented
    for sign, term in re.findall(r"([+-]?)\s*([^\s+-]+)", inside):
        if (value := _number(term)) is not None:
            displacement += -value if sign == "-" else value
        elif term == "rip":
            base = "pc"
        elif base is None and term in _REGISTERS:
            base = _REGISTERS[term][0]
        else:
            indexed = True
    return Memory(base, displacement, indexed)


@lru_cache(maxsize=1 << 16)
def lift(mnemonic: str, text: str) -> tuple[Operation, ...]:
    """Operations of one instruction."""
    words = mnemonic.split()
    locked = words[0] == "lock"
    name = words[-1]
    if name in _NO_EFFECT or words[0] in ("rep", "repne", "repe"):
        return () if name in _NO_EFFECT else (Forget(Register("rcx")), Forget(Register("rdi")), Forget(Register("rsi")))
    operands = [_operand(part.strip()) for part in text.split(",")] if text else []
    if name == "pause":
        return (Pause(),)
    control = _control(name, operands)
    if control is not None:
        return control
    return _data(name, operands, locked)


_Operands = list[tuple[Operand | None, int]]


def _control(name: str, operands: _Operands) -> tuple[Operation, ...] | None:
    if name == "call":
        target = operands[0][0]
        return (Call(target.value, None) if isinstance(target, Const) else Call(None, target),)
    if name == "jmp":
        target = operands[0][0]
        return (Jump(target.value) if isinstance(target, Const) else JumpUnknown(target),)
    if name[0] == "j":
        target = operands[0][0]
        condition = _CONDITIONS.get(name[1:], Condition.UNKNOWN)
        return (Branch(condition, target.value),) if isinstance(target, Const) else ()
    if name in ("ret", "retf", "iretq"):
        return (Return(),)
    if name in ("ud2", "hlt", "int3", "ud1", "ud0"):
        return (Stop(),)
    if name == "syscall":
        return (Syscall(),)
    return None


def _data(name: str, operands: _Operands, locked: bool) -> tuple[Operation, ...]:
    if not operands:
        return _implicit(name)
    first, bits = operands[0]
    second = operands[1][0] if len(operands) > 1 else None
    if isinstance(first, Memory) and (locked or name == "xchg"):
        return _atomic(name, first, second)
    if name == "xchg" and isinstance(second, Memory):
        return (Atomic(second, first, None), *_forgotten(first))
    if name in ("mov", "movabs", "movzx", "movsxd", "movsx"):
        return _move(first, second, min(bits or 64, operands[1][1] or 64))
    if name == "lea" and isinstance(first, Register) and isinstance(second, Memory):
        return (Address(first, second),)
    if name == "cmp":
        return (Compare(first, second, bits or 64),) if first is not None and second is not None else (ForgetFlags(),)
    if name == "test":
        return (Test(first, second, bits or 64),) if first is not None and second is not None else (ForgetFlags(),)
    if name == "push":
        value = (Set(Memory(STACK, 0), first),) if first is not None else ()
        return (Add(Register(STACK), Register(STACK), -8), *value)
    if name == "pop" and isinstance(first, Register):
        return (Set(first, Memory(STACK, 0)), Add(Register(STACK), Register(STACK), 8))
    return _arithmetic(name, first, second, bits)


def _move(first: Operand | None, second: Operand | None, bits: int) -> tuple[Operation, ...]:
    if isinstance(first, Register | Memory):
        if second is not None and not (isinstance(first, Memory) and isinstance(second, Memory)):
            return (Set(first, second, bits),)
        return _forgotten(first)
    return ()


def _arithmetic(name: str, first: Operand | None, second: Operand | None, bits: int) -> tuple[Operation, ...]:
    if name in ("xor", "sub") and isinstance(first, Register) and first == second:
        return (Set(first, Const(0)), Compare(Const(0), Const(0), 64))
    if isinstance(first, Register):
        if name in ("add", "sub") and isinstance(second, Const):
            step = second.value if name == "add" else -second.value
            return (Add(first, first, step), Compare(first, Const(0), bits))
        if name in ("inc", "dec"):
            return (Add(first, first, 1 if name == "inc" else -1), Compare(first, Const(0), bits))
        if name in ("and", "or") and first == second:
            return (Test(first, first, bits),)
        if name == "sub" and second is not None:
            return (Compare(first, second, bits), Forget(first))
    keeps_flags = any(name.startswith(prefix) for prefix in _KEEPS_FLAGS)
    flags: tuple[Operation, ...] = () if keeps_flags else (ForgetFlags(),)
    if name in _FLAGS_ONLY:
        return (ForgetFlags(),)
    if name in ("mul", "div", "idiv") or (name == "imul" and second is None):
        return (Forget(Register("rax")), Forget(Register("rdx")), ForgetFlags())
    return (*_forgotten(first), *flags)


def _forgotten(operand: Operand | None) -> tuple[Operation, ...]:
    if isinstance(operand, Register):
        return (Forget(operand),)
    if isinstance(operand, Memory):
        # An unknown value in a known cell: a register that is never followed stands for it.
        return (Set(operand, Register("?")),)
    return ()


def _atomic(name: str, cell: Memory, source: Operand | None) -> tuple[Operation, ...]:
    if name.startswith("cmpxchg"):
        return (Atomic(cell, source, Register("rax")), Forget(Register("rax")), ForgetFlags())
    stores = source if name == "xchg" else None
    return (Atomic(cell, stores, None), *(_forgotten(source) if name in ("xchg", "xadd") else ()), ForgetFlags())


def _implicit(name: str) -> tuple[Operation, ...]:
    if name == "leave":
        return (
            Add(Register(STACK), Register("rbp"), 0),
            Set(Register("rbp"), Memory(STACK, 0)),
            Add(Register(STACK), Register(STACK), 8),
        )
    if name in ("cdqe", "cwde", "cbw"):
        return ()
    if name in ("cdq", "cqo", "cpuid", "rdtsc", "rdtscp"):
        return tuple(Forget(Register(r)) for r in ("rax", "rbx", "rcx", "rdx") if name not in ("cdq", "cqo") or r == "rdx")
    return ()
