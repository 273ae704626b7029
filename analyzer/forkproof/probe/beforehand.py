"""The other order: a thread has the lock before the forking thread comes to its prepare handlers.

Owns: the run that is made after one in which the fork had the lock itself (`steer`, PROTECTED). That it had it once
      does not say that it waits for it: a handler may only try. Here a thread is given the lock first, and keeps it.
      And the run after one in which nobody came to the lock while the forking thread stood at its fork (NO_HOLDER):
      that may have had another lock, which whoever takes this one takes before.
Takes: a `Stage`, a `Cast`, and the function by which the forking thread goes to fork. Gives: `Performance`: PROTECTED
       if the forking thread waits until the lock is let go; HUNG or PASSED if it forks all the same.
Must never: call the fork protected because no thread came to have the lock.
Wrong where: what the forking thread waits for, all the while that the lock is held, is something else.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

from forkproof.model import ProbeThread
from forkproof.probe.attempt import STUCK, moves
from forkproof.probe.patience import Patience
from forkproof.probe.stage import Kind, Scene, Stage
from forkproof.probe.steer import Cast, Dance, Outcome, Parked, Performance
from forkproof.probe.tracee import Process, Thread

_LONG: Final = 100
"""Ticks in which the forking thread runs and does not come to its fork, before the lock is let go;"""
_SOON: Final = 25
"""ticks within which it is to come there then: otherwise it was at work, and did not wait."""


def perform(stage: Stage, cast: Cast, entry: tuple[str, int], seconds: float) -> Performance:
    """One run. `entry`: path and rva of the function."""
    begun = time.monotonic()
    found = _Beforehand(stage, cast, entry, begun + seconds).run()
    return replace(found, stops=stage.session.stops, seconds=time.monotonic() - begun)


class _Beforehand(Dance):
    """The state of the run."""

    def __init__(self, stage: Stage, cast: Cast, entry: tuple[str, int], deadline: float) -> None:
        super().__init__(stage, cast, deadline)
        self.entry = entry

    def run(self) -> Performance:
        """From the start of the program on."""
        root = self.stage.start()
        self._wait_at_entry(root.process)
        self.stage.go(*root.process.threads.values())
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.ENTERED and scene.thread is not None:
                self.forks += 1
                if self.forks == self.cast.number:
                    return self._at_entry(scene.thread)
            if scene.kind is Kind.FORKED and scene.child is not None and scene.call and scene.call.copies_memory:
                self.stage.disarm(scene.child.process)
                self._wait_at_entry(scene.child.process)
            self.stage.go(scene.thread, scene.child)
            if self.rest.has_come(scene):
                break
        return self._unreached(root.process)

    def _wait_at_entry(self, process: Process) -> None:
        at = self.stage.modules.runtime(process, *self.entry)
        if at is not None:
            self.stage.entries.add(at)
            process.memory.insert(at)

    def _at_entry(self, forker: Thread) -> Performance:
        """Nothing of the fork has been done yet: somebody else is given the lock, and then it goes on."""
        process = forker.process
        self.stage.disarm(process)
        if not self._park_late(forker):
            return self._no_holder(forker, ())
        parked = self.parked
        assert parked is not None
        others = [t for t in process.threads.values() if t is not forker and t is not parked.thread]
        self.session.freeze(others)
        if self.cast.holds and not self._takes(parked, others):
            reached = "no thread could be given the lock before the fork"
            return Performance(Outcome.NO_HOLDER, reached=reached, is_callers=True)
        doing = "about to take the lock"
        if self.cast.holds:
            doing = "had the lock before the forking thread came to its handlers, and holds it"
        holder = ProbeThread(
            f"{self.stage.title(parked.thread)} of the parent", doing, self.stage.modules.stack(parked.thread)
        )
        self.session.thaw(others)
        self.stage.go(forker)
        blocked, running = 0, Patience()
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.FORK and scene.thread is forker:
                return self._fork_with_it(forker, parked, scene, holder)
            self._pass(scene)
            if scene.kind is Kind.TICK:
                blocked = 0 if moves(forker) else blocked + 1
                running.tick([forker])
                if blocked >= STUCK or running.ticks >= _LONG:
                    return self._let_go(forker, parked)
        return Performance(Outcome.LOST, reached="the forking thread did not come to its fork")

    def _fork_with_it(self, forker: Thread, parked: Parked, scene: Scene, holder: ProbeThread) -> Performance:
        others = [t for t in forker.process.threads.values() if t is not forker and t is not parked.thread]
        self.session.freeze(others)
        return self._fork(
            forker, parked.lock, [parked.thread, *others], self._described(parked, scene.stack, holder)
        )  # fmt: skip

    def _let_go(self, forker: Thread, parked: Parked) -> Performance:
        """It waited, blocked or going round: for the lock, if it comes to its fork now."""
        self.session.thaw([parked.thread])
        waited = Patience()
        for scene in self.stage.scenes(self.deadline):
            if scene.kind is Kind.FORK and scene.thread is forker:
                return Performance(Outcome.PROTECTED, parked.lock)
            self._pass(scene)
            if scene.kind is Kind.TICK:
                waited.tick([forker])
                if waited.ticks >= _SOON:
                    break
        return Performance(Outcome.LOST, reached="the forking thread did not go on when the lock was let go")

    def _pass(self, scene: Scene) -> None:
        if scene.kind is Kind.FORKED and scene.child is not None and scene.call and scene.call.copies_memory:
            self.stage.disarm(scene.child.process)
        self.stage.go(scene.thread, scene.child)
