"""What `observe` tells of a run, short of any fork."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import pytest

from fixtures.build import Result
from forkproof.probe.observe import Observer
from forkproof.probe.stage import BEFORE, Command, Stage


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("missing_library", "ended with status 127 before its own code ran"),
        ("version_default", "ended with status 0"),
    ],
)
def test_how_a_program_ends(built_fixtures: Callable[[str], Result], name: str, end: str) -> None:
    program = str(built_fixtures(platform.machine()).tree.root() / name)
    with Stage(Command((program,), dict(os.environ)), (), None, {}) as stage:
        (process,) = Observer(stage, None, follow=False).run(20).processes.values()
    assert (process.command, process.end) == ((program,), end)


def test_what_a_grandchild_has_from_its_parents_is_marked_once(built_fixtures: Callable[[str], Result]) -> None:
    program = str(built_fixtures(platform.machine()).tree.root() / "daemon_hooked")  # forks twice
    with Stage(Command((program,), dict(os.environ)), (), None, {}) as stage:
        assert len(Observer(stage, None, follow=False).run(20).processes) == 3
        marked = [text.count(BEFORE) for actor in stage.actors.values() for text in actor.log]
    assert set(marked) == {0, 1}
