"""The cases that make following locks hard, one listing each."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest

from forkproof.elf.image import Machine
from forkproof.locks.runs import NOTHING, Effect
from forkproof.locks.state import State
from forkproof.locks.values import Content, Element, Entry, Flag, Object, Thread, Value
from tests.unit.locks.listing import DATA, LOCK, OTHER, Callees, exits, follow, mutex

HELD = frozenset([LOCK])
MUTEXES = {"lock": mutex("acquire"), "unlock": mutex("release"), "trylock": mutex("try")}
SPIN = """
again:
    mov eax, 0
    mov ecx, 1
    lock cmpxchg dword ptr [0x4000], ecx
    jne {failed}
    jmp {won}
failed:
    pause
    jmp {again}
won:
"""
SPIN_ARM = """
    movz x1, #0x4000
    mov w2, #1
again:
    ldaxr w0, [x1]
    cbnz w0, {failed}
    stxr w3, w2, [x1]
    cbnz w3, {again}
    b {won}
failed:
    yield
    b {again}
won:
"""
FLAG = Value(Thread(None), 0x10)


def raised(constant: int) -> Value:
    return Value(Flag(*FLAG, constant), 0)


# ---- attempts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "text"), [(Machine.X86_64, SPIN), (Machine.AARCH64, SPIN_ARM)])
def test_a_spin_lock_is_held_after_it_and_waits(machine: Machine, text: str) -> None:
    run = follow(text + "ret", machine=machine)
    assert {(a.address, a.kind, a.blocking) for a in run.acquires} == {(LOCK, "spin", True)}
    assert run.exits == exits((HELD, None))


COUNTED = """
    mov edx, 100
again:
    mov eax, 0
    mov ecx, 1
    lock cmpxchg dword ptr [0x4000], ecx
    jne {failed}
    mov eax, 1
    ret
failed:
    pause
    STEP
    jne {again}
    AFTERmov eax, 0
    ret
"""
COUNTED_ARM = """
    movz x1, #0x4000
    mov w2, #1
    mov w4, #100
again:
    ldaxr w0, [x1]
    cbnz w0, {failed}
    stxr w3, w2, [x1]
    cbnz w3, {again}
    mov w0, #1
    ret
failed:
    yield
    STEP
    b.ne {again}
    AFTERmov w0, #0
    ret
"""


@pytest.mark.parametrize(
    ("machine", "text", "step", "after", "waits"),
    [
        (Machine.X86_64, COUNTED, "sub edx, 1", "", False),
        (Machine.X86_64, COUNTED, "lea edx, [rdx - 1]\ncmp edx, -1", "", False),
        (Machine.X86_64, COUNTED, "cmp edx, 1", "", True),  # nothing moves it
        (Machine.X86_64, COUNTED, "mov edx, dword ptr [0x5000]\ncmp edx, 1", "", True),  # another thread's to set
        (Machine.X86_64, COUNTED, "sub edx, 1", "mov edx, 100\njmp {again}\n", True),  # and so again and again
        (Machine.X86_64, COUNTED, "sub edx, 1", "mov edi, 0x4000\ncall lock\n", True),
        (Machine.X86_64, COUNTED, "call clock\ncmp rax, rbx", "", False),
        (Machine.X86_64, COUNTED, "call clock\ntest eax, eax", "", True),  # a flag, perhaps
        (Machine.X86_64, COUNTED, "call other\ncmp rax, rbx", "", True),
        (Machine.X86_64, COUNTED, "call clock\ncmp rax, rbx", "jmp {again}\n", True),
        (Machine.AARCH64, COUNTED_ARM, "subs w4, w4, #1", "", False),
        (Machine.AARCH64, COUNTED_ARM, "sub w4, w4, #1\ncmp w4, #0", "", False),
        (Machine.AARCH64, COUNTED_ARM, "cmp w4, #1", "", True),
        (Machine.AARCH64, COUNTED_ARM, "bl clock\ncmp x0, x19", "", False),
        (Machine.AARCH64, COUNTED_ARM, "subs w4, w4, #1", "mov w4, #100\nb {again}\n", True),
    ],
)
def test_who_tries_a_number_of_times_or_for_a_time_does_not_wait(
    machine: Machine, text: str, step: str, after: str, *, waits: bool
) -> None:
    text = text.replace("STEP", step).replace("AFTER", after)
    run = follow(text, Callees(library=MUTEXES, clocks=frozenset({"clock"})), machine=machine)
    assert {a.blocking for a in run.acquires if a.kind == "spin"} == {waits}


PERMIT = """
look:
    mov eax, dword ptr [0x4000]
    test eax, eax
    je {none}
    lea edx, [rax - 1]
    lock cmpxchg dword ptr [0x4000], edx
    jne {look}
    mov ecx, 1
    lock xadd dword ptr [0x4000], ecx
    ret
none:
    WAIT
"""


@pytest.mark.parametrize(
    ("wait", "blocking"),
    [
        ("pause\njmp {look}", {True}),
        ("ret", {False}),  # the last reference is let go elsewhere
        ("call clock\ncmp eax, ebx\njb {look}\nret", {False}),  # a deadline
        ("cmp eax, ebx\njb {look}\nret", {True}),
    ],
)
def test_what_is_counted_down_and_waited_for_is_a_permit(wait: str, blocking: set[bool]) -> None:
    run = follow(PERMIT.replace("WAIT", wait), Callees(library=MUTEXES, clocks=frozenset({"clock"})))
    assert {a.blocking for a in run.acquires if a.kind == "permit"} == blocking
    assert LOCK in run.let_go


def test_a_store_of_zero_lets_it_go() -> None:
    run = follow(SPIN + "mov dword ptr [0x4000], 0\nret")
    assert run.exits == exits((NOTHING, None))
    assert run.let_go == HELD


def test_an_attempt_whose_failing_side_returns_is_a_try() -> None:
    run = follow("""
        mov eax, 0
        mov ecx, 1
        lock cmpxchg dword ptr [0x4000], ecx
        jne {failed}
        mov eax, 1
        ret
    failed:
        mov eax, 0
        ret
    """)
    assert [a.blocking for a in run.acquires] == [False]
    assert set(run.exits) == set(exits((HELD, "nonzero"), (NOTHING, "zero")))


def test_the_slow_path_holds_nothing_while_the_outcome_is_open() -> None:
    """Between the attempt and the look at its outcome the states must not be joined with those that hold."""
    run = follow(
        """
        mov eax, 0
        mov ecx, 1
        lock cmpxchg dword ptr [0x4000], ecx
        je {won}
        call slow
    won:
        call inside
        ret
        """,
        Callees(effects={"slow": Effect(exits((HELD, None)), NOTHING)}, noted=frozenset({"slow", "inside"})),
    )
    assert {(c.target, c.held) for c in run.calls} == {(0, NOTHING), (1, HELD)}
    assert run.exits == exits((HELD, None))


def test_a_reference_count_is_no_lock() -> None:
    run = follow("mov ecx, 1\nlock xadd dword ptr [0x4000], ecx\nret")
    assert not run.acquires
    assert run.exits == exits((NOTHING, None))


def test_a_compare_and_swap_that_expects_what_it_read_is_no_lock() -> None:
    run = follow("""
    again:
        mov eax, dword ptr [0x4000]
        lea ecx, [rax + 1]
        lock cmpxchg dword ptr [0x4000], ecx
        jne {again}
        ret
    """)
    assert not run.acquires


def test_the_result_of_an_exchange_returned_tells_what_is_held() -> None:
    run = follow("mov eax, 1\nxchg dword ptr [0x4000], eax\nret")
    assert set(run.exits) == set(exits((HELD, "zero"), (NOTHING, "nonzero")))


def test_a_result_that_was_inverted_tells_the_opposite() -> None:
    run = follow("""
        mov eax, 0
        mov ecx, 1
        lock cmpxchg dword ptr [0x4000], ecx
        setne al
        movzx eax, al
        ret
    """)
    assert set(run.exits) == set(exits((HELD, "zero"), (NOTHING, "nonzero")))


@pytest.mark.parametrize(("way", "held"), [("je {out}", HELD), ("jne {out}", NOTHING)])
def test_a_guard_is_held_by_who_is_told_to_make_what_it_guards(way: str, held: frozenset[Value]) -> None:
    guard = replace(mutex("acquire"), kind="guard")
    text = f"mov edi, 0x4000\ncall guard\ntest eax, eax\n{way}\ncall inside\nout:\nret"
    run = follow(text, Callees(library={"guard": guard}, noted=frozenset({"inside"})))
    assert [call.held for call in run.calls] == [held]


def test_a_try_of_a_library_is_decided_by_its_result() -> None:
    run = follow(
        """
        mov edi, 0x4000
        call trylock
        test eax, eax
        jne {busy}
        call inside
    busy:
        ret
        """,
        Callees(library=MUTEXES, noted=frozenset({"inside"})),
    )
    assert [c.held for c in run.calls] == [HELD]
    assert [a.blocking for a in run.acquires] == [False]


# ---- flags and conditions --------------------------------------------------------------------


def test_behind_a_conditional_compare_neither_side_shows_success() -> None:
    run = follow(
        """
        movz x1, #0x4000
        mov w2, #1
        swp w2, w0, [x1]
        cmp w0, #0
        ccmp w5, #0, #0, eq
        mov w0, w9
        b.eq {inside}
        ret
    inside:
        ret
        """,
        machine=Machine.AARCH64,
    )
    assert not run.acquires


def test_a_flag_of_one_bit_is_tested_by_tbnz() -> None:
    run = follow(
        """
        bl trylock
        tbnz w0, #0, {busy}
        bl inside
    busy:
        ret
        """,
        Callees(library=MUTEXES, noted=frozenset({"inside"})),
        Machine.AARCH64,
    )
    assert [len(c.held) for c in run.calls] == [1]


def test_both_ways_of_an_optional_lock_are_kept_apart() -> None:
    """if (p) lock; f(); if (p) unlock: f is called with and without, and nothing is left held."""
    run = follow(
        """
        mov rbx, rdi
        test rbx, rbx
        je {without}
        mov edi, 0x4000
        call lock
    without:
        call inside
        ret
        """,
        Callees(library=MUTEXES, noted=frozenset({"inside"})),
    )
    assert set(run.exits) == set(exits((HELD, None), (NOTHING, None)))
    assert {c.held for c in run.calls} == {HELD, NOTHING}


def test_what_one_way_lets_go_no_way_to_the_same_result_keeps() -> None:
    run = follow(
        """
        mov edi, 0x4000
        call lock
        cmp dword ptr [0x4100], 0
        jne {keeps}
        mov edi, 0x4000
        call unlock
    keeps:
        ret
        """,
        Callees(library=MUTEXES),
    )
    assert run.exits == exits((NOTHING, None))


# ---- loops -----------------------------------------------------------------------------------

_PREPARE = """
    lea rbx, [rip + 0x3ffc]
again:
    mov rdi, rbx
    call lock
    add rbx, 0x20
    cmp rbx, 0x4200
    jne {again}
    ret
"""


def test_a_loop_over_an_array_holds_its_elements() -> None:
    run = follow(_PREPARE, Callees(library=MUTEXES), joined=True)
    held = run.exits[0].held
    assert any(isinstance(h.base, Element) and h.base[1:] == (DATA, 0x20) for h in held)


def test_joined_keeps_what_any_way_holds() -> None:
    text = """
        cmp dword ptr [0x4100], 0
        je {without}
        mov edi, 0x4000
        call lock
    without:
        mov edi, 0x4040
        call lock
        ret
    """
    callees = Callees(library=MUTEXES)
    assert follow(text, callees, joined=True).exits == exits((frozenset([LOCK, OTHER]), None))
    assert len(follow(text, callees).exits) == 2


def test_what_elements_of_a_table_hold_is_what_some_element_holds() -> None:
    run = follow("""
        mov ebp, 0x4000
        mov rbx, qword ptr [0x4000]
    again:
        mov qword ptr [0x4100], rbx
        mov rbx, qword ptr [rbp + 8]
        add rbp, 8
        test rbx, rbx
        jne {again}
        ret
    """)
    stored = run.stores[Value(Object(0), DATA + 0x100)]
    assert Value(Content(Element(Object(0), DATA, 8), 0), 0) in stored


# ---- calls -----------------------------------------------------------------------------------


def test_a_lock_of_a_parameter_is_named_by_it() -> None:
    run = follow("add rdi, 0x18\ncall lock\nret", Callees(library=MUTEXES))
    assert [a.address for a in run.acquires] == [Value(Entry("rdi"), 0x18)]


def test_a_callee_that_lets_the_callers_lock_go() -> None:
    callees = Callees(library=MUTEXES, effects={"drop": Effect(exits((NOTHING, None)), HELD)})
    run = follow("call drop\nret", callees, held=HELD)
    assert run.exits == exits((NOTHING, None))


def test_a_callee_that_keeps_the_lock_by_its_result() -> None:
    callees = Callees(
        effects={"try_it": Effect(exits((HELD, "nonzero"), (NOTHING, "zero")), NOTHING)}, noted=frozenset({"inside"})
    )
    run = follow("call try_it\ntest eax, eax\nje {no}\ncall inside\nno:\nret", callees)
    assert [c.held for c in run.calls] == [HELD]


@pytest.mark.parametrize("joined", [False, True])
def test_many_calls_in_a_block_that_come_back_with_different_locks(joined: bool) -> None:
    """Each doubles the ways that are told apart, and no more than so many are."""
    names = [f"try{number}" for number in range(40)]
    locks = [Value(Object(0), LOCK.offset + 8 * number) for number in range(40)]
    effects = {
        name: Effect(exits((frozenset([lock]), None), (NOTHING, None)), NOTHING)
        for name, lock in zip(names, locks, strict=True)
    }
    run = follow("".join(f"call {name}\n" for name in names) + "ret", Callees(effects=effects), joined=joined)
    kept = frozenset[Value]().union(*(e.held for e in run.exits))
    assert run.exits
    assert kept == frozenset(locks) if joined else kept <= frozenset(locks)


def test_waiting_for_what_is_held_on_entry_is_noted() -> None:
    run = follow(SPIN + "ret", held=HELD)
    assert {a.address for a in run.again} == HELD


def test_trying_what_is_held_on_entry_is_not() -> None:
    text = "mov eax, 0\nmov ecx, 1\nlock cmpxchg dword ptr [0x4000], ecx\nret"
    assert not follow(text, held=HELD).again


def test_an_acquisition_that_gives_up_does_not_block() -> None:
    callees = Callees(library={"timed": mutex("acquire", bounded=True)})
    run = follow("mov edi, 0x4000\ncall timed\nret", callees)
    assert [a.blocking for a in run.acquires] == [False]


def test_a_call_that_does_not_come_back_ends_the_way() -> None:
    run = follow("mov edi, 0x4000\ncall lock\ncall die\nret", Callees(library=MUTEXES, ending=frozenset({"die"})))
    assert not run.exits


def test_only_what_is_watched_is_held() -> None:
    text = "mov edi, 0x4000\ncall lock\nmov edi, 0x4040\ncall lock\nret"
    run = follow(text, Callees(library=MUTEXES), watched=frozenset([OTHER]))
    assert run.exits == exits((frozenset([OTHER]), None))


# ---- pointers and the thread's own storage ---------------------------------------------------


def test_a_call_through_a_pointer_in_memory_is_followed() -> None:
    pointer = Value(Content(Content(Object(0), DATA + 0x80), 0x10), 0)
    callees = Callees(library=MUTEXES, pointers={pointer: ("walk",)}, noted=frozenset({"walk"}))
    run = follow("mov edi, 0x4000\ncall lock\nmov rax, qword ptr [0x4080]\ncall qword ptr [rax + 0x10]\nret", callees)
    assert [(callees.names[c.target], c.held, c.is_chosen) for c in run.calls] == [("walk", HELD, True)]


def test_a_flag_of_the_thread_is_held_until_another_store() -> None:
    assert follow("mov dword ptr fs:[0x10], 1\nret", flagged=True).exits == exits((frozenset([raised(1)]), None))
    run = follow("mov dword ptr fs:[0x10], 1\nmov dword ptr fs:[0x10], ecx\nret", flagged=True)
    assert run.exits == exits((NOTHING, None))
    assert FLAG in run.releases


def test_flags_are_not_followed_unasked() -> None:
    assert follow("mov dword ptr fs:[0x10], 1\nret").exits == exits((NOTHING, None))


_GUARDED = "cmp dword ptr fs:[0x10], 0\njne {out}\nmov edi, 0x4000\ncall lock\nout:\nret"


@pytest.mark.parametrize(("flag", "takes"), [(1, 0), (0, 1)])
def test_a_flag_decides_the_branch_that_tests_it(flag: int, takes: int) -> None:
    run = follow(_GUARDED, Callees(library=MUTEXES), held=frozenset([raised(flag)]), flagged=True)
    assert len(run.acquires) == takes


def test_storing_a_flag_keeps_the_locks() -> None:
    run = follow(
        """
        mov edi, 0x4000
        call lock
        cmp dword ptr [0x4100], 0
        jne {flag}
        mov edi, 0x4000
        call unlock
        mov eax, 0
        ret
    flag:
        mov dword ptr fs:[0x10], 1
        call inside
        mov eax, 1
        ret
        """,
        Callees(library=MUTEXES, noted=frozenset({"inside"})),
        flagged=True,
    )
    assert [c.held for c in run.calls] == [frozenset([LOCK, raised(1)])]


def test_a_callee_sets_a_flag_by_its_result() -> None:
    """enter() returns false where the flag was set before; only where it returns true is it set now."""
    callees = Callees(
        effects={"enter": Effect(exits((frozenset([raised(1)]), "nonzero"), (NOTHING, "zero")), frozenset([FLAG]))},
        noted=frozenset({"walk"}),
    )
    run = follow("call enter\ntest eax, eax\nje {no}\ncall walk\nno:\nret", callees, flagged=True)
    assert [c.held for c in run.calls] == [frozenset([raised(1)])]


_X86_CELLS = {
    "initial-exec": "mov rax, qword ptr [0x4800]\nmov dword ptr fs:[rax], 1\nret",
    "by the thread pointer": "mov rax, qword ptr fs:[0]\nadd rax, qword ptr [0x4800]\nmov dword ptr [rax], 1\nret",
    "general-dynamic": "mov edi, 0x4800\ncall __tls_get_addr\nmov dword ptr [rax], 1\nret",
}


@pytest.mark.parametrize("model", _X86_CELLS)
def test_models_of_thread_storage_on_x86_64(model: str) -> None:
    run = follow(_X86_CELLS[model], flagged=True)
    assert run.exits == exits((frozenset([Value(Flag(Thread(Content(Object(0), DATA + 0x800)), 0, 1), 0)]), None))


_ARM_CELLS = {
    "initial-exec": "movz x0, #0x4800\nldr x0, [x0]\nmrs x1, tpidr_el0\nmov w2, #1\nstr w2, [x1, x0]\nret",
    "descriptor": "movz x0, #0x4800\nldr x1, [x0]\nblr x1\nmrs x1, tpidr_el0\nmov w2, #1\nstr w2, [x1, x0]\nret",
}


@pytest.mark.parametrize("model", _ARM_CELLS)
def test_models_of_thread_storage_on_aarch64(model: str) -> None:
    run = follow(_ARM_CELLS[model], machine=Machine.AARCH64, flagged=True)
    assert run.exits == exits((frozenset([Value(Flag(Thread(Content(Object(0), DATA + 0x800)), 0, 1), 0)]), None))


# ---- blocks ----------------------------------------------------------------------------------


def test_what_must_hold_on_a_way_is_told_by_its_turns() -> None:
    run = follow("cmp dword ptr [0x4100], 0\nje {out}\nmov edi, 0x4000\ncall lock\nout:\nret", Callees(library=MUTEXES))
    site = run.acquires[0].site
    assert [(t.value, t.equal) for t in run.blocks.requires(run.block_of(site))] == [
        (Value(Content(Object(0), DATA + 0x100), 0), False)
    ]
    assert not run.blocks.surely_reaches([run.block_of(site)])


def test_a_branch_that_an_argument_decides_is_sure_for_some() -> None:
    run = follow("test edi, edi\nje {out}\nmov edi, 0x4000\ncall lock\nout:\nret", Callees(library=MUTEXES))
    assert run.blocks.surely_reaches([run.block_of(run.acquires[0].site)])


def test_a_computed_jump_makes_a_run_incomplete() -> None:
    run = follow("jmp rax\nret\nret")
    assert not run.complete


_LOCKS_ALL = {
    "exit last": "lea rbx, [0x4000]\nagain:\nmov rdi, rbx\ncall lock\nadd rbx, 0x40\ncmp rbx, 0x4100\njne {again}\nret",
    "exit first": "jmp {begin}\nout:\nret\nbegin:\nlea rbx, [0x4000]\nagain:\nmov rdi, rbx\ncall lock\nadd rbx, 0x40\n"
    "cmp rbx, 0x4100\nje {out}\njmp {again}",
    "body last": "lea rbx, [0x4000]\njmp {again}\nout:\nret\nagain:\nmov rdi, rbx\ncall lock\nadd rbx, 0x40\n"
    "cmp rbx, 0x4100\njne {again}\njmp {out}",
}


@pytest.mark.parametrize("layout", _LOCKS_ALL)
@pytest.mark.parametrize("joined", [False, True])
def test_what_is_held_does_not_depend_on_where_the_compiler_puts_a_block(layout: str, *, joined: bool) -> None:
    run = follow(_LOCKS_ALL[layout], Callees(library=MUTEXES), joined=joined)
    held = frozenset[Value]().union(*(e.held for e in run.exits))
    assert Value(Element(Object(0), DATA, 0x40), 0) in held


def test_a_name_given_where_ways_meet_is_known_for_what_met() -> None:
    run = follow(
        "test edi, edi\nje {other}\nmov eax, dword ptr [0x4100]\njmp {meet}\nother:\nmov eax, dword ptr [0x4200]\n"
        "meet:\ntest eax, eax\njne {out}\nmov edi, 0x4000\ncall lock\nout:\nret",
        Callees(library=MUTEXES),
    )
    (turn,) = run.blocks.requires(run.block_of(run.acquires[0].site))
    assert run.meant(turn.value) == {
        Value(Content(Object(0), DATA + 0x100), 0),
        Value(Content(Object(0), DATA + 0x200), 0),
    }


def test_a_condition_on_one_of_two_ways_to_a_lock_is_not_required() -> None:
    run = follow(
        "cmp dword ptr [0x4100], 0\nje {take}\ncmp dword ptr [0x4200], 0\njne {out}\ntake:\nmov edi, 0x4000\n"
        "call lock\nout:\nret",
        Callees(library=MUTEXES),
    )
    assert not run.blocks.requires(run.block_of(run.acquires[0].site))


def test_a_function_tells_what_locks_it_has_to_do_with() -> None:
    run = follow("mov edi, 0x4000\ncall lock\nmov edi, 0x4040\ncall unlock\nret", Callees(library=MUTEXES))
    assert {LOCK, OTHER} <= run.touched


def test_following_leaves_nothing_for_the_collector() -> None:
    """It is off during a scan: states that only it could free would all be kept to the end."""
    follow(SPIN + "mov dword ptr [0x4000], 0\nret")
    gc.collect()
    gc.disable()
    try:
        run = follow(SPIN + "mov dword ptr [0x4000], 0\nret")
        assert run.acquires
        assert not [o for o in gc.get_objects() if type(o).__name__ == "_Interpreter" or isinstance(o, State)]
    finally:
        gc.enable()
