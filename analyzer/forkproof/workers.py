"""Tasks on several processes, each of which may die.

Owns: the processes and who does what. Takes: a function that makes a worker's function, and tasks. Gives: results.
Must never: lose a task: one whose worker died is tried once more in a fresh process, and is `Died` after that.

The processes are spawned, not forked: a fork-safety tool should pass its own check. A pool of the standard library was
rejected since it breaks as a whole when one of its processes is killed.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final

_TRIES: Final = 2

Work = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Died:
    """What became of a task whose workers were killed, by the system's lack of memory for example."""

    code: int | None
    """As Process.exitcode: negative for a signal."""


@dataclass(eq=False)
class _Worker:
    """One process and the task that it has."""

    process: BaseProcess
    pipe: Connection
    task: int


def run(make: Callable[[Any], Work], setup: object, tasks: Sequence[object], jobs: int) -> Iterator[tuple[int, Any]]:
    """Do every task; (its number, its result) as they come. `make(setup)` runs in each process, once."""
    context = multiprocessing.get_context("spawn")
    waiting = list(range(len(tasks)))[::-1]
    tries = [0] * len(tasks)
    workers: list[_Worker] = []

    def start(number: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make, setup), daemon=True)
        with _no_interrupt():
            process.start()
        theirs.close()
        workers.append(_Worker(process, ours, number))
        give(workers[-1], number)

    def give(worker: _Worker, number: int) -> None:
        worker.task = number
        tries[number] += 1
        with suppress(OSError):  # it is dead already: `wait` will tell
            worker.pipe.send(tasks[number])

    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                start(waiting.pop())
            for pipe in wait([worker.pipe for worker in workers]):
                worker = next(each for each in workers if each.pipe is pipe)
                number = worker.task
                try:
                    result = worker.pipe.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    worker.process.join()
                    if tries[number] < _TRIES:
                        waiting.append(number)
                    else:
                        yield number, Died(worker.process.exitcode)
                    continue
                if waiting:
                    give(worker, waiting.pop())
                else:
                    workers.remove(worker)
                    worker.pipe.close()
                yield number, result
    finally:
        for worker in workers:
            worker.process.terminate()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """What is started in here never sees Ctrl-C, from its first instruction on: who started it ends it."""
    resource_tracker.ensure_running()  # the first process would start it, and that lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, make: Callable[[Any], Work], setup: object) -> None:
    """A worker's life: tasks until the pipe closes."""
    work = make(setup)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(work(pipe.recv()))
