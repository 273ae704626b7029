"""Ways back to a lock that is held: small allocators, compiled for both machines, and what lock-reentry says."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from forkproof import facts, signatures
from forkproof.allocators import find_libc
from forkproof.hazards import reentry
from forkproof.model import Finding
from forkproof.options import ScanOptions
from forkproof.pipeline import call_graph

COMPILERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}
LOADERS = {"x86_64": Path("/lib64/ld-linux-x86-64.so.2"), "aarch64": Path("/lib/ld-linux-aarch64.so.1")}
PRELUDE = """
#include <stddef.h>
#include <stdbool.h>
#define NOINLINE __attribute__((noinline, noclone, noipa))
static int lock_word, calls;
static char memory[1 << 20];
static size_t used;
static inline void lock(void) { int no = 0; while (!__atomic_compare_exchange_n(&lock_word, &no, 1, 0, 2, 0)) no = 0; }
static inline void unlock(void) { __atomic_store_n(&lock_word, 0, __ATOMIC_RELEASE); }
static NOINLINE void *plain(size_t n) { lock(); void *p = memory + used; used += n; unlock(); return p; }
void *malloc(size_t n);
void free(void *p);
static NOINLINE int visits(void) { return malloc(16) != 0; }
static NOINLINE int quiet(void) { return calls++; }
"""
EPILOGUE = """
void free(void *p) { lock(); *(void **)p = 0; unlock(); }
void *calloc(size_t a, size_t b) { return plain(a * b); }
void *realloc(void *p, size_t n) { (void)p; return plain(n); }
"""


@dataclass(frozen=True)
class Case:
    """An allocator's malloc, and the severity of what must be found."""

    name: str
    code: str
    severity: str | None


CASES = (
    Case("calls", "void *malloc(size_t n) { if (n > 64) { lock(); visits(); unlock(); } return plain(n); }", "medium"),
    Case("after", "void *malloc(size_t n) { if (n > 64) { lock(); unlock(); visits(); } return plain(n); }", None),
    Case(
        "initial_value",
        """static int (*volatile hook)(void) = visits;
        void *malloc(size_t n) { if (n > 64) { lock(); hook(); unlock(); } return plain(n); }""",
        "medium",
    ),
    Case(
        "stored_later",
        """static int (*volatile hook)(void) = quiet;
        void on(void) { hook = visits; }
        void off(void) { hook = quiet; }
        void *malloc(size_t n) { if (n > 64) { lock(); hook(); unlock(); } return plain(n); }""",
        "medium",
    ),
    Case(
        "table_of_structures",
        """struct way { const char *name; int (*go)(void); };
        static struct way one = {"one", quiet}, two = {"two", visits}, *ways[] = {&one, &two}, *volatile way = &one;
        void choose(int i) { way = ways[i]; }
        void *malloc(size_t n) { if (n > 64) { lock(); way->go(); unlock(); } return plain(n); }""",
        "medium",
    ),
    Case(
        "harmless_candidates",
        """static int other(void) { return calls += 2; }
        static int (*volatile hook)(void) = quiet;
        void on(void) { hook = other; }
        void off(void) { hook = quiet; }
        void *malloc(size_t n) { if (n > 64) { lock(); hook(); unlock(); } return plain(n); }""",
        None,
    ),
    Case(
        "flag_of_the_thread",
        """static __thread bool inside;
        void *malloc(size_t n) {
            if (inside) return memory;
            if (n > 64) { lock(); inside = true; visits(); inside = false; unlock(); }
            return plain(n);
        }""",
        None,
    ),
    Case(
        "flag_lowered_before",
        """static __thread bool inside;
        void *malloc(size_t n) {
            if (inside) return memory;
            if (n > 64) { lock(); inside = true; quiet(); inside = false; visits(); unlock(); }
            return plain(n);
        }""",
        "medium",
    ),
    Case(
        "flag_set_by_a_callee",
        """static __thread int inside;
        static NOINLINE bool enter(void) { if (inside) return false; inside = 1; return true; }
        void *malloc(size_t n) {
            if (inside) return memory;
            if (n > 64) { lock(); if (enter()) { visits(); inside = 0; } unlock(); }
            return plain(n);
        }""",
        None,
    ),
    Case(
        "flag_of_another_purpose",
        """static __thread bool inside, counted;
        void *malloc(size_t n) {
            if (counted) return memory;
            if (n > 64) { lock(); inside = true; visits(); inside = false; unlock(); }
            return plain(n);
        }""",
        "medium",
    ),
)


def found(case: Case, machine: str, directory: Path) -> list[Finding]:
    compiler = shutil.which(COMPILERS[machine])
    if compiler is None:
        pytest.skip(f"no compiler for {machine}")
    source, library = directory / "case.c", directory / "libcase.so"
    source.write_text(PRELUDE + case.code + EPILOGUE)
    flags = ["-O2", "-shared", "-fPIC", "-fno-builtin", "-mno-outline-atomics" if machine == "aarch64" else "-O2"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    (directory / "lib").mkdir()
    for name, place in (("libc.so.6", "lib"), (LOADERS[machine].name, LOADERS[machine].parent)):
        command = [compiler, f"-print-file-name={name}"]
        real = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        (directory / str(place).lstrip("/")).mkdir(exist_ok=True)
        shutil.copyfile(real, directory / str(place).lstrip("/") / name)
    known = signatures.load()
    graph = call_graph("/libcase.so", ScanOptions(sysroot=directory), known)
    gathered = facts.gather("/libcase.so", graph, known, find_libc(graph.program, known))
    return reentry.find(gathered)


@pytest.mark.parametrize("machine", COMPILERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reentry(case: Case, machine: str, tmp_path: Path) -> None:
    findings = found(case, machine, tmp_path)
    assert [finding.severity.value for finding in findings] == ([case.severity] if case.severity else [])
    if findings and ("hook" in case.code or "way" in case.code):
        assert {"table", "got"} & {frame.edge for frame in findings[0].holder}
