"""A handful of rows of docs/libc.md: what libc's code says of a function is what running it shows.

`make libc-stress` runs all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.libc_stress import LIBCS, Libc, analysed, built, catalogued, rows, run

#: Rows that hang at once or never, so that a few seconds decide; the rest takes minutes.
SHOWN = {
    "glibc": {"localtime_r": "hang", "random": "hang", "dl_iterate_phdr": "hang", "setenv": "hang", "malloc": "ok"},
    "musl": {"fputs": "hang", "random": "ok", "malloc": "ok"},
    "glibc-aarch64": {"malloc": "ok"},
}


def _libc(name: str) -> Libc:
    libc = next(each for each in LIBCS if each.name == name)
    if (program := libc.missing()) is not None:
        pytest.skip(f"{program} is not installed")
    return libc


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_running_agrees_with_the_catalogue(name: str, tmp_path: Path) -> None:
    libc = _libc(name)
    program = built(libc, tmp_path)
    found = analysed(libc, program)
    for row, expected in SHOWN[name].items():
        assert catalogued(found, row)[0] == expected, row
        assert run(libc, program, row).split()[0] == expected, row


@pytest.mark.parametrize("libc", LIBCS, ids=lambda libc: libc.name)
def test_there_are_many_rows(libc: Libc, tmp_path: Path) -> None:
    _libc(libc.name)
    assert len(rows(libc, built(libc, tmp_path))) >= 40
