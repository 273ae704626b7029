"""Locks of Debian's own libraries that a thread and a child take, by an everyday call: found, and by which name."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest

import forkproof
from forkproof.model import Finding, Severity
from tools.sysroot import find

_DRIVER: Final = """
#include <pthread.h>
#include <stddef.h>
#include <unistd.h>
#include <sys/wait.h>
DECLARATIONS
static void prepare(void) { PREPARE; }
__attribute__((noinline)) void use(void) { USE; }
static void *worker(void *p) { for (;;) use(); return p; }
int main(void)
{
    pthread_t thread;
    prepare();
    pthread_create(&thread, NULL, worker, NULL);
    pid_t child = fork();
    if (child == 0) {
        CHILD;
        _exit(0);
    }
    return waitpid(child, NULL, 0);
}
"""
_GLIB: Final = "unsigned g_random_int(void); const char *g_intern_string(const char *);"
_SQLITE: Final = "void *sqlite3_malloc(int); void sqlite3_free(void *); int sqlite3_initialize(void);"
_PLACE: Final = "usr/lib/x86_64-linux-gnu"


def _root() -> Path:
    root = find("bookworm-amd64")
    if root is None:
        pytest.skip("no sysroot bookworm-amd64 (make sysroots)")
    return root


def _findings(folder: Path, library: str, declarations: str, prepare: str, use: str, child: str) -> list[Finding]:
    root = _root()
    found = next((root / _PLACE).glob(library), None)
    if found is None:
        pytest.skip(f"the sysroot has no {library}")
    text = _DRIVER.replace("DECLARATIONS", declarations).replace("PREPARE", prepare)
    (folder / "use.c").write_text(text.replace("USE", use).replace("CHILD", child), encoding="utf-8")
    command = [
        "gcc",
        "-O2",
        "-pthread",
        "use.c",
        "-o",
        "use",
        str(found),
        "-Wl,--unresolved-symbols=ignore-in-shared-libs",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return list(
        forkproof.scan(folder / "use", library_path=(str(root / _PLACE), str(root / "lib/x86_64-linux-gnu"))).findings
    )


@pytest.mark.parametrize(
    ("library", "declarations", "prepare", "use"),
    [
        pytest.param("libglib-2.0.so.0", _GLIB, "g_random_int()", "g_random_int()", id="glib: random numbers"),
        pytest.param(
            "libglib-2.0.so.0", _GLIB, 'g_intern_string("a")', 'g_intern_string("b")', id="glib: names of strings"
        ),
        pytest.param(
            "libsqlite3.so.0", _SQLITE, "sqlite3_initialize()", "sqlite3_free(sqlite3_malloc(9))", id="sqlite: memory"
        ),
    ],
)
def test_a_lock_that_thread_and_child_take(
    tmp_path: Path, library: str, declarations: str, prepare: str, use: str
) -> None:
    found = _findings(tmp_path, library, declarations, prepare, use, "use()")
    locks = [f for f in found if f.rule == "inherited-lock" and f.severity is Severity.HIGH]
    assert [f.object for f in locks] == [library]


@pytest.mark.parametrize(
    ("library", "declarations", "prepare", "use"),
    [
        pytest.param("libglib-2.0.so.0", _GLIB, "g_random_int()", "g_random_int()", id="glib"),
        pytest.param(
            "libsqlite3.so.0", _SQLITE, "sqlite3_initialize()", "sqlite3_free(sqlite3_malloc(9))", id="sqlite"
        ),
    ],
)
def test_a_child_that_leaves_the_library_alone(
    tmp_path: Path, library: str, declarations: str, prepare: str, use: str
) -> None:
    found = _findings(tmp_path, library, declarations, prepare, use, "")
    assert [f.message for f in found if f.rule == "inherited-lock"] == []


_TEAM: Final = """
#include <pthread.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile int cells[100];
__attribute__((noinline)) void use(void) {
#pragma omp parallel for num_threads(2)
    for (int i = 0; i < 100; i++)
        cells[i]++;
}
__attribute__((noinline)) static void *worker(void *p) { use(); pause(); return p; }
int main(int count, char **words)
{
    (void)worker, (void)count, (void)words;
    BEFORE;
    pid_t child = fork();
    if (child == 0) {
        CHILD;
        _exit(0);
    }
    waitpid(child, NULL, 0);
    AFTER;
    return 0;
}
"""


@pytest.mark.parametrize(
    ("before", "child", "after", "expected"),
    [
        pytest.param("use()", "use()", "", [Severity.HIGH], id="both"),
        pytest.param("", "use()", "use()", [], id="after the fork"),
        pytest.param("use()", "", "", [], id="not in the child"),
        pytest.param(
            "pthread_t t; pthread_create(&t, 0, worker, 0); sleep(1)", "use()", "", [], id="another thread's team"
        ),
    ],
)
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_a_team_of_threads(
    tmp_path: Path, before: str, child: str, after: str, expected: list[Severity], level: str
) -> None:
    """GCC PR 60035: libgomp counts on threads that a child does not have."""
    text = _TEAM.replace("BEFORE", before).replace("CHILD", child).replace("AFTER", after)
    (tmp_path / "team.c").write_text(text, encoding="utf-8")
    command = ["gcc", level, "-fopenmp", "-pthread", "team.c", "-o", "team"]
    if subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode:
        pytest.skip("gcc has no libgomp")
    found = forkproof.scan(tmp_path / "team").findings
    assert [f.severity for f in found if f.rule == "threads-lost" and "GOMP" in f.why] == expected
