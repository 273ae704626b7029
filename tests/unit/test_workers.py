"""Processes that do tasks, and that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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


def ended(place: object) -> Callable[[int], int]:
    """Tells its process's number and ends that of the one who waits."""

    def work(task: int) -> int:
        Path(str(place), str(os.getpid())).touch()
        time.sleep(60)
        return task

    return work


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C reaches the workers, too, and they say nothing; a pipeline's time limit is a SIGTERM to one process."""
    places = tmp_path / "tmp", tmp_path / "pids"
    for place in places:
        place.mkdir()
    program = """if True:
        import sys, tempfile
        import click
        from forkproof import workers
        from forkproof.cli.group import LazyGroup
        from tests.unit.test_workers import ended

        @click.group(cls=LazyGroup, invoke_without_command=True)
        def main():
            with tempfile.TemporaryDirectory():
                list(workers.run(ended, sys.argv[1], [1, 2], 2))

        if __name__ == "__main__":
            main(args=[])
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    environment = {**os.environ, "TMPDIR": str(places[0]), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), str(places[1])]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 60
    while len(list(places[1].iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, b"forkproof: interrupted\n")
    assert list(places[0].iterdir()) == []
