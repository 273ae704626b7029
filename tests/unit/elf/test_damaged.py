"""Damaged files are read or refused: nothing else, whatever is wrong with them."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.build import Result
from forkproof.elf.image import load
from forkproof.errors import DamagedElf, InputError, NotElf, UnreadableFile, UnsupportedElf


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calls_lazy", "libversions.so", "libunique_a.so"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_damage_is_an_input_error_or_harmless(machine: str, name: str, built_fixtures: Callable[[str], Result]) -> None:
    path = built_fixtures(machine).tree.root() / name
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.elf.mutants", path],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture
def whole(built_x86_64: Result) -> bytes:
    return (built_x86_64.tree.root() / "calls_lazy").read_bytes()


def _refused(tmp_path: Path, data: bytes) -> InputError:
    path = tmp_path / "damaged"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("length", [1, 4, 16, 63, 64, 100, 4096])
def test_truncated(tmp_path: Path, whole: bytes, length: int) -> None:
    assert isinstance(_refused(tmp_path, whole[:length]), DamagedElf if length >= 4 else NotElf)


def _patched(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("at", "form", "value", "kind"),
    [
        (0, "<I", 0, NotElf),
        (4, "<B", 1, UnsupportedElf),  # 32-bit
        (5, "<B", 2, UnsupportedElf),  # big-endian
        (16, "<H", 1, UnsupportedElf),  # a relocatable object
        (18, "<H", 40, UnsupportedElf),  # 32-bit ARM
        (32, "<Q", 1 << 60, DamagedElf),  # program headers beyond the end
        (56, "<H", 0, DamagedElf),  # none at all
    ],
)
def test_header_that_cannot_be(
    tmp_path: Path, whole: bytes, at: int, form: str, value: int, kind: type[InputError]
) -> None:
    assert isinstance(_refused(tmp_path, _patched(whole, at, form, value)), kind)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"!<arch>\n", b"\0" * 100])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    assert isinstance(_refused(tmp_path, content), NotElf)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="directory"):
        load(tmp_path)
    with pytest.raises(UnreadableFile, match="cannot be read"):
        load(tmp_path / "nothing")


def test_section_headers_are_hints_only(tmp_path: Path, whole: bytes) -> None:
    (section,) = struct.unpack_from("<Q", whole, 40)
    path = tmp_path / "forged"
    path.write_bytes(whole[:section] + b"\xff" * (len(whole) - section))
    image = load(path)
    assert image.needed
    assert len(image.dynamic_symbols) > 1
