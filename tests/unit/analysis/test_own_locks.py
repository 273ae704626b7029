"""A program's own lock, over libc alone: who is seen to hold it, and who to ask for it. Each hang has a clean twin."""

from __future__ import annotations

import pytest

from forkproof.model import Finding
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
        "medium",
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
        "medium",
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
