"""Programs of Debian that hide their forks: Go's, which are stripped, and a static one without names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import forkproof
from forkproof.model import Answer, Target

pytestmark = pytest.mark.real


@pytest.fixture(params=["amd64", "arm64"])
def root(request: pytest.FixtureRequest, sysroot: Callable[[str], Path]) -> Path:
    return sysroot(f"bookworm-{request.param}-go")


def scanned(root: Path, path: str) -> tuple[Target, list[str]]:
    report = forkproof.scan(path, sysroot=str(root))
    assert not report.errors
    (target,) = report.targets
    return target, [finding.rule for finding in report.findings if finding.severity.value != "note"]


def test_a_go_program_only_starts_others(root: Path) -> None:
    target, rules = scanned(root, "/usr/bin/fzf")
    (window,) = target.windows
    assert (window.function, window.forker, window.kind.value) == (
        "syscall.forkExec",
        "syscall.forkAndExecInChild",
        "spawn",
    )
    assert (window.reachable, window.threads, target.threads) == (Answer.YES, Answer.YES, Answer.YES)
    assert rules == []


def test_the_c_inside_a_go_program_forks_too(root: Path) -> None:
    target, rules = scanned(root, "/usr/sbin/runc")
    kinds = {(window.forker, window.kind.value) for window in target.windows}
    assert kinds == {("clone", "exit"), ("fork", "exec"), ("syscall.forkAndExecInChild", "spawn")}
    assert rules == []


def test_a_thread_of_the_runtime_is_no_fork(root: Path) -> None:
    target, _ = scanned(root, "/usr/bin/fzf")
    assert "runtime.clone" not in {window.function for window in target.windows}
    assert any(frame.function == "runtime.newosproc" for path in target.thread_sources for frame in path)


def test_of_a_static_program_without_names_little_is_known(root: Path) -> None:
    target, rules = scanned(root, "/usr/bin/busybox")
    assert target.windows
    assert {window.reachable for window in target.windows} == {Answer.UNKNOWN}
    assert not any(window.handlers_run for window in target.windows if window.forker == "vfork")
    assert target.threads is Answer.UNKNOWN
    assert rules == []
