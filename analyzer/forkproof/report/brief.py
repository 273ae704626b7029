"""The report in lines: one for each finding, one for each target without, one for each that was not analysed.

Owns: the shape of a line, which begins with its target, as compilers' messages do. Takes: a Report. Gives: text.
Must never: call a target clean without what is not known about it, or let a name break a line.

For many programs at once, for grep and for editors; stacks, reasons and fixes are in the other formats.
"""

from __future__ import annotations

from collections.abc import Iterator

from forkproof.model import Finding, Report, Target
from forkproof.report.layout import clean
from forkproof.report.text import by_weight, doubts, state


def render(report: Report) -> str:
    """All lines; targets in the order given, the findings of each the most severe first."""
    return "".join(f"{clean(each)}\n" for each in _lines(report))


def _lines(report: Report) -> Iterator[str]:
    for target in report.targets:
        found = [finding for finding in by_weight(report.findings) if finding.target == target.path]
        yield from map(_finding, found)
        if not found:
            yield _nothing(target)
    for error in report.errors:
        yield f"{'. '.join(line.strip().removesuffix('.') for line in error.splitlines())} [not analysed]"
    if not report.targets and not report.errors:
        yield "no target"


def _finding(finding: Finding) -> str:
    folded = f" ({finding.count} alike)" if finding.count > 1 else ""
    head = f"{finding.target}: {finding.severity.value}: {finding.rule}, {state(finding)}"
    return f"{head}: {finding.message}{folded} [{finding.id}]"


def _nothing(target: Target) -> str:
    unknown = (f"; not known: {each}" for each in (*doubts(target), *target.incomplete))
    return f"{target.path}: no finding" + "".join(unknown)
