"""Threads that tell a future as the last thing they do, and who waits for it; libstdc++ is stood in for."""

from __future__ import annotations

import pytest

from tests.unit.analysis.snippets import MACHINES, Build, Case, library, parameters, program, windows_of

pytestmark = pytest.mark.together("build")

_WAIT = (
    "_ZNSt28__atomic_futex_unsigned_base19_M_futex_wait_untilEPjjbNSt6chrono8durationIlSt5ratioILl1ELl1EEEENS2_IlS3_"
    "ILl1ELl1000000000EEEE"
)
_TELL = "_ZNSt28__atomic_futex_unsigned_base19_M_futex_notify_allEPj"
_RUNTIME = f"""
void {_TELL}(unsigned *w) {{ work(1); }}
int {_WAIT}(unsigned *w, unsigned v, int b, long s, long n) {{ return 1; }}
"""
_COMMON = f"""
extern void {_TELL}(unsigned *); extern int {_WAIT}(unsigned *, unsigned, int, long, long);
static unsigned state; static volatile int more; NOINLINE void go_on(int n) {{ more = n; }}
static inline int ready(void) {{ return __atomic_load_n(&state, __ATOMIC_ACQUIRE) == 1; }}
static inline void tell(void) {{ if (__atomic_exchange_n(&state, 1, __ATOMIC_RELEASE) & 2) {_TELL}(&state); }}
NOINLINE static void *last(void *p) {{ work(1); tell(); return p; }}
NOINLINE static void *first(void *p) {{ tell(); work(2); return p; }}
NOINLINE static void *again(void *p) {{ do tell(); while (more); return p; }}
#define START(f) pthread_t t; pthread_create(&t, 0, f, 0)
#define WAIT() while (!ready()) {_WAIT}(&state, 0, 0, 0, 0)
#define WAIT_A_WHILE() while (!ready() && {_WAIT}(&state, 0, 1, 5, 0)) ;
#define SPLIT() if (fork() == 0) _exit(0); return ask()
"""

#: Whether another thread can exist at the fork.
CASES = (
    Case("last", "no", "int main(void) { START(last); WAIT(); SPLIT(); }"),
    Case("not_waited_for", "yes", "int main(void) { START(last); work(3); SPLIT(); }"),
    Case(
        "waited_for_afterwards", "yes", "int main(void) { START(last); if (fork() == 0) _exit(0); WAIT(); return 0; }"
    ),
    Case("goes_on", "yes", "int main(void) { START(first); WAIT(); SPLIT(); }"),
    Case("tells_more", "yes", "int main(void) { START(again); WAIT(); SPLIT(); }"),
    Case("for_a_while", "unknown", "int main(void) { START(last); WAIT_A_WHILE(); SPLIT(); }"),
    Case("sometimes", "unknown", "int main(int n) { START(last); if (n > 1) { work(4); WAIT(); } SPLIT(); }"),
    Case(
        "in_a_function",
        "no",
        "NOINLINE void end(void) { WAIT(); work(5); } int main(void) { START(last); end(); SPLIT(); }",
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(CASES, MACHINES))
def test_whether_the_thread_has_ended(case: Case, build: Build) -> None:
    found = program(build, _COMMON + case.code, library(build, "runtime", _RUNTIME))
    assert {window.threads.value for window in windows_of(found, "main")} == {case.expected}
