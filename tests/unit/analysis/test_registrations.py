"""Which fork handlers are registered: through stubs, wrappers and GOT slots, and whether the call ever happens."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from forkproof import facts, signatures
from forkproof.allocators import find_libc
from forkproof.atfork import Handler, Registration
from forkproof.facts import Facts
from forkproof.model import Hooks
from forkproof.options import ScanOptions
from forkproof.pipeline import call_graph
from tests.unit.analysis.snippets import BUILDS, MACHINES, Build, Case, library, parameters, program, table

pytestmark = pytest.mark.together("build")

if TYPE_CHECKING:
    from pathlib import Path

    from _pytest.mark.structures import ParameterSet

_PROTECTION = {"x86_64": "-fcf-protection=full", "aarch64": "-mbranch-protection=standard"}


def _builds(*ways: tuple[str, ...], protected: bool = False) -> list[ParameterSet]:
    """Each machine with each way to build, and with its control flow protection."""
    builds = [b.also(*way) for b in MACHINES for way in ways]
    builds += [b.also(_PROTECTION[b.machine]) for b in MACHINES] if protected else []
    return [pytest.param(b, id=str(b)) for b in builds]


_HANDLERS = """
static void @prepare(void) { work(1); }
static void @parent(void) { work(2); }
static void @child(void) { work(3); }
"""

#: Expected: names of prepare, parent, child; `none` for NULL, `?` for what cannot be known.
CASES = (
    Case(
        "plain", "prepare parent child", _HANDLERS + "void @main(void) { pthread_atfork(@prepare, @parent, @child); }"
    ),
    Case(
        "one_for_two",
        "prepare parent parent",
        _HANDLERS + "void @main(void) { pthread_atfork(@prepare, @parent, @parent); }",
    ),
    Case("no_prepare", "none none child", _HANDLERS + "void @main(void) { pthread_atfork(0, 0, @child); }"),
    Case("nothing", "none none none", _HANDLERS + "void @main(void) { pthread_atfork(0, 0, 0); }"),
    Case(
        "wrapper",
        "prepare parent child",
        _HANDLERS
        + """
        NOINLINE int @add(void (*a)(void), void (*b)(void), void (*c)(void)) { int r = pthread_atfork(a, b, c);
            work(r); return r; }
        void @main(void) { @add(@prepare, @parent, @child); work(4); }""",
    ),
    Case(
        "wrapper_by_tail_call",
        "prepare parent child",
        _HANDLERS
        + """
        NOINLINE int @add(void (*a)(void), void (*b)(void), void (*c)(void)) { return pthread_atfork(a, b, c); }
        void @main(void) { @add(@prepare, @parent, @child); work(4); }""",
    ),
    Case(
        "three_wrappers",
        "prepare parent child",
        _HANDLERS
        + """
        NOINLINE int @a(void (*a)(void), void (*b)(void), void (*c)(void)) { int r = pthread_atfork(a, b, c);
            work(r); return r; }
        NOINLINE int @b(void (*a)(void), void (*b)(void), void (*c)(void)) { work(1); int r = @a(a, b, c);
            work(r); return r; }
        NOINLINE int @c(void (*a)(void), void (*b)(void), void (*c)(void)) { work(1); int r = @b(a, b, c);
            work(r); return r; }
        void @main(void) { @c(@prepare, @parent, @child); work(4); }""",
    ),
    Case(
        "wrapper_that_turns_them",
        "prepare parent child",
        _HANDLERS
        + """
        NOINLINE int @add(void (*c)(void), void (*a)(void), void (*b)(void)) { int r = pthread_atfork(a, b, c);
            work(r); return r; }
        void @main(void) { @add(@child, @prepare, @parent); work(4); }""",
    ),
    Case(
        "wrapper_with_one",
        "none none child",
        _HANDLERS
        + """
        NOINLINE int @add(void (*c)(void)) { int r = pthread_atfork(0, 0, c); work(r); return r; }
        void @main(void) { @add(@child); work(4); }""",
    ),
    Case(
        "wrapper_for_two",
        "none none child, none none parent",
        _HANDLERS
        + """
        NOINLINE int @add(void (*c)(void)) { int r = pthread_atfork(0, 0, c); work(r); return r; }
        void @main(void) { @add(@child); @add(@parent); work(4); }""",
    ),
    Case(
        "wrapper_after_a_call",
        "prepare parent child",
        _HANDLERS
        + """
        NOINLINE int @add(void (*a)(void), void (*b)(void), void (*c)(void)) { work(1);
            int r = pthread_atfork(a, b, c); work(r); return r; }
        void @main(void) { work(2); @add(@prepare, @parent, @child); work(4); }""",
    ),
    Case(
        "from_heap",
        "? ? ?",
        """
        struct @set { void (*a)(void), (*b)(void), (*c)(void); };
        void @main(struct @set *s) { pthread_atfork(s->a, s->b, s->c); work(4); }""",
    ),
    Case(
        "from_writable_data",
        "? ? ?",
        "static void (*volatile @hook)(void); void @set(void (*f)(void)) { @hook = f; }"
        " void @main(void) { pthread_atfork(@hook, @hook, @hook); work(4); }",
    ),
    Case(
        "from_data_that_nothing_writes",
        "none none none",
        "static void (*volatile @hook)(void); void @main(void) { pthread_atfork(@hook, @hook, @hook); work(4); }",
    ),
    Case(
        "exported",
        "prepare parent child",
        """
        void @prepare(void) { work(1); } void @parent(void) { work(2); } void @child(void) { work(3); }
        void @main(void) { pthread_atfork(@prepare, @parent, @child); work(4); }""",
    ),
    Case(
        "checked",
        "prepare parent child",
        _HANDLERS + "void @main(void) { if (pthread_atfork(@prepare, @parent, @child) != 0) abort(); work(4); }",
    ),
    Case(
        "chosen",
        "none none ?|none none child",
        _HANDLERS + "void @main(void) { pthread_atfork(0, 0, ask() ? @child : @parent); work(4); }",
    ),
)


def _name(found: Facts, handler: Handler) -> str:
    if handler.function is None:
        return "none" if handler.is_known else "?"
    return found.flow.name(handler.function).rpartition("__")[2]


def _handlers(found: Facts, registration: Registration) -> str:
    return " ".join(_name(found, h) for h in registration.handlers)


def _of_target(found: Facts) -> list[Registration]:
    return [r for r in found.registrations if r.object == 0]


@pytest.mark.parametrize(("case", "build"), parameters(CASES, BUILDS))
def test_which_handlers(case: Case, build: Build) -> None:
    found = table(CASES, build)
    mine = [r for r in _of_target(found) if found.flow.name(r.outermost).startswith(f"{case.name}__")]
    assert ", ".join(sorted(_handlers(found, r) for r in mine)) in case.expected.split("|")


_WEAK = """
extern int pthread_atfork(void (*)(void), void (*)(void), void (*)(void)) __attribute__((weak));
static void prepare(void) { work(1); }
static void child(void) { work(3); }
__attribute__((constructor)) static void up(void) { if (pthread_atfork) pthread_atfork(prepare, child, child); }
"""


@pytest.mark.parametrize("build", _builds((), ("-fno-plt",), ("-Wl,-z,now",)))
def test_a_weak_reference_registers_where_it_binds(build: Build) -> None:
    """x86-64's glibc still exports pthread_atfork@GLIBC_2.2.5 for old programs; aarch64's never did."""
    weak = library(build, "weak", _WEAK)
    found = program(build, "int main(void) { return fork(); }", weak)
    (registration,) = [r for r in found.registrations if found.object_name(r.object) == "libweak.so"]
    assert _handlers(found, registration) == "prepare child child"
    assert registration.is_weak
    assert registration.is_effective == (build.machine == "x86_64")


_ALLOCATOR = """
extern int pthread_atfork(void (*)(void), void (*)(void), void (*)(void)) __attribute__((weak));
static int word; static char heap[1 << 16]; static unsigned used;
static void lock(void) { while (__atomic_exchange_n(&word, 1, __ATOMIC_ACQUIRE)) sched_yield(); }
static void unlock(void) { __atomic_store_n(&word, 0, __ATOMIC_RELEASE); }
__attribute__((constructor)) static void up(void) { if (pthread_atfork) pthread_atfork(lock, unlock, unlock); }
void *malloc(size_t n) { lock(); void *p = heap + used; used += n; unlock(); return p; }
void free(void *p) { lock(); used -= !p; unlock(); }
"""


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_nothing_is_called_unbound_while_a_library_is_missing(build: Build, tmp_path: Path) -> None:
    plan = library(build, "alloc", _ALLOCATOR)
    whole = program(build, "int main(void) { free(malloc(1)); return fork(); }", plan)
    (allocator,) = [a for a in whole.allocators if whole.object_name(a.object) == "liballoc.so"]
    assert allocator.hooks is (Hooks.EFFECTIVE if build.machine == "x86_64" else Hooks.UNBOUND)
    for item in whole.flow.program.closure.objects:
        if "libc.so" not in item.name:
            (tmp_path / item.path[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(item.host_path, tmp_path / item.path[1:])
    known = signatures.load()
    graph = call_graph(whole.flow.program.closure.program.path, ScanOptions(sysroot=tmp_path), known)
    found = facts.gather("p", graph, known, find_libc(graph.program, known))
    (allocator,) = [a for a in found.allocators if found.object_name(a.object) == "liballoc.so"]
    assert allocator.hooks is Hooks.UNKNOWN
    assert "libc.so.6, which could define it, is missing" in allocator.why
    assert {r.lacking for r in found.registrations} == {"libc.so.6"}
    assert found.undecided


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_registration_by_once(build: Build) -> None:
    code = """
        static pthread_once_t once = PTHREAD_ONCE_INIT;
        static void prepare(void) { work(1); }
        static void init(void) { pthread_atfork(prepare, prepare, prepare); }
        int main(void) { pthread_once(&once, init); return fork(); }"""
    found = program(build, code)
    (registration,) = _of_target(found)
    assert _handlers(found, registration) == "prepare prepare prepare"
    assert registration.is_effective
    assert found.flow.graph.path(found.roots[0], found.flow.graph.distances([registration.outermost], backward=True))


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_registration_in_another_library_is_that_librarys(build: Build) -> None:
    other = library(
        build,
        "other",
        "static void child(void) { work(1); } __attribute__((constructor)) static void up(void) { "
        "pthread_atfork(0, 0, child); }",
    )
    found = program(build, "int main(void) { return fork(); }", other)
    assert _of_target(found) == []
    assert [found.object_name(r.object) for r in found.registrations] == ["libother.so"]


@pytest.mark.parametrize("build", _builds(("-fno-plt",), ("-fno-PIC",), ("-s",), protected=True))
def test_registration_in_a_program(build: Build) -> None:
    code = """
        static void prepare(void) { work(1); } static void parent(void) { work(2); } static void child(void) {
            work(3); }
        int main(void) { pthread_atfork(prepare, parent, child); return fork(); }"""
    found = program(build, code, kind="fixed" if "-fno-PIC" in build.flags else "program")
    (registration,) = _of_target(found)
    assert registration.is_effective
    assert all(h.function is not None for h in registration.handlers)
    if "-s" not in build.flags:
        assert _handlers(found, registration) == "prepare parent child"


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_registration_in_a_static_program(build: Build) -> None:
    code = """
        static void prepare(void) { work(1); } static void child(void) { work(3); }
        int main(void) { pthread_atfork(prepare, 0, child); return fork(); }"""
    found = program(build, code, kind="static")
    assert [_handlers(found, r) for r in _of_target(found)] == ["prepare none child"]
