"""Which control run a hang is compared with."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from forkproof.model import Finding
from forkproof.probe.prove import Prover, Wanted
from forkproof.probe.stage import Command
from forkproof.probe.steer import Cast, Outcome, Performance
from forkproof.probe.watch import Lock
from tests.unit.report import samples

LOCK = Lock(0x1000, 40)
USUAL, FREED = (frozenset({LOCK.address}), False, None), (frozenset[int](), True, LOCK)
"""What the casts ask for: the lock, whether to hold it, what to make free."""

CHANCE = [Outcome.NO_HOLDER, Outcome.HUNG] * 2
"""Usual control runs that show nothing, and after which no more of them are made."""


def compared(
    monkeypatch: pytest.MonkeyPatch, outcomes: Iterable[Outcome], entry: tuple[str, int] | None = None
) -> tuple[Performance, list[object]]:
    """The control run that counts, where runs end like this one after the other, and what was asked for in each."""
    ends, asked = iter(outcomes), list[object]()

    def perform(_self: Prover, _finding: Finding, cast: Cast) -> Performance:
        asked.append((cast.locks, cast.holds, cast.frees))
        return Performance(next(ends), is_freed=cast.frees is not None)

    def beforehand(
        _self: Prover, _finding: Finding, cast: Cast, locks: frozenset[int], entry: tuple[str, int]
    ) -> Performance:
        asked.append((locks, cast.holds, entry))
        return Performance(next(ends))

    monkeypatch.setattr(Prover, "_perform", perform)
    monkeypatch.setattr(Prover, "_beforehand", beforehand)
    prover = Prover(Wanted(Command(("./daemon",), {})))
    return prover._compared(samples.INHERITED, Cast(), LOCK, entry), asked


def test_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    control, asked = compared(monkeypatch, [Outcome.PASSED])
    assert (control.outcome, control.is_freed, asked) == (Outcome.PASSED, False, [USUAL])


@pytest.mark.parametrize("missed", [Outcome.NO_HOLDER, Outcome.HUNG])
def test_what_is_chance_is_tried_again(monkeypatch: pytest.MonkeyPatch, missed: Outcome) -> None:
    control, asked = compared(monkeypatch, [missed, Outcome.PASSED])
    assert (control.outcome, control.is_freed, asked) == (Outcome.PASSED, False, [USUAL, USUAL])


def test_a_hang_before_the_fork_began_is_compared_with_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "/usr/lib/libc.so.6", 0x1234
    alike = USUAL[0], False, entry
    control, asked = compared(monkeypatch, [Outcome.PASSED], entry)
    assert (control.outcome, asked) == (Outcome.PASSED, [alike])
    control, asked = compared(monkeypatch, [Outcome.NO_HOLDER, Outcome.PASSED], entry)
    assert (control.outcome, asked) == (Outcome.PASSED, [alike, USUAL])


def test_at_last_the_child_starts_with_the_lock_free(monkeypatch: pytest.MonkeyPatch) -> None:
    control, asked = compared(monkeypatch, [*CHANCE, Outcome.PASSED])
    assert (control.outcome, control.is_freed, asked) == (Outcome.PASSED, True, [*[USUAL] * 4, FREED])


def test_a_freed_child_that_does_not_ask_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    control, asked = compared(monkeypatch, [*CHANCE, Outcome.LOST, Outcome.LOST, Outcome.PASSED])
    assert (control.outcome, control.is_freed, asked[4:]) == (Outcome.PASSED, True, [FREED] * 3)


def test_a_child_that_hangs_all_the_same_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    control, asked = compared(monkeypatch, [Outcome.HUNG] * 5)
    assert (control.outcome, control.is_freed, asked[4:]) == (Outcome.HUNG, False, [FREED])


def test_the_program_ended_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    control, asked = compared(monkeypatch, [Outcome.LOST])
    assert (control.outcome, asked) == (Outcome.LOST, [USUAL])
