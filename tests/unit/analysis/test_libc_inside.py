"""Which functions of a static program are its libc's; the linker's map says from which file each came."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forkproof.facts import Facts
from forkproof.libc_inside import libc_functions
from tests.unit.analysis.snippets import MACHINES, Build, findings_of, program

pytestmark = pytest.mark.together("build")

_USER = """
    static pthread_mutex_t own = PTHREAD_MUTEX_INITIALIZER;
    static volatile int told;
    void own_log(void) { pthread_mutex_lock(&own); told++; pthread_mutex_unlock(&own); }
    void *own_thread(void *p) { for (;;) own_log(); return p; }
    int own_compare(const void *a, const void *b) { own_log(); return a < b; }
    int own_main(char *text) {
        pthread_t t;
        pthread_create(&t, 0, own_thread, 0);
        qsort(text, 3, 1, own_compare);
        puts(text);
        if (fork() == 0) { own_log(); _exit(0); }
        return 0;
    }
    int main(int n, char **words) { return own_main(words[n - 1]); }
"""
#: The program's own malloc and getenv, which libc calls, with what they call in turn.
_REPLACES = """
    static char arena[1 << 20]; static unsigned long used;
    void own_count(unsigned long n) { used += n; }
    void *malloc(unsigned long n) { own_count(n); return arena + used; }
    void free(void *p) { own_count((unsigned long)p & 0); }
    void *calloc(unsigned long n, unsigned long m) { return malloc(n * m); }
    void *realloc(void *p, unsigned long n) { own_count(0); return malloc(n); }
    const char *own_find(const char *name) { own_count(0); return name; }
    char *getenv(const char *name) { return (char *)own_find(name); }
"""
_REPLACED = "malloc", "free", "calloc", "realloc", "getenv"
_PLACED = re.compile(r"^ (?:\.text\S*)?\s+(0x[0-9a-f]+)\s+(0x[0-9a-f]+)\s+(\S+)$", re.MULTILINE)
_ARCHIVE = re.compile(r"/lib(?:c|gcc|gcc_eh)\.a\(")
_COLD = ".cold"


def _placed(text: str) -> list[tuple[int, int, str]]:
    """(first address, last, file) of every piece of code in a linker's map."""
    rows = [(int(start, 16), int(size, 16), file) for start, size, file in _PLACED.findall(text)]
    return [(start, start + size, file) for start, size, file in rows if size and start]


def _mistakes(found: Facts, text: str) -> tuple[set[str], set[str], int]:
    """The program's functions that count as libc's, libc's that count as the program's, and how many libc has."""
    assert found.libc_functions is not None
    placed, flow = _placed(text), found.flow
    taken, missed, count = set(), set(), 0
    for function, is_libc in enumerate(found.libc_functions.tolist()):
        address = int(flow.program.start[function])
        file = next((file for start, end, file in placed if start <= address < end), "")
        name = flow.program.names[0].name(address)
        if not file or name.endswith(_COLD) or "crt" in file:
            continue
        is_archive = bool(_ARCHIVE.search(file))
        count += is_archive
        if is_archive and not is_libc:
            missed.add(name)
        elif is_libc and not is_archive:
            taken.add(name)
    return taken, missed, count


@pytest.mark.parametrize("code", [_USER, _USER + _REPLACES], ids=["plain", "replaces"])
@pytest.mark.parametrize("flags", [("-no-pie", "-fno-pie"), ("-O0",), ("-ffunction-sections",)])
@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_the_map_of_the_linker_bears_it_out(build: Build, flags: tuple[str, ...], code: str, tmp_path: Path) -> None:
    found = program(build.also(*flags, f"-Wl,-Map={tmp_path}/map"), code, kind="static")
    taken, missed, count = _mistakes(found, (tmp_path / "map").read_text())
    assert count > 500
    assert taken <= {*_REPLACED, "own_find", "own_count"}  # where the compiler put them last
    assert len(missed) <= 0.03 * count, sorted(missed)
    assert not {"fork", "pthread_create", "pthread_mutex_lock", "puts", "qsort", "exit", "vfprintf"} & missed


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_its_own_lock_is_judged_and_no_other(build: Build) -> None:
    found = [f for f in findings_of(program(build, _USER, kind="static")) if f.rule == "inherited-lock"]
    assert [f.lock.name for f in found if f.lock] == ["own"]


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_without_a_main_it_is_not_known(build: Build) -> None:
    found = program(build, _USER + "/* another, since it is changed */", kind="static")
    vars(found.flow)["main"] = None
    assert found.libc_functions is None
    assert [f for f in findings_of(found) if f.rule == "inherited-lock"] == []
    assert any("own locks" in question for question in found.not_known)


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_dynamic_program_has_none_of_libc(build: Build) -> None:
    found = program(build, _USER)
    assert found.libc_functions is not None
    assert not found.libc_functions[: found.flow.program.base[1]].any()
    assert found.libc_functions[found.flow.program.base[found.libc.core]].all()
    assert found.not_known == ()


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_functions_all_over_the_place_are_not_told_apart(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many that seem to be libc's lie outside of its run, nothing is said."""
    found = program(build, _USER, kind="static")
    monkeypatch.setattr("forkproof.libc_inside._STRAY", 0.0)
    assert libc_functions(found.flow) is None
