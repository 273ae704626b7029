"""Calls that never come back for the constants that they pass, in code of both compilers."""

from __future__ import annotations

import pytest

from forkproof.facts import Facts
from tests.unit.analysis.snippets import BUILDS, Build, Case, function, parameters, table

pytestmark = pytest.mark.together("build")

_REPORT = """
static volatile int @mode;
OPAQUE void @report(int how, int sig) {
    struct sigaction act;
    work(sig);
    if (@mode) unlink("/run/pid");
    if (!how) { if (@mode) _exit(1); abort(); }
    sigemptyset(&act.sa_mask);
    act.sa_flags = 0; act.sa_handler = SIG_DFL;
    sigaction(sig, &act, 0);
    raise(sig);
}
"""
_NO_SPILLS = ("-O1", "-O2", "-Os")
"""At -O0 parameters pass through memory, of which nothing is believed."""

CALLS = (
    Case("aborts_if_zero", "ends", _REPORT + "OPAQUE void @f(void) { work(1); @report(0, 0); work(2); }", _NO_SPILLS),
    Case("returns_if_not", "returns", _REPORT + "OPAQUE void @f(void) { work(1); @report(1, 6); work(2); }"),
    Case("not_a_constant", "returns", _REPORT + "OPAQUE void @f(void) { work(1); @report(ask(), 0); work(2); }"),
    Case("a_tail_call", "ends", _REPORT + "OPAQUE void @f(void) { work(1); @report(0, 3); }", _NO_SPILLS),
    Case(
        "one_way_goes_round_it",
        "returns",
        _REPORT + "OPAQUE void @f(int n) { work(1); if (n) @report(0, 0); work(2); }",
    ),
    Case(
        "passed_on",
        "ends",
        _REPORT + "OPAQUE void @middle(int a, int how) { work(a); @report(how, 1); if (a) abort(); }"
        "OPAQUE void @f(void) { work(1); @middle(1, 0); work(2); }",
        _NO_SPILLS,
    ),
    Case(
        "by_status",
        "ends",
        "OPAQUE void @complain(int status, const char *text) { work(status); if (status) exit(status); }"
        'OPAQUE void @f(void) { work(1); @complain(1, "no"); work(2); }',
        ("-O1", "-O2"),  # -Os puts the constant on the stack and takes it from there
    ),
    Case(
        "by_status_zero",
        "returns",
        "OPAQUE void @complain(int status, const char *text) { work(status); if (status) exit(status); }"
        'OPAQUE void @f(void) { work(1); @complain(0, "no"); work(2); }',
    ),
    Case(
        "memory_is_not_believed",
        "returns",
        "NOINLINE void @look(int *ok) { *ok = ask(); }"
        "OPAQUE void @check(int how) { int ok = 0; work(how); @look(&ok); if (!ok) abort(); }"
        "OPAQUE void @f(void) { work(1); @check(0); work(2); }",
    ),
    Case(
        "nor_are_two_loads_of_a_global_the_same",
        "returns",
        "volatile int @count;"
        "OPAQUE void @check(int how) { int old = @count; work(how); if (@count == old) abort(); }"
        "OPAQUE void @f(void) { work(1); @check(0); work(2); }",
    ),
    Case(
        "nor_are_two_results",
        "returns",
        "OPAQUE void @check(int how) { int old = 7, new;"
        " while ((new = ask()) != old) { if (how) abort(); old = new; } }"
        "OPAQUE void @f(void) { work(1); @check(0); work(2); }",
    ),
    Case(
        "another_value_overwrites_it",
        "returns",
        _REPORT + "OPAQUE void @f(int n) { work(1); int how = 0; if (n > 3) how = n; @report(how, 0); work(2); }",
    ),
    Case(
        "a_switch",
        "ends",
        "OPAQUE void @log(int level) { work(level); switch (level) { case 0: work(3); break; case 1: work(4); break;"
        " case 2: _exit(2); default: work(5); } }"
        "OPAQUE void @f(void) { work(1); @log(2); work(2); }",
        _NO_SPILLS,
    ),
)


def _answer(found: Facts, case: Case) -> str:
    return "returns" if found.flow.returns(function(found, f"{case.name}__f")) else "ends"


@pytest.mark.parametrize(("case", "build"), parameters(CALLS, BUILDS))
def test_a_call_with_constants_comes_back_or_not(case: Case, build: Build) -> None:
    assert _answer(table(CALLS, build), case) == case.expected
