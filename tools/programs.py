"""Scan ordinary Debian programs, and print the table of docs/programs.md: `python -m tools.programs`.

The programs come from the sysroots bookworm-amd64 and bookworm-arm64 (`make sysroots`). None of them can hang on an
inherited lock as Debian ships it, so nothing here may be `high`: tests/real/test_ordinary_programs.py sees to that.
Beside each program stands why what is reported is right, from its source.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import forkproof
from forkproof.report import json as report_json
from tools.sysroot import find

SYSROOTS = ("bookworm-amd64", "bookworm-arm64")

PROGRAMS: Mapping[str, str] = {
    "/usr/bin/bash": "Single-threaded; make_child forks for each command, and execs or runs a subshell.",
    "/usr/bin/git": (
        "start_command forks and execs, after threads that preload the index; daemonize() of `git gc --auto` and `git "
        "daemon` is called through the table of builtins."
    ),
    "/usr/bin/perl": "Debian's perl has ithreads, but only an interpreted program starts them; so does it fork.",
    "/usr/bin/python3.11": "os.fork and _posixsubprocess are reached through method tables; threads likewise.",
    "/usr/bin/sudo": (
        "Single-threaded; its plugins, which fork to exec, are opened with dlopen. The child of sudo_debug_fork "
        "returns to callers that exec: exec would be the better word for that window."
    ),
    "/usr/bin/tmux": "Single-threaded; daemon() for the server, forkpty for each pane, then exec.",
    "/usr/bin/memcached": "daemonize() comes before the worker threads; callbacks of libevent hide the order.",
    "/usr/bin/redis-server": (
        "daemonize() comes before the threads of bio.c. redisFork (BGSAVE, AOF rewrite) is called by the command table "
        "and the event loop while those threads exist: unknown is as far as this can go. jemalloc's handlers are "
        "registered, so the child may allocate, as it does."
    ),
    "/usr/bin/qemu-system-x86_64": "os_daemonize after the call_rcu thread: the incident, safe with glibc's malloc.",
    "/usr/bin/qemu-system-aarch64": "The same; see the incident for what a preload does to it.",
    "/usr/lib/postfix/sbin/master": "Single-threaded; master_spawn is called from the event loop, and execs.",
    "/usr/lib/postgresql/15/bin/postgres": (
        "The postmaster refuses to have threads; fork_process is the backend, which lives on without exec."
    ),
    "/usr/lib/systemd/systemd": (
        "safe_fork_full makes raw clone calls where a namespace is asked for: no fork handler runs and glibc quiesces "
        "nothing, while threads of asynchronous_job may exist. Its flags are computed, and CLONE_VM cannot be ruled "
        "out; in fact it is never given: suspected, `medium`, since those threads are seen where they are started. The "
        "same for the clone of the crash handler."
    ),
    "/usr/sbin/apache2": (
        "The modules that fork (mpm_prefork, mpm_event) are opened with dlopen; what is seen are APR's functions, "
        "which only they call."
    ),
    "/usr/sbin/chronyd": (
        "The daemon, and its privileged helpers, are forked before the first name is resolved in a thread; a mail is "
        "sent with popen, which is posix_spawn."
    ),
    "/usr/sbin/cron": "Single-threaded.",
    "/usr/sbin/cupsd": "Forks first; Avahi's thread exists only when filters are started, and that is posix_spawn.",
    "/usr/sbin/dnsmasq": "Single-threaded.",
    "/usr/sbin/haproxy": (
        "Master and worker are forked by main before worker threads exist; initcalls run through a table, and so the "
        "order is unknown."
    ),
    "/usr/sbin/libvirtd": (
        "virFork really forks beside other threads, and its child allocates: it relies on glibc's malloc, as its own "
        "comment says."
    ),
    "/usr/sbin/lighttpd": "Single-threaded; daemonizes, then forks workers and CGI programs.",
    "/usr/sbin/logrotate": "Single-threaded; forks and execs compressors and scripts.",
    "/usr/sbin/mariadbd": "Only the handler of a crash forks (addr2line); Galera's scripts are posix_spawn.",
    "/usr/sbin/named": "named_os_daemonize comes before the managers start threads. jemalloc, with handlers.",
    "/usr/sbin/nginx": (
        "The master daemonizes and forks workers; thread pools start in workers, through the modules' table of "
        "functions. ngx_spawn_process calls what it is given, so what becomes of its child is unknown."
    ),
    "/usr/sbin/openvpn": (
        "daemon() and scripts; pkcs11-helper has a thread that waits for slots, which openvpn does not ask for: `yes` "
        "is too strong, since it depends on an argument."
    ),
    "/usr/sbin/rsyslogd": "Forks before the queues' threads; omprog, which forks beside them, is a module.",
    "/usr/sbin/slapd": "lutil_detach comes before the thread pool; libwrap would fork only for `spawn` in hosts.allow.",
    "/usr/sbin/squid": "Forks helpers and kids and execs; its disk threads start through a table of modules.",
    "/usr/sbin/sshd": "Single-threaded; sessions are forked from dispatch tables.",
    "/usr/sbin/unbound": (
        "daemon() stands in the loop that also starts the workers, guarded by a flag: `yes` is too strong, since the "
        "second round never daemonizes."
    ),
    "/usr/sbin/varnishd": (
        "The manager compiles VCL and runs the worker in children. The worker's threads are started by the child only: "
        "`yes` for the manager's next fork is too strong. jemalloc, with handlers."
    ),
}


def scan(sysroot: Path, program: str, *preload: str, cache: Path | None = None) -> dict[str, Any]:
    """The report of one program, as the command would print it."""
    report = forkproof.scan(program, sysroot=sysroot, preload=preload, cache=cache)
    document: dict[str, Any] = json.loads(report_json.render(report))
    return document


def present(name: str) -> Iterator[tuple[Path, str]]:
    """(sysroot, program) for all that the named sysroot holds."""
    root = find(name)
    for program in sorted(PROGRAMS):
        if root is not None and (root / program[1:]).exists():
            yield root, program


def _windows(target: Mapping[str, Any], reachable: str) -> str:
    kinds = Counter(w["kind"] for w in target["windows"] if w["reachable"] == reachable)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _allocator(target: Mapping[str, Any]) -> str:
    active = next((a for a in target["allocators"] if a["active"]), None)
    return "unknown" if active is None else f"{active['family']}, {active['hooks']}"


def _findings(document: Mapping[str, Any]) -> str:
    found = [f"{f['severity']} {f['rule']} ({(f['fork'] or {}).get('function', '')})" for f in document["findings"]]
    return "; ".join(found) or "none"


def rows(name: str) -> Iterator[str]:
    """Lines of one sysroot's table."""
    for root, program in present(name):
        document = scan(root, program)
        (target,) = document["targets"]
        cells = (
            program.rsplit("/", 1)[-1],
            _allocator(target),
            target["threads"],
            _windows(target, "yes"),
            _windows(target, "unknown"),
            _findings(document),
        )
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    missing = [name for name in SYSROOTS if find(name) is None]
    if missing:
        print(f"programs: no sysroot {', '.join(missing)}: make sysroots", file=sys.stderr)
        return 1
    for name in SYSROOTS:
        print(f"## {name}\n")
        print(
            "| program | malloc | threads | windows reached | perhaps reached | findings |\n|---|---|---|---|---|---|"
        )
        for row in rows(name):
            print(row, flush=True)
        print()
    print("## Why that is right\n")
    for program, why in sorted(PROGRAMS.items(), key=lambda item: item[0].rsplit("/", 1)[-1]):
        print(f"- **{program.rsplit('/', 1)[-1]}**: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
