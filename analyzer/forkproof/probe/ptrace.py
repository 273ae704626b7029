"""ptrace(2) for x86-64 and AArch64, typed.

Owns: the requests, the decoding of wait statuses, register sets. Everything numeric of ptrace stands here.
Takes: thread ids. Gives: `Status`, `Registers`, `SyscallStop`.
Must never: keep a state of a tracee, or be called from two OS threads: the kernel ties tracees to the thread that
      seized them, and answers ESRCH to every other; each request asserts it.

Source: ptrace(2), linux/ptrace.h, asm/ptrace.h of both machines.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Final

from forkproof.errors import EXIT_INPUT, ForkproofError


class Request(IntEnum):
    """The requests that are used (linux/ptrace.h)."""

    CONT = 7
    SINGLESTEP = 9
    DETACH = 17
    SYSCALL = 24
    GETEVENTMSG = 0x4201
    GETSIGINFO = 0x4202
    SETSIGINFO = 0x4203
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    LISTEN = 0x4208
    GET_SYSCALL_INFO = 0x420E


class Event(IntEnum):
    """PTRACE_EVENT_*: why a tracee stopped by itself."""

    FORK = 1
    VFORK = 2
    CLONE = 3
    EXEC = 4
    VFORK_DONE = 5
    EXIT = 6
    STOP = 128


OPTIONS: Final = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 20
"""TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, TRACEEXEC and EXITKILL: no tracee outlives its tracer."""
WALL: Final = 0x40000000
"""__WALL: children of every kind, threads included."""
_NT_PRSTATUS: Final = 1
_SYSCALL_TRAP: Final = signal.SIGTRAP | 0x80
_GROUP_STOPS: Final = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})

_FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
_SIGINFO: Final = 128
"""Bytes of a siginfo_t."""


class PtraceDenied(ForkproofError):
    """The kernel refuses to trace."""

    exit_code = EXIT_INPUT

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: the kernel does not let this process trace another (EPERM)",
            next_step="""\
A probe runs the program as its own child and needs ptrace(2) for it. What usually forbids that:
    a container      docker run --cap-add=SYS_PTRACE (and --security-opt seccomp=unconfined before Docker 19.03);
                     Kubernetes: securityContext.capabilities.add: ["SYS_PTRACE"]
    Yama             sysctl kernel.yama.ptrace_scope prints 3: nobody may trace until the next boot; 2: only root
    a setuid program it loses its privileges under a tracer that is not root: run forkproof as root
    another tracer   the program is already traced (gdb, strace), or forkproof runs under one
  forkproof scan needs none of this.""",
        )


class Hidden(ForkproofError):
    """A tracee's memory cannot be read, though it is traced."""

    exit_code = EXIT_INPUT

    def __init__(self, pid: int) -> None:
        super().__init__(
            f"the memory of process {pid} cannot be read: the program made itself undumpable (PR_SET_DUMPABLE)",
            next_step="Run forkproof as root, or with CAP_SYS_PTRACE, to probe a program that hides its memory.",
        )


class Gone(Exception):
    """The tracee does not exist any more, or is not stopped: it was killed meanwhile."""


class Kind(Enum):
    """What a wait status says."""

    EXITED = "exited"
    KILLED = "killed"
    EVENT = "event"
    SYSCALL = "syscall"
    GROUP_STOP = "group-stop"
    SIGNAL = "signal"


@dataclass(frozen=True, slots=True)
class Status:
    """One wait status, decoded: `code` is the exit code, the signal, or the event."""

    tid: int
    kind: Kind
    code: int

    @property
    def is_end(self) -> bool:
        """The thread is gone."""
        return self.kind in (Kind.EXITED, Kind.KILLED)

    @property
    def event(self) -> Event | None:
        """The ptrace event, if it is one."""
        return Event(self.code) if self.kind is Kind.EVENT else None


def decode(tid: int, status: int) -> Status:
    """ptrace(2), "Stopped states"."""
    if os.WIFEXITED(status):
        return Status(tid, Kind.EXITED, os.WEXITSTATUS(status))
    if os.WIFSIGNALED(status):
        return Status(tid, Kind.KILLED, os.WTERMSIG(status))
    stop, event = status >> 8 & 0xFF, status >> 16
    if event == Event.STOP:
        kind = Kind.GROUP_STOP if stop in _GROUP_STOPS else Kind.EVENT
        return Status(tid, kind, stop if kind is Kind.GROUP_STOP else Event.STOP)
    if event:
        return Status(tid, Kind.EVENT, event)
    if stop == _SYSCALL_TRAP:
        return Status(tid, Kind.SYSCALL, 0)
    return Status(tid, Kind.SIGNAL, stop)


# Requests.

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_owner: list[int] = []
"""The OS thread that seized first, in this process."""


def owned() -> None:
    """Claim ptrace for this OS thread, or assert that it has it."""
    me = threading.get_native_id()
    if not _owner:
        _owner.append(me)
    assert _owner[0] == me, "ptrace requests come from one OS thread only"


def disown() -> None:
    """No tracees are left: another OS thread may be the tracer next."""
    _owner.clear()


def _call(request: Request, tid: int, address: int = 0, data: int = 0) -> None:
    owned()
    if _libc.ptrace(request, tid, address, data) != -1:
        return
    code = ctypes.get_errno()
    if code == errno.ESRCH:
        raise Gone(tid)
    if code == errno.EPERM:
        raise PtraceDenied(f"ptrace {request.name} of {tid}")
    raise OSError(code, f"ptrace {request.name} of {tid}: {os.strerror(code)}")


def seize(tid: int) -> None:
    """Attach without stopping; what it creates is attached too, and dies with us."""
    _call(Request.SEIZE, tid, 0, OPTIONS)


def interrupt(tid: int) -> None:
    """Ask a running tracee to stop."""
    _call(Request.INTERRUPT, tid)


def listen(tid: int) -> None:
    """Leave a tracee in its group-stop, but hear of its end."""
    _call(Request.LISTEN, tid)


def resume(tid: int, how: Request, deliver: int = 0) -> None:
    """CONT, SYSCALL or SINGLESTEP, delivering a signal or none."""
    _call(how, tid, 0, deliver)


def detach(tid: int, deliver: int = 0) -> None:
    """Let go of a stopped tracee."""
    _call(Request.DETACH, tid, 0, deliver)


def event_message(tid: int) -> int:
    """The new thread's id, or the former id after exec."""
    value = ctypes.c_ulong()
    _call(Request.GETEVENTMSG, tid, 0, ctypes.addressof(value))
    return value.value


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal that a thread is about to get, with all that the kernel says of it."""

    number: int
    information: bytes
    """siginfo_t. Handlers read it: glibc's own for setuid() does nothing unless it comes from this process."""

    @property
    def is_fault(self) -> bool:
        """The thread's own instruction caused it, and will again."""
        return self.number in _FAULTS and int.from_bytes(self.information[8:12], "little", signed=True) > 0


def signal_of(tid: int, number: int) -> Signal:
    """The signal of a signal-delivery-stop."""
    raw = ctypes.create_string_buffer(_SIGINFO)
    _call(Request.GETSIGINFO, tid, 0, ctypes.addressof(raw))
    return Signal(number, raw.raw)


def set_signal(tid: int, wanted: Signal) -> None:
    """In a signal-delivery-stop of another signal: what the one that is delivered instead says of itself."""
    raw = ctypes.create_string_buffer(wanted.information, _SIGINFO)
    _call(Request.SETSIGINFO, tid, 0, ctypes.addressof(raw))


def wait(tid: int, *, block: bool) -> Status | None:
    """The next status of a thread (-1: of any child); None when there is none yet."""
    try:
        found, status = os.waitpid(tid, WALL | (0 if block else os.WNOHANG))
    except ChildProcessError:
        return None
    return decode(found, status) if found else None


def become_subreaper(*, wanted: bool) -> None:
    """Daemons whose parent exits become our children, so that they can be reaped: PR_SET_CHILD_SUBREAPER."""
    _libc.prctl(36, int(wanted), 0, 0, 0)


def forbid_randomized_addresses() -> None:
    """For the program that this process is about to exec: personality(ADDR_NO_RANDOMIZE)."""
    _libc.personality(0x0040000)


# Registers.


@dataclass(frozen=True, slots=True)
class Machine:
    """What differs between the machines, as far as a tracer sees it."""

    name: str
    registers: tuple[str, ...]
    """Of the general register set, in its order."""
    pc: str
    sp: str
    link: str | None
    """Where a call leaves its return address; None: on the stack."""
    result: str
    arguments: tuple[str, ...]
    trap: bytes
    """A breakpoint instruction."""
    trap_size_in_pc: int
    """How far the pc is past the breakpoint when it has trapped."""
    dwarf: tuple[str, ...]
    """Register names by DWARF number."""


_X86_64: Final = Machine(
    name="x86_64",
    registers=(
        "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
        "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
    ),
    pc="rip", sp="rsp", link=None, result="rax",
    arguments=("rdi", "rsi", "rdx", "rcx", "r8", "r9"),
    trap=b"\xcc", trap_size_in_pc=1,
    dwarf=("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip"),
)  # fmt: skip
_AARCH64: Final = Machine(
    name="aarch64",
    registers=(*(f"x{n}" for n in range(31)), "sp", "pc", "pstate"),
    pc="pc", sp="sp", link="x30", result="x0",
    arguments=tuple(f"x{n}" for n in range(8)),
    trap=b"\x00\x00\x20\xd4", trap_size_in_pc=0,
    dwarf=(*(f"x{n}" for n in range(31)), "sp"),
)  # fmt: skip
MACHINES: Final = {machine.name: machine for machine in (_X86_64, _AARCH64)}


def native() -> Machine:
    """The machine that this runs on: a tracee is of the same."""
    name = platform.machine()
    if name not in MACHINES:
        raise ForkproofError(f"programs of {name} cannot be probed", next_step="Probes exist for x86_64 and aarch64.")
    return MACHINES[name]


@dataclass(frozen=True, slots=True)
class Registers:
    """The general registers of a stopped thread."""

    machine: Machine
    values: tuple[int, ...]

    def __getitem__(self, name: str) -> int:
        return self.values[self.machine.registers.index(name)]

    @property
    def pc(self) -> int:
        """Where it is."""
        return self[self.machine.pc]

    @property
    def sp(self) -> int:
        """The stack pointer."""
        return self[self.machine.sp]

    def with_pc(self, pc: int) -> Registers:
        """The same, elsewhere."""
        values = list(self.values)
        values[self.machine.registers.index(self.machine.pc)] = pc
        return replace(self, values=tuple(values))


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def registers(tid: int, machine: Machine) -> Registers:
    """Of a stopped thread."""
    count = len(machine.registers)
    values = (ctypes.c_uint64 * count)()
    vector = _Vector(ctypes.addressof(values), ctypes.sizeof(values))
    _call(Request.GETREGSET, tid, _NT_PRSTATUS, ctypes.addressof(vector))
    return Registers(machine, tuple(values))


def set_registers(tid: int, wanted: Registers) -> None:
    """All of them at once."""
    values = (ctypes.c_uint64 * len(wanted.values))(*wanted.values)
    vector = _Vector(ctypes.addressof(values), ctypes.sizeof(values))
    _call(Request.SETREGSET, tid, _NT_PRSTATUS, ctypes.addressof(vector))


# System calls.


@dataclass(frozen=True, slots=True)
class SyscallStop:
    """Where in a system call a thread has stopped."""

    is_entry: bool
    number: int
    """At its entry."""
    arguments: tuple[int, ...]
    result: int
    """At its exit; negative for an error."""


def syscall_stop(tid: int) -> SyscallStop | None:
    """PTRACE_GET_SYSCALL_INFO (Linux 5.3); None outside a system call."""
    raw = ctypes.create_string_buffer(88)
    _call(Request.GET_SYSCALL_INFO, tid, len(raw), ctypes.addressof(raw))
    match raw.raw[0]:
        case 1:
            number, *arguments = struct.unpack_from("<7Q", raw.raw, 24)
            return SyscallStop(True, number, tuple(arguments), 0)
        case 2:
            return SyscallStop(False, -1, (), struct.unpack_from("<q", raw.raw, 24)[0])
    return None


def named(numbers: Iterable[int]) -> str:
    """Signals by their names, for messages."""
    return ", ".join(signal.Signals(n).name if n in set(signal.Signals) else str(n) for n in numbers)
