"""Rust programs: main is called by a runtime that gets it in a closure, threads begin in boxed closures.

Programs that Debian ships, and ones that rustc links here and that are run: what hangs is found, the others are silent.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from fixtures.build import Result

Sysroot = Callable[[str], Path]
_SHIPPED: Final = ("rg", "sccache")
"""Of Debian's, those whose way from main to a fork does not go through a table (as fdfind's does)."""

_FORKS: Final = """
use std::sync::Mutex; use std::thread;
extern "C" { fn fork()->i32; fn _exit(c:i32)->!; fn waitpid(p:i32,s:*mut i32,o:i32)->i32; fn alarm(n:u32)->u32; }
static LOCK: Mutex<u64> = Mutex::new(0);
#[inline(never)]
fn bump() { let mut g = LOCK.lock().unwrap(); for _ in 0..200 { *g = std::hint::black_box(*g + 1); } }
#[inline(never)]
fn churn() { for i in 0..100usize { let v: Vec<u8> = Vec::with_capacity(100 + i * 50); std::hint::black_box(v); } }
fn child(what: fn()) { unsafe {
    let pid = fork();
    if pid == 0 { alarm(1); what(); _exit(0); }
    let mut status = 0;
    waitpid(pid, &mut status, 0);
    if status & 0x7f != 0 { _exit(42) }
} }
"""
#: name: (code of main, what it ends with, the lock of a finding at high or None, threads at a fork)
PROGRAMS: Final = {
    "locks": ("thread::spawn(|| loop { bump() }); for _ in 0..500 { child(bump) }", 42, "LOCK", "yes"),
    "forks_first": ("child(bump); thread::spawn(|| bump()).join().unwrap();", 0, None, "no"),
    "joins_first": ("thread::spawn(|| bump()).join().unwrap(); child(bump);", 0, None, "no"),
    "allocates": ("thread::spawn(|| loop { churn() }); for _ in 0..50 { child(churn) }", 0, None, "yes"),
    "only_spawns": (
        'thread::spawn(|| loop { bump() });for _ in 0..3 { std::process::Command::new("true").status().unwrap(); }',
        0,
        None,
        "yes",
    ),
}


def _scan(program: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "forkproof", "scan", "--no-cache", "--format", "json", program, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _serious(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [f for f in document["findings"] if f["severity"] in ("high", "medium")]


def _compile(directory: Path, name: str) -> Path:
    if shutil.which("rustc") is None:
        pytest.skip("no rustc")
    source = directory / f"{name}.rs"
    source.write_text(_FORKS + "fn main() { " + PROGRAMS[name][0] + " }")
    command = ["rustc", "-C", "opt-level=2", "-A", "warnings", "-o", str(directory / name), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"rustc does not work here: {done.stderr.strip()[-200:]}")
    return directory / name


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_rustc_says_of_itself_what_the_scan_says(name: str, tmp_path: Path) -> None:
    _, code, lock, threads = PROGRAMS[name]
    program = _compile(tmp_path, name)
    assert subprocess.run([program], timeout=60, check=False).returncode == code
    document = _scan(str(program))
    serious = _serious(document)
    assert [(f["rule"], f["severity"]) for f in serious] == ([("inherited-lock", "high")] if lock else [])
    assert all(lock in f["lock"]["name"] for f in serious if lock)
    assert {w["reachable"] for w in document["targets"][0]["windows"]} == {"yes"}
    assert {w["threads"] for w in document["targets"][0]["windows"]} == {threads}


def test_an_allocator_without_handlers_is_found(tmp_path: Path, built_x86_64: Result) -> None:
    program = _compile(tmp_path, "allocates")
    allocator = next(path for path in built_x86_64.tree.root().rglob("*alloc_mutex.so"))
    serious = _serious(_scan(str(program), "--preload", str(allocator)))
    assert {f["rule"] for f in serious} == {"inherited-lock", "atfork-absent"}


@pytest.mark.parametrize("machine", ["amd64", "arm64"])
@pytest.mark.parametrize("program", _SHIPPED)
def test_main_of_a_program_that_debian_ships_is_known_to_run(machine: str, program: str, sysroot: Sysroot) -> None:
    root = sysroot(f"bookworm-{machine}-rust")
    document = _scan(f"/usr/bin/{program}", "--sysroot", str(root))
    (target,) = document["targets"]
    assert target["threads"] == "yes"
    assert target["thread_sources"], "the way from main to the start"
    assert {w["reachable"] for w in target["windows"]} == {"yes"}
    assert _serious(document) == []
