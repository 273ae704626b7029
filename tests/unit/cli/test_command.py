"""The command as a process: what it imports, terminals, pipes; and the commands that need no target."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import forkproof
from forkproof import rules
from forkproof.cli import Commands, output
from forkproof.cli.progress import progress
from forkproof.options import QUIET
from tests.unit.cli.conftest import run

HEAVY = {"lief", "numpy", "networkx", "capstone", "yaml", "rich", "scipy", "forkproof.pipeline", "forkproof.closure"}


def process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forkproof", *arguments]
    return subprocess.run(command, check=False, text=True, timeout=60, **{"stderr": subprocess.PIPE, **options})  # type: ignore[call-overload, no-any-return]


class TestImports:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--help"],
            ["--version"],
            ["rules"],
            ["rules", "atfork-absent"],
            ["scan", "--help"],
            ["scan", "--explain", "atfork-absent"],
            ["scan"],
        ],
        ids=" ".join,
    )
    def test_nothing_heavy_is_imported_for_talking(self, arguments: list[str]) -> None:
        code = f"import runpy, sys\nsys.argv = ['forkproof', *{arguments!r}]\ntry:\n"
        code += "    runpy.run_module('forkproof', run_name='__main__')\nexcept SystemExit: pass\n"
        code += "print('\\n'.join(sys.modules), file=sys.stderr)"
        result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
        modules = set(result.stderr.split())
        assert "forkproof.cli" in modules
        assert not modules & HEAVY

    def test_importing_the_package_is_free(self) -> None:
        code = "import sys; before = set(sys.modules); import forkproof; print(*set(sys.modules) - before)"
        result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
        assert {name for name in result.stdout.split() if name.startswith("forkproof")} == {"forkproof"}


class TestHelp:
    def test_lists_the_commands_in_order(self) -> None:
        text = run("--help").output
        places = [text.index(f"\n  {name} ") for name in Commands.entries]
        assert places == sorted(places)
        assert "Examples:" in text

    @pytest.mark.parametrize("command", ["scan", "rules"])
    def test_every_command_has_examples(self, command: str) -> None:
        result = run(command, "-h")
        assert result.exit_code == 0
        assert f"forkproof {command}" in result.output.partition("Examples:")[2]
        assert all(len(line) <= 100 for line in result.output.splitlines())

    def test_version(self) -> None:
        assert run("--version").output == f"forkproof {forkproof.__version__}\n"


class TestRules:
    def test_list(self) -> None:
        lines = run("rules").output.splitlines()
        assert [line.split()[0] for line in lines[: len(rules.load())]] == [rule.id for rule in rules.load()]
        assert all(rule.title in line for rule, line in zip(rules.load(), lines, strict=False))

    def test_page(self) -> None:
        (rule, *_) = rules.load()
        assert run("rules", rule.id).output == rule.page

    @pytest.mark.parametrize(
        ("name", "message"), [("inherited", "Did you mean inherited-lock?"), ("zzz", "The rules are: atfork-absent, ")]
    )
    def test_unknown(self, name: str, message: str) -> None:
        result = run("rules", name)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


class TestStreams:
    def test_a_reader_that_has_left(self) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        result = process("rules", "atfork-absent", stdout=write_end)
        os.close(write_end)
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_full_device(self) -> None:
        with Path("/dev/full").open("w") as full:
            result = process("rules", stdout=full)
        assert result.returncode == 3
        assert result.stderr.startswith("forkproof: standard output: cannot write: No space left on device\n")

    def test_a_closed_stdout(self) -> None:
        code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'forkproof', 'rules'])"
        result = subprocess.run(
            [sys.executable, "-c", code], check=False, stderr=subprocess.PIPE, text=True, timeout=60
        )
        assert result.returncode == 3
        assert result.stderr.startswith("forkproof: standard output: cannot write: it is closed\n")

    @pytest.mark.parametrize(
        ("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
    )
    def test_colours_are_for_terminals(self, environment: dict[str, str], colored: bool) -> None:
        inherited = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        ours, theirs = os.openpty()
        result = process("rules", stdout=theirs, env={**inherited, "TERM": "xterm", **environment})
        os.close(theirs)
        shown = os.read(ours, 1 << 16)
        os.close(ours)
        assert result.returncode == 0
        assert (b"\x1b[" in shown) is colored

    def test_what_the_encoding_lacks_keeps_its_width(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        output.emit("a…b\n")
        monkeypatch.undo()
        stream.seek(0)
        assert stream.read() == "a?b\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_silent_without_a_terminal(self) -> None:
        with progress() as watched:
            assert watched is QUIET
            watched.stage("loading", 1, 2)

    def test_a_bar_that_goes_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = _Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with progress() as watched:
            watched.stage("loading [bold]\x1b[2Jx", 0, 0)
            watched.stage("following " + "x" * 300, 1, 2)
        shown = terminal.getvalue()
        assert "following xxx" in shown
        assert "\x1b[2Jx" not in shown


def test_a_misspelt_command_is_told_with_its_like() -> None:
    done = run("scna", "x")
    assert done.exit_code == 2
    assert "No such command 'scna'. Did you mean scan?" in done.output
    assert "Did you mean" not in run("xyzzy").output


def test_help_into_a_full_device() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "forkproof", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "forkproof: standard output: cannot write: No space left on device\n"
