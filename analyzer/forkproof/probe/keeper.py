"""Who has a lock that nobody lets go while the forking thread stands at its fork?

Owns: that name. A mutex of glibc tells its owner; of any other lock it is not known whether the forking thread has it,
      or one that waits for the forking thread.
Takes: a `Stage`, the lock, the forking thread; all threads of its process are stopped. Gives: `Keeper`.
Must never: blame the forking thread for a lock that another one has.
"""

from __future__ import annotations

from dataclasses import dataclass

from forkproof.model import Frame, ProbeThread
from forkproof.probe.sites import OWNER
from forkproof.probe.stage import Stage
from forkproof.probe.tracee import Thread
from forkproof.probe.watch import Lock


@dataclass(frozen=True, slots=True)
class Keeper:
    """Who has it."""

    name: str
    thread: ProbeThread
    is_another: bool = False
    """A thread that does not fork."""


def keeper_of(stage: Stage, lock: Lock, forker: Thread, stack: tuple[Frame, ...]) -> Keeper:
    """By the lock's word for its owner, if it has one; `stack` is the forking thread's."""
    process = forker.process
    owner = process.threads.get(process.memory.word(lock.address + OWNER, 4) or 0)
    title = f"{stage.title(owner or forker)} of the parent"
    if owner is forker:
        return Keeper("the forking thread itself", ProbeThread(title, "forks, and has the lock", stack))
    if owner is not None and owner.is_stopped:
        doing = "has the lock, and keeps it while the forking thread stands"
        return Keeper("a thread of its parent", ProbeThread(title, doing, stage.modules.stack(owner)), is_another=True)
    doing = "forks; it has the lock, or a thread that waits for it"
    return Keeper("the forking thread, or one that waits for it,", ProbeThread(title, doing, stack))
