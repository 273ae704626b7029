"""What makes a program's own lock new in the child, and what only seems to. Each hang has a clean twin."""

from __future__ import annotations

import pytest

from forkproof.model import Finding
from tests.unit.analysis.snippets import MACHINES, Build, Case, findings_of, parameters, program

pytestmark = pytest.mark.together("build")

_BUILDS = (*MACHINES, Build("x86_64", ("-O0",)), Build("x86_64", ("-Os",)))
_LOG = """
static struct { pthread_mutex_t lock; int counts[60]; } state = {.lock = PTHREAD_MUTEX_INITIALIZER};
static const pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
NOINLINE void make(void) { pthread_mutex_init(&state.lock, 0); }
NOINLINE void begin(void) { pthread_once(&once, make); }
NOINLINE void log_line(void) { begin(); pthread_mutex_lock(&state.lock); work(2); pthread_mutex_unlock(&state.lock); }
NOINLINE void prepare(void) { pthread_mutex_lock(&state.lock); }
NOINLINE void resume(void) { pthread_mutex_unlock(&state.lock); }
NOINLINE void hooks(void) { pthread_atfork(prepare, resume, resume); }
NOINLINE void refill(void) { memcpy(&state.lock, &fresh, sizeof fresh); }
NOINLINE void reset(void) { memset(&state, 0, sizeof state); }
static void *writer(void *p) { for (;;) log_line(); return p; }
"""
_START = "pthread_t t; pthread_create(&t, 0, writer, 0); if (fork() == 0)"


def _child(code: str, before: str = "") -> str:
    return f"int main(void) {{ {before} {_START} {{ {code} }} return ask(); }}"


def _spawned(before: str, after: str) -> str:
    spawn = f"NOINLINE int spawn(void) {{ {before}(); int pid = fork(); {after}(); return pid; }}"
    return f"""
    static pthread_mutex_t spare = PTHREAD_MUTEX_INITIALIZER;
    NOINLINE void other(void) {{ pthread_mutex_lock(&spare); }}
    {spawn} int main(void) {{ pthread_t t; pthread_create(&t, 0, writer, 0);
        if (spawn() == 0) {{ log_line(); _exit(0); }} return ask(); }}"""


#: What the child does. Expected: severity of the finding; empty for none.
CASES = (
    Case("once", "high", _child("log_line(); _exit(0);")),
    Case("held_by_a_helper", "", _spawned("prepare", "resume")),
    Case("held_by_another_helper", "high", _spawned("other", "resume")),
    Case("once_itself", "high", _child("pthread_once(&once, make); log_line(); _exit(0);")),
    Case("made", "", _child("make(); log_line(); _exit(0);")),
    Case("filled", "", _child("memset(&state, 0, sizeof state); log_line(); _exit(0);")),
    Case("filled_inline", "", _child("__builtin_memset(&state, 0, sizeof state); log_line(); _exit(0);")),
    Case("filled_beside_inline", "high", _child("__builtin_memset(state.counts, 0, 240); log_line(); _exit(0);")),
    Case("filled_beside", "high", _child("memset(state.counts, 0, sizeof state.counts); log_line(); _exit(0);")),
    Case("filled_before", "high", _child("memset(&state, 0, ask()); log_line(); _exit(0);")),
    Case("refilled", "", _child("refill(); log_line(); _exit(0);")),
    Case("reset", "", _child("reset(); log_line(); _exit(0);")),
    Case("reset_late", "high", _child("log_line(); reset(); log_line(); _exit(0);")),
    Case("hooks", "", _child("log_line(); _exit(0);", "hooks();")),
    Case("returns", "high", _child("return 0;", "atexit(log_line);")),
    Case("returns_early", "", _child("_exit(0);", "atexit(log_line);")),
    Case("quick_exit", "", _child("quick_exit(0);", "atexit(log_line);")),
)


@pytest.mark.parametrize(("case", "build"), parameters(CASES, _BUILDS))
def test_what_the_child_makes_new(case: Case, build: Build) -> None:
    found: list[Finding] = [f for f in findings_of(program(build, _LOG + case.code)) if f.rule == "inherited-lock"]
    assert " ".join(f.severity.value for f in found) == case.expected
