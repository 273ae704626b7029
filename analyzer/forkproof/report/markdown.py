"""The report as Markdown, for a merge request or a job summary.

Owns: what a reviewer sees first, and what is folded. Takes: a Report. Gives: text.
Must never: let a name from a file act as Markdown or HTML, or drop a finding from the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from forkproof.model import Conditions, Finding, Frame, Report
from forkproof.report import stacks
from forkproof.report.graph import flowchart, slice_of
from forkproof.report.layout import clean
from forkproof.report.text import LABELS, by_weight, counted, is_partial, launched, lock_words, overridden, state

FULL: Final = 20
"""Findings that are unfolded below the table: hosts cut comments that are too long."""
_MARKS: Final = {"high": "🔴", "medium": "🟠", "low": "🔵", "note": "⚪"}
_ENTITIES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_ACTIVE: Final = frozenset("\\`*_{}[]()<>#+-.!|~&@:")


def render(report: Report) -> str:
    """The whole report."""
    return "\n".join([*_lines(report), ""])


def _lines(report: Report) -> Iterator[str]:
    findings = by_weight(report.findings)
    rest = "; something was not analysed" if is_partial(report) else ""
    yield f"## forkproof: {counted(findings)}{rest}"
    yield ""
    if report.overrides:
        yield f"Changed by policy: {escaped(overridden(report.overrides))}"
        yield ""
    if findings:
        yield "| | finding | target | what | state |"
        yield "|---|---|---|---|---|"
        yield from map(_row, findings)
        yield ""
    for target in report.targets:
        yield from (f"- {escaped(target.path)}: {escaped(told)}" for told in launched(target))
        if not any(finding.target == target.path for finding in findings):
            found = "no finding in what was analysed" if target.gap else "no finding"
            yield f"- {escaped(target.path)}: {found} ({len(target.closure)} objects, {len(target.windows)} forks)"
    for finding in findings[:FULL]:
        yield from _details(finding)
    if len(findings) > FULL:
        yield f"\n{len(findings) - FULL} more are in the table; `forkproof report` shows all of them in other formats."
    if report.errors:
        yield "\n### Not analysed\n"
        yield from (f"- {escaped(message.splitlines()[0] if message else '')}" for message in report.errors)


def _row(finding: Finding) -> str:
    severity = finding.severity.value
    name = finding.target.rsplit("/", 1)[-1]
    return (
        f"| {_MARKS[severity]} {severity} | `{finding.id}` | {escaped(name)} | {escaped(finding.message)} | "
        f"{escaped(state(finding))} |"
    )


def _details(finding: Finding) -> Iterator[str]:
    yield ""
    yield f"<details><summary><code>{finding.id}</code> {_html(finding.message)}</summary>"
    yield ""
    yield f"{escaped(finding.target)}: **{finding.rule}**, {finding.severity.value}, {finding.verdict.value}"
    if finding.conditions is not None:
        yield from _conditions(finding.conditions)
    if finding.why:
        yield f"\n{escaped(finding.why)}"
    if finding.lock is not None:
        yield f"\nLock: {escaped(lock_words(finding.lock))}"
    if finding.fork is not None:
        yield f"\nFork: {escaped(stacks.place(finding.fork))}"
    for title, frames in zip(stacks.titles(finding.rule), (finding.holder, finding.requester), strict=True):
        yield from _stack(title, frames)
    if finding.holder or finding.requester:
        yield "\n```mermaid"
        yield from flowchart(slice_of([finding]))
        yield "```"
    if finding.fix:
        yield f"\n**What to do:** {escaped(finding.fix)}"
    yield "\n</details>"


def _conditions(conditions: Conditions) -> Iterator[str]:
    sentences = (conditions.threads, conditions.holder, conditions.requester, conditions.not_quiesced)
    yield "\n| condition | | evidence |"
    yield "|---|---|---|"
    for label, answer, sentence in zip(LABELS, conditions.answers, sentences, strict=True):
        yield f"| {label} | {answer.value} | {escaped(sentence)} |"


def _stack(title: str, frames: Sequence[Frame]) -> Iterator[str]:
    """Innermost first, as gdb has it; a code block, in which nothing acts but its own fence."""
    if not frames:
        return
    yield f"\n{title}:\n"
    yield "```text"
    last = len(frames) - 1
    for number in range(len(frames)):
        frame = frames[last - number]
        yield clean(f"#{number:<3} {frame.object}  {stacks.name(frame)}").replace("```", "'''")
    yield "```"


def escaped(text: str) -> str:
    """Running text in which nothing acts."""
    return "".join(
        _ENTITIES.get(char, f"\\{char}") if char in _ACTIVE else char for char in clean(" ".join(text.split()))
    )


def _html(text: str) -> str:
    return "".join(_ENTITIES.get(char, char) for char in clean(" ".join(text.split())))
