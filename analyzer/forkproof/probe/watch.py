"""What becomes of a child: does it wait for ever for a lock whose owner it does not have?

Owns: the watch over the descendants of one fork, sample after sample, and the claim that a thread waits for a lock.
Takes: a `Stage`, the lock's address in the child. Gives: `Watched`.
Must never: call something a hang because time passed. A thread hangs here if it asked for the lock while it was taken,
      in a process in which nobody had got it since the fork, and has not come back from asking in sample after sample,
      while the word stayed taken.
Wrong where: a thread that spins without a pause gives up by a count or a clock after more than three seconds (one that
      does neither is seen at once to go round for ever); or another process frees a shared lock. A time limit of
      a wait is no such case: it is made to be over at once (`hurry`), and who then goes on does not hang; nor is
      a signal that the child asks for at a later time: who has a timer is not judged.

How a thread is known to wait, the strongest first:
1. it is in futex(FUTEX_WAIT) on a word of the lock;
2. it was refused at an acquire site, and in every sample its stack is at least as deep as there, and it does nothing
   but run or pause: it spins;
3. in every sample it goes round a loop that does nothing but look at the lock (`forkproof.probe.spin`).
Who spins without a pause is watched for longer, unless a round of its loop leaves everything as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from forkproof.model import ProbeThread
from forkproof.probe import syscalls
from forkproof.probe.ptrace import Gone, SyscallStop, named
from forkproof.probe.sites import Free, Served, is_free
from forkproof.probe.spin import repeats, spins_on
from forkproof.probe.stage import TICK, Kind, Scene, Stage
from forkproof.probe.tracee import Process, Thread, Where, where

SAMPLES: Final = 25
"""In a row, before a wait is called one without end."""
_ROUNDS: Final = 1000
"""Waits with a time limit, each made to be over at once, or pauses, before a thread is said to come back for ever;"""
_PATIENT: Final = 250
"""or samples: it may do more than wait on its way. The same for who spins, and may count that."""
_ENDED: Final = frozenset("ZX")
"""States of threads that are no more."""
_WHEN_TO_STEP: Final = frozenset({SAMPLES - 4, SAMPLES - 2, SAMPLES, 2 * SAMPLES})
"""Samples after which a round of a spinning thread's loop is looked at: more than once, since it may be on its way."""
_MOVING: Final = frozenset("Rt")
"""Running, or stopped because the tracer has not come to it yet: on a slow machine that is often so."""
_SETTLED: Final = 12
"""Samples in a row in which nothing runs, before a process is at rest."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock in memory: any wait on a word of it is a wait for it."""

    address: int
    size: int
    free: Free | Served = Free.ZERO

    @property
    def word_size(self) -> int:
        """Of the part that says whether it is taken: a mutex begins with it."""
        return self.size if self.size <= 8 else 4

    def contains(self, address: int | None) -> bool:
        """The address is in it."""
        return address is not None and self.address <= address < self.address + max(self.size, 4)


@dataclass(frozen=True, slots=True)
class Watched:
    """What the watch saw."""

    hung: Process | None = None
    waiters: tuple[ProbeThread, ...] = ()
    samples: int = 0
    milliseconds: int = 0
    syscalls: tuple[str, ...] = ()
    story: str = ""
    """In words: what the children did."""
    was_asked: bool = False
    """A child came to ask for the lock at all."""


@dataclass(slots=True)
class _Asked:
    """A thread that asked for the lock and was refused."""

    sp: int
    in_row: int = 0
    since: float = 0.0
    looks: bool = False
    """It was not at an acquire site, but spins on the lock's word."""
    is_endless: bool = False
    """A round of its loop leaves everything as it was."""


@dataclass(slots=True)
class _Child:
    """One watched process."""

    process: Process
    asked: dict[int, _Asked] = field(default_factory=dict)
    futex: dict[int, int] = field(default_factory=dict)
    """By thread: samples in a row in futex on the lock."""
    call: dict[int, str] = field(default_factory=dict)
    """By thread: that system call, as it was last seen."""
    since: dict[int, float] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)
    """By thread: waits with a time limit that were made to be over, and pauses while it asked."""
    has_timer: bool = False
    """It asked for a signal at a later time, which may end what it waits for."""
    got: bool = False
    """Somebody found the lock free there: what was inherited is over."""
    is_foreign: bool = False
    """It runs another program."""


class Watch:
    """The watch over the descendants of one fork."""

    def __init__(self, stage: Stage, lock: Lock, child: Thread, whose: str = "the child") -> None:
        self.stage, self.lock, self.whose = stage, lock, whose
        self.children: dict[int, _Child] = {}
        self.was_asked = False
        self.add(child.process)
        stage.is_hurried = self._is_hurried

    def add(self, process: Process) -> None:
        """Watch a process, just forked: its acquire sites stay armed until somebody asks for the lock."""
        self.children[process.pid] = _Child(process)
        self.stage.disarm(process)
        self.stage.arm(process)

    def note(self, scene: Scene) -> None:
        """What a scene says of the watched processes."""
        thread = scene.thread
        if thread is None or thread.process.pid not in self.children:
            return
        child = self.children[thread.process.pid]
        match scene.kind:
            case Kind.SITE if self.lock.contains(scene.lock):
                self._asked(child, thread)
            case Kind.FORKED if scene.child is not None and scene.call is not None and scene.call.copies_memory:
                self.add(scene.child.process)
                self.children[scene.child.process.pid].got = child.got
            case Kind.EXECED:
                child.is_foreign = True

    def _asked(self, child: _Child, thread: Thread) -> None:
        """Somebody asks for the lock: taken, or free?"""
        self.was_asked = True
        if self._is_free(child):
            child.got = True
        else:
            child.asked[thread.tid] = _Asked(thread.registers.sp, since=time.monotonic())
        self.stage.disarm(child.process)

    def _is_free(self, child: _Child) -> bool:
        return is_free(child.process.memory, self.lock.address, self.lock.word_size, self.lock.free)

    def _is_hurried(self, thread: Thread, call: SyscallStop) -> bool:
        """A watched thread is about to wait for the lock, or to pause while it asks for it."""
        child, machine = self.children.get(thread.process.pid), self.stage.machine
        if child is None or child.got or child.is_foreign:
            return False
        child.has_timer = child.has_timer or syscalls.sets_timer(machine, call.number, call.arguments)
        waits = self.lock.contains(syscalls.futex_wait(machine, call.number, call.arguments)) and bool(
            call.arguments[3]
        )
        if not waits and not (thread.tid in child.asked and syscalls.is_pause(machine, call.number)):
            return False
        child.rounds[thread.tid] = child.rounds.get(thread.tid, 0) + 1
        return True

    # ---- samples ---------------------------------------------------------------------------

    def sample(self) -> None:
        """Look at everybody once."""
        for child in self.children.values():
            if not child.process.is_alive or child.is_foreign or child.got:
                continue
            if self._is_free(child):
                child.asked.clear()
                child.futex.clear()
                continue
            self._sample(child)

    @property
    def hung(self) -> Process | None:
        """The process that hangs: of several the one with the most waiting threads, then the youngest.

        A daemon's first child may have a thread that waits, and be gone a moment later.
        """
        living = [c for c in self.children.values() if c.process.is_alive and not c.is_foreign]
        hanging = [c for c in living if not c.has_timer and self._hangs(c)]
        best = max(hanging, key=lambda c: (len(c.futex.keys() | c.asked.keys()), c.process.pid), default=None)
        return best.process if best is not None else None

    def _sample(self, child: _Child) -> None:
        process = child.process
        for thread in list(process.threads.values()):
            seen = self.stage.where(thread)
            word = syscalls.futex_wait(self.stage.machine, seen.syscall, seen.arguments) if seen else None
            if self.lock.contains(word):
                self.was_asked = True
                child.since.setdefault(thread.tid, time.monotonic())
                child.futex[thread.tid] = child.futex.get(thread.tid, 0) + 1
                child.call[thread.tid] = _text(self.stage, seen)
            elif seen is None or not self._is_between(thread, seen.syscall, child):
                child.futex.pop(thread.tid, None)
            asked = child.asked.get(thread.tid)
            if asked is not None:
                asked.in_row = asked.in_row + 1 if self._still_asks(thread, asked) else 0
                if not asked.in_row:
                    del child.asked[thread.tid]
                elif asked.in_row in _WHEN_TO_STEP and thread.tid not in child.futex and thread.tid not in child.rounds:
                    asked.is_endless = asked.is_endless or self._with_stopped(thread, repeats)
            elif thread.tid not in child.futex and self._spins(thread, seen):
                self.was_asked = True
                child.asked[thread.tid] = _Asked(0, 1, time.monotonic(), looks=True)

    def _spins(self, thread: Thread, seen: Where | None) -> bool:
        """It runs, in a function that takes locks, and looks at this one again and again."""
        if seen is None or seen.state != "R" or not self._is_running(seen):
            return False
        return self._with_stopped(thread, self._goes_round)

    def _goes_round(self, stage: Stage, thread: Thread) -> bool:
        return stage.is_in_acquirer(thread) and spins_on(stage, thread, self.lock.contains)

    def _with_stopped(self, thread: Thread, claim: Callable[[Stage, Thread], bool]) -> bool:
        """What holds of a thread that is stopped for a moment."""
        session = self.stage.session
        session.freeze([thread])
        try:
            return thread.is_stopped and claim(self.stage, thread)
        except Gone:
            return False
        finally:
            session.thaw([thread])

    def _is_running(self, seen: Where) -> bool:
        return seen.syscall is None or syscalls.is_pause(self.stage.machine, seen.syscall)

    def _is_between(self, thread: Thread, syscall: int | None, child: _Child) -> bool:
        """A lock that waits with a time limit looks at its word now and then: what counts is that it comes back."""
        return thread.tid in child.futex and (syscall is None or syscalls.is_pause(self.stage.machine, syscall))

    def _still_asks(self, thread: Thread, asked: _Asked) -> bool:
        """The thread has not returned from the function that asked, and does not wait for anything else."""
        seen = self.stage.where(thread)
        if seen is None:
            return False
        if asked.looks:
            return self._spins(thread, seen)
        word = syscalls.futex_wait(self.stage.machine, seen.syscall, seen.arguments)
        if not self._is_running(seen):
            return self.lock.contains(word)
        return self._sp(thread) <= asked.sp

    def _sp(self, thread: Thread) -> int:
        """Stop the thread for a moment and look."""
        session = self.stage.session
        if thread.is_stopped:
            return thread.registers.sp
        session.freeze([thread])
        try:
            return thread.registers.sp
        except Gone:
            return 1 << 63
        finally:
            session.thaw([thread])

    def _hangs(self, child: _Child) -> bool:
        return any(self._waits(child, tid) for tid in child.futex.keys() | child.asked.keys())

    def _waits(self, child: _Child, tid: int) -> bool:
        """A thread has waited for long enough to say so."""
        asked = child.asked.get(tid)
        seen = max(child.futex.get(tid, 0), asked.in_row if asked is not None else 0)
        if tid in child.rounds:
            return seen >= (SAMPLES if child.rounds[tid] >= _ROUNDS else _PATIENT)
        return seen >= (SAMPLES if tid in child.futex or asked is None or asked.is_endless else _PATIENT)

    @property
    def is_final(self) -> bool:
        """Nothing can come any more: every thread that could get the lock, or fork, waits for it."""
        left = [c for c in self.children.values() if c.process.is_alive and not c.is_foreign and not c.got]
        return bool(left) and all(self._waits(c, tid) for c in left for tid in c.process.threads)

    @property
    def is_timed(self) -> bool:
        """Somebody waits, and has a timer that may end that: what would come then is not waited for for ever."""
        timed = [c for c in self.children.values() if c.process.is_alive and c.has_timer and not c.got]
        return any(
            max([*c.futex.values(), *(a.in_row for a in c.asked.values())], default=0) >= _PATIENT for c in timed
        )

    @property
    def may_change(self) -> bool:
        """A thread of the process that hangs pauses, or does not rest in a call, and may let the lock go after that.

        On a loaded machine one that is to pause has not always come to it: it is on its way, in a fault or in a stop.
        """
        process = self.hung
        child = self.children[process.pid] if process is not None else None
        if process is None or child is None:
            return False
        others = [t for t in process.threads.values() if not self._waits(child, t.tid)]
        seen = [self.stage.where(thread) for thread in others]
        return not all(w is not None and (w.state in _ENDED or self._rests(w)) for w in seen)

    def _rests(self, seen: Where) -> bool:
        if seen.state != "S" or seen.syscall is None:
            return False
        return not syscalls.is_pause(self.stage.machine, seen.syscall)

    @property
    def is_waiting(self) -> bool:
        """Somebody is seen to wait at this moment, if not for long enough yet."""
        return any(c.futex or c.asked for c in self.children.values() if c.process.is_alive and not c.got)

    @property
    def is_over(self) -> bool:
        """Nobody is left who could come to wait."""
        return all(not c.process.is_alive or c.is_foreign or c.got for c in self.children.values())

    @property
    def was_got(self) -> bool:
        """Somebody found the lock free, and was not killed after that."""
        got = [c.process for c in self.children.values() if c.got]
        return any(p.ended is None or p.ended.kind.value != "killed" for p in got)

    # ---- the result ------------------------------------------------------------------------

    def result(self, hung: Process | None) -> Watched:
        """What was seen; the waiting threads are stopped for their stacks, and stay so."""
        if hung is None:
            return Watched(story=self.story(), was_asked=self.was_asked)
        child = self.children[hung.pid]
        tids = sorted(child.futex.keys() | {tid for tid in child.asked if self._waits(child, tid)})
        doing = {tid: self._doing(child, tid) for tid in tids}
        self.stage.session.freeze(list(hung.threads.values()))
        waiters = tuple(
            ProbeThread(f"{self.stage.title(t)} of {self.whose}", doing[tid], self.stage.modules.stack(t))
            for tid in tids
            if (t := hung.threads.get(tid)) is not None and t.is_stopped
        )
        counts = [child.futex.get(tid, 0) for tid in tids] + [a.in_row for a in child.asked.values()]
        begun = min([*child.since.values(), *(a.since for a in child.asked.values())])
        return Watched(
            hung, waiters, max(counts), int((time.monotonic() - begun) * 1000),
            tuple(self.stage.actor_of(hung).log), self.story(), was_asked=True,
        )  # fmt: skip

    def _doing(self, child: _Child, tid: int) -> str:
        # A lock that waits with a time limit may be between two waits just now; what was seen of it is the waits.
        if tid in child.futex:
            return child.call[tid]
        thread = child.process.threads.get(tid)
        return _text(self.stage, self.stage.where(thread) if thread is not None else None)

    def story(self) -> str:
        """What the children did, each in a few words."""
        return "; ".join(dict.fromkeys(self._fate(c) for c in self.children.values()))

    def _fate(self, child: _Child) -> str:
        if child.is_foreign:
            return "a child ran another program"
        if not child.process.is_alive:
            return f"a child {fate(child.process)}"
        if child.got:
            return "a child found the lock free"
        if (child.futex or child.asked) and child.has_timer:
            return "a child waited for the lock, with a timer set that may end that"
        if child.futex or child.asked:
            return "a child waited for the lock"
        return "a child went on living without asking for the lock"


def _text(stage: Stage, seen: Where | None) -> str:
    """A thread's system call as the report shows it."""
    if seen is None or seen.syscall is None:
        return "spinning"
    return syscalls.text(stage.machine, seen.syscall, seen.arguments)


def fate(process: Process) -> str:
    """How a process ended."""
    status = process.ended
    if status is None:
        return "was still running"
    if status.kind.value == "killed":
        return f"was killed by {named([status.code])}"
    return f"ended with status {status.code}"


class Rest:
    """Tells when everything that runs has come to rest: nothing but waits, sample after sample."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._in_row = 0

    def has_come(self, scene: Scene) -> bool:
        """At a TICK: has everything that is alive been waiting for a while?"""
        if scene.kind is not Kind.TICK:
            return False
        self._in_row = self._in_row + 1 if self._is_quiet() else 0
        return self._in_row >= _SETTLED

    def _is_quiet(self) -> bool:
        for process in self.stage.session.processes.values():
            for thread in process.threads.values() if process.is_alive else ():
                seen = where(process.pid, thread.tid)
                if thread.is_frozen or thread.is_listening or seen is None:
                    continue
                if seen.state in _MOVING or seen.syscall is None:
                    return False
        return True


__all__ = ["SAMPLES", "TICK", "Lock", "Rest", "Watch", "Watched", "fate"]
