"""The report as text for people: the finding first, then why, then what to do, then what was looked at.

Owns: the order, the words, and what is left out unless `verbose` asks for it.
Takes: a Report. Gives: lines of at most `width` columns; `layout.painted` makes text of them.
Must never: leave something out without saying so and how to see it, or call safe what was not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from forkproof.model import (
    Allocator,
    Answer,
    Baseline,
    Conditions,
    Diagnostic,
    Finding,
    Frame,
    Hooks,
    Lock,
    Override,
    Report,
    Severity,
    Target,
    Window,
    WindowKind,
)
from forkproof.report import proof, stacks
from forkproof.report.json import in_order
from forkproof.report.layout import WIDTH, Line, Span, advised, line, painted, shorten, table, wrapped

NARROWEST: Final = 40
FULL_FINDINGS: Final = 5
"""Findings of one target that are shown with their stacks."""
BRIEF_FINDINGS: Final = 15
"""Findings after these that get one line."""
WINDOWS: Final = 8
SOURCES: Final = 4
MESSAGES: Final = 10
NAMES: Final = 4

LABELS: Final = ("threads", "holder", "requester", "not quiesced")
_MATTERS: Final = (Answer.YES, Answer.UNKNOWN, Answer.NO)
_KINDS: Final = (
    WindowKind.DAEMONIZE,
    WindowKind.UNKNOWN,
    WindowKind.EXIT,
    WindowKind.EXEC,
    WindowKind.SPAWN,
)


@dataclass(frozen=True, slots=True)
class View:
    """How the reader wants it."""

    width: int = WIDTH
    verbose: bool = False


def render(report: Report, *, verbose: bool = False, width: int = WIDTH, color: bool = False) -> str:
    """The whole report; lines are never wider than `width`, nor than 100 columns."""
    view = View(max(NARROWEST, min(width, WIDTH)), verbose)
    return painted(report_lines(report, view), color=color)


def report_lines(report: Report, view: View) -> Iterator[Line]:
    """Each target in the order given, then what holds for all."""
    for target in report.targets:
        findings = [finding for finding in by_weight(report.findings) if finding.target == target.path]
        yield from _target(target, findings, view)
    yield from _diagnostics(report, view)
    yield from failures(report.errors, view.width)
    yield from _summary(report, view)


def by_weight(findings: tuple[Finding, ...]) -> list[Finding]:
    """Those that count first, then the most severe, then hangs before their causes: a stack convinces."""
    return sorted(in_order(findings), key=lambda f: (not f.is_open, f.severity.rank, f.conditions is None))


# One target.


def _target(target: Target, findings: Sequence[Finding], view: View) -> Iterator[Line]:
    yield from _flush(f"{target.path}: {counted(findings)}", view, "heading")
    size = len(target.closure)
    facts = (target.machine, target.libc, f"{size} object{'s' * (size != 1)} in the closure")
    yield from wrapped(", ".join(facts), view.width, first=line("  "), indent=2, style="quiet")
    for told in launched(target):
        yield from wrapped(told, view.width, first=line("  "), indent=4, style="unknown")
    if target.missing:
        missing = _listed(target.missing, view)
        first = line("  ", Span("missing: ", "error"))
        yield from wrapped(f"{missing} (not analysed)", view.width, first=first, indent=4)
    yield line()
    yield from _findings(findings, view) if findings else _nothing(target, view)
    yield from _not_known(target, view)
    yield from _allocators(target, view)
    yield from _windows(target, view)
    yield from _threads(target, view)


def launched(target: Target) -> Iterator[str]:
    """What the scan took on from units, scripts and ld.so's file: it changes the verdict, so nobody need ask for it."""
    for launch in target.launches:
        absent = [each for each in launch.preload if any(gap.startswith(f"{each}: ") for gap in target.incomplete)]
        found = ", ".join(each for each in launch.preload if each not in absent)
        lacking = f"{', '.join(absent)} is not there" if len(absent) == 1 else f"{', '.join(absent)} are not there"
        if not launch.preload:
            yield f"scanned since {launch.source} starts it"
        elif found:
            yield f"scanned with {found} preloaded, since {launch.source} says so{f'; {lacking}' if absent else ''}"
        else:
            yield f"scanned without what {launch.source} preloads: {lacking}"


def counted(findings: Sequence[Finding]) -> str:
    """How many findings, by severity: "3 findings (1 high, 2 low)"."""
    if not findings:
        return "no finding"
    counts = Counter(finding.severity for finding in findings)
    each = ", ".join(f"{counts[severity]} {severity.value}" for severity in Severity if severity in counts)
    known = sum(not finding.is_open for finding in findings)
    rest = f", {known} of which {'does' if known == 1 else 'do'} not count" if known else ""
    return f"{len(findings)} finding{'s' if len(findings) > 1 else ''} ({each}{rest})"


def overridden(overrides: Sequence[Override]) -> str:
    """What policies made of rules: "forkproof.toml: atfork-absent is off (2 findings left out)"."""
    told: dict[str, list[str]] = {}
    for override in overrides:
        what, rest = ("off", " left out") if override.severity is None else (override.severity.value, "")
        count = (
            f" ({override.findings} finding{'s' if override.findings > 1 else ''}{rest})" if override.findings else ""
        )
        told.setdefault(override.source, []).append(f"{override.rule} is {what}{count}")
    return "; ".join(f"{source}: {', '.join(each)}" for source, each in told.items())


def state(finding: Finding) -> str:
    """The verdict, and what a gate makes of the finding."""
    words = finding.verdict.value
    if finding.suppression is not None:
        until = f" until {finding.suppression.expires}" if finding.suppression.expires else ""
        return f"{words}, suppressed{until}: {finding.suppression.reason}"
    if finding.baseline is not None:
        return f"{words}, {'in the baseline' if finding.baseline is Baseline.UNCHANGED else 'new'}"
    return words


def _findings(findings: Sequence[Finding], view: View) -> Iterator[Line]:
    shown = len(findings) if view.verbose else FULL_FINDINGS
    for finding in findings[:shown]:
        yield from finding_lines(finding, view)
    rest = findings[shown:]
    for finding in rest[:BRIEF_FINDINGS]:
        yield from _brief(finding, view)
    if len(rest) > BRIEF_FINDINGS:
        yield from _more(len(rest) - BRIEF_FINDINGS, "findings", view)
    if rest:
        yield line()


def _brief(finding: Finding, view: View) -> Iterator[Line]:
    """A finding in one or two lines, for the many that come after the first."""
    severity = finding.severity.value
    first = line(Span(severity.upper(), severity), f"  {finding.id}  ")
    yield from wrapped(state(finding), view.width, first=first, indent=4, style="quiet")
    yield line("    ", shorten(finding.message, view.width - 4))


# One finding.


def finding_lines(finding: Finding, view: View) -> Iterator[Line]:
    """The finding first, then WHY, the two witness stacks, WHAT TO DO, and an empty line."""
    yield from _title(finding, view)
    yield from _why(finding, view)
    yield from _witnesses(finding, view)
    if finding.probe is not None:
        yield from proof.lines(finding.probe, view.width, verbose=view.verbose)
    yield from _heading("WHAT TO DO")
    yield from _paragraph(finding.fix or f"forkproof rules {finding.rule}, at its end, tells the ways out.", view)
    yield line()


def _title(finding: Finding, view: View) -> Iterator[Line]:
    severity = finding.severity.value
    first = line(Span(f"{severity.upper()}  ", severity))
    yield from wrapped(f"{finding.rule}, {state(finding)}", view.width, first=first, indent=4)
    yield from wrapped(finding.message, view.width, first=line("  "), indent=2, style="heading")
    folded = f" (stands for {finding.count} that differ in the call site only)" if finding.count > 1 else ""
    yield from wrapped(f"id {finding.id}{folded}", view.width, first=line("  "), indent=2, style="quiet")


def _why(finding: Finding, view: View) -> Iterator[Line]:
    if finding.conditions is None and not finding.why:
        return
    yield from _heading("WHY")
    if finding.conditions is not None:
        yield from conditions_lines(finding.conditions, view)
    yield from _paragraph(finding.why, view)


def conditions_lines(conditions: Conditions, view: View) -> Iterator[Line]:
    """The four, each with its answer and the sentence that supports it."""
    sentences = (conditions.threads, conditions.holder, conditions.requester, conditions.not_quiesced)
    for label, answer, sentence in zip(LABELS, conditions.answers, sentences, strict=True):
        first = line(f"    {label:<14}", Span(f"{answer.value:<9}", answer.value))
        yield from wrapped(sentence, view.width, first=first, indent=27)


def _witnesses(finding: Finding, view: View) -> Iterator[Line]:
    if finding.lock is not None:
        yield from _heading("LOCK")
        yield from _paragraph(lock_words(finding.lock), view)
    if finding.fork is not None:
        yield from _heading("FORK")
        yield from _paragraph(stacks.place(finding.fork), view)
    for title, frames in zip(stacks.titles(finding.rule), (finding.holder, finding.requester), strict=True):
        word, colon, rest = title.partition(":")
        yield from _stack(f"{word.upper()}{colon}{rest}", frames, view)


def _stack(title: str, frames: Sequence[Frame], view: View) -> Iterator[Line]:
    if frames:
        yield from wrapped(title, view.width, first=line("  "), indent=4, style="heading")
        yield from stacks.stack(frames, view.width, indent=4, whole=view.verbose)


def lock_words(lock: Lock) -> str:
    """A lock in running text: its name, where it is, and how far its identity is known."""
    at = "" if lock.rva is None else f" at 0x{lock.rva:x}"
    forms = {"allocator": "which one was not told apart", "unknown": "of unknown form"}
    form = forms.get(lock.form, lock.form)
    return f"{lock.name} in {lock.object}{at} ({form})"


# No finding: what was checked, why nothing was found, and what is not known.


def _nothing(target: Target, view: View) -> Iterator[Line]:
    for number, reason in enumerate(_reasons(target)):
        head = Span("  no finding: ", "good")
        if target.missing or _is_opaque(target):
            head = Span("  partly seen: ", "unknown")
        first = line(head) if number == 0 else line("    ")
        yield from wrapped(reason, view.width, first=first, indent=4)
    yield line()


def _is_opaque(target: Target) -> bool:
    """Neither the allocator nor a way to any of the forks was seen: a static program without symbols."""
    ways = {window.reachable for window in target.windows}
    return ways == {Answer.UNKNOWN} and not any(allocator.active for allocator in target.allocators)


def _not_known(target: Target, view: View) -> Iterator[Line]:
    """Said with and without findings: where something is not known there can be more."""
    unanswered = list(doubts(target))
    for doubt in unanswered:
        yield from wrapped(doubt, view.width, first=line(Span("  not known: ", "unknown")), indent=4)
    if unanswered:
        yield line()


def _reasons(target: Target) -> Iterator[str]:
    active = [allocator for allocator in target.allocators if allocator.active]
    for allocator in active:
        yield f"malloc is {_named(allocator)}; {_protection(allocator)}"
    if not active:
        yield "no object of the closure was recognised as the one that serves malloc"
    yield _windows_checked(target.windows, is_whole=not target.missing)
    if target.threads is Answer.NO:
        yield "no thread was seen to start before a fork, so there is none to inherit a lock from"


def _named(allocator: Allocator) -> str:
    return f"{allocator.object} ({_release(allocator)})"


def _release(allocator: Allocator) -> str:
    if allocator.family == "unknown":
        return "an allocator without a signature"
    return f"{allocator.family} {allocator.version}" if allocator.version else allocator.family


def _protection(allocator: Allocator) -> str:
    if allocator.hooks in {Hooks.BUILTIN, Hooks.NOT_NEEDED} and allocator.why:
        return allocator.why
    text = f"its fork handlers are {allocator.hooks.value}"
    if allocator.hooks is Hooks.EFFECTIVE and allocator.registered_by:
        text += f", registered by {stacks.place(allocator.registered_by[0])}"
    return f"{text}: {allocator.why}" if allocator.why else text


def _windows_checked(windows: Sequence[Window], *, is_whole: bool) -> str:
    if not windows:
        return "nothing in the closure was seen to fork" if is_whole else "no fork was seen in what was found"
    reachable = sum(window.reachable is Answer.YES for window in windows)
    return f"fork windows that were checked: {len(windows)}, of which the program is seen to reach {reachable}"


def doubts(target: Target) -> Iterator[str]:
    """Every question of this target that has no answer: it could hide a finding."""
    for allocator in target.allocators:
        if allocator.active and allocator.coverage == "not judged":
            yield f"whether the fork handlers of {allocator.object} take all its locks (not judged here)"
        elif allocator.active and allocator.coverage.endswith("unresolved"):
            count = allocator.coverage.partition(" ")[0]
            yield f"which {count} further locks {allocator.object} takes: the code does not tell their addresses"
        if allocator.hooks is Hooks.UNKNOWN:
            yield f"whether fork is safe for {_named(allocator)}"
    if target.threads is Answer.UNKNOWN:
        yield "whether another thread can exist when the program forks"
    unreached = sum(window.reachable is Answer.UNKNOWN for window in target.windows)
    if unreached:
        yield f"whether {unreached} of {len(target.windows)} fork windows can be reached"
    vague = sum(window.kind is WindowKind.UNKNOWN for window in target.windows)
    if vague:
        yield f"what the child does in {vague} of {len(target.windows)} fork windows"
    if target.missing:
        yield "what the missing libraries do"
    yield from target.not_known


# What was looked at.


def _allocators(target: Target, view: View) -> Iterator[Line]:
    yield line(Span("  ALLOCATORS", "heading"), "" if target.allocators else "  none found")
    # Something serves malloc: where it was not seen what, no other can be said not to.
    is_seen = any(each.active for each in target.allocators)
    otherwise = "not in use for malloc" if is_seen else "not known to serve malloc"
    for allocator in sorted(target.allocators, key=lambda each: not each.active):
        state = "serves malloc" if allocator.active else otherwise
        first = line("    ", Span(shorten(allocator.object, view.width // 3), "name"))
        style = "good" if allocator.hooks in _SAFE else "unknown" if allocator.hooks is Hooks.UNKNOWN else "high"
        words = f"  {_release(allocator)}, {state}, fork handlers: {allocator.hooks.value}"
        yield from wrapped(words, view.width, first=(*first, Span("  ")), indent=6, style=style)
        if allocator.active or view.verbose:
            yield from wrapped(allocator.why, view.width, first=line(" " * 6), indent=6)
        if view.verbose:
            yield from _handlers(allocator, view)


_SAFE: Final = frozenset({Hooks.EFFECTIVE, Hooks.BUILTIN, Hooks.NOT_NEEDED})


def _handlers(allocator: Allocator, view: View) -> Iterator[Line]:
    """Registration and locks of an allocator."""
    facts = (
        ("handlers:", ", ".join(allocator.handlers)),
        ("registered by:", stacks.chain(allocator.registered_by)),
        ("registered from:", allocator.registered_from),
        ("prepare takes:", ", ".join(lock.name for lock in allocator.prepare_locks)),
        ("not covered:", ", ".join(lock.name for lock in allocator.uncovered_locks)),
    )
    for label, text in facts:
        if text:
            yield from wrapped(text, view.width, first=line(f"      {label} "), indent=8)


def _windows(target: Target, view: View) -> Iterator[Line]:
    folded = Counter(map(_window_row, sorted(target.windows, key=_importance)))
    rows = list(folded.items())
    shown = len(rows) if view.verbose else WINDOWS
    note = f"  {len(target.windows)}, those that matter first" if len(rows) > 1 else ""
    yield line(Span("  FORK WINDOWS", "heading"), note if rows else "  none found")
    if rows:
        head = ("child", "forker", "function", "object", "reachable", "threads", "handlers")
        body = [(*row[:2], f"{row[2]} (x{n})" if n > 1 else row[2], *row[3:]) for row, n in rows[:shown]]
        yield from table([[Span(cell, "quiet") for cell in head], *body], view.width, indent=4)
    if len(rows) > shown:
        yield from _more(sum(n for _, n in rows[shown:]), "fork windows", view)


def _importance(window: Window) -> tuple[object, ...]:
    """Reachable and threaded first, then those whose child lives longest; the rest by name."""
    return (
        _MATTERS.index(window.reachable),
        _MATTERS.index(window.threads),
        _KINDS.index(window.kind),
        window.call_site.object,
        window.function,
        window.forker,
    )


def _window_row(window: Window) -> tuple[str, ...]:
    handlers = "run" if window.handlers_run else "skipped"
    where = (stacks.brief(window.function), window.call_site.object)
    return (window.kind.value, window.forker, *where, window.reachable.value, window.threads.value, handlers)


def _threads(target: Target, view: View) -> Iterator[Line]:
    answer = Span(target.threads.value, target.threads.value)
    yield line(Span("  OTHER THREADS BEFORE A FORK", "heading"), "  ", answer)
    shown = len(target.thread_sources) if view.verbose else SOURCES
    for path in target.thread_sources[:shown]:
        text = f"{path[0].object}: {stacks.chain(path)}" if path else "(no path)"
        yield line("    ", shorten(text, view.width - 4))
    if len(target.thread_sources) > shown:
        yield from _more(len(target.thread_sources) - shown, "places that create threads", view)
    yield line()


# What holds for all targets.


def _diagnostics(report: Report, view: View) -> Iterator[Line]:
    levels = ("error", "warning", "info") if view.verbose else ("error", "warning")
    told = "\n".join(report.errors)
    rest = [each for each in report.diagnostics if not (each.level == "error" and each.message in told)]
    groups = [group for level in levels for group in _grouped(rest, level)]
    infos = 0 if view.verbose else sum(each.level not in levels for each in rest)
    if not groups and not infos:
        return
    yield line(Span("DIAGNOSTICS", "heading"))
    shown = len(groups) if view.verbose else MESSAGES
    for level, message, objects in groups[:shown]:
        text = f"{_listed(objects, view)}: {message}"
        yield from wrapped(text, view.width, first=line("  ", Span(f"{level}: ", level)), indent=4)
    if len(groups) > shown:
        yield from _more(len(groups) - shown, "messages", view)
    if infos:
        yield from _more(infos, "of level info", view)
    yield line()


def _grouped(diagnostics: Sequence[Diagnostic], level: str) -> list[tuple[str, str, list[str]]]:
    """Messages of a level with all the objects that they hold for, in the order of their first."""
    objects: dict[str, dict[str, None]] = {}
    for each in diagnostics:
        if each.level == level:
            objects.setdefault(each.message, {})[each.object] = None
    return [(level, message, list(names)) for message, names in objects.items()]


def failures(errors: Sequence[str], width: int) -> Iterator[Line]:
    """What could not be analysed, each with what to do about it."""
    if not errors:
        return
    yield line(Span("NOT ANALYSED", "error"))
    for message in errors:
        yield from advised(message, width, first=line("  "), indent=4)
    yield line()


def _summary(report: Report, view: View) -> Iterator[Line]:
    """The last line: what a reader of a long output sees first."""
    above = ": see above" if is_partial(report) else ""
    yield from _flush(f"{summary(report)}{above}", view, "heading")
    if report.overrides:
        yield from _flush(f"Changed by policy: {overridden(report.overrides)}", view, "unknown")
    if report.findings:
        first = by_weight(report.findings)[0].id
        yield from _flush(f"All evidence of one finding: forkproof scan TARGET --explain {first}", view, "quiet")


def summary(report: Report) -> str:
    """The whole in a line: "2 targets analysed; 3 findings (1 high, 2 low)"."""
    done = len(report.targets)
    rest = "; something was not analysed" if is_partial(report) else ""
    return f"{done} target{'s' if done != 1 else ''} analysed; {counted(report.findings)}{rest}"


def is_partial(report: Report) -> bool:
    """Something was not analysed: a target, a library, a preload."""
    return bool(report.errors) or any(each.level == "error" for each in report.diagnostics)


# Small parts.


def _flush(text: str, view: View, style: str) -> Iterator[Line]:
    """Text that starts at the margin."""
    yield from wrapped(text, view.width, first=line(""), indent=4, style=style)


def _heading(title: str) -> Iterator[Line]:
    yield line("  ", Span(title, "heading"))


def _paragraph(text: str, view: View) -> Iterator[Line]:
    for part in text.splitlines():
        yield from wrapped(part, view.width, first=line("    "), indent=4)


def _listed(names: Sequence[str], view: View) -> str:
    """Names, the first few unless all are wanted."""
    if view.verbose or len(names) <= NAMES + 1:
        return ", ".join(names)
    return f"{', '.join(names[:NAMES])} and {len(names) - NAMES} more"


def _more(number: int, what: str, view: View) -> Iterator[Line]:
    text = f"... and {number} more {what}: --verbose shows them"
    yield from wrapped(text, view.width, first=line("    "), indent=6, style="quiet")
