"""The report as one HTML file that needs nothing else: no network, no other file, no server.

Owns: what the page holds; its template, style and script are in `page/`.
Takes: a Report. Gives: text.
Must never: let a name from a file act as markup or script (the template escapes, and a content security policy allows
the page's own script only), or say less than the text report.
"""

from __future__ import annotations

import base64
import hashlib
import json as stdlib_json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import markdown_it
from markupsafe import Markup

from forkproof import __version__, rules
from forkproof.model import Finding, Frame, Report, Severity
from forkproof.report import stacks, svg
from forkproof.report.graph import slice_of
from forkproof.report.json import plain
from forkproof.report.layout import clean
from forkproof.report.text import LABELS, by_weight, counted, launched, lock_words, overridden, state


def render(report: Report) -> str:
    """The page."""
    findings = by_weight(report.findings)
    style, script = _part("page.css") + svg.STYLE, _part("page.js")
    counts = Counter(finding.severity.value for finding in findings)
    found_rules = sorted({finding.rule for finding in findings})
    values: dict[str, Any] = {
        "report": report,
        "findings": findings,
        "anchors": list(_anchors(findings)),
        "summary": counted(findings),
        "overridden": overridden(report.overrides),
        "version": __version__,
        "severities": [severity.value for severity in Severity],
        "counts": {severity.value: counts[severity.value] for severity in Severity},
        "found_rules": found_rules,
        "pages": list(_pages(found_rules)),
        "style": Markup(style),  # noqa: S704 - our own file
        "style_hash": _hash(style),
        "script": Markup(script),  # noqa: S704 - our own file
        "script_hash": _hash(script),
        "name": stacks.name,
        "chain": stacks.chain,
        "lock_words": lock_words,
        "launched": launched,
        "titles": stacks.titles,
        "state": state,
        "numbered": _numbered,
        "conditions": _conditions,
        "picture": _picture,
        "probe": _probe,
    }
    # Control characters of a hostile name are shown, not sent: `clean` is what every expression goes through.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_finalized
    )
    return environment.from_string(_part("page.html.j2")).render(values).lstrip() + "\n"


def _finalized(value: object) -> object:
    return clean(value) if type(value) is str else value


def _part(name: str) -> str:
    return files("forkproof.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy knows an inline script or style by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _anchors(findings: Sequence[Finding]) -> Iterator[str]:
    """A name in the page for each finding: two targets can share an id."""
    seen: Counter[str] = Counter()
    for finding in findings:
        seen[finding.id] += 1
        yield finding.id if seen[finding.id] == 1 else f"{finding.id}-{seen[finding.id]}"


def _pages(found: Sequence[str]) -> Iterator[tuple[str, Markup]]:
    """The pages of the rules that found something."""
    convert = markdown_it.MarkdownIt("commonmark", {"html": False})
    for name in found:
        rule = rules.find(name)
        if rule is not None:
            yield name, Markup(convert.render(rule.page))  # noqa: S704 - our own file, and raw HTML is off


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    function: str
    object: str
    words: str


def _numbered(frames: Sequence[Frame]) -> list[_Row]:
    """The innermost first, each with how it was reached from the next, as in the text report."""
    last = len(frames) - 1
    return [
        _Row(last - i, stacks.name(frame), frame.object, stacks.EDGES.get(edge, (edge,))[0])
        for i, frame in reversed(list(enumerate(frames)))
        for edge in [frames[i - 1].edge if i else ""]
    ]


def _conditions(finding: Finding) -> Iterator[tuple[str, str, str]]:
    if finding.conditions is None:
        return
    given = finding.conditions
    sentences = (given.threads, given.holder, given.requester, given.not_quiesced)
    for label, answer, sentence in zip(LABELS, given.answers, sentences, strict=True):
        yield label, answer.value, sentence


def _picture(finding: Finding, number: int) -> Markup:
    return Markup(svg.inline(slice_of([finding]), f"-{number}"))  # noqa: S704 - ElementTree has escaped it


def _probe(finding: Finding) -> str:
    return stdlib_json.dumps(plain(finding.probe), indent=2)
