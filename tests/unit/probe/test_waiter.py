"""Which running thread is taken for one that spins on a lock: none that is at work with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forkproof.probe import steer

LOCK = 0x5000


class Machinery:
    """A stage whose lock is taken in all looks but the `free` one, and a thread that runs in a function that locks."""

    machine = "x86_64"

    def __init__(self, free: int | None) -> None:
        self.looks, self.free = 0, free
        self.session = SimpleNamespace(freeze=lambda _: None, thaw=lambda _: None)

    def is_taken(self, _process: object, _lock: int) -> bool:
        self.looks += 1
        return self.looks != self.free

    def is_in_acquirer(self, _thread: object) -> bool:
        return True

    def where(self, _thread: object) -> object:
        return SimpleNamespace(state="R", syscall=None, arguments=())

    def free_of(self, _lock: int) -> None:
        return None


@pytest.mark.parametrize(
    ("free", "is_waiter"),
    [(None, True), (steer._SPINS + 1, False), (steer._SPINS + steer._GLANCES, False)],
    ids=["never let go", "let go at the first glance", "let go at the last glance"],
)
def test_a_thread_that_lets_the_lock_go_is_at_work(
    monkeypatch: pytest.MonkeyPatch, free: int | None, is_waiter: bool
) -> None:
    monkeypatch.setattr("forkproof.probe.steer.time.sleep", lambda _: None)
    stage: Any = Machinery(free)
    dance = steer.Dance(stage, steer.Cast(1, frozenset({LOCK})), 0.0)
    thread: Any = SimpleNamespace(tid=7, process=SimpleNamespace(pid=6), is_stopped=True)
    spins: dict[int, int] = {}
    found = [dance._waiter([thread], spins) for _ in range(steer._SPINS)]
    assert not any(found[:-1])
    assert (found[-1] is not None) is is_waiter
    assert spins[7] == (steer._SPINS if is_waiter else 0)
