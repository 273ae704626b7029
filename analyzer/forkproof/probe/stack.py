"""Where a stopped thread is, and by which calls it came there.

Owns: the objects that are mapped in a process, the names of addresses in them, and unwinding.
Takes: a stopped `Thread`. Gives: `Address`es (object, rva), stacks of `model.Frame`, outermost first.
Must never: invent a frame: what cannot be unwound, or would lead to where no code is, ends the stack.
Wrong where: code has neither CFI nor a frame pointer and is not the innermost frame; where CFI is wrong.

A frame is found, in this order: by the CFI that covers its pc; for the innermost frame, as code that has not touched
the stack yet (a PLT stub, hand-written assembly at its start); by the frame pointer. A signal's frame is known by its
CFI, or on AArch64, whose kernel gives none, by the two instructions of its trampoline.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

import numpy as np

from forkproof.elf import unwind
from forkproof.elf.demangle import demangle
from forkproof.elf.image import Image, load, load_symbols
from forkproof.elf.names import FunctionNames
from forkproof.elf.tables import STT_FUNC, STT_IFUNC
from forkproof.errors import InputError
from forkproof.model import Frame
from forkproof.probe import cfi
from forkproof.probe.ptrace import Hidden
from forkproof.probe.tracee import Process, Thread

_DEPTH: Final = 128
_STT_OBJECT: Final = 1
_SIGRETURN_AARCH64: Final = bytes.fromhex("681180d2010000d4")
"""mov x8, #139; svc #0"""
_CONTEXT_AARCH64: Final = 128 + 176 + 8
"""From the stack pointer in a signal's frame to the saved x0: siginfo, the head of ucontext, fault_address."""
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """A place in an object, as objdump prints it."""

    object: str
    """Path of the file; "[vdso]" and the like, or empty where no object is mapped."""
    rva: int


class Module:
    """One ELF file with what is needed to name and unwind its code. Read once, shared by all processes and runs."""

    def __init__(self, path: str, image: Image, known: Mapping[int, str]) -> None:
        self.path, self.image, self._known = path, image, known
        self.name = image.soname or path.rsplit("/", 1)[-1]

    @classmethod
    def of(cls, path: str) -> Module:
        """The module of a file; raises InputError."""
        return cls.named(path, frozenset())

    @classmethod
    def named(cls, path: str, known: frozenset[tuple[int, str]]) -> Module:
        """The same, with names for some of its functions."""
        stat = Path(path).stat()
        return _module(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size), known)

    @cached_property
    def table(self) -> cfi.Table:
        """Call frame information."""
        return cfi.Table(self.image)

    @cached_property
    def _names(self) -> FunctionNames:
        return FunctionNames(self.image, self.path, _debug_file)

    @cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """Start and end of every function: unwind tables first, symbols where these are silent."""
        extents = unwind.extents(self.image)
        starts = dict(zip(extents.start.tolist(), (extents.start + extents.size).tolist(), strict=True))
        for table in (self.image.dynamic_symbols, self.image.static_symbols):
            chosen = np.flatnonzero(np.isin(table.type, (STT_FUNC, STT_IFUNC)) & table.defined)
            for value, size in zip(table.value[chosen].tolist(), table.size[chosen].tolist(), strict=True):
                starts.setdefault(value, value + size)
        ordered = sorted(starts.items())
        return [s for s, _ in ordered], [e for _, e in ordered]

    def function(self, rva: int) -> tuple[str, int]:
        """Name and start of the function that contains an address; a nameless one is called by its start."""
        starts, ends = self._starts
        for index in range(bisect_right(starts, rva) - 1, max(bisect_right(starts, rva) - 9, -1), -1):
            if index >= 0 and rva < max(ends[index], starts[index] + 1):
                start = starts[index]
                return self._known.get(start) or demangle(self._names.name(start)), start
        return f"sub_{rva:x}", rva

    @cached_property
    def _data(self) -> tuple[list[int], list[tuple[int, str]]]:
        """Start of every named variable, and its size and name."""
        found: dict[int, tuple[int, str]] = {}
        for table in (self.image.static_symbols, self.image.dynamic_symbols):
            for index in np.flatnonzero((table.type == _STT_OBJECT) & table.defined).tolist():
                found.setdefault(int(table.value[index]), (int(table.size[index]), table.names[index]))
        return sorted(found), [found[start] for start in sorted(found)]

    def data_name(self, rva: int) -> str:
        """A variable, and how far into it an address is; a nameless one by its address."""
        starts, named = self._data
        index = bisect_right(starts, rva) - 1
        if index < 0 or rva >= starts[index] + max(named[index][0], 1):
            return f"data_{rva:x}"
        name, offset = demangle(named[index][1]), rva - starts[index]
        return f"{name}+0x{offset:x}" if offset else name


@lru_cache(maxsize=512)
def _module(path: str, _stamp: tuple[int, int, int], known: frozenset[tuple[int, str]]) -> Module:
    """The stamp is what tells a file from one that takes its place."""
    return Module(path, load(path), dict(known))


def _debug_file(path: str) -> Path | None:
    found = Path(path)
    return found if found.is_file() else None


@dataclass(frozen=True, slots=True)
class Region:
    """A module in one address space."""

    low: int
    high: int
    bias: int
    path: str
    is_code: bool


class Modules:
    """All modules that any traced process maps."""

    def __init__(self, known: Mapping[tuple[str, int], str] | None = None) -> None:
        self._known = known or {}
        self._modules: dict[str, Module | None] = {}
        self._maps: dict[int, list[Region]] = {}

    def of(self, process: Process, pc: int) -> tuple[Module, int] | None:
        """The module at an address, and the address in it."""
        found = self._mapping(process, pc)
        if found is None or not found.path:
            return None
        module = self._module(process, found)
        return (module, pc - found.bias) if module is not None else None

    def is_code(self, process: Process, pc: int) -> bool:
        """Something executable is mapped there."""
        found = self._mapping(process, pc)
        return found is not None and found.is_code

    def address(self, process: Process, value: int) -> Address:
        """A run-time address as a place in an object, data included; not one in a file that is no object.

        Memory that processes share is mapped from /dev/zero, a memfd or some file.
        """
        found = self._mapping(process, value)
        if found is None or not found.path or self._module(process, found) is None:
            return Address("", value)
        return Address(found.path, value - found.bias)

    def runtime(self, process: Process, path: str, rva: int) -> int | None:
        """Where a place of an object is in this process."""
        for fresh in (False, True):
            if fresh:
                self.refresh(process)
            for mapping in self._maps.get(process.pid, ()):
                if mapping.path == path:
                    return mapping.bias + rva
        return None

    def refresh(self, process: Process) -> None:
        """Read the map of a process again."""
        self._maps[process.pid] = list(_regions(process, self._file))

    def _mapping(self, process: Process, pc: int) -> Region | None:
        for fresh in (False, True):
            if fresh or process.pid not in self._maps:
                self.refresh(process)
            table = self._maps[process.pid]
            index = bisect_right([m.low for m in table], pc) - 1
            if index >= 0 and pc < table[index].high:
                return table[index]
        return None

    def _file(self, path: str) -> Module | None:
        if path not in self._modules:
            try:
                known = frozenset((rva, name) for (where, rva), name in self._known.items() if where == path)
                self._modules[path] = Module.named(path, known)
            except (InputError, OSError):
                self._modules[path] = None
        return self._modules[path]

    def _module(self, process: Process, found: Region) -> Module | None:
        if found.path.startswith("/"):
            return self._file(found.path)
        if found.path not in self._modules:
            raw = process.memory.read(found.low, found.high - found.low)
            try:
                self._modules[found.path] = Module(found.path, load_symbols(raw, Path(found.path)), {})
            except InputError:
                self._modules[found.path] = None
        return self._modules[found.path]

    # ---- stacks ----------------------------------------------------------------------------

    def frame(self, process: Process, pc: int, *, is_return: bool) -> Frame:
        """An address as a frame of a report."""
        found = self.of(process, pc - 1 if is_return else pc)
        if found is None:
            return Frame(self.address(process, pc).object or "?", f"{pc:#x}", 0)
        module, rva = found
        name, start = module.function(rva)
        return Frame(module.name, name, rva + (1 if is_return else 0) - start)

    def stack(self, thread: Thread, depth: int = _DEPTH) -> tuple[Frame, ...]:
        """The stack of a stopped thread, outermost frame first."""
        frames = [self.frame(thread.process, pc, is_return=r) for pc, r in self.walk(thread, depth)]
        return tuple(reversed(frames))

    def walk(self, thread: Thread, depth: int = _DEPTH) -> Iterator[tuple[int, bool]]:
        """(pc, whether it is a return address) of each frame, innermost first."""
        machine = thread.registers.machine
        values = dict(zip(machine.registers, thread.registers.values, strict=True))
        frame = {n: values[name] for n, name in enumerate(machine.dwarf)}
        pc, is_return = thread.registers.pc, False
        sp = machine.dwarf.index(machine.sp)
        for level in range(depth):
            yield pc, is_return
            step = self._caller(thread.process, pc, frame, is_innermost=level == 0, is_return=is_return)
            if step is None:
                return
            following, caller_pc, caller_is_return = step
            if not self.is_code(thread.process, caller_pc):  # the end, or CFI that is wrong
                return
            # The frames of calls lie above one another; a leaf, also one that a signal interrupted, may have none.
            if is_return and following.get(sp, 0) <= frame.get(sp, 0):
                return
            pc, frame, is_return = caller_pc, following, caller_is_return

    def _caller(
        self, process: Process, pc: int, frame: dict[int, int], *, is_innermost: bool, is_return: bool
    ) -> tuple[dict[int, int], int, bool] | None:
        """Registers and pc of the caller, and whether that pc is a return address."""
        machine, read = process.memory.machine, process.memory.word
        sp = machine.dwarf.index(machine.sp)
        found = self.of(process, pc - 1 if is_return else pc)
        fde = found[0].table.at(found[1]) if found is not None else None
        if found is not None and fde is not None:
            try:
                rva = found[1] + (1 if is_return else 0)
                up = cfi.caller(fde, rva - 1 if is_return else rva, frame, read, sp)
            except cfi.Unknown:
                up = None
            if up is None:
                return None
            return up, up[fde.cie.return_register] & cfi.USER_BITS, not fde.cie.is_signal
        if machine.link is not None and process.memory.read(pc, 8) == _SIGRETURN_AARCH64:
            return _signal_frame(frame, sp, process)
        if is_innermost and (step := self._untouched(process, frame, sp)) is not None:
            return step
        return self._by_frame_pointer(process, frame, sp)

    def _untouched(self, process: Process, frame: dict[int, int], sp: int) -> tuple[dict[int, int], int, bool] | None:
        """The caller of code that has not touched the stack: the return address is where the call left it."""
        machine = process.memory.machine
        if machine.link is not None:
            link = frame[machine.dwarf.index(machine.link)] & cfi.USER_BITS
            return (dict(frame), link, True) if self.is_code(process, link) else None
        value = process.memory.word(frame[sp])
        if value is None or not self.is_code(process, value):
            return None
        return {**frame, sp: frame[sp] + 8}, value, True

    def _by_frame_pointer(
        self, process: Process, frame: dict[int, int], sp: int
    ) -> tuple[dict[int, int], int, bool] | None:
        machine, read = process.memory.machine, process.memory.word
        pointer = machine.dwarf.index("rbp" if machine.link is None else "x29")
        base = frame.get(pointer, 0)
        if base < frame.get(sp, 0):
            return None
        saved, back = read(base, 8), read(base + 8, 8)
        if saved is None or back is None or not self.is_code(process, back & cfi.USER_BITS):
            return None
        return {**frame, pointer: saved, sp: base + 16}, back & cfi.USER_BITS, True


def _signal_frame(frame: dict[int, int], sp: int, process: Process) -> tuple[dict[int, int], int, bool] | None:
    """What a signal interrupted, on AArch64: x0 to x30, sp and pc stand in its ucontext."""
    base = frame[sp] + _CONTEXT_AARCH64
    words = [process.memory.word(base + 8 * n) for n in range(33)]
    if any(word is None for word in words):
        return None
    registers = {n: word for n, word in enumerate(words[:32]) if word is not None}
    return registers, words[32] or 0, False


def _regions(process: Process, module: Callable[[str], Module | None]) -> Iterator[Region]:
    """The lines of /proc/PID/maps, in address order. What follows a file's last page without a file is its .bss."""
    try:
        lines = Path(f"/proc/{process.pid}/maps").read_text(errors="surrogateescape").splitlines()
    except PermissionError as error:
        raise Hidden(process.pid) from error
    except OSError:
        return
    last = Region(0, 0, 0, "", is_code=False)
    for line in lines:
        fields = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in fields[0].split("-"))
        path = fields[5].removesuffix(" (deleted)") if len(fields) > 5 else ""
        bias = 0
        if path.startswith("/"):
            bias = _bias(module(path), int(fields[2], 16), low)
        elif path == "[vdso]":
            bias = low
        elif path in ("", "[heap]") and _is_bss(module, last, low):
            path, bias = last.path, last.bias
        last = Region(low, high, bias, path if path.startswith(("/", "[vdso")) else "", is_code="x" in fields[1])
        yield last


def _bias(module: Module | None, offset: int, low: int) -> int:
    """Run-time address minus rva, from any mapping of a file: its segment tells."""
    for segment in module.image.segments if module is not None else ():
        if segment.offset & -_PAGE <= offset < segment.offset + max(segment.file_size, 1):
            return low - (segment.rva - (segment.offset - offset))
    return low - offset


def _is_bss(module: Callable[[str], Module | None], last: Region, low: int) -> bool:
    if low != last.high or not last.path.startswith("/"):
        return False
    found = module(last.path)
    return found is not None and any(s.rva <= low - last.bias < s.rva + s.memory_size for s in found.image.segments)
