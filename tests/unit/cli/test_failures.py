"""What could not be analysed is said, with its reason, by every command, and is exit code 3."""

from __future__ import annotations

import errno
import json as stdlib_json
import os
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import pytest

from forkproof.cli.probe import Request
from forkproof.model import Diagnostic, Report
from forkproof.options import ScanOptions
from forkproof.pipeline import lacking
from forkproof.report import proof
from tests.unit.cli.conftest import Pipeline, run
from tests.unit.report import samples

REASON = "/no/such: does not exist\n  Check the spelling."
NOTHING = Report((), (), (Diagnostic("error", "/no/such", REASON),), (REASON,))
VAIN = Diagnostic("error", "libnope.so", "cannot be preloaded (LD_PRELOAD) and is ignored: no such file")


class TestDiff:
    @pytest.mark.parametrize("form", ["text", "markdown", "json"])
    def test_tells_what_it_could_not_read(self, pipeline: Pipeline, form: str) -> None:
        pipeline.report = NOTHING
        done = run("diff", "/no/such", "/no/such", "--format", form)
        assert done.exit_code == 3
        assert done.output.count("does not exist") == 1

    def test_an_old_one_that_was_not_read_counts_too(self, pipeline: Pipeline, tmp_path: Path) -> None:
        old = tmp_path / "old.json"
        from forkproof.report import json

        old.write_text(json.render(NOTHING))
        pipeline.report = Report((), (), (), ())
        assert run("diff", old, "new").exit_code == 3

    def test_nothing_is_said_where_all_went_well(self, pipeline: Pipeline) -> None:
        pipeline.report = Report((), (), (), ())
        done = run("diff", "a", "b")
        assert (done.exit_code, "NOT ANALYSED" in done.output) == (0, False)


class TestMatrix:
    def test_tells_why(self, pipeline: Pipeline) -> None:
        pipeline.report = NOTHING
        done = run("matrix", "/no/such", "--allocators", "liba.so")
        assert done.exit_code == 3
        assert done.stderr.count("does not exist") == 1

    def test_an_allocator_that_is_not_there_is_not_ok(self, pipeline: Pipeline) -> None:
        clean = replace(samples.cured(), findings=(), errors=(), diagnostics=(VAIN,))
        pipeline.report = clean
        done = run("matrix", "x", "--allocators", "libnope.so", "--format", "json")
        cells = stdlib_json.loads(done.stdout)["cells"]
        assert {cell["outcome"] for cell in cells if cell["allocator"] == "libnope.so"} == {"not analysed"}
        assert done.exit_code == 3


class TestMissingLibraries:
    def message(self, *missing: str, sysroot: Path | None = None) -> str:
        target = replace(samples.TARGET, missing=missing)
        (message,) = lacking("x", target, ScanOptions(sysroot=sysroot))
        return message

    def test_a_package_has_a_system_behind_it(self) -> None:
        target = replace(samples.TARGET, missing=("libc.so.6",), sysroot="cron.deb")
        (said,) = lacking("/usr/sbin/cron", target, ScanOptions())
        assert "--sysroot / for this one" in said
        assert "closure" not in said, "it reads no packages"

    def test_one_message_for_all(self) -> None:
        said = self.message("liba.so.1", "libb.so.2")
        assert said.startswith("x: libraries liba.so.1, libb.so.2 were not found; what they hold was not analysed\n")

    def test_the_dynamic_linker_is_named_once(self) -> None:
        said = self.message("/lib/ld-linux-aarch64.so.1", "libc.so.6", "ld-linux-aarch64.so.1")
        assert said.count("ld-linux-aarch64.so.1") == 1

    def test_one_that_was_asked_for_is_told_by_its_option(self) -> None:
        target = replace(samples.TARGET, missing=("libnope.so.1", "libneeded.so.2"))
        asked, needed = lacking("x", target, ScanOptions(also=("libnope.so.1",)))
        assert asked.startswith("x: --also libnope.so.1: not found")
        assert "spelling" in asked
        assert "libneeded.so.2" in needed
        assert "libnope.so.1" not in needed

    def test_says_what_to_do(self, tmp_path: Path) -> None:
        said = self.message("liba.so.1")
        assert "the directory that holds it: --library-path DIR" in said
        assert "for files of another system, that: --sysroot DIR" in said
        assert "forkproof closure TARGET" in said
        assert "packages" in self.message("liba.so.1", sysroot=tmp_path)


def test_a_preload_in_vain_is_in_the_last_line(pipeline: Pipeline) -> None:
    pipeline.report = replace(samples.cured(), findings=(), errors=(), diagnostics=(VAIN,))
    done = run("scan", "x", "--preload", "libnope.so")
    assert "something was not analysed" in done.output.splitlines()[-1]


class TestProbe:
    def test_a_program_that_may_not_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "open", refuse)
        done = run("probe", "--", "./secret")
        assert done.exit_code == 3
        assert "./secret: cannot be read: Permission denied\n  Run as a user who may read it" in done.output

    @pytest.mark.parametrize("command", [["probe"], ["observe"], ["probe", "--plan", os.devnull]])
    def test_a_program_of_another_machine(self, tmp_path: Path, command: list[str]) -> None:
        other, machine = (183, "aarch64") if platform.machine() == "x86_64" else (62, "x86_64")
        program = tmp_path / "foreign"
        program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + bytes((2, 0, other, 0)) + bytes(44))
        done = run(*command, "--", program)
        assert done.exit_code == 3
        assert f"is a program for {machine}, and this machine is {platform.machine()}\n" in done.output
        assert "forkproof probe --sysroot DIR --write-plan FILE -- CMD" in done.output

    def test_a_sysroot_without_a_plan(self, tmp_path: Path) -> None:
        done = run("probe", "--sysroot", tmp_path, "--", "/bin/true")
        assert done.exit_code == 2
        assert "--sysroot is for --write-plan FILE" in done.output

    def test_what_to_do_begins_a_line(self) -> None:
        report = Report((), (), (), ("x: was not found\nName the system.",))
        assert "not analysed: x: was not found\n  Name the system." in proof.render(
            report, verbose=False, width=100, color=False
        )

    def test_a_rule_that_does_not_exist(self) -> None:
        done = run("probe", "--rule", "inherited-lok", "--", "/bin/true")
        assert done.exit_code == 2
        assert "Did you mean inherited-lock" in done.output

    def test_a_lock_that_does_not_exist(self) -> None:
        """Without this, every lock would be steered."""
        asked = cast("Request", SimpleNamespace(lock="arena_lok"))
        with pytest.raises(click.UsageError, match=r"'arena_lok'\. Locks that there are: arena_lock"):
            Request.check_lock(asked, {"arena_lock", "other"}, Report())
        Request.check_lock(cast("Request", SimpleNamespace(lock="arena_lock")), {"arena_lock"}, Report())
        Request.check_lock(cast("Request", SimpleNamespace(lock=None)), set(), Report())
