"""The shim's source: what it registers, and that nothing from a file gets out of its comment."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from forkproof.errors import InputError
from forkproof.mitigate.remedy import Remedy
from forkproof.mitigate.shim import MARK, build, compiler, source
from forkproof.model import Finding, Severity, Verdict

FINDING = Finding("atfork-unbound", Severity.HIGH, Verdict.REACHABLE, "/usr/bin/x", "libx.so", "libx.so hangs", "", "")
UNBOUND = Remedy(FINDING, "libx.so", "__register_atfork", defines="pthread_atfork", why="so it is")
ABSENT = Remedy(FINDING, "libx.so", "__register_atfork", handlers=("lock", "unlock", "unlock"), why="so it is")


def test_unbound_defines_what_is_looked_for() -> None:
    text = source([UNBOUND], "x")
    assert "int pthread_atfork(handler prepare, handler parent, handler child)" in text
    assert "return __register_atfork(prepare, parent, child, (void *)0);" in text
    assert "constructor" not in text


def test_absent_registers_what_is_exported() -> None:
    text = source([ABSENT], "x")
    assert '__asm__("lock") __attribute__((weak))' in text
    assert "__register_atfork(handler_0, handler_1, handler_1, (void *)0);" in text
    assert "if (handler_0 && handler_1)" in text


def test_musl_has_no_dso_handle() -> None:
    text = source([replace(ABSENT, registrar="pthread_atfork")], "x")
    assert "pthread_atfork(handler_0, handler_1, handler_1);" in text
    text = source([replace(UNBOUND, registrar="pthread_atfork", defines="__register_atfork")], "x")
    assert "int __register_atfork(handler prepare, handler parent, handler child, void *dso)" in text


def test_one_source_for_several_findings() -> None:
    text = source([UNBOUND, replace(ABSENT, registrar="__register_atfork"), UNBOUND], "x")
    assert text.count("extern int __register_atfork") == 1
    assert text.count("int pthread_atfork(") == 1


@pytest.mark.parametrize("hostile", ["*/ int evil;", "a\nb", "\x1b[31m", "\N{SNOWMAN}"])
def test_comment_stays_closed(hostile: str) -> None:
    text = source([replace(UNBOUND, why=hostile)], hostile)
    assert text.count("*/") == 1
    assert text.isascii()
    assert "\x1b" not in text
    assert MARK in text


@pytest.mark.parametrize("name", ['a"b', "a b", "a\\", ""])
def test_strange_symbols_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no name of a symbol"):
        source([replace(ABSENT, handlers=(name, "unlock", "unlock"))], "x")


def test_lines_fit() -> None:
    text = source([replace(UNBOUND, why="word " * 200)], "x" * 50)
    assert max(map(len, text.splitlines())) <= 100


def test_missing_compiler_says_what_to_install() -> None:
    with pytest.raises(InputError, match="no such compiler") as error:
        compiler("x86_64", "no-such-cc -O2")
    assert "--cc" in error.value.next_step


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
class TestBuilding:
    def test_is_reproducible(self, tmp_path: Path) -> None:
        machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
        text = source([UNBOUND, ABSENT], "x")
        first = build(text, tmp_path / "libshim.so", machine, None).path.read_bytes()
        assert build(text, tmp_path / "libshim.so", machine, "gcc").path.read_bytes() == first
        assert list(tmp_path.iterdir()) == [tmp_path / "libshim.so"]

    def test_wrong_machine(self, tmp_path: Path) -> None:
        other = (
            "aarch64"
            if subprocess.run(["uname", "-m"], capture_output=True, check=True).stdout != b"aarch64\n"
            else "x86_64"
        )
        with pytest.raises(InputError, match=f"the program is for {other}"):
            build(source([UNBOUND], "x"), tmp_path / "libshim.so", other, "gcc")
        assert not (tmp_path / "libshim.so").exists()

    def test_compiler_that_fails(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="could not build the shim"):
            build("#error no\n", tmp_path / "libshim.so", "x86_64", "gcc")
