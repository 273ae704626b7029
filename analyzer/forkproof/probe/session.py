"""Running traced processes: launch, wait, stop, go on, and leave nothing behind.

Owns: which threads run; the order of events; the end of everything that it started.
Takes: a command. Gives: `Stop`s, one at a time; the thread of a stop stays stopped until `resume`.
Must never: leave a stopped or running tracee when its scope ends, whatever ended it; know why somebody traces.

Three rules keep this simple. New processes and threads are traced from their first instruction, and are waited for
as soon as their parent's event tells of them, so that nobody meets a half-known thread. A thread that is frozen keeps
what happened to it until it is thawed. A breakpoint's pc is put back where the breakpoint is when the stop is seen,
so that "at a breakpoint" means the same on both machines, and going on goes over it.

Rejected: stopping all threads to go over a breakpoint. Another thread may run past it in that moment, unseen; what is
built on this only ever misses an opportunity by that, and it would cost every other thread two stops.

Once a program has been started, nothing is waited for without a limit: a thread that does not stop in time is left
running, or to stop when it can.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from forkproof.errors import InputError
from forkproof.probe import ptrace
from forkproof.probe.forkcalls import fork_call
from forkproof.probe.ptrace import Event, Gone, Kind, Request, Status
from forkproof.probe.tracee import Memory, Process, Thread, where

_Handler = Callable[[int, FrameType | None], object]
_POLL: Final = 0.02
"""Seconds after which children are asked for again, should another thread of this process eat a SIGCHLD."""
_STOP: Final = 5.0
"""Seconds that a thread may take to stop when it is asked to, or to come over one instruction. One that waits for its
child of vfork stops when that has gone on; one that ran past its breakpoint, as an emulator lets it, may never."""
_REAP: Final = 10.0
"""Seconds that killed processes may take to be gone: they are, in milliseconds, unless the machine stands still."""


class Reason(Enum):
    """Why a thread has stopped."""

    BREAKPOINT = "breakpoint"
    SYSCALL = "system call"
    """At its entry or its exit: `Thread.syscall` says which."""
    FORKED = "forked"
    CLONED = "cloned"
    EXECED = "execed"
    ENDED = "ended"
    """The thread is gone; it cannot be resumed."""
    SIGNALLED = "signalled"
    """It is about to get a signal, which it gets when resumed."""
    HALTED = "halted"
    """Its process was stopped by a signal, as by SIGSTOP."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A thread stopped, or ended."""

    thread: Thread
    reason: Reason
    code: int = 0
    """The signal, or the exit status."""
    child: Thread | None = None
    """What was forked or cloned, stopped at its first instruction."""
    is_vfork: bool = False


class _Interrupt:
    """Ctrl-C, remembered: Python loses a KeyboardInterrupt that is raised inside a callback, as of a weak reference."""

    def __init__(self) -> None:
        self._came = False
        self._before: _Handler | None = None

    def watch(self) -> None:
        """From now on; nothing to do where a signal means nothing to this thread, or to this process."""
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = before
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        assert self._before is not None
        self._before(number, frame)

    def unwatch(self) -> None:
        """As it was."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """KeyboardInterrupt, once, if one came and got lost."""
        if self._came:
            self._came = False
            raise KeyboardInterrupt


class Session:
    """A tree of traced processes; use as a context manager."""

    def __init__(self) -> None:
        self.machine = ptrace.native()
        self.processes: dict[int, Process] = {}
        self.threads: dict[int, Thread] = {}
        self.stops = 0
        """How often a tracee has stopped: the cost of a run."""
        self._queue: deque[Stop] = deque()
        self._kept: dict[int, Stop] = {}
        self._early: dict[int, Status] = {}
        self._mask: set[signal.Signals] = set()
        self._before: set[int] = set()
        self._interrupt = _Interrupt()

    def __enter__(self) -> Self:
        ptrace.owned()
        self._interrupt.watch()
        self._before = _children()
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD}))  # type: ignore[arg-type]
        ptrace.become_subreaper(wanted=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._kill_all()
        finally:
            for process in self.processes.values():
                process.memory.close()
            ptrace.become_subreaper(wanted=False)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            ptrace.disown()
            self._interrupt.unwatch()
        if kind is None:
            self._interrupt.check()

    def _kill_all(self) -> None:
        """Every process, and every process that escaped from the tracer and came back to its reaper."""
        deadline = time.monotonic() + _REAP
        for process in self.processes.values():
            if process.is_alive:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        while time.monotonic() < deadline:
            status = ptrace.wait(-1, block=False)
            if status is not None:
                continue
            left = _children() - self._before
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                return
            signal.sigtimedwait({signal.SIGCHLD}, _POLL)

    # ---- starting --------------------------------------------------------------------------

    def launch(self, command: Sequence[str], environment: Mapping[str, str], *, stdin: int, output: int) -> Process:
        """Start a program, traced, with fixed addresses; it is stopped before its first instruction, or killed already.

        Its child is made by fork, in a process that may have threads (numpy's): between fork and exec it runs only
        what is below, which takes no lock but Python's own, which it holds.
        """
        path = _found(command[0], environment)
        ready, go = os.pipe2(0)
        failed_read, failed_write = os.pipe2(os.O_CLOEXEC)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                os.close(go)
                os.read(ready, 1)
                for source, target in ((stdin, 0), (output, 1), (output, 2)):
                    os.dup2(source, target)
                os.closerange(3, failed_write)
                os.closerange(failed_write + 1, 4096)
                ptrace.forbid_randomized_addresses()
                signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                os.execve(path, list(command), dict(environment))  # noqa: S606 - a command that the user gave
            except OSError as error:
                os.write(failed_write, str(error.errno or 0).encode())
            finally:
                os._exit(127)
        os.close(ready)
        os.close(failed_write)
        try:
            ptrace.seize(pid)
            os.write(go, b"x")
            return self._launched(pid, path, failed_read)
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            os.close(go)
            os.close(failed_read)

    def _launched(self, pid: int, path: str, failed: int) -> Process:
        status = ptrace.wait(pid, block=True)
        while status is not None and status.event is not Event.EXEC and not status.is_end:
            ptrace.resume(pid, Request.CONT, status.code if status.kind is Kind.SIGNAL else 0)
            status = ptrace.wait(pid, block=True)
        if status is not None and status.is_end and (code := os.read(failed, 16)):
            step = "Give the command as you would to a shell: the program's path, then its arguments."
            if int(code) == errno.EACCES:
                step = "Make it executable: chmod +x; nothing runs from a file system that is mounted noexec."
            raise InputError(path, f"cannot be started: {os.strerror(int(code))}", next_step=step)
        process = self.processes[pid] = Process(pid, None, Memory(pid, self.machine))
        thread = self._add(process, pid)
        if status is not None and status.is_end:  # somebody killed it; execve had not failed
            self._queue.append(self._ended(thread, status))
        return process

    def _add(self, process: Process, tid: int) -> Thread:
        thread = process.threads[tid] = self.threads[tid] = Thread(tid, process)
        return thread

    # ---- waiting ---------------------------------------------------------------------------

    def wait(self, seconds: float) -> Stop | None:
        """The next stop; None when nothing happens for so long, or nothing is left that could."""
        deadline = time.monotonic() + seconds
        while True:
            self._interrupt.check()
            if self._queue:
                stop = self._queue.popleft()
                if self._is_stale(stop):
                    self.resume(stop.thread)
                    continue
                return stop
            status = ptrace.wait(-1, block=False)
            if status is not None:
                self._take(status)
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not self.threads:
                return None
            signal.sigtimedwait({signal.SIGCHLD}, min(left, _POLL))

    def _awaited(self, tid: int) -> Status | None:
        """The next status of one thread; None when there is none in `_STOP` seconds, or never will be.

        A process's first thread that has ended tells of it when the last of the others has: that is not waited for.
        """
        deadline = time.monotonic() + _STOP
        while (status := ptrace.wait(tid, block=False)) is None:
            has_news = signal.sigtimedwait({signal.SIGCHLD}, _POLL) is not None
            if not has_news and (time.monotonic() > deadline or not _may_stop(tid)):
                return ptrace.wait(tid, block=False)
        return status

    def _is_stale(self, stop: Stop) -> bool:
        """A breakpoint that was taken out while the stop waited in the queue."""
        thread = stop.thread
        if stop.reason is not Reason.BREAKPOINT or thread.tid not in self.threads:
            return False
        return thread.process.memory.breakpoint_at(thread.registers.pc) is None

    def _take(self, status: Status) -> None:
        """A status of whoever; what it means goes to the queue, or waits until its thread is thawed."""
        thread = self.threads.get(status.tid)
        if thread is None:
            self._early[status.tid] = status
            return
        self.stops += 1
        with suppress(Gone):
            stop = self._understood(thread, status)
            if stop is None:
                if not thread.is_frozen:
                    self.resume(thread)
            elif thread.is_frozen and stop.reason is not Reason.ENDED:
                self._kept[thread.tid] = stop
            else:
                self._queue.append(stop)

    def _understood(self, thread: Thread, status: Status) -> Stop | None:
        """What a status means; None for the echo of an interrupt."""
        if status.is_end:
            return self._ended(thread, status)
        thread.noted_stop(status.code if status.kind is Kind.SIGNAL else 0)
        match status.kind:
            case Kind.SYSCALL:
                return self._at_syscall(thread)
            case Kind.GROUP_STOP:
                return Stop(thread, Reason.HALTED, status.code)
            case Kind.SIGNAL:
                return self._signalled(thread, status.code)
        match status.event:
            case Event.FORK | Event.VFORK | Event.CLONE:
                return self._forked(thread, is_vfork=status.event is Event.VFORK)
            case Event.EXEC:
                return self._execed(thread)
        return None

    def _ended(self, thread: Thread, status: Status) -> Stop:
        thread.is_stopped = False
        self.threads.pop(thread.tid, None)
        self._kept.pop(thread.tid, None)
        thread.process.threads.pop(thread.tid, None)
        if not thread.process.threads:
            thread.process.ended = status
        return Stop(thread, Reason.ENDED, status.code if status.kind is Kind.EXITED else -status.code)

    def _at_syscall(self, thread: Thread) -> Stop | None:
        found = ptrace.syscall_stop(thread.tid)
        if found is None:
            return None
        if not found.is_entry and thread.syscall is not None:
            entry = thread.syscall
            found = ptrace.SyscallStop(False, entry.number, entry.arguments, found.result)
        thread.syscall = found
        return Stop(thread, Reason.SYSCALL)

    def _signalled(self, thread: Thread, number: int) -> Stop | None:
        memory, registers = thread.process.memory, thread.registers
        at = registers.pc - self.machine.trap_size_in_pc
        if number == signal.SIGTRAP and (memory.breakpoint_at(at) is not None or memory.had_breakpoint(at)):
            thread.set_registers(registers.with_pc(at))
            return Stop(thread, Reason.BREAKPOINT) if memory.breakpoint_at(at) is not None else None
        thread.deliver.append(ptrace.signal_of(thread.tid, number))
        return Stop(thread, Reason.SIGNALLED, number)

    def _forked(self, thread: Thread, *, is_vfork: bool) -> Stop:
        """Meet what was created, stopped at its first instruction."""
        tid = ptrace.event_message(thread.tid)
        status = self._early.pop(tid, None) or self._awaited(tid)
        pid = _process_of(tid)
        if pid == thread.process.pid:
            child = self._add(thread.process, tid)
            reason = Reason.CLONED
        else:
            memory = thread.process.memory
            shared = is_vfork or _shares_memory(thread)
            process = Process(tid, thread.process.pid, memory if shared else memory.copy_for(tid))
            self.processes[tid] = process
            child, reason = self._add(process, tid), Reason.FORKED
        child.follows_syscalls = thread.follows_syscalls
        if status is None or status.is_end:
            self._ended(child, status or Status(tid, Kind.KILLED, signal.SIGKILL))
        return Stop(thread, reason, child=child, is_vfork=is_vfork or (reason is Reason.FORKED and shared))

    def _execed(self, thread: Thread) -> Stop:
        """The other threads are gone without a word, and so is the memory."""
        process = thread.process
        for tid in [t for t in process.threads if t != process.pid]:
            self.threads.pop(tid, None)
            process.threads.pop(tid)
        process.execs += 1
        process.memory = Memory(process.pid, self.machine)
        return Stop(thread, Reason.EXECED)

    # ---- going on --------------------------------------------------------------------------

    def resume(self, thread: Thread) -> None:
        """Let a stopped thread go on, over a breakpoint if it is at one; a dead one stays dead.

        A thread that is about to get a signal has not met the breakpoint yet: it will when the handler has returned.
        """
        if thread.tid not in self.threads or not thread.is_stopped or thread.is_frozen:
            return
        with suppress(Gone):
            is_signalled = bool(thread.deliver) and thread.at_signal == thread.deliver[0].number
            if not is_signalled and thread.process.memory.breakpoint_at(thread.registers.pc) is not None:
                self.step(thread)
            if thread.tid in self.threads and thread.is_stopped:
                thread.go_with_signal(Request.SYSCALL if thread.follows_syscalls else Request.CONT)

    def halt(self, thread: Thread) -> None:
        """Leave a thread in the group-stop that a signal asked for."""
        with suppress(Gone):
            thread.is_listening, thread.is_stopped = True, False
            ptrace.listen(thread.tid)

    def step(self, thread: Thread) -> bool:
        """Over one instruction, or one exclusive pair, the breakpoint at it lifted.

        False when the thread ended, or does not come back (then it runs), or where the instruction faults: then it has
        not moved, and gets the signal.
        """
        memory, at = thread.process.memory, thread.registers.pc
        point = memory.breakpoint_at(at)
        exits = point.exits if point is not None else ()
        with memory.lifted(at), memory.breakpoints_at(exits):
            return self._run_to(thread, exits)

    def _run_to(self, thread: Thread, exits: tuple[int, ...]) -> bool:
        """Run this thread alone to one of the addresses, or by one instruction where there are none."""
        while True:
            try:
                thread.go(Request.CONT if exits else Request.SINGLESTEP)
                status = self._awaited(thread.tid)
            except Gone:
                status = None
            self.stops += 1
            if status is None:
                return False
            if status.is_end:
                self._queue.append(self._ended(thread, status))
                return False
            thread.noted_stop(status.code if status.kind is Kind.SIGNAL else 0)
            if status.kind is Kind.SIGNAL and status.code == signal.SIGTRAP:
                if exits:
                    at = thread.registers.pc - self.machine.trap_size_in_pc
                    thread.set_registers(thread.registers.with_pc(at))
                return True
            if status.kind is Kind.SIGNAL:
                with suppress(Gone):
                    thread.deliver.append(ptrace.signal_of(thread.tid, status.code))
                    if thread.deliver[-1].is_fault:
                        return False

    def freeze(self, threads: Iterable[Thread]) -> None:
        """Stop these and keep them stopped; what they were about to do is kept until they are thawed.

        One that cannot stop yet (`is_stopped` says so) does before it runs another instruction of its program.
        """
        for thread in threads:
            thread.is_frozen = True
            if not thread.is_stopped:
                with suppress(Gone):
                    ptrace.interrupt(thread.tid)
        for thread in list(threads):
            while thread.tid in self.threads and not thread.is_stopped:
                status = self._awaited(thread.tid)
                if status is None:
                    break
                self._take(status)
        for stop in [s for s in self._queue if s.thread.is_frozen and s.reason is not Reason.ENDED]:
            self._queue.remove(stop)
            self._kept[stop.thread.tid] = stop

    def thaw(self, threads: Iterable[Thread]) -> None:
        """Let them go on; what was kept for a thread comes first."""
        for thread in list(threads):
            if thread.is_frozen:
                thread.is_frozen = False
                kept = self._kept.pop(thread.tid, None)
                if kept is not None:
                    self._queue.append(kept)
                else:
                    self.resume(thread)

    def kill(self, process: Process) -> None:
        """End one process."""
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _found(name: str, environment: Mapping[str, str]) -> str:
    """The program, sought as a shell does."""
    if "/" in name:
        return name
    for folder in environment.get("PATH", os.defpath).split(":"):
        path = Path(folder or ".") / name
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise InputError(name, "no such program on PATH", next_step="Give its path.")


def _process_of(tid: int) -> int:
    """The process that a thread belongs to; its own id when it is gone already."""
    try:
        for line in Path(f"/proc/{tid}/status").read_text().splitlines():
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    except OSError:
        pass
    return tid


def _may_stop(tid: int) -> bool:
    """The thread is there, and has not ended."""
    seen = where(tid, tid)
    return seen is not None and seen.state not in "ZX"


def _shares_memory(thread: Thread) -> bool:
    """The call that the thread is in, a clone, keeps one address space for both (CLONE_VM)."""
    call = fork_call(thread)
    return call is not None and call.shares_memory


def _children() -> set[int]:
    """Children of this process, of whichever of its threads."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found |= {int(word) for word in path.read_text().split()}
    return found
