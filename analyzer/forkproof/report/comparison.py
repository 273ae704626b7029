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
_PERHAPS: Final = ("perhaps_introduced", "perhaps_fixed")
_VERSION: Final = 1


def render(comparison: Comparison, form: str, width: int, *, color: bool) -> str:
    """In one of FORMATS."""
    if form == "json":
        return stdlib_json.dumps(_document(comparison), indent=2) + "\n"
    if form == "markdown":
        return "\n".join([*_markdown(comparison), ""])
    return painted(_lines(comparison, width), color=color)


def _document(comparison: Comparison) -> dict[str, object]:
    parts = {name: [plain(finding) for finding in getattr(comparison, name)] for name in (*_TITLES, *_PERHAPS)}
    gaps = [plain(gap) for gap in comparison.gaps]
    return {"version": _VERSION, **parts, "gaps": gaps, "errors": comparison.errors}


def _parts(comparison: Comparison) -> Iterator[tuple[str, Sequence[Finding]]]:
    for name in _TITLES:
        yield name, getattr(comparison, name)


def _unsure(comparison: Comparison) -> Iterator[tuple[str, Sequence[Finding]]]:
    for name in _PERHAPS:
        yield name.replace("_", " "), getattr(comparison, name)


def _summary(comparison: Comparison) -> str:
    """Counts, and whether they are all."""
    counts = ", ".join(f"{len(findings)} {name}" for name, findings in _parts(comparison))
    programs = len({gap.program for gap in comparison.gaps})
    if programs:
        counts += f"; {programs} program{'s' if programs != 1 else ''} could not be compared in full"
    elif comparison.errors:
        counts += "; something was not analysed"
    return counts


def _lines(comparison: Comparison, width: int) -> Iterator[Line]:
    for name, findings in _parts(comparison):
        yield line(Span(f"{name.upper()}  {len(findings)}", _TITLES[name]))
        yield from _listed(findings, width)
    if comparison.gaps:
        yield line(Span("NOT COMPARED IN FULL", "error"))
        for gap in comparison.gaps:
            text = f"{gap.program}: {gap.side.upper()} is incomplete: {gap.reason}"
            yield from wrapped(text, width, first=line("  "), indent=4)
        for name, findings in _unsure(comparison):
            if findings:
                yield line(Span(f"{name.upper()}  {len(findings)}", "unknown"))
                yield from _listed(findings, width)
    yield line()
    yield from failures(comparison.errors, width)
    more = ": see above" if comparison.gaps or comparison.errors else ""
    yield line(_summary(comparison) + more)


def _listed(findings: Sequence[Finding], width: int) -> Iterator[Line]:
    for finding in findings:
        severity = finding.severity.value
        first = line("  ", Span(f"{severity.upper():<6}", severity), f"  {finding.id}  ")
        yield from wrapped(state(finding), width, first=first, indent=10, style="quiet")
        yield from wrapped(f"{finding.target}: {finding.message}", width, first=line(" " * 10), indent=10)


def _markdown(comparison: Comparison) -> Iterator[str]:
    yield f"## forkproof: {_summary(comparison)}"
    yield ""
    yield "| | severity | finding | target | what |"
    yield "|---|---|---|---|---|"
    for name, findings in (*_parts(comparison), *_unsure(comparison)):
        for finding in findings:
            target = escaped(finding.target.rsplit("/", 1)[-1])
            message = escaped(finding.message)
            yield f"| {name} | {finding.severity.value} | `{finding.id}` | {target} | {message} |"
    if comparison.gaps:
        yield from ("", "Not compared in full:", "")
        yield from (f"- {escaped(f'{gap.program}: {gap.side} is incomplete: {gap.reason}')}" for gap in comparison.gaps)
    if comparison.errors:
        yield from ("", "Not analysed:", "")
        yield from (f"- {escaped(message.splitlines()[0])}" for message in comparison.errors)
