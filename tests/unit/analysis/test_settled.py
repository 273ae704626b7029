"""Variables that nothing writes: whether a thread that only one of them would start can exist at a fork."""

from __future__ import annotations

import pytest

from tests.unit.analysis.snippets import MACHINES, Build, Case, parameters, program, windows_of

pytestmark = pytest.mark.together("build")

_BUILDS = tuple(Build(build.machine, (level,)) for build in MACHINES for level in ("-O0", "-O2"))
_COMMON = """
extern int more(int *);
NOINLINE static void *loop(void *p) { for (;;) work(1); return p; }
#define START() do { pthread_t t; pthread_create(&t, 0, loop, 0); } while (0)
#define SPLIT() if (fork() == 0) _exit(0); return ask()
"""

CASES = (
    Case("zero", "no", "static int on; int main(void) { if (on) START(); SPLIT(); }"),
    Case("one", "yes", "static int on = 1; int main(void) { if (on) START(); SPLIT(); }"),
    Case("one_is_off", "no", "static int off = 1; int main(void) { if (!off) START(); SPLIT(); }"),
    Case("negative", "no", "static int count = -1; int main(void) { if (count > 0) START(); SPLIT(); }"),
    Case("wide", "no", "static long limit = 5; int main(void) { if (limit > 1L << 40) START(); SPLIT(); }"),
    Case("of_bytes", "no", "static char on; int main(void) { if (on) START(); SPLIT(); }"),
    Case("hidden", "no", '__attribute__((visibility("hidden"))) int on; int main(void) { if (on) START(); SPLIT(); }'),
    Case("passed", "no", "static int n; NOINLINE static void pool(int k) { for (int i = 0; i < k; i++) START(); }"
         " int main(void) { pool(n); SPLIT(); }"),
    Case("below", "no", "static int on; NOINLINE static void begin(void) { if (on) START(); work(2); }"
         " int main(void) { begin(); SPLIT(); }"),
    Case("two", "no", "static int a, b; int main(void) { if (a) { if (b) START(); } SPLIT(); }"),
    Case("written", "yes", "static int on; NOINLINE void set(void) { on = 1; }"
         " int main(int n, char **v) { if (n > 1) set(); if (on) START(); SPLIT(); }"),
    Case("counted", "yes", "static int on; NOINLINE void set(void) { on++; }"
         " int main(int n, char **v) { if (n > 1) set(); if (on) START(); SPLIT(); }"),
    Case("added_to", "yes", "static int on; int main(int n, char **v) { on |= n; if (on) START(); SPLIT(); }"),
    Case("atomic", "yes", "static int on; NOINLINE void set(void) { __atomic_store_n(&on, 1, __ATOMIC_SEQ_CST); }"
         " int main(int n, char **v) { if (n > 1) set(); if (on) START(); SPLIT(); }"),
    Case("passed_on", "yes", "static int on; NOINLINE void set(int *p) { *p = 1; }"
         " int main(int n, char **v) { if (n > 1) set(&on); if (on) START(); SPLIT(); }"),
    Case("listed", "yes", 'static int on; struct option o[] = {{"on", 0, &on, 1}, {0}};'
         ' int main(int n, char **v) { if (n > 1) getopt_long(n, v, "", o, 0); if (on) START(); SPLIT(); }'),
    Case("kept", "yes", "static int on, *kept; int main(int n, char **v) { kept = &on; if (n > 1) *kept = n;"
         " if (on) START(); SPLIT(); }"),
    Case("of_two", "yes", "static int a, b; int main(int n, char **v) { *(n > 1 ? &a : &b) = n;"
         " if (a) START(); SPLIT(); }"),
    Case("element", "yes", "static int on[4]; int main(int n, char **v) { on[n & 3] = n;"
         " if (on[1]) START(); SPLIT(); }"),
    Case("returned", "yes", "static int on; NOINLINE int *where(void) { return &on; }"
         " int main(int n, char **v) { *where() = n; if (on) START(); SPLIT(); }"),
    Case("asm", "yes", 'static int on; int main(int n, char **v) { int *p = &on; __asm__("" : "+r"(p)); *p = n;'
         " if (on) START(); SPLIT(); }"),
    Case("by_a_handler", "yes", "static int on; static void note(int s) { on = s; }"
         " int main(void) { signal(SIGHUP, note); if (on) START(); SPLIT(); }"),
)  # fmt: skip


@pytest.mark.parametrize(("case", "build"), parameters(CASES, _BUILDS))
def test_whether_the_thread_exists(case: Case, build: Build) -> None:
    found = program(build, "#include <getopt.h>\n" + _COMMON + case.code)
    assert {window.threads.value for window in windows_of(found, "main")} == {case.expected}


@pytest.mark.parametrize(("case", "build"), parameters((
    Case("exported", "yes", "int on; int main(void) { if (on) START(); SPLIT(); }"),
), _BUILDS))  # fmt: skip
def test_what_is_exported_may_be_written_by_others(case: Case, build: Build) -> None:
    found = program(build.also("-rdynamic"), _COMMON + case.code)
    assert {window.threads.value for window in windows_of(found, "main")} == {case.expected}
