"""Which lock is blamed, and what one fork says of another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from forkproof.model import Lock
from forkproof.probe import prove
from forkproof.probe.stack import Address, Module
from forkproof.probe.steer import Outcome, Performance

OBJECT = "/usr/bin/daemon"


@pytest.mark.parametrize(
    ("rva", "form", "is_it"), [(0x1000, "global", True), (0x1028, "global", False), (0x1028, "array", True)]
)
def test_the_lock_beside_it_is_another(monkeypatch: pytest.MonkeyPatch, rva: int, form: str, is_it: bool) -> None:
    monkeypatch.setattr(Module, "of", lambda path: SimpleNamespace(name=path.rpartition("/")[2]))
    assert prove.is_of(Address(OBJECT, rva), Lock("daemon", "a_lock", 0x1000, form)) is is_it


@pytest.mark.parametrize("is_callers", [True, False])
def test_a_fork_whose_caller_has_the_lock_says_nothing_of_the_next(is_callers: bool) -> None:
    protected = prove._Try([Performance(Outcome.PROTECTED, is_callers=is_callers)])
    assert prove._depends_on_caller([prove._Try(), protected]) is is_callers


def test_no_fork_was_protected() -> None:
    assert not prove._depends_on_caller([prove._Try([Performance(Outcome.NO_HOLDER)])])
