"""From facts to findings: which are made, how they rank, and that no sentence claims what was not found."""

from __future__ import annotations

import pytest

from forkproof.model import Answer, Finding, Severity, Verdict
from tests.unit.analysis.snippets import BUILDS, MACHINES, Build, Case, Plan, findings_of, library, parameters, program

pytestmark = pytest.mark.together("build")

_ALLOCATOR = """
static pthread_mutex_t heap = PTHREAD_MUTEX_INITIALIZER;
static char pool[1 << 20]; static size_t used;
NOINLINE static void *take(size_t n) { pthread_mutex_lock(&heap); void *p = pool + used; used += n;
    pthread_mutex_unlock(&heap); return p; }
void *malloc(size_t n) { return take(n); }
void free(void *p) { pthread_mutex_lock(&heap); work(1); pthread_mutex_unlock(&heap); }
void *calloc(size_t a, size_t b) { return take(a * b); }
void *realloc(void *p, size_t n) { return take(n); }
"""
_HANDLERS = """
static void prepare(void) { pthread_mutex_lock(&heap); }
static void release(void) { pthread_mutex_unlock(&heap); }
__attribute__((constructor)) static void hook(void) { pthread_atfork(prepare, release, release); }
"""
_CHURN = "static void *churn(void *p) { for (;;) free(malloc(10)); }"
_EARLY = _CHURN + "__attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, churn, 0); }"


def _unhooked(build: Build) -> Plan:
    return library(build, "heap", _ALLOCATOR)


def _hooked(build: Build) -> Plan:
    return library(build, "heap", _ALLOCATOR + _HANDLERS)


def _inherited(build: Build, code: str, *, hooked: bool = False) -> list[Finding]:
    found = program(build, code, _hooked(build) if hooked else _unhooked(build))
    return [f for f in findings_of(found) if f.rule == "inherited-lock"]


#: Over an allocator that has a lock and no handlers. Expected: severity and verdict of inherited-lock; empty for none.
CASES = (
    Case("daemon", "high reachable", _EARLY + "int main(void) { if (fork() > 0) _exit(0); return malloc(5) != 0; }"),
    Case(
        "child_works",
        "high reachable",
        _EARLY + "int main(void) { if (fork() == 0) { free(malloc(5)); _exit(0); } return ask(); }",
    ),
    Case("child_only_exits", "", _EARLY + "int main(void) { if (fork() == 0) _exit(0); return ask(); }"),
    Case(
        "child_only_execs",
        "",
        _EARLY + 'int main(int c, char **v) { if (fork() == 0) { execv("/bin/true", v); _exit(1); } return ask(); }',
    ),
    Case(
        "parent_allocates",
        "",
        _EARLY + "int main(void) { if (fork() == 0) _exit(0); free(malloc(5)); return ask(); }",
    ),
    Case(
        "allocated_before", "", _EARLY + "int main(void) { free(malloc(5)); if (fork() == 0) _exit(0); return ask(); }"
    ),
    Case("no_thread", "", "int main(void) { if (fork() > 0) _exit(0); return malloc(5) != 0; }"),
    Case(
        "thread_afterwards",
        "",
        _CHURN + "int main(void) { if (fork() > 0) _exit(0); pthread_t t; pthread_create(&t, 0, churn, 0); "
        "return malloc(5) != 0; }",
    ),
    Case("vfork", "", _EARLY + "int main(void) { if (vfork() == 0) { free(malloc(5)); _exit(0); } return ask(); }"),
    Case("spawn", "", _EARLY + 'int main(void) { return system("true"); }'),
    Case(
        "only_when_dying",
        "medium reachable",
        _EARLY
        + """
        NOINLINE void fatal(void) { free(malloc(3)); exit(1); }
        static void bye(void) { free(malloc(3)); }
        int main(void) { atexit(bye); if (fork() == 0) { if (ask()) exit(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "thread_by_table",
        "medium suspected",
        _CHURN
        + """
        static void up(void) { pthread_t t; pthread_create(&t, 0, churn, 0); }
        void (*table[])(void) = { up, up };
        int main(int c, char **v) { table[c & 1](); if (fork() > 0) _exit(0); return malloc(5) != 0; }""",
    ),
    Case(
        "thread_by_table_and_a_failure",
        "low suspected",
        _CHURN
        + """
        static void up(void) { pthread_t t; pthread_create(&t, 0, churn, 0); }
        void (*table[])(void) = { up, up };
        int main(int c, char **v) {
            table[c & 1]();
            if (fork() == 0) { if (chdir("/") < 0) free(malloc(3)); _exit(0); }
            return ask();
        }""",
    ),
    Case(
        "idle_thread",
        "medium suspected|",
        """
        static void *idle(void *p) { for (;;) work(1); }
        __attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, idle, 0); }
        int main(void) { if (fork() > 0) _exit(0); return malloc(5) != 0; }""",
    ),
    Case(
        "busy_thread_afterwards",
        "medium suspected|",
        _CHURN
        + """
        static void *idle(void *p) { for (;;) work(1); }
        __attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, idle, 0); }
        int main(void) {
            if (fork() > 0) _exit(0);
            pthread_t t; pthread_create(&t, 0, churn, 0);
            return malloc(5) != 0;
        }""",
    ),
    Case(
        "forks_from_a_thread",
        "high reachable",
        """
        static void *run(void *p) { if (fork() == 0) { free(malloc(5)); _exit(0); } return p; }
        int main(void) { pthread_t t; pthread_create(&t, 0, run, 0); for (;;) free(malloc(7)); }""",
    ),
    Case(
        "in_a_function_nothing_calls",
        "",
        _EARLY
        + """
        __attribute__((used)) static void lonely(void) { if (fork() == 0) { free(malloc(5)); _exit(0); } }
        int main(void) { return ask(); }""",
    ),
    Case(
        "stored_callback",
        "medium suspected|low suspected",
        _EARLY
        + """
        struct server { void (*accept)(void); } server;
        static void serve(void) { if (fork() == 0) { free(malloc(5)); _exit(0); } }
        int main(void) { server.accept = serve; work(1); server.accept(); return ask(); }""",
    ),
)

#: Over the same allocator with handlers that take its lock.
PROTECTED = (
    Case("daemon", "", _EARLY + "int main(void) { if (fork() > 0) _exit(0); return malloc(5) != 0; }"),
    Case("_Fork", "high reachable", _EARLY + "int main(void) { if (_Fork() > 0) _exit(0); return malloc(5) != 0; }"),
    Case(
        "raw_clone",
        "high reachable",
        _EARLY + "int main(void) { if (syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) > 0) _exit(0); return malloc(5) != 0; }",
    ),
    Case(
        "clone_with_vm",
        "",
        _EARLY + "int main(void) { if (syscall(SYS_clone, CLONE_VM | CLONE_VFORK | SIGCHLD, 0, 0, 0, 0) == 0) { "
        "free(malloc(5)); _exit(0); } return ask(); }",
    ),
    Case(
        "clone_with_unknown_flags",
        "medium suspected",
        _EARLY + "int main(int c) { if (syscall(SYS_clone, c, 0, 0, 0, 0) > 0) _exit(0); return malloc(5) != 0; }",
    ),
)


def _ranks(findings: list[Finding]) -> str:
    return " ".join(sorted(f"{f.severity.value} {f.verdict.value}" for f in findings))


@pytest.mark.parametrize(("case", "build"), parameters(CASES, MACHINES))
def test_rank_over_an_allocator_without_handlers(case: Case, build: Build) -> None:
    assert _ranks(_inherited(build, case.text)) in case.expected.split("|")


@pytest.mark.parametrize(("case", "build"), parameters(PROTECTED, MACHINES))
def test_rank_over_an_allocator_with_handlers(case: Case, build: Build) -> None:
    assert _ranks(_inherited(build, case.text, hooked=True)) in case.expected.split("|")


@pytest.mark.parametrize(("case", "build"), parameters(CASES, MACHINES))
def test_verdict_and_answers_agree(case: Case, build: Build) -> None:
    """`reachable` says that all four conditions were shown, and has a witness for each."""
    for finding in _inherited(build, case.text):
        assert finding.conditions is not None
        is_shown = all(a is Answer.YES for a in finding.conditions.answers)
        is_reachable = finding.verdict is Verdict.REACHABLE
        assert is_shown or not is_reachable
        assert ("can hang" in finding.message) == is_reachable
        assert finding.severity is not Severity.HIGH or is_reachable
        if is_reachable:
            assert finding.holder
            assert finding.requester


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_thread_that_starts_later_is_no_holder(build: Build) -> None:
    """The busy thread does not exist at the fork; the idle one holds nothing."""
    case = next(c for c in CASES if c.name == "busy_thread_afterwards")
    for finding in _inherited(build, case.text):
        assert finding.conditions is not None
        assert finding.conditions.answers[1] is not Answer.YES


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_unknown_threads_are_said_to_be_unknown(build: Build) -> None:
    case = next(c for c in CASES if c.name == "thread_by_table")
    (finding,) = _inherited(build, case.text)
    assert finding.conditions is not None
    assert finding.conditions.answers[0] is Answer.UNKNOWN
    assert "not known" in finding.conditions.threads


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_double_fork_is_one_finding(build: Build) -> None:
    code = _EARLY + "int main(void) { if (fork() > 0) _exit(0); if (fork() > 0) _exit(0); return malloc(5) != 0; }"
    (finding,) = _inherited(build, code)
    assert finding.count == 2


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_forks_in_two_functions_are_two_findings(build: Build) -> None:
    code = (
        _EARLY
        + """
        NOINLINE void one(void) { if (fork() == 0) { free(malloc(5)); _exit(0); } work(1); }
        NOINLINE void two(void) { if (fork() == 0) { free(malloc(5)); _exit(0); } work(2); }
        int main(void) { one(); two(); return ask(); }"""
    )
    found = _inherited(build, code)
    assert sorted(f.fork.function for f in found if f.fork) == ["one", "two"]
    assert len({f.id for f in found}) == 2


_STABLE = (
    _EARLY
    + """
NOINLINE void become_daemon(void) { if (fork() > 0) _exit(0); setsid(); if (fork() > 0) _exit(0); work(1); }
NOINLINE void job(void) { if (fork() == 0) { free(malloc(5)); _exit(0); } work(2); }
int main(void) { become_daemon(); job(); return malloc(5) != 0; }"""
)


@pytest.mark.parametrize("build", [b for b in BUILDS if b.flags != ("-O2",)], ids=str)
def test_ids_do_not_depend_on_how_it_was_compiled(build: Build) -> None:
    other = Build(build.machine)
    assert {f.id for f in _inherited(build, _STABLE)} == {f.id for f in _inherited(other, _STABLE)}


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_ids_do_not_depend_on_addresses(build: Build) -> None:
    padding = 'NOINLINE void padding(void) { asm volatile(".skip 4096"); }'
    assert {f.id for f in _inherited(build, padding + _STABLE)} == {f.id for f in _inherited(build, _STABLE)}


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_two_runs_say_the_same(build: Build) -> None:
    from tests.unit.analysis import snippets

    first = _inherited(build, _STABLE)
    snippets.analysed.cache_clear()
    assert _inherited(build, _STABLE) == first


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_the_cause_is_as_severe_as_the_worst_hang(build: Build) -> None:
    found = findings_of(program(build, _STABLE, _unhooked(build)))
    cause = next(f for f in found if f.rule == "atfork-absent")
    assert cause.severity is min((f.severity for f in found if f.rule == "inherited-lock"), key=lambda s: s.rank)
    assert cause.object == "libheap.so"


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_nothing_is_said_of_a_program_over_libc(build: Build) -> None:
    found = findings_of(program(build, _STABLE))
    assert [f for f in found if f.severity.rank < Severity.LOW.rank] == []
