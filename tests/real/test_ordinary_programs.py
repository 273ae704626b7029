"""Ordinary programs of Debian 12, as they are shipped: no false alarm, and what is said of their forks is true.

The programs and what is known about them are in tools/programs.py, which also prints docs/programs.md.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support import kept
from tools.programs import PROGRAMS, SYSROOTS, scan

pytestmark = [pytest.mark.real, pytest.mark.together("program")]

Sysroot = Callable[[str], Path]
AMD64, ARM64 = SYSROOTS


@cache
def scan_once(root: Path, program: str, *preload: str) -> dict[str, Any]:
    return scan(root, program, *preload, cache=kept.directory())


def _found(sysroot: Sysroot, name: str, program: str) -> dict[str, Any]:
    root = sysroot(name)
    if not (root / program[1:]).exists():
        pytest.skip(f"{name} has no {program}")
    return scan_once(root, program)


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.arm64] if name == ARM64 else []


EVERY = [
    pytest.param(name, program, id=f"{name}-{Path(program).name}", marks=_marks(name))
    for name in SYSROOTS
    for program in sorted(PROGRAMS)
]


@pytest.mark.parametrize(("name", "program"), EVERY)
def test_no_false_alarm(name: str, program: str, sysroot: Sysroot) -> None:
    document = _found(sysroot, name, program)
    (target,) = document["targets"]
    assert target["missing"] == []
    assert [f["message"] for f in document["findings"] if f["severity"] == "high"] == []


@pytest.mark.parametrize(("name", "program"), EVERY)
def test_the_allocator_is_known(name: str, program: str, sysroot: Sysroot) -> None:
    (target,) = _found(sysroot, name, program)["targets"]
    (active,) = [a for a in target["allocators"] if a["active"]]
    with_jemalloc = {"/usr/bin/redis-server", "/usr/sbin/named", "/usr/sbin/varnishd"}
    expected = ("jemalloc", "effective") if program in with_jemalloc else ("ptmalloc", "builtin")
    assert (active["family"], active["hooks"]) == expected


def test_there_are_enough_of_them(sysroot: Sysroot) -> None:
    root = sysroot(AMD64)
    assert sum((root / program[1:]).exists() for program in PROGRAMS) >= 25


@pytest.mark.parametrize(("name", "program"), EVERY)
def test_medium_is_rare_and_explained(name: str, program: str, sysroot: Sysroot) -> None:
    """Only systemd's raw clones: one whose flags are not constant, and that of the handler of fatal signals."""
    document = _found(sysroot, name, program)
    medium = [f for f in document["findings"] if f["severity"] == "medium"]
    if not program.endswith("/systemd"):
        assert medium == []
    assert all("clone" in f["conditions"]["not_quiesced"] for f in medium)
    assert sum(f["verdict"] != "suspected" for f in medium) <= 1


#: (program, forker, function or None where it has no name, kind, reachable, threads): what the sources say.
KNOWN = [
    ("/usr/bin/bash", "fork", "make_child", "exec", "yes", "no"),
    ("/usr/bin/qemu-system-x86_64", "fork", "os_daemonize", "daemonize", "yes", "yes"),
    ("/usr/bin/redis-server", "fork", "daemonize", "daemonize", "yes", "no"),
    # BGSAVE: called through the table of commands, while the threads of bio.c exist.
    ("/usr/bin/redis-server", "fork", "redisFork", "exit", "unknown", "unknown"),
    ("/usr/sbin/cron", "fork", "main", "daemonize", "yes", "no"),
    ("/usr/sbin/libvirtd", "fork", "virCommandRunAsync", "exec", "yes", "yes"),
    ("/usr/sbin/lighttpd", "fork", "fdevent_fork_execve", "exec", "yes", "no"),
    ("/usr/sbin/named", "fork", "named_os_daemonize", "daemonize", "yes", None),
    ("/usr/sbin/nginx", "fork", "ngx_daemon", "daemonize", "yes", None),
    ("/usr/sbin/slapd", "fork", "lutil_detach", "daemonize", "yes", None),
    ("/usr/sbin/sshd", "daemon", "main", "daemonize", "yes", "no"),
    ("/usr/lib/postgresql/15/bin/postgres", "fork", "fork_process", "daemonize", "yes", None),
    ("/usr/lib/systemd/systemd", "clone", "safe_fork_full", "exec", "yes", "yes"),
    # master_spawn, which the event loop calls.
    ("/usr/lib/postfix/sbin/master", "fork", None, "exec", "unknown", "no"),
    # VCL is compiled in a child.
    ("/usr/sbin/varnishd", "fork", "VSUB_run", "exit", "yes", None),
]


@pytest.mark.parametrize(("program", "forker", "function", "kind", "reachable", "threads"), KNOWN)
def test_known_windows(
    program: str,
    forker: str,
    function: str | None,
    kind: str,
    reachable: str,
    threads: str | None,
    sysroot: Sysroot,
) -> None:
    """`threads` None: "no" and "unknown" are both right, "yes" is not."""
    (target,) = _found(sysroot, AMD64, program)["targets"]
    agreeing = [
        w
        for w in target["windows"]
        if (w["forker"], w["kind"], w["reachable"]) == (forker, kind, reachable) and function in {None, w["function"]}
    ]
    assert agreeing
    if threads is None:
        assert all(w["threads"] != "yes" for w in agreeing)
    else:
        assert any(w["threads"] == threads for w in agreeing)


@pytest.mark.arm64
def test_a_library_that_only_asks_for_pthread_create_starts_no_thread(sysroot: Sysroot) -> None:
    """libkrb5support compares &pthread_create with 0 just before it calls pthread_once."""
    (target,) = _found(sysroot, ARM64, "/usr/sbin/sshd")["targets"]
    assert target["threads"] != "yes"


SINGLE_THREADED = ("/usr/bin/bash", "/usr/sbin/cron", "/usr/sbin/dnsmasq", "/usr/sbin/lighttpd", "/usr/sbin/logrotate")


@pytest.mark.parametrize("program", SINGLE_THREADED)
def test_no_threads_is_said_where_there_are_none(program: str, sysroot: Sysroot) -> None:
    assert _found(sysroot, AMD64, program)["targets"][0]["threads"] == "no"


# ---- with an allocator that has no handlers -----------------------------------------------------
# Nothing above can be a false alarm while libc quiesces its malloc. These preload mimalloc, which has no fork handlers.

MIMALLOC = "libmimalloc.so.2"


def _high(document: dict[str, Any]) -> set[str]:
    return {f["fork"]["function"] for f in document["findings"] if f["fork"] and f["severity"] == "high"}


@pytest.mark.parametrize("program", [*SINGLE_THREADED, "/usr/sbin/sshd", "/usr/bin/perl", "/usr/bin/tmux"])
def test_without_threads_no_allocator_hangs(program: str, sysroot: Sysroot) -> None:
    document = scan_once(sysroot(AMD64), program, MIMALLOC)
    assert [f for f in document["findings"] if f["rule"] == "inherited-lock"] == []


@pytest.mark.parametrize(
    ("program", "function"),
    [
        ("/usr/bin/qemu-system-x86_64", "os_daemonize"),
        # The comment in vircommand.c: "malloc is fork-safe", which holds for glibc's.
        ("/usr/sbin/libvirtd", "virFork"),
    ],
)
def test_who_allocates_in_the_child_beside_threads(program: str, function: str, sysroot: Sysroot) -> None:
    """mimalloc's one lock that has a name is taken rarely, which `high` would be too much for."""
    document = scan_once(sysroot(AMD64), program, MIMALLOC)
    found = [f for f in document["findings"] if f["rule"] == "inherited-lock" and f["fork"]["function"] == function]
    assert ("medium", "reachable") in {(f["severity"], f["verdict"]) for f in found}


@pytest.mark.parametrize(
    "program", ["/usr/bin/redis-server", "/usr/bin/memcached", "/usr/sbin/named", "/usr/sbin/nginx", "/usr/sbin/slapd"]
)
def test_who_forks_first_is_not_called_a_hang(program: str, sysroot: Sysroot) -> None:
    """Order that a table hides is unknown, and unknown is never high."""
    assert _high(scan_once(sysroot(AMD64), program, MIMALLOC)) == set()


# ---- what was, or is, known to be wrong ------------------------------------------------------------------


def test_a_thread_that_nobody_starts_is_not_forked_from(sysroot: Sysroot) -> None:
    document = scan_once(sysroot("bookworm-amd64-allocators"), "/usr/bin/bash", "libdmallocth.so.5")
    assert _high(document) == set()


def test_openvpn_has_no_thread_that_begins_in_malloc(sysroot: Sysroot) -> None:
    document = scan_once(sysroot(AMD64), "/usr/sbin/openvpn", MIMALLOC)
    assert _high(document) == set()


@pytest.mark.arm64
def test_python_can_fork_on_aarch64_too(sysroot: Sysroot) -> None:
    (target,) = _found(sysroot, ARM64, "/usr/bin/python3.11")["targets"]
    assert all(w["reachable"] != "no" for w in target["windows"] if w["call_site"]["object"] == "python3.11")


def test_threads_of_a_child_are_not_its_parents(sysroot: Sysroot) -> None:
    (target,) = _found(sysroot, AMD64, "/usr/sbin/varnishd")["targets"]
    paths = [[frame["function"] for frame in path] for path in target["thread_sources"]]
    assert not [path for path in paths if "child_main" in path]
    assert _high(scan_once(sysroot(AMD64), "/usr/sbin/varnishd", MIMALLOC)) == set()


def test_nothing_of_a_program_stays_in_memory(sysroot_amd64: Path) -> None:
    """What is kept for the programs to come are files and what is told of them, not what was made of a program."""
    script = (
        "import gc, sys, forkproof\n"
        "forkproof.scan(sys.argv[2], sysroot=sys.argv[1])\n"
        "gc.collect()\n"
        "kinds = {type(o).__name__ for o in gc.get_objects()}\n"
        "print(kinds & {'Program', 'CallGraph', 'Flow', 'Body', 'Summaries', 'Run'})"
    )
    command = [sys.executable, "-c", script, str(sysroot_amd64), "/usr/bin/git"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
