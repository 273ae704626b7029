"""The formats of a report, by name.

Owns: the list, and what each is for; one call renders any. Takes: a Report, a format's name, how the reader wants it.
Gives: text. Must never: import a renderer before it is asked for: jinja2 alone costs what a scan of one object does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from forkproof.model import Report, Severity
from forkproof.report.layout import WIDTH


@dataclass(frozen=True, slots=True)
class Look:
    """How the reader wants it; most formats need none of this."""

    verbose: bool = False
    width: int = WIDTH
    color: bool = False
    fail_on: Severity | None = Severity.HIGH


def _text(report: Report, look: Look) -> str:
    from forkproof.report import text

    return text.render(report, verbose=look.verbose, width=look.width, color=look.color)


def _brief(report: Report, _: Look) -> str:
    from forkproof.report import brief

    return brief.render(report)


def _json(report: Report, _: Look) -> str:
    from forkproof.report import json

    return json.render(report)


def _sarif(report: Report, _: Look) -> str:
    from forkproof.report import sarif

    return sarif.render(report)


def _html(report: Report, _: Look) -> str:
    from forkproof.report import html

    return html.render(report)


def _markdown(report: Report, _: Look) -> str:
    from forkproof.report import markdown

    return markdown.render(report)


def _junit(report: Report, look: Look) -> str:
    from forkproof.report import junit

    return junit.render(report, look.fail_on)


def _dot(report: Report, _: Look) -> str:
    from forkproof.report import graph

    return graph.dot(report)


def _svg(report: Report, _: Look) -> str:
    from forkproof.report import svg

    return svg.render(report)


def _mermaid(report: Report, _: Look) -> str:
    from forkproof.report import graph

    return graph.mermaid(report)


_RENDERERS: Final[dict[str, Callable[[Report, Look], str]]] = {
    "text": _text,
    "brief": _brief,
    "json": _json,
    "sarif": _sarif,
    "html": _html,
    "markdown": _markdown,
    "junit": _junit,
    "dot": _dot,
    "svg": _svg,
    "mermaid": _mermaid,
}

NAMES: Final = tuple(_RENDERERS)
HELP: Final = (
    "text for people; brief, a line for each finding and each target without; json, the canonical report; sarif for "
    "code scanning; html, one page; markdown for a merge request; junit for a CI server; dot, svg or mermaid: the "
    "calls that the findings stand on."
)


def render(report: Report, name: str, look: Look) -> str:
    """The report in the format of this name."""
    return _RENDERERS[name](report, look)
