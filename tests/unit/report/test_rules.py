"""Every rule has a page, every page its sections, and its examples say of themselves what the page says of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import forkproof
from fixtures import truth
from forkproof import rules
from forkproof.rules import SECTIONS, Rule

ROOT = Path(truth.__file__).parents[1]
HAZARDS = Path(forkproof.__file__).parent / "hazards"
#: The rules of the design. Where one of these words stands in the code of a hazard, the rule is in use.
PLANNED = {
    *("atfork-unbound", "atfork-absent", "atfork-incomplete", "atfork-order", "handler-unsafe", "lock-reentry"),
    *("inherited-lock", "unsafe-call", "threads-lost", "vfork-misuse", "handlers-skipped"),
}

every_rule = pytest.mark.parametrize("rule", rules.load(), ids=lambda rule: rule.id)


def used() -> Iterator[str]:
    """Ids of rules that the hazards mention as a string of their own."""
    for source in HAZARDS.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in PLANNED:
                yield str(node.value)


def examples(rule: Rule, section: str) -> list[truth.Fixture]:
    named = re.findall(r"`(fixtures/\S+\.(?:c|cc))`", rule.section(section))
    assert named, f"{rule.id}: {section} names no fixture"
    return [truth.read(ROOT / each) for each in named]


def findings(fixture: truth.Fixture) -> set[str]:
    return {e.fact.rule for e in fixture.expectations if isinstance(e.fact, truth.Finding)}


def test_every_rule_in_use_has_a_page() -> None:
    assert {"atfork-unbound", "atfork-absent", "inherited-lock"} <= set(used())
    assert set(used()) <= {rule.id for rule in rules.load()}


def test_loading() -> None:
    ids = [rule.id for rule in rules.load()]
    assert ids == sorted(ids)
    assert rules.find("atfork-unbound") is rules.load()[ids.index("atfork-unbound")]
    assert rules.find("nothing") is None


@every_rule
def test_the_sections_are_there_in_order_and_filled(rule: Rule) -> None:
    assert tuple(re.findall(r"^## (.*)$", rule.page, re.MULTILINE)) == SECTIONS
    assert all(rule.section(section) for section in SECTIONS)
    wrong = rule.section("Where it is wrong")
    assert "False positives:" in wrong
    assert "False negatives:" in wrong


@every_rule
def test_the_head(rule: Rule) -> None:
    assert rule.title
    assert rule.summary.count(". ") == 0, "the summary is one sentence"
    assert rule.summary.endswith(".")
    assert rule.page.endswith("\n")


@every_rule
def test_bad_examples_are_found_by_this_rule(rule: Rule) -> None:
    assert any(rule.id in findings(fixture) for fixture in examples(rule, "Bad example"))


@every_rule
def test_good_examples_are_not(rule: Rule) -> None:
    assert not any(rule.id in findings(fixture) for fixture in examples(rule, "Good example"))


@every_rule
def test_other_rules_that_it_mentions_exist(rule: Rule) -> None:
    assert set(re.findall(r"forkproof rules ([a-z-]+)", rule.page)) <= {each.id for each in rules.load()}
