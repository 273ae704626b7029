"""What a shell offers after a TAB where click would offer nothing: files, directories, names of rules.

Owns: which words of a command line are which, told by what its help calls them.
Takes: a command. Gives: the same one, whose parameters complete themselves.
Must never: import the analysis: a TAB is to be instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import click
from click.shell_completion import CompletionItem


class _Path(click.types.StringParamType):
    """What the shell itself looks for: a "file", or a "dir"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002 - click's
        return [CompletionItem(incomplete, type=self.kind)]


class _Rule(click.types.StringParamType):
    """The rules, with their titles where a shell shows such."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002 - click's
        from forkproof import rules

        return [CompletionItem(rule.id, help=rule.title) for rule in rules.load() if rule.id.startswith(incomplete)]


_FILE, _RULE = _Path("file"), _Rule()
_OFFERS: Final[Mapping[str, click.types.StringParamType]] = {
    "TARGET": _FILE,
    "OLD": _FILE,
    "NEW": _FILE,
    "ARTIFACT": _FILE,
    "CMD": _FILE,
    "LIB": _FILE,
    "DIR": _Path("dir"),
    "RULE": _RULE,
    "ID|RULE": _RULE,
}
"""By the word in the help, without what says that it is optional or repeated."""


def completing(command: click.Command) -> click.Command:
    """The command; what has a type that completes itself keeps it."""
    for parameter in command.params:
        word = parameter.metavar or (parameter.name or "").upper()
        offer = _OFFERS.get(word.strip("[]-. "))
        if offer is not None and parameter.type in (click.STRING, click.UNPROCESSED):
            parameter.type = offer
    return command
