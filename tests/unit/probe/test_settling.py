"""Whether a process that hangs may still let its lock go: a thread of it that runs, or pauses, may."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forkproof.probe import watch

_NANOSLEEP, _READ, _FUTEX = 35, 0, 202
"""System calls of x86-64."""


@pytest.mark.parametrize(
    ("state", "call", "may_change"),
    [
        ("S", _NANOSLEEP, True),
        ("R", None, True),
        ("t", None, True),
        ("R", _READ, True),
        ("S", _READ, False),
        ("S", _FUTEX, False),
    ],
    ids=["pauses", "runs", "is stopped", "is about to read", "reads", "waits for something"],
)
def test_by_what_another_thread_does(
    monkeypatch: pytest.MonkeyPatch, state: str, call: int | None, may_change: bool
) -> None:
    waiter, other = SimpleNamespace(tid=2), SimpleNamespace(tid=3)
    process = SimpleNamespace(pid=2, threads={2: waiter, 3: other})
    doing = SimpleNamespace(state=state, syscall=call, arguments=())
    looked: Any = object.__new__(watch.Watch)
    looked.stage = SimpleNamespace(machine="x86_64", where=lambda _: doing)
    looked.children = {2: SimpleNamespace(process=process)}
    monkeypatch.setattr(watch.Watch, "hung", property(lambda _: process))
    monkeypatch.setattr(watch.Watch, "_waits", lambda _self, _child, tid: tid == 2)
    assert looked.may_change is may_change
