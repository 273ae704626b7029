"""`forkproof scan`: options, exit codes, where the result goes, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import forkproof
from forkproof.cli import main
from forkproof.cli.group import Ended
from forkproof.errors import DamagedElf, UsageError
from forkproof.model import Diagnostic, Report, Severity, Verdict
from forkproof.options import ScanOptions
from forkproof.report import formats, json, text
from tests.unit.cli.conftest import Pipeline, run
from tests.unit.report import samples


def with_severity(severity: Severity, verdict: Verdict = Verdict.REACHABLE) -> Report:
    finding = replace(samples.INHERITED, severity=severity, verdict=verdict)
    return Report((samples.TARGET,), (finding,))


class TestRequest:
    def test_options_reach_the_pipeline(self, pipeline: Pipeline, tmp_path: Path) -> None:
        options = ["--sysroot", tmp_path, "--library-path", "/a", "--library-path", "/b", "--preload", "libt.so"]
        run("scan", "x", "y", "x", *options, "--also", "plugin.so")
        expected = ScanOptions(tmp_path, ("/a", "/b"), ("libt.so",), ("plugin.so",))
        assert pipeline.calls == [(("x", "y"), expected)]

    def test_text_is_the_default(self, pipeline: Pipeline) -> None:
        assert run("scan", "x").output == text.render(pipeline.report)
        assert run("scan", "x", "--verbose").output == text.render(pipeline.report, verbose=True)

    def test_json(self, pipeline: Pipeline) -> None:
        assert run("scan", "x", "--format", "json").output == json.render(pipeline.report)

    @pytest.mark.usefixtures("pipeline")
    def test_two_runs_are_identical(self) -> None:
        assert run("scan", "x", "--format", "json").stdout_bytes == run("scan", "x", "--format", "json").stdout_bytes

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["scan"], "Missing argument 'TARGET...'"),
            (["scan", "x", "--sysroot", "/no/such/directory"], "--sysroot"),
            (["scan", "x", "--format", "xml"], "xml"),
            (["scan", "x", "--fail-on", "fatal"], "fatal"),
            (["scan", "x", "--nonsense"], "--nonsense"),
            (["nonsense"], "nonsense"),
            (["scan", "x", "--explain", "atfork-unbund"], "Did you mean atfork-unbound"),
            (["scan", "x", "--explain", "atfork-absent", "--format", "json"], "--explain is text"),
            (["scan", "x", "--output", "/no/such/directory/file"], "mkdir -p /no/such/directory"),
            (["scan", "x", "--output", "/"], "is a directory"),
        ],
    )
    def test_impossible_requests_end_with_2(self, pipeline: Pipeline, arguments: list[str], message: str) -> None:
        result = run(*arguments)
        assert (result.exit_code, pipeline.calls) == (2, [])
        assert message in result.output


class TestEndOfProcess:
    """Only a process of the command's own ends with it: what a caller in Python leaves is collected as ever."""

    def test_a_command_line(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["forkproof", "scan", "x"])
        with pytest.raises(SystemExit):
            main()
        assert pipeline.was_last == [True]

    def test_a_caller(self, pipeline: Pipeline) -> None:
        run("scan", "x")
        assert pipeline.was_last == [False]


class TestExitCodes:
    @pytest.mark.parametrize(
        ("severity", "fail_on", "expected"),
        [
            ("high", "high", 1),
            ("medium", "high", 0),
            ("medium", "medium", 1),
            ("low", "medium", 0),
            ("low", "low", 1),
            ("note", "low", 0),
            ("note", "note", 1),
            ("high", "never", 0),
        ],
    )
    def test_threshold(self, pipeline: Pipeline, severity: str, fail_on: str, expected: int) -> None:
        pipeline.report = with_severity(Severity(severity))
        assert run("scan", "x", "--fail-on", fail_on).exit_code == expected

    def test_high_is_the_default(self, pipeline: Pipeline) -> None:
        assert run("scan", "x").exit_code == 1
        pipeline.report = with_severity(Severity.MEDIUM)
        assert run("scan", "x").exit_code == 0

    def test_what_was_refuted_does_not_count(self, pipeline: Pipeline) -> None:
        pipeline.report = with_severity(Severity.HIGH, Verdict.REFUTED)
        assert run("scan", "x").exit_code == 0

    @pytest.mark.parametrize(
        "report",
        [
            Report(errors=("x: not an ELF file",)),
            Report((replace(samples.TARGET, missing=("libx.so.1",)),)),
            Report(diagnostics=(Diagnostic("error", "libx.so.1", "damaged"),)),
        ],
        ids=["errors", "missing", "diagnostic"],
    )
    def test_incomplete(self, pipeline: Pipeline, report: Report) -> None:
        pipeline.report = report
        assert run("scan", "x").exit_code == 3
        assert run("scan", "x", "--fail-on", "never").exit_code == 3

    def test_findings_win_over_incomplete(self, pipeline: Pipeline) -> None:
        pipeline.report = replace(samples.incident(), errors=("x: not an ELF file",))
        assert run("scan", "x").exit_code == 1

    def test_warnings_do_not_count(self, pipeline: Pipeline) -> None:
        pipeline.report = Report(diagnostics=(Diagnostic("warning", "x", "y"),))
        assert run("scan", "x").exit_code == 0

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (
                UsageError("/x: not a sysroot", next_step="Name another."),
                2,
                "forkproof: /x: not a sysroot\n  Name another.\n",
            ),
            (
                DamagedElf("a\x1b[2Jb", "is damaged", next_step="Mend it."),
                3,
                "forkproof: a\\x1b[2Jb: is damaged\n  Mend it.\n",
            ),
            (KeyboardInterrupt(), 130, "forkproof: interrupted\n"),
            (Ended(signal.SIGTERM), 143, "forkproof: interrupted\n"),
            (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        ],
    )
    def test_errors(self, pipeline: Pipeline, error: BaseException, code: int, message: str) -> None:
        pipeline.error = error
        result = run("scan", "x")
        assert (result.exit_code, result.output) == (code, message)


class TestInternalErrors:
    def test_say_that_it_is_our_fault(self, pipeline: Pipeline) -> None:
        pipeline.error = KeyError("surprise")
        result = run("scan", "x")
        assert result.exit_code == 4
        assert "internal error: KeyError: 'surprise' at cli/scan.py:" in result.output
        assert "This is a bug in forkproof" in result.output
        assert "FORKPROOF_TRACEBACK=1" in result.output
        assert "Traceback" not in result.output

    def test_traceback_on_demand(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        pipeline.error = KeyError("surprise")
        assert "Traceback (most recent call last)" in run("--traceback", "scan", "x").output
        monkeypatch.setenv("FORKPROOF_TRACEBACK", "1")
        assert "Traceback (most recent call last)" in run("scan", "x").output


class TestOutput:
    def test_a_file_instead_of_stdout(self, pipeline: Pipeline, tmp_path: Path) -> None:
        file = tmp_path / "report.json"
        result = run("scan", "x", "--format", "json", "--output", file)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"forkproof: {file}: 1 target analysed; 2 findings (2 high)\n"
        assert file.read_text() == json.render(pipeline.report)
        assert list(tmp_path.iterdir()) == [file]
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask

    @pytest.mark.parametrize(
        ("name", "form"),
        [("r.json", "json"), ("r.sarif", "sarif"), ("r.html", "html"), ("r.md", "markdown"), ("r.xml", "junit"),
         ("r.dot", "dot"), ("r.svg", "svg"), ("r.mmd", "mermaid"), ("r.txt", "text"), ("json", "text")],
    )  # fmt: skip
    def test_the_name_of_the_file_says_which_format(
        self, pipeline: Pipeline, tmp_path: Path, name: str, form: str
    ) -> None:
        run("scan", "x", "-o", tmp_path / name)
        assert (tmp_path / name).read_text() == formats.render(pipeline.report, form, formats.Look())

    def test_a_format_that_is_asked_for_counts_more(self, pipeline: Pipeline, tmp_path: Path) -> None:
        file = tmp_path / "r.json"
        run("scan", "x", "-o", file, "--format", "text")
        assert file.read_text() == text.render(pipeline.report)

    @pytest.mark.usefixtures("pipeline")
    def test_a_name_for_a_format_that_a_command_lacks(self, tmp_path: Path) -> None:
        run("matrix", "x", "-o", tmp_path / "r.sarif")
        assert (tmp_path / "r.sarif").read_text().startswith("program ")
        run("matrix", "x", "-o", tmp_path / "r.md")
        assert (tmp_path / "r.md").read_text().startswith("| program ")

    @pytest.mark.parametrize("form", ["json", "sarif", "html", "markdown", "junit"])
    def test_what_failed_is_told_beside_what_nobody_reads_at_once(self, pipeline: Pipeline, form: str) -> None:
        pipeline.report = Report(errors=tuple(f"/no/{n}\x1b: does not exist\n  Check." for n in range(12)))
        result = run("scan", "x", "--format", form, "--quiet")
        assert result.exit_code == 3
        assert result.stderr.count("does not exist\n  Check.\n") == 10
        assert result.stderr.startswith(r"forkproof: /no/0\x1b: does not exist")
        assert result.stderr.endswith("forkproof: and 2 more that could not be analysed: the report has them\n")

    @pytest.mark.parametrize("form", ["text", "brief"])
    def test_what_failed_is_told_once(self, pipeline: Pipeline, form: str) -> None:
        pipeline.report = Report(errors=("/no: does not exist\n  Check.",))
        assert run("scan", "x", "--format", form).stderr == ""

    @pytest.mark.usefixtures("pipeline")
    def test_quiet_about_a_file(self, tmp_path: Path) -> None:
        assert run("scan", "x", "-o", tmp_path / "report", "--quiet").output == ""

    def test_replaces_and_keeps_mode_and_link(self, pipeline: Pipeline, tmp_path: Path) -> None:
        file, link = tmp_path / "report", tmp_path / "link"
        file.write_text("old")
        file.chmod(0o640)
        link.symlink_to(file)
        run("scan", "x", "-o", link)
        assert link.is_symlink()
        assert file.read_text() == text.render(pipeline.report)
        assert stat.S_IMODE(file.stat().st_mode) == 0o640

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    @pytest.mark.usefixtures("pipeline")
    def test_a_full_disk(self) -> None:
        result = run("scan", "x", "-o", "/dev/full")
        assert result.exit_code == 3
        assert "/dev/full: cannot write: No space left on device" in result.output

    @pytest.mark.usefixtures("pipeline")
    def test_a_disk_that_fills_up_leaves_the_old_report(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "report"
        file.write_text("old")

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        result = run("scan", "x", "-o", file)
        assert result.exit_code == 3
        assert "No space left on device" in result.output
        assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]

    def test_no_permission_is_told_before_the_scan(
        self, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)
        result = run("scan", "x", "-o", tmp_path / "report")
        assert (result.exit_code, pipeline.calls) == (3, [])
        assert "no permission, or a read-only file system" in result.output

    def test_names_that_are_not_utf8(self, pipeline: Pipeline, tmp_path: Path) -> None:
        target = replace(samples.TARGET, path="/srv/\udcff")
        pipeline.report = Report((target,))
        assert "/srv/\\udcff: no finding" in run("scan", "x").output
        assert run("scan", "x", "--format", "json", "-o", tmp_path / "r").exit_code == 0
        assert json.parse((tmp_path / "r").read_text()).targets[0] == target


class TestExplain:
    @pytest.mark.usefixtures("pipeline")
    def test_a_finding(self) -> None:
        result = run("scan", "x", "--explain", samples.INHERITED.id)
        assert result.exit_code == 1
        assert "HOW EACH STEP WAS DERIVED" in result.output
        assert "## How to fix it" in result.output

    def test_a_finding_of_a_saved_report(self, pipeline: Pipeline, tmp_path: Path) -> None:
        file = tmp_path / "report.json"
        run("scan", "x", "--format", "json", "-o", file)
        fresh = run("scan", "x", "--explain", samples.INHERITED.id)
        calls = len(pipeline.calls)
        saved = run("scan", file, "--explain", samples.INHERITED.id)
        assert (saved.output, saved.exit_code) == (fresh.output, fresh.exit_code)
        assert len(pipeline.calls) == calls

    def test_a_rule_needs_no_target(self, pipeline: Pipeline) -> None:
        result = run("scan", "--explain", "atfork-unbound")
        assert (result.exit_code, pipeline.calls) == (0, [])
        assert result.output.startswith("# atfork-unbound: ")
        assert result.output == run("rules", "atfork-unbound").output

    def test_an_id_that_is_not_there(self, pipeline: Pipeline) -> None:
        result = run("scan", "x", "--explain", "inherited-lock-0000000000")
        assert result.exit_code == 2
        assert samples.INHERITED.id in " ".join(result.output.split())
        pipeline.report = Report()
        assert "no findings at all" in run("scan", "x", "--explain", "inherited-lock-0000000000").output

    def test_two_targets_of_one_name(self, pipeline: Pipeline) -> None:
        other = replace(samples.INHERITED, target="/opt/qemu-system-aarch64")
        pipeline.report = Report((samples.TARGET,), (samples.INHERITED, other))
        result = run("scan", "x", "--explain", samples.INHERITED.id)
        assert result.output.count("HOW EACH STEP WAS DERIVED") == 2
        assert result.output.count("## How to fix it") == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "line 1 column 2: not JSON"),
            (b'{"version": 9}', "version: 9 where"),
            (b'{"\xff": 1}', "version: null"),
        ],
    )
    def test_a_saved_report_that_is_none(
        self, pipeline: Pipeline, tmp_path: Path, content: bytes, message: str
    ) -> None:
        file = tmp_path / "report.json"
        file.write_bytes(content)
        result = run("scan", file, "--explain", samples.INHERITED.id)
        assert (result.exit_code, pipeline.calls) == (3, [])
        assert f"{file}: not a forkproof report: {message}" in result.output

    def test_a_target_that_is_no_report_is_scanned(self, pipeline: Pipeline, tmp_path: Path) -> None:
        (tmp_path / "elf").write_bytes(b"\x7fELF")
        for target in (tmp_path / "elf", tmp_path, tmp_path / "absent"):
            run("scan", target, "--explain", samples.INHERITED.id)
        assert len(pipeline.calls) == 3


class TestPythonInterface:
    def test_scan(self, pipeline: Pipeline, tmp_path: Path) -> None:
        report = forkproof.scan("/bin/x", tmp_path / "y", sysroot=tmp_path, preload=["libt.so"])
        assert report is pipeline.report
        assert pipeline.calls == [
            (("/bin/x", str(tmp_path / "y")), ScanOptions(sysroot=tmp_path, preload=("libt.so",)))
        ]

    def test_names(self) -> None:
        assert set(forkproof.__all__) == {"__version__", "scan"}
        assert isinstance(forkproof.__version__, str)
        missing: Callable[[], object] = lambda: getattr(forkproof, "nothing")  # noqa: B009, E731 - the name is the point
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            missing()


def test_a_saved_report_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text('{"version": 1}')
    result = run("scan", file, "--no-cache")
    assert result.exit_code == 3
    assert "forkproof report FILE" in result.output


def test_a_library_path_that_does_not_exist_is_told() -> None:
    report = forkproof.scan("/bin/true", library_path=["/no/such/place"], cache=None)
    assert [note.message for note in report.diagnostics if note.object == "/no/such/place"] == [
        "does not exist in the sysroot: LD_LIBRARY_PATH finds nothing there"
    ]
