"""A program's own lock, over libc alone: who is seen to hold it, and who to ask for it. Each hang has a clean twin."""

from __future__ import annotations

import pytest

from forkproof.model import Finding, Severity
from tests.unit.analysis.snippets import MACHINES, Build, Case, findings_of, parameters, program

pytestmark = pytest.mark.together("build")

_LOG = """
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
NOINLINE void log_line(const char *s) { pthread_mutex_lock(&lock); work(s[0]); pthread_mutex_unlock(&lock); }
"""
_WRITER = "static void *writer(void *p) { for (;;) log_line(p); return p; }"
_UP = 'pthread_t t; pthread_create(&t, 0, writer, "x");'


def _own(found: list[Finding]) -> list[Finding]:
    return [f for f in found if f.rule == "inherited-lock"]


#: What a child does that never comes back to where it forked. Expected: severity of the finding; empty for none.
CHILDREN = (
    Case(
        "child_main",
        "high",
        """
        NOINLINE static void child_main(void) { log_line("c"); _exit(0); }
        int main(void) { @UP if (fork() == 0) child_main(); return ask(); }""",
    ),
    Case(
        "child_main_that_does_not_log",
        "",
        """
        NOINLINE static void child_main(void) { work(2); _exit(0); }
        int main(void) { @UP if (fork() == 0) child_main(); return ask(); }""",
    ),
    Case(
        "child_main_in_two_steps",
        "medium",
        """
        NOINLINE static void run(void) { log_line("c"); _exit(0); }
        NOINLINE static void child_main(int n) { work(n); run(); }
        int main(void) { @UP if (fork() == 0) { close(0); child_main(4); } return ask(); }""",
    ),
    Case(
        "after_descriptors_are_closed",
        "high",
        """
        NOINLINE static void child_main(void) { log_line("c"); _exit(0); }
        int main(void) {
            @UP
            if (fork() == 0) { for (int i = 3; i < 99; i++) close(i); if (setsid() < 0) _exit(1); child_main(); }
            return ask();
        }""",
    ),
    Case(
        "fatal",
        "",
        """
        NOINLINE static void fatal(const char *s) { log_line(s); exit(1); }
        int main(void) { @UP if (fork() == 0) { if (ask() > 1) fatal("c"); _exit(0); } return ask(); }""",
    ),
    Case(
        "fatal_after_exec",
        "",
        """
        NOINLINE static void fatal(const char *s) { log_line(s); exit(1); }
        int main(int c, char **v) { @UP if (fork() == 0) { execv(v[0], v); fatal("c"); } return ask(); }""",
    ),
    Case(
        "fatal_out_of_a_loop",
        "",
        """
        NOINLINE static void fatal(const char *s) { log_line(s); exit(1); }
        int main(void) { @UP if (fork() == 0) { for (;;) { work(3); if (ask() > 1) fatal("c"); } } return ask(); }""",
    ),
    Case(
        "fatal_in_child_main",
        "",
        """
        NOINLINE static void fatal(const char *s) { log_line(s); exit(1); }
        NOINLINE static void child_main(void) { if (ask() > 1) fatal("c"); work(2); _exit(0); }
        int main(void) { @UP if (fork() == 0) child_main(); return ask(); }""",
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(CHILDREN, MACHINES))
def test_a_child_that_never_comes_back(case: Case, build: Build) -> None:
    code = _LOG + _WRITER + case.code.replace("@UP", _UP)
    assert " ".join(f.severity.value for f in _own(findings_of(program(build, code)))) == case.expected


#: What lies between a child and a lock. Expected: severity of the finding, or empty for none above low.
BETWEEN = (
    Case(
        "a_report_that_stands_still",
        "",
        """
        NOINLINE static int one(int n) { if (n > 9) { log_line("too many"); for (;;); } return n + ask(); }
        NOINLINE static int two(int n) { if (n > 8) { log_line("too many"); for (;;); } return one(n) + ask(); }
        NOINLINE static int three(int n) { if (n > 7) { log_line("too many"); for (;;); } return two(n) + ask(); }
        int main(void) { @UP if (fork() == 0) { work(three(ask())); _exit(0); } return ask(); }""",
    ),
    Case(
        "a_report_of_which_one_does_not_stand_still",
        "high",
        """
        NOINLINE static int one(int n) { if (n > 9) { log_line("too many"); for (;;); } return n + ask(); }
        NOINLINE static int two(int n) { if (n > 8) { log_line("too many"); for (;;); } return one(n) + ask(); }
        NOINLINE static int three(int n) { if (n > 7) log_line("too many"); return two(n) + ask(); }
        int main(void) { @UP if (fork() == 0) { work(three(ask())); _exit(0); } return ask(); }""",
    ),
    Case(
        "a_switch_that_main_computes",
        "high",
        """
        static int verbose;
        NOINLINE static void note(void) { if (verbose) log_line("c"); }
        NOINLINE static void set_up(int n) { verbose = n; }
        int main(int c, char **v) { set_up(c > 1 ? atoi(v[1]) : 1); @UP
            if (fork() == 0) { note(); _exit(0); } return ask(); }""",
    ),
    Case(
        "what_is_not_known_yet",
        "high",
        """
        static int threaded = -1;
        NOINLINE void look(void) { threaded = ask() ? 1 : 0; }
        NOINLINE static void note(void) { if (threaded < 0) look(); if (threaded != 0) log_line("c"); }
        int main(void) { @UP if (fork() == 0) { note(); _exit(0); } return ask(); }""",
    ),
    Case(
        "a_hook_that_is_loaded_before_a_branch",
        "medium",
        """
        static void plain(const char *s) { log_line(s); }
        static void (*volatile hook)(const char *) = plain;
        void set_hook(void (*f)(const char *)) { hook = f; }
        NOINLINE void note(const char *s) {
            void (*f)(const char *) = hook; if (ask() > 5) work(2); else work(1); if (f) f(s); work(3); }
        int main(void) { @UP if (fork() == 0) { note("c"); _exit(0); } return ask(); }""",
    ),
    Case(
        "a_switch_that_the_child_turns_off",
        "",
        """
        static int logging; NOINLINE void set_up(int n) { logging = n; }
        NOINLINE static void note(void) { if (logging) log_line("c"); }
        int main(void) { set_up(1); @UP if (fork() == 0) { logging = 0; note(); _exit(0); } return ask(); }""",
    ),
    Case(
        "a_switch_that_a_function_of_the_child_turns",
        "",
        """
        static int is_closed;
        NOINLINE static void note(void) { if (is_closed) return; log_line("c"); }
        NOINLINE void close_log(void) { is_closed = 1; }
        int main(void) { @UP if (fork() == 0) { close_log(); note(); _exit(0); } return ask(); }""",
    ),
    Case(
        "a_switch_that_the_child_turns_on",
        "high",
        """
        static int logging; NOINLINE void set_up(int n) { logging = n; }
        NOINLINE static void note(void) { if (logging) log_line("c"); }
        int main(void) { set_up(1); @UP if (fork() == 0) { logging = 2; note(); _exit(0); } return ask(); }""",
    ),
    Case(
        "a_switch_that_is_on_at_zero",
        "high",
        """
        static int quiet = 1; NOINLINE void set_up(void) { quiet = 0; }
        NOINLINE static void say(void) {
            if (!quiet) pthread_mutex_lock(&lock); work(1); if (!quiet) pthread_mutex_unlock(&lock); }
        int main(void) { set_up(); @UP if (fork() == 0) { say(); _exit(0); } return ask(); }""",
    ),
    Case(
        "what_is_set_back_again",
        "high",
        """
        static int is_valid; NOINLINE void invalidate(void) { is_valid = 0; }
        NOINLINE static void fill(void) { if (is_valid) return; log_line("c"); is_valid = 1; }
        int main(void) { @UP if (fork() == 0) { invalidate(); fill(); _exit(0); } return ask(); }""",
    ),
    Case(
        "the_caller_of_what_forks_holds_it",
        "",
        """
        NOINLINE int spawn(void) {
            int pid = fork();
            if (pid == 0) { pthread_mutex_unlock(&lock); log_line("c"); _exit(0); } return pid; }
        int main(void) { @UP pthread_mutex_lock(&lock); int pid = spawn(); pthread_mutex_unlock(&lock);
            return pid; }""",
    ),
    Case(
        "one_of_two_callers_of_what_forks_holds_it",
        "high",
        """
        NOINLINE int spawn(void) { int pid = fork(); if (pid == 0) { log_line("c"); _exit(0); } return pid; }
        int main(void) { @UP pthread_mutex_lock(&lock); int pid = spawn(); pthread_mutex_unlock(&lock);
            return pid + spawn(); }""",
    ),
    Case(
        "another_lock_is_made",
        "high",
        """
        NOINLINE pthread_mutex_t *make(void) {
            pthread_mutex_t *made = malloc(sizeof *made); pthread_mutex_init(made, 0); return made; }
        pthread_mutex_t *mine;
        int main(void) { @UP if (fork() == 0) { mine = make(); log_line("c"); _exit(0); } return ask(); }""",
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(BETWEEN, MACHINES))
def test_what_lies_between_a_child_and_a_lock(case: Case, build: Build) -> None:
    code = _LOG + _WRITER + case.code.replace("@UP", _UP)
    found = [f.severity for f in _own(findings_of(program(build, code))) if f.severity.rank < Severity.LOW.rank]
    assert " ".join(severity.value for severity in found) == case.expected


_OBJECT = """
struct log { pthread_mutex_t m; int n; }; static struct log *g;
NOINLINE static void say(void) { pthread_mutex_lock(&g->m); work(g->n++); pthread_mutex_unlock(&g->m); }
static void *sayer(void *p) { for (;;) say(); return p; }
NOINLINE static void open_log(void) {
    struct log *l = malloc(sizeof *l); if (!l) return; pthread_mutex_init(&l->m, 0); g = l; }
NOINLINE static struct log *new_log(void) {
    struct log *l = calloc(1, sizeof *l); pthread_mutex_init(&l->m, 0); return l; }
NOINLINE static void set_log(struct log *l) { g = l; }
NOINLINE static struct log *get_log(void) { if (!g) g = calloc(1, sizeof *g); return g; }
NOINLINE static void tell(void) {
    struct log *l = get_log(); pthread_mutex_lock(&l->m); work(2); pthread_mutex_unlock(&l->m); }
"""

#: What a child does to the object whose lock it asks for. Expected: severity of the finding, or empty for none.
OBJECTS = (
    Case("nothing", "high", "say();"),
    Case("one_is_made_unless_memory_is_out", "", "open_log(); say();"),
    Case("one_is_made_and_set", "", "set_log(new_log()); say();"),
    Case("the_same_is_set", "high", "set_log(get_log()); say();"),
    Case("one_is_made_and_forgotten", "high", "new_log(); say();"),
    Case("it_is_got", "high", "tell();"),
)


@pytest.mark.parametrize(("case", "build"), parameters(OBJECTS, MACHINES))
def test_what_a_child_does_to_an_object(case: Case, build: Build) -> None:
    main = f"int main(void) {{ open_log(); @UP if (fork() == 0) {{ {case.code} _exit(0); }} return ask(); }}"
    code = _OBJECT + main.replace("@UP", _UP.replace("writer", "sayer"))
    found = [f.severity.value for f in _own(findings_of(program(build, code))) if f.severity.rank < Severity.LOW.rank]
    assert " ".join(found) == case.expected


_QUEUE = """
struct job { void (*run)(void *); void *data; struct job *next; void (*done)(void *); };
static struct job *head; static pthread_mutex_t queue = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
NOINLINE void submit(void (*run)(void *), void *data, void (*done)(void *)) {
    struct job *j = malloc(sizeof *j); j->run = run; j->data = data; j->done = done;
    pthread_mutex_lock(&queue); j->next = head; head = j; pthread_cond_signal(&more); pthread_mutex_unlock(&queue);
}
NOINLINE void submit_plainly(void (*run)(void *), void *data) { submit(run, data, 0); }
NOINLINE static struct job *take(void) {
    pthread_mutex_lock(&queue); while (!head) pthread_cond_wait(&more, &queue);
    struct job *j = head; head = j->next; pthread_mutex_unlock(&queue); return j;
}
static void *worker(void *p) { for (;;) { struct job *j = take(); j->run(j->data); free(j); } return p; }
"""
_RING = """
struct task { void (*run)(void *); void *data; };
static struct task ring[64]; static unsigned in, out;
NOINLINE void submit(void (*run)(void *), void *data) {
    struct task *t = &ring[in++ % 64]; t->run = run; t->data = data;
}
static void *worker(void *p) {
    for (;;) { while (ask() > 1) work(1); struct task t = ring[out++ % 64]; work(2); t.run(t.data); } return p;
}
"""
_LOOP = """
struct watcher { struct watcher *next; int fd; void (*ready)(struct watcher *, int); void (*gone)(struct watcher *); };
struct loop { struct watcher *first; int runs; };
NOINLINE void watch(struct watcher *w, void (*ready)(struct watcher *, int), void (*gone)(struct watcher *)) {
    w->fd = 1; w->ready = ready; w->gone = gone;
}
NOINLINE static void run(struct loop *l) {
    while (l->runs) for (struct watcher *w = l->first; w; w = w->next) w->ready(w, w->fd);
}
static void *worker(void *p) { run(p); return p; }
"""
_VARIABLE = """
static void (*notify)(void *); static void *subject;
NOINLINE void on_event(void (*f)(void *), void *data) { notify = f; subject = data; }
static void *worker(void *p) { for (;;) { if (notify) notify(subject); work(1); } return p; }
"""
_TABLE = """
static void first(void *p) { work(5); }
static const struct kind { long number; void (*run)(void *); } kinds[] = { {1, first}, {2, TASK}, {3, first} };
static const struct kind others[] = { {1, first}, {2, OTHER} };
NOINLINE const struct kind *other(void) { return &others[ask()]; }
static void *worker(void *p) { for (;;) kinds[ask()].run(p); return p; }
"""
_TASK = "static void task(void *p) { for (;;) log_line(p); } static void quiet(void *p) { work(4); }"
_READY = """
static void logs(struct watcher *w, int n) { log_line("x"); }
static void is_quiet(struct watcher *w, int n) { work(n); }
static void logs_end(struct watcher *w) { log_line("x"); }
"""
_START = "pthread_t t; pthread_create(&t, 0, worker, 0);"
_LOUD_TABLE = _TABLE.replace("TASK", "task").replace("OTHER", "quiet")
_QUIET_TABLE = _TABLE.replace("TASK", "quiet").replace("OTHER", "task")
_FORK = 'if (fork() == 0) { log_line("c"); _exit(0); } return ask(); }'
_ADD = "struct watcher *w = calloc(1, sizeof *w); struct loop *l = calloc(1, sizeof *l); l->first = w; l->runs = 1;"
_RUN = "pthread_t t; pthread_create(&t, 0, worker, l);"

_WATCHER = """static void *watcher(void *p) {
    for (;;) if (open("/dev/null", O_RDWR) < 0) { work(errno); log_line("t"); } else work(3); return p; }"""

#: Who logs only where something has failed. Expected: severity of the finding.
FAILED = (
    Case(
        "nobody",
        "high",
        f'{_WRITER} int main(void) {{ {_UP} if (fork() == 0) {{ log_line("c"); _exit(0); }} return ask(); }}',
    ),
    Case(
        "the_thread",
        "low",
        f"""{_WATCHER} int main(void) {{ pthread_t t; pthread_create(&t, 0, watcher, 0);
            if (fork() == 0) {{ log_line("c"); _exit(0); }} return ask(); }}""",
    ),
    Case(
        "the_child",
        "low",
        f"""{_WRITER} int main(void) {{ {_UP}
            if (fork() == 0) {{ if (chdir("/") < 0) {{ work(errno); log_line("c"); }} _exit(0); }} return ask(); }}""",
    ),
    Case(
        "the_child_which_logs_later_too",
        "high",
        f"""{_WRITER} int main(void) {{ {_UP}
            if (fork() == 0) {{ if (chdir("/") < 0) {{ work(errno); log_line("c"); }} log_line("d"); _exit(0); }}
            return ask(); }}""",
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(FAILED, MACHINES))
def test_a_lock_that_is_asked_for_only_after_a_failure(case: Case, build: Build) -> None:
    found = _own(findings_of(program(build, _LOG + case.code)))
    assert [f.severity.value for f in found] == [case.expected]


#: What a thread calls through a field. Expected: severity and verdict of the finding; empty for none.
KEPT = (
    Case("job", "medium suspected", f'{_QUEUE}{_TASK} int main(void) {{ {_START} submit(task, "x", quiet); {_FORK}'),
    Case(
        "job_that_logs_far_below",
        "low suspected",
        f"""{_QUEUE}
        NOINLINE static void six(void *p) {{ log_line(p); work(6); }}
        NOINLINE static void five(void *p) {{ six(p); work(5); }}
        NOINLINE static void four(void *p) {{ five(p); work(4); }}
        NOINLINE static void three(void *p) {{ four(p); work(3); }}
        NOINLINE static void two(void *p) {{ three(p); work(2); }}
        static void task(void *p) {{ two(p); work(1); }}
        static void quiet(void *p) {{ work(0); }}
        int main(void) {{ {_START} submit(task, "x", quiet); {_FORK}""",
    ),
    Case("job_that_is_quiet", "", f'{_QUEUE}{_TASK} int main(void) {{ {_START} submit(quiet, "x", task); {_FORK}'),
    Case(
        "wrapper", "medium suspected", f'{_QUEUE}{_TASK} int main(void) {{ {_START} submit_plainly(task, "x"); {_FORK}'
    ),
    Case("wrapper_and_quiet", "", f'{_QUEUE}{_TASK} int main(void) {{ {_START} submit_plainly(quiet, "x"); {_FORK}'),
    Case(
        "filled_in_place",
        "medium suspected",
        f"""{_QUEUE}{_TASK} int main(void) {{
            {_START} struct job *j = calloc(1, sizeof *j); j->run = task; j->data = "x"; head = j; {_FORK}""",
    ),
    Case("ring", "medium suspected", f'{_RING}{_TASK} int main(void) {{ {_START} submit(task, "x"); {_FORK}'),
    Case("ring_and_quiet", "", f'{_RING}{_TASK} int main(void) {{ {_START} submit(quiet, "x"); {_FORK}'),
    Case("loop", "medium suspected", f"{_LOOP}{_READY} int main(void) {{ {_ADD} watch(w, logs, 0); {_RUN} {_FORK}"),
    Case(
        "loop_and_quiet", "", f"{_LOOP}{_READY} int main(void) {{ {_ADD} watch(w, is_quiet, logs_end); {_RUN} {_FORK}"
    ),
    Case(
        "table",
        "medium suspected",
        f"{_TASK}{_LOUD_TABLE} int main(void) {{ {_START} other(); {_FORK}",
    ),
    Case(
        "another_table",
        "",
        f"{_TASK}{_QUIET_TABLE} int main(void) {{ {_START} other(); {_FORK}",
    ),
    Case("variable", "medium suspected", f'{_VARIABLE}{_TASK} int main(void) {{ on_event(task, "x"); {_START} {_FORK}'),
    Case("variable_and_quiet", "", f'{_VARIABLE}{_TASK} int main(void) {{ on_event(quiet, "x"); {_START} {_FORK}'),
)


@pytest.mark.parametrize(("case", "build"), parameters(KEPT, (*MACHINES, Build("x86_64", ("-O0",)))))
def test_what_a_thread_calls_through_a_field(case: Case, build: Build) -> None:
    found = _own(findings_of(program(build, _LOG + case.code)))
    assert " ".join(f"{f.severity.value} {f.verdict.value}" for f in found) == case.expected
    for finding in found:
        assert "field" in {frame.edge for frame in finding.holder}
        assert finding.conditions is not None
        assert "if that is what it finds in a field" in finding.conditions.holder


_CONTEXT = """
struct context { long users; pthread_mutex_t lock; };
struct start { void *(*run)(void *); void *data; char name[16]; };
static void *trampoline(void *p) { struct start s = *(struct start *)p; free(p); work(1); return s.run(s.data); }
NOINLINE int start(const char *name, void *(*run)(void *), void *data) {
    pthread_t t; struct start *s = malloc(sizeof *s); s->run = run; s->data = data; strncpy(s->name, name, 15);
    return pthread_create(&t, 0, trampoline, s);
}
NOINLINE static void touch(struct context *c) {
    pthread_mutex_lock(&c->lock); c->users++; pthread_mutex_unlock(&c->lock);
}
static void *worker(void *p) { for (;;) touch(p); return p; }
NOINLINE static struct context *make(void) {
    struct context *c = calloc(1, sizeof *c); pthread_mutex_init(&c->lock, 0); return c;
}
static struct context fixed = { 0, PTHREAD_MUTEX_INITIALIZER }, spare = { 0, PTHREAD_MUTEX_INITIALIZER };
static struct context *held, *apart;
"""

#: What a wrapper of pthread_create passes on to the thread. Expected: severity of the finding; empty for none.
CONTEXTS = (
    Case(
        "made", "medium", 'struct context *c = make(); start("w", worker, c); if (fork() == 0) { touch(c); _exit(0); }'
    ),
    Case(
        "another_made",
        "",
        'struct context *c = make(), *d = make(); start("w", worker, c); if (fork() == 0) { touch(d); _exit(0); }',
    ),
    Case("data", "high", 'start("w", worker, &fixed); if (fork() == 0) { touch(&fixed); _exit(0); }'),
    Case("other_data", "", 'start("w", worker, &fixed); if (fork() == 0) { touch(&spare); _exit(0); }'),
    Case("variable", "high", 'held = make(); start("w", worker, held); if (fork() == 0) { touch(held); _exit(0); }'),
    Case(
        "another_variable",
        "",
        'held = make(); apart = make(); start("w", worker, held); if (fork() == 0) { touch(apart); _exit(0); }',
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(CONTEXTS, MACHINES))
def test_a_lock_behind_what_a_wrapper_passes_to_a_thread(case: Case, build: Build) -> None:
    found = _own(findings_of(program(build, f"{_CONTEXT} int main(void) {{ {case.code} return ask(); }}")))
    assert " ".join(f.severity.value for f in found) == case.expected
