"""lock-reentry shown: a thread that has taken a lock comes back for it, and waits for itself.

Owns: one such run. Takes: a `Stage` with acquire sites, and what tells the lock, or one of several. Gives: `Reentered`.
Must never: say that a thread waits for itself unless it took the lock while all others stood still, and came back
      before any of them moved: then the lock that it finds taken is its own, whatever the code in between did.
Wrong where: the thread waits for another one while it holds the lock: the others are then let go, and who has the lock
      is no longer certain (the run shows nothing).

1. A thread comes to an acquire of the lock, which is free. All others of its process are frozen; it takes the lock.
2. It goes on, alone. At the next acquire of the same lock the word tells: free, it had given the lock back (begin
   again); taken, it is the owner, and asks for what it has.
3. Everybody goes on, and the thread is watched. If it waits, look after look, it waits for ever: that is the hang. If
   it comes through, the lock lets its owner in again (a recursive mutex).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from forkproof.model import ProbeThread
from forkproof.probe import watch
from forkproof.probe.attempt import STUCK, attempt, moves
from forkproof.probe.sites import Acquire, is_free
from forkproof.probe.stack import Address
from forkproof.probe.stage import Kind, Scene, Stage
from forkproof.probe.tracee import Process, Thread

_ENOUGH: Final = 2000
"""Times that the lock is taken, before a run is over that shows nothing."""
_LONG: Final = 100
"""Ticks for which the others stand still at most."""


class Outcome(Enum):
    """How a run ended."""

    HUNG = "the thread waits for the lock that it has"
    RECURSIVE = "the lock let its owner in again"
    NEVER = "no thread came back for the lock that it had"


@dataclass(frozen=True, slots=True)
class Reentered:
    """What happened."""

    outcome: Outcome
    lock: watch.Lock | None = None
    holder: ProbeThread | None = None
    """The thread when it had taken the lock."""
    watched: watch.Watched | None = None
    taken: Mapping[Address, int] = field(default_factory=dict)
    """How often each such lock was taken, by where it lies."""
    end: str = ""


@dataclass(slots=True)
class _Own:
    """A thread that has the lock, the others standing still."""

    thread: Thread
    acquire: Acquire
    lock: int
    holder: ProbeThread
    others: list[Thread]
    ticks: int = 0
    stuck: int = 0


def perform(stage: Stage, is_it: Callable[[Address], bool], seconds: float) -> Reentered:
    """One run."""
    return _Run(stage, is_it, time.monotonic() + seconds).run()


class _Run:
    """The state of one run."""

    def __init__(self, stage: Stage, is_it: Callable[[Address], bool], deadline: float) -> None:
        self.stage, self.is_it, self.deadline = stage, is_it, deadline
        self.own: _Own | None = None
        self.taken: Counter[Address] = Counter()
        self.recursive = 0
        self.rest = watch.Rest(stage)

    def run(self) -> Reentered:
        root = self.stage.start().process
        self.stage.arm(root)
        self.stage.go(*list(root.threads.values()))
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.SITE and (found := self._at_site(scene)) is not None:
                return found
            if scene.kind is not Kind.SITE:
                self._note(scene)
            if self.taken.total() >= _ENOUGH or (
                scene.kind is Kind.TICK and self.own is None and self.rest.has_come(scene)
            ):
                break
        return self._over(root)

    def _over(self, root: Process) -> Reentered:
        outcome = Outcome.RECURSIVE if self.recursive else Outcome.NEVER
        return Reentered(outcome, taken=self.taken, end=watch.fate(root))

    def _note(self, scene: Scene) -> None:
        if scene.kind is Kind.FORKED and scene.child is not None and scene.call and scene.call.copies_memory:
            self.stage.disarm(scene.child.process)
        if scene.kind is Kind.TICK:
            self._reconsider()
        if scene.kind is Kind.ENDED and self.own is not None and not self.own.thread.process.is_alive:
            self.own = None
        self.stage.go(scene.thread, scene.child)

    def _at_site(self, scene: Scene) -> Reentered | None:
        """A thread is about to take some lock."""
        thread, acquire = scene.thread, scene.acquire
        assert thread is not None
        assert acquire is not None
        process = thread.process
        is_meant = acquire.is_acquire(thread.registers) and self.is_it(self.stage.modules.address(process, scene.lock))
        if is_meant and acquire.is_free(thread.registers, process.memory):
            self._let_go()
            self._take(thread, acquire, scene.lock)
            return None
        own = self.own
        if is_meant and own is not None and own.thread is thread and own.lock == scene.lock:
            return self._comes_back(own)
        self.stage.go(thread)
        return None

    def _take(self, thread: Thread, acquire: Acquire, lock: int) -> None:
        others = [t for t in thread.process.threads.values() if t is not thread]
        self.stage.session.freeze(others)
        thread.is_frozen = True
        if attempt(self.stage, thread, acquire):
            self.taken[self.stage.modules.address(thread.process, lock)] += 1
            stack = self.stage.modules.stack(thread)
            holder = ProbeThread(self.stage.title(thread), "has just taken the lock", stack)
            self.own = _Own(thread, acquire, lock, holder, others)
        else:
            self.stage.session.thaw(others)
        self.stage.session.thaw([thread])

    def _reconsider(self) -> None:
        """The lock is free again, or the thread waits for one of the others."""
        own = self.own
        if own is None:
            return
        own.ticks += 1
        own.stuck = 0 if moves(own.thread) else own.stuck + 1
        free = is_free(own.thread.process.memory, own.lock, 4, self.stage.free_of(own.lock))
        if free or (own.others and (own.stuck >= STUCK or own.ticks >= _LONG)):
            self._let_go()

    def _let_go(self) -> None:
        own, self.own = self.own, None
        if own is not None:
            self.stage.session.thaw([t for t in own.others if t.tid in self.stage.session.threads])

    def _comes_back(self, own: _Own) -> Reentered | None:
        """The owner asks for its own lock: does it get through?"""
        lock = watch.Lock(own.lock, own.acquire.width, self.stage.free_of(own.lock))
        watched = watch.Watch(self.stage, lock, own.thread, whose="the process")
        watched.note(Scene(Kind.SITE, own.thread, own.acquire, own.lock))
        self._let_go()
        self.stage.go(own.thread)
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.TICK:
                watched.sample()
                if watched.hung is not None:
                    result = watched.result(watched.hung)
                    return Reentered(Outcome.HUNG, lock, own.holder, result, self.taken)
                if not watched.is_waiting:
                    break
            self.stage.go(scene.thread, scene.child)
        self.recursive += 1
        self.stage.arm(own.thread.process)
        return None
