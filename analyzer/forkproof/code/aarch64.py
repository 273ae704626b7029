"""AArch64: instruction words to sites, decoded exactly by mask.

Owns: the encodings of branches, ADRP pairs and PLT stubs on AArch64.
Takes: the bytes of a code range and its object's `Landmarks`. Gives: `Sites`, `Stubs`.
Must never: follow control flow: an ADRP is paired with the ADD or LDR that uses its register within
      `_PAIR_WINDOW` instructions and before another ADRP into that register.
Wrong where: a literal pool in a code range happens to look like an instruction; where a pair is further
      apart than the window; where a register is overwritten in between by something else than ADRP
      (the target must still be a function start or a GOT slot, which makes that rare).

Source: Arm Architecture Reference Manual, C4; ELF for the Arm 64-bit Architecture (PLT sequences).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np

from forkproof.code.sites import EntryMap, Landmarks, Sites, Stores, Stubs, concatenate
from forkproof.columns import position_in, spans
from forkproof.elf.image import I64, U8

ARGUMENT_REGISTERS: Final = (0, 1, 2, 3, 4, 5, 6, 7)
"""x0 to x7 (AAPCS64 6.8.2)."""
BEFORE: Final = 0
"""Bytes before a site that tell which register it goes through."""
_PAIR_WINDOW: Final = 24
_DERIVED_WINDOW: Final = 24
_CALL_WINDOW: Final = 96
"""Instructions in which what was formed or loaded is followed."""
_LAST_DESTROYED: Final = 18
"""x0 to x18 do not outlive a call."""
_BTI_C: Final = 0xD503245F
Words = np.typing.NDArray[np.uint32]


def _words(code: U8) -> Words:
    return np.frombuffer(code[: len(code) // 4 * 4].tobytes(), "<u4")


def _signed(value: I64, bits: int) -> I64:
    sign = 1 << (bits - 1)
    return (value & (sign - 1)) - (value & sign)


def _page(word: Words, pc: I64) -> I64:
    """Target page of an ADRP at `pc`."""
    low, high = (word >> 29 & 3).astype(np.int64), (word >> 5 & 0x7FFFF).astype(np.int64)
    return (pc & ~0xFFF) + (_signed(high << 2 | low, 21) << 12)


def _is_adrp(word: Words) -> np.typing.NDArray[np.bool_]:
    found: np.typing.NDArray[np.bool_] = word & 0x9F000000 == 0x90000000
    return found


def find_stubs(code: U8, base: int, is_slot: EntryMap) -> Stubs:
    """`[bti c] adrp x16, slot; ldr x17, [x16, slot]`: the head that every PLT flavour shares."""
    words = _words(code)
    if len(words) < 2:
        return Stubs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    first, second = words[:-1], words[1:]
    at = np.flatnonzero((first & 0x9F00001F == 0x90000010) & (second & 0xFFC003FF == 0xF9400211))
    slot = _page(words[at], at * 4 + base) + ((words[at + 1] >> 10 & 0xFFF).astype(np.int64) << 3)
    known = is_slot.kinds(slot) > 0
    at, slot = at[known], slot[known]
    branded = (at >= 1) & (words[np.maximum(at - 1, 0)] == _BTI_C)
    return Stubs((at - branded) * 4 + base, slot)


def scan(code: U8, base: int, landmarks: Landmarks) -> Sites:
    """All sites of one code range. Fixed addresses need no care here: ADRP forms them, too."""
    entries = landmarks.entries
    words = _words(code)
    site, target, jump = _direct(words, base, entries)
    add, load = _adrp_pairs(words, base)
    slot_site, slot_address, slot_jump = _loaded_calls(words, base, landmarks, load)
    add, load = _with_derived(words, base, landmarks, add, load)
    is_function = entries.kinds(add[1]) > 0
    indirect = np.flatnonzero((words & 0xFFFFFC1F == 0xD63F0000) | (words & 0xFEFFF800 == 0xD63F0800)) * 4 + base
    return Sites(
        direct_site=site,
        direct_target=target,
        direct_jump=jump,
        slot_site=slot_site,
        slot_address=slot_address,
        slot_jump=slot_jump,
        taken_site=add[0][is_function],
        taken_target=add[1][is_function],
        taken_register=add[2][is_function],
        loaded_site=load[0],
        loaded_address=load[1],
        loaded_register=load[2],
        data_site=add[0][~is_function],
        data_target=add[1][~is_function],
        data_register=add[2][~is_function],
        indirect=indirect[position_in(np.sort(slot_site), indirect) < 0],
        syscalls=np.flatnonzero(words == 0xD4000001) * 4 + base,
    )


def call_targets(code: U8, base: int, entries: EntryMap) -> I64:
    """Where direct calls lead, of the places in `entries`."""
    _, target, jump = _direct(_words(code), base, entries)
    return target[~jump]


def _direct(words: Words, base: int, entries: EntryMap) -> tuple[I64, I64, np.typing.NDArray[np.bool_]]:
    """BL, B, B.cond, CBZ/CBNZ and TBZ/TBNZ that lead to an entry."""
    found = []
    for mask, value, shift, bits in (
        (0xFC000000, 0x94000000, 0, 26),
        (0xFC000000, 0x14000000, 0, 26),
        (0xFF000010, 0x54000000, 5, 19),
        (0x7E000000, 0x34000000, 5, 19),
        (0x7E000000, 0x36000000, 5, 14),
    ):
        at = np.flatnonzero(words & mask == value)
        offset = _signed((words[at] >> shift).astype(np.int64) & ((1 << bits) - 1), bits) * 4
        target = at * 4 + base + offset
        hit = entries.kinds(target) > 0
        found.append((at[hit] * 4 + base, target[hit], np.full(int(hit.sum()), value != 0x94000000)))
    site, target, jump = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(site, kind="stable")
    return site[order], target[order], jump[order]


def pages(code: U8, base: int) -> I64:
    """The pages that ADRP forms, whatever uses them and wherever."""
    words = _words(code)
    at = np.flatnonzero(_is_adrp(words))
    return _page(words[at], at * 4 + base)


Triple = tuple[I64, I64, I64]


def _adrp_pairs(words: Words, base: int) -> tuple[Triple, Triple]:
    """(site, address, register) of ADRP+ADD and of ADRP+LDR (64-bit), by the using instruction."""
    at = np.flatnonzero(_is_adrp(words))
    register = (words[at] & 31).astype(np.int64)
    page = _page(words[at], at * 4 + base)
    adds, loads = [], []
    for step in range(1, _PAIR_WINDOW + 1):
        alive = at + step < len(words)
        at, register, page = at[alive], register[alive], page[alive]
        user = words[at + step]
        uses = (user >> 5 & 31) == register
        is_add = uses & (user & 0xFFC00000 == 0x91000000)
        is_load = uses & (user & 0xFFC00000 == 0xF9400000)
        immediate = (user >> 10 & 0xFFF).astype(np.int64)
        place, destination = (at + step) * 4 + base, (user & 31).astype(np.int64)
        adds.append((place[is_add], (page + immediate)[is_add], destination[is_add]))
        loads.append((place[is_load], (page + (immediate << 3))[is_load], destination[is_load]))
        # The register is gone once its user, a load or another ADRP writes it.
        overwritten = (destination == register) & (is_add | is_load | _is_adrp(user))
        at, register, page = at[~overwritten], register[~overwritten], page[~overwritten]
    return _joined(adds), _joined(loads)


def _joined(parts: list[Triple]) -> Triple:
    site, address, register = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(site, kind="stable")
    return site[order], address[order], register[order]


def _with_derived(words: Words, base: int, landmarks: Landmarks, add: Triple, load: Triple) -> tuple[Triple, Triple]:
    """The pairs, and what is made of an address that a pair has formed.

    GCC reaches the variables of a section from one anchor (adrp, add, then another add or a load for each), and
    moves addresses that outlive a call from registers that do: `mov x0, x20`. Most addresses are those of strings,
    and not worth to be followed.
    """
    adds, loads = [add], [load]
    telling = landmarks.is_data(add[1]) | (landmarks.entries.kinds(add[1]) > 0)
    known = add[0][telling], add[1][telling], add[2][telling]
    for place, register, value, word in _followed(words, base, landmarks.entries, known, _DERIVED_WINDOW):
        uses = (word >> 5 & 31) == register
        immediate, destination = (word >> 10 & 0xFFF).astype(np.int64), (word & 31).astype(np.int64)
        at = place * 4 + base
        for mask, shift in ((0x91000000, 0), (0x91400000, 12)):
            chosen = uses & (word & 0xFFC00000 == mask)
            adds.append((at[chosen], (value + (immediate << shift))[chosen], destination[chosen]))
        chosen = uses & (word & 0xFFC00000 == 0xF9400000)
        loads.append((at[chosen], (value + (immediate << 3))[chosen], destination[chosen]))
        chosen = _is_move(word, register)
        adds.append((at[chosen], value[chosen], destination[chosen]))
    return _joined(adds), _joined(loads)


def _followed(
    words: Words, base: int, entries: EntryMap, known: Triple, window: int
) -> Iterator[tuple[I64, I64, I64, Words]]:
    """(index, register, its value, the word there), an instruction further with each step, while values last.

    A value lasts until its register is written, a call destroys it, or another function begins. Copies that a
    move makes are followed, too. Code is read as it stands, jumps or no.
    """
    site, value, register = known
    index = (site - base) // 4
    for _ in range(window):
        index = index + 1
        alive = index < len(words)
        alive[alive] = entries.kinds(index[alive] * 4 + base) == 0
        index, register, value = index[alive], register[alive], value[alive]
        if not len(index):
            return
        word = words[index]
        yield index, register, value, word
        moved = _is_move(word, register)
        copies = index[moved], (word[moved] & 31).astype(np.int64), value[moved]
        lost = _writes(word, register)
        kept = index[~lost], register[~lost], value[~lost]
        index, register, value = (np.concatenate(pair) for pair in zip(kept, copies, strict=True))


def _is_move(word: Words, register: I64) -> np.typing.NDArray[np.bool_]:
    """`mov xN, register` (orr with the zero register)."""
    found: np.typing.NDArray[np.bool_] = (word & 0xFFE0FFE0 == 0xAA0003E0) & ((word >> 16 & 31) == register)
    return found


def _writes(word: Words, register: I64) -> np.typing.NDArray[np.bool_]:
    """The instruction changes the register: as its destination, or as a call that destroys it.

    Source: Arm ARM, C4.1: branches have 101 in bits 28 to 26, loads and stores 1x0 in 27 to 25; AAPCS64 6.1.1.
    """
    is_branch = word & 0x1C000000 == 0x14000000
    is_call = (word & 0xFC000000 == 0x94000000) | (word & 0xFFFFFC1F == 0xD63F0000)
    is_memory = word & 0x0A000000 == 0x08000000
    loads = (word & 0x00400000 != 0) | (word & 0x38800000 == 0x38800000)
    is_pair = word & 0x3A000000 == 0x28000000
    is_vector = is_memory & (word & 0x04000000 != 0)
    first = ~is_branch & (~is_memory | loads) & ~is_vector & ((word & 31) == register)
    second = is_pair & loads & ~is_vector & ((word >> 10 & 31) == register)
    changed: np.typing.NDArray[np.bool_] = first | second | (is_call & (register <= _LAST_DESTROYED))
    return changed


def _loaded_calls(
    words: Words, base: int, landmarks: Landmarks, load: Triple
) -> tuple[I64, I64, np.typing.NDArray[np.bool_]]:
    """`ldr xN, [GOT]` followed by `blr xN` or `br xN` (-fno-plt), as long as xN, or a copy of it, holds the word."""
    sites, addresses, jumps = [], [], []
    filled = position_in(landmarks.words, load[1]) >= 0
    known = load[0][filled], load[1][filled], load[2][filled]
    for index, register, address, word in _followed(words, base, landmarks.entries, known, _CALL_WINDOW):
        # A load into x17 right before the jump is a PLT stub, which find_stubs owns.
        branch = (word & 0xFFDFFC1F == 0xD61F0000) & ((word >> 5 & 31) == register) & (register != 17)
        sites.append(index[branch] * 4 + base)
        addresses.append(address[branch])
        jumps.append(word[branch] & 0x00200000 == 0)
    if not sites:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_)
    site, address, jump = (np.concatenate(column) for column in (sites, addresses, jumps))
    order = np.argsort(site, kind="stable")
    site, address, jump = site[order], address[order], jump[order]
    first = np.ones(len(site), bool)
    first[1:] = site[1:] != site[:-1]
    return site[first], address[first], jump[first]


def find_atomics(code: U8, base: int) -> I64:
    """Sites of store-exclusive, compare-and-swap, swap and set-bits instructions."""
    words = _words(code)
    store_exclusive = words & 0x3FE00000 == 0x08000000
    compare_swap = words & 0x3FA07C00 == 0x08A07C00
    swap = words & 0x3F20FC00 == 0x38208000
    swap |= (words & 0x3F20FC00 == 0x38203000) & (words & 0x1F != 0x1F)
    return np.flatnonzero(store_exclusive | compare_swap | swap) * 4 + base


def find_additions(code: U8, base: int) -> I64:
    """Sites of fetch-and-add instructions whose result is kept, and of store-exclusives, which may be half of one."""
    words = _words(code)
    adds = (words & 0x3F20FC00 == 0x38200000) & (words & 0x1F != 0x1F)
    return np.flatnonzero(adds | (words & 0x3FE00000 == 0x08000000)) * 4 + base


def find_short_loops(code: U8, base: int) -> I64:
    """Sites of conditional branches a few instructions back, as loops end that only look."""
    words = _words(code)
    is_conditional = (words & 0xFF000010 == 0x54000000) | (words & 0x7E000000 == 0x34000000)
    near = np.where(is_conditional, words >> 5 & 0x7FFFF, 0)
    bits = np.where(words & 0x7E000000 == 0x36000000, (words >> 5 & 0x3FFF) | 0x7C000, 0)
    return np.flatnonzero(np.maximum(near, bits) >= 0x80000 - _SHORT) * 4 + base


_SHORT: Final = 8
"""Instructions of a loop that only looks."""
_STACK: Final = 31
"""The stack pointer, where a register is a base."""
_REACH: Final = 1 << 16
"""Bytes from a page within which the address of data is formed,"""
_BELOW: Final = 1 << 12
"""and before it."""


def find_stores(code: U8, base: int, ranges: tuple[I64, I64], offsets: I64, addresses: I64) -> Stores:
    """Instructions in some ranges (from, to) of the code that store a word at one of these offsets.

    Which variable a store goes to is told by an ADRP elsewhere: those that may form one of the addresses are found.
    """
    index = spans(ranges[0] >> 2, ranges[1] >> 2)
    words = _words(code)[index]
    found = [_paged(words, index, base, addresses)]
    for at, place in _stored_at(words):
        chosen = np.flatnonzero(position_in(offsets, place) >= 0)
        found.append(Stores(index[at[chosen]] * 4 + base, place[chosen], np.zeros(len(chosen), bool)))
    return concatenate(found)


def _paged(words: Words, index: I64, base: int, addresses: I64) -> Stores:
    at = np.flatnonzero(_is_adrp(words)) if len(addresses) else np.zeros(0, np.int64)
    ahead = addresses[:, None] - _page(words[at], index[at] * 4 + base)
    which, position = np.nonzero((ahead >= -_BELOW) & (ahead < _REACH))
    return Stores(index[at[position]] * 4 + base, addresses[which], np.ones(len(which), bool))


def _stored_at(words: Words) -> Iterator[tuple[I64, I64]]:
    """(position, offset) of 64-bit stores but to local variables, each word of several (Arm ARM, C4.1.88)."""
    loads_and_stores = np.flatnonzero((words & 0x0A000000 == 0x08000000) & (words & 0x3E0 != _STACK << 5))
    words = words[loads_and_stores]
    size, opc = words >> 30, words >> 22 & 3
    vector = words & 1 << 26 != 0
    is_quad = vector & (size == 0) & (opc == 2)
    is_word = ((size == 3) & (opc == 0)) | is_quad
    near = _signed((words >> 12 & 0x1FF).astype(np.int64), 9)

    def each(
        chosen: np.typing.NDArray[np.bool_], offset: I64, count: np.typing.NDArray[Any]
    ) -> Iterator[tuple[I64, I64]]:
        rows = np.flatnonzero(chosen)
        for word in range(int(count[rows].max(initial=0))):
            have = rows[count[rows] > word]
            yield loads_and_stores[have], offset[have] + 8 * word

    scaled = (words >> 10 & 0xFFF).astype(np.int64) << np.where(is_quad, 4, 3)
    words_of_one = np.where(is_quad, 2, 1)
    yield from each((words & 0x3B000000 == 0x39000000) & is_word, scaled, words_of_one)
    # Not scaled, unprivileged; with write-back, or an index: then it counts from the register itself.
    form = words & 0x3B200C00
    plain = np.where(words & 1 << 10 != 0, 0, near)
    yield from each((form & 0x3B200000 == 0x38000000) & is_word, plain, words_of_one)
    yield from each((form == 0x38200800) & is_word, np.zeros(len(words), np.int64), words_of_one)
    pair = _signed((words >> 15 & 0x7F).astype(np.int64), 7)
    is_wide = vector & (size == 2)
    is_pair = (words & 0x3A400000 == 0x28000000) & np.where(vector, (size == 1) | (size == 2), size == 2)
    offset = np.where(words & 1 << 23 != 0, 0, pair << np.where(is_wide, 4, 3))
    yield from each(is_pair, offset, np.where(is_wide, 4, 2))
    releases = (words & 0xFFE00000 == 0xC8800000) | (words & 0xFFE00C00 == 0xD9000000)
    yield from each(releases, np.where(words & 1 << 28 != 0, near, 0), np.ones(len(words), np.int64))


def find_pauses(code: U8, base: int) -> I64:
    """Sites of `yield`, `wfe` and `isb`."""
    words = _words(code)
    return np.flatnonzero((words == 0xD503203F) | (words == 0xD503205F) | (words == 0xD5033FDF)) * 4 + base


def outline_atomic_pointer(code: U8) -> int | None:
    """For a GCC outline-atomics helper, which of its arguments is the address; None for other code.

    `[bti c] adrp x16; ldrb w16, [x16, …]; cbz w16, …; <LSE instruction>; ret` (libgcc,
    config/aarch64/lse.S). Compare-and-swap takes (expected, desired, address), the others (value, address).
    """
    words = _words(code[:24])
    words = words[1:] if len(words) and words[0] == _BTI_C else words
    if len(words) < 4:
        return None
    is_head = (
        words[0] & 0x9F00001F == 0x90000010
        and words[1] & 0xFFC003FF == 0x39400210
        and words[2] & 0xFF00001F == 0x34000010
    )
    if not is_head:
        return None
    return 2 if words[3] & 0x3FA07C00 == 0x08A07C00 else 1


def find_references(code: U8, base: int, address: int) -> I64:
    """Sites of ADRP that form the page of an address, and of ADR that form it."""
    every = _words(code)
    at = np.flatnonzero(every & 0x1F000000 == 0x10000000)
    words, site = every[at].astype(np.int64), at * 4 + base
    immediate = (words >> 5 & 0x7FFFF) << 2 | words >> 29 & 3
    immediate -= (immediate >> 20 & 1) << 21
    page = (words >> 31 == 1) & ((site & ~0xFFF) + (immediate << 12) == address & ~0xFFF)
    near = (words >> 31 == 0) & (site + immediate == address)
    sites: I64 = site[page | near]
    return sites


def mentions(code: bytes, numbers: Iterable[int]) -> bool:
    """One of these numbers stands in a MOVZ: a cheap test before decoding."""
    words = np.frombuffer(code[: len(code) // 4 * 4], "<u4")
    moved = words[words & 0x7FE00000 == 0x52800000] >> 5 & 0xFFFF
    return not set(numbers).isdisjoint(moved.tolist())


def called_registers(around: U8) -> I64:
    """The register that each of these calls or jumps goes through, given its bytes; -1 for none."""
    words = around.astype(np.int64) @ np.array([1, 1 << 8, 1 << 16, 1 << 24])
    is_plain = (words & 0xFFFFFC1F == 0xD63F0000) | (words & 0xFFFFFC1F == 0xD61F0000)
    return np.where(is_plain, words >> 5 & 31, -1)
