"""Rules about single fork windows and single handlers: vfork-misuse, handlers-skipped, threads-lost, handler-unsafe."""

from __future__ import annotations

import pytest

from forkproof.model import Finding, Severity
from tests.unit.analysis.snippets import BUILDS, MACHINES, Build, Case, findings_of, library, parameters, program

pytestmark = pytest.mark.together("build")

_UP = "pthread_t t; pthread_create(&t, 0, idle, 0);"
_IDLE = "static void *idle(void *p) { for (;;) work(1); return p; }"


def _of(rule: str, found: list[Finding]) -> str:
    """The severities of a rule's findings, most severe first."""
    return " ".join(sorted((f.severity.value for f in found if f.rule == rule), key=[s.value for s in Severity].index))


VFORK = (
    Case(
        "exec_only",
        "",
        'int main(int c, char **v) { if (vfork() == 0) { execv("/bin/true", v); _exit(1); } return 0; }',
    ),
    Case("exit_only", "", "int main(void) { if (vfork() == 0) _exit(1); return 0; }"),
    Case(
        "returns",
        "high",
        "NOINLINE int start(void) { int pid = vfork(); work(pid); return pid; } int main(void) { return start(); }",
    ),
    Case("allocates", "medium", "int main(void) { if (vfork() == 0) { free(malloc(5)); _exit(0); } return 0; }"),
    Case(
        "allocates_in_a_function_that_exits",
        "",
        """
        NOINLINE void fatal(void) { free(malloc(3)); exit(1); }
        int main(int c, char **v) { if (vfork() == 0) { execv("/bin/true", v); fatal(); } return 0; }""",
    ),
    Case("waits", "low", "int main(void) { if (vfork() == 0) { sleep(1); _exit(0); } return 0; }"),
    Case("parent_allocates", "", "int main(void) { if (vfork() == 0) _exit(0); free(malloc(5)); return 0; }"),
    Case(
        "writes_a_global_that_the_parent_reads",
        "low",
        "static volatile int failed;"
        "int main(int c, char **v) { if (vfork() == 0) { execv(v[0], v); failed = 1; _exit(1); } return failed; }",
        only=("x86_64",),
    ),
    Case(
        "writes_a_local_that_the_parent_reads",
        "low",
        "int main(int c, char **v) { volatile int failed = 0;"
        " if (vfork() == 0) { execv(v[0], v); failed = 1; _exit(1); } return failed; }",
    ),
    Case(
        "writes_what_only_the_child_reads",
        "",
        "int main(int c, char **v) { if (vfork() == 0) { volatile int mine = c; work(mine); execv(v[0], v); _exit(1); }"
        " return 0; }",
    ),
    Case("posix_spawn", "", 'int main(int c, char **v) { pid_t p; return posix_spawn(&p, "/bin/true", 0, 0, v, v); }'),
)


@pytest.mark.parametrize(("case", "build"), parameters(VFORK, MACHINES))
def test_vfork_misuse(case: Case, build: Build) -> None:
    assert _of("vfork-misuse", findings_of(program(build, case.code))) == case.expected


_OWNER = """
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
void owner_use(void) { pthread_mutex_lock(&lock); work(1); pthread_mutex_unlock(&lock); }
static void prepare(void) { pthread_mutex_lock(&lock); }
static void release(void) { pthread_mutex_unlock(&lock); }
__attribute__((constructor)) static void hook(void) { pthread_atfork(prepare, release, release); }
"""
_RESETTER = """
static int cached; void owner_use(void) { work(cached); }
static void child(void) { cached = 0; }
__attribute__((constructor)) static void hook(void) { pthread_atfork(0, 0, child); }
"""
_PLAIN = "void owner_use(void) { work(1); }"

SKIPPED = (
    Case("underscore_fork", "medium", "int main(void) { UP if (_Fork() == 0) { owner_use(); _exit(0); } return 0; }"),
    Case("fork", "", "int main(void) { UP if (fork() == 0) { owner_use(); _exit(0); } return 0; }"),
    Case("without_threads", "low", "int main(void) { if (_Fork() == 0) { owner_use(); _exit(0); } return 0; }"),
    Case("child_does_not_use_it", "", "int main(void) { UP owner_use(); if (_Fork() == 0) _exit(0); return 0; }"),
)


@pytest.mark.parametrize(("case", "build"), parameters(SKIPPED, MACHINES))
def test_handlers_skipped(case: Case, build: Build) -> None:
    code = _IDLE + "extern void owner_use(void);" + case.code.replace("UP", _UP)
    owner = library(build, "owner", _OWNER)
    assert _of("handlers-skipped", findings_of(program(build, code, owner))) == case.expected


@pytest.mark.parametrize(("owner", "expected"), [(_RESETTER, "low"), (_PLAIN, "")], ids=["resets", "none"])
@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_handlers_that_lock_nothing_weigh_less(build: Build, owner: str, expected: str) -> None:
    code = _IDLE + "extern void owner_use(void);" + SKIPPED[0].code.replace("UP", _UP)
    found = program(build, code, library(build, "owner", owner))
    assert _of("handlers-skipped", findings_of(found)) == expected


_WORKER = """
static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER, other = PTHREAD_COND_INITIALIZER;
NOINLINE static void *worker(void *p) { for (;;) { work(1); pthread_cond_broadcast(&changed); } return p; }
NOINLINE static void start(void) { pthread_t t; pthread_create(&t, 0, worker, 0); work(1); }
NOINLINE static void need(void) { pthread_mutex_lock(&m); pthread_cond_wait(&changed, &m); pthread_mutex_unlock(&m); }
NOINLINE static void daemonize(void) { if (fork() > 0) _exit(0); work(2); }
"""
LOST = (
    Case("needed", "high", "int main(void) { start(); daemonize(); need(); return 0; }"),
    Case("not_seen_to_be_needed", "low", "int main(void) { start(); daemonize(); work(5); return 0; }"),
    Case("started_afterwards", "", "int main(void) { daemonize(); start(); need(); return 0; }"),
    Case("started_again", "", "int main(void) { start(); daemonize(); start(); need(); return 0; }"),
    Case(
        "started_again_by_a_handler",
        "",
        "int main(void) { pthread_atfork(0, 0, start); start(); daemonize(); need(); return 0; }",
    ),
    Case("child_exits", "", "int main(void) { start(); if (fork() == 0) { work(3); _exit(0); } need(); return 0; }"),
    Case(
        "by_a_constructor",
        "high",
        "__attribute__((constructor)) static void up(void) { start(); }"
        "int main(void) { daemonize(); need(); return 0; }",
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(LOST, MACHINES))
def test_threads_lost(case: Case, build: Build) -> None:
    assert _of("threads-lost", findings_of(program(build, _WORKER + case.code))) == case.expected


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_threads_lost_at_every_level_of_optimisation(build: Build) -> None:
    found = [f for f in findings_of(program(build, _WORKER + LOST[0].code)) if f.rule == "threads-lost"]
    assert [f.severity for f in found] == [Severity.HIGH]
    assert found[0].requester[-1].function == "pthread_cond_wait"


HANDLERS = (
    Case("locks", "", "static void h(void) { pthread_mutex_lock(&m); pthread_mutex_unlock(&m); } REGISTER(h, h, h)"),
    Case("joins_in_the_child", "medium", "static void h(void) { pthread_join(thread, 0); } REGISTER(0, 0, h)"),
    Case("joins_before", "low", "static void h(void) { pthread_join(thread, 0); } REGISTER(h, 0, 0)"),
    Case("starts_a_thread", "low", _IDLE + "static void h(void) { " + _UP + " } REGISTER(0, 0, h)"),
    Case("registers", "note", "static void h(void) { pthread_atfork(0, 0, 0); } REGISTER(0, 0, h)"),
    Case("allocates_with_libc", "", "static void h(void) { free(malloc(5)); } REGISTER(h, h, h)"),
    Case("never_registered", "", "void h(void) { pthread_join(thread, 0); } int main(void) { return 0; }"),
    Case(
        "joins_when_it_dies",
        "",
        "NOINLINE void fatal(void) { pthread_join(thread, 0); exit(1); }"
        "static void h(void) { if (ask()) fatal(); } REGISTER(0, 0, h)",
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(HANDLERS, MACHINES))
def test_handler_unsafe(case: Case, build: Build) -> None:
    """With the compilers' glibc, 2.36 or later, which drops its lock around each handler."""
    code = "static pthread_t thread; static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;" + case.code.replace(
        "REGISTER", "#define REGISTER(a, b, c) int main(void) { pthread_atfork(a, b, c); return fork(); }\nREGISTER"
    ).replace("#define", "\n#define")
    assert _of("handler-unsafe", findings_of(program(build, code))) == case.expected
