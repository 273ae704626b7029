"""A pipeline that says what the test wants, so that no test here imports lief."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

import forkproof
from forkproof.cli import main
from forkproof.model import Report
from forkproof.options import Progress, Scanned, ScanOptions
from tests.unit.report import samples


@dataclass
class Pipeline:
    """Stands in for `forkproof.pipeline`: gives `report`, or raises `error`; remembers what it was asked."""

    report: Report = field(default_factory=samples.incident)
    error: BaseException | None = None
    calls: list[tuple[tuple[str, ...], ScanOptions]] = field(default_factory=list)
    was_last: list[bool] = field(default_factory=list)

    def scan(
        self, targets: Sequence[str], options: ScanOptions, progress: Progress, *, is_last: bool = False
    ) -> Report:
        self.was_last.append(is_last)
        self.calls.append((tuple(targets), replace(options, cache=None, jobs=1)))
        progress.stage("loading", 0, 2)
        if self.error is not None:
            raise self.error
        progress.stage("done", 2, 2)
        for done, name in enumerate(targets, 1):
            progress.scanned(Scanned(name, 2, "high", seconds=1.25), done, len(targets))
        return self.report


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    stub = Pipeline()
    module = ModuleType("forkproof.pipeline")
    module.__dict__["scan"] = stub.scan
    monkeypatch.setitem(sys.modules, "forkproof.pipeline", module)
    monkeypatch.setattr(forkproof, "pipeline", module, raising=False)
    return stub


def run(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    """The command in this process; `output` holds stdout and stderr as a terminal would show them."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="forkproof", env=env)
