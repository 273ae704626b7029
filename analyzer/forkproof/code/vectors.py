"""Moves through vector registers, as pairs of words: how compilers copy closures and fill two fields at once.

Owns: the moves of 64 and 128 bits into, out of and between vector registers, of both machines. A register's halves are
      registers of their own here ("v0", "v0+8").
Takes: mnemonic and operand text. Gives: operations, or None for what is no such instruction.
Must never: be asked where nothing depends on pointers that are copied so: it slows down whoever follows the operations.
Wrong where: halves are shuffled in other ways (they are then forgotten).
"""

from __future__ import annotations

import re
from typing import Final

from forkproof.code import lift_aarch64, lift_x86_64
from forkproof.code.operations import Const, Forget, Memory, Operand, Operation, Register, Set
from forkproof.elf.image import Machine

NAMES: Final = frozenset(f"v{number}{half}" for number in range(32) for half in ("", "+8"))
"""The registers that are made up here. A call keeps none."""
_X86: Final = re.compile(r"[xyz]mm(\d+)$")
_ARM: Final = re.compile(r"([qdv])(\d+)(?:\.(?:16b|2d)(?:\[(\d)\])?|\.d\[(\d)\])?$")
_WHOLE: Final = frozenset(
    ["movups", "movaps", "movapd", "movupd", "movdqu", "movdqa", "vmovups", "vmovaps", "vmovdqu", "vmovdqa", "lddqu"]
)
_LOW: Final = frozenset(["movq", "movd", "vmovq", "movsd", "movlps", "movlpd"])


def lift(machine: Machine, mnemonic: str, text: str) -> tuple[Operation, ...] | None:
    """Operations of an instruction that moves vector registers; None for all others."""
    if machine is Machine.X86_64:
        return _x86(mnemonic.rsplit(maxsplit=1)[-1], text) if "mm" in text else None
    return _arm(mnemonic, text) if _ARM_USE.search(text) else None


_ARM_USE: Final = re.compile(r"\b[qdvshb]\d")


def _half(number: str, high: bool) -> Register:
    return Register(f"v{number}+8" if high else f"v{number}")


def _halves(number: str) -> tuple[Register, Register]:
    return _half(number, False), _half(number, True)


def _next(cell: Memory) -> Memory:
    return cell._replace(displacement=cell.displacement + 8)


def _x86(name: str, text: str) -> tuple[Operation, ...] | None:
    parts = [part.strip() for part in text.split(",")]
    numbers = [match.group(1) if (match := _X86.match(part)) else None for part in parts]
    others = [
        lift_x86_64.operand(part) if number is None else None for part, number in zip(parts, numbers, strict=True)
    ]
    first = numbers[0]
    if "ymm" in text or "zmm" in text or len(parts) != 2:
        return _forgotten(first)
    second, place, source = numbers[1], others[0], others[1]
    if name in _WHOLE:
        return _whole(first, place, second, source)
    if name in _LOW:
        if first is None:
            return (Set(place, _half(second, False)),) if second and isinstance(place, Register | Memory) else None
        low: Operand | None = _half(second, False) if second else source
        return (_put(_half(first, False), low), Set(_half(first, True), Const(0)))
    if name in ("movhps", "movhpd"):
        if first is not None:
            return (_put(_half(first, True), source),)
        return (Set(place, _half(second, True)),) if second and isinstance(place, Memory) else None
    if name in ("punpcklqdq", "unpcklpd", "movlhps") and first and second:
        return (Set(_half(first, True), _half(second, False)),)
    return _forgotten(first)


def _put(place: Register, source: Operand | None) -> Operation:
    return Forget(place) if source is None else Set(place, source)


def _forgotten(number: str | None) -> tuple[Operation, ...] | None:
    """What else an instruction may do to a vector register; memory is the ordinary lifter's."""
    return None if number is None else tuple(map(Forget, _halves(number)))


def _whole(
    first: str | None, place: Operand | None, second: str | None, source: Operand | None
) -> tuple[Operation, ...] | None:
    if first is not None and second is not None:
        return tuple(Set(a, b) for a, b in zip(_halves(first), _halves(second), strict=True))
    if first is not None:
        return _loaded(first, source)
    return _stored(second, place)


def _loaded(number: str, cell: Operand | None) -> tuple[Operation, ...] | None:
    low, high = _halves(number)
    return (Set(low, cell), Set(high, _next(cell))) if isinstance(cell, Memory) else (Forget(low), Forget(high))


def _stored(number: str | None, cell: Operand | None) -> tuple[Operation, ...] | None:
    if number is None or not isinstance(cell, Memory):
        return None
    low, high = _halves(number)
    return (Set(cell, low), Set(_next(cell), high))


def _arm(name: str, text: str) -> tuple[Operation, ...] | None:
    parts = [part.strip() for part in lift_aarch64.SPLIT.split(text)]
    found = [_ARM.match(part) for part in parts]
    first = found[0]
    if name in ("ldr", "ldur", "ldp", "str", "stur", "stp"):
        return _arm_transfer(name, parts, found)
    if first is None:
        source = found[1] if len(found) > 1 else None
        place = lift_aarch64.operand(parts[0])
        moved = name in ("fmov", "umov", "mov") and source is not None and isinstance(place, Register)
        return (Set(place, _lane(source)),) if moved and source and isinstance(place, Register) else None
    if len(parts) == 2 and name in ("fmov", "mov", "ins", "dup"):
        return _arm_move(name, first, parts, found[1])
    return tuple(map(Forget, _halves(first.group(2))))


def _lane(match: re.Match[str]) -> Register:
    return _half(match.group(2), "1" in (match.group(3), match.group(4)))


def _arm_move(name: str, first: re.Match[str], parts: list[str], source: re.Match[str] | None) -> tuple[Operation, ...]:
    low, high = _halves(first.group(2))
    value: Operand | None = _lane(source) if source is not None else lift_aarch64.operand(parts[1])
    if value is not None and isinstance(value, Memory):
        value = None
    if "[" in parts[0]:
        return (_put(_lane(first), value),)
    if name == "dup":
        return (_put(low, value), _put(high, value))
    if source is not None and parts[0].endswith("16b"):
        return tuple(Set(a, b) for a, b in zip((low, high), _halves(source.group(2)), strict=True))
    return (_put(low, value), Set(high, Const(0)))


def _arm_transfer(name: str, parts: list[str], found: list[re.Match[str] | None]) -> tuple[Operation, ...] | None:
    """Only plain addresses: the ordinary lifter knows write-back, but forgets what is moved."""
    registers = [match for match in found if match is not None and match.group(1) in "qd"]
    cell = lift_aarch64.operand(parts[-1])
    if not registers or len(registers) != len(parts) - 1 or not isinstance(cell, Memory) or parts[-1].endswith("!"):
        return None
    result: list[Operation] = []
    for match in registers:
        halves = _halves(match.group(2)) if match.group(1) == "q" else _halves(match.group(2))[:1]
        for half in halves:
            result.append(Set(half, cell) if name.startswith("ld") else Set(cell, half))
            cell = _next(cell)
    return tuple(result)
