"""What a program does with processes: who forks, from where, beside which threads, and what the child does then.

Owns: the run and its record. Takes: a `Stage`. Gives: `Observation`.
Must never: hold anything back: threads are stopped for as long as their stacks take.
Wrong where: a process escapes tracing (CLONE_UNTRACED); it is ended with the others, but not shown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from forkproof.model import Frame, ProbeThread
from forkproof.probe import syscalls, watch
from forkproof.probe.census import Census
from forkproof.probe.ptrace import Gone
from forkproof.probe.stage import BEFORE, Kind, Scene, Stage
from forkproof.probe.tracee import Process, Thread, where

_FORKS_WITH_STACKS: Final = 64
"""Forks of which stacks are kept; the others are counted."""
_RUNS_HANDLERS: Final = frozenset({"fork", "__fork", "__libc_fork", "forkpty", "daemon"})
"""Functions of libc that run fork handlers."""


@dataclass(frozen=True, slots=True)
class SeenFork:
    """One fork."""

    parent: int
    child: int
    """Processes by their ordinals, from 1."""
    call: str
    """fork, vfork, clone, clone3."""
    kind: str
    """"copy": the child has a copy of all locks; "shared": it shares them until it execs."""
    handlers: str
    """"run" where libc's fork is on the stack, else "skipped"."""
    thread: str
    stack: tuple[Frame, ...]
    others: tuple[ProbeThread, ...]
    """The other threads of the parent."""
    held: tuple[str, ...] = ()
    """Known locks whose word said "taken" at that moment."""


@dataclass(slots=True)
class SeenProcess:
    """One process."""

    number: int
    parent: int
    command: tuple[str, ...]
    end: str = "was still running"
    before_exec: list[str] = field(default_factory=list)
    """System calls from its fork to its exec, or to its end; the last ones."""
    execs: list[tuple[str, ...]] = field(default_factory=list)
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Waiter:
    """A thread that waited on a futex, without a time limit, when all had come to rest."""

    process: int
    thread: ProbeThread


@dataclass(slots=True)
class Observation:
    """The whole run."""

    processes: dict[int, SeenProcess] = field(default_factory=dict)
    """By pid."""
    forks: list[SeenFork] = field(default_factory=list)
    uncounted: int = 0
    waiters: list[Waiter] = field(default_factory=list)
    stops: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    """Seconds in which the tracer, not the program, was at work."""


class Observer:
    """One observed run."""

    def __init__(self, stage: Stage, census: Census | None, *, follow: bool) -> None:
        self.stage, self.census, self.follow = stage, census, follow
        self.seen = Observation()
        self.rest = watch.Rest(stage)

    def run(self, seconds: float) -> Observation:
        """Until it ends, rests, or the time is over."""
        begun = time.monotonic()
        root = self.stage.start().process
        met = self._meet(root, None)
        if not root.is_alive:  # /proc no longer knows it
            met.command, met.end = self.stage.command.arguments, f"{watch.fate(root)} before its own code ran"
        self.stage.go(*root.threads.values())
        for scene in self.stage.scenes(begun + seconds):
            at = time.monotonic()
            self._note(scene)
            self.stage.go(scene.thread, scene.child)
            self.seen.busy += time.monotonic() - at
            if scene.kind is Kind.TICK and self.rest.has_come(scene):
                break
        self._finish()
        self.seen.stops, self.seen.seconds = self.stage.session.stops, time.monotonic() - begun
        return self.seen

    def _meet(self, process: Process, parent: Process | None) -> SeenProcess:
        number = len(self.seen.processes) + 1
        before = self.seen.processes[parent.pid].number if parent is not None else 0
        found = self.seen.processes[process.pid] = SeenProcess(number, before, process.command)
        return found

    def _note(self, scene: Scene) -> None:
        thread = scene.thread
        if thread is None:
            return
        match scene.kind:
            case Kind.FORKED if scene.child is not None:
                self._forked(scene, thread, scene.child)
            case Kind.CLONED:
                self.seen.processes[thread.process.pid].threads += 1
            case Kind.EXECED:
                self._execed(thread)
            case Kind.ENDED:
                self._ended(thread.process)

    def _forked(self, scene: Scene, thread: Thread, child: Thread) -> None:
        parent = self.seen.processes[thread.process.pid]
        met = self._meet(child.process, thread.process)
        if len(self.seen.forks) >= _FORKS_WITH_STACKS:
            self.seen.uncounted += 1
            return
        stack = self.stage.modules.stack(thread)
        call = scene.call
        shares = call.shares_memory if call is not None else False
        ran = any(f.function in _RUNS_HANDLERS and f.object.startswith(("libc", "ld-musl")) for f in stack)
        self.seen.forks.append(
            SeenFork(
                parent.number,
                met.number,
                call.name if call is not None else "fork",
                "shared" if shares else "copy",
                "run" if ran else "skipped",
                self.stage.title(thread),
                stack,
                self._others(thread),
                self._held(thread),
            )
        )

    def _others(self, forker: Thread) -> tuple[ProbeThread, ...]:
        """The other threads of the process, stopped for a moment."""
        others = [t for t in forker.process.threads.values() if t is not forker]
        doing = {t.tid: self._doing(t) for t in others}
        running = [t for t in others if not t.is_frozen]
        self.stage.session.freeze(running)
        try:
            return tuple(
                ProbeThread(self.stage.title(t), doing[t.tid], self.stage.modules.stack(t))
                for t in others
                if t.is_stopped
            )
        except Gone:
            return ()
        finally:
            self.stage.session.thaw(running)

    def _doing(self, thread: Thread) -> str:
        seen = where(thread.process.pid, thread.tid)
        if seen is None or seen.syscall is None:
            return "running"
        return syscalls.text(self.stage.machine, seen.syscall, seen.arguments)

    def _held(self, thread: Thread) -> tuple[str, ...]:
        """Known locks that are taken: those that the census saw, by their words."""
        if self.census is None:
            return ()
        from forkproof.probe.prove import place_name

        taken = [lock for lock in sorted(self.census.places) if self.stage.is_taken(thread.process, lock)]
        return tuple(place_name(self.census.places[lock], lock) for lock in taken)

    def _execed(self, thread: Thread) -> None:
        seen = self.seen.processes[thread.process.pid]
        seen.execs.append(thread.process.command)
        if len(seen.execs) == 1:
            seen.before_exec = self._log(thread.process)
        thread.follows_syscalls = self.follow

    def _ended(self, process: Process) -> None:
        seen = self.seen.processes[process.pid]
        seen.end = watch.fate(process)
        if not seen.execs:
            seen.before_exec = self._log(process)

    def _log(self, process: Process) -> list[str]:
        log = self.stage.actor_of(process).log
        return [text for text in log if not text.startswith(BEFORE)]

    def _finish(self) -> None:
        """Who waits on a futex now, when nothing moves any more?"""
        for process in self.stage.session.processes.values():
            for thread in list(process.threads.values()) if process.is_alive else ():
                seen = where(process.pid, thread.tid)
                word = syscalls.futex_wait(self.stage.machine, seen.syscall, seen.arguments) if seen else None
                if word is None or (seen is not None and len(seen.arguments) > 3 and seen.arguments[3]):
                    continue
                self.stage.session.freeze([thread])
                if thread.is_stopped:
                    found = ProbeThread(self.stage.title(thread), self._doing(thread), self.stage.modules.stack(thread))
                    self.seen.waiters.append(Waiter(self.seen.processes[process.pid].number, found))


__all__ = ["Observation", "Observer", "SeenFork", "SeenProcess", "Waiter"]
