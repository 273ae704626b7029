"""The files that pipelines copy, run as a pipeline would run them: on a program that hangs, and on its clean twin.

Only what fetches things is replaced: a `python3` stands first on PATH that makes an environment with the installed
forkproof in it, and a `pip` that has nothing to do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.build import Result
from tests.support.machines import NATIVE

ROOT = Path(__file__).parents[2]
FORKPROOF = Path(sys.executable).with_name("forkproof")
OUTCOMES = pytest.mark.parametrize(("name", "code"), [("daemon_unhooked", 1), ("daemon_hooked", 0)])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FORKPROOF.exists(), reason="forkproof is not installed beside this Python"),
]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory for PATH: `python3 -m venv DIR` and `pip`, without a network."""
    place = tmp_path / "tools"
    place.mkdir()
    (place / "pip").write_text("#!/bin/sh\n")
    (place / "python3").write_text(
        "#!/bin/sh\n"
        f'[ "$1 $2" = "-m venv" ] || exec {sys.executable} "$@"\n'
        f'mkdir -p "$3/bin"; cp {place}/pip "$3/bin/pip"; ln -s {FORKPROOF} "$3/bin/forkproof"\n'
    )
    for tool in place.iterdir():
        tool.chmod(0o755)
    (place / "forkproof").symlink_to(FORKPROOF)
    return place


@pytest.fixture
def program(built_fixtures: Callable[[str], Result]) -> Callable[[str], Path]:
    built = built_fixtures(NATIVE)
    return lambda name: built.tree.path(built.fixtures[name])


def run(script: str, tools: Path, folder: Path, variables: Mapping[str, object], shell: str = "bash") -> int:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache")}
    options = ["-eo", "pipefail"] if shell == "bash" else []
    return subprocess.run([shell, *options, "-c", script], cwd=folder, env=environment, check=False).returncode


@OUTCOMES
def test_action(name: str, code: int, tools: Path, tmp_path: Path, program: Callable[[str], Path]) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    inputs = {key: each.get("default", "") for key, each in action["inputs"].items()} | {"targets": program(name)}
    runner = {"RUNNER_TEMP": tmp_path / "runner", "GITHUB_OUTPUT": tmp_path / "output"}
    runner["GITHUB_STEP_SUMMARY"] = tmp_path / "summary"
    codes = []
    for step in action["runs"]["steps"]:
        if "run" in step:
            given = {key: _filled(value, inputs) for key, value in step["env"].items() if "inputs." in value}
            codes.append(run(step["run"], tools, tmp_path, {**runner, **given}))
    assert codes == [0, code]
    outputs = dict(line.split("=", 1) for line in runner["GITHUB_OUTPUT"].read_text().splitlines())
    results = json.loads(Path(outputs["sarif"]).read_text())["runs"][0]["results"]
    assert any(result["level"] == "error" for result in results) is bool(code)
    assert ("atfork-absent" in runner["GITHUB_STEP_SUMMARY"].read_text()) is bool(code)


def _filled(value: str, inputs: Mapping[str, Any]) -> object:
    """A value of the form `${{ inputs.NAME }}`."""
    return inputs[value.removeprefix("${{ inputs.").removesuffix(" }}")]


@OUTCOMES
def test_gitlab(name: str, code: int, tools: Path, tmp_path: Path, program: Callable[[str], Path]) -> None:
    job = yaml.safe_load((ROOT / "packaging/gitlab-ci.yml").read_text(encoding="utf-8"))["forkproof"]
    variables = {**job["variables"], "FORKPROOF_TARGETS": program(name)}
    assert run("\n".join(job["script"]), tools, tmp_path, variables) == code
    for path in job["artifacts"]["paths"]:
        assert (tmp_path / path).stat().st_size
    suite = ET.parse(tmp_path / job["artifacts"]["reports"]["junit"]).getroot()
    assert bool(suite.findall(".//failure")) is bool(code)


@OUTCOMES
def test_gitlab_with_a_baseline(
    name: str, code: int, tools: Path, tmp_path: Path, program: Callable[[str], Path]
) -> None:
    """What is known already does not fail."""
    job = yaml.safe_load((ROOT / "packaging/gitlab-ci.yml").read_text(encoding="utf-8"))["forkproof"]
    variables = {**job["variables"], "FORKPROOF_TARGETS": program(name)}
    assert run("\n".join(job["script"]), tools, tmp_path, variables) == code
    (tmp_path / "forkproof.json").rename(tmp_path / "baseline.json")
    assert run("\n".join(job["script"]), tools, tmp_path, variables) == 0


class TestAutopkgtest:
    """On what a stub of dpkg says that two packages hold; a third is not installed."""

    def outcome(self, tools: Path, folder: Path, held: Mapping[str, list[Path]]) -> int:
        """The exit code; what was printed is in the file `log`."""
        (folder / "debian/tests").mkdir(parents=True, exist_ok=True)
        packages = "".join(f"\nPackage: {name}\nArchitecture: any\n" for name in (*held, "not-there"))
        (folder / "debian/control").write_text(f"Source: daemon\n{packages}")
        for name, files in held.items():
            (folder / name).write_text("".join(f"{file}\n" for file in files))
        (tools / "dpkg").write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat "{folder}/$2"\n')
        (tools / "dpkg").chmod(0o755)
        places = {"AUTOPKGTEST_TMP": folder / "tmp", "AUTOPKGTEST_ARTIFACTS": folder / "artifacts"}
        for place in places.values():
            place.mkdir(exist_ok=True)
        script = (ROOT / "packaging/debian/tests-forkproof").read_text(encoding="utf-8")
        (folder / "script").write_text(script)
        return run(f"sh {folder}/script > {folder}/log 2>&1", tools, folder, places, "sh")

    def script(self, folder: Path, name: str) -> Path:
        path = folder / name
        path.write_text("#!/usr/bin/perl\nexit 0;\n")
        path.chmod(0o755)
        return path

    @OUTCOMES
    def test_programs_among_other_files(
        self, name: str, code: int, tools: Path, tmp_path: Path, program: Callable[[str], Path]
    ) -> None:
        held = program(name)
        script, link, text = self.script(tmp_path, "a wrapper"), tmp_path / "link", tmp_path / "README"
        link.symlink_to(held)
        text.write_text("text")
        libraries = sorted(held.parent.glob("*.so"))[:1]
        packages = {"daemon": [tmp_path, script, link, text, held], "daemon-data": [*libraries, tmp_path / "gone"]}
        assert self.outcome(tools, tmp_path, packages) == code
        report = json.loads((tmp_path / "artifacts/forkproof.json").read_text())
        assert [target["path"] for target in report["targets"]] == [str(held)]
        log = (tmp_path / "log").read_text()
        assert f"{script} is a script: not scanned" in log
        assert "not-there is not installed: not scanned" in log
        assert ("HIGH  " in log) is bool(code)

    def test_scripts_only_are_skipped(self, tools: Path, tmp_path: Path) -> None:
        script = self.script(tmp_path, "a wrapper")
        assert self.outcome(tools, tmp_path, {"daemon": [script]}) == 77
        assert f"{script} is a script: not scanned" in (tmp_path / "log").read_text()

    def test_with_a_policy(self, tools: Path, tmp_path: Path, program: Callable[[str], Path]) -> None:
        (tmp_path / "debian/tests").mkdir(parents=True)
        (tmp_path / "debian/tests/forkproof.toml").write_text('fail-on = "never"\n')
        assert self.outcome(tools, tmp_path, {"daemon": [program("daemon_unhooked")]}) == 0


@OUTCOMES
def test_rpm(name: str, code: int, tools: Path, tmp_path: Path, program: Callable[[str], Path]) -> None:
    buildroot = tmp_path / "buildroot"
    shutil.copytree(program(name).parent, buildroot / "usr/bin", ignore=lambda _, names: _others(names, name))
    spec = (ROOT / "packaging/rpm/example.spec").read_text(encoding="utf-8")
    script = spec[spec.index("%check\n") + len("%check\n") :].replace("%{buildroot}", str(buildroot))
    assert run(script, tools, tmp_path, {}) == code


def _others(names: list[str], wanted: str) -> set[str]:
    """All programs but one; libraries stay, which it may need."""
    return {name for name in names if name != wanted and ".so" not in name}
