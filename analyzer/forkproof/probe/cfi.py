"""Call frame information: from one frame's registers to its caller's.

Owns: CIEs, FDEs, the call frame instructions and DWARF expressions that compilers emit for `.eh_frame`.
Takes: an `Image`, an address in it, a frame's registers and a way to read memory. Gives: the caller's registers.
Must never: guess: without an FDE, or at an unknown instruction, the answer is None and `stack` goes on otherwise.
Wrong where: hand-written CFI is wrong; code is between its push and its CFI (compilers describe each instruction).

Source: DWARF 5, sections 6.4 and 2.5; LSB Core 5.0, 10.6; DWARF for the Arm 64-bit Architecture, 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np

from forkproof.elf import unwind
from forkproof.elf.image import I64, Image

Frame = Mapping[int, int]
"""Register values by DWARF number."""
ReadWord = Callable[[int, int], int | None]
"""(address, size) to a little-endian word."""

_WIDTHS: Final = {0x00: 8, 0x02: 2, 0x03: 4, 0x04: 8, 0x0A: 2, 0x0B: 4, 0x0C: 8}
_EXPRESSION_STEPS: Final = 1000
USER_BITS: Final = (1 << 48) - 1
"""Addresses without a pointer authentication code."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How to recover one register: `kind` is same, undefined, offset, value, register, expression or
    value-expression."""

    kind: str
    value: int = 0
    expression: bytes = b""


@dataclass(slots=True)
class Row:
    """One row of the table that call frame instructions build."""

    cfa_register: int = 0
    cfa_offset: int = 0
    cfa_expression: bytes = b""
    rules: dict[int, Rule] = field(default_factory=dict)

    def copy(self) -> Row:
        """An independent one."""
        return Row(self.cfa_register, self.cfa_offset, self.cfa_expression, dict(self.rules))


@dataclass(frozen=True, slots=True)
class Cie:
    """What several FDEs share."""

    code_alignment: int
    data_alignment: int
    return_register: int
    encoding: int
    is_signal: bool
    has_augmentation: bool
    instructions: bytes


@dataclass(frozen=True, slots=True)
class Fde:
    """How to unwind one range of code."""

    cie: Cie
    start: int
    size: int
    instructions: bytes


class Unknown(Exception):
    """Something that this interpreter does not know, or data that contradicts itself."""


class Bytes:
    """A cursor over bytes."""

    def __init__(self, raw: bytes, at: int = 0) -> None:
        self.raw, self.at = raw, at

    def __bool__(self) -> bool:
        return self.at < len(self.raw)

    def unsigned(self, size: int) -> int:
        """A little-endian number."""
        if self.at + size > len(self.raw):
            raise Unknown("cut off")
        self.at += size
        return int.from_bytes(self.raw[self.at - size : self.at], "little")

    def signed(self, size: int) -> int:
        """The same, with a sign."""
        value = self.unsigned(size)
        return value - (1 << 8 * size) if value >> (8 * size - 1) else value

    def uleb(self) -> int:
        """Unsigned LEB128."""
        result = shift = 0
        while True:
            byte = self.unsigned(1)
            result |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return result

    def sleb(self) -> int:
        """Signed LEB128."""
        result = shift = 0
        while True:
            byte = self.unsigned(1)
            result |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return result - (1 << shift) if byte & 0x40 else result

    def block(self) -> bytes:
        """Bytes that their length precedes."""
        size = self.uleb()
        if self.at + size > len(self.raw):
            raise Unknown("cut off")
        self.at += size
        return self.raw[self.at - size : self.at]

    def string(self) -> bytes:
        """Up to a NUL."""
        end = self.raw.find(b"\0", self.at)
        if end < 0:
            raise Unknown("cut off")
        found, self.at = self.raw[self.at : end], end + 1
        return found


# Finding the FDE.


class Table:
    """The FDEs of one object, by address."""

    def __init__(self, image: Image) -> None:
        self._image = image
        table = unwind.search_table(image)
        self._start: I64 = table[0] if table else np.zeros(0, np.int64)
        self._fde: I64 = table[1] if table else np.zeros(0, np.int64)
        self._cies: dict[int, Cie | None] = {}
        self.at = lru_cache(maxsize=4096)(self._at)

    def _at(self, rva: int) -> Fde | None:
        """The FDE that covers an address."""
        index = int(np.searchsorted(self._start, rva, side="right")) - 1
        if index < 0:
            return None
        try:
            found = self._fde_at(int(self._fde[index]))
        except Unknown:
            return None
        return found if found is not None and found.start <= rva < found.start + found.size else None

    def _fde_at(self, at: int) -> Fde | None:
        length = int.from_bytes(self._image.read(at, 4).tobytes(), "little")
        if not 4 < length < 1 << 24:
            return None
        body = Bytes(self._image.read(at + 4, length).tobytes())
        cie = self._cie(at + 4 - body.unsigned(4))
        if cie is None:
            return None
        start = _pointer(body, cie.encoding, at + 4)
        size = _pointer(body, cie.encoding & 0x0F, 0)
        if cie.has_augmentation:
            body.block()
        return Fde(cie, start, size, body.raw[body.at :])

    def _cie(self, at: int) -> Cie | None:
        if at not in self._cies:
            self._cies[at] = self._decode_cie(at)
        return self._cies[at]

    def _decode_cie(self, at: int) -> Cie | None:
        length = int.from_bytes(self._image.read(at, 4).tobytes(), "little")
        if not 4 < length < 1 << 20:
            return None
        body = Bytes(self._image.read(at + 4, length).tobytes())
        if body.unsigned(4) != 0:
            return None
        version = body.unsigned(1)
        augmentation = body.string()
        code, data = body.uleb(), body.sleb()
        register = body.unsigned(1) if version == 1 else body.uleb()
        encoding, is_signal = 0, False
        if augmentation.startswith(b"z"):
            extra = Bytes(body.block())
            for letter in augmentation[1:].decode("latin-1"):
                match letter:
                    case "R":
                        encoding = extra.unsigned(1)
                    case "P":
                        extra.unsigned(_WIDTHS.get(extra.unsigned(1) & 0x0F, 8))
                    case "L":
                        extra.unsigned(1)
                    case "S":
                        is_signal = True
        elif augmentation:
            return None
        return Cie(
            code, data, register, encoding, is_signal, augmentation.startswith(b"z"), body.raw[body.at :]
        )  # fmt: skip


def _pointer(body: Bytes, encoding: int, base: int) -> int:
    """A pointer of `.eh_frame`; `base` is the address of the body's first byte."""
    if encoding & 0x60:
        raise Unknown(f"pointer encoding {encoding:#x}")
    place = base + body.at
    width = _WIDTHS.get(encoding & 0x0F)
    if width is None:
        raise Unknown(f"pointer encoding {encoding:#x}")
    value = body.signed(width) if encoding & 0x08 else body.unsigned(width)
    return value + place if encoding & 0x10 else value


# Running the instructions.


def row_at(fde: Fde, rva: int) -> Row:
    """The row that holds at an address."""
    initial = Row()
    _execute(fde.cie.instructions, fde, None, initial, initial)
    row = initial.copy()
    _execute(fde.instructions, fde, rva, row, initial)
    return row


def _execute(code: bytes, fde: Fde, until: int | None, row: Row, initial: Row) -> None:
    """Change `row` by the instructions that take effect up to the address `until`."""
    body, cie, at = Bytes(code), fde.cie, fde.start
    remembered: list[Row] = []
    while body:
        opcode = body.unsigned(1)
        high, low = opcode & 0xC0, opcode & 0x3F
        if high == 0x40:
            advance = low
        elif high == 0x80:
            row.rules[low] = Rule("offset", body.uleb() * cie.data_alignment)
            continue
        elif high == 0xC0:
            _restore(row, initial, low)
            continue
        elif opcode in (0x02, 0x03, 0x04):
            advance = body.unsigned(1 << (opcode - 2))
        elif opcode == 0x01:
            at = _pointer(body, cie.encoding, 0)
            advance = 0
        elif opcode == 0x0A:
            remembered.append(row.copy())
            continue
        elif opcode == 0x0B:
            _recall(row, remembered)
            continue
        else:
            _instruction(opcode, body, cie, row, initial)
            continue
        at += advance * cie.code_alignment
        if until is not None and at > until:
            return


def _restore(row: Row, initial: Row, register: int) -> None:
    row.rules.pop(register, None)
    if register in initial.rules:
        row.rules[register] = initial.rules[register]


def _recall(row: Row, remembered: list[Row]) -> None:
    if not remembered:
        raise Unknown("DW_CFA_restore_state without a state")
    old = remembered.pop()
    row.cfa_register, row.cfa_offset, row.cfa_expression = old.cfa_register, old.cfa_offset, old.cfa_expression
    row.rules = old.rules


def _instruction(opcode: int, body: Bytes, cie: Cie, row: Row, initial: Row) -> None:
    """The instructions that are a byte of their own."""
    scale = cie.data_alignment
    match opcode:
        case 0x00 | 0x2D:  # nop; negate_ra_state (AArch64): signatures are always taken off
            pass
        case 0x05 | 0x07 | 0x08 | 0x09 | 0x10 | 0x11 | 0x14 | 0x15 | 0x16:
            register = body.uleb()  # first in the bytes, and so to be read first
            row.rules[register] = _rule(opcode, body, scale)
        case 0x06:
            _restore(row, initial, body.uleb())
        case 0x0C:
            row.cfa_register, row.cfa_offset, row.cfa_expression = body.uleb(), body.uleb(), b""
        case 0x0D:
            row.cfa_register = body.uleb()
        case 0x0E:
            row.cfa_offset = body.uleb()
        case 0x0F:
            row.cfa_expression = body.block()
        case 0x12:
            row.cfa_register, row.cfa_offset, row.cfa_expression = body.uleb(), body.sleb() * scale, b""
        case 0x13:
            row.cfa_offset = body.sleb() * scale
        case 0x2E:  # GNU_args_size
            body.uleb()
        case _:
            raise Unknown(f"call frame instruction {opcode:#x}")


def _rule(opcode: int, body: Bytes, scale: int) -> Rule:
    """What an instruction says of the register that it names."""
    match opcode:
        case 0x05:
            return Rule("offset", body.uleb() * scale)
        case 0x11:
            return Rule("offset", body.sleb() * scale)
        case 0x14:
            return Rule("value", body.uleb() * scale)
        case 0x15:
            return Rule("value", body.sleb() * scale)
        case 0x09:
            return Rule("register", body.uleb())
        case 0x10:
            return Rule("expression", expression=body.block())
        case 0x16:
            return Rule("value-expression", expression=body.block())
    return Rule("undefined" if opcode == 0x07 else "same")


def caller(fde: Fde, rva: int, frame: Frame, read: ReadWord, stack: int) -> dict[int, int] | None:
    """The caller's registers; its pc is under the return register's number. None where there is no caller.

    `stack` is the number of the stack pointer, whose value in the caller is the CFA unless a rule says otherwise.
    """
    row = row_at(fde, rva)
    if row.cfa_expression:
        cfa = evaluate(row.cfa_expression, frame, read, None)
    else:
        if row.cfa_register not in frame:
            return None
        cfa = frame[row.cfa_register] + row.cfa_offset
    found = dict(frame)
    found[stack] = cfa & 0xFFFF_FFFF_FFFF_FFFF
    for register, rule in row.rules.items():
        if rule.kind == "same":
            continue
        value = _recovered(rule, cfa, frame, read)
        if value is None:
            found.pop(register, None)
        else:
            found[register] = value
    return found if fde.cie.return_register in found else None


def _recovered(rule: Rule, cfa: int, frame: Frame, read: ReadWord) -> int | None:
    match rule.kind:
        case "offset":
            return read(cfa + rule.value, 8)
        case "value":
            return cfa + rule.value
        case "register":
            return frame.get(rule.value)
        case "expression":
            return read(evaluate(rule.expression, frame, read, cfa), 8)
        case "value-expression":
            return evaluate(rule.expression, frame, read, cfa)
        case "undefined":
            return None
    raise Unknown(rule.kind)


# DWARF expressions.


def evaluate(code: bytes, frame: Frame, read: ReadWord, initial: int | None) -> int:
    """The value of an expression; `initial` is on the stack at its beginning."""
    body = Bytes(code)
    stack = [] if initial is None else [initial]
    for _ in range(_EXPRESSION_STEPS):
        if not body:
            break
        _operation(body.unsigned(1), body, stack, frame, read)
    if not stack:
        raise Unknown("empty expression")
    return stack[-1] & 0xFFFF_FFFF_FFFF_FFFF


_BINARY: Final[dict[int, Callable[[int, int], int]]] = {
    0x1A: lambda a, b: a & b,
    0x1C: lambda a, b: a - b,
    0x1E: lambda a, b: a * b,
    0x21: lambda a, b: a | b,
    0x22: lambda a, b: a + b,
    0x24: lambda a, b: a << b,
    0x25: lambda a, b: (a & 0xFFFF_FFFF_FFFF_FFFF) >> b,
    0x26: lambda a, b: a >> b,
    0x27: lambda a, b: a ^ b,
    0x29: lambda a, b: int(a == b),
    0x2A: lambda a, b: int(a >= b),
    0x2B: lambda a, b: int(a > b),
    0x2C: lambda a, b: int(a <= b),
    0x2D: lambda a, b: int(a < b),
    0x2E: lambda a, b: int(a != b),
}


def _operation(opcode: int, body: Bytes, stack: list[int], frame: Frame, read: ReadWord) -> None:
    if 0x30 <= opcode <= 0x4F:
        stack.append(opcode - 0x30)
    elif 0x70 <= opcode <= 0x8F:
        stack.append(_register(frame, opcode - 0x70) + body.sleb())
    elif opcode == 0x92:
        stack.append(_register(frame, body.uleb()) + body.sleb())
    elif 0x08 <= opcode <= 0x0F:
        size = 1 << ((opcode - 0x08) >> 1)
        stack.append(body.signed(size) if opcode & 1 else body.unsigned(size))
    elif opcode in (0x10, 0x11):
        stack.append(body.sleb() if opcode & 1 else body.uleb())
    elif opcode in (0x28, 0x2F):
        offset = body.signed(2)
        if opcode == 0x2F or stack.pop():
            body.at += offset
    elif opcode in _BINARY and len(stack) >= 2:
        right = stack.pop()
        stack.append(_BINARY[opcode](stack.pop(), right))
    else:
        _unary(opcode, body, stack, read)


def _unary(opcode: int, body: Bytes, stack: list[int], read: ReadWord) -> None:
    if not stack:
        raise Unknown("expression without operands")
    match opcode:
        case 0x06 | 0x94:
            value = read(stack.pop(), body.unsigned(1) if opcode == 0x94 else 8)
            if value is None:
                raise Unknown("unreadable memory")
            stack.append(value)
        case 0x12:
            stack.append(stack[-1])
        case 0x13:
            stack.pop()
        case 0x16:
            stack[-1], stack[-2] = stack[-2], stack[-1]
        case 0x1F:
            stack.append(-stack.pop())
        case 0x20:
            stack.append(~stack.pop())
        case 0x23:
            stack.append(stack.pop() + body.uleb())
        case 0x96:
            pass
        case _:
            raise Unknown(f"operation {opcode:#x}")


def _register(frame: Frame, number: int) -> int:
    if number not in frame:
        raise Unknown(f"register {number} is not known")
    return frame[number]
