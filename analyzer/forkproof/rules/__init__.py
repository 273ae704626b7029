"""What each rule means: one page a rule, kept beside the code and shipped with it.

Owns: the pages and how they are found. Takes: nothing. Gives: typed `Rule`s, sorted by id.
Must never: decide anything about a program; the rules themselves are in `forkproof.hazards`.

A page is Markdown that reads well as it is. It starts with `# id: title`, then the summary as one paragraph, then
the sections of `SECTIONS`, in that order. The examples name fixtures by path; tests check that those exist and
that they say of themselves what the page says of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

SECTIONS: Final = (
    "What it means",
    "How the check works",
    "Bad example",
    "Good example",
    "Where it is wrong",
    "How to fix it",
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as people see it."""

    id: str
    title: str
    summary: str
    """One sentence."""
    page: str
    """The whole page."""

    def section(self, heading: str) -> str:
        """The text of one section; empty if the page has none of this name."""
        _, _, rest = self.page.partition(f"\n## {heading}\n")
        return rest.partition("\n## ")[0].strip()


@cache
def load() -> tuple[Rule, ...]:
    """All rules."""
    pages = (each for each in files(__name__).iterdir() if each.name.endswith(".md"))
    rules = (_rule(page.name.removesuffix(".md"), page.read_text(encoding="utf-8")) for page in pages)
    return tuple(sorted(rules, key=lambda rule: rule.id))


def find(rule_id: str) -> Rule | None:
    """The rule of this id."""
    return next((rule for rule in load() if rule.id == rule_id), None)


def _rule(rule_id: str, page: str) -> Rule:
    heading, _, rest = page.partition("\n\n")
    found, _, title = heading.removeprefix("# ").partition(": ")
    assert found == rule_id, f"the page {rule_id}.md begins with the id {found!r}"
    summary = " ".join(rest.partition("\n\n")[0].split())
    return Rule(rule_id, title, summary, page)
