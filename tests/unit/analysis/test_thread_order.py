"""Whether another thread can exist when a process forks: constructors, order on the way, tables, handlers."""

from __future__ import annotations

import pytest

from forkproof.model import Answer
from tests.unit.analysis.snippets import BUILDS, MACHINES, Build, Case, library, parameters, program, table, windows_of

pytestmark = pytest.mark.together("build")

_START = "pthread_t t; pthread_create(&t, 0, @run, 0);"
_RUN = "static void *@run(void *p) { work(1); return p; }"

#: In one function or along calls; nothing here goes through a pointer.
ORDER = (
    Case("no_thread", "no", "int @main(void) { if (fork() == 0) _exit(0); return ask(); }"),
    Case("before", "yes", _RUN + "int @main(void) {" + _START + "if (fork() == 0) _exit(0); return ask(); }"),
    Case("after", "no", _RUN + "int @main(void) { if (fork() == 0) _exit(0); " + _START + " return ask(); }"),
    Case(
        "after_daemonizing",
        "no",
        _RUN + "int @main(void) { if (fork() > 0) _exit(0); " + _START + " work(2); return ask(); }",
    ),
    Case(
        "second_round",
        "yes",
        _RUN + "int @main(void) { while (ask()) { if (fork() == 0) _exit(0); " + _START + " } return 0; }",
    ),
    Case(
        "one_or_the_other",
        "no",
        _RUN + "int @main(int n) { if (n) { if (fork() == 0) _exit(0); } else { " + _START + " } return ask(); }",
    ),
    Case(
        "one_or_the_other_looping",
        "yes",
        _RUN
        + "int @main(int n) { for (;;) { if (ask()) { if (fork() == 0) _exit(0); } else { "
        + _START
        + " } } return 0; }",
    ),
    Case(
        "in_callee_before",
        "yes",
        _RUN + "NOINLINE void @begin(void) {" + _START + "}"
        "int @main(void) { @begin(); if (fork() == 0) _exit(0); return ask(); }",
    ),
    Case(
        "in_callee_after",
        "no",
        _RUN + "NOINLINE void @begin(void) {" + _START + "}"
        "int @main(void) { if (fork() == 0) _exit(0); @begin(); return ask(); }",
    ),
    Case(
        "both_in_callees",
        "yes",
        _RUN + "NOINLINE void @begin(void) {" + _START + "}"
        "NOINLINE void @split(void) { if (fork() == 0) _exit(0); work(1); }"
        "int @main(void) { @begin(); @split(); return ask(); }",
    ),
    Case(
        "both_in_callees_reversed",
        "no",
        _RUN + "NOINLINE void @begin(void) {" + _START + "}"
        "NOINLINE void @split(void) { if (fork() == 0) _exit(0); work(1); }"
        "int @main(void) { @split(); @begin(); return ask(); }",
    ),
    Case(
        "told_not_to",
        "no",
        _RUN + "NOINLINE void @load(int how) { work(how); if (how) {" + _START + "} }"
        "int @main(void) { @load(0); if (fork() == 0) _exit(0); @load(ask()); return ask(); }",
    ),
    Case(
        "told_to",
        "yes",
        _RUN + "NOINLINE void @load(int how) { work(how); if (how) {" + _START + "} }"
        "int @main(void) { @load(1); if (fork() == 0) _exit(0); @load(ask()); return ask(); }",
    ),
    Case(
        "not_told",
        "yes",
        _RUN + "NOINLINE void @load(int how) { work(how); if (how) {" + _START + "} }"
        "int @main(void) { @load(ask()); if (fork() == 0) _exit(0); @load(0); return ask(); }",
    ),
    Case(
        "told_not_to_fork_again",
        "no",
        _RUN + "NOINLINE void @begin(int how) { if (how && fork() == 0) _exit(0); work(how); " + _START + "}"
        "int @main(void) { @begin(1); @begin(0); return ask(); }",
    ),
    Case(
        "told_to_fork_again",
        "yes",
        _RUN + "NOINLINE void @begin(int how) { if (how && fork() == 0) _exit(0); work(how); " + _START + "}"
        "int @main(void) { @begin(1); @begin(1); return ask(); }",
    ),
    Case(
        "not_told_whether_to_fork_again",
        "yes",
        _RUN + "NOINLINE void @begin(int how) { if (how && fork() == 0) _exit(0); work(how); " + _START + "}"
        "int @main(void) { @begin(1); @begin(ask()); return ask(); }",
    ),
    Case(
        "fork_then_thread_in_one_callee",
        "no",
        _RUN + "NOINLINE void @both(void) { if (fork() == 0) _exit(0); " + _START + "}"
        "int @main(void) { @both(); return ask(); }",
    ),
    Case(
        "that_callee_twice",
        "yes",
        _RUN + "NOINLINE void @both(void) { if (fork() == 0) _exit(0); " + _START + "}"
        "int @main(void) { @both(); @both(); return ask(); }",
    ),
    Case(
        "dies_between",
        "no",
        _RUN + "int @main(int n) { if (n) { " + _START + " exit(0); } if (fork() == 0) _exit(0); return ask(); }",
    ),
    Case(
        "in_a_thread",
        "yes",
        "static void *@run(void *p) { if (fork() == 0) _exit(0); return p; }"
        "int @main(void) { pthread_t t; pthread_create(&t, 0, @run, 0); return ask(); }",
    ),
    Case(
        "below_a_thread",
        "yes",
        "NOINLINE void @split(void) { if (fork() == 0) _exit(0); work(1); }"
        "static void *@run(void *p) { @split(); work(1); return p; }"
        "int @main(void) { pthread_t t; pthread_create(&t, 0, @run, 0); return ask(); }",
    ),
    Case(
        "c11",
        "yes",
        "static int @run(void *p) { work(1); return 0; }"
        "int @main(void) { thrd_t t; thrd_create(&t, @run, 0); if (fork() == 0) _exit(0); return ask(); }",
    ),
    Case(
        "recursion",
        "yes",
        _RUN + "NOINLINE void @walk(int n) { if (fork() == 0) _exit(0); " + _START + " if (n) @walk(n - 1); work(n); }"
        "int @main(void) { @walk(2); return ask(); }",
    ),
)

#: The address of what is called may pass through another register, at -O0; then who is called is not known.
CALLBACKS = (
    Case(
        "through_callback",
        "yes|unknown",
        _RUN + "static int @compare(const void *a, const void *b) {" + _START + " return 0; }"
        "int @main(int *v) { qsort(v, 4, 4, @compare); if (fork() == 0) _exit(0); return ask(); }",
    ),
    Case(
        "through_once",
        "yes|unknown",
        _RUN + "static pthread_once_t @once; static void @init(void) {" + _START + "}"
        "int @main(void) { pthread_once(&@once, @init); if (fork() == 0) _exit(0); return ask(); }",
    ),
)

_SPLIT = "int main(void) { if (fork() == 0) _exit(0); return ask(); }"
_RUNNER = "static void *run(void *p) { work(1); return p; }"
_ACT = "static void act(int n) { if (fork() == 0) _exit(0); }"
_LAST = "static void last(void) { if (fork() == 0) _exit(0); }"
_BEGIN = "pthread_t t; pthread_create(&t, 0, run, 0); return ask();"

#: Whole programs: what a table or a constructor says reaches everything in it.
PROGRAMS = (
    Case(
        "constructor",
        "yes",
        _RUNNER
        + "__attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }"
        + _SPLIT,
    ),
    Case(
        "constructor_with_priority",
        "yes",
        _RUNNER
        + "__attribute__((constructor(200))) static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }"
        + _SPLIT,
    ),
    Case(
        "constructor_by_section",
        "yes",
        _RUNNER + "static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }"
        '__attribute__((section(".init_array"), used)) static void (*entry)(void) = up;' + _SPLIT,
    ),
    Case(
        "destructor",
        "no",
        _RUNNER
        + "__attribute__((destructor)) static void down(void) { pthread_t t; pthread_create(&t, 0, run, 0); }"
        + _SPLIT,
    ),
    Case(
        "function_table",
        "unknown",
        _RUNNER
        + """
        static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }
        static void other(void) { work(2); }
        static void (*const table[])(void) = { up, other };
        int main(int c, char **v) { table[c & 1](); if (fork() == 0) _exit(0); return ask(); }""",
    ),
    Case(
        "struct_of_methods",
        "unknown",
        _RUNNER
        + """
        struct module { const char *name; void (*up)(void); };
        static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }
        struct module modules[] = { { "a", up }, { 0, 0 } };
        int main(void) { for (struct module *m = modules; m->name; m++) m->up(); if (fork() == 0) _exit(0);
            return ask(); }""",
    ),
    Case(
        "starter_by_pointer",
        "unknown",
        _RUNNER
        + """
        typedef int (*starter)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
        static starter table[] = { pthread_create, 0 };
        int main(int c, char **v) { pthread_t t; table[c & 1](&t, 0, run, 0); if (fork() == 0) _exit(0);
            return ask(); }""",
    ),
    Case(
        "handler_starts_one",
        "no|unknown",
        _RUNNER + "static void child(void) { pthread_t t; pthread_create(&t, 0, run, 0); }"
        "int main(void) { pthread_atfork(0, 0, child); if (fork() == 0) _exit(0); return ask(); }",
    ),
    Case(
        "signal_handler",
        "unknown",
        _RUNNER + "static void act(int n) { pthread_t t; pthread_create(&t, 0, run, 0); }"
        "int main(void) { signal(SIGUSR1, act); if (fork() == 0) _exit(0); return ask(); }",
    ),
    Case("forks_for_a_signal", "yes", _RUNNER + _ACT + "int main(void) { signal(SIGUSR1, act);" + _BEGIN + "}"),
    Case(
        "forks_for_a_later_signal",
        "yes",
        _RUNNER + _ACT + "int main(void) { pthread_t t; pthread_create(&t, 0, run, 0); signal(SIGUSR1, act);"
        "return ask(); }",
    ),
    Case(
        "forks_for_a_signal_of_a_structure",
        "yes",
        _RUNNER
        + _ACT
        + "int main(void) { struct sigaction s; memset(&s, 0, sizeof s); s.sa_handler = act; sigaction(SIGUSR1, &s, 0);"
        + _BEGIN
        + "}",
    ),
    Case(
        "forks_for_a_signal_registered_in_a_callee",
        "yes",
        _RUNNER
        + _ACT
        + "NOINLINE static void up(void) { signal(SIGUSR1, act); } int main(void) { up();"
        + _BEGIN
        + "}",
    ),
    Case("forks_for_a_signal_alone", "no", _ACT + "int main(void) { signal(SIGUSR1, act); return ask(); }"),
    Case("forks_at_exit", "yes", _RUNNER + _LAST + "int main(void) { atexit(last);" + _BEGIN + "}"),
    Case(
        "forks_at_exit_when_they_have_ended",
        "unknown",
        _RUNNER + _LAST + "int main(void) { atexit(last); pthread_t t; pthread_create(&t, 0, run, 0);"
        "pthread_join(t, 0); return ask(); }",
    ),
    Case(
        "exit_handler",
        "no|unknown",
        _RUNNER + "static void act(void) { pthread_t t; pthread_create(&t, 0, run, 0); }"
        "int main(void) { atexit(act); if (fork() == 0) _exit(0); return ask(); }",
    ),
    Case("nothing", "no", _SPLIT),
)


@pytest.mark.parametrize(("case", "build"), parameters(ORDER, BUILDS))
def test_a_thread_can_exist_when_the_process_forks(case: Case, build: Build) -> None:
    answers = {w.threads.value for w in windows_of(table(ORDER, build), case)}
    assert answers == {case.expected}


@pytest.mark.parametrize(("case", "build"), parameters(CALLBACKS, BUILDS))
def test_a_callback_that_starts_a_thread(case: Case, build: Build) -> None:
    answers = {w.threads.value for w in windows_of(table(CALLBACKS, build), case)}
    assert len(answers) == 1
    assert answers <= set(case.expected.split("|"))


@pytest.mark.parametrize(("case", "build"), parameters(PROGRAMS, MACHINES))
def test_a_thread_can_exist_in_a_program(case: Case, build: Build) -> None:
    found = program(build, case.text)
    answers = {w.threads.value for w in found.windows}
    assert len(answers) == 1
    assert answers <= set(case.expected.split("|"))


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_library_that_starts_a_thread_when_it_is_loaded(build: Build) -> None:
    starter = library(
        build,
        "starter",
        _RUNNER + "__attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }",
    )
    found = program(build, _SPLIT, starter)
    (window,) = found.windows
    assert window.threads is Answer.YES
    assert window.source is not None
    assert window.source.why == "constructor"
    assert found.flow.name(window.source.root) == "up"


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_static_initialisation_in_cpp(build: Build) -> None:
    code = """
        static void *run(void *p) { work(1); return p; }
        struct Pool { pthread_t t; Pool() { pthread_create(&t, 0, run, 0); } };
        static Pool pool;
        int main() { if (fork() == 0) _exit(0); return ask(); }"""
    found = program(build, code, language="c++")
    (window,) = found.windows
    assert window.threads is Answer.YES
    assert window.source is not None
    assert window.source.why == "constructor"


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_the_source_of_a_thread_is_the_call_before_the_fork(build: Build) -> None:
    found = program(
        build,
        _RUNNER
        + "int main(void) { pthread_t t; pthread_create(&t, 0, run, 0); if (fork() == 0) _exit(0); return ask(); }",
    )
    (window,) = found.windows
    assert window.source is not None
    assert window.source.why == "before the fork"
    assert found.flow.name(window.source.root) == "main"
    assert [found.flow.name(f) for f in found.entries_of(window.source)] == ["run"]


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_missing_library_may_start_threads(build: Build) -> None:
    gone = library(build, "gone", "void elsewhere(void) {}")
    found = program(
        build, "void elsewhere(void); int main(void) { elsewhere(); if (fork() == 0) _exit(0); return ask(); }", gone
    )
    assert {w.threads for w in found.windows} == {Answer.NO}
