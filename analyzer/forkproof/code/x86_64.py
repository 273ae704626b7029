"""x86-64: instruction bytes to sites, without decoding every instruction.

Owns: the byte patterns of branches, GOT accesses and address formation on x86-64.
Takes: the bytes of a code range and its object's `Landmarks`. Gives: `Sites`, `Stubs`.
Must never: use a disassembler on whole ranges: the pattern `E8 rel32` whose target is exactly a
      function start is a call except for about one candidate in 10^5 (bytes inside another instruction).
Wrong where: such a chance match occurs; where a tail call is a conditional short jump to a neighbour.

Source: Intel SDM volume 2; System V psABI for x86-64, section 5.2 (PLT); CET: `.plt.sec`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from forkproof.code.sites import EntryMap, Landmarks, Sites, Stores, Stubs
from forkproof.columns import position_in, spans
from forkproof.elf.image import I64, U8

ARGUMENT_REGISTERS: Final = (7, 6, 2, 1, 8, 9)
"""rdi, rsi, rdx, rcx, r8, r9 by their encoding (psABI 3.2.3)."""
SHORT_JUMP: Final = 0xEB
"""Opcode of `jmp rel8`."""
BEFORE: Final = 1
"""Bytes before a site that tell which register it goes through: the prefix that makes eight of sixteen."""
_LEA_SIZE: Final = 7
_ENDBR64: Final = (0xF3, 0x0F, 0x1E, 0xFA)


def _at(code: U8, opcode: int) -> I64:
    return np.flatnonzero(code == opcode)


def _rel32(code: U8, at: I64) -> I64:
    """Signed displacements stored at `at`, at any alignment: gathered from a view with a word at each byte."""
    if len(code) < 4:
        return np.zeros(0, np.int64)
    words = np.ndarray((len(code) - 3,), np.dtype("<i4"), code, strides=(1,))
    return words[at].astype(np.int64)


def _room(at: I64, code: U8, length: int) -> I64:
    """Of rising places, those with so many bytes of code from there on."""
    return at[: at.searchsorted(len(code) - length, side="right")]


def find_stubs(code: U8, base: int, is_slot: EntryMap) -> Stubs:
    """`[endbr64] [bnd] jmp *slot(%rip)` for every slot; the caller keeps those outside functions."""
    at = _room(_at(code, 0xFF), code, 6)
    at = at[code[at + 1] == 0x25]
    slot = at + 6 + base + _rel32(code, at + 2)
    known = is_slot.kinds(slot) > 0
    at, slot = at[known], slot[known]
    start = at - ((at >= 1) & (code[at - 1] == 0xF2))
    branded = start >= 4
    for offset, byte in enumerate(_ENDBR64):
        branded &= code[np.maximum(start - 4, 0) + offset] == byte
    return Stubs(start - 4 * branded + base, slot)


def scan(code: U8, base: int, landmarks: Landmarks) -> Sites:
    """All sites of one code range."""
    entries = landmarks.entries
    escaped = _room(_at(code, 0x0F), code, 2)
    escape = code[escaped + 1]
    direct = [_branches(code, base, entries, opcode) for opcode in (0xE8, 0xE9)]
    direct += [_conditional(code, base, entries, escaped[escape & 0xF0 == 0x80]), _short(code, base, entries)]
    site, target, jump = (np.concatenate(column) for column in zip(*direct, strict=True))
    order = np.argsort(site, kind="stable")
    group5 = _room(_at(code, 0xFF), code, 2)
    slot_site, slot_address, slot_jump = _through_memory(code, base, group5)
    lea_site, lea_target, lea_register = _rip_relative(code, base, 0x8D)
    copied = _copies(code, base, lea_site, lea_target, lea_register)
    lea_site, lea_target, lea_register = map(
        np.concatenate, zip((lea_site, lea_target, lea_register), copied, strict=True)
    )
    load_site, load_address, load_register = _rip_relative(code, base, 0x8B)
    if landmarks.fixed:
        immediate = _immediates(code, base, landmarks.fixed)
        columns = zip((lea_site, lea_target, lea_register), immediate, strict=True)
        lea_site, lea_target, lea_register = (np.concatenate(pair) for pair in columns)
    is_function = entries.kinds(lea_target) > 0
    return Sites(
        direct_site=site[order],
        direct_target=target[order],
        direct_jump=jump[order],
        slot_site=slot_site,
        slot_address=slot_address,
        slot_jump=slot_jump,
        taken_site=lea_site[is_function],
        taken_target=lea_target[is_function],
        taken_register=lea_register[is_function],
        loaded_site=load_site,
        loaded_address=load_address,
        loaded_register=load_register,
        data_site=lea_site[~is_function],
        data_target=lea_target[~is_function],
        data_register=lea_register[~is_function],
        indirect=_indirect(code, base, group5),
        syscalls=escaped[escape == 0x05] + base,
    )


def call_targets(code: U8, base: int, entries: EntryMap) -> I64:
    """Where direct calls lead, of the places in `entries`."""
    return _branches(code, base, entries, 0xE8)[1]


def _branches(code: U8, base: int, entries: EntryMap, opcode: int) -> tuple[I64, I64, np.typing.NDArray[np.bool_]]:
    at = _room(_at(code, opcode), code, 5)
    target = at + 5 + base + _rel32(code, at + 1)
    hit = entries.kinds(target) > 0
    return at[hit] + base, target[hit], np.full(int(hit.sum()), opcode == 0xE9)


def _conditional(code: U8, base: int, entries: EntryMap, at: I64) -> tuple[I64, I64, np.typing.NDArray[np.bool_]]:
    """`0F 80` to `0F 8F` at these places."""
    at = _room(at, code, 6)
    target = at + 6 + base + _rel32(code, at + 2)
    hit = entries.kinds(target) > 0
    return at[hit] + base, target[hit], np.ones(int(hit.sum()), bool)


def _short(code: U8, base: int, entries: EntryMap) -> tuple[I64, I64, np.typing.NDArray[np.bool_]]:
    """`EB rel8` to a function start: assemblers shorten tail calls to close neighbours."""
    at = _room(_at(code, SHORT_JUMP), code, 2)
    target = at + 2 + base + code[at + 1].view(np.int8).astype(np.int64)
    hit = entries.kinds(target) > 0
    return at[hit] + base, target[hit], np.ones(int(hit.sum()), bool)


def _through_memory(code: U8, base: int, group5: I64) -> tuple[I64, I64, np.typing.NDArray[np.bool_]]:
    """`call *x(%rip)` and `jmp *x(%rip)`."""
    second = code[group5 + 1]
    at = group5[(second == 0x15) | (second == 0x25)]
    at = _room(at, code, 6)
    return at + base, at + 6 + base + _rel32(code, at + 2), code[at + 1] == 0x25


def _rip_relative(code: U8, base: int, opcode: int) -> tuple[I64, I64, I64]:
    """64-bit `lea` (8D) or `mov` (8B) of a RIP-relative operand: site, address, register."""
    at = _at(code, opcode)
    at = at[at.searchsorted(1) : at.searchsorted(len(code) - 5)]
    at = at[code[at - 1] & 0xFB == 0x48]
    at = at[code[at + 1] & 0xC7 == 0x05]
    register = (code[at + 1] >> 3 & 7).astype(np.int64) | (code[at - 1] & 4).astype(np.int64) << 1
    return at - 1 + base, at + 6 + base + _rel32(code, at + 2), register


def _copies(code: U8, base: int, site: I64, target: I64, register: I64) -> tuple[I64, I64, I64]:
    """`mov %rax, %reg` right after an address was formed in rax, as code that is not optimised passes it."""
    at = site - base + _LEA_SIZE
    chosen = np.flatnonzero((register == 0) & (at < len(code) - 3))
    at = at[chosen]
    chosen = chosen[(code[at] & 0xFE == 0x48) & (code[at + 1] == 0x89) & (code[at + 2] & 0xF8 == 0xC0)]
    at = site[chosen] - base + _LEA_SIZE
    number = (code[at + 2] & 7).astype(np.int64) | (code[at] & 1).astype(np.int64) << 3
    return at + base, target[chosen], number


def _immediates(code: U8, base: int, absolute: range) -> tuple[I64, I64, I64]:
    """`mov $address, %reg`: site, address, register."""
    short = _room(np.flatnonzero(code & 0xF8 == 0xB8), code, 5)
    long = _room(_at(code, 0xC7), code, 6)
    long = long[(long >= 1) & (code[long - 1] & 0xFE == 0x48) & (code[long + 1] & 0xF8 == 0xC0)] + 1
    at = np.concatenate([short, long])
    value = _rel32(code, at + 1)
    hit = (value >= absolute.start) & (value < absolute.stop)
    at, value = at[hit], value[hit]
    prefix = code[np.maximum(at - np.where(code[at] & 0xF8 == 0xB8, 1, 2), 0)]
    extended = (prefix == 0x41) | (prefix == 0x49)
    number = (code[at] & 7).astype(np.int64) | extended.astype(np.int64) << 3
    return at + base, value, number


def _indirect(code: U8, base: int, group5: I64) -> I64:
    """`call *reg`, `call *mem` and `jmp *disp(reg)`, found by ModRM; an FF before means a displacement."""
    at = group5
    modrm = code[at + 1]
    operation, mode, rm = modrm >> 3 & 7, modrm >> 6, modrm & 7
    is_call = (operation == 2) & ~((mode == 0) & (rm == 5))
    is_tail = (operation == 4) & ((mode == 1) | (mode == 2)) & (rm != 4)
    inside_displacement = (at >= 1) & (code[np.maximum(at - 1, 0)] == 0xFF)
    sites: I64 = at[(is_call | is_tail) & ~inside_displacement] + base
    return sites


def find_atomics(code: U8, base: int) -> I64:
    """Sites of `lock cmpxchg`, `lock bts` and of `xchg` with memory (which locks by itself)."""
    locked = _room(_at(code, 0xF0), code, 6)
    rex = (code[locked + 1] & 0xF0 == 0x40).astype(np.int64)
    at = locked + 1 + rex
    cas = (code[at] == 0x0F) & np.isin(code[at + 1], (0xB1, 0xB0, 0xAB, 0xBA))
    exchange = _room(np.flatnonzero(code & 0xFE == 0x86), code, 3)
    modrm = code[exchange + 1]
    # Register forms (mod 3) do not lock; 87 /r with a plain base register or RIP is what compilers emit.
    exchange = exchange[(modrm >> 6 != 3) & ((modrm & 7 != 4) | (modrm >> 6 != 0))]
    sites: I64 = np.sort(np.concatenate([locked[cas], exchange])) + base
    return sites


def find_additions(code: U8, base: int) -> I64:
    """Sites of `lock xadd`."""
    locked = _room(_at(code, 0xF0), code, 6)
    for prefix, mask in ((0x66, 0xFF), (0x40, 0xF0)):
        locked = locked + (code[locked + 1] & mask == prefix)
    sites: I64 = locked[(code[locked + 1] == 0x0F) & (code[locked + 2] & 0xFE == 0xC0)] + base
    return sites


def find_short_loops(code: U8, base: int) -> I64:
    """Sites of conditional jumps a few instructions back, as loops end that only look."""
    at = _room(np.flatnonzero(code & 0xF0 == 0x70), code, 2)
    sites: I64 = at[(code[at + 1] >= 0x100 - _SHORT) & (code[at + 1] < 0xFE)] + base
    return sites


_SHORT: Final = 32
"""Bytes of a loop that only looks."""
_PREFIXES: Final = np.zeros(256, bool)
"""Bytes that may stand before an opcode: operand and address sizes, segments, repetition, lock, REX."""
_PREFIXES[[0x66, 0x67, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0xF0, 0xF2, 0xF3, *range(0x40, 0x50)]] = True
_MOST_PREFIXES: Final = 14
"""An instruction has 15 bytes at most."""


def may_hold_atomic(code: U8) -> bool:
    """A cheap test before decoding: a byte stands there that locks, or is the opcode of an exchange."""
    return bool(((code == 0xF0) | (code & 0xFE == 0x86)).any())


def holds_atomic(code: U8, starts: I64) -> bool:
    """Whether one of the instructions at these offsets is locked, or exchanges with memory."""
    padded = np.append(code, np.zeros(_MOST_PREFIXES + 2, np.uint8))
    at = starts
    for _ in range(_MOST_PREFIXES):
        first = padded[at]
        if (first == 0xF0).any():
            return True
        at = at[_PREFIXES[first]] + 1
        if not len(at):
            break
        starts = np.append(starts, at)
    exchange = starts[padded[starts] & 0xFE == 0x86]
    return bool((padded[exchange + 1] >> 6 != 3).any())


_MOVE, _IMMEDIATE, _VECTOR = 1, 2, 3
_STORES: Final = np.zeros(256, np.uint8)
"""Opcodes of `mov` to memory from a register and an immediate, and the last bytes of those that store from xmm."""
_STORES[0x89], _STORES[0xC7], _STORES[[0x11, 0x13, 0x17, 0x29, 0x7E, 0x7F, 0xD6]] = _MOVE, _IMMEDIATE, _VECTOR
_LEAST_ADDRESS: Final = 1 << 12


def find_stores(code: U8, base: int, ranges: tuple[I64, I64], offsets: I64, addresses: I64) -> Stores:
    """Places in some ranges (from, to) that may store a word there, local variables left out.

    They may be bytes inside instructions. Each is the last byte of an opcode.
    """
    within = spans(*ranges)
    kind = _STORES[code[within]]
    at, kind = within[kind > 0], kind[kind > 0]

    def byte(ahead: int) -> U8:
        found: U8 = code[np.clip(at + ahead, 0, len(code) - 1)]
        return found

    escaped = (byte(-1) == 0x0F) | (byte(-2) == 0xC5) | (byte(-3) == 0xC4) | (byte(-4) == 0x62)
    modrm = byte(1)
    may_be = np.where(kind == _VECTOR, escaped, byte(-1) & 0xF8 == 0x48) & (modrm < 0xC0)
    at, kind, modrm = at[may_be], kind[may_be], modrm[may_be]
    is_local = (modrm & 7 == 4) & (byte(2) & 7 == 4)  # by the stack pointer; REX.B makes r12 of it
    first = np.where(kind == _VECTOR, byte(-2), byte(-1))
    is_local &= (first & 0xF1 != 0x41) & (byte(-3) != 0xC4) & (byte(-4) != 0x62)
    at, kind, modrm = at[~is_local], kind[~is_local], modrm[~is_local]
    mode, rm = modrm >> 6, modrm & 7
    after = at + 2 + (rm == 4)
    words = _rel32(code, np.clip(after, 0, len(code) - 4)) if len(code) >= 4 else after
    place = np.where(mode == 1, code[np.minimum(after, len(code) - 1)].view(np.int8), np.where(mode == 2, words, 0))
    is_global = (mode == 0) & (rm == 5)
    place[is_global] = (after + 4 + base + words + 4 * (kind == _IMMEDIATE))[is_global]
    if (kind == _IMMEDIATE).any():  # most are no addresses
        size = np.where(is_global | (mode == 2), 4, np.where(mode == 1, 1, 0))
        value = _rel32(code, np.clip(after + size, 0, len(code) - 4))
        at, kind, place, is_global = (
            column[(kind != _IMMEDIATE) | (value >= _LEAST_ADDRESS)] for column in (at, kind, place, is_global)
        )
    high = np.flatnonzero(kind == _VECTOR)
    at, place = np.concatenate([at, at[high]]), np.concatenate([place, place[high] + 8])
    is_global = np.concatenate([is_global, is_global[high]])
    wanted = np.where(is_global, position_in(addresses, place), position_in(offsets, place)) >= 0
    return Stores(at[wanted] + base, place[wanted], is_global[wanted])


def find_pauses(code: U8, base: int) -> I64:
    """Sites of `pause`."""
    at = _room(_at(code, 0xF3), code, 2)
    sites: I64 = at[code[at + 1] == 0x90] + base
    return sites


def find_references(code: U8, base: int, address: int) -> I64:
    """Places where a 32-bit displacement from the end of an instruction gives an address.

    The displacement is the instruction's last part, or an immediate of 1, 2 or 4 bytes follows it.
    """
    room = len(code) - 4
    if room <= 0:
        return np.zeros(0, np.int64)
    # Modulo 2**32 first, in one pass over half as many bytes; the few that are left are looked at exactly.
    words = np.ndarray((room,), np.dtype("<u4"), code, strides=(1,))
    distance = np.arange(address - base - 4, address - base - 4 - room, -1, dtype=np.int64).astype(np.uint32)
    distance -= words
    near = np.flatnonzero(distance <= 4)
    exact = address - (near + base + 4) - words[near].astype(np.int32)
    sites: I64 = near[(exact >= 0) & (exact <= 4) & (exact != 3)] + base
    return sites


def mentions(code: bytes, numbers: Iterable[int]) -> bool:
    """One of these numbers stands in the code as a 32-bit immediate: a cheap test before decoding."""
    return any(number.to_bytes(4, "little") in code for number in numbers)


def called_registers(around: U8) -> I64:
    """The register that each of these calls or jumps goes through, given bytes from the one before; -1 for none."""
    before, opcode, operand = (around[:, i].astype(np.int64) for i in range(3))
    is_plain = (opcode == 0xFF) & ((operand & 0xF8 == 0xD0) | (operand & 0xF8 == 0xE0))
    return np.where(is_plain, (operand & 7) + 8 * (before & 0xF1 == 0x41), -1)
