"""A comparison of two reports, for people, for a merge request, and for machines.

Owns: its three renderings. Takes: a `Comparison`. Gives: text.
Must never: leave a finding out.
"""

from __future__ import annotations

import json as stdlib_json
from collections.abc import Iterator, Sequence
from typing import Final

from forkproof.model import Finding
from forkproof.policy.compare import Comparison
from forkproof.report.json import plain
from forkproof.report.layout import Line, Span, line, painted, wrapped
from forkproof.report.markdown import escaped
from forkproof.report.text import failures, state

FORMATS: Final = ("text", "markdown", "json")
_TITLES: Final = {"introduced": "error", "fixed": "good", "unchanged": "quiet"}
_VERSION: Final = 1


def render(comparison: Comparison, form: str, width: int, *, color: bool) -> str:
    """In one of FORMATS."""
    if form == "json":
        parts = {name: [plain(finding) for finding in part] for name, part in _parts(comparison)}
        return stdlib_json.dumps({"version": _VERSION, **parts, "errors": comparison.errors}, indent=2) + "\n"
    if form == "markdown":
        return "\n".join([*_markdown(comparison), ""])
    return painted(_lines(comparison, width), color=color)


def _parts(comparison: Comparison) -> Iterator[tuple[str, Sequence[Finding]]]:
    for name in _TITLES:
        yield name, getattr(comparison, name)


def _lines(comparison: Comparison, width: int) -> Iterator[Line]:
    for name, findings in _parts(comparison):
        yield line(Span(f"{name.upper()}  {len(findings)}", _TITLES[name]))
        for finding in findings:
            severity = finding.severity.value
            first = line("  ", Span(f"{severity.upper():<6}", severity), f"  {finding.id}  ")
            yield from wrapped(state(finding), width, first=first, indent=10, style="quiet")
            yield from wrapped(f"{finding.target}: {finding.message}", width, first=line(" " * 10), indent=10)
    yield line()
    yield from failures(comparison.errors, width)
    unsure = "; something was not analysed: see above" if comparison.errors else ""
    yield line(", ".join(f"{len(findings)} {name}" for name, findings in _parts(comparison)) + unsure)


def _markdown(comparison: Comparison) -> Iterator[str]:
    yield "## forkproof: " + ", ".join(f"{len(findings)} {name}" for name, findings in _parts(comparison))
    yield ""
    yield "| | severity | finding | target | what |"
    yield "|---|---|---|---|---|"
    for name, findings in _parts(comparison):
        for finding in findings:
            target = escaped(finding.target.rsplit("/", 1)[-1])
            message = escaped(finding.message)
            yield f"| {name} | {finding.severity.value} | `{finding.id}` | {target} | {message} |"
    if comparison.errors:
        yield ""
        yield "Not analysed:"
        yield ""
        yield from (f"- {escaped(message.splitlines()[0])}" for message in comparison.errors)
