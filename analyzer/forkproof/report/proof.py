"""What a probe saw, as text: the two stacks side by side, as one pastes them into a bug.

Owns: the lines of a `ProbeRecord`, and the text of a report that is about probes.
Takes: findings with records. Gives: lines.
Must never: call something confirmed that its record does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final

from forkproof.model import Finding, Frame, ProbeRecord, ProbeThread, Report, Verdict
from forkproof.report import stacks
from forkproof.report.layout import Line, Span, advised, line, padded, painted, shorten, wrapped

_SIDE_BY_SIDE: Final = 80
"""Columns below which the stacks stand one above the other."""
_GAP: Final = 2
_INNER, _OUTER = 12, 3
_SYSCALLS: Final = 8
_CENSUS: Final = 6
_STYLES: Final = {Verdict.CONFIRMED: "high", Verdict.REFUTED: "good", Verdict.INCONCLUSIVE: "unknown"}


def lines(record: ProbeRecord, width: int, *, verbose: bool) -> Iterator[Line]:
    """The section PROBE of a finding."""
    yield line("  ", Span("PROBE: ", "heading"), Span(record.verdict.value, _STYLES.get(record.verdict, "")))
    yield from wrapped(_sentence(record.why), width, first=line("    "), indent=4)
    if record.scan_severity is not None:
        now = (
            "high since it was shown"
            if record.verdict is Verdict.CONFIRMED
            else f"{record.scan_severity.lowered.value} since its lock was not taken"
        )
        text = f"ranked {record.scan_severity.value} by the scan, and {now}"
        yield from wrapped(text, width, first=line("    "), indent=6)
    if record.lock is not None and record.lock_address:
        text = f"lock {record.lock.name} of {record.lock.object} at {record.lock_address}"
        fork = f", fork {record.fork_number}: {stacks.chain(record.fork[-4:])}" if record.fork else ""
        yield from wrapped(text + fork, width, first=line("    "), indent=6)
    yield from _threads(record, width, verbose=verbose)
    if record.samples:
        text = f"watched: {record.samples} looks in {record.watched_ms} ms, and always found waiting"
        yield from wrapped(text, width, first=line("    "), indent=6)
    if record.control:
        yield from wrapped(f"control run: {record.control}", width, first=line("    "), indent=6)
    yield from _list("the child's last system calls:", record.syscalls[-_SYSCALLS:], width)
    shown = record.census if verbose else ()
    yield from _list("locks seen taken in a run without steering:", shown, width)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _list(title: str, rows: Sequence[str], width: int) -> Iterator[Line]:
    if rows:
        yield line("    ", Span(title, "quiet"))
    for row in rows:
        yield line("      ", shorten(row, width - 6))


def _threads(record: ProbeRecord, width: int, *, verbose: bool) -> Iterator[Line]:
    """The holder and the first waiter in two columns; more waiters below."""
    first = record.waiters[0] if record.waiters else None
    if record.holder is not None and first is not None and width >= _SIDE_BY_SIDE:
        column = (width - 4 - _GAP) // 2
        left = _stack("HOLDER", record.holder, column, verbose=verbose)
        right = _stack("WAITER", first, column, verbose=verbose)
        for a, b in zip_longest(left, right, fillvalue=""):
            yield line("    ", padded(a, column), " " * _GAP, b)
        rest = record.waiters[1:]
    else:
        rest = record.waiters
        if record.holder is not None:
            yield from (line("    ", text) for text in _stack("HOLDER", record.holder, width - 4, verbose=verbose))
    for waiter in rest:
        yield from (line("    ", text) for text in _stack("WAITER", waiter, width - 4, verbose=verbose))


def _stack(role: str, thread: ProbeThread, width: int, *, verbose: bool) -> list[str]:
    """A thread's title, what it does, and its frames, the innermost first."""
    rows = [f"#{number} {_frame(frame)}" for number, frame in enumerate(reversed(thread.stack))]
    hidden = len(rows) - _INNER - _OUTER
    if hidden > 1 and not verbose:
        rows = [*rows[:_INNER], f"... {hidden} more frames: --verbose", *rows[-_OUTER:]]
    return [shorten(text, width) for text in (f"{role}: {thread.name}", f"  {thread.doing}", *rows)]


def _frame(frame: Frame) -> str:
    offset = f"{frame.offset:+#x}" if frame.offset else ""
    return f"{stacks.brief(frame.function)}{offset} ({frame.object})"


# A report of probes.


def render(report: Report, *, verbose: bool, width: int, color: bool) -> str:
    """What was decided in full, what was not in a line each, the census, and a summary."""
    return painted(_report(report, width, verbose=verbose), color=color)


def _report(report: Report, width: int, *, verbose: bool) -> Iterator[Line]:
    probed = [f for f in report.findings if f.probe is not None]
    decided = [f for f in probed if f.probe is not None and f.probe.verdict is not Verdict.INCONCLUSIVE]
    decided.sort(key=lambda f: (f.verdict is not Verdict.CONFIRMED, f.severity.rank, f.rule != "inherited-lock", f.id))
    for finding in decided:
        yield from _title(finding, width)
        if finding.probe is not None:
            yield from lines(finding.probe, width, verbose=verbose)
        yield line()
    yield from _undecided([f for f in probed if f not in decided], width, verbose=verbose)
    yield from _census(probed, width, verbose=verbose)
    yield from _summary(report, probed, width)


def _title(finding: Finding, width: int) -> Iterator[Line]:
    severity = finding.severity.value
    yield line(Span(f"{severity.upper()}  ", severity), f"{finding.rule}, {finding.verdict.value}  {finding.id}")
    yield from wrapped(finding.message, width, first=line("  "), indent=2, style="heading")


def _undecided(findings: list[Finding], width: int, *, verbose: bool) -> Iterator[Line]:
    for finding in findings:
        record = finding.probe
        assert record is not None
        yield line(Span("inconclusive  ", "unknown"), finding.id)
        yield from wrapped(finding.message, width, first=line("  "), indent=2)
        if record.holder is not None or verbose:
            yield from lines(record, width, verbose=verbose)
        else:
            yield from wrapped(_sentence(record.why), width, first=line("    "), indent=4)
    if findings:
        yield line()


def _census(findings: list[Finding], width: int, *, verbose: bool) -> Iterator[Line]:
    rows = next((f.probe.census for f in findings if f.probe is not None and f.probe.census), ())
    shown = rows if verbose else rows[:_CENSUS]
    if shown:
        yield line(Span("CENSUS", "heading"), ": locks that were taken in a run without steering")
        yield from (line("  ", shorten(row, width - 2)) for row in shown)
        if len(rows) > len(shown):
            yield line("  ", Span(f"... and {len(rows) - len(shown)} more: --verbose", "quiet"))
        yield line()


def _summary(report: Report, probed: list[Finding], width: int) -> Iterator[Line]:
    counts = Counter(f.probe.verdict for f in probed if f.probe is not None)
    each = [f"{counts[v]} {v.value}" for v in (Verdict.CONFIRMED, Verdict.REFUTED, Verdict.INCONCLUSIVE) if counts[v]]
    targets = ", ".join(t.path for t in report.targets) or "nothing"
    others = len(report.findings) - len(probed)
    was = "finding was" if others == 1 else "findings were"
    tail = f"; {others} other {was} not probed" if others else ""
    text = ", ".join(each) if each else "nothing to probe: the scan has no finding that a probe can show"
    yield from wrapped(f"{targets}: {text}{tail}", width, indent=2, style="heading")
    for message in report.errors:
        yield from advised(message, width, first=line(Span("not analysed: ", "error")), indent=2)
