"""The command as a process: what it imports, terminals, pipes; and the commands that need no target."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import forkproof
from forkproof import rules
from forkproof.cli import Commands, output
from forkproof.cli.progress import progress
from forkproof.options import QUIET, Scanned
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

    @pytest.mark.parametrize("arguments", [["-h"], ["scan", "-h"], ["probe", "-h"]], ids=" ".join)
    def test_exit_codes_after_signals(self, arguments: list[str]) -> None:
        assert "130, 143, 129" in run(*arguments).output

    def test_version(self) -> None:
        assert run("--version").output == f"forkproof {forkproof.__version__}\n"


class TestCompletion:
    @pytest.mark.parametrize(
        ("words", "offers"),
        [
            ("forkproof sc", "plain,scan"),
            ("forkproof scan /usr/s", "file,/usr/s"),
            ("forkproof scan a b", "file,b"),
            ("forkproof scan --format br", "plain,brief"),
            ("forkproof scan --preload lib", "file,lib"),
            ("forkproof scan --library-path d", "dir,d"),
            ("forkproof scan --explain atfork-u", "plain,atfork-unbound"),
            ("forkproof closure x", "file,x"),
            ("forkproof closure --sysroot d", "dir,d"),
            ("forkproof diff old new", "file,new"),
            ("forkproof diff --with x", "file,x"),
            ("forkproof matrix x", "file,x"),
            ("forkproof mitigate x", "file,x"),
            ("forkproof graph x", "file,x"),
            ("forkproof report x", "file,x"),
            ("forkproof probe -- x", "file,x"),
            ("forkproof probe --rule unsafe-c", "plain,unsafe-call"),
            ("forkproof rules unsafe-c", "plain,unsafe-call"),
        ],
    )
    def test_what_a_shell_offers(self, words: str, offers: str) -> None:
        variables = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_FORKPROOF_COMPLETE": "bash_complete"}
        assert run("", env=variables).output == f"{offers}\n"


class TestRules:
    def test_list(self) -> None:
        lines = run("rules").output.splitlines()
        assert [line.split()[0] for line in lines[: len(rules.load())]] == [rule.id for rule in rules.load()]
        assert all(rule.title in line for rule, line in zip(rules.load(), lines, strict=False))

    def test_page(self) -> None:
        (rule, *_) = rules.load()
        assert run("rules", rule.id).output == rule.page
        assert run("rules", f"{rule.id}-0123456789").output == rule.page, "the id of a finding leads to its rule"

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

    def test_progress_is_no_part_of_a_report(self) -> None:
        targets = ("/nowhere/a", "/nowhere/b")
        told, quiet = (
            process("scan", *targets, *more, "--format", "json", "--no-config", stdout=subprocess.PIPE)
            for more in ([], ["--quiet"])
        )
        assert told.stdout == quiet.stdout
        assert len(json.loads(told.stdout)["diagnostics"]) == 2
        lines = told.stderr.splitlines()
        assert [line.rpartition(",")[0] for line in lines[:2]] == [
            f"forkproof: {done} of 2: {name}: not analysed" for done, name in enumerate(targets, 1)
        ]
        assert lines[2:] == quiet.stderr.splitlines()

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


class _Left(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


def listening(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    """Standard error, from now on: pytest sets its own between a fixture and its test."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


class TestProgress:
    def test_a_log_gets_a_line_for_each_of_several_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log = listening(monkeypatch, io.StringIO())
        with progress() as watched:
            watched.stage("a: loading", 1, 2)
            watched.scanned(Scanned("a", 3, "medium", "not everything was analysed", 1.26), 1, 4)
            watched.scanned(Scanned("b\n\x1b[2J", seconds=0.02), 2, 4)
            watched.scanned(Scanned("c", gap="not everything was analysed", seconds=0), 3, 4)
            watched.scanned(Scanned("d", gap="not analysed"), 4, 4)
        assert log.getvalue().splitlines() == [
            "forkproof: 1 of 4: a: 3 findings, the worst medium, not everything was analysed, 1.3 s",
            r"forkproof: 2 of 4: b\n\x1b[2J: no finding, 0.0 s",
            "forkproof: 3 of 4: c: not everything was analysed, 0.0 s",
            "forkproof: 4 of 4: d: not analysed",
        ]

    def test_a_log_gets_nothing_of_one_program_that_is_quickly_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log = listening(monkeypatch, io.StringIO())
        with progress() as watched:
            watched.stage("a: loading", 0, 4)
            watched.scanned(Scanned("a", 3, "medium", seconds=9.9), 1, 1)
        assert log.getvalue() == ""

    def test_a_log_hears_of_one_that_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log = listening(monkeypatch, io.StringIO())
        clock = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
        with progress() as watched:
            for now, name in ((100.0, "loading"), (111.0, "following"), (119.0, "checking"), (121.4, "reporting")):
                clock.append(now)
                watched.stage(f"a: {name}", 0, 4)
            watched.scanned(Scanned("a", 1, "low", seconds=21.4), 1, 1)
        assert log.getvalue().splitlines() == [
            "forkproof: a: following, after 11 s",
            "forkproof: a: reporting, after 21 s",
            "forkproof: a: 1 finding, the worst low, 21.4 s",
        ]

    def test_quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log = listening(monkeypatch, io.StringIO())
        with progress(quiet=True) as watched:
            assert watched is QUIET
            watched.scanned(Scanned("a", seconds=60), 1, 2)
        assert log.getvalue() == ""

    def test_nobody_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither a closed standard error nor one whose reader has left ends a scan."""
        monkeypatch.setattr(sys, "stderr", None)
        with progress() as watched:
            assert watched is QUIET
        for stream in (_Left(), io.TextIOWrapper(io.BytesIO())):
            monkeypatch.setattr(sys, "stderr", stream)
            with progress() as watched:
                stream.close()
                watched.scanned(Scanned("a", seconds=1), 1, 2)

    def test_a_bar_that_goes_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = listening(monkeypatch, _Terminal())
        with progress() as watched:
            watched.stage("loading [bold]\x1b[2Jx", 0, 0)
            watched.stage("following " + "x" * 300, 1, 2)
        shown = terminal.getvalue()
        assert "following xxx" in shown
        assert "\x1b[2Jx" not in shown

    def test_the_bar_counts_findings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = listening(monkeypatch, _Terminal())
        with progress() as watched:
            watched.scanned(Scanned("a", 2, "low", seconds=1), 1, 2)
            watched.scanned(Scanned("b", 1, "low", seconds=1), 2, 2)
        assert "3 findings; b" in terminal.getvalue()

    @pytest.mark.parametrize(
        ("no_color", "variable", "colored"), [(False, "", True), (True, "", False), (False, "1", False)]
    )
    def test_colours_of_the_bar(
        self, monkeypatch: pytest.MonkeyPatch, no_color: bool, variable: str, colored: bool
    ) -> None:
        terminal = listening(monkeypatch, _Terminal())
        monkeypatch.setenv("COLORTERM", "truecolor")
        monkeypatch.setenv("NO_COLOR", variable)
        with progress(no_color=no_color) as watched:
            watched.stage("loading", 1, 2)
        assert bool(re.search(r"\x1b\[[0-9;]*38;", terminal.getvalue())) is colored

    def test_a_dumb_terminal_is_a_log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = listening(monkeypatch, _Terminal())
        monkeypatch.setenv("TERM", "dumb")
        with progress() as watched:
            watched.scanned(Scanned("a", 1, "low", seconds=1), 1, 2)
        assert terminal.getvalue() == "forkproof: 1 of 2: a: 1 finding, the worst low, 1.0 s\n"


def test_a_misspelt_command_is_told_with_its_like() -> None:
    done = run("scna", "x")
    assert done.exit_code == 2
    assert "No such command 'scna'. Did you mean scan?" in done.output
    assert "Did you mean" not in run("xyzzy").output


def test_a_command_of_other_tools_is_told_with_what_it_is_here() -> None:
    done = run("explain", "inherited-lock")
    assert done.exit_code == 2
    assert "No such command 'explain'. Did you mean rules RULE or scan TARGET --explain ID?" in done.output
    for meant in Commands.meant.values():
        assert {each.split()[0] for each in meant} <= set(Commands.entries)


def test_help_into_a_full_device() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "forkproof", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "forkproof: standard output: cannot write: No space left on device\n"
