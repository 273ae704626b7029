"""The policy on the command line: forkproof.toml, --baseline, `forkproof diff`."""

from __future__ import annotations

import json as stdlib_json
from dataclasses import replace
from pathlib import Path

import pytest

from forkproof.model import Report
from forkproof.options import ScanOptions
from forkproof.report import json
from tests.unit.cli.conftest import Pipeline, run
from tests.unit.report import samples

SUPPRESS = '[[suppress]]\nobject = "libtcmalloc.so.4"\nreason = "known"\nexpires = 2999-01-01\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(path: Path, report: Report) -> Path:
    path.write_text(json.render(report))
    return path


class TestConfig:
    def test_of_the_working_directory(self, pipeline: Pipeline, tmp_path: Path) -> None:
        assert run("scan", "x").exit_code == 1
        (tmp_path / "forkproof.toml").write_text(SUPPRESS)
        result = run("scan", "x")
        assert result.exit_code == 0
        assert "suppressed until 2999-01-01: known" in result.output
        assert run("scan", "x", "--no-config").exit_code == 1
        assert pipeline.calls

    @pytest.mark.usefixtures("pipeline")
    def test_named(self, tmp_path: Path) -> None:
        (tmp_path / "other.toml").write_text(SUPPRESS)
        assert run("scan", "x", "--config", "other.toml").exit_code == 0

    def test_defaults_and_options(self, pipeline: Pipeline, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        text = 'fail-on = "never"\n[scan]\nsysroot = "root"\npreload = ["liba.so"]\nalso = ["libb.so"]\n'
        (tmp_path / "forkproof.toml").write_text(text)
        assert run("scan", "x").exit_code == 0
        assert run("scan", "x", "--preload", "libc.so", "--fail-on", "high").exit_code == 1
        first, second = (options for _, options in pipeline.calls)
        assert first == ScanOptions(Path("root"), (), ("liba.so",), ("libb.so",))
        assert second.preload == ("libc.so",)

    def test_a_mistake_comes_before_the_scan(self, pipeline: Pipeline, tmp_path: Path) -> None:
        (tmp_path / "forkproof.toml").write_text("fail_on = 1")
        result = run("scan", "x")
        assert (result.exit_code, pipeline.calls) == (2, [])
        assert "Did you mean fail-on" in result.output


class TestBaseline:
    @pytest.mark.usefixtures("pipeline")
    def test_only_what_is_new_fails(self, tmp_path: Path) -> None:
        whole = save(tmp_path / "all.json", samples.incident())
        part = save(tmp_path / "part.json", replace(samples.incident(), findings=(samples.UNBOUND,)))
        assert run("scan", "x", "--baseline", whole).exit_code == 0
        result = run("scan", "x", "--baseline", part, "--format", "json")
        assert result.exit_code == 1
        states = {finding["rule"]: finding["baseline"] for finding in stdlib_json.loads(result.output)["findings"]}
        assert states == {"inherited-lock": "new", "atfork-unbound": "unchanged"}

    def test_what_is_no_report(self, pipeline: Pipeline, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text("{}")
        assert run("scan", "x", "--baseline", "x.json").exit_code == 3
        assert pipeline.calls == []

    def test_of_a_saved_report(self, tmp_path: Path) -> None:
        whole = save(tmp_path / "all.json", samples.incident())
        assert run("report", whole).exit_code == 1
        assert run("report", whole, "--baseline", whole).exit_code == 0


class TestDiff:
    def test_reports(self, tmp_path: Path) -> None:
        old = save(tmp_path / "old.json", replace(samples.incident(), findings=(samples.UNBOUND,)))
        new = save(tmp_path / "new.json", samples.incident())
        worse, better, same = run("diff", old, new), run("diff", new, old), run("diff", new, new)
        assert (worse.exit_code, better.exit_code, same.exit_code) == (1, 0, 0)
        assert "1 introduced, 0 fixed, 1 unchanged" in worse.output
        assert samples.INHERITED.id in worse.output
        assert "0 introduced, 1 fixed, 1 unchanged" in better.output

    @pytest.mark.parametrize("form", ["text", "markdown", "json"])
    def test_an_incomplete_side_is_not_an_empty_one(self, tmp_path: Path, form: str) -> None:
        whole = samples.incident()
        lacking = replace(whole, targets=(replace(whole.targets[0], missing=("libz.so.1",)),), findings=())
        full, part = save(tmp_path / "whole.json", whole), save(tmp_path / "part.json", lacking)
        for old, new, side in ((part, full, "old"), (full, part, "new")):
            result = run("diff", old, new, "--format", form)
            assert result.exit_code == 3
            assert all(finding.id in result.output for finding in whole.findings)
            if form == "json":
                found = stdlib_json.loads(result.output)
                assert (found["introduced"], found["fixed"]) == ([], [])
                assert [gap["side"] for gap in found["gaps"]] == [side]
            else:
                assert "0 introduced, 0 fixed" in result.output
                assert "1 program could not be compared in full" in result.output
                assert "not found: libz.so.1" in result.output.replace("\\", "")

    def test_a_side_that_does_not_exist(self, tmp_path: Path) -> None:
        for names in ((tmp_path / "no", "/bin/true"), ("/bin/true", tmp_path / "no")):
            result = run("diff", *names, "--no-cache")
            assert result.exit_code == 3
            assert "0 introduced, 0 fixed, " in result.output

    @pytest.mark.parametrize("form", ["text", "markdown", "json"])
    def test_every_format_has_every_finding(self, tmp_path: Path, form: str) -> None:
        old = save(tmp_path / "old.json", replace(samples.incident(), findings=(samples.UNBOUND,)))
        new = save(tmp_path / "new.json", samples.incident())
        result = run("diff", old, new, "--format", form, "--fail-on", "never")
        assert result.exit_code == 0
        assert all(finding.id in result.output for finding in samples.incident().findings)

    def test_targets_are_scanned_beside_others(self, pipeline: Pipeline) -> None:
        run("diff", "old.deb", "new.deb", "--with", "dep.deb", "--preload", "liba.so")
        assert [names for names, _ in pipeline.calls] == [("old.deb", "dep.deb"), ("new.deb", "dep.deb")]
        assert all(options.preload == ("liba.so",) for _, options in pipeline.calls)

    def test_a_policy_applies_to_both(self, tmp_path: Path) -> None:
        (tmp_path / "forkproof.toml").write_text(SUPPRESS)
        new = save(tmp_path / "new.json", samples.incident())
        assert run("diff", save(tmp_path / "old.json", Report()), new).exit_code == 0
