"""`forkproof rules`: what there is to find, and what each of it means.

Owns: the command. Takes: nothing, or a rule's id. Gives: a list, or a page.
Must never: import the analysis.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Final

import click

from forkproof import rules
from forkproof.cli import output
from forkproof.report.layout import Line, Span, line, painted, wrapped

_DIGEST: Final = re.compile(r"-[0-9a-f]{10}$")
"""What a finding's id has behind the rule's."""


@click.command("rules")
@click.argument("rule", required=False, metavar="[RULE]")
@output.NO_COLOR
def rules_command(rule: str | None, no_color: bool) -> None:
    """List the rules, one line each; with RULE, or the id of a finding, show the rule's page.

    A page says what the rule means, how the check works, a bad and a good example, where it is wrong, and how to
    fix what it finds.

    \b
    Examples:
      forkproof rules
      forkproof rules atfork-unbound
    """
    lines = _list(output.width()) if rule is None else _page(rule, output.width())
    output.emit(painted(lines, color=output.wants_color(no_color)))


def unknown(name: str) -> click.UsageError:
    """The error for an id that is no rule's, with those that look like it."""
    known = [rule.id for rule in rules.load()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"The rules are: {', '.join(known)}."
    return click.UsageError(f"There is no rule {name!r}. {hint}")


def _list(width: int) -> Iterator[Line]:
    found = rules.load()
    indent = max(len(rule.id) for rule in found) + 2
    for rule in found:
        first = line(Span(f"{rule.id:<{indent}}", "name"))
        yield from wrapped(rule.title, width, first=first, indent=indent)
    yield line()
    yield from wrapped("Show the page of one of them: forkproof rules RULE", width)


def _page(name: str, width: int) -> Iterator[Line]:
    from forkproof.report.explain import page_lines

    rule = rules.find(name) or rules.find(_DIGEST.sub("", name))
    if rule is None:
        raise unknown(name)
    return page_lines(rule.page, width)
