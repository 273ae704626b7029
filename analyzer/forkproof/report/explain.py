"""One finding with all the evidence: nothing shortened, how each step was derived, and what is not known.

Owns: the long form of a finding. Takes: a Report and findings of it. Gives: lines.
Must never: shorten, or argue beyond what the report holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from forkproof.model import Allocator, Answer, Finding, Report, Verdict, Window
from forkproof.report import stacks
from forkproof.report.layout import Line, Span, line, wrapped
from forkproof.report.text import LABELS, View, finding_lines, lock_words

if TYPE_CHECKING:
    from forkproof.rules import Rule

VERDICTS: Final = {
    Verdict.SUSPECTED: "at least one necessary condition is unknown; the others were shown",
    Verdict.REACHABLE: "every necessary condition was shown from the code; no run has shown the hang",
    Verdict.CONFIRMED: "a probe saw the child wait for the absent owner; its control run did not hang",
    Verdict.REFUTED: "a probe held the lock, and the fork waited for it: the program is protected",
    Verdict.INCONCLUSIVE: "a probe ran and could not decide",
}


def explanation(report: Report, finding: Finding, rule: Rule | None, width: int) -> Iterator[Line]:
    """The finding in full, the facts of the report that it rests on, and the page of its rule."""
    view = View(width, verbose=True)
    yield from finding_lines(finding, view)
    yield from _section("VERDICT", [f"{finding.verdict.value}: {VERDICTS[finding.verdict]}"], width)
    yield from _section("HOW EACH STEP WAS DERIVED", _derivation(finding), width)
    window = _window_of(report, finding)
    if window is not None:
        yield from _section("THE FORK WINDOW", _window(window), width)
        yield from stacks.stack(window.path, width, indent=4, whole=True)
    for allocator in _allocators_of(report, finding):
        yield from _section(f"THE ALLOCATOR {allocator.object}", _allocator(allocator), width)
        yield from stacks.stack(allocator.registered_by, width, indent=4, whole=True)
    yield from _section("NOT KNOWN", _unknown(finding, window), width)
    yield line()
    if rule is not None:
        yield from page_lines(rule.page, width)


def page_lines(page: str, width: int) -> Iterator[Line]:
    """A rule's page: its lines as they are, those that are too wide wrapped."""
    for text in page.splitlines():
        style = "heading" if text.startswith("#") else ""
        if len(text) <= width:
            yield line(Span(text, style))
        else:
            yield from wrapped(text, width, indent=len(text) - len(text.lstrip()), style=style)


def _section(title: str, sentences: Sequence[str], width: int) -> Iterator[Line]:
    if sentences:
        yield from wrapped(title, width, first=line("  "), indent=4, style="heading")
    for sentence in sentences:
        yield from wrapped(sentence, width, first=line("    "), indent=6)


def _derivation(finding: Finding) -> list[str]:
    """What the words beside the frames mean; nothing where there are no paths."""
    frames = (*finding.holder, *finding.requester)
    if not frames:
        return []
    return [
        "The closure is what ld.so would map for this target; the paths are shortest paths in its call graph.",
        *stacks.legend(frames),
        "Offsets are those of the call in its function; sub_<rva> is a function without a name.",
    ]


def _window_of(report: Report, finding: Finding) -> Window | None:
    """The window that the finding's fork opens."""
    if finding.fork is None:
        return None
    fork = finding.fork
    windows = [window for target in report.targets if target.path == finding.target for window in target.windows]
    same = [w for w in windows if (w.call_site.object, w.function) == (fork.object, fork.function)]
    return min(same, key=lambda window: window.call_site.offset != fork.offset, default=None)


def _window(window: Window) -> list[str]:
    handlers = "runs fork handlers" if window.handlers_run else "runs no fork handlers"
    ends = ", ".join(window.outcomes) or "not known"
    return [
        f"{window.forker} is called by {stacks.place(window.call_site)}; it {handlers}.",
        f"What becomes of the child: {window.kind.value}; its paths end in: {ends}.",
        f"Reachable from the program: {window.reachable.value}. Other threads when it opens: {window.threads.value}.",
        "The shortest path from a root of the program:" if window.path else "No path from a root is known.",
    ]


def _allocators_of(report: Report, finding: Finding) -> list[Allocator]:
    """The allocators of the finding's target that the finding, or its lock, is about."""
    about = {finding.object, finding.lock.object if finding.lock else finding.object}
    targets = [target for target in report.targets if target.path == finding.target]
    return [each for target in targets for each in target.allocators if each.object in about]


def _allocator(allocator: Allocator) -> list[str]:
    release = f"{allocator.family} {allocator.version or '(version unknown)'}"
    facts = [
        f"{release}; it {'serves' if allocator.active else 'does not serve'} the program's malloc.",
        f"Fork handlers: {allocator.hooks.value}; {allocator.why or 'why is not known'}.",
    ]
    if allocator.handlers:
        facts.append(f"Prepare, parent, child: {', '.join(allocator.handlers)}.")
    facts += [f"Its prepare handler takes {lock_words(lock)}." for lock in allocator.prepare_locks]
    facts += [f"No handler takes {lock_words(lock)}." for lock in allocator.uncovered_locks]
    if allocator.registered_by:
        when = allocator.registered_from
        facts.append(
            "The calls that would register them:"
            if when in {"", "never", "not found"}
            else f"The calls that register them, from {when}:"
        )
    return facts


def _unknown(finding: Finding, window: Window | None) -> list[str]:
    """Conditions and facts without an answer, and what no static analysis can tell."""
    doubts = []
    if finding.conditions is not None:
        answers = zip(LABELS, finding.conditions.answers, strict=True)
        doubts += [f"{label}: see above" for label, answer in answers if answer is Answer.UNKNOWN]
    if finding.lock is not None and finding.lock.form in {"allocator", "unknown"}:
        doubts.append("which lock it is: the code was not followed that far")
    if window is not None and window.reachable is Answer.UNKNOWN:
        doubts.append("whether the program reaches the fork")
    if finding.verdict in {Verdict.SUSPECTED, Verdict.REACHABLE}:
        doubts.append("how often a thread is inside the critical section at the moment of the fork")
    return doubts
