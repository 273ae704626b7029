"""Functions that are handed to wrappers of what starts threads, in closures and in objects with tables."""

from __future__ import annotations

import pytest

from forkproof.callgraph import EdgeKind
from forkproof.facts import Facts
from forkproof.model import Answer
from forkproof.program import Function
from tests.unit.analysis.snippets import BUILDS, MACHINES, Build, Case, findings_of, parameters, program

_RUN = "static void *run(void *p) { work(1); return p; } static void *other(void *p) { work(2); return p; }"
_JOB = """
    struct job { void *(*function)(void *); void *argument; };
    NOINLINE static void *trampoline(void *p) { struct job *j = p; return j->function(j->argument); }
    NOINLINE void start(void *(*f)(void *), void *argument) {
        pthread_t t; struct job *j = malloc(sizeof *j); j->function = f; j->argument = argument;
        pthread_create(&t, 0, trampoline, j);
    }
"""
_TABLE = """
    struct table { void (*drop)(void *); long size; void *(*call)(void *); };
    struct object { const struct table *table; long more; };
    static void drop(void *p) { work(3); }
    static void *method(void *p) { run(p); return p; }
    static const struct table table = { drop, 8, method };
    NOINLINE static void *proxy(void *p) { struct object *o = p; return o->table->call(o); }
    NOINLINE void start(struct object *o) { pthread_t t; pthread_create(&t, 0, proxy, o); }
"""

#: What begins in a thread, as names.
STARTED = (
    Case(
        "wrapper",
        "run",
        _RUN
        + """
        NOINLINE void start(void *(*f)(void *)) { pthread_t t; pthread_create(&t, 0, f, 0); work(4); }
        int main(void) { start(run); return ask(); }""",
    ),
    Case(
        "wrapper_of_a_wrapper",
        "run",
        _RUN
        + """
        NOINLINE void start(int n, void *(*f)(void *)) { pthread_t t; pthread_create(&t, 0, f, 0); work(n); }
        NOINLINE void begin(void *(*f)(void *)) { start(5, f); work(6); }
        int main(void) { begin(run); return ask(); }""",
    ),
    Case(
        "two_callers",
        "other run",
        _RUN
        + """
        NOINLINE void start(void *(*f)(void *)) { pthread_t t; pthread_create(&t, 0, f, 0); work(4); }
        NOINLINE void one(void) { start(run); work(7); }
        int main(void) { one(); start(other); return ask(); }""",
    ),
    Case("in_a_field", "run trampoline", _RUN + _JOB + "int main(void) { start(run, 0); return ask(); }"),
    Case(
        "in_a_table",
        "method proxy",
        _RUN
        + _TABLE
        + """
        int main(void) {
            struct object *o = malloc(sizeof *o); o->table = &table; o->more = 1; start(o); return ask();
        }""",
    ),
    Case(
        "in_a_table_on_the_stack",
        "method proxy",
        _RUN
        + _TABLE
        + """
        int main(void) { struct object o = { &table, 1 }; start(&o); return ask(); }""",
    ),
    Case(
        "timer",
        "tick",
        """
        static void tick(union sigval v) { work(1); }
        int main(void) {
            timer_t t; struct sigevent e = { 0 }; e.sigev_notify = SIGEV_THREAD; e.sigev_notify_function = tick;
            timer_create(CLOCK_MONOTONIC, &e, &t); return ask();
        }""",
    ),
    Case(
        "timer_that_signals",
        "",
        """
        int main(void) {
            timer_t t; struct sigevent e = { 0 }; e.sigev_notify = SIGEV_SIGNAL; e.sigev_signo = SIGUSR1;
            timer_create(CLOCK_MONOTONIC, &e, &t); return ask();
        }""",
    ),
    Case(
        "is_only_kept",
        "other",
        _RUN
        + """
        void *(*kept)(void *);
        NOINLINE void keep(void *(*f)(void *)) { pthread_t t; kept = f; pthread_create(&t, 0, other, 0); }
        int main(void) { keep(run); return ask(); }""",
    ),
    Case(
        "another_field",
        "trampoline",
        _RUN
        + """
        struct job { void *(*function)(void *); void *(*argument)(void *); };
        NOINLINE static void *trampoline(void *p) { struct job *j = p; return j->function(j->argument); }
        NOINLINE void start(void *(*f)(void *)) {
            pthread_t t; struct job *j = calloc(1, sizeof *j); j->argument = f; pthread_create(&t, 0, trampoline, j);
        }
        int main(void) { start(run); return ask(); }""",
    ),
    Case(
        "is_not_known",
        "",
        _RUN
        + """
        NOINLINE void *(*choose(void))(void *) { return ask() ? run : other; }
        NOINLINE void start(void *(*f)(void *)) { pthread_t t; pthread_create(&t, 0, f, 0); work(4); }
        int main(void) { start(choose()); return ask(); }""",
    ),
)


def _started(found: Facts) -> str:
    graph = found.flow.graph
    edges = (graph.kind == EdgeKind.THREAD).nonzero()[0].tolist()
    own = [e for e in edges if graph.program.object_of(Function(int(graph.source[e]))) == 0]
    return " ".join(sorted({found.flow.name(Function(int(graph.target[e]))) for e in own}))


@pytest.mark.parametrize(("case", "build"), parameters(STARTED, BUILDS))
def test_a_thread_begins_in_what_is_handed_over(case: Case, build: Build) -> None:
    assert _started(program(build, case.text)) == case.expected


_RUNTIME = """
    struct table { void (*drop)(void *); long size, align; int (*call)(void *); };
    static void drop(void *p) { work(3); }
    static int shim(void *closure) { int (**f)(void) = closure; return (*f)(); }
    static const struct table table = { drop, 8, 8, shim };
    NOINLINE static int runtime(void *closure, const struct table *t, int argc) { work(argc); return t->call(closure); }
    NOINLINE static int real(void) { if (fork() == 0) { work(1); _exit(0); } return ask(); }
"""


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_main_that_hands_the_programs_own_main_to_a_runtime(build: Build) -> None:
    code = _RUNTIME + "int main(int c, char **v) { int (*f)(void) = real; return runtime(&f, &table, c); }"
    (window,) = program(build, code).windows
    assert window.reachable is Answer.YES
    assert window.threads is Answer.NO


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_runtime_that_calls_another_function_of_the_table_does_not_lead_to_it(build: Build) -> None:
    code = _RUNTIME.replace("return t->call(closure)", "t->drop(closure); return 0")
    code += "int main(int c, char **v) { int (*f)(void) = real; return runtime(&f, &table, c); }"
    (window,) = program(build, code).windows
    assert window.reachable is Answer.UNKNOWN


_LOCKED = """
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    NOINLINE static void bump(void) { pthread_mutex_lock(&lock); work(1); pthread_mutex_unlock(&lock); }
"""


@pytest.mark.parametrize("build", MACHINES, ids=str)
@pytest.mark.parametrize(
    ("loop", "severities"),
    [
        ("for (;;) bump();", ["high"]),
        ("bump(); exit(1);", []),  # it takes the lock on its way out, once
    ],
)
def test_a_thread_whose_loop_never_ends_is_no_way_to_die(build: Build, loop: str, severities: list[str]) -> None:
    code = (
        _LOCKED
        + f"NOINLINE static void forever(void) {{ {loop} }}"
        + """
        static void *run(void *p) { forever(); return p; }
        int main(void) {
            pthread_t t; pthread_create(&t, 0, run, 0);
            if (fork() == 0) { bump(); _exit(0); }
            return 0;
        }"""
    )
    found = [f for f in findings_of(program(build, code)) if f.rule == "inherited-lock"]
    assert [f.severity.value for f in found] == severities
