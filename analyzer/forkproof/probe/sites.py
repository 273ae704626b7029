"""One acquire site, at run time: which lock it is about to take, and whether it got it.

Owns: what an acquiring instruction means: its operand, its success, where a thread that executes it comes out.
Takes: an `AcquireSite` and the object's code. Gives: `Acquire`, which reads both off a thread's registers.
Must never: look for sites (that is the lock analysis), or step between a load-exclusive and its store.
Wrong where: a lock's free value is another than `Free` knows (musl's pthread_spinlock_t on x86-64); a ticket lock lies
      on the heap, or an exclusive pair draws its tickets: it is not understood.

    form             the lock                       got it, when
    library call     the first argument             it returned, with 0 where it returns a status
    cmpxchg, cas     the memory operand             the old value was the expected one, 0; for a permit, one more than
                                                    the new value
    xchg, swp        the memory operand             the old value was 0
    bts, ldset       the memory operand             the bit was clear
    xadd, ldadd      the word whose turn it is      the ticket is the one that is served
    ldaxr … stxr     the memory operand             the store succeeded
    outline atomics  the helper's pointer argument  as the instruction that the helper stands for
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from forkproof.code import aarch64
from forkproof.code.decode import listing
from forkproof.elf.image import Image, Machine
from forkproof.probe.ptrace import Registers
from forkproof.probe.tracee import Memory


@dataclass(frozen=True, slots=True)
class AcquireSite:
    """A place in the code that takes a lock: a call of a library's lock function, an atomic read-modify-write, or
    a call of an AArch64 outline-atomics helper."""

    object: str
    """Path of the object, as the process maps it."""
    rva: int
    """Of the instruction."""
    callee: str = ""
    """The library function, where it is a call of one."""
    turn: int | None = None
    """Rva in the same object of the word that says whose turn it is, if a ticket is drawn there: it is the lock."""
    is_permit: bool = False
    """A compare-and-swap there counts a word down that was not 0: it takes the permit of a semaphore."""


class Form(Enum):
    """What kind of instruction acquires."""

    CALL = "call"
    COMPARE = "compare and swap"
    EXCHANGE = "exchange"
    BIT = "bit test and set"
    EXCLUSIVE = "load-exclusive and store-exclusive"
    TICKET = "fetch and add"
    UNKNOWN = "unknown"


class Free(Enum):
    """What a lock's word is while nobody has it."""

    ZERO = "0"
    POSITIVE = "positive: a semaphore's count, a permit; 1 in a pthread_spinlock_t of glibc for x86-64"
    UNWRITTEN = "no reader and no writer: glibc's pthread_rwlock_t"


@dataclass(frozen=True, slots=True)
class Served:
    """A ticket lock's word while nobody has the lock: it says that the next ticket is served."""

    tickets: int
    """Bytes from it to the word that says which ticket is next; 0 where the two are halves of one word."""


_UNUSED: Final = 0b101
"""PTHREAD_RWLOCK_WRPHASE and RWAITING, which a free rwlock of glibc may keep: nptl/pthread_rwlock_common.c."""
_STATUS: Final = re.compile(r"_*(pthread_|sem_|mtx_)")
"""Functions that return 0 when they have got the lock; others return nothing."""
_OPAQUE_SIZE: Final = {Machine.X86_64: 40, Machine.AARCH64: 48}
"""Bytes of a pthread_mutex_t: any word of it is the lock."""
_COUNT, OWNER, _USERS = 4, 8, 12
"""Where they are in glibc's pthread_mutex_t."""
_PAIR_BYTES: Final = 48
_X86_WIDTHS: Final = {"byte": 1, "word": 2, "dword": 4, "qword": 8}


@dataclass(frozen=True, slots=True)
class Operand:
    """A memory operand: base + index * scale + displacement, as text has it."""

    segment: str
    terms: tuple[tuple[str, int], ...]
    displacement: int

    def address(self, registers: Registers, end: int) -> int:
        """Where it is; `end` is the run-time address after the instruction."""
        total = self.displacement
        if self.segment:
            total += registers[f"{self.segment}_base"]
        for name, scale in self.terms:
            total += (end if name == "rip" else value_of(registers, name)) * scale
        return total & 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Acquire:
    """A site, decoded."""

    site: AcquireSite
    form: Form
    size: int
    """Bytes of the instruction."""
    width: int
    """Bytes of the lock word, or of the whole lock for a library call."""
    operand: Operand | None = None
    pointer: str = ""
    """The register that points to the lock, where it is an argument."""
    stores: str = ""
    expects: str = ""
    result: str = ""
    """Registers: the new value, the expected one, and where the old value (for exclusives: the status) comes out."""
    exits: tuple[int, ...] = ()
    """Rvas at which a thread comes out, where it cannot be single-stepped over the instruction."""
    is_tail_call: bool = False

    through: Operand | str = ""
    """Where the function's address is read from, or the register that has it, where it is called through a pointer."""
    is_x86: bool = False

    def free_at(self, registers: Registers) -> Free | Served:
        """What the lock's word is while nobody has it, for a thread that is at the site."""
        if self.form is Form.TICKET:
            return Served(self._word(registers) - self.lock(registers))
        callee = self.site.callee
        if self.site.is_permit or callee.startswith("sem_") or (self.is_x86 and callee.startswith("pthread_spin_")):
            return Free.POSITIVE
        return Free.UNWRITTEN if "rwlock" in callee else Free.ZERO

    def lock(self, registers: Registers) -> int:
        """The lock's address, for a thread that is at the site."""
        if self.form is Form.TICKET and self.site.turn is not None:
            return registers.pc - self.site.rva + self.site.turn
        return self._word(registers)

    def _word(self, registers: Registers) -> int:
        """What the instruction, or the function, works on."""
        if self.operand is not None:
            return self.operand.address(registers, registers.pc + self.size)
        return registers[self.pointer]

    def target(self, registers: Registers, memory: Memory) -> int | None:
        """The function that a thread at the site calls through a pointer, if it does."""
        if isinstance(self.through, Operand):
            return memory.word(self.through.address(registers, registers.pc + self.size))
        return value_of(registers, self.through) if self.through else None

    def is_acquire(self, registers: Registers) -> bool:
        """Executed now, it would take a lock rather than release one, or change a counter."""
        mask = (1 << 8 * self.width) - 1
        match self.form:
            case Form.COMPARE:
                expected, new = (value_of(registers, name) & mask for name in (self.expects, self.stores))
                return expected == new + 1 if self.site.is_permit else expected == 0 and new != 0
            case Form.EXCHANGE:
                return value_of(registers, self.stores) & mask != 0
        return self.form is not Form.UNKNOWN

    def is_free(self, registers: Registers, memory: Memory) -> bool:
        """Nobody has the lock; known for words only."""
        width = 4 if self.form is Form.CALL else self.width
        return is_free(memory, self.lock(registers), width, self.free_at(registers))

    def got(self, before: Registers, after: Registers, bias: int, memory: Memory | None = None) -> bool | None:
        """Whether a thread that has come out has the lock; None: it has not come out yet, but goes round again."""
        mask = (1 << 8 * self.width) - 1
        match self.form:
            case Form.CALL:
                return not _STATUS.match(self.site.callee) or value_of(after, after.machine.result) & 0xFFFFFFFF == 0
            case Form.COMPARE:
                return value_of(after, self.result) & mask == value_of(before, self.expects) & mask
            case Form.TICKET if self.lock(before) == self._word(before):
                high, low = _halves(value_of(after, self.result) & mask, self.width)
                return high == low
            case Form.TICKET:
                served = memory.word(self.lock(before), self.width) if memory is not None else None
                return value_of(after, self.result) & mask == served
            case Form.EXCHANGE:
                return value_of(after, self.result) & mask == 0
            case Form.BIT if self.result:
                return value_of(after, self.result) & value_of(before, self.stores) & mask == 0
            case Form.BIT:
                return after["eflags"] & 1 == 0
            case Form.EXCLUSIVE:
                if after.pc - bias != self.exits[0]:
                    return False
                return True if value_of(after, self.result) == 0 else None
        return False


def is_free(memory: Memory, lock: int, width: int, free: Free | Served) -> bool:
    """What a lock's word says; one that cannot be read is not free."""
    word = memory.word(lock, width)
    if word is None:
        return False
    match free:
        case Served(0):
            high, low = _halves(word, width)
            return high == low
        case Served(tickets):
            return word == memory.word(lock + tickets, width)
        case Free.POSITIVE:
            return 0 < word & 0xFFFFFFFF < 1 << 31
        case Free.UNWRITTEN:
            return word & ~_UNUSED == 0
    return word == 0


def _halves(word: int, width: int) -> tuple[int, int]:
    """The upper and the lower one of a word of so many bytes."""
    return word >> 4 * width, word & (1 << 4 * width) - 1


def freed(memory: Memory, lock: int, width: int, free: Free | Served, owner: int) -> bool:
    """Make a lock what it is while nobody has it; false where that is not possible.

    A mutex of glibc also tells whose it is, how often that thread has it, and who uses it: struct __pthread_mutex_s.
    """
    word = memory.word(lock, width)
    if word is None:
        return False
    match free:
        case Served(0):
            high, _ = _halves(word, width)
            return memory.set_word(lock, high << 4 * width | high, width)
        case Served(tickets):
            word = memory.word(lock + tickets, width)
            return word is not None and memory.set_word(lock, word, width)
        case Free.POSITIVE:
            word = 1
        case Free.UNWRITTEN:
            word &= _UNUSED
        case Free.ZERO:
            word = 0
    if not memory.set_word(lock, word, width):
        return False
    if memory.word(lock + OWNER, 4) == owner:
        users = memory.word(lock + _USERS, 4) or 1
        memory.set_word(lock + _COUNT, 0, 4)
        memory.set_word(lock + OWNER, 0, 4)
        memory.set_word(lock + _USERS, users - 1, 4)
    return True


def value_of(registers: Registers, name: str) -> int:
    """A register by any of its names."""
    if registers.machine.link is not None:
        if name in ("wzr", "xzr"):
            return 0
        if name[0] == "w":
            return registers[f"x{name[1:]}"] & 0xFFFFFFFF
        return registers[{"lr": "x30", "fp": "x29"}.get(name, name)]
    wide, size, shift = _x86_register(name)
    return registers[wide] >> shift & (1 << 8 * size) - 1


def _x86_register(name: str) -> tuple[str, int, int]:
    """The 64-bit register, the size, and the shift of a part of it."""
    if match := re.fullmatch(r"(r\d+)([dwb]?)", name):
        return match[1], {"": 8, "d": 4, "w": 2, "b": 1}[match[2]], 0
    if match := re.fullmatch(r"([re]?)([abcd]x|[sd]i|[sb]p)", name):
        return f"r{match[2]}", {"r": 8, "e": 4, "": 2}[match[1]], 0
    if match := re.fullmatch(r"([abcd])([lh])", name):
        return f"r{match[1]}x", 1, 8 if match[2] == "h" else 0
    if match := re.fullmatch(r"([sd]i|[sb]p)l", name):
        return f"r{match[1]}", 1, 0
    return name, 8, 0


# Decoding.


def decode_site(site: AcquireSite, image: Image) -> Acquire:
    """What the instruction at a site does."""
    code = image.read(site.rva, _PAIR_BYTES).tobytes()
    rows = listing(code, site.rva, image.machine)
    if not rows:
        return Acquire(site, Form.UNKNOWN, 0, 0)
    _, size, mnemonic, operands = rows[0]
    if image.machine is Machine.X86_64:
        return _x86(site, size, mnemonic.split()[-1], operands)
    return _aarch64(site, mnemonic, operands, rows, image)


def _x86(site: AcquireSite, size: int, mnemonic: str, text: str) -> Acquire:
    if mnemonic in ("call", "jmp"):
        exits = (site.rva + size,) if mnemonic == "call" else ()
        return Acquire(
            site, Form.CALL, size, _OPAQUE_SIZE[Machine.X86_64], pointer="rdi", exits=exits,
            is_tail_call=mnemonic == "jmp", through=_through(text), is_x86=True,
        )  # fmt: skip
    operand, width = _x86_memory(text), next((w for n, w in _X86_WIDTHS.items() if text.find(f"{n} ptr") >= 0), 4)
    width = 8 if "qword ptr" in text else 4 if "dword ptr" in text else width
    others = [part.strip() for part in text.split(",") if "[" not in part]
    register = others[0] if others else ""
    if operand is None:
        return Acquire(site, Form.UNKNOWN, size, 0)
    accumulator = {1: "al", 2: "ax", 4: "eax", 8: "rax"}[width]
    match mnemonic:
        case "cmpxchg":
            return Acquire(
                site, Form.COMPARE, size, width, operand, stores=register, expects=accumulator, result=accumulator
            )  # fmt: skip
        case "xchg":
            return Acquire(site, Form.EXCHANGE, size, width, operand, stores=register, result=register)
        case "bts":
            return Acquire(site, Form.BIT, size, width, operand)
        case "xadd" if site.turn is not None:
            return Acquire(site, Form.TICKET, size, width, operand, stores=register, result=register)
    return Acquire(site, Form.UNKNOWN, size, 0)


def _through(text: str) -> Operand | str:
    """The operand of a call or jump: an address is no pointer."""
    operand = _x86_memory(text)
    return operand if operand is not None else "" if text.startswith("0x") else text


def _x86_memory(text: str) -> Operand | None:
    match = re.search(r"(?:(fs|gs):)?\[([^\]]*)\]", text)
    if match is None:
        return None
    terms: list[tuple[str, int]] = []
    displacement = 0
    for sign, term in re.findall(r"([+-]?)\s*([\w*]+(?:\s*\*\s*\d+)?)", match[2]):
        factor = -1 if sign == "-" else 1
        if re.fullmatch(r"0x[0-9a-f]+|\d+", term):
            displacement += factor * int(term, 0)
        else:
            name, _, scale = term.replace(" ", "").partition("*")
            terms.append((name, int(scale or "1")))
    return Operand(match[1] or "", tuple(terms), displacement)


def _aarch64(
    site: AcquireSite, mnemonic: str, text: str, rows: tuple[tuple[int, int, str, str], ...], image: Image
) -> Acquire:
    if mnemonic in ("bl", "blr", "b", "br"):
        return _aarch64_call(site, mnemonic, text, image)
    match = re.search(r"\[(\w+)(?:, #(0x[0-9a-f]+|\d+))?\]", text)
    if match is None:
        return Acquire(site, Form.UNKNOWN, 4, 0)
    operand = Operand("", ((match[1], 1),), int(match[2] or "0", 0))
    first, *rest = [part.strip() for part in text.split(",") if "[" not in part]
    width = 1 if mnemonic.endswith("b") else 2 if mnemonic.endswith("h") else 8 if first[0] == "x" else 4
    if mnemonic.startswith("cas") and rest:
        return Acquire(site, Form.COMPARE, 4, width, operand, stores=rest[0], expects=first, result=first)
    if mnemonic.startswith("swp") and rest:
        return Acquire(site, Form.EXCHANGE, 4, width, operand, stores=first, result=rest[0])
    if mnemonic.startswith("ldset") and rest:
        return Acquire(site, Form.BIT, 4, width, operand, stores=first, result=rest[0])
    if mnemonic.startswith("ldadd") and rest and site.turn is not None:
        return Acquire(site, Form.TICKET, 4, width, operand, stores=first, result=rest[0])
    if re.match(r"ldax?r", mnemonic):
        return _exclusive(site, width, operand, rows)
    return Acquire(site, Form.UNKNOWN, 4, 0)


def _exclusive(site: AcquireSite, width: int, operand: Operand, rows: tuple[tuple[int, int, str, str], ...]) -> Acquire:
    """From the load-exclusive to its store: where a thread comes out is after the store, or by a branch before."""
    leaves: list[int] = []
    for address, size, mnemonic, text in rows[1:]:
        if mnemonic.startswith("st") and "xr" in mnemonic:
            status = text.split(",")[0].strip()
            exits = (address + size, *leaves)
            return Acquire(site, Form.EXCLUSIVE, 4, width, operand, result=status, exits=exits)
        if mnemonic.startswith(("b.", "cb", "tb")):
            leaves.append(int(text.rsplit("#", 1)[-1], 0))
    return Acquire(site, Form.UNKNOWN, 4, 0)


def _aarch64_call(site: AcquireSite, mnemonic: str, text: str, image: Image) -> Acquire:
    exits = (site.rva + 4,) if mnemonic in ("bl", "blr") else ()
    is_tail = not exits
    if text.startswith("#") and not site.callee:
        code = image.read(int(text[1:], 0), 24)
        pointer = aarch64.outline_atomic_pointer(code)
        if pointer is not None:
            return _helper(site, exits, is_tail, pointer, code.tobytes())
    return Acquire(
        site, Form.CALL, 4, _OPAQUE_SIZE[Machine.AARCH64], pointer="x0", exits=exits, is_tail_call=is_tail,
        through=text if mnemonic in ("blr", "br") else "",
    )  # fmt: skip


def _helper(site: AcquireSite, exits: tuple[int, ...], is_tail: bool, pointer: int, code: bytes) -> Acquire:
    """An outline-atomics helper, by the LSE instruction in it; the size stands in its top bits."""
    words = [int.from_bytes(code[i : i + 4], "little") for i in range(0, 24, 4)]
    word = next((w for w in words if w & 0x3FA07C00 == 0x08A07C00 or w & 0x3F200C00 == 0x38200000), 0)
    width = 1 << (word >> 30)
    register = f"x{pointer}"
    if pointer == 2:
        form, stores, expects = Form.COMPARE, "x1", "x0"
    else:
        forms = {0x8: Form.EXCHANGE, 0x3: Form.BIT, **({0x0: Form.TICKET} if site.turn is not None else {})}
        form = forms.get(word >> 12 & 0xF, Form.UNKNOWN)
        stores, expects = "x0", ""
    return Acquire(
        site, form, 4, width, pointer=register, stores=stores, expects=expects, result="x0", exits=exits,
        is_tail_call=is_tail,
    )  # fmt: skip
