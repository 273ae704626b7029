"""--replace, --libc and `forkproof matrix`: what is asked of the pipeline, and what is said of its answers."""

from __future__ import annotations

import json as stdlib_json
from dataclasses import replace
from pathlib import Path

import pytest

from forkproof.artifacts import ReplacedSysroot
from forkproof.closure.sysroot import DirectorySysroot
from forkproof.model import Hooks, Report, Severity
from tests.unit.cli.conftest import Pipeline, run
from tests.unit.report import samples


class TestReplace:
    def test_reaches_the_pipeline(self, pipeline: Pipeline, tmp_path: Path) -> None:
        new = tmp_path / "new.so"
        new.write_text("x")
        run("scan", "x", "--replace", f"libx.so.1={new}")
        assert pipeline.calls[0][1].replace == (("libx.so.1", new),)

    def test_libc_is_every_library_of_a_directory(self, pipeline: Pipeline, tmp_path: Path) -> None:
        for name in ("libc.so.6", "ld-linux-x86-64.so.2", "notes.txt"):
            (tmp_path / name).write_text("x")
        run("scan", "x", "--libc", tmp_path)
        assert [name for name, _ in pipeline.calls[0][1].replace] == ["ld-linux-x86-64.so.2", "libc.so.6"]

    @pytest.mark.parametrize(
        "arguments", [["--replace", "x"], ["--replace", "a/b=/bin/true"], ["--replace", "x=/no"], ["--libc", "/etc"]]
    )
    def test_mistakes(self, pipeline: Pipeline, arguments: list[str]) -> None:
        assert run("scan", "x", *arguments).exit_code == 2
        assert pipeline.calls == []

    @pytest.mark.usefixtures("pipeline")
    @pytest.mark.parametrize(
        ("pair", "reason"),
        [
            ("libx.so.1", "is no pair"),
            ("=/bin/true", "is no pair"),
            ("/usr/lib/libx.so.1=/bin/true", "/usr/lib/libx.so.1 is a path"),
            ("libx.so.1=/no/such", "no file /no/such on this machine"),
            ("libx.so.1=/", "/ is a directory"),
        ],
    )
    def test_a_mistake_is_told_with_its_part(self, pair: str, reason: str) -> None:
        said = run("scan", "x", "--replace", pair).output
        assert reason in said
        assert "--replace libx.so.1=./new/libx.so.1" in said

    def test_only_what_exists_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib/libx.so.1.2").write_text("old")
        (tmp_path / "lib/libx.so.1").symlink_to("libx.so.1.2")
        new = tmp_path / "new"
        new.write_text("new")
        root = ReplacedSysroot(DirectorySysroot(tmp_path), {"libx.so.1": new, "liby.so.1": new})
        assert root.read("/lib/libx.so.1") == b"new"
        assert root.read("/lib/libx.so.1.2") == b"old"
        assert root.resolve("/lib/liby.so.1") is None
        assert root.identity("/lib/libx.so.1") != root.identity("/lib/libx.so.1.2")


class TestMatrix:
    def outcome(self, pipeline: Pipeline, report: Report) -> str:
        pipeline.report = report
        said = run("matrix", "x", "--allocators", "liba.so", "--format", "json").stdout
        return str(stdlib_json.loads(said)["cells"][0]["outcome"])

    def test_a_scan_for_each_allocator_and_system(self, pipeline: Pipeline, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        one.mkdir()
        two.mkdir()
        assert run("matrix", "x", "--allocators", "a,b", "--sysroot", one, "--sysroot", two).exit_code == 1
        asked = [(options.sysroot, options.preload) for _, options in pipeline.calls]
        assert asked == [(root, preload) for root in (one, two) for preload in ((), ("a",), ("b",))]

    def test_what_other_scans_can_be_asked(self, pipeline: Pipeline, tmp_path: Path) -> None:
        file = tmp_path / "table"
        shared = ["--preload", "p", "--also", "l", "--only", "b*", "--library-path", "/q", "--output", file]
        assert run("matrix", "x", "--allocators", "a", *shared).exit_code == 1
        assert [options.preload for _, options in pipeline.calls] == [("p",), ("a", "p")]
        assert {(o.also, o.only, o.library_path) for _, o in pipeline.calls} == {(("l",), ("b*",), ("/q",))}
        assert file.read_text().split()[:3] == ["program", "machine", "libc"]
        assert run("matrix", "x", "--output", tmp_path).exit_code == 2

    def test_outcomes(self, pipeline: Pipeline) -> None:
        whole = samples.incident()
        assert self.outcome(pipeline, whole) == "hangs"
        milder = tuple(replace(finding, severity=Severity.MEDIUM) for finding in whole.findings)
        assert self.outcome(pipeline, replace(whole, findings=milder)) == "may hang"
        assert self.outcome(pipeline, samples.cured()) == "ok"
        unsure = replace(samples.ALLOCATOR, hooks=Hooks.UNKNOWN)
        target = replace(samples.TARGET, allocators=(unsure,))
        assert self.outcome(pipeline, Report((target,))) == "unknown"
        assert self.outcome(pipeline, Report(errors=("x: no ELF file",))) == "not analysed"

    @pytest.mark.usefixtures("pipeline")
    def test_the_table(self) -> None:
        text = run("matrix", "x", "--allocators", "liba.so", "--quiet").output
        assert text.splitlines()[0].split() == ["program", "machine", "libc", "own", "a"]
        assert text.splitlines()[1].split()[-2:] == ["hangs", "hangs"]
        assert "| program |" in run("matrix", "x", "--allocators", "liba.so", "--format", "markdown").output

    def test_what_was_not_analysed_in_full_is_marked(self, pipeline: Pipeline) -> None:
        partly = replace(samples.TARGET, missing=("libgone.so.1",))
        whole = samples.incident()
        pipeline.report = replace(whole, targets=(partly,), errors=("x: libgone.so.1 was not found",))
        text = run("matrix", "x").stdout
        assert "hangs*" in text
        assert "* not everything was analysed" in text
        assert "hangs\\*" in run("matrix", "x", "--format", "markdown").stdout
        (cell, *_) = stdlib_json.loads(run("matrix", "x", "--format", "json").stdout)["cells"]
        assert cell["incomplete"] is True
        pipeline.report = whole
        assert "*" not in run("matrix", "x").stdout

    def test_two_programs_of_one_name_are_two_rows(self, pipeline: Pipeline) -> None:
        one, two = (replace(samples.TARGET, path=path) for path in ("/a/daemon", "/b/daemon"))
        finding = replace(samples.INHERITED, target="/a/daemon")
        pipeline.report = Report((one, two), (finding,))
        rows = run("matrix", "x", "--allocators", "liba.so").stdout.splitlines()[1:3]
        assert [row.split()[0] for row in rows] == ["/a/daemon", "/b/daemon"]
        assert [row.split()[-1] for row in rows] == ["hangs", "ok"]

    def test_two_systems_of_one_libc_are_two_rows(self, pipeline: Pipeline) -> None:
        whole = samples.incident()
        one, two = (replace(samples.TARGET, sysroot=root) for root in ("/srv/one", "/srv/two"))
        pipeline.report = replace(whole, targets=(one, two))
        rows = run("matrix", "x", "--allocators", "liba.so").stdout.splitlines()[1:3]
        assert [row.split(":")[0] for row in rows] == ["/srv/one", "/srv/two"]

    def test_a_name_does_not_act_in_markdown(self, pipeline: Pipeline) -> None:
        pipeline.report = Report((replace(samples.TARGET, path="/a|<b>"),))
        assert "a\\|&lt;b&gt;" in run("matrix", "x", "--format", "markdown").stdout
