"""A mitigation as text and JSON: what was found, what the shim does, and what is found with it.

Owns: both. Takes: a `Mitigation`. Gives: text.
Must never: say that a hazard is gone where it was not shown.
"""

from __future__ import annotations

import json as standard
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from forkproof import __version__
from forkproof.mitigate.apply import Mitigation
from forkproof.mitigate.remedy import Decision, Remedy
from forkproof.model import Finding, Report, Severity, Verdict
from forkproof.report import json, proof
from forkproof.report.layout import Line, Span, advised, line, painted, shorten, wrapped

_SHOWN: Final = 5
_WORDS: Final = {True: ("cured", "good"), False: ("not cured", "high")}


def document(found: Mitigation, limit: Severity | None) -> dict[str, Any]:
    """The mitigation as plain values."""
    shim = found.shim
    return {
        "version": 1,
        "tool": {"name": "forkproof", "version": __version__},
        "cured": is_cured(found, limit),
        "decisions": [_decision(d) for d in found.decisions],
        "shim": None
        if shim is None
        else {"path": str(shim.path) if shim.is_kept else None, "source": shim.source, "command": list(shim.command)},
        "before": json.document(found.before),
        "after": json.document(found.after) if found.after is not None else None,
        "probe": {
            "before": [json.plain(f) for f in found.probed_before],
            "after": [json.plain(f) for f in found.probed_after],
        },
    }


def is_cured(found: Mitigation, limit: Severity | None) -> bool:
    """Nothing was refused, the scan finds it no more, and no probe that was asked for says otherwise."""
    is_gone = not found.refusals and not found.left(limit)
    return is_gone and not found.still_hangs and not found.is_undecided


def _decision(decision: Decision) -> dict[str, Any]:
    finding = decision.finding
    head = {"finding": finding.id, "rule": finding.rule, "object": finding.object, "why": decision.why}
    if isinstance(decision, Remedy):
        handlers = list(decision.handlers) if decision.handlers is not None else None
        return {**head, "remedy": {"defines": decision.defines, "registers": handlers, "with": decision.registrar}}
    return {**head, "remedy": None, "instead": decision.instead}


def render_json(found: Mitigation, limit: Severity | None) -> str:
    """The same as text."""
    return standard.dumps(document(found, limit), indent=2) + "\n"


def render(found: Mitigation, limit: Severity | None, *, width: int, color: bool, verbose: bool) -> str:
    """Text for people."""
    return painted(_lines(found, limit, width, verbose=verbose), color=color)


def _lines(found: Mitigation, limit: Severity | None, width: int, *, verbose: bool) -> Iterator[Line]:
    if not found.decisions:
        path = found.before.targets[0].path
        text = f"{path}: nothing to mitigate: no allocator that it uses lacks the registration of its fork handlers"
        yield from wrapped(text, width, indent=2, style="heading")
        yield from _not_analysed(found.before, width)
        return
    for decision in found.decisions:
        yield from _decided(decision, width)
    yield from _scans("BEFORE", found, found.before, width, verbose=verbose)
    if found.shim is not None and found.after is not None:
        yield from _scans("AFTER, with the shim preloaded", found, found.after, width, verbose=verbose)
        yield from _probes(found, width, verbose=verbose)
        yield from _shim(found, width)
    yield from _summary(found, limit, width)


def _decided(decision: Decision, width: int) -> Iterator[Line]:
    finding, severity = decision.finding, decision.finding.severity.value
    yield line(Span(f"{severity.upper()}  ", severity), f"{finding.rule}  {finding.id}")
    yield from wrapped(finding.message, width, first=line("  "), indent=2, style="heading")
    if isinstance(decision, Remedy):
        does = f"the shim defines {decision.defines}" if decision.defines else _registers(decision)
        yield from wrapped(f"{does}: {decision.why}", width, first=line("  ", Span("remedy: ", "good")), indent=4)
    else:
        yield from wrapped(decision.why, width, first=line("  ", Span("refused: ", "high")), indent=4)
        yield from wrapped(decision.instead, width, first=line("  instead: "), indent=4)
    yield line()


def _registers(remedy: Remedy) -> str:
    assert remedy.handlers is not None
    prepare, parent, child = remedy.handlers
    others = f"{parent} in the parent and the child" if parent == child else f"{parent} and {child} after it"
    return f"the shim registers {prepare} before a fork, {others}"


def _scans(title: str, found: Mitigation, report: Report, width: int, *, verbose: bool) -> Iterator[Line]:
    """Findings about the allocators in question, as one scan has them."""
    findings = found.of(report)
    yield line(Span(title, "heading"), f"  {_counts(findings)}")
    for each in report.targets[0].allocators:
        if each.object in found.libraries:
            yield from wrapped(
                f"{each.object}: handlers {each.hooks.value}: {each.why}", width, first=line("  "), indent=4
            )
    shown = findings if verbose else findings[:_SHOWN]
    for finding in shown:
        row = f"{finding.id}  {finding.message}"
        yield line("  ", Span(f"{finding.severity.value:<6}  ", finding.severity.value), shorten(row, width - 10))
    if len(findings) > len(shown):
        yield line("  ", Span(f"... and {len(findings) - len(shown)} more: --verbose", "quiet"))
    yield line()


def _counts(findings: tuple[Finding, ...]) -> str:
    counts = Counter(f.severity for f in findings)
    words = ", ".join(f"{counts[s]} {s.value}" for s in Severity if counts[s])
    one_or_more = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    return f"{one_or_more} about it ({words})" if findings else "no finding about it"


def _probes(found: Mitigation, width: int, *, verbose: bool) -> Iterator[Line]:
    for title, findings in (("PROBE BEFORE", found.probed_before), ("PROBE AFTER", found.probed_after)):
        for finding in findings:
            if finding.probe is not None:
                yield line(Span(title, "heading"), f"  {finding.id}")
                yield from proof.lines(finding.probe, width, verbose=verbose)
                yield line()


def _shim(found: Mitigation, width: int) -> Iterator[Line]:
    assert found.shim is not None
    kept = str(found.shim.path) if found.shim.is_kept else "not kept: --output FILE keeps it"
    yield line(Span("SHIM", "heading"), f"  {shorten(kept, width - 6)}")
    yield from wrapped(shlex.join(found.shim.command), width, first=line("  "), indent=4)
    for text in found.shim.source.splitlines():
        yield line("  | ", shorten(text, width - 4))
    yield line()


def _summary(found: Mitigation, limit: Severity | None, width: int) -> Iterator[Line]:
    word, style = _WORDS[is_cured(found, limit)]
    yield from wrapped(
        f"{found.before.targets[0].path}: {word}: {_because(found, limit)}", width, indent=2, style=style
    )
    yield from _not_analysed(found.before, width)


def _not_analysed(report: Report, width: int) -> Iterator[Line]:
    told = "\n".join(report.errors)
    grave = (f"{d.object}: {d.message}" for d in report.diagnostics if d.level == "error" and d.message not in told)
    for message in dict.fromkeys((*report.errors, *grave)):
        yield from advised(message, width, first=line(Span("not analysed: ", "error")), indent=2)


def _because(found: Mitigation, limit: Severity | None) -> str:
    left = found.left(limit)
    if found.shim is None:
        return "no shim was built, since none would be right"
    if found.still_hangs:
        return "a probe saw a child hang with the shim preloaded, whatever the scan says"
    if left:
        return f"with the shim the scan still finds {', '.join(f.id for f in left)}"
    if found.is_undecided:
        return "the scan finds it no more, but the probe did not show that the fork is protected"
    refused = f"; {len(found.refusals)} findings were refused" if found.refusals else ""
    was_seen = any(f.verdict is Verdict.CONFIRMED for f in found.probed_before)
    how = "the probe confirmed the hang before and" if was_seen else "the probe"
    shown = f", and {how} refutes it with the shim" if found.probed_after else "; no probe was asked for (-- CMD)"
    return f"the scan finds it no more{shown}{refused}"
