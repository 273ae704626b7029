"""Lines for people: what fits in a width, and how it is coloured.

Owns: measuring, cutting and wrapping of text; lines as styled spans; painting them.
Takes: any text, also from a hostile ELF file. Gives: printable lines that are never wider than asked for.
Must never: know what a finding is, or let a control character through to a terminal.

Widths are columns of a terminal, not characters: a CJK character takes two, a combining one none. Rich would do
all of this, but costs a tenth of a second to import and is of no use in a pipe: it is asked for colour only.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

WIDTH: Final = 100
"""What a report is never wider than."""

ELLIPSIS: Final = "…"

STYLES: Final = {
    "high": "bold red",
    "medium": "bold yellow",
    "low": "cyan",
    "note": "dim",
    "heading": "bold",
    "yes": "red",
    "no": "green",
    "unknown": "yellow",
    "error": "bold red",
    "warning": "yellow",
    "info": "dim",
    "good": "green",
    "quiet": "dim",
    "name": "bold cyan",
}
"""Roles of text and how rich paints them. "yes" is red: it answers a condition of the hazard."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a line in one style; no style for plain text."""

    text: str
    style: str = ""


Line = tuple[Span, ...]


def line(*parts: str | Span) -> Line:
    """A line from pieces; bare strings are plain."""
    return tuple(part if isinstance(part, Span) else Span(part) for part in parts)


def plain(of: Line) -> str:
    """The line without its styles, and without blanks at its end."""
    return "".join(span.text for span in of).rstrip()


# Measuring and cutting.


def clean(text: str) -> str:
    """Text with every character that a terminal would act on, or could not show, written as its escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def columns(text: str) -> int:
    """How wide a terminal shows clean text."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


@lru_cache(maxsize=4096)
def _columns_of(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in {"W", "F"} else 1


def shorten(text: str, width: int) -> str:
    """Text cut in its middle to fit: the ends of a demangled name, or of a path, tell most."""
    text = clean(text)
    if columns(text) <= width:
        return text
    if width <= 1:
        return ELLIPSIS[:width]
    tail_width = (width - 1) // 2
    head = _prefix(text, width - 1 - tail_width)
    tail = _prefix(text[::-1], tail_width)[::-1]
    return f"{head}{ELLIPSIS}{tail}"


def _prefix(text: str, width: int) -> str:
    """As much of the start of text as fits in the width."""
    if text.isascii():
        return text[:width]
    used = 0
    for position, char in enumerate(text):
        used += _columns_of(char)
        if used > width:
            return text[:position]
    return text


def padded(text: str, width: int) -> str:
    """Text shortened and filled with blanks to exactly this width."""
    short = shorten(text, width)
    return short + " " * (width - columns(short))


# Wrapping.


def wrapped(text: str, width: int, *, first: Line = (), indent: int = 0, style: str = "") -> Iterator[Line]:
    """Text in lines: the first starts with `first`, the others with `indent` blanks; blanks in text collapse.

    `first` must leave room: it and `indent` are narrower than the width.
    """
    lead = first or line(" " * indent)
    room = width - sum(columns(span.text) for span in lead)
    current = ""
    for word in _pieces(text.split(), max(1, width - indent)):
        candidate = f"{current} {word}" if current else word
        if columns(candidate) <= room:
            current = candidate
            continue
        if current or first:
            yield (*lead, Span(current, style))
        lead, room, current = line(" " * indent), width - indent, word
    if current or first:
        yield (*lead, Span(current, style))


def advised(message: str, width: int, *, first: Line, indent: int) -> Iterator[Line]:
    """A message whose other lines say what to do: each of them begins a line."""
    told, *steps = message.splitlines() or [""]
    yield from wrapped(told, width, first=first, indent=indent)
    for step in steps:
        yield from wrapped(step, width, indent=indent)


def _pieces(words: Iterable[str], width: int) -> Iterator[str]:
    """The words, clean, those wider than a line in pieces that are not."""
    for word in map(clean, words):
        rest = word
        while rest:
            piece = _prefix(rest, width) or rest[0]
            yield piece
            rest = rest[len(piece) :]


# Tables.


def table(rows: Sequence[Sequence[str | Span]], width: int, *, indent: int = 2) -> Iterator[Line]:
    """Rows in columns, two blanks apart; where they do not fit, the widest columns are shortened first."""
    if not rows:
        return
    spans = [[part if isinstance(part, Span) else Span(part) for part in row] for row in rows]
    natural = [max(columns(clean(row[i].text)) for row in spans) for i in range(len(spans[0]))]
    widths = _fitted(natural, width - indent - 2 * (len(natural) - 1))
    for row in spans:
        cells = [Span(padded(cell.text, room), cell.style) for cell, room in zip(row, widths, strict=True)]
        gaps = [cell if i == 0 else Span(f"  {cell.text}", cell.style) for i, cell in enumerate(cells)]
        yield (Span(" " * indent), *gaps)


def _fitted(natural: Sequence[int], room: int) -> list[int]:
    """Widths that sum to at most `room`: the largest cap that fits, applied to all, never below one."""
    if sum(natural) <= room:
        return list(natural)
    cap = max(1, room // len(natural))
    while sum(min(each, cap + 1) for each in natural) <= room:
        cap += 1
    return [min(each, cap) for each in natural]


# Painting.


def painted(lines: Iterable[Line], *, color: bool) -> str:
    """All lines as one text, each with its newline; escape sequences only if there is to be colour."""
    if not color:
        return "".join(f"{plain(each)}\n" for each in lines)
    return "".join(f"{_colored(each)}\n" for each in lines)


def _colored(of: Line) -> str:
    from rich.style import Style

    text = plain(of)
    result, used = [], 0
    for span in of:
        part = text[used : used + len(span.text)]
        used += len(span.text)
        result.append(Style.parse(STYLES[span.style]).render(part) if span.style and part else part)
    return "".join(result)
