"""AArch64 assembly text (capstone's syntax) to operations.

Owns: which mnemonics matter and how their operands read.
Takes: mnemonic and operand text (memoised). Gives: a tuple of operations, in order.
Must never: guess: an unknown instruction forgets its first operand; `s`-suffixed ones the flags too.

Source: Arm ARM, C6; capstone 5's printer.
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
    Bit,
    Bits,
    BitsOf,
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
    Stop,
    Sum,
    Syscall,
    Test,
)

RESULT: Final = "x0"
STACK: Final = "sp"
ARGUMENTS: Final = tuple(f"x{n}" for n in range(8))
CALL_DESTROYS: Final = frozenset({*(f"x{n}" for n in range(19)), "x30"})
SYSCALL_NUMBER: Final = "x8"

_CONDITIONS: Final = {
    "eq": Condition.EQ, "ne": Condition.NE, "lt": Condition.LT, "ge": Condition.GE, "gt": Condition.GT,
    "le": Condition.LE, "lo": Condition.BELOW, "cc": Condition.BELOW, "hs": Condition.ABOVE_EQ,
    "cs": Condition.ABOVE_EQ, "hi": Condition.ABOVE, "ls": Condition.BELOW_EQ,
    "mi": Condition.NEGATIVE, "pl": Condition.NOT_NEGATIVE,
}  # fmt: skip
BRANCHES: Final[Mapping[bytes, Callable[[int], Operation]]] = {
    b"bl": lambda target: Call(target, None),
    b"b": Jump,
    **{b"b." + name.encode(): partial(Branch, condition) for name, condition in _CONDITIONS.items()},
}
"""Branches to a place that the text names: each differs from all others, so they are lifted without remembering."""
TARGET: Final = b"#0x"
"""How the text of such a place begins."""
SPLIT: Final = re.compile(r",\s*(?![^\[]*\])")
_NO_EFFECT: Final = frozenset({"nop", "bti", "dmb", "dsb", "paciasp", "autiasp", "pacibsp", "autibsp", "prfm", "hint"})


def _register(text: str) -> tuple[Operand | None, int]:
    if text in ("xzr", "wzr"):
        return Const(0), 64 if text[0] == "x" else 32
    if text in ("sp", "wsp"):
        return Register("sp"), 64
    if re.fullmatch(r"[xw]\d+", text):
        return Register("x" + text[1:]), 64 if text[0] == "x" else 32
    return None, 0


@lru_cache(maxsize=1 << 14)
def _operand(text: str) -> tuple[Operand | None, int]:
    if text.startswith("#"):
        try:
            return Const(int(text[1:], 0)), 0
        except ValueError:
            return None, 0
    if text.startswith("["):
        return _memory(text), 64
    return _register(text)


def operand(text: str) -> Operand | None:
    """One operand, for who lifts what this module does not; None for vector registers."""
    return _operand(text)[0]


def _memory(text: str) -> Memory:
    parts = [p.strip() for p in text.strip("[]!").split(",")]
    base, _ = _register(parts[0])
    name = base.name if isinstance(base, Register) else None
    if len(parts) == 1:
        return Memory(name, 0)
    if parts[1].startswith("#") and len(parts) == 2:
        return Memory(name, int(parts[1][1:], 0))
    index, _ = _register(parts[1])
    return Memory(name, 0, indexed=True, by=index.name if isinstance(index, Register) else None)


def lift(mnemonic: str, text: str) -> tuple[Operation, ...]:
    """Operations of one instruction."""
    if mnemonic in _NO_EFFECT:
        return ()
    if mnemonic in ("yield", "wfe", "isb", "sevl"):
        return (Pause(),)
    parts = SPLIT.split(text) if text else []
    control = _control(mnemonic, parts)
    if control is not None:
        return control
    return _data(mnemonic, parts)


def _target(text: str) -> int:
    return int(text.lstrip("#"), 0)


def _control(name: str, parts: list[str]) -> tuple[Operation, ...] | None:
    if name == "bl":
        return (Call(_target(parts[0]), None),)
    if name.startswith("blr"):
        return (Call(None, _operand(parts[0])[0]),)
    if name == "b":
        return (Jump(_target(parts[0])),)
    if name.startswith("b."):
        return (Branch(_CONDITIONS.get(name[2:], Condition.UNKNOWN), _target(parts[0])),)
    if name in ("cbz", "cbnz"):
        return (_zero_branch(Condition.EQ if name == "cbz" else Condition.NE, parts[0], parts[1]),)
    if name in ("tbz", "tbnz"):
        return (_bit_branch(name, parts),)
    if name.startswith("ret") or name == "eret":
        return (Return(),)
    if name == "br" or name.startswith("bra"):
        return (JumpUnknown(_operand(parts[0])[0]),)
    if name in ("brk", "hlt", "udf"):
        return (Stop(),)
    if name == "svc":
        return (Syscall(),)
    return None


def _zero_branch(condition: Condition, register: str, target: str) -> Branch:
    operand, bits = _operand(register)
    if isinstance(operand, Register):
        return Branch(condition, _target(target), operand, bits)
    return Branch(Condition.UNKNOWN, _target(target))


def _bit_branch(name: str, parts: list[str]) -> Branch:
    """TBZ/TBNZ on the sign bit test for negative, on bit 0 a flag; other bits are not followed."""
    operand, bits = _operand(parts[0])
    sign = parts[1].lstrip("#")
    if isinstance(operand, Register) and int(sign, 0) == 0:  # a flag: bit 0 is all that is compared
        return Branch(Condition.EQ if name == "tbz" else Condition.NE, _target(parts[2]), operand, 1)
    if isinstance(operand, Register) and int(sign, 0) == (bits or 64) - 1:
        condition = Condition.GE if name == "tbz" else Condition.LT
        return Branch(condition, _target(parts[2]), operand, bits or 64)
    if isinstance(operand, Register):
        return Branch(Condition.UNKNOWN, _target(parts[2]), bit=Bit(operand, int(sign, 0), name == "tbnz"))
    return Branch(Condition.UNKNOWN, _target(parts[2]))


def _data(name: str, parts: list[str]) -> tuple[Operation, ...]:
    if not parts:
        return ()
    operands = [_operand(p) for p in parts]
    first, bits = operands[0]
    second = operands[1][0] if len(operands) > 1 else None
    if name in ("adrp", "adr") and isinstance(first, Register) and isinstance(second, Const):
        return (Set(first, second),)
    if name in ("mov", "movz", "movn", "sxtw", "uxtw", "sxtb", "sxth", "uxtb", "uxth"):
        return _move(name, parts, first, second, bits)
    if name == "movk" and isinstance(first, Register) and isinstance(second, Const):
        return (Insert(first, second.value, int(parts[2].partition("#")[2], 0) if len(parts) > 2 else 0, bits),)
    if name == "mrs" and isinstance(first, Register) and parts[1] == "tpidr_el0":
        return (Address(first, Memory(None, 0, indexed=True, thread=True)),)
    if name == "cset" and isinstance(first, Register):
        return (SetIf(first, _CONDITIONS.get(parts[1], Condition.UNKNOWN)),)
    if name == "csel" and isinstance(first, Register) and bits == 64 and second is not None:
        return (Forget(first, (second, operands[2][0]) if operands[2][0] is not None else ()),)
    if name == "and" and isinstance(first, Register) and (width := _LOW_BITS.get(operands[2][0])) is not None:
        return (Set(first, second, width),) if second is not None else (Forget(first),)
    if name in ("add", "sub", "adds", "subs"):
        return _sum(name, parts, operands)
    if name in ("madd", "umaddl", "smaddl") and isinstance(first, Register) and isinstance(operands[3][0], Register):
        return (Sum(first, operands[3][0], None, bits),)
    if name in ("cmp", "cmn", "tst"):
        return _compare(name, first, second, bits, parts[2:])
    if (found := _atomic(name, operands)) is not None:
        return found
    if name.startswith(("ld", "st")):
        return _transfer(name, parts, operands)
    if name == "ccmp" and first is not None and second is not None and len(parts) == 4:
        zero = int(parts[2].lstrip("#"), 0) & 4 != 0
        return (CompareIf(first, second, bits, _CONDITIONS.get(parts[3], Condition.UNKNOWN), zero),)
    if name in ("ccmp", "ccmn", "fcmp", "fcmpe", "fccmp", "fccmpe"):
        return (ForgetFlags(),)
    if name in _BITS and isinstance(first, Register) and len(parts) >= 3:
        return _bits(
            name, first, second, operands[2][0] if len(parts) == 3 or _BITS[name] is BitsOf.SOME else None, bits
        )
    forgotten: tuple[Operation, ...] = (Forget(first),) if isinstance(first, Register) else ()
    return (*forgotten, ForgetFlags()) if name.endswith("s") else forgotten


_BITS: Final = {
    "and": BitsOf.AND, "ands": BitsOf.AND, "bic": BitsOf.AND_NOT, "bics": BitsOf.AND_NOT, "orr": BitsOf.OR,
    "lsr": BitsOf.SOME, "asr": BitsOf.SOME, "ubfx": BitsOf.SOME, "sbfx": BitsOf.SOME,
}  # fmt: skip


def _bits(name: str, first: Register, left: Operand | None, right: Operand | None, bits: int) -> tuple[Operation, ...]:
    flags: tuple[Operation, ...] = (ForgetFlags(),) if name.endswith("s") else ()
    made = Bits(_BITS[name], left, right, bits, bool(flags)) if left is not None and right is not None else None
    return (*flags, Forget(first, (), made))


_EXTENDED: Final = {"b": 8, "h": 16, "w": 32}
_LOW_BITS: Final[dict[Operand | None, int]] = {Const(0xFF): 8, Const(0xFFFF): 16, Const(0xFFFFFFFF): 32}
"""Masks that keep the low bits, as AND has them."""


def _move(
    name: str, parts: list[str], first: Operand | None, second: Operand | None, bits: int
) -> tuple[Operation, ...]:
    if not isinstance(first, Register):
        return ()
    if second is None or isinstance(second, Memory) or len(parts) > 2:
        return (Forget(first),)
    if name == "movn" and isinstance(second, Const):
        return (Set(first, Const(~second.value), bits),)
    if name.startswith(("sxt", "uxt")):
        return _extension(first, second, _EXTENDED[name[3]], bits, signed=name[0] == "s")
    return (Set(first, second, bits),)


def _extension(first: Register, second: Operand, narrow: int, bits: int, *, signed: bool) -> tuple[Operation, ...]:
    """The low `narrow` bits, extended to `bits`; above those a register is zero."""
    extended: tuple[Operation, ...] = (Set(first, second, narrow, signed),)
    return (*extended, Set(first, first, bits)) if signed and bits == 32 else extended


def _sum(name: str, parts: list[str], operands: list[tuple[Operand | None, int]]) -> tuple[Operation, ...]:
    destination, bits = operands[0]
    left = operands[1][0]
    right = operands[2][0] if len(operands) > 2 else None
    flags: tuple[Operation, ...] = ()
    if name.endswith("s") and left is not None and right is not None and len(parts) == 3 and name == "subs":
        flags = (Compare(left, right, bits),)
    elif name.endswith("s"):
        flags = (ForgetFlags(),)
    if not isinstance(destination, Register):
        return flags
    if name.startswith("add") and isinstance(left, Register) and not isinstance(right, Const):
        return (*flags, Sum(destination, left, right if len(parts) == 3 else None, bits))
    if isinstance(left, Register) and isinstance(right, Const):
        value = right.value << 12 if len(parts) == 4 and "12" in parts[3] else right.value
        return (*flags, Add(destination, left, value if name.startswith("add") else -value, bits))
    return (*flags, Forget(destination))


def _compare(
    name: str, first: Operand | None, second: Operand | None, bits: int, extra: list[str]
) -> tuple[Operation, ...]:
    if first is None or second is None:
        return (ForgetFlags(),)
    if extra in (["uxtb"], ["uxth"]) and name == "cmp":
        part = Register("extended")  # of the lifter's own
        return (Set(part, second, _EXTENDED[extra[0][3]]), Compare(first, part, bits))
    if extra:
        return (ForgetFlags(),)
    if name == "cmp":
        return (Compare(first, second, bits),)
    if name == "cmn" and isinstance(second, Const):
        return (Compare(first, Const(-second.value), bits, carry=second.value != 0),)
    return (Test(first, second, bits, carry=False),) if name == "tst" else (ForgetFlags(),)


_LSE: Final = re.compile(r"(cas|swp|ldadd|ldset|ldclr|ldeor)(a|l|al)?[bh]?$|(st)(add|set|clr|eor)l?[bh]?$")
_LSE_KINDS: Final = {
    "cas": AtomicKind.COMPARE_SWAP, "swp": AtomicKind.SWAP, "ldadd": AtomicKind.ADD, "ldset": AtomicKind.SET_BITS,
    "ldclr": AtomicKind.CLEAR_BITS, "stclr": AtomicKind.CLEAR_BITS,
}  # fmt: skip
_TOLD: Final = (AtomicKind.SWAP, AtomicKind.SET_BITS)
"""Of these, what is stored, or the mask, is told."""


def _atomic(name: str, operands: list[tuple[Operand | None, int]]) -> tuple[Operation, ...] | None:
    cell = next((o for o, _ in operands if isinstance(o, Memory)), None)
    if cell is None:
        return None
    if (match := _LSE.match(name)) is not None:
        first = operands[0][0]
        second = operands[1][0] if not isinstance(operands[1][0], Memory) else None
        kind = _LSE_KINDS.get(match.group(1) or f"st{match.group(4)}", AtomicKind.OTHER)
        result = first if kind is AtomicKind.COMPARE_SWAP else second
        found = result if isinstance(result, Register) else None
        forgotten = (Forget(found),) if found is not None else ()
        if kind is AtomicKind.COMPARE_SWAP:
            return (Atomic(cell, second, first, kind, found), *forgotten)
        return (Atomic(cell, first if kind in _TOLD else None, None, kind, found), *forgotten)
    if re.match(r"(stxr|stlxr|stxp|stlxp)[bh]?$", name):
        status = operands[0][0] if isinstance(operands[0][0], Register) else None
        store = Atomic(cell, operands[1][0], None, AtomicKind.EXCLUSIVE, status)
        return (store, *((Forget(status),) if status is not None else ()))
    return None


def _transfer(name: str, parts: list[str], operands: list[tuple[Operand | None, int]]) -> tuple[Operation, ...]:
    """Loads and stores, single and pair, with write-back."""
    position = next((i for i, (o, _) in enumerate(operands) if isinstance(o, Memory)), None)
    if position is None:
        return tuple(Forget(o) for o, _ in operands if isinstance(o, Register))
    cell = operands[position][0]
    assert isinstance(cell, Memory)
    step = 0
    after: tuple[Operation, ...] = ()
    before: tuple[Operation, ...] = ()
    if parts[position].endswith("!") and cell.base:
        before = (Add(Register(cell.base), Register(cell.base), cell.displacement),)
        cell = Memory(cell.base, 0)
    elif len(parts) > position + 1 and cell.base and isinstance(operands[position + 1][0], Const):
        step_operand = operands[position + 1][0]
        assert isinstance(step_operand, Const)
        after = (Add(Register(cell.base), Register(cell.base), step_operand.value),)
    moves: list[Operation] = []
    for (operand, bits), part in zip(operands[:position], parts, strict=False):
        width = _WIDTHS.get(part[:1], 64) if operand is None else bits
        place = cell._replace(displacement=cell.displacement + step)
        if not name.startswith("ld"):
            moves.append(Set(place, operand or Register("?"), _moved(name, width)))
        elif isinstance(operand, Register):
            moves += _load(name, operand, place, width)
            moves += [Reserve(operand, place)] if name.startswith(("ldxr", "ldaxr")) else []
        step += _moved(name, width) // 8
    if name.startswith("ld") and position == 2:
        # A pair whose first destination is the base: the second must still read the old base.
        moves.sort(key=lambda op: isinstance(op, Set) and op.destination == Register(cell.base or ""))
    return (*before, *moves, *after)


_WIDTHS: Final = {"q": 128, "d": 64, "s": 32, "h": 16, "b": 8, "v": 128, "{": 512}
"""Of vector registers, by their first letter; a list of them is at most four."""


def _moved(name: str, bits: int) -> int:
    """How much of its register an instruction loads or stores."""
    if name.endswith("sw"):
        return 32
    if name.startswith(("ldp", "stp", "ld1", "st1")):
        return bits
    return {"b": 8, "h": 16}.get(name[-1], bits)


def _load(name: str, register: Register, place: Memory, bits: int) -> list[Operation]:
    signed = re.search(r"s[bhw]$", name) is not None
    found: list[Operation] = [Set(register, place, _moved(name, bits), signed)]
    return [*found, Set(register, register, 32)] if signed and bits == 32 else found
