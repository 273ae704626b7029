"""Which side of a fork runs, which values reach a call, where control can go: on both machines.

Each function is written once for each machine, with the same labels: `forks` is the call of fork, `child` and
`parent` are where the two sides go, `failed` where a negative result goes.
"""

# ruff: noqa: E501 - a line of assembly is one line here
from __future__ import annotations

import pytest

from forkproof.code.explore import CallEffect, Exploration, explore
from forkproof.code.values import Entry, Result, Value, Word
from forkproof.elf.image import Machine
from tests.unit.code.conftest import Assemble, Assembled

MACHINES = ("x86_64", "aarch64")
RESULT = {Machine.X86_64: "rax", Machine.AARCH64: "x0"}
CHILD, PARENT, FAILED = 0, 4711, -1

#: How the result of fork is kept, and how it is tested.
FORKS = {
    "register, == 0": {
        "x86_64": "test eax, eax\n je child\n jmp parent",
        "aarch64": "cbz w0, child\n b parent",
    },
    "register, > 0": {
        "x86_64": "test eax, eax\n jg parent\n js failed\n jmp child",
        "aarch64": "cmp w0, #0\n b.gt parent\n tbnz w0, #31, failed\n b child",
    },
    "cmp -1": {
        "x86_64": "cmp eax, -1\n je failed\n test eax, eax\n jne parent\n jmp child",
        "aarch64": "cmn w0, #1\n b.eq failed\n cbnz w0, parent\n b child",
    },
    "add 1": {
        "x86_64": "mov ecx, eax\n inc ecx\n je failed\n test eax, eax\n jne parent\n jmp child",
        "aarch64": "adds w1, w0, #1\n mov w1, w0\n cmp w1, #0\n b.lt failed\n b.ne parent\n b child",
    },
    "switch": {
        "x86_64": "cmp eax, 0\n jl failed\n je child\n jmp parent",
        "aarch64": "cmp w0, #0\n b.lt failed\n b.eq child\n b parent",
    },
    "callee-saved register": {
        "x86_64": "mov ebx, eax\n call other\n test ebx, ebx\n js failed\n jne parent\n jmp child",
        "aarch64": "mov w19, w0\n bl other\n cmp w19, #0\n b.lt failed\n b.ne parent\n b child",
    },
    "stack slot": {
        "x86_64": "mov [rsp+12], eax\n call other\n cmp dword ptr [rsp+12], 0\n jl failed\n jne parent\n jmp child",
        "aarch64": "str w0, [sp, #12]\n bl other\n ldr w1, [sp, #12]\n cmp w1, #0\n b.lt failed\n b.ne parent\n b child",
    },
    "frame pointer slot": {
        "x86_64": "mov [rbp-20], eax\n call other\n mov eax, [rbp-20]\n test eax, eax\n js failed\n je child\n jmp parent",
        "aarch64": "str w0, [x29, #28]\n bl other\n ldr w0, [x29, #28]\n cmp w0, #0\n b.lt failed\n b.eq child\n b parent",
    },
    "global": {
        "x86_64": "mov dword ptr pid[rip], eax\n call other\n mov edx, dword ptr pid[rip]\n cmp edx, 0\n jl failed\n"
        " je child\n jmp parent",
        "aarch64": "adrp x1, pid\n add x1, x1, :lo12:pid\n str w0, [x1]\n bl other\n adrp x2, pid\n add x2, x2, :lo12:pid\n"
        " ldr w2, [x2]\n cmp w2, #0\n b.lt failed\n b.eq child\n b parent",
    },
    "struct field": {
        "x86_64": "mov [rbx+48], eax\n call other\n mov eax, [rbx+48]\n cmp eax, 0\n jl failed\n jne parent\n jmp child",
        "aarch64": "str w0, [x19, #48]\n bl other\n ldr w3, [x19, #48]\n cmp w3, #0\n b.lt failed\n b.ne parent\n b child",
    },
    "sign-extended": {
        "x86_64": "cdqe\n test rax, rax\n js failed\n jne parent\n jmp child",
        "aarch64": "sxtw x0, w0\n cmp x0, #0\n b.lt failed\n b.ne parent\n b child",
    },
}
FRAME = {
    "x86_64": (".globl f\nf:\n call fork@PLT\nforks:\n {}\n", "{}:\n call {}_work@PLT\n ret\n", "other:\n ret\n"),
    "aarch64": (".globl f\nf:\n bl fork\nforks:\n {}\n", "{}:\n bl {}_work\n ret\n", "other:\n ret\n"),
}


def _forker(assemble: Assemble, machine: str, test: str) -> Assembled:
    head, side, tail = FRAME[machine]
    sides = "".join(side.format(name, name) for name in ("child", "parent", "failed"))
    return assemble(machine, f"{head.format(test)}{sides}end:\n{tail}\n.bss\n.balign 8\npid: .space 8\n.text")


def _after_fork(code: Assembled, result: int) -> Exploration:
    return explore(code.body(), code.machine, code["forks"], known={RESULT[code.machine]: result})


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("how", list(FORKS))
@pytest.mark.parametrize(("result", "side"), [(CHILD, "child"), (PARENT, "parent"), (FAILED, "failed")])
def test_only_the_side_of_the_result_runs(assemble: Assemble, machine: str, how: str, result: int, side: str) -> None:
    code = _forker(assemble, machine, FORKS[how][machine])
    if side == "failed" and "failed" not in FORKS[how][machine]:
        side = "parent"
    visited = _after_fork(code, result).visited
    assert [name for name in ("child", "parent", "failed") if code[name] in visited] == [side]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("how", [how for how, text in FORKS.items() if "failed" in text["x86_64"] and how != "add 1"])
def test_success_excludes_what_follows_failure(assemble: Assemble, machine: str, how: str) -> None:
    code = _forker(assemble, machine, FORKS[how][machine])
    lucky = explore(code.body(), code.machine, code["f"], effects=lambda _: CallEffect(succeeds=True)).visited
    assert [name for name in ("child", "parent", "failed") if code[name] in lucky] == ["child", "parent"]


@pytest.mark.parametrize("machine", MACHINES)
def test_unknown_result_runs_every_side(assemble: Assemble, machine: str) -> None:
    code = _forker(assemble, machine, FORKS["cmp -1"][machine])
    visited = explore(code.body(), code.machine, code["f"]).visited
    assert {code["child"], code["parent"], code["failed"]} <= visited


@pytest.mark.parametrize("machine", MACHINES)
def test_result_is_lost_with_the_cell_that_held_it(assemble: Assemble, machine: str) -> None:
    """Half of the slot is written: nobody can say what the whole holds then."""
    lost = {
        "x86_64": "mov [rsp+8], rax\n mov dword ptr [rsp+12], 1\n cmp qword ptr [rsp+8], 0\n je child\n jmp parent",
        "aarch64": "str x0, [sp, #8]\n str wzr, [sp, #12]\n ldr x1, [sp, #8]\n cbz x1, child\n b parent",
    }
    code = _forker(assemble, machine, lost[machine])
    assert {code["child"], code["parent"]} <= _after_fork(code, CHILD).visited


# ---- values at calls ---------------------------------------------------------------------------

ARGUMENTS = {Machine.X86_64: ("rdi", "rsi", "rdx"), Machine.AARCH64: ("x0", "x1", "x2")}


def _arguments(code: Assembled, site: str) -> list[Value | None]:
    state = explore(code.body(), code.machine, code["f"], watch={code[site]}).states[code[site]]
    return [state.register(name) for name in ARGUMENTS[code.machine]]


@pytest.mark.parametrize("machine", MACHINES)
def test_parameters_are_followed_through_a_wrapper(assemble: Assemble, machine: str) -> None:
    text = {
        "x86_64": "f:\n push rbx\n mov rbx, rdi\n mov rdx, rsi\n mov rsi, rbx\n xor edi, edi\nsite: call g@PLT\n"
        " pop rbx\n ret\nend:",
        "aarch64": "f:\n stp x29, x30, [sp, #-32]!\n str x19, [sp, #16]\n mov x19, x0\n mov x2, x1\n mov x1, x19\n"
        " mov w0, #0\nsite: bl g\n ldr x19, [sp, #16]\n ldp x29, x30, [sp], #32\n ret\nend:",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    first, second, _ = ARGUMENTS[code.machine]
    assert _arguments(code, "site") == [Value(None, 0), Value(Entry(first), 0), Value(Entry(second), 0)]


@pytest.mark.parametrize("machine", MACHINES)
def test_got_word_and_function_address_reach_the_call(assemble: Assemble, machine: str) -> None:
    """perftools_pthread_atfork loads its handlers from the GOT."""
    text = {
        "x86_64": "f:\n mov rdi, handler@GOTPCREL[rip]\n lea rsi, other[rip]\n mov edx, 7\nsite: call g@PLT\n ret\n"
        "end:\nother: ret",
        "aarch64": "f:\n adrp x0, :got:handler\n ldr x0, [x0, :got_lo12:handler]\n adrp x1, other\n"
        " add x1, x1, :lo12:other\n mov w2, #7\nsite: bl g\n ret\nend:\nother: ret",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    word, function, constant = _arguments(code, "site")
    assert word is not None
    assert isinstance(word.base, Word)
    slot = word.base.address
    assert code.image.dynamic_symbols.names[code.image.slot_symbols[slot]] == "handler"
    assert function == Value(None, code["other"])
    assert constant == Value(None, 7)


@pytest.mark.parametrize("machine", MACHINES)
def test_paths_that_disagree_leave_nothing(assemble: Assemble, machine: str) -> None:
    text = {
        "x86_64": "f:\n mov esi, 1\n test edi, edi\n je 1f\n mov esi, 2\n1: mov edi, 3\nsite: call g@PLT\n ret\nend:",
        "aarch64": "f:\n mov w1, #1\n cbz w0, 1f\n mov w1, #2\n1: mov w0, #3\nsite: bl g\n ret\nend:",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    assert _arguments(code, "site")[:2] == [Value(None, 3), None]


@pytest.mark.parametrize("machine", MACHINES)
def test_call_destroys_argument_registers_and_leaves_its_result(assemble: Assemble, machine: str) -> None:
    text = {
        "x86_64": "f:\n mov esi, 1\nfirst: call g@PLT\n mov edi, eax\nsite: call g@PLT\n ret\nend:",
        "aarch64": "f:\n mov w1, #1\nfirst: bl g\n mov w0, w0\nsite: bl g\n ret\nend:",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    assert _arguments(code, "site")[:2] == [Value(Result(code["first"]), 0), None]


# ---- where control goes ------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_runs_after_a_call_that_does_not_return(assemble: Assemble, machine: str) -> None:
    text = {
        "x86_64": "f:\nsite: call abort@PLT\nafter: ret\nend:",
        "aarch64": "f:\nsite: bl abort\nafter: ret\nend:",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    ends = explore(code.body(), code.machine, code["f"], effects=lambda _: CallEffect(returns=False))
    assert code["after"] not in ends.visited
    assert not ends.returns
    assert explore(code.body(), code.machine, code["f"]).returns


@pytest.mark.parametrize("machine", MACHINES)
def test_constant_result_of_a_call_decides(assemble: Assemble, machine: str) -> None:
    text = {
        "x86_64": "f:\n call g@PLT\n test al, al\n je no\nyes: ret\nno: ret\nend:",
        "aarch64": "f:\n bl g\n cbz w0, no\nyes: ret\nno: ret\nend:",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    visited = explore(code.body(), code.machine, code["f"], effects=lambda _: CallEffect(True, 1)).visited
    assert code["yes"] in visited
    assert code["no"] not in visited


@pytest.mark.parametrize("machine", MACHINES)
def test_computed_jump_reaches_the_cases_of_a_switch(assemble: Assemble, machine: str) -> None:
    text = {
        "x86_64": "f:\n lea rdx, table[rip]\n movsxd rax, dword ptr [rdx+rdi*4]\n add rax, rdx\n jmp rax\n"
        "one: call a@PLT\n ret\ntwo: call b@PLT\n ret\nend:\n .section .rodata\ntable: .long one-table, two-table\n.text",
        "aarch64": "f:\n adrp x1, table\n add x1, x1, :lo12:table\n ldrsw x2, [x1, x0, lsl #2]\n add x2, x2, x1\n br x2\n"
        "one: bl a\n ret\ntwo: bl b\n ret\nend:\n .section .rodata\ntable: .long one-table, two-table\n.text",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    found = explore(code.body(), code.machine, code["f"])
    assert {code["one"], code["two"]} <= found.visited
    assert not found.complete


@pytest.mark.parametrize("machine", MACHINES)
def test_computed_jump_of_a_straight_function_is_a_tail_call(assemble: Assemble, machine: str) -> None:
    text = {"x86_64": "f:\nsite: jmp rax\nend:", "aarch64": "f:\nsite: br x1\nend:"}
    code = assemble(machine, f".globl f\n{text[machine]}")
    found = explore(code.body(), code.machine, code["f"])
    assert [(t.site, t.is_jump) for t in found.transfers] == [(code["site"], True)]
    assert found.complete
    assert found.returns


@pytest.mark.parametrize("machine", MACHINES)
def test_conditional_tail_call_leaves_the_function(assemble: Assemble, machine: str) -> None:
    text = {
        "x86_64": "f:\n test edi, edi\nsite: jne far\n ret\nend:\n .space 64, 0x90\nfar: ret",
        "aarch64": "f:\nsite: cbnz w0, far\n ret\nend:\n nop\nfar: ret",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    found = explore(code.body(), code.machine, code["f"])
    assert [(t.site, t.is_jump) for t in found.transfers] == [(code["site"], True)]


@pytest.mark.parametrize("machine", MACHINES)
def test_counting_loop_ends(assemble: Assemble, machine: str) -> None:
    """The counter takes a new value each time round: it is forgotten after some visits."""
    text = {
        "x86_64": "f:\n xor eax, eax\n1: inc eax\n cmp eax, 1000000\n jne 1b\nafter: ret\nend:",
        "aarch64": "f:\n mov w0, #0\n mov w1, #1000\n1: add w0, w0, #1\n cmp w0, w1\n b.ne 1b\nafter: ret\nend:",
    }
    code = assemble(machine, f".globl f\n{text[machine]}")
    assert code["after"] in explore(code.body(), code.machine, code["f"]).visited


@pytest.mark.parametrize("machine", MACHINES)
def test_endless_loop_does_not_return(assemble: Assemble, machine: str) -> None:
    text = {"x86_64": "f:\n1: pause\n jmp 1b\n ret\nend:", "aarch64": "f:\n1: yield\n b 1b\n ret\nend:"}
    code = assemble(machine, f".globl f\n{text[machine]}")
    assert not explore(code.body(), code.machine, code["f"]).returns
