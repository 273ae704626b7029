"""Threads that post a semaphore as the last thing that they do, and who waits for it."""

from __future__ import annotations

import pytest

from tests.unit.analysis.snippets import MACHINES, Build, Case, parameters, program, windows_of

pytestmark = pytest.mark.together("build")

_COMMON = """
static sem_t done; static volatile int more; NOINLINE void go_on(int n) { more = n; }
struct job { int n; sem_t done; };
NOINLINE static void *last(void *p) { work(1); sem_post(&done); return p; }
NOINLINE static void *first(void *p) { sem_post(&done); work(2); return p; }
NOINLINE static void *again(void *p) { do sem_post(&done); while (more); return p; }
NOINLINE static void *given(void *p) { struct job *j = p; work(j->n); sem_post(&j->done); return 0; }
#define BEGIN(n) pthread_t t; sem_init(&done, 0, n)
#define START(f) pthread_create(&t, 0, f, 0)
#define WAIT() while (sem_wait(&done) != 0) work(6)
#define SPLIT() if (fork() == 0) _exit(0); return ask()
"""

#: Whether another thread can exist at the fork: one that has told its end is on its way out.
CASES = (
    Case("last", "unknown", "int main(void) { BEGIN(0); START(last); WAIT(); SPLIT(); }"),
    Case("not_waited_for", "yes", "int main(void) { BEGIN(0); START(last); work(3); SPLIT(); }"),
    Case("afterwards", "yes", "int main(void) { BEGIN(0); START(last); if (fork() == 0) _exit(0); WAIT(); return 0; }"),
    Case("goes_on", "yes", "int main(void) { BEGIN(0); START(first); WAIT(); SPLIT(); }"),
    Case("tells_more", "yes", "int main(void) { BEGIN(0); START(again); WAIT(); SPLIT(); }"),
    Case("begins_with_one", "yes", "int main(void) { BEGIN(1); START(last); WAIT(); SPLIT(); }"),
    Case("not_made", "yes", "int main(void) { pthread_t t; START(last); WAIT(); SPLIT(); }"),
    Case("posted_by_itself", "yes", "int main(void) { BEGIN(0); START(last); sem_post(&done); WAIT(); SPLIT(); }"),
    Case("sometimes", "yes", "int main(int n) { BEGIN(0); START(last); if (n > 1) { WAIT(); work(4); } SPLIT(); }"),
    Case("one_of_two", "yes", "int main(void) { BEGIN(0); START(last); work(5); START(last); WAIT(); SPLIT(); }"),
    Case("one_of_many", "yes", "int main(int n) { BEGIN(0); while (n--) START(last); WAIT(); SPLIT(); }"),
    Case("each", "unknown", "int main(void) { BEGIN(0); START(last); START(last); WAIT(); WAIT(); SPLIT(); }"),
    Case("all", "unknown", "int main(int n) { BEGIN(0); for (int i = 0; i < n; i++) START(last);"
         " for (int i = 0; i < n; i++) sem_wait(&done); SPLIT(); }"),
    Case("given", "unknown", "int main(void) { pthread_t t; struct job j = {1}; sem_init(&j.done, 0, 0);"
         " pthread_create(&t, 0, given, &j); sem_wait(&j.done); SPLIT(); }"),
    Case("another", "yes", "int main(void) { static sem_t s; BEGIN(0); sem_init(&s, 0, 0); START(last); sem_wait(&s);"
         " SPLIT(); }"),
    Case("in_functions", "unknown", "NOINLINE void end(void) { WAIT(); work(5); }"
         " NOINLINE void begin(void) { BEGIN(0); START(last); work(7); }"
         " int main(void) { begin(); end(); SPLIT(); }"),
    Case("in_one", "unknown", "NOINLINE void all(void) { BEGIN(0); START(last); WAIT(); work(7); }"
         " int main(void) { all(); SPLIT(); }"),
)  # fmt: skip


@pytest.mark.parametrize(("case", "build"), parameters(CASES, MACHINES))
def test_whether_the_thread_has_ended(case: Case, build: Build) -> None:
    found = program(build, _COMMON + case.code)
    assert {window.threads.value for window in windows_of(found, "main")} == {case.expected}
