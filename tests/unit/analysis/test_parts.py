"""What is kept of parts of programs changes no finding, and programs with the same libc share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forkproof import libc_locks
from forkproof.cache import Cache, Parts
from forkproof.content import part_of
from forkproof.facts import Facts
from forkproof.model import Finding
from tests.unit.analysis.snippets import MACHINES, Build, findings_of, program

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
