"""What packagers and pipelines copy: it parses, and says what the command says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from forkproof.cli import Commands, main
from tools import manual

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["action.yml", ".pre-commit-hooks.yaml", "packaging/gitlab-ci.yml", "mkdocs.yml"])
def test_yaml(name: str) -> None:
    assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_no_input_of_the_action_is_written_into_a_script() -> None:
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    scripts = [step["run"] for step in steps if "run" in step]
    assert len(scripts) == 2
    assert not any("${{" in script for script in scripts)


def test_scripts_are_shell() -> None:
    for script in (ROOT / "packaging/debian/tests-forkproof", ROOT / "docs/gate.sh"):
        subprocess.run(["sh", "-n", script], check=True)
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    subprocess.run(["bash", "-n"], input=steps[-1]["run"], text=True, check=True)


def test_options_in_examples_exist() -> None:
    known = {option for command in Commands.entries for option in _options(command)}
    for path in [*ROOT.glob("packaging/**/*"), ROOT / "action.yml", *ROOT.glob("docs/tutorials/*.md")]:
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                if re.search(r"forkproof\"? (scan|report|diff|matrix)\b", line):
                    after = line[line.index("forkproof") :]
                    used = set(re.findall(r"(?<!\S)(--[a-z-]+)", after))
                    assert used <= known, f"{path}: {line}"


def _options(command: str) -> list[str]:
    import click

    found = main.get_command(click.Context(main), command)
    assert found is not None
    return [option for parameter in found.params for option in parameter.opts]


class TestManual:
    def test_every_command_and_option(self) -> None:
        page = manual.page()
        for command in Commands.entries:
            assert f'.SS "forkproof {command}' in page
            for option in _options(command):
                if option.startswith("--"):
                    assert manual.escaped(option) in page

    def test_examples_and_exit_codes_keep_their_lines(self) -> None:
        lines = manual.page().splitlines()
        for title in ("Examples:", "Exit codes:", "Verdicts:"):
            places = [number for number, line in enumerate(lines) if line == title]
            assert places, title
            assert all(lines[number - 1] == ".nf" for number in places)
        assert "\b" not in manual.page()

    @pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 129, 130, 143])
    def test_every_exit_code(self, code: int) -> None:
        status = manual.page().partition(".SH EXIT STATUS\n")[2].partition(".SH")[0]
        assert f".TP\n.B {code}\n" in status

    def test_no_line_is_a_request_by_accident(self) -> None:
        requests = {".TH", ".SH", ".SS", ".PP", ".TP", ".B", ".nf", ".fi"}
        lines = [line for line in manual.page().splitlines() if line.startswith((".", "'"))]
        assert {line.split()[0] for line in lines} <= requests

    def test_files(self, tmp_path: Path) -> None:
        manual.write(tmp_path)
        names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert names == {"forkproof.1", "forkproof.bash", "_forkproof", "forkproof.fish"}
        assert "_FORKPROOF_COMPLETE" in (tmp_path / "completion/forkproof.bash").read_text()
