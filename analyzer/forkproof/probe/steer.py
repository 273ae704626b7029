"""The dance: force the interleaving in which a fork copies a taken lock into a child that lacks its owner.

Owns: one steered run, and its control run, which differs from it in one step.
Takes: a `Stage` and a `Cast` (which fork, which locks, whether to hold). Gives: `Performance`.
Must never: let time decide anything but when to give up.

1. Run to the program's entry. From the second thread on, acquire sites have breakpoints.
2. **Park** the first thread that comes to take a wanted lock and is not the leader, before the acquire, while the lock
   is free. Breakpoints come out: the rest runs as fast as it can.
   A program that waits for the parked thread never comes to fork: when nothing moves, the thread is let go, and the
   next time a later acquire is taken.
   Where other threads were seen to take the lock again and again, nobody is parked before the fork (`Cast.early`).
3. The forking thread comes to the system call that forks: its prepare handlers have run. It is stopped there, and
   everything else is. If nobody is parked yet, the others run until one is: the forker waits for them.
4. The parked thread goes over its acquire. If it gets the lock, **hold** it there.
   If it does not, let all others run, so that whoever else had the lock gives it back. If it still does not, the
   forker has the lock: the fork is protected, which is shown by letting the forker go on and seeing the parked thread
   get through.
5. Let the forker fork. The child starts with the lock taken, and without its owner. Then let everybody go.
6. Watch the child (`watch`).
In the control run step 4 is left out: the thread stays where it is, before the acquire.
Where the forker has the lock and the child waits for it all the same (`Outcome.KEPT`), no thread can be left out. In
the control run of that the child starts with the lock's word made free (`Cast.frees`), nothing else changed. So it does
where the usual control run cannot be had: nobody comes to be stopped, or somebody else has the lock then.

Rejected: holding first. The forker's prepare handlers, or any allocation, then block on the lock long before the fork.
Rejected: repeating without steering. 140 daemonizing runs of a program that hangs in every steered run hung never.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Final

from forkproof.model import Frame, ProbeThread
from forkproof.probe import syscalls, watch
from forkproof.probe.attempt import STUCK, attempt, moves
from forkproof.probe.keeper import keeper_of
from forkproof.probe.patience import Patience
from forkproof.probe.session import Reason, Stop
from forkproof.probe.sites import OWNER, Acquire, freed
from forkproof.probe.stage import TICK, Kind, Scene, Stage
from forkproof.probe.tracee import Process, Thread, where

_SKIP: Final = 8
"""Acquires that a thread is let through after it was let go for the first time; doubled each time."""
_PATIENCE: Final = 600
"""The same where others run: they may wait for it by spinning."""
_PAUSES: Final = 200
"""Pauses in a row of a thread that waits by sched_yield or nanosleep."""
_PAUSE_TICKS: Final = 2
"""Ticks that the forker waits at each of its system calls."""
_LATE: Final = 250
"""Ticks that the forker waits at its fork for another thread to come to a lock that is worth holding."""
_LATE_ANY: Final = 60
"""The same where no lock is known to be: nobody was seen to take one that a child asks for."""
_SPINS: Final = 40
"""Ticks in a row in which a thread is found running and the one wanted lock taken, before it is taken for a waiter."""
_GLANCES: Final = 50
"""Looks at its word before that,"""
_GLANCE: Final = 0.001
"""seconds apart."""
_AGAIN: Final = 20
"""Ticks after which breakpoints that nobody meets are written again: an emulator may go on with code that was there
before (qemu-system 7.2 does, when a page is written while it is being translated)."""
_AFTERWARDS: Final = 3.0
"""Seconds for which a child is watched when the fork itself had the lock."""
_HELD_ALREADY: Final = 10.0
"""The same where somebody has it, and nobody was seen to come to it: a child may wait for another lock all the time."""
_WORD: Final = 4
_SETTLING: Final = 50
"""Ticks after the first hang in which others may come to hang too, or the process that hangs to end."""
_SETTLING_LONG: Final = 250
"""The same where a thread of that process pauses, and may let the lock go when it goes on."""
_TRIES: Final = 25
"""Samples in which a thread must fail to get the lock, all others running, before the forker is said to have it."""


class Outcome(Enum):
    """How a run ended."""

    HUNG = "the child waits for the lock"
    PASSED = "the child did not hang"
    PROTECTED = "the fork had the lock itself"
    KEPT = "the child waits for a lock that the fork itself had"
    NO_FORK = "no such fork was reached"
    NO_HOLDER = "no other thread came to take such a lock"
    LOST = "the program ended before anything could be shown"


@dataclass(frozen=True, slots=True)
class Cast:
    """What a run is to force."""

    number: int = 1
    """Which of the finding's forks, from 1."""
    locks: frozenset[int] = frozenset()
    """Addresses worth holding; empty: whichever comes."""
    holds: bool = True
    """False: the control run."""
    leader_too: bool = False
    """The leader may be parked: another thread forks."""
    frees: watch.Lock | None = None
    """The control run for a lock that the fork itself has: nobody is held, and the child starts with this lock free."""
    early: bool = True
    """A thread may be parked before the forking thread has come to its fork."""


@dataclass(frozen=True, slots=True)
class Performance:
    """What happened."""

    outcome: Outcome
    lock: watch.Lock | None = None
    acquire: Acquire | None = None
    place: tuple[str, int] = ("", 0)
    """Object and rva of the lock's word, where it is in one."""
    fork: tuple[Frame, ...] = ()
    holder: ProbeThread | None = None
    watched: watch.Watched | None = None
    reached: str = ""
    entry: tuple[str, int] | None = None
    """Object and rva of the function by which the forking thread went to fork, where the fork had the lock itself."""
    is_callers: bool = False
    """The lock was taken before the forking thread called the function that forks: not by handlers, which take it at
    every fork."""
    is_alone: bool = False
    """The process had no other thread."""
    keeper: str = ""
    """Who had the lock, where no thread was given it (KEPT)."""
    is_freed: bool = False
    """A control run in which the child started with the lock made free."""
    stops: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Parked:
    """The thread that waits to take the lock."""

    thread: Thread
    acquire: Acquire | None
    """None for a thread that waits for the lock already."""
    lock: watch.Lock
    stuck: int = 0
    samples: int = 0
    """In a row, in which the process made no system call but pauses."""
    calls: int = 0


def perform(stage: Stage, cast: Cast, seconds: float) -> Performance:
    """One run."""
    begun = time.monotonic()
    dance = Dance(stage, cast, begun + seconds)
    found = dance.run()
    return replace(found, stops=stage.session.stops, seconds=time.monotonic() - begun)


class Dance:
    """The state of one steered run."""

    def __init__(self, stage: Stage, cast: Cast, deadline: float) -> None:
        self.stage, self.cast, self.deadline = stage, cast, deadline
        self.session = stage.session
        self.parked: Parked | None = None
        self.forks = 0
        self.seen_sites = 0
        self.skip, self.next_skip = 0, _SKIP
        self.rest = watch.Rest(stage)
        self.child: Thread | None = None
        """Of the fork that matters, where the lock was not to be had."""

    def run(self) -> Performance:
        root = self.stage.start()
        self.stage.go(*root.process.threads.values())
        if self.cast.early and len(root.process.threads) > 1:
            self.stage.arm(root.process)
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.FORK and scene.thread is not None:
                self.forks += 1
                if self.forks == self.cast.number:
                    return self._at_fork(scene.thread, scene.stack)
            self._note(scene)
            if scene.kind is Kind.TICK and self._is_over(scene):
                break
        return self._unreached(root.process)

    def _note(self, scene: Scene) -> None:
        """Before the fork that matters."""
        thread = scene.thread
        if scene.kind is Kind.CLONED and thread is not None and self.parked is None and self.cast.early:
            self.stage.arm(thread.process)
        if scene.kind is Kind.FORKED and scene.child is not None:
            self.stage.disarm(scene.child.process) if scene.call and scene.call.copies_memory else None
        if scene.kind is Kind.SITE and self._may_park(scene):
            self._park(scene)
            return
        if scene.kind is Kind.TICK:
            self._reconsider()
        self.stage.go(thread, scene.child)

    def _is_over(self, scene: Scene) -> bool:
        """Everything rests, and no fork will come."""
        return self.parked is None and self.rest.has_come(scene)

    def _unreached(self, root: Process) -> Performance:
        if self.forks:
            reached = f"fork {self.cast.number} of the finding was not reached; {self.forks} were"
        else:
            reached = f"the finding's fork was not reached: the program {watch.fate(root)}"
        return Performance(Outcome.NO_FORK, reached=reached)

    # ---- parking ---------------------------------------------------------------------------

    def _may_park(self, scene: Scene, forker: Thread | None = None) -> bool:
        thread, acquire = scene.thread, scene.acquire
        assert thread is not None
        assert acquire is not None
        if self.parked is not None or thread is forker:
            return False
        if thread.is_leader and forker is None and not self.cast.leader_too:
            return False
        if not acquire.is_acquire(thread.registers) or (self.cast.locks and scene.lock not in self.cast.locks):
            return False
        self.seen_sites += 1
        if forker is None and not acquire.is_free(thread.registers, thread.process.memory):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        return True

    def _park(self, scene: Scene) -> None:
        thread, acquire = scene.thread, scene.acquire
        assert thread is not None
        assert acquire is not None
        thread.is_frozen = True
        lock = watch.Lock(scene.lock, acquire.width, self.stage.free_of(scene.lock))
        self.parked = Parked(thread, acquire, lock)
        self.stage.disarm(thread.process)

    def _reconsider(self) -> None:
        """Let the parked thread go where everybody seems to wait for it."""
        parked = self.parked
        if parked is None:
            return
        if parked.thread.tid not in self.session.threads:
            self.parked = None
            return
        calls = self.stage.actor_of(parked.thread.process).calls
        parked.samples = parked.samples + 1 if calls == parked.calls else 0
        parked.calls = calls
        parked.stuck = parked.stuck + 1 if self._others_wait(parked) else 0
        if parked.stuck >= STUCK or parked.samples >= _PATIENCE:
            self._unpark()
            self.skip, self.next_skip = self.next_skip, self.next_skip * 2
            self.stage.arm(parked.thread.process)

    def _others_wait(self, parked: Parked) -> bool:
        """Every other thread of the process is blocked, or does nothing but pause."""
        process = parked.thread.process
        busy = self.stage.actor_of(process).busy
        for thread in process.threads.values():
            if thread is parked.thread or busy.get(thread.tid, 0) >= _PAUSES:
                continue
            seen = where(process.pid, thread.tid)
            if seen is not None and (seen.state == "R" or seen.syscall is None):
                return False
        return True

    def _unpark(self) -> None:
        parked, self.parked = self.parked, None
        if parked is not None:
            self.session.thaw([parked.thread])

    # ---- at the fork -----------------------------------------------------------------------

    def _at_fork(self, forker: Thread, stack: tuple[Frame, ...]) -> Performance:
        """Steps 3 to 6; the forker is stopped at the entry of its system call."""
        if self.cast.frees is not None:
            found = Performance(Outcome.LOST, self.cast.frees, fork=stack, is_freed=True)
            return self._fork(forker, self.cast.frees, [], found)
        process = forker.process
        if self.parked is not None and self.parked.thread.process is not process:
            self._unpark()
        if self.parked is None and not self._park_late(forker):
            missed = self._no_holder(forker, stack)
            return self._held_already(forker, stack) or missed
        parked = self.parked
        assert parked is not None
        others = [t for t in process.threads.values() if t is not forker and t is not parked.thread]
        self.session.freeze(others)
        holder = ProbeThread(
            f"{self.stage.title(parked.thread)} of the parent",
            "about to take the lock" if parked.acquire is not None else "waiting for the lock",
            self.stage.modules.stack(parked.thread),
        )  # fmt: skip
        found = self._described(parked, stack, holder)
        if self.cast.holds and not self._takes(parked, others):
            return self._protected(forker, parked, others, found)
        if self.cast.holds:
            inner = self.stage.modules.stack(parked.thread)
            found = replace(found, holder=replace(holder, doing="has just taken the lock, and holds it", stack=inner))
        return self._fork(forker, parked.lock, [parked.thread, *others], found)

    def _held_already(self, forker: Thread, stack: tuple[Frame, ...]) -> Performance | None:
        """Nobody comes to a wanted lock, for somebody has it, and waits for the forking thread: does the child hang?"""
        process = forker.process
        taken = [address for address in sorted(self.cast.locks) if self.stage.is_taken(process, address)]
        if not self.cast.holds or not taken:
            return None
        others = [t for t in process.threads.values() if t is not forker]
        self.session.freeze(others)
        lock = watch.Lock(taken[0], _WORD, self.stage.free_of(taken[0]))
        keeper = keeper_of(self.stage, lock, forker, stack)
        place = self.stage.modules.address(process, lock.address)
        found = Performance(Outcome.LOST, lock, None, (place.object, place.rva), fork=stack, holder=keeper.thread)
        self.deadline = min(self.deadline, time.monotonic() + _HELD_ALREADY)
        found = self._fork(forker, lock, others, replace(found, keeper=keeper.name))
        return replace(found, outcome=Outcome.KEPT) if found.outcome is Outcome.HUNG else None

    def _described(self, parked: Parked, stack: tuple[Frame, ...], holder: ProbeThread) -> Performance:
        place = self.stage.modules.address(parked.thread.process, parked.lock.address)
        return Performance(
            Outcome.LOST, parked.lock, parked.acquire, (place.object, place.rva), fork=stack, holder=holder
        )  # fmt: skip

    def _no_holder(self, forker: Thread, stack: tuple[Frame, ...]) -> Performance:
        others = len(forker.process.threads) - 1
        if not others:
            reached = "the process had no other thread when it forked"
        elif self.seen_sites:
            reached = "other threads took the lock earlier, but none could be stopped before it"
        else:
            reached = f"none of {others} other threads came to take such a lock"
        entry = self._entry(forker) if others and stack else None
        return Performance(Outcome.NO_HOLDER, fork=stack, reached=reached, entry=entry, is_alone=not others)

    def _park_late(self, forker: Thread) -> bool:
        """The forker waits; run the others until one comes to a site, or waits for a lock already, or nothing moves."""
        process = forker.process
        if len(process.threads) < 2:
            return False
        self.skip = 0
        self.stage.arm(process)
        quiet = ticks = 0
        waited, enough = Patience(), _LATE if self.cast.locks else _LATE_ANY
        spins: dict[int, int] = {}
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.SITE and scene.thread is not None and scene.thread.process is process:
                spins.clear()
                if self._may_park(scene, forker):
                    self._park(scene)
                    return True
            if scene.kind is Kind.TICK:
                others = [t for t in process.threads.values() if t is not forker]
                self.parked = self._waiter(others, spins)
                if self.parked is not None:
                    self.session.freeze([self.parked.thread])
                    break
                ticks += 1
                waited.tick(others)
                quiet = 0 if any(map(moves, [*others, *self._children(process)])) else quiet + 1
                if quiet >= STUCK or waited.ticks >= enough:
                    break
                if ticks % _AGAIN == 0:
                    self.stage.disarm(process)
                    self.stage.arm(process)
            self.stage.go(scene.thread, scene.child)
        self.stage.disarm(process)
        return self.parked is not None

    def _children(self, process: Process) -> Iterator[Thread]:
        """What a thread may wait for, as for a command that it has started."""
        for child in self.session.processes.values():
            if child.parent == process.pid and child.is_alive:
                yield from child.threads.values()

    def _waiter(self, others: list[Thread], spins: dict[int, int]) -> Parked | None:
        """A thread that waits for a wanted lock already: in futex on it, or by spinning in a function that acquires."""
        for thread in others:
            seen = self.stage.where(thread)
            word = syscalls.futex_wait(self.stage.machine, seen.syscall, seen.arguments) if seen else None
            if word in self.cast.locks and word is not None:
                return Parked(thread, None, watch.Lock(word, _WORD, self.stage.free_of(word)))
            taken = [a for a in sorted(self.cast.locks) if self.stage.is_taken(thread.process, a)]
            may_spin = seen is not None and seen.state == "R" and len(taken) == 1
            spins[thread.tid] = spins.get(thread.tid, 0) + 1 if may_spin else 0
            if spins[thread.tid] >= _SPINS and self._is_in_acquirer(thread):
                if self._stays_taken(thread, taken[0]):
                    return Parked(thread, None, watch.Lock(taken[0], _WORD, self.stage.free_of(taken[0])))
                spins[thread.tid] = 0
        return None

    def _is_in_acquirer(self, thread: Thread) -> bool:
        """A running thread is in a function that has an acquire site, or near below one."""
        self.session.freeze([thread])
        try:
            return thread.is_stopped and self.stage.is_in_acquirer(thread)
        finally:
            self.session.thaw([thread])

    def _stays_taken(self, thread: Thread, lock: int) -> bool:
        """Nobody lets the lock go while the thread runs on. If somebody does, it may be the thread itself, at work."""
        for _ in range(_GLANCES):
            time.sleep(_GLANCE)
            if not self.stage.is_taken(thread.process, lock):
                return False
        return True

    # ---- taking the lock -------------------------------------------------------------------

    def _takes(self, parked: Parked, others: list[Thread]) -> bool:
        """Let the parked thread go over its acquire; afterwards it is frozen behind it, or waits in it."""
        if parked.acquire is None:
            return False
        if parked.acquire.is_free(parked.thread.registers, parked.thread.process.memory):
            return self._gets(parked)
        # Taken: by the forker, or by one of the others in the middle of its work. Let these finish.
        self.session.thaw(others)
        for _ in self._ticks(_TRIES, others):
            if parked.acquire.is_free(parked.thread.registers, parked.thread.process.memory):
                self.session.freeze(others)
                if parked.acquire.is_free(parked.thread.registers, parked.thread.process.memory):
                    return self._gets(parked)
                self.session.thaw(others)
        self.session.freeze(others)
        return False

    def _gets(self, parked: Parked) -> bool:
        assert parked.acquire is not None
        return attempt(self.stage, parked.thread, parked.acquire)

    def _ticks(self, number: int, running: Sequence[Thread]) -> Iterator[None]:
        """Let time pass, a tick at a time, stops handled; so many in which these could run."""
        for stop in self._stops(number, running):
            if stop is None:
                yield
            else:
                self._pass_over(stop)

    def _stops(self, number: int, running: Sequence[Thread]) -> Iterator[Stop | None]:
        """What stops while time passes; None at the end of each tick."""
        waited = Patience()
        while waited.ticks < number:
            end = time.monotonic() + TICK
            while (left := end - time.monotonic()) > 0:
                stop = self.session.wait(left)
                if stop is not None:
                    yield stop
            waited.tick(running)
            yield None

    # ---- protected -------------------------------------------------------------------------

    def _protected(self, forker: Thread, parked: Parked, others: list[Thread], found: Performance) -> Performance:
        """The lock is not to be had while the forker waits at its fork: shown when it is, once the forker went on.

        "Had" means that the thread returned from the function that wanted it. The forker goes on from system call to
        system call, and waits at each for the thread: it may be about to end the process.
        """
        found = replace(found, entry=self._entry(forker))
        assert found.holder is not None
        keeper = keeper_of(self.stage, parked.lock, forker, found.fork)
        thread, back = parked.thread, self._return_address(parked.thread)
        if back is None:
            return replace(found, outcome=Outcome.NO_HOLDER, reached="where the thread would return to is not known")
        with thread.process.memory.breakpoints_at((back,)):
            self.session.thaw([*others, thread])
            if self._comes_back(thread, _TRIES, running=[*others, thread]):
                return replace(found, outcome=Outcome.NO_HOLDER, reached="another thread had the lock for a long time")
            self.stage.go(forker)
            came = self._comes_back_after(forker, thread)
        if not came:
            return replace(found, outcome=Outcome.NO_HOLDER, reached="after the fork it did not get the lock either")
        self.session.thaw([thread])
        watched = self._watched_all_the_same(parked.lock)
        if watched is not None:
            reached = f"{keeper.name} has it, whatever others do, and nobody lets it go in the child"
            return replace(
                found, outcome=Outcome.KEPT, holder=keeper.thread, watched=watched, reached=reached, keeper=keeper.name
            )
        if keeper.is_another:
            return replace(found, outcome=Outcome.NO_HOLDER, reached="another thread has it until the fork is over")
        return replace(
            found, outcome=Outcome.PROTECTED,
            holder=replace(found.holder, doing="could not take the lock: the forking thread had it"),
            reached=f"the thread did not get it in {_TRIES} samples while the forking thread stood at its fork and all "
            "others ran, and got it once the forking thread had gone on",
        )  # fmt: skip

    def _watched_all_the_same(self, lock: watch.Lock) -> watch.Watched | None:
        """The child, if it waits for what the fork itself holds: handlers that let go too little there."""
        if self.child is None or not self.child.process.is_alive:
            return None
        watched = watch.Watch(self.stage, lock, self.child)
        for scene in self.stage.scenes(min(self.deadline, time.monotonic() + _AFTERWARDS)):
            watched.note(scene)
            self.stage.go(scene.thread, scene.child)
            if scene.kind is Kind.TICK:
                watched.sample()
                if watched.hung is not None:
                    return watched.result(watched.hung)
                if watched.is_over or (not watched.is_waiting and self.rest.has_come(scene)):
                    break
        return None

    def _entry(self, forker: Thread) -> tuple[str, int] | None:
        """The function that the finding's function calls to fork; where none is named, the library's outermost one."""
        process, modules, wanted = forker.process, self.stage.modules, self.stage.fork
        inner: tuple[str, int] | None = None
        for pc, is_return in modules.walk(forker):
            frame, place = modules.frame(process, pc, is_return=is_return), modules.of(process, pc - is_return)
            if place is None:
                return inner
            is_it = wanted is not None and (frame.object, frame.function) == (wanted.object, wanted.function)
            if is_it or (wanted is None and inner is not None and place[0].path != inner[0]):
                return inner
            inner = place[0].path, place[0].function(place[1])[1]
        return None

    def _return_address(self, thread: Thread) -> int | None:
        """Where the function that wants the lock returns to: the innermost one that is in an object with sites."""
        frames = [pc for pc, _ in self.stage.modules.walk(thread, 16)]
        objects = self.stage.objects
        for pc, back in pairwise(frames):
            if self.stage.modules.address(thread.process, pc).object in objects:
                return back
        return None

    def _comes_back(
        self, thread: Thread, ticks: int, forker: Thread | None = None, running: Sequence[Thread] = ()
    ) -> bool:
        """Run everything that is not stopped; true when the thread comes to its return address, where it then is."""
        for stop in self._stops(ticks, running):
            if stop is not None:
                if stop.thread is thread and stop.reason is Reason.BREAKPOINT:
                    return True
                self._pass_over(stop, forker)
        return False

    def _comes_back_after(self, forker: Thread, thread: Thread) -> bool:
        """The same while the forker goes on, as slowly as the thread needs."""
        while time.monotonic() < self.deadline and thread.tid in self.session.threads:
            stop = self.session.wait(TICK)
            if stop is None:
                continue
            if stop.thread is thread and stop.reason is Reason.BREAKPOINT:
                return True
            if (
                stop.thread is forker
                and stop.reason is Reason.SYSCALL
                and self._comes_back(thread, _PAUSE_TICKS, forker)
            ):
                return True
            self._pass_over(stop, forker)
        return False

    def _pass_over(self, stop: Stop, forker: Thread | None = None) -> None:
        """A stop of no interest here; a child runs without breakpoints."""
        if stop.reason is Reason.ENDED:
            return
        scene = self.stage.scene_of(stop)
        if scene is None:
            if stop.reason is Reason.BREAKPOINT:
                self.stage.go(stop.thread)
            return
        if scene.child is not None and scene.call is not None and scene.call.copies_memory:
            self.stage.disarm(scene.child.process)
            if scene.thread is forker:
                self.child = scene.child
        self.stage.go(scene.thread, scene.child)

    # ---- the fork --------------------------------------------------------------------------

    def _fork(self, forker: Thread, lock: watch.Lock, frozen: list[Thread], found: Performance) -> Performance:
        """Steps 5 and 6."""
        self.stage.go(forker)
        watched: watch.Watch | None = None
        settling = 0
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.FORKED and scene.thread is forker and scene.child is not None and watched is None:
                if self.cast.frees and not self._made_free(lock, scene.child.process, forker):
                    return replace(found, reached="the lock lies where it cannot be made free for the child alone")
                watched = watch.Watch(self.stage, lock, scene.child)
                self.session.thaw(frozen)
            elif watched is not None:
                watched.note(scene)
            self.stage.go(scene.thread, scene.child)
            if scene.kind is Kind.TICK and watched is not None:
                watched.sample()
                rests = self.rest.has_come(scene)
                settling = settling + 1 if watched.hung is not None else 0
                is_settled = settling >= _SETTLING or ((watched.is_final or rests) and watched.hung is not None)
                if is_settled and (settling >= _SETTLING_LONG or not watched.may_change):
                    return replace(found, outcome=Outcome.HUNG, watched=watched.result(watched.hung))
                if watched.is_over or watched.is_timed or (not watched.is_waiting and rests):
                    break
        if watched is None:
            return replace(found, outcome=Outcome.LOST, reached="the fork failed")
        if self.cast.frees and not watched.was_got:
            return replace(found, outcome=Outcome.LOST, reached=watched.story())
        return replace(found, outcome=Outcome.PASSED, watched=watched.result(None))

    def _made_free(self, lock: watch.Lock, child: Process, forker: Thread) -> bool:
        """In the child, before its first instruction."""
        owner = child.memory.word(lock.address + OWNER, 4) or 0
        known = owner if owner in forker.process.threads else forker.tid
        return freed(child.memory, lock.address, lock.word_size, lock.free, known)
