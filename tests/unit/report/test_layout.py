"""What fits, fits: measured in columns of a terminal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkproof.report.layout import Span, clean, columns, line, padded, painted, plain, shorten, table, wrapped

WIDE = st.text(st.sampled_from("ab: \t\n\x1b\u202e\udcffé́中文"), max_size=60)


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("short", 10, "short"),
        ("tcmalloc::CentralFreeList", 11, "tcmal…eList"),
        ("abcdef", 2, "a…"),
        ("abcdef", 1, "…"),
        ("abcdef", 0, ""),
        ("中文中文中文", 7, "中…文"),
        ("a\x1b[31mred", 40, "a\\x1b[31mred"),
    ],
)
def test_shorten_keeps_both_ends(text: str, width: int, expected: str) -> None:
    assert shorten(text, width) == expected


@given(WIDE, st.integers(0, 40))
def test_shortened_text_fits(text: str, width: int) -> None:
    assert columns(shorten(text, width)) <= width
    assert columns(padded(text, width)) == width


@given(WIDE, st.integers(12, 60))
def test_wrapped_lines_fit_and_hold_every_word(text: str, width: int) -> None:
    lines = [plain(each) for each in wrapped(text, width, first=line("> "), indent=4)]
    assert all(columns(each) <= width for each in lines)
    assert "".join("".join(lines).removeprefix(">").split()) == clean("".join(text.split())).replace(" ", "")


def test_wrapped_hangs() -> None:
    lines = [plain(each) for each in wrapped("one two  three\nfour", 11, first=line("- "), indent=2)]
    assert lines == ["- one two", "  three", "  four"]


def test_control_characters_never_reach_a_terminal() -> None:
    assert clean("ok") == "ok"
    assert clean("\x1b]0;title\x07\n\u202e\udc80") == "\\x1b]0;title\\x07\\n\\u202e\\udc80"


@given(st.lists(st.tuples(WIDE, WIDE, WIDE), max_size=4), st.integers(40, 100))
def test_tables_fit(rows: list[tuple[str, str, str]], width: int) -> None:
    assert all(columns(plain(each)) <= width for each in table(rows, width))


def test_the_widest_column_gives_way() -> None:
    (row,) = table([("#0", "lib.so", "x" * 50)], 40)
    assert plain(row) == "  #0  lib.so  " + "x" * 13 + "…" + "x" * 12


def test_colour_adds_nothing_but_escape_sequences() -> None:
    lines = [line("  ", Span("high", "high"), " rest "), line(Span("   ", "note")), line()]
    colored = painted(lines, color=True)
    assert "\x1b[1;31mhigh\x1b[0m" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == painted(lines, color=False) == "  high rest\n\n\n"
