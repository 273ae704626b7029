"""Processes that do tasks, and that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from forkproof import workers
from forkproof.workers import Died


def squares(offset: object) -> Callable[[int], int]:
    assert isinstance(offset, int)
    return lambda task: task * task + offset


def test_every_task_is_done() -> None:
    assert dict(workers.run(squares, 1, list(range(20)), 3)) == {n: n * n + 1 for n in range(20)}


def test_more_workers_than_tasks() -> None:
    assert dict(workers.run(squares, 0, [3], 8)) == {0: 9}


def deadly(place: object) -> Callable[[int], int]:
    """The first worker that gets task 2 is killed; task 5 kills everyone."""
    assert isinstance(place, str)

    def work(task: int) -> int:
        mark = Path(place, "seen")
        if task == 5 or (task == 2 and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    return work


def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    found = dict(workers.run(deadly, str(tmp_path), list(range(8)), 2))
    assert found == {**{n: n for n in range(8)}, 5: Died(-signal.SIGKILL)}


def test_workers_are_spawned_not_forked() -> None:
    """A fork would have this module's state."""
    here = os.getpid()
    ((_, found),) = workers.run(parents, None, [0], 1)
    assert found[0] == here
    assert found[1] != "fork"


def parents(_: object) -> Callable[[int], tuple[int, str]]:
    import multiprocessing

    return lambda _: (os.getppid(), str(multiprocessing.get_start_method(allow_none=True)))
