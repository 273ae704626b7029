"""What is kept of parts of programs changes no finding, and programs with the same libc share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forkproof import libc_locks
from forkproof.cache import Cache, Parts
from forkproof.content import part_of
from forkproof.facts import Facts
from forkproof.hazards import reentry
from forkproof.model import Finding
from tests.unit.analysis.snippets import MACHINES, Build, findings_of, library, program

_CLOCK = """
    static void *clock_thread(void *p) { struct tm m; time_t t = 0; for (;;) localtime_r(&t, &m); return p; }
    __attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, clock_thread, 0); }
    int main(void) { if (fork() == 0) { struct tm m; time_t t = 0; localtime_r(&t, &m); %s _exit(0); } return 0; }
"""
ONE, OTHER = _CLOCK % "", _CLOCK % 'setenv("a", "b", 1); fputs("x", stderr);'


def _with(found: Facts, parts: Parts) -> Facts:
    """The same program, with what is known of parts of others."""
    return replace(found, parts=parts)


def _findings(build: Build, code: str, parts: Parts) -> list[Finding]:
    found = _with(program(build, code), parts)
    result = findings_of(found)
    found.keep()
    return result


def _must_not_derive(*_: object) -> None:
    raise AssertionError("the catalogue was derived again")


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_the_same_findings(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {code: _findings(build, code, Parts()) for code in (ONE, OTHER)}
    assert any(finding.rule == "unsafe-call" for finding in alone[ONE])
    _findings(build, OTHER, Parts(Cache(tmp_path)))
    monkeypatch.setattr(libc_locks, "derive", _must_not_derive)
    for code in (ONE, OTHER, ONE):
        assert _findings(build, code, Parts(Cache(tmp_path))) == alone[code]


def test_a_damaged_entry_is_derived_again(tmp_path: Path) -> None:
    build = MACHINES[0]
    alone = _findings(build, ONE, Parts())
    _findings(build, ONE, Parts(Cache(tmp_path)))
    entries = Cache(tmp_path).entries()
    assert entries
    for path, size, _ in entries:
        path.write_bytes(path.read_bytes()[: size // 2])
    assert _findings(build, ONE, Parts(Cache(tmp_path))) == alone


@pytest.mark.parametrize("build", MACHINES, ids=str)
class TestPart:
    def key(self, build: Build, code: str, *told: str) -> str:
        found = program(build, code)
        return part_of(found.flow, found.libc.objects, *told).key

    def test_programs_with_the_same_libc_share_it(self, build: Build) -> None:
        assert self.key(build, ONE) == self.key(build, OTHER)

    def test_what_is_told_counts(self, build: Build) -> None:
        assert self.key(build, ONE) != self.key(build, ONE, "glibc")

    def test_a_libc_whose_malloc_is_replaced_is_another(self, build: Build) -> None:
        mine = "void *malloc(unsigned long n) { static char b[99]; return b + n; } void free(void *p) { (void)p; }"
        assert self.key(build, ONE) != self.key(build, mine + ONE)


_ARENA = """
    static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;
    static char arena[1 << 16];
    static unsigned long used;
    static void sample(void);
    static void (*volatile hook)(void) = sample;
    void *malloc(size_t n)
    {
        pthread_mutex_lock(&arena_lock);
        void *p = arena + used;
        used += n;
        if (used > sizeof arena / 2 && hook)
            hook();
        pthread_mutex_unlock(&arena_lock);
        return p;
    }
    void free(void *p) { pthread_mutex_lock(&arena_lock); used -= p != 0; pthread_mutex_unlock(&arena_lock); }
    void *calloc(size_t a, size_t b) { return malloc(a * b); }
    void *realloc(void *p, size_t n) { free(p); return malloc(n); }
    static void sample(void) { free(malloc(32)); }
"""
_USERS = (
    "int main(void) { return malloc(1) == 0; }",
    "int main(void) { puts(environ[0]); free(malloc(9)); return 0; }",
)


def _must_not_search(*_: object) -> None:
    raise AssertionError("the re-entries were searched for again")


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_programs_with_the_same_allocator_share_its_re_entries(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, parts = library(build, "arena", _ARENA), Parts()
    alone = [reentry.find(_with(program(build, code, arena), Parts())) for code in _USERS]
    assert [finding.lock.name for findings in alone for finding in findings if finding.lock] == ["arena_lock"] * 2
    reentry.find(_with(program(build, _USERS[0], arena), parts))
    monkeypatch.setattr(reentry, "Reentries", _must_not_search)
    assert [reentry.find(_with(program(build, code, arena), parts)) for code in _USERS] == alone


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_another_allocator_of_the_same_name_is_searched(build: Build) -> None:
    parts = Parts()
    fixed = _ARENA.replace("&& hook", "&& 0")
    found = [
        reentry.find(_with(program(build, _USERS[0], library(build, "arena", code)), parts)) for code in (_ARENA, fixed)
    ]
    assert [len(findings) for findings in found] == [1, 0]
