"""Witness paths as people read stacks: numbered as gdb does, the innermost frame first.

Owns: the words for edges, and how a path becomes numbered lines or one arrow-joined line.
Takes: frames, outermost first, as the model keeps them. Gives: lines.
Must never: drop a frame without saying how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from forkproof.model import Frame
from forkproof.report.layout import Line, Span, line, table, wrapped

EDGES: Final = {
    "direct": ("direct call", "a call instruction whose operand is the function"),
    "jump": ("tail call", "a jump to the function, which returns to the caller's caller"),
    "plt": ("via PLT", "a call through the PLT, bound as ld.so binds it in this closure"),
    "got": ("via GOT", "a call through a GOT slot, bound as ld.so binds it in this closure"),
    "callback": ("as callback", "its address is an argument of a function that calls back"),
    "deferred": ("kept for later", "its address is handed to a function that calls it later"),
    "table": ("via table", "its address is in a table that the caller reads: the call may choose another entry"),
    "field": ("via field", "the caller calls what a field holds, and the program puts its address into such a field"),
    "dynamic": (
        "via object",
        "the caller calls what an object holds or its class tells, which may be another",
    ),
    "ifunc": ("via ifunc", "an implementation that an ifunc resolver may choose"),
    "thread": ("new thread", "the start function of a thread"),
    "fork": ("in the child", "the child goes on where fork returns"),
    "return": ("on return", "the child returns to this caller of the function that forked"),
}
"""How a frame was reached: in two words for a stack, and in a sentence for `--explain`."""

_TITLES: Final = {
    "threads-lost": ("Thread: one that the child does not have", "Child: how it comes to need it"),
    "handlers-skipped": ("Holder", "Child: how it comes to what the handlers would have put right"),
    "handler-unsafe": ("Holder", "Handler: how it comes to that"),
    "vfork-misuse": ("Holder", "Child: how it comes to that, in its parent's memory"),
    "lock-reentry": ("Holder: the thread that has it, and comes back for it", "Requester: the same thread"),
    "atfork-order": ("Holder: what takes it", "Requester: what asks for it while others hold it"),
}
_HANG: Final = (
    "Holder: another thread, which can have the lock when the fork comes",
    "Requester: the child, which wants it and waits",
)


def titles(rule: str) -> tuple[str, str]:
    """What a finding's two paths are: of most rules holder and requester of a lock, of some another matter."""
    return _TITLES.get(rule, _HANG)


INNER: Final = 9
"""Frames that a shortened stack shows of its inner end: where the lock is."""
OUTER: Final = 3
"""And of its outer end: where the path starts."""


def name(frame: Frame) -> str:
    """The function, and the distance to the call in it."""
    return f"{frame.function}{frame.offset:+#x}" if frame.offset else frame.function


def brief(function: str) -> str:
    """A demangled name without its parameters, which rarely tell functions of a stack apart."""
    text = function.removesuffix(" const")
    if not text.endswith(")"):
        return function
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(text[position], 0)
        if depth == 0:
            cut = text[:position]
            return cut if cut and not cut.endswith(("operator", " ", "::")) else function
    return function


def place(frame: Frame) -> str:
    """A frame in running text."""
    return f"{name(frame)} in {frame.object}"


def chain(frames: Sequence[Frame]) -> str:
    """A path in one line, outermost first."""
    return " -> ".join(brief(frame.function) for frame in frames)


def stack(frames: Sequence[Frame], width: int, *, indent: int, whole: bool) -> Iterator[Line]:
    """Numbered frames, each with how it was reached from the next.

    `whole` shows every frame and the whole of each name; without it the middle of a long stack is left out, names
    lose their parameters, and what is still too wide its middle.
    """
    if whole:
        yield from _whole(frames, width, indent)
        return
    rows = [_row(frames, number, brief) for number in range(len(frames))]
    hidden = len(rows) - INNER - OUTER
    if hidden <= 1:
        yield from table(rows, width, indent=indent)
        return
    lines = list(table(rows[:INNER] + rows[-OUTER:], width, indent=indent))
    yield from lines[:INNER]
    yield line(" " * indent, Span(f"... {hidden} more frames: --verbose", "quiet"))
    yield from lines[INNER:]


def _whole(frames: Sequence[Frame], width: int, indent: int) -> Iterator[Line]:
    """All frames; a name that is too long for its line goes on in the next."""
    for number in range(len(frames)):
        label, where, function, words = _row(frames, number, str)
        first = line(" " * indent, f"{label.text:<4}")
        text = f"{where.text}  {function.text}" + (f"  [{words.text}]" if words.text else "")
        yield from wrapped(text, width, first=first, indent=indent + 6)


def _row(frames: Sequence[Frame], number: int, shown: Callable[[str], str]) -> tuple[Span, Span, Span, Span]:
    """Number, object, function and the words for how it was reached."""
    position = len(frames) - 1 - number
    frame = frames[position]
    edge = frames[position - 1].edge if position else ""
    words = EDGES[edge][0] if edge in EDGES else edge
    function = name(replace(frame, function=shown(frame.function)))
    return Span(f"#{number}"), Span(frame.object), Span(function, "name"), Span(words, "quiet")


def legend(frames: Sequence[Frame]) -> list[str]:
    """What the edges of these frames mean, one sentence for each kind that occurs."""
    used = {frame.edge for frame in frames}
    return [f"{words}: {meaning}" for edge, (words, meaning) in EDGES.items() if edge in used]
