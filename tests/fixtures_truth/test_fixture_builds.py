"""Every fixture builds for every machine that has a compiler, every truth parses, and twins know each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import truth
from fixtures.build import Result
from fixtures.truth import MACHINES, Fixture, TruthError, parse, read_all

FIXTURES = read_all()


@pytest.mark.parametrize("machine", MACHINES)
def test_all_build(machine: str, built_fixtures: Callable[[str], Result]) -> None:
    result = built_fixtures(machine)
    left_out = {name: why for name, why in result.skipped.items() if "is not installed" not in why}
    assert set(left_out) == {name for name, f in FIXTURES.items() if machine not in f.recipe.machines}
    for fixture in result.fixtures.values():
        for variant in fixture.recipe.variants:
            assert result.tree.path(fixture, variant).read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize("fixture", list(FIXTURES.values()), ids=lambda f: f.name)
def test_every_fixture_is_described(fixture: Fixture) -> None:
    assert fixture.summary.endswith("."), "the first paragraph says what it shows"
    assert all(name in FIXTURES for name in (*fixture.recipe.links, *fixture.recipe.after))
    assert fixture.twin is None or fixture.twin in FIXTURES
    assert len(fixture.source.read_text().splitlines()) <= 90


@pytest.mark.parametrize("fixture", [f for f in FIXTURES.values() if f.hangs("x86_64")], ids=lambda f: f.name)
def test_every_hang_has_a_clean_twin(fixture: Fixture) -> None:
    assert fixture.twin is not None
    assert FIXTURES[fixture.twin].hangs("x86_64") is False


def _parse(*lines: str) -> Fixture:
    return parse("it", Path("it.c"), "/* One.\n *\n" + "".join(f" * {line}\n" for line in lines) + " */\n")


def test_facts_are_read() -> None:
    fixture = _parse(
        "build: program",
        "links: a b",
        "expect: window fork in main kind=exit handlers=no",
        "expect: finding rule=inherited-lock severity=high on aarch64",
        "expect: binding f from it to nothing",
        "expect: no finding on x86_64",
        "run: hangs on aarch64",
    )
    assert fixture.recipe.links == ("a", "b")
    assert fixture.facts("aarch64") == (
        truth.Window("fork", "main", "exit", "no"),
        truth.Finding("inherited-lock", "high"),
        truth.Binding("f", "it", None),
    )
    assert truth.NoFinding() in fixture.facts("x86_64")
    assert (fixture.hangs("aarch64"), fixture.hangs("x86_64")) == (True, None)


@pytest.mark.parametrize(
    "line",
    [
        "expect: finding rul=inherited-lock",
        "expect: finding severity=high",
        "expect: window fork main",
        "expect: something else",
        "expect: no finding on sparc",
        "run: perhaps",
        "builds: program",
        "variants: O3",
        "just prose",
    ],
)
def test_what_is_not_understood_is_refused(line: str) -> None:
    with pytest.raises((TruthError, TypeError)):
        _parse("build: program", line)
