"""Summaries of locks, what handlers leave of them, how rarely they are taken, and which ones findings are about."""

from __future__ import annotations

from functools import cache

import pytest

from forkproof.facts import Facts
from forkproof.locks.coverage import Cover, Coverage, coverage, prepared_by, taken_by
from forkproof.locks.goals import AllocatorLocks, allocator_locks
from forkproof.locks.identity import lock_of
from forkproof.locks.ordinary import Occasion, Occasions, Rank
from forkproof.locks.summary import Summaries, Taken
from forkproof.locks.values import Object, Value
from forkproof.program import Function
from tests.unit.analysis.snippets import MACHINES, PRELUDE, Build, Plan, analysed, findings_of, function, program

pytestmark = pytest.mark.together("build")

CODE = """
typedef struct { int word; char rest[60]; } lock_t;
static lock_t held, left, inner, failing, once, switched, set, traced, lazy, forgotten, looked, reset;
static lock_t many[8], behind, given;
lock_t *pointed;
int work_done, is_on, is_set, was_set, trace_on, ready, other_things[16];
static void *nodes[512];

NOINLINE void take(lock_t *l) { while (__atomic_exchange_n(&l->word, 1, __ATOMIC_ACQUIRE)) sched_yield(); }
NOINLINE void give(lock_t *l) { __atomic_store_n(&l->word, 0, __ATOMIC_RELEASE); }
static inline void with(lock_t *l) { take(l); work_done++; give(l); }

NOINLINE void deep(lock_t *l) { with(l); }
NOINLINE void deeper(lock_t *l) { deep(l); }
NOINLINE void *core(int n) { with(&held); asm volatile("" : "+r"(n)); return (void *)(long)n; }

void *take_held(int n) { return core(n); }
void take_left(void) { with(&left); }
void take_under(void) { take(&held); deeper(&inner); give(&held); }
void take_failing(void) {
    if (!mmap_like()) { *__errno_location() = ENOMEM; with(&failing); }
}
NOINLINE void start_up(void) { with(&once); }
void take_once(void) { static pthread_once_t control; pthread_once(&control, start_up); }
void take_switched(void) { if (is_on) with(&switched); }
void take_set(void) { if (is_set) with(&set); }
NOINLINE void set_up(void) { is_set = ask(); }
void take_reset(void) { if (was_set) with(&reset); }
__attribute__((constructor)) void begin(void) {
    set_up();
    was_set = getenv("SNIPPET") ? 1 : 0;
}
void take_traced(void) { with(&traced); if (trace_on) write(2, "x", 1); }
NOINLINE void report(void) { with(&forgotten); write(2, "x", 1); }
void take_forgotten(void) { if (ask()) report(); }
void take_lazy(unsigned n) {
    void *node = __atomic_load_n(&nodes[n & 511], __ATOMIC_ACQUIRE);
    if (node == 0) {
        take(&lazy);
        node = __atomic_load_n(&nodes[n & 511], __ATOMIC_ACQUIRE);
        if (node == 0) __atomic_store_n(&nodes[n & 511], &nodes[n & 511], __ATOMIC_RELEASE);
        give(&lazy);
    }
}
void take_many(unsigned n) { with(&many[n & 7]); }
void take_behind(void) { with(&behind); }
NOINLINE lock_t *the_given(void) { return &given; }
NOINLINE lock_t *the_pointed(void) { return pointed; }
void take_given(void) { with(&given); }
void take_pointed(void) { with(pointed); }

NOINLINE void prepare(void) { take(&held); for (int n = 0; n < 8; n++) take(&many[n]); }
NOINLINE void child(void) { for (int n = 0; n < 8; n++) give(&many[n]); give(&held); }
NOINLINE void forgetful(void) { for (int n = 0; n < 8; n++) give(&many[n]); }
struct base { char rest[96]; lock_t lock; };
struct arena { char rest[1024]; struct base *base; };
struct base *first_base, *lone_base;
struct arena *arenas[4];
NOINLINE struct base *the_first_base(void) { return first_base; }
void make_arena(unsigned n, struct arena *a, struct base *b) { a->base = n ? b : the_first_base(); arenas[n & 3] = a; }
void take_first_base(void) { with(&first_base->lock); }
void take_lone_base(void) { with(&lone_base->lock); }
NOINLINE void prepare_bases(void) { for (int n = 0; n < 4; n++) if (arenas[n]) take(&arenas[n]->base->lock); }
NOINLINE void prepare_given(void) { take(the_given()); take(the_pointed()); }
NOINLINE void looks_only(void) { with(&held); }
"""
BUILDS = MACHINES


@cache
def _facts(build: Build) -> Facts:
    return analysed(Plan(build, PRELUDE + "int mmap_like(void);\n" + CODE))


@cache
def _summaries(build: Build) -> Summaries:
    found = _facts(build)
    return Summaries(found.flow, frozenset(found.libc.objects), [0])


def _function(build: Build, name: str) -> Function:
    return function(_facts(build), name)


def _named(build: Build, address: Value) -> str:
    return lock_of(_facts(build).flow.program, address, 0).name


def _taken(build: Build, name: str) -> dict[str, Taken]:
    return {_named(build, t.address): t for t in _summaries(build).of(_function(build, name)).taken}


@pytest.fixture(params=BUILDS, ids=str)
def build(request: pytest.FixtureRequest) -> Build:
    assert isinstance(request.param, Build)
    return request.param


# ---- summaries -------------------------------------------------------------------------------


def test_a_lock_that_is_passed_down_is_named_by_who_knows_it(build: Build) -> None:
    assert list(_taken(build, "take_left")) == ["left"]
    (taken,) = _summaries(build).of(_function(build, "deeper")).entering
    assert taken.address.offset == 0


def test_the_path_leads_from_the_function_to_where_it_waits(build: Build) -> None:
    path = _taken(build, "take_under")["inner"].path
    names = [_facts(build).flow.name(step.function) for step in path]
    assert (names[0], names[-1]) == ("take_under", "take")
    assert len(names) > 2


def test_what_is_held_at_a_call_gates_what_it_takes(build: Build) -> None:
    found = _taken(build, "take_under")
    assert [_named(build, gate) for gate in found["inner"].gates] == ["held"]
    assert found["held"].gates == frozenset()


def test_a_function_that_returns_with_a_lock_says_so(build: Build) -> None:
    held = {_named(build, h) for e in _summaries(build).of(_function(build, "prepare")).exits for h in e.held}
    assert "held" in held
    assert not any(e.held for e in _summaries(build).of(_function(build, "take_left")).exits)


def test_places_are_the_functions_that_name_a_lock(build: Build) -> None:
    summaries = _summaries(build)
    address = _taken(build, "take_left")["left"].address
    assert list(summaries.places(address)) == [_function(build, "take_left")]


def test_a_function_without_locks_has_an_empty_summary(build: Build) -> None:
    assert _summaries(build).of(_function(build, "set_up")).taken == ()


# ---- coverage --------------------------------------------------------------------------------


def _coverage(build: Build, entries: list[str], prepare: str | None, child: str | None = None) -> Coverage:
    handlers = tuple(_function(build, n) if n is not None else None for n in (prepare, child))
    return coverage(
        _summaries(build), [_function(build, n) for n in entries], [0], (handlers[0], handlers[1])
    )  # fmt: skip


def _covers(build: Build, entries: list[str], prepare: str | None = "prepare") -> dict[str, Cover]:
    return {_named(build, k.taken.address): k.cover for k in _coverage(build, entries, prepare).locks}


def test_what_prepare_keeps_is_covered_and_the_rest_is_not(build: Build) -> None:
    assert _covers(build, ["take_held", "take_left"]) == {"held": Cover.COVERED, "left": Cover.UNCOVERED}


def test_a_lock_that_prepare_lets_go_again_is_not_covered(build: Build) -> None:
    assert _covers(build, ["take_held"], "looks_only") == {"held": Cover.UNCOVERED}


def test_without_handlers_nothing_is_covered(build: Build) -> None:
    assert set(_covers(build, ["take_held", "take_left"], None).values()) == {Cover.UNCOVERED}


def test_a_lock_that_prepare_has_another_function_name_is_covered(build: Build) -> None:
    covers = _covers(build, ["take_given", "take_pointed", "take_left"], "prepare_given")
    assert covers.pop("left") is Cover.UNCOVERED
    assert list(covers.values()) == [Cover.COVERED, Cover.COVERED]


def test_what_a_global_points_to_is_assumed_to_be_where_the_pointer_is_stored(build: Build) -> None:
    covers = _covers(build, ["take_first_base", "take_lone_base"], "prepare_bases")
    assert sorted(covers.values(), key=str) == [Cover.ASSUMED, Cover.UNCOVERED]


def test_what_is_taken_under_a_covered_lock_only_is_gated(build: Build) -> None:
    assert _covers(build, ["take_under"])["inner"] is Cover.GATED


def test_what_is_taken_under_an_open_lock_only_is_nested(build: Build) -> None:
    assert _covers(build, ["take_under"], None)["inner"] is Cover.NESTED


def test_an_array_taken_in_a_loop_is_covered_and_ends_where_it_ends(build: Build) -> None:
    covers = _covers(build, ["take_many", "take_behind"])
    assert covers.pop("behind") is Cover.UNCOVERED
    assert set(covers.values()) == {Cover.COVERED}


def test_a_lock_reached_by_two_entries_is_one(build: Build) -> None:
    (lock,) = _coverage(build, ["take_held", "core"], "prepare").locks
    assert lock.entries == 2
    assert len(lock.taken.path) == min(len(_taken(build, n)["held"].path) for n in ("take_held", "core"))


def test_what_the_child_handler_keeps_is_told(build: Build) -> None:
    kept = _coverage(build, ["take_held"], "prepare", "forgetful").kept_in_child
    assert [_named(build, k) for k in kept] == ["held"]
    assert _coverage(build, ["take_held"], "prepare", "child").kept_in_child == ()


def test_prepared_by_is_what_is_held_at_the_exit(build: Build) -> None:
    held, is_complete = prepared_by(_summaries(build), _function(build, "looks_only"))
    assert (held, is_complete) == (frozenset(), True)


def test_locks_of_other_objects_are_not_looked_at(build: Build) -> None:
    assert taken_by(_summaries(build), [_function(build, "take_left")], [1]) == {}


# ---- occasions -------------------------------------------------------------------------------


def _occasion(build: Build, entry: str, lock: str) -> Occasion:
    judged = Occasions(_summaries(build), [_function(build, entry)])
    return judged.of(_taken(build, entry)[lock])


@pytest.mark.parametrize(
    ("entry", "lock", "rank", "why"),
    [
        ("take_held", "held", Rank.ALWAYS, "each call takes it"),
        ("take_under", "inner", Rank.ALWAYS, "each call takes it"),
        ("take_failing", "failing", Rank.RARE, "only when an allocation has failed"),
        ("take_once", "once", Rank.RARE, "only once"),
        ("take_switched", "switched", Rank.RARE, "only while a switch is on that is off at start"),
        ("take_set", "set", Rank.USUAL, ""),  # a constructor computes it
        ("take_reset", "reset", Rank.RARE, "only while a switch is on that is off at start"),
        ("take_traced", "traced", Rank.ALWAYS, "each call takes it"),
        ("take_forgotten", "forgotten", Rank.RARE, "only while a problem is reported"),
        ("take_lazy", "lazy", Rank.RARE, "only where something is first set up"),
    ],
)
def test_how_ordinary_a_lock_is(build: Build, entry: str, lock: str, rank: Rank, why: str) -> None:
    assert _occasion(build, entry, lock) == Occasion(rank, why)


def test_a_function_that_may_write_does_not_report_on_every_way(build: Build) -> None:
    judged = Occasions(_summaries(build), [_function(build, "take_traced")])
    assert judged.rare(_taken(build, "take_traced")["traced"].path) == ""


# ---- goals -----------------------------------------------------------------------------------


def _locks(build: Build, entries: list[str], prepare: str | None, *, is_effective: bool) -> AllocatorLocks:
    handlers = (_function(build, prepare) if prepare is not None else None, None)
    functions = tuple(_function(build, n) for n in entries)
    return allocator_locks(_summaries(build), 0, functions, handlers, is_effective=is_effective)


def _goals(found: AllocatorLocks) -> list[str]:
    return sorted(goal.lock.name for goal in found.goals)


def test_findings_are_about_what_handlers_leave_and_often_is_taken(build: Build) -> None:
    found = _locks(build, ["take_held", "take_left", "take_switched"], "prepare", is_effective=True)
    assert _goals(found) == ["left"]
    assert all(goal.is_left for goal in found.goals)


def test_handlers_that_leave_only_what_is_rare_leave_no_goal(build: Build) -> None:
    found = _locks(build, ["take_held", "take_switched"], "prepare", is_effective=True)
    assert found.goals == ()
    assert [found.is_rare(lock) for lock in found.coverage.uncovered] == [True]


def test_handlers_that_are_never_registered_would_have_taken_the_goals(build: Build) -> None:
    found = _locks(build, ["take_held", "take_left"], "prepare", is_effective=False)
    assert _goals(found) == ["held"]


def test_without_handlers_all_that_is_often_taken_is_a_goal(build: Build) -> None:
    found = _locks(build, ["take_held", "take_left", "take_switched"], None, is_effective=False)
    assert _goals(found) == ["held", "left"]


def test_a_goal_knows_the_functions_that_take_it(build: Build) -> None:
    (goal,) = _locks(build, ["take_left"], None, is_effective=False).goals
    assert list(goal.places) == [_function(build, "take_left")]
    assert goal.to_lock[_function(build, "take_left")] == 0
    assert [frame.function for frame in goal.frames([], _function(build, "take_left"))][-1] == "take"


def test_an_address_is_a_global_of_the_object(build: Build) -> None:
    assert isinstance(_taken(build, "take_left")["left"].address.base, Object)


_CIRCLE = """
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    void ping(void);
    #ifdef __x86_64__
    __asm__(".text\\n.type ping,@function\\nping: jmp pong\\n.size ping, .-ping\\n"
            ".type pong,@function\\npong: testl %edi, %edi\\njne ping\\nret\\n.size pong, .-pong\\n");
    #else
    __asm__(".text\\n.type ping,%function\\nping: b pong\\n.size ping, .-ping\\n"
            ".type pong,%function\\npong: cbnz w0, ping\\nret\\n.size pong, .-pong\\n");
    #endif
    static void use_lock(void) { pthread_mutex_lock(&lock); ping(); pthread_mutex_unlock(&lock); }
    static void *runner(void *p) { for (;;) use_lock(); return p; }
    int main(void) { pthread_t t; pthread_create(&t, 0, runner, 0); if (!fork()) { use_lock(); _exit(0); } return 0; }
"""


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_functions_that_jump_to_each_other_are_followed_once(build: Build) -> None:
    assert "inherited-lock" in {finding.rule for finding in findings_of(program(build, _CIRCLE))}
