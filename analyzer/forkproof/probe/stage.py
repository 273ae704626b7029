"""The program on the stage: started, its acquire sites armed, its forks recognised.

Owns: what census, steering and control run have in common: the start of the program, the breakpoints at acquire
      sites, the system call log, and the translation of stops into what a probe cares for.
Takes: a command, decoded sites, the frame that forks. Gives: `Scene`s, one at a time; their thread is stopped, and
       goes on by `go`.
Must never: decide whom to hold.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from forkproof.elf.image import load
from forkproof.model import Frame
from forkproof.probe import syscalls
from forkproof.probe.forkcalls import ForkCall, fork_call
from forkproof.probe.hurry import Hurry
from forkproof.probe.ptrace import Gone, SyscallStop
from forkproof.probe.session import Reason, Session, Stop
from forkproof.probe.sites import Acquire, AcquireSite, Form, Free, Served, decode_site, is_free
from forkproof.probe.stack import Address, Module, Modules
from forkproof.probe.tracee import Process, Thread, Where, where

TICK: Final = 0.012
"""Seconds without a stop after which the stage says that nothing happens: the rhythm of samples."""
_WORD: Final = 4
_LOG: Final = 40
BEFORE: Final = "(before the fork) "
"""What a call of the parent begins with in the log of a child."""
_BEFORE: Final = 4
"""Lines of a process's log that its child's begins with."""
_AT_ENTRY: Final = 9
_INNERMOST: Final = 3
"""Frames at most between a lock's own loop and the call that is the site."""


@dataclass(frozen=True, slots=True)
class Command:
    """What is run, and in which surroundings."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    stdin: str = os.devnull
    preload: tuple[str, ...] = ()

    @property
    def whole_environment(self) -> dict[str, str]:
        """With the libraries that are preloaded."""
        if not self.preload:
            return dict(self.environment)
        before = self.environment.get("LD_PRELOAD", "").split()
        return {**self.environment, "LD_PRELOAD": " ".join([*self.preload, *before])}


class Kind(Enum):
    """What a scene is of."""

    SITE = "a thread is at an acquire site"
    ENTERED = "a thread is about to call the function by which the finding forks"
    FORK = "a thread is about to fork where the finding says"
    FORKED = "it has forked"
    CLONED = "a thread has started"
    EXECED = "a process runs another program"
    ENDED = "a process has ended"
    TICK = "nothing happened for a moment"


@dataclass(frozen=True, slots=True)
class Scene:
    """Something that a probe may act upon."""

    kind: Kind
    thread: Thread | None = None
    acquire: Acquire | None = None
    lock: int = 0
    child: Thread | None = None
    call: ForkCall | None = None
    stack: tuple[Frame, ...] = ()


@dataclass(slots=True)
class Actor:
    """What the stage remembers of a process."""

    process: Process
    armed: bool = False
    spent: set[int] = field(default_factory=set)
    """Run-time addresses of sites that are not to be armed again."""
    names: dict[int, int] = field(default_factory=dict)
    """Ordinal of each thread, in the order in which they came."""
    log: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG))
    calls: int = 0
    """System calls that were more than a pause: the process gets on."""
    busy: dict[int, int] = field(default_factory=dict)
    """By thread: how many system calls in a row were nothing but a pause."""
    called: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """By thread: number and arguments of its last system call."""


class Stage:
    """One run; use as a context manager."""

    def __init__(
        self, command: Command, sites: Sequence[AcquireSite], fork: Frame | None, known: Mapping[tuple[str, int], str]
    ) -> None:
        self.command, self.fork = command, fork
        self.session = Session()
        self.modules = Modules(known)
        self.machine = self.session.machine.name
        self.actors: dict[int, Actor] = {}
        self.entries: set[int] = set()
        """Where such functions begin, in every process: addresses repeat."""
        self._free: dict[int, Free | Served] = {}
        """Of the locks that were seen at sites and are not free at 0."""
        self.is_hurried: Callable[[Thread, SyscallStop], bool] = lambda _thread, _call: False
        """Whether a thread's wait, which is about to begin, is to be over at once if it has a time limit."""
        self._hurry = Hurry(self.machine)
        self.output = ""
        self._acquires = decoded(tuple(sites))
        self._output = -1

    def __enter__(self) -> Self:
        self.session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.session.__exit__(kind, error, trace)
        finally:
            if self._output >= 0:
                self.output = os.pread(self._output, 1 << 16, 0).decode("utf-8", "backslashreplace")
                os.close(self._output)

    # ---- the start -------------------------------------------------------------------------

    def start(self) -> Actor:
        """Run the program to its entry: the libraries are mapped and initialised, its own code has not run."""
        self._output = os.memfd_create("output")
        stdin = os.open(self.command.stdin, os.O_RDONLY | os.O_CLOEXEC)
        try:
            process = self.session.launch(
                self.command.arguments, self.command.whole_environment, stdin=stdin, output=self._output
            )
        finally:
            os.close(stdin)
        actor = self._enrol(process)
        leader, entry = process.threads.get(process.pid), _entry(process.pid)
        if leader is None or entry is None:
            return actor  # killed by somebody before its first instruction: the end comes as a scene
        with process.memory.breakpoints_at((entry,)):
            self.session.resume(leader)
            self._until_entry(leader, entry)
        for thread in list(process.threads.values()):
            thread.follows_syscalls = True
        return actor

    def _until_entry(self, leader: Thread, entry: int) -> None:
        while (stop := self.session.wait(60)) is not None:
            if stop.reason is Reason.BREAKPOINT and stop.thread is leader and leader.registers.pc == entry:
                return
            if stop.reason is Reason.ENDED and stop.thread is leader:
                return
            for thread in filter(None, (stop.child, stop.thread)):
                self._actor(thread)
                thread.follows_syscalls = True
                self.session.resume(thread)

    def _enrol(self, process: Process) -> Actor:
        actor = self.actors[process.pid] = Actor(process)
        actor.names.update({tid: n for n, tid in enumerate(process.threads, 1)})
        return actor

    def _actor(self, thread: Thread) -> Actor:
        actor = self.actors.get(thread.process.pid) or self._enrol(thread.process)
        actor.names.setdefault(thread.tid, len(actor.names) + 1)
        return actor

    def actor_of(self, process: Process) -> Actor:
        """What is remembered of a process."""
        return self.actors.get(process.pid) or self._enrol(process)

    def title(self, thread: Thread) -> str:
        """For example "thread 2"."""
        return f"thread {self._actor(thread).names[thread.tid]}"

    def where(self, thread: Thread) -> Where | None:
        """What /proc says that a thread is doing; a call that goes on after an interrupt is what it was before."""
        seen = where(thread.process.pid, thread.tid)
        if seen is None or not syscalls.is_restart(self.machine, seen.syscall):
            return seen
        number, arguments = self._actor(thread).called.get(thread.tid, (seen.syscall, seen.arguments))
        return replace(seen, syscall=number, arguments=arguments)

    # ---- sites -----------------------------------------------------------------------------

    def arm(self, process: Process) -> None:
        """Breakpoints at every acquire site that is mapped, but for those that are spent."""
        actor = self.actor_of(process)
        actor.armed = True
        for acquire in self._acquires:
            at = self.modules.runtime(process, acquire.site.object, acquire.site.rva)
            if at is not None and at not in actor.spent:
                bias = at - acquire.site.rva
                exits = tuple(e + bias for e in acquire.exits) if acquire.form is Form.EXCLUSIVE else ()
                process.memory.insert(at, exits)

    def disarm(self, process: Process) -> None:
        """Take the breakpoints out: the process runs as fast as it can."""
        self.actor_of(process).armed = False
        process.memory.clear()

    def acquire_at(self, process: Process, pc: int) -> Acquire | None:
        """The site at a run-time address."""
        place = self.modules.address(process, pc)
        return next((a for a in self._acquires if (a.site.object, a.site.rva) == (place.object, place.rva)), None)

    def _is_meant(self, thread: Thread, acquire: Acquire) -> bool:
        """A call through a pointer is of the function that the site names, if any: others may be called there."""
        if not acquire.site.callee:
            return True
        target = acquire.target(thread.registers, thread.process.memory)
        found = self.modules.of(thread.process, target) if target is not None else None
        name = found[0].function(found[1])[0].lstrip("_") if found is not None else "sub_"
        return name.startswith("sub_") or name == acquire.site.callee.lstrip("_")

    @property
    def objects(self) -> frozenset[str]:
        """Paths of the objects that have sites."""
        return frozenset(a.site.object for a in self._acquires)

    def is_taken(self, process: Process, lock: int) -> bool:
        """By the word at an address at which a lock was seen."""
        return not is_free(process.memory, lock, _WORD, self.free_of(lock))

    def free_of(self, lock: int) -> Free | Served:
        """What the word of a lock that was seen is while nobody has it."""
        return self._free.get(lock, Free.ZERO)

    def is_in_acquirer(self, thread: Thread) -> bool:
        """A stopped thread is in a function that has an acquire site, or has not come back from a call at one."""
        inner, *outer = (self.modules.address(thread.process, pc) for pc, _ in self.modules.walk(thread, _INNERMOST))
        calls = {(a.site.object, rva) for a in self._acquires if a.form is Form.CALL for rva in a.exits}
        return self._is_acquirer(inner) or any((place.object, place.rva) in calls for place in outer)

    def _is_acquirer(self, place: Address) -> bool:
        own = [a.site.rva for a in self._acquires if a.site.object == place.object]
        if not own:
            return False
        module = Module.of(place.object)
        start = module.function(place.rva)[1]
        return any(module.function(rva)[1] == start for rva in own)

    # ---- scenes ----------------------------------------------------------------------------

    def scenes(self, deadline: float) -> Iterator[Scene]:
        """What happens, until nothing is left to happen or the time is over; a TICK every `TICK` seconds."""
        last = time.monotonic()
        while time.monotonic() < deadline:
            stop = self.session.wait(TICK)
            if stop is not None and (scene := self._seen(stop)) is not None:
                yield scene
            if stop is None and not self.session.threads:
                return
            if time.monotonic() - last >= TICK:
                last = time.monotonic()
                yield Scene(Kind.TICK)

    def _seen(self, stop: Stop) -> Scene | None:
        """The scene of a stop; none where the thread was killed between its stop and a look at it."""
        try:
            return self.scene_of(stop)
        except Gone:
            return None

    def go(self, *threads: Thread | None) -> None:
        """Let stopped threads go on."""
        for thread in threads:
            if thread is not None:
                self.session.resume(thread)

    def scene_of(self, stop: Stop) -> Scene | None:
        """What a stop means; None when it is of no interest, and its thread then goes on."""
        thread, actor = stop.thread, self._actor(stop.thread)
        match stop.reason:
            case Reason.BREAKPOINT:
                acquire = self.acquire_at(thread.process, thread.registers.pc)
                if acquire is not None and self._is_meant(thread, acquire):
                    lock = acquire.lock(thread.registers)
                    free = acquire.free_at(thread.registers)
                    if free is not Free.ZERO:
                        self._free[lock] = free
                    return Scene(Kind.SITE, thread, acquire, lock)
                if thread.registers.pc in self.entries and self._is_wanted(stack := self.modules.stack(thread)):
                    return Scene(Kind.ENTERED, thread, stack=stack)
            case Reason.SYSCALL:
                if (scene := self._syscall(thread, actor)) is not None:
                    return scene
            case Reason.FORKED if stop.child is not None:
                before = [text.removeprefix(BEFORE) for text in list(actor.log)[-_BEFORE:]]
                self._actor(stop.child).log.extend(f"{BEFORE}{text}" for text in before)
                return Scene(Kind.FORKED, thread, child=stop.child, call=fork_call(thread))
            case Reason.CLONED if stop.child is not None:
                self._actor(stop.child)
                return Scene(Kind.CLONED, thread, child=stop.child)
            case Reason.EXECED:
                self.modules.refresh(thread.process)
                thread.follows_syscalls = False
                return Scene(Kind.EXECED, thread)
            case Reason.ENDED:
                return Scene(Kind.ENDED, thread) if not thread.process.is_alive else None
            case Reason.HALTED:
                self.session.halt(thread)
                return None
        self.session.resume(thread)
        return None

    def _syscall(self, thread: Thread, actor: Actor) -> Scene | None:
        call = thread.syscall
        if call is None:
            return None
        if not call.is_entry:
            self._hurry.restore(thread)
            actor.log.append(
                f"[{actor.names[thread.tid]}] {syscalls.text(self.machine, call.number, call.arguments, call.result)}"
            )
            return None
        if syscalls.is_restart(self.machine, call.number):
            return None
        actor.called[thread.tid] = call.number, call.arguments
        is_pause = syscalls.is_pause(self.machine, call.number)
        actor.calls += not is_pause
        actor.busy[thread.tid] = actor.busy.get(thread.tid, 0) + 1 if is_pause else 0
        if self.is_hurried(thread, call):
            self._hurry.shorten(thread, call)
        made = fork_call(thread)
        if made is None or not made.copies_memory:
            return None
        stack = self.modules.stack(thread)
        return Scene(Kind.FORK, thread, call=made, stack=stack) if self._is_wanted(stack) else None

    def _is_wanted(self, stack: tuple[Frame, ...]) -> bool:
        """The fork is the finding's: the function that forks is on the stack."""
        wanted = self.fork
        return wanted is None or any((f.object, f.function) == (wanted.object, wanted.function) for f in stack)


@lru_cache(maxsize=64)
def decoded(sites: tuple[AcquireSite, ...]) -> tuple[Acquire, ...]:
    """The sites whose instruction is understood."""
    images = {path: load(Path(path)) for path in {site.object for site in sites}}
    found = (decode_site(site, images[site.object]) for site in sites)
    return tuple(acquire for acquire in found if acquire.form is not Form.UNKNOWN)


def _entry(pid: int) -> int | None:
    """AT_ENTRY of the auxiliary vector; None for a process that is gone."""
    try:
        raw = Path(f"/proc/{pid}/auxv").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    words = memoryview(raw[: len(raw) // 16 * 16]).cast("Q").tolist()
    return dict(zip(words[::2], words[1::2], strict=True)).get(_AT_ENTRY)
