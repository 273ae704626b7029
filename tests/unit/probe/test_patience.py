"""Waits are counted in turns of the threads that are waited for, not in seconds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from forkproof.probe import patience
from forkproof.probe.patience import Patience
from forkproof.probe.tracee import Thread, Where


def thread(tid: int) -> Thread:
    return cast("Thread", SimpleNamespace(tid=tid, process=SimpleNamespace(pid=1)))


class Machine:
    """What /proc would say."""

    def __init__(self) -> None:
        self.ran: dict[int, int | None] = {}
        self.state: dict[int, str] = {}

    def nanoseconds(self, thread: Thread) -> int | None:
        return self.ran[thread.tid]

    def where(self, _pid: int, tid: int) -> Where | None:
        return Where(tid, self.state[tid], None) if tid in self.state else None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(patience, "_nanoseconds", made.nanoseconds)
    monkeypatch.setattr(patience, "where", made.where)
    return made


def waited(machine: Machine, runs: list[int | None], state: str | None) -> float:
    """Ticks that count, where a thread had run so long at each."""
    waiting = Patience()
    if state is not None:
        machine.state[7] = state
    for ran in runs:
        machine.ran[7] = ran
        waiting.tick([thread(7)])
    return waiting.ticks


def test_a_thread_that_runs_counts(machine: Machine) -> None:
    assert waited(machine, [10, 20, 30], "R") == 3


def test_a_thread_that_is_kept_from_running_hardly_counts(machine: Machine) -> None:
    assert waited(machine, [10, 10, 10], "R") == pytest.approx(1.2)


@pytest.mark.parametrize("state", ["S", "t", None])
def test_a_thread_that_does_not_want_to_run_counts(machine: Machine, state: str | None) -> None:
    assert waited(machine, [10, 10, 10], state) == 3


def test_a_kernel_that_does_not_say(machine: Machine) -> None:
    assert waited(machine, [None, None], "R") == 2


def test_one_of_several_is_enough(machine: Machine) -> None:
    waiting = Patience()
    machine.state.update({7: "R", 8: "R"})
    for ran in (1, 2, 3):
        machine.ran.update({7: ran, 8: 5})
        waiting.tick([thread(7), thread(8)])
    assert waiting.ticks == pytest.approx(1.2)


def test_without_threads_every_tick_counts() -> None:
    waiting = Patience()
    waiting.tick([])
    assert waiting.ticks == 1
