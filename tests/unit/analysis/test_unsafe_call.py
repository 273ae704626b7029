"""Calls of libc in the child of a threaded program: which can hang, and which this libc's fork makes safe.

The libc is glibc, as the compilers of both machines have it.
"""

from __future__ import annotations

import pytest

from forkproof.libc_code import LibcLock
from forkproof.model import Answer, Finding, Severity, Verdict
from tests.unit.analysis.snippets import BUILDS, MACHINES, Build, Case, findings_of, parameters, program

pytestmark = pytest.mark.together("build")

_CLOCK = "static void *clock_thread(void *p) { struct tm m; time_t t = 0; for (;;) localtime_r(&t, &m); return p; }"
_EARLY = (
    _CLOCK
    + "__attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, clock_thread, 0); }"
)
_TELL = "struct tm m; time_t t = 0; localtime_r(&t, &m);"


def _unsafe(build: Build, code: str) -> list[Finding]:
    return [f for f in findings_of(program(build, code)) if f.rule == "unsafe-call"]


def _hangs(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.severity in (Severity.HIGH, Severity.MEDIUM)]


#: Expected: severity and verdict of the findings at medium or above, and what names the lock; empty for none.
CASES = (
    Case(
        "same_call",
        "high reachable time zone",
        _EARLY + f"int main(void) {{ if (fork() == 0) {{ {_TELL} _exit(0); }} return 0; }}",
    ),
    Case(
        "other_call_of_the_same_lock",
        "high reachable time zone",
        _EARLY + "int main(void) { if (fork() == 0) { tzset(); _exit(0); } return 0; }",
    ),
    Case(
        "daemon", "high reachable time zone", _EARLY + f"int main(void) {{ if (fork()) _exit(0); {_TELL} return 0; }}"
    ),
    Case(
        "one_call_below",
        "high reachable time zone",
        _EARLY
        + f"""
        NOINLINE void tell(void) {{ {_TELL} work(1); }}
        int main(void) {{ if (fork() == 0) {{ tell(); _exit(0); }} return 0; }}""",
    ),
    Case(
        "deeper",
        "medium reachable time zone",
        _EARLY
        + f"""
        NOINLINE void tell(void) {{ {_TELL} work(1); }}
        NOINLINE void a(void) {{ tell(); work(1); }} NOINLINE void b(void) {{ a(); work(2); }}
        int main(int c, char **v) {{ if (fork() == 0) {{ b(); execv(v[0], v); _exit(0); }} return 0; }}""",
    ),
    Case(
        "in_a_function_that_exits",
        "",
        _EARLY
        + f"""
        NOINLINE void fatal(void) {{ {_TELL} exit(1); }}
        int main(int c, char **v) {{
            if (fork() == 0) {{ if (ask()) fatal(); execv(v[0], v); _exit(0); }}
            return 0;
        }}""",
    ),
    Case(
        "only_after_a_failed_call",
        "",
        _EARLY
        + f"""
        int main(int c, char **v) {{
            if (fork() == 0) {{
                if (open("/dev/null", O_RDWR) < 0) {{ {_TELL} _exit(1); }}
                execv(v[0], v); _exit(0);
            }}
            return 0;
        }}""",
    ),
    Case(
        "only_where_errno_is_read",
        "",
        _EARLY
        + f"""
        int main(int c, char **v) {{
            if (fork() == 0) {{
                if (chdir("/")) {{ work(errno); {_TELL} _exit(1); }}
                execv(v[0], v); _exit(0);
            }}
            return 0;
        }}""",
    ),
    Case(
        "when_exec_comes_back",
        "",
        _EARLY + f"int main(int c, char **v) {{ if (fork() == 0) {{ execv(v[0], v); {_TELL} _exit(1); }} return 0; }}",
    ),
    Case(
        "whatever_the_call_says",
        "high reachable time zone",
        _EARLY
        + f"""
        int main(int c, char **v) {{
            if (fork() == 0) {{
                if (chdir("/")) work(errno);
                {_TELL} execv(v[0], v); _exit(0);
            }}
            return 0;
        }}""",
    ),
    Case(
        "after_errno_was_set",
        "high reachable time zone",
        _EARLY
        + f"int main(int c, char **v) {{ if (fork() == 0) {{ errno = 0; {_TELL} work(0); _exit(0); }} return 0; }}",
    ),
    Case(
        "thread_logs_failures_only",
        "",
        f"""
        static void *watcher(void *p) {{
            for (;;) if (open("/dev/null", O_RDWR) < 0) {{ work(errno); {_TELL} }}
            return p;
        }}
        __attribute__((constructor)) static void up(void) {{ pthread_t t; pthread_create(&t, 0, watcher, 0); }}
        int main(void) {{ if (fork() == 0) {{ {_TELL} _exit(0); }} return 0; }}""",
    ),
    Case(
        "thread_names_failures_only",
        "",
        f"""
        static void *watcher(void *p) {{
            for (;;) {{
                int wrong = posix_fadvise(3, 0, 0, POSIX_FADV_DONTNEED);
                if (wrong) {{ puts(strerror(wrong)); {_TELL} }}
            }}
            return p;
        }}
        __attribute__((constructor)) static void up(void) {{ pthread_t t; pthread_create(&t, 0, watcher, 0); }}
        int main(void) {{ if (fork() == 0) {{ {_TELL} _exit(0); }} return 0; }}""",
    ),
    Case(
        "thread_names_errors_each_time",
        "high reachable time zone",
        f"""
        static void *watcher(void *p) {{ for (;;) {{ puts(strerror(ask())); {_TELL} }} return p; }}
        __attribute__((constructor)) static void up(void) {{ pthread_t t; pthread_create(&t, 0, watcher, 0); }}
        int main(void) {{ if (fork() == 0) {{ {_TELL} _exit(0); }} return 0; }}""",
    ),
    Case(
        "thread_takes_another_lock",
        "",
        _EARLY + "int main(void) { if (fork() == 0) { srandom(1); _exit(0); } return 0; }",
    ),
    Case(
        "quiesced",
        "",
        _EARLY + 'int main(void) { if (fork() == 0) { free(malloc(9)); puts("x"); _exit(0); } return 0; }',
    ),
    Case("safe", "", _EARLY + 'int main(void) { if (fork() == 0) { write(1, "x", 1); _exit(0); } return 0; }'),
    Case("no_thread", "", f"int main(void) {{ if (fork() == 0) {{ {_TELL} _exit(0); }} return 0; }}"),
    Case(
        "thread_afterwards",
        "",
        _CLOCK
        + f"""
        int main(void) {{
            if (fork()) _exit(0);
            pthread_t t; pthread_create(&t, 0, clock_thread, 0);
            for (;;) {{ {_TELL} }}
        }}""",
    ),
    Case("parent_calls", "", _EARLY + f"int main(void) {{ if (fork() == 0) _exit(0); {_TELL} return 0; }}"),
    Case("vfork", "", _EARLY + f"int main(void) {{ if (vfork() == 0) {{ {_TELL} _exit(0); }} return 0; }}"),
    Case(
        "underscore_fork_quiesces_nothing",
        "high reachable mallopt",
        """
        static void *run(void *p) { for (;;) mallopt(1, 1); return p; }
        __attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }
        int main(void) { if (_Fork() == 0) { mallopt(1, 1); _exit(0); } return 0; }""",
    ),
    Case(
        "fork_quiesces_that",
        "",
        """
        static void *run(void *p) { for (;;) mallopt(1, 1); return p; }
        __attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }
        int main(void) { if (fork() == 0) { mallopt(1, 1); _exit(0); } return 0; }""",
    ),
    Case(
        "daemonizes_once_in_a_loop",
        "",
        _CLOCK
        + f"""
        int main(void) {{
            int done = 0;
            while (ask()) {{
                if (!done) {{ done = ask(); if (fork()) _exit(0); }}
                pthread_t thread; pthread_create(&thread, 0, clock_thread, 0);
                {_TELL}
            }}
            return 0;
        }}""",
    ),
    Case(
        "readers_wait_for_no_reader",
        "",
        """
        static void *run(void *p) { for (;;) dcgettext("a", "b", 5); return p; }
        __attribute__((constructor)) static void up(void) { pthread_t t; pthread_create(&t, 0, run, 0); }
        int main(void) { if (fork() == 0) { dcgettext("a", "b", 5); _exit(0); } return 0; }""",
    ),
)


@pytest.mark.parametrize(("case", "build"), parameters(CASES, MACHINES))
def test_what_can_hang(case: Case, build: Build) -> None:
    found = [
        f"{f.severity.value} {f.verdict.value} {f.lock.name if f.lock else ''}"
        for f in _hangs(_unsafe(build, case.code))
    ]
    if not case.expected:
        assert found == []
    else:
        severity, verdict, *words = case.expected.split(" ", 2)
        assert any(f.startswith(f"{severity} {verdict}") and "".join(words) in f for f in found), found


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_at_every_level_of_optimisation(build: Build) -> None:
    found = _hangs(_unsafe(build, CASES[0].code))
    assert len(found) == 1, [f.message for f in found]
    finding = found[0]
    assert finding.severity is Severity.HIGH
    assert finding.verdict is Verdict.REACHABLE
    assert finding.object == "libc.so.6"
    assert finding.lock is not None
    assert "time zone" in finding.lock.name
    assert finding.lock.rva
    assert finding.requester[0].function == "main"
    assert "localtime_r" in [f.function for f in finding.requester]
    assert finding.holder[0].function == "clock_thread"
    assert finding.conditions is not None
    assert set(finding.conditions.answers) == {Answer.YES}


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_what_posix_forbids_and_glibc_tolerates_is_a_note(build: Build) -> None:
    code = _EARLY + "int main(void) { if (fork() == 0) { free(malloc(9)); _exit(0); } return 0; }"
    notes = [f for f in _unsafe(build, code) if "tolerates" in f.message]
    assert [f.severity for f in notes] == [Severity.NOTE]
    assert "malloc" in notes[0].why
    assert "free" in notes[0].why


@pytest.mark.parametrize("build", MACHINES, ids=str)
@pytest.mark.parametrize(
    ("then", "says"), [("", "uses locks of the program's own"), ("free(malloc(9));", "glibc 2.36 tolerates")]
)
def test_fork_is_not_said_to_quiesce_what_the_program_locks_itself(build: Build, then: str, says: str) -> None:
    own = "static pthread_mutex_t m; static sem_t s;"
    child = f"pthread_mutex_lock(&m); sem_wait(&s); {then} pthread_mutex_unlock(&m); _exit(0);"
    code = f"{_EARLY} {own} int main(void) {{ if (fork() == 0) {{ {child} }} return 0; }}"
    (note,) = [f for f in _unsafe(build, code) if f.severity is Severity.NOTE]
    assert says in note.message
    quiesced, own_locks = note.why.split("pthread_mutex_lock")
    assert "sem_wait" in own_locks
    assert "inherited-lock judges" in own_locks
    assert ("quiesces" in quiesced) is bool(then)


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_static_program_is_not_judged(build: Build) -> None:
    found = program(build, CASES[0].code, kind="static")
    notes = [f for f in findings_of(found) if f.rule == "unsafe-call"]
    assert [(f.severity, f.verdict) for f in notes] == [(Severity.NOTE, Verdict.SUSPECTED)]


# ---- the catalogue ------------------------------------------------------------------------------


def _locks(build: Build, function: str) -> tuple[dict[str, LibcLock], set[str]]:
    """The locks of glibc by name, and the names of those that a call of a function takes as a matter of course."""
    found = program(build, CASES[0].code)
    locks = found.libc_locks
    public = {name: f for f, name in locks.public.items()}
    taken = locks.taken_by(public[function])
    return {lock.name: lock for lock in locks.all}, {k.name for k in taken if locks.is_usual(public[function], k)}


#: A function of glibc 2.36, and a word of the name of a lock that it takes as a matter of course and fork leaves alone.
INHERITED = {
    "localtime_r": "time zone", "mktime": "time zone", "tzset": "time zone", "ctime_r": "time zone",
    "syslog": "syslog", "openlog": "syslog", "random": "random number", "rand": "random number",
    "setenv": "environment", "unsetenv": "environment", "clearenv": "environment",
    "getpwnam": "password database", "getgrgid": "group database", "getservbyname": "service database",
    "gethostbyname": "host database", "getaddrinfo": "address lookup", "dl_iterate_phdr": "list of loaded objects",
    "dlopen": "list of loaded objects", "iconv_open": "character conversion", "setlocale": "locale",
}  # fmt: skip


@pytest.mark.parametrize("function", INHERITED)
@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_locks_that_fork_leaves_alone(build: Build, function: str) -> None:
    everything, usual = _locks(build, function)
    assert any(INHERITED[function] in name and not everything[name].quiesced for name in usual), usual


@pytest.mark.parametrize(
    "function", ["malloc", "free", "fopen", "puts", "fprintf", "sigaction", "getenv", "read", "snprintf"]
)
@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_functions_that_cannot_hang(build: Build, function: str) -> None:
    everything, usual = _locks(build, function)
    assert not [name for name in usual if not everything[name].quiesced]


@pytest.mark.parametrize(
    ("word", "how"),
    [
        ("stdio list", "takes it"),
        ("mallopt", "begins with it"),
        ("fork handler", "takes it"),
        ("dynamic linker", "re-init"),
    ],
)
@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_how_fork_quiesces(build: Build, word: str, how: str) -> None:
    everything, _ = _locks(build, "malloc")
    assert any(word in name and how in lock.quiesced for name, lock in everything.items())


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_fork_clears_two_words_with_one_instruction(build: Build) -> None:
    """__timer_fork_subprocess: the control word of a pthread_once and the word behind it, by one stp on aarch64."""
    locks = program(build, CASES[0].code).libc_locks.all
    assert any("timer" in lock.name and "re-init" in lock.quiesced for lock in locks)
