"""Shims for fixtures of both machines and for Debian's QEMU: built, and shown to cure by scan and by probe."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import Result
from tests.support.command import forkproof
from tests.support.machines import arm64_root

NATIVE = platform.machine()
QEMU = "/usr/bin/qemu-system-aarch64"

pytestmark = pytest.mark.slow


def place(result: Result, name: str) -> str:
    return str(result.tree.path(result.fixtures[name]))


@pytest.fixture(params=["x86_64", "aarch64"])
def located(
    request: pytest.FixtureRequest, built_fixtures: Callable[[str], Result], tmp_path: Path
) -> Callable[[str], list[str]]:
    """The arguments that name a fixture: on the host, or in a sysroot with the other machine's C library."""
    result = built_fixtures(request.param)
    if request.param == NATIVE:
        return lambda name: [place(result, name)]
    root = arm64_root(result, tmp_path / "root")
    return lambda name: [f"/{name}", "--sysroot", str(root)]


def mitigated(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    done = forkproof("mitigate", "--format", "json", *arguments)
    return done.code, done.json()


def about(report: dict[str, Any], library: str) -> list[str]:
    return [f["id"] for f in report["findings"] if f["object"] == library]


def test_absent_with_lock_functions_is_cured(located: Callable[[str], list[str]], tmp_path: Path) -> None:
    shim = tmp_path / "libshim.so"
    code, found = mitigated(*located("daemon_lockable"), "-o", shim)
    assert code == 0
    assert found["cured"]
    assert [d["remedy"]["registers"] for d in found["decisions"]] == [
        ["arena_lock_all", "arena_unlock_all", "arena_unlock_all"]
    ]
    assert "high" in {f["severity"] for f in found["before"]["findings"]}
    assert about(found["after"], "liballoc_lockable.so") == []
    assert shim.with_suffix(".c").read_text() == found["shim"]["source"]


@pytest.mark.parametrize("name", ["daemon_decoy_lockable", "daemon_mutex", "daemon_unhooked"])
def test_absent_without_them_is_refused(located: Callable[[str], list[str]], name: str, tmp_path: Path) -> None:
    code, found = mitigated(*located(name), "-o", tmp_path / "libshim.so")
    assert code == 1
    assert not found["cured"]
    assert all(d["remedy"] is None and d["why"] and d["instead"] for d in found["decisions"])
    assert list(tmp_path.glob("lib*")) == []


@pytest.mark.parametrize("name", ["daemon_hooked", "daemon_libc", "daemon_lockable_shimmed"])
def test_nothing_to_mitigate(located: Callable[[str], list[str]], name: str) -> None:
    code, found = mitigated(*located(name))
    assert code == 0
    assert found["decisions"] == []
    assert found["shim"] is None


def test_a_preload_that_is_not_there_is_said(located: Callable[[str], list[str]]) -> None:
    done = forkproof("mitigate", *located("daemon_libc"), "--preload", "libnothere.so")
    assert done.code == 3
    assert "libnothere.so: cannot be preloaded" in done.stdout


def test_static_program_is_refused(located: Callable[[str], list[str]]) -> None:
    code, found = mitigated(*located("static_unhooked"))
    assert code == 1
    assert all("static" in d["why"] for d in found["decisions"])


def test_unbound_on_arm64_is_cured(built_aarch64: Result, tmp_path: Path) -> None:
    root = arm64_root(built_aarch64, tmp_path / "root")
    code, found = mitigated("/daemon_weak", "--sysroot", root, "-o", tmp_path / "libshim.so")
    assert code == 0
    assert [d["rule"] for d in found["decisions"]] == ["atfork-unbound"]
    assert about(found["after"], "liballoc_weak.so") == []


def test_other_machines_compiler_is_refused(built_aarch64: Result, tmp_path: Path) -> None:
    root = arm64_root(built_aarch64, tmp_path / "root")
    done = forkproof("mitigate", "/daemon_weak", "--sysroot", root, "--cc", "gcc")
    assert done.code == (3 if NATIVE == "x86_64" else 0)


def test_foreign_source_is_not_overwritten(built_fixtures: Callable[[str], Result], tmp_path: Path) -> None:
    (tmp_path / "libmine.c").write_text("int mine;\n")
    done = forkproof("mitigate", place(built_fixtures(NATIVE), "daemon_lockable"), "-o", tmp_path / "libmine.so")
    assert done.code == 2
    assert (tmp_path / "libmine.c").read_text() == "int mine;\n"


def test_probe_shows_both_sides(built_fixtures: Callable[[str], Result]) -> None:
    program = place(built_fixtures(NATIVE), "daemon_lockable")
    code, found = mitigated(program, "--", program)
    assert [f["probe"]["verdict"] for f in found["probe"]["before"]] == ["confirmed"]
    assert [f["probe"]["verdict"] for f in found["probe"]["after"]] == ["refuted"]
    assert code == 0


def test_probe_that_shows_nothing(built_fixtures: Callable[[str], Result]) -> None:
    """The command never forks: the scan's word stands alone, and the exit code says so."""
    result = built_fixtures(NATIVE)
    code, found = mitigated(place(result, "daemon_lockable"), "--", "/bin/true")
    assert code == 3
    assert not found["cured"]


@pytest.mark.real
def test_incident(sysroot_arm64: Path, tmp_path: Path) -> None:
    options = ["--sysroot", str(sysroot_arm64), "--preload", "libtcmalloc.so.4"]
    code, found = mitigated(QEMU, *options, "-o", tmp_path / "libshim.so")
    assert code == 0
    assert [d["remedy"]["defines"] for d in found["decisions"]] == ["pthread_atfork"]
    assert sum(f["severity"] == "high" for f in found["before"]["findings"]) == 3
    assert {f["severity"] for f in found["after"]["findings"]} <= {"low", "note"}
