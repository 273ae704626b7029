"""One thread goes over one acquire, alone: did it get the lock?

Owns: that step, whatever the instruction is. Takes: a stopped thread at an acquire site. Gives: yes or no; afterwards
      the thread is stopped behind the acquire, or waits in it.
Must never: step between a load-exclusive and its store.
"""

from __future__ import annotations

from typing import Final

from forkproof.probe.session import Reason
from forkproof.probe.sites import Acquire
from forkproof.probe.stage import TICK, Stage
from forkproof.probe.tracee import Thread, where

STUCK: Final = 15
"""Samples in a row in which nothing moves, before something else is tried."""
_LONG: Final = 400
"""Samples after which a thread that only spins is given up."""


def attempt(stage: Stage, thread: Thread, acquire: Acquire) -> bool:
    """Over the acquiring instruction; true when the thread got the lock."""
    process, before = thread.process, thread.registers
    bias = before.pc - acquire.site.rva
    exits = _exits(stage, acquire, thread, bias)
    while True:
        if not exits:
            if not stage.session.step(thread):
                stage.session.freeze([thread])
                return False
        elif not _comes_out(stage, thread, exits):
            return False
        got = acquire.got(before, thread.registers, bias, process.memory)
        if got is not None:
            return got and process.is_alive


def moves(thread: Thread) -> bool:
    """It runs, or is about to."""
    seen = where(thread.process.pid, thread.tid)
    return seen is not None and (seen.state == "R" or seen.syscall is None)


def _exits(stage: Stage, acquire: Acquire, thread: Thread, bias: int) -> tuple[int, ...]:
    if not acquire.is_tail_call:
        return tuple(e + bias for e in acquire.exits)
    machine, registers = stage.session.machine, thread.registers
    back = registers[machine.link] if machine.link else thread.process.memory.word(registers.sp)
    return (back,) if back is not None else ()


def _comes_out(stage: Stage, thread: Thread, exits: tuple[int, ...]) -> bool:
    """Run this thread alone to an exit; false when it waits instead."""
    session, memory = stage.session, thread.process.memory
    with memory.breakpoints_at(exits):
        thread.is_frozen = False
        session.resume(thread)
        waits = ticks = 0
        while waits < STUCK and ticks < _LONG:
            stop = session.wait(TICK)
            if stop is None:
                ticks += 1
                waits = 0 if moves(thread) else waits + 1
            elif stop.thread is thread and stop.reason is Reason.BREAKPOINT:
                thread.is_frozen = True
                return True
            elif stop.thread is thread and stop.reason is Reason.ENDED:
                return False
            else:
                stage.go(stop.thread, stop.child)
        session.freeze([thread])
    return False
