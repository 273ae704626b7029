"""What is traced: processes, their threads and memory, and the breakpoints in it.

Owns: the memory of a tracee, breakpoints in it, and what is known of each thread.
Takes: ids. Gives: values; every breakpoint can be taken out, and is when its scope ends.
Must never: decide what runs next (that is `session`), or read a register of a running thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from forkproof.probe import ptrace
from forkproof.probe.ptrace import Hidden, Machine, Registers, Request, Status

FORKS: Final = {
    "x86_64": {56: "clone", 57: "fork", 58: "vfork", 435: "clone3"},
    "aarch64": {220: "clone", 435: "clone3"},
}
"""System calls that make processes (and threads), by number."""
FUTEX: Final = {"x86_64": 202, "aarch64": 98}
CLONE_VM: Final = 0x100


def _opened(pid: int) -> int:
    """/proc/PID/mem; -1 for a process that has been killed meanwhile: reading from it fails like unmapped memory."""
    try:
        return os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise Hidden(pid) from error
    except (FileNotFoundError, ProcessLookupError):
        return -1


class Memory:
    """One address space: read, written, and with breakpoints in it.

    Threads of a process share it, and so does a child of vfork until it execs; a fork's child has a copy, in which
    the breakpoints are too.
    """

    def __init__(self, pid: int, machine: Machine) -> None:
        self.pid, self.machine = pid, machine
        self._file = _opened(pid)
        self._breakpoints: dict[int, Breakpoint] = {}
        self._gone: dict[int, bytes] = {}
        """Where breakpoints were, and what is there now."""

    def close(self) -> None:
        """Give the file back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def copy_for(self, pid: int) -> Memory:
        """The memory of a child that was just forked from this one.

        The fork may have happened while a breakpoint was lifted for some thread to go over it, or before one was taken
        out: what is written there, not what is remembered here, tells what the child has.
        """
        child = Memory(pid, self.machine)
        child._breakpoints.update(self._breakpoints)
        child._gone.update(self._gone)
        for address, point in self._breakpoints.items():
            child._make_sure(address, self.machine.trap[: len(point.original)])
        for address, original in self._gone.items():
            child._make_sure(address, original)
        return child

    def _make_sure(self, address: int, wanted: bytes) -> None:
        with suppress(OSError):
            if os.pread(self._file, len(wanted), address) != wanted:
                self._write(address, wanted)

    def read(self, address: int, size: int) -> bytes:
        """Bytes as the program would see them; fewer, or none, where nothing is mapped."""
        try:
            raw = bytearray(os.pread(self._file, size, address))
        except (OSError, OverflowError):
            return b""
        for at, point in self._breakpoints.items():
            if address - len(point.original) < at < address + len(raw):
                for index, byte in enumerate(point.original):
                    if 0 <= at + index - address < len(raw):
                        raw[at + index - address] = byte
        return bytes(raw)

    def word(self, address: int, size: int = 8) -> int | None:
        """A little-endian word; None where nothing is mapped."""
        raw = self.read(address, size)
        return int.from_bytes(raw, "little") if len(raw) == size else None

    def set_word(self, address: int, value: int, size: int) -> bool:
        """Change a word of the program's data; false where that is not possible, or other processes would see it."""
        if self.is_shared(address):
            return False
        try:
            self._write(address, value.to_bytes(size, "little"))
        except OSError:
            return False
        return True

    def is_shared(self, address: int) -> bool:
        """What is there belongs to other processes too (MAP_SHARED); true as well where nobody can tell."""
        with suppress(OSError):
            for line in Path(f"/proc/{self.pid}/maps").read_text(errors="surrogateescape").splitlines():
                place, rights, *_ = line.split(maxsplit=2)
                first, _, end = place.partition("-")
                if int(first, 16) <= address < int(end, 16):
                    return rights.endswith("s")
        return True

    def _write(self, address: int, raw: bytes) -> None:
        os.pwrite(self._file, raw, address)

    # ---- breakpoints -----------------------------------------------------------------------

    @property
    def breakpoints(self) -> tuple[int, ...]:
        """Where they are."""
        return tuple(sorted(self._breakpoints))

    def breakpoint_at(self, address: int) -> Breakpoint | None:
        """The breakpoint at an address."""
        return self._breakpoints.get(address)

    def had_breakpoint(self, address: int) -> bool:
        """There was one, and a thread may have met it before it was taken out."""
        return address in self._gone

    def insert(self, address: int, exits: tuple[int, ...] = ()) -> bool:
        """Put a breakpoint there; false where nothing is mapped. `exits`: see `Breakpoint`."""
        if address in self._breakpoints:
            return True
        trap = self.machine.trap
        original = self.read(address, len(trap))
        if len(original) != len(trap):
            return False
        self._breakpoints[address] = Breakpoint(original, exits)
        self._gone.pop(address, None)
        with suppress(OSError):
            self._write(address, trap)
            return True
        del self._breakpoints[address]
        return False

    def remove(self, address: int) -> None:
        """Take it out; nothing to do where there is none, or no memory any more."""
        point = self._breakpoints.pop(address, None)
        if point is not None:
            self._gone[address] = point.original
            with suppress(OSError):
                self._write(address, point.original)

    def clear(self) -> None:
        """Take all of them out."""
        for address in self.breakpoints:
            self.remove(address)

    @contextmanager
    def breakpoints_at(self, addresses: tuple[int, ...]) -> Iterator[None]:
        """Breakpoints for the length of a block; those that were there before stay."""
        fresh = [a for a in addresses if a not in self._breakpoints and self.insert(a)]
        try:
            yield
        finally:
            for address in fresh:
                self.remove(address)

    @contextmanager
    def lifted(self, address: int) -> Iterator[None]:
        """Without the breakpoint at this address, while one thread goes over it."""
        point = self._breakpoints.get(address)
        self.remove(address)
        try:
            yield
        finally:
            if point is not None:
                self.insert(address, point.exits)


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """What was there before. `exits` are where a thread that goes over it is caught again, instead of being
    single-stepped: between a load-exclusive and its store-exclusive any stop makes the store fail, for ever."""

    original: bytes
    exits: tuple[int, ...] = ()


@dataclass(slots=True)
class Thread:
    """One thread of a traced process."""

    tid: int
    process: Process
    is_stopped: bool = True
    is_frozen: bool = False
    """Not to be resumed, whatever happens, until it is thawed."""
    is_listening: bool = False
    """In a group-stop."""
    follows_syscalls: bool = False
    deliver: list[ptrace.Signal] = field(default_factory=list)
    """Signals that it gets when it goes on."""
    at_signal: int = 0
    """The signal in whose delivery it has stopped, a breakpoint's SIGTRAP too: only from there can it get another."""
    syscall: ptrace.SyscallStop | None = None
    """The system call that it is in, where those are followed."""
    _registers: Registers | None = None

    @property
    def is_leader(self) -> bool:
        """The first thread of its process."""
        return self.tid == self.process.pid

    @property
    def registers(self) -> Registers:
        """Of the stopped thread; read once for each stop."""
        if self._registers is None:
            self._registers = ptrace.registers(self.tid, self.process.memory.machine)
        return self._registers

    def set_registers(self, wanted: Registers) -> None:
        """Change them."""
        ptrace.set_registers(self.tid, wanted)
        self._registers = wanted

    def go(self, how: Request) -> None:
        """Set it running, without a signal."""
        self._set_running()
        ptrace.resume(self.tid, how)

    def go_with_signal(self, how: Request) -> None:
        """The same with the first signal that it is to get, if it can get one from this stop."""
        if not self.at_signal or not self.deliver:
            self.go(how)
            return
        wanted = self.deliver.pop(0)
        if wanted.number != self.at_signal:
            ptrace.set_signal(self.tid, wanted)
        self._set_running()
        ptrace.resume(self.tid, how, wanted.number)

    def _set_running(self) -> None:
        self._registers = None
        self.is_stopped = self.is_listening = False

    def noted_stop(self, at_signal: int = 0) -> None:
        """It has stopped."""
        self._registers = None
        self.is_stopped, self.at_signal = True, at_signal


@dataclass(slots=True)
class Process:
    """One traced process."""

    pid: int
    parent: int | None
    memory: Memory
    threads: dict[int, Thread] = field(default_factory=dict)
    ended: Status | None = None
    execs: int = 0

    @property
    def others(self) -> list[Thread]:
        """Threads other than the leader."""
        return [t for t in self.threads.values() if not t.is_leader]

    @property
    def command(self) -> tuple[str, ...]:
        """Its command line, as /proc has it now."""
        with suppress(OSError):
            raw = Path(f"/proc/{self.pid}/cmdline").read_bytes()
            return tuple(part.decode("utf-8", "backslashreplace") for part in raw.split(b"\0")[:-1])
        return ()

    @property
    def is_alive(self) -> bool:
        """It has not been seen to end."""
        return self.ended is None


@dataclass(frozen=True, slots=True)
class Where:
    """What /proc says a thread is doing: the system call that it is blocked in, or that it runs."""

    tid: int
    state: str
    """R, S, D, t, Z, …: the letter of /proc/PID/stat."""
    syscall: int | None
    """None while it runs, or outside a system call."""
    arguments: tuple[int, ...] = ()
    sp: int = 0
    pc: int = 0


def where(pid: int, tid: int) -> Where | None:
    """Ask /proc, which does not disturb the thread; None when it is gone."""
    folder = Path(f"/proc/{pid}/task/{tid}")
    try:
        state = (folder / "stat").read_text(errors="replace").rpartition(") ")[2][:1]
        words = (folder / "syscall").read_text().split()
    except OSError:
        return None
    if len(words) < 9 or words[0] == "-1":
        return Where(tid, state, None)
    numbers = [int(word, 16) for word in words[1:9]]
    return Where(tid, state, int(words[0]), tuple(numbers[:6]), numbers[6], numbers[7])
