"""A run without steering: which forks happen, which locks are taken, by whom, on which side of a fork.

Owns: that run and its count. Nothing is held, nobody waits for the tracer longer than a breakpoint takes.
Takes: a `Stage`. Gives: `Census`.
Must never: decide a verdict: that a lock is not seen taken here says nothing of other runs.
Wrong where: a site is passed so often that it is dropped (`_ENOUGH`), and takes another lock only later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from forkproof.model import Frame
from forkproof.probe import syscalls, watch
from forkproof.probe.pointers import Key, Way
from forkproof.probe.ptrace import Gone
from forkproof.probe.sites import AcquireSite
from forkproof.probe.spin import spins_on
from forkproof.probe.stack import Address
from forkproof.probe.stage import Kind, Scene, Stage
from forkproof.probe.tracee import Process, Thread

_ENOUGH: Final = 48
"""Times that a site is met on one side of a fork before it is left alone."""
_NOTHING_NEW: Final = 60
"""Ticks after a fork in which nothing new is learnt, before a run is over that neither ends nor rests."""
_BUSY: Final = 0.25
"""What a tick counts in which threads came to sites, or processes and threads were made where such were made before: on
a slow machine they take long to have been met enough, and a program may go on with it for ever."""
_FORKS: Final = 4
"""Forks from one place that are news: which of them can be steered may be chance."""
_OTHERS: Final = 400
"""The same, while only the leader meets it: the leader is of interest after the fork."""


@dataclass(frozen=True, slots=True)
class Fork:
    """One fork that was seen."""

    number: int
    """Among those that belong to the finding, from 1; 0 for others."""
    process: int
    stack: tuple[Frame, ...]
    call: str
    threads: int
    is_leader: bool
    """The process's first thread forked."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A lock that was taken."""

    lock: int
    place: Address
    """Where it lies: an object's data, or nowhere for a heap or stack."""
    by: str
    """other: a thread that did not fork, before a fork; forker; child: any thread of a child."""
    times: int


@dataclass(slots=True)
class Census:
    """What a run showed."""

    forks: list[Fork] = field(default_factory=list)
    before: Counter[int] = field(default_factory=Counter)
    """Locks that threads other than the leader took before the fork."""
    leader: Counter[int] = field(default_factory=Counter)
    after: Counter[int] = field(default_factory=Counter)
    """Locks that children asked for."""
    places: dict[int, Address] = field(default_factory=dict)
    sites: dict[int, set[AcquireSite]] = field(default_factory=dict)
    """Where in the code each was taken."""
    pointed: dict[Key, set[int]] = field(default_factory=dict)
    """Where the locks lay, at the forks, that are reached by pointers."""
    end: str = ""
    seconds: float = 0.0

    @property
    def others(self) -> Counter[int]:
        """Locks that threads took which do not fork: the leader's too, where another thread forks."""
        return self.before + self.leader if any(not fork.is_leader for fork in self.forks) else self.before

    @property
    def wanted(self) -> list[int]:
        """Locks that another thread took before a fork and a child asks for: worth holding, the commonest first."""
        others = self.others
        both = others.keys() & self.after.keys()
        return sorted(both, key=lambda lock: (-self.after[lock], -others[lock], lock))

    @property
    def may_have_missed(self) -> bool:
        """A process with several threads forked, and yet no lock was seen on both sides: a thread's bad luck?"""
        return not self.wanted and any(fork.threads > 1 for fork in self.forks)

    def add(self, other: Census) -> None:
        """Another run of the same program: addresses are the same."""
        for mine, theirs in ((self.before, other.before), (self.leader, other.leader), (self.after, other.after)):
            mine.update(theirs)
        for key, found in other.pointed.items():
            self.pointed.setdefault(key, set()).update(found)
        for lock, place in other.places.items():
            self.places.setdefault(lock, place)
            self.sites.setdefault(lock, set()).update(other.sites[lock])

    def taken(self) -> tuple[Taken, ...]:
        """All of it, sorted."""
        rows = [("other", self.before), ("leader", self.leader), ("child", self.after)]
        return tuple(Taken(k, self.places[k], by, n) for by, counts in rows for k, n in sorted(counts.items()))


def take(stage: Stage, seconds: float, pointers: Mapping[Key, Way] | None = None) -> Census:
    """Run the program once, until it ends or comes to rest in its children; where pointers lead is seen at forks."""
    begun = time.monotonic()
    census, run = Census(), _Run(stage, pointers or {})
    root = stage.start().process
    for thread in list(root.threads.values()):
        stage.go(thread)
    for scene in stage.scenes(begun + seconds):
        run.note(scene, census, root)
        stage.go(scene.thread, scene.child)
        if run.is_over(scene, census):
            break
    if census.may_have_missed:
        run.note_waits(census, root)
    census.end = run.end(root)
    census.seconds = time.monotonic() - begun
    return census


class _Run:
    """The state of a census run."""

    def __init__(self, stage: Stage, pointers: Mapping[Key, Way]) -> None:
        self.stage, self.pointers = stage, pointers
        self.met: Counter[tuple[int, int, bool]] = Counter()
        self.places: Counter[tuple[Frame, ...]] = Counter()
        """From where it forked."""
        self.known = 0
        self.busy = 0, 0, 0, 0
        self.idle = 0.0
        self.rest = watch.Rest(stage)

    def note(self, scene: Scene, census: Census, root: Process) -> None:
        """Count what a scene shows."""
        match scene.kind, scene.thread:
            case Kind.CLONED, thread if thread is not None and not self.stage.actor_of(thread.process).armed:
                self.stage.arm(thread.process)
            case Kind.FORK, thread if thread is not None:
                self.places[scene.stack] += 1
                for key, way in self.pointers.items():
                    if (address := way.follow(thread.process, self.stage.modules)) is not None:
                        census.pointed.setdefault(key, set()).add(address)
                census.forks.append(
                    Fork(
                        len(census.forks) + 1, thread.process.pid, scene.stack, scene.call.name if scene.call else "",
                        len(thread.process.threads), thread.is_leader,
                    )
                )  # fmt: skip
            case Kind.FORKED, _ if scene.child is not None and scene.call is not None:
                if census.forks and scene.call.copies_memory:
                    self.stage.actor_of(scene.child.process).spent.clear()
                    self.stage.arm(scene.child.process)
            case Kind.SITE, thread if thread is not None:
                self._count(scene, census, root)

    def _count(self, scene: Scene, census: Census, root: Process) -> None:
        assert scene.thread is not None
        assert scene.acquire is not None
        thread, acquire = scene.thread, scene.acquire
        if acquire.is_acquire(thread.registers):
            is_child = thread.process is not root
            counts = census.after if is_child else census.leader if thread.is_leader else census.before
            counts[scene.lock] += 1
            census.places.setdefault(scene.lock, self.stage.modules.address(thread.process, scene.lock))
            census.sites.setdefault(scene.lock, set()).add(acquire.site)
        at = thread.registers.pc
        key = thread.process.pid, at, thread.is_leader
        self.met[key] += 1
        if self.met[key] >= (_OTHERS if thread.is_leader and len(thread.process.threads) > 1 else _ENOUGH):
            self.stage.actor_of(thread.process).spent.add(at)
            thread.process.memory.remove(at)

    def note_waits(self, census: Census, root: Process) -> None:
        """Children that wait, when the run is over, for a lock that was seen to be taken before: it was held at their
        fork, by chance. Who looks until a lock is free, and only then tries it, comes to no acquire site."""
        for process in list(self.stage.session.processes.values()):
            for thread in list(process.threads.values()) if process.is_alive and process is not root else ():
                for lock in self._waited_for(thread, census.others.keys()):
                    census.after[lock] += 1

    def _waited_for(self, thread: Thread, locks: Collection[int]) -> Collection[int]:
        session, seen = self.stage.session, self.stage.where(thread)
        if seen is None or seen.state != "R":
            word = syscalls.futex_wait(self.stage.machine, seen.syscall, seen.arguments) if seen else None
            return {word} & set(locks) if word is not None else ()
        session.freeze([thread])
        try:
            if thread.is_stopped and self.stage.is_in_acquirer(thread):
                return [lock for lock in locks if spins_on(self.stage, thread, lock.__eq__)]
        except Gone:
            pass
        finally:
            session.thaw([thread])
        return ()

    def is_over(self, scene: Scene, census: Census) -> bool:
        """The children have come to rest, everything has ended, or nothing more is learnt (a child may spin)."""
        if scene.kind is not Kind.TICK:
            return False
        known = (
            sum(min(n, _FORKS) for n in self.places.values())
            + len(census.before)
            + len(census.leader)
            + len(census.after)
        )
        session = self.stage.session
        busy = self.met.total(), len(census.forks), len(session.processes), len(session.threads)
        waited = _BUSY if busy != self.busy else 1
        self.idle = self.idle + waited if known == self.known else 0
        self.known, self.busy = known, busy
        return self.rest.has_come(scene) or (bool(census.forks) and self.idle >= _NOTHING_NEW)

    def end(self, root: Process) -> str:
        """What became of the program."""
        return watch.fate(root)
