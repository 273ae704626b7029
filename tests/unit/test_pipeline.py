"""A bug that one program brings to light costs the others nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import forkproof
from forkproof import pipeline
from forkproof.facts import Facts
from forkproof.model import Finding


def _stumbles(facts: Facts) -> list[Finding]:
    if facts.target.endswith("false"):
        raise KeyError("surprise")
    return []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "RULES", (_stumbles,))


@pytest.mark.usefixtures("machine")
def test_a_bug_is_told_of_the_program_that_met_it() -> None:
    report = forkproof.scan("/bin/false", "/bin/true", cache=None)
    assert [Path(target.path).name for target in report.targets] == ["true"]
    (message,) = report.errors
    assert message.startswith("/bin/false: internal error: KeyError: 'surprise'")
    assert "scan this program alone" in message


@pytest.mark.usefixtures("machine")
def test_alone_it_is_raised() -> None:
    with pytest.raises(KeyError):
        forkproof.scan("/bin/false", cache=None)
