"""The scanners on bytes written by hand, and their agreement with the decoder on what a site's address is."""

# ruff: noqa: E501 - a line of assembly is one line here
from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from forkproof.code import aarch64, x86_64
from forkproof.code.decode import decode
from forkproof.code.disassembler import starts
from forkproof.code.explore import explore
from forkproof.code.index import find_stores, index_code
from forkproof.code.operations import Memory, Register, Set
from forkproof.code.sites import EntryMap, Landmarks, Sites, Stores
from forkproof.elf.image import Machine
from tests.unit.code.conftest import Assemble, Assembled

BASE = 0x1000
FUNCTION = 0x1080
SLOT = 0x3000
NOTHING = np.zeros(0, np.int64)


def _scan(scanner: ModuleType, code: str) -> Sites:
    """Sites of some bytes at 0x1000; 0x1080 is a function."""
    raw = np.frombuffer(bytes.fromhex(code).ljust(0x100, b"\x90" if scanner is x86_64 else b"\0"), np.uint8)
    entries = EntryMap(BASE, BASE + 0x100, np.array([FUNCTION], np.int64), NOTHING)
    sites = scanner.scan(raw, BASE, Landmarks(entries))
    assert isinstance(sites, Sites)
    return sites


@pytest.mark.parametrize(
    ("code", "site", "jump"),
    [
        ("e87b000000", 0x1000, False),  # call
        ("e97b000000", 0x1000, True),  # jmp rel32
        ("0f847a000000", 0x1000, True),  # je rel32
        ("eb7e", 0x1000, True),  # jmp rel8
        ("67e87a000000", 0x1001, False),  # addr32 call: what a linker makes of call *f@GOTPCREL(%rip)
        ("f2e97a000000", 0x1001, True),  # bnd jmp
        ("666648e878000000", 0x1003, False),  # data16 data16 rex.W call: general dynamic TLS
    ],
)
def test_x86_branch_to_a_function(code: str, site: int, jump: bool) -> None:
    sites = _scan(x86_64, code)
    assert sites.direct_site.tolist() == [site]
    assert sites.direct_target.tolist() == [FUNCTION]
    assert sites.direct_jump.tolist() == [jump]


@pytest.mark.parametrize("code", ["e87c000000", "e97c000000", "0f8400000000", "7e7e", "e8"])
def test_x86_what_does_not_lead_to_a_function_is_none(code: str) -> None:
    assert _scan(x86_64, code).direct_site.tolist() == []


def test_x86_call_and_jump_through_the_got() -> None:
    sites = _scan(x86_64, "ff15fa1f0000 ff25f41f0000")
    assert sites.slot_site.tolist() == [0x1000, 0x1006]
    assert sites.slot_address.tolist() == [SLOT, SLOT]
    assert sites.slot_jump.tolist() == [False, True]


@pytest.mark.parametrize(
    ("code", "register"), [("488d3d79000000", 7), ("488d0579000000", 0), ("4c8d0579000000", 8), ("4c8d3d79000000", 15)]
)
def test_x86_address_of_a_function(code: str, register: int) -> None:
    sites = _scan(x86_64, code)
    assert (sites.taken_target.tolist(), sites.taken_register.tolist()) == ([FUNCTION], [register])


def test_x86_indirect_calls_are_counted() -> None:
    sites = _scan(x86_64, "ffd0 ff5010 41ffd4 ffe0 ff6018")
    assert len(sites.indirect) == 4, "jmp *%rax is a switch more often than a call"


@pytest.mark.parametrize(
    ("word", "jump"),
    [
        (0x94000020, False),  # bl
        (0x14000020, True),  # b
        (0x54000400, True),  # b.eq
        (0xB4000400, True),  # cbz x0
        (0x35000400, True),  # cbnz w0
        (0x36000400, True),  # tbz w0, #0
        (0xB7F80400, True),  # tbnz x0, #63
    ],
)
def test_aarch64_branch_to_a_function(word: int, jump: bool) -> None:
    sites = _scan(aarch64, word.to_bytes(4, "little").hex())
    assert sites.direct_site.tolist() == [BASE]
    assert sites.direct_target.tolist() == [FUNCTION]
    assert sites.direct_jump.tolist() == [jump]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_backward_branches(assemble: Assemble, machine: str) -> None:
    text = {"x86_64": "f:\n ret\n.balign 16\ng:\n call f\n jmp f", "aarch64": "f:\n ret\ng:\n bl f\n b f"}
    head = "".join(f".globl {n}\n.type {n}, %function\n.hidden {n}\n" for n in "fg")
    code = assemble(machine, f"{head}{text[machine]}")
    index = index_code(code.image)
    assert index.sites.direct_target.tolist() == [code["f"], code["f"]]
    assert index.sites.direct_jump.tolist() == [False, True]


@pytest.mark.parametrize("prefix", [".byte 0x67", ".byte 0xf2", ".byte 0x66, 0x66, 0x48", ""])
def test_scanner_and_decoder_agree_on_the_site_of_a_prefixed_call(assemble: Assemble, prefix: str) -> None:
    """A call whose site is not the one in the graph would be a call to nowhere."""
    code = assemble(
        "x86_64",
        f".globl f\n.type f, @function\n.type g, @function\nf:\n jmp before\n nop\nbefore:\n {prefix}\n .byte 0xe8\n"
        " .long g-.-4\n ret\nend:\n.balign 16\ng:\n ret",
    )
    index, found = index_code(code.image), explore(code.body(), code.machine, code["f"])
    assert [t.site for t in found.transfers] == index.sites.direct_site.tolist()
    assert found.returns, "the jump to the prefix arrives"


def test_prefixed_call_through_the_got_has_one_site(assemble: Assemble) -> None:
    code = assemble(
        "x86_64",
        ".globl f\n.type f, @function\nf:\n .byte 0xf2\n call g@GOTPCREL[rip]\n bnd jmp g@GOTPCREL[rip]\nend:",
        "-Wl,-z,norelro",
    )
    index, found = index_code(code.image), explore(code.body(), code.machine, code["f"])
    assert [t.site for t in found.transfers] == index.sites.slot_site.tolist()


def test_short_jump_inside_another_instruction_is_none(assemble: Assemble) -> None:
    """89 eb is mov ebx, ebp; eb 02 alone would be a jump to g. A real short tail call stays."""
    code = assemble(
        "x86_64",
        ".globl f\n.type f, @function\n.globl g\n.hidden g\n.type g, @function\n"
        "f:\n mov ebx, ebp\n .byte 0x04, 0x05\n nop\n nop\nreal: .byte 0xeb, g-.-1\n .size f, .-f\ng:\n ret\n .size g, .-g",
    )
    index = index_code(code.image)
    raw = code.image.read(code["f"], 3).tobytes()
    assert raw == b"\x89\xeb\x04"
    assert code["g"] == code["f"] + 3 + 4 + 1, "the byte 04 is the displacement of the jump that is none"
    assert index.sites.direct_site.tolist() == [code["real"]]


def test_jump_to_the_own_start_is_a_loop(assemble: Assemble) -> None:
    code = assemble("x86_64", ".globl f\n.type f, @function\nf:\n dec edi\n jne f\n call f@PLT\n jmp f\n.size f, .-f")
    index = index_code(code.image)
    assert [bool(j) for j in index.sites.direct_jump] == [False], "the recursive call stays"


def test_entry_0_of_a_library_is_no_function(assemble: Assemble) -> None:
    code = assemble("aarch64", ".globl f\n.type f, %function\nf:\n ret\n.size f, .-f", "-Wl,-z,noseparate-code")
    assert code.image.entry == 0
    assert index_code(code.image).start.tolist() == [code["f"]]


def test_code_without_tables_is_found_by_its_calls(assemble: Assemble) -> None:
    """Assembly with neither symbols nor CFI, as in libjpeg's SIMD code: what is called is a function."""
    code = assemble(
        "x86_64",
        ".globl f\n.type f, @function\nf:\n call .Lhidden\n ret\n.size f, .-f\n.balign 16\n.space 256, 0x90\n"
        ".balign 16\n.Lhidden:\n call .Ldeeper\n ret\n.balign 16\n.space 256, 0x90\n.balign 16\n.Ldeeper:\n ret\n.space 64, 0x90",
    )
    index = index_code(code.image)
    assert len(index.start) == 3
    assert [index.function_at(s) for s in index.sites.direct_site.tolist()] == [0, 1]
    assert index.sites.direct_target.tolist() == index.start[1:].tolist()


@pytest.mark.parametrize(
    ("code", "site"),
    [
        ("488d05f92f0000", 0x1003),  # lea 0x2ff9(%rip), %rax: its end is the displacement's
        ("803df92f000001", 0x1002),  # cmpb $1, 0x2ff9(%rip): a byte follows
        ("66813df72f00000100", 0x1003),  # cmpw $1, 0x2ff7(%rip)
        ("813df62f000001000000", 0x1002),  # cmpl $1, 0x2ff6(%rip)
    ],
)
def test_x86_references_to_an_address(code: str, site: int) -> None:
    raw = np.frombuffer(bytes.fromhex(code).ljust(0x20, b"\x90"), np.uint8)
    assert x86_64.find_references(raw, BASE, 0x4000).tolist() == [site]
    assert x86_64.find_references(raw, BASE, 0x4001).tolist() in ([], [site])  # another operand's size would fit
    assert x86_64.find_references(raw, BASE, 0x4000 + (1 << 32)).tolist() == []
    assert x86_64.find_references(raw[:3], BASE, 0x4000).tolist() == []


def test_x86_references_backwards() -> None:
    raw = np.frombuffer(bytes.fromhex("488d05f9efffff").ljust(0x20, b"\x90"), np.uint8)
    assert x86_64.find_references(raw, BASE, 0).tolist() == [0x1003]


def test_aarch64_references_to_a_page_and_an_address() -> None:
    words = [0xD503201F, 0xB0000000, 0x10000100, 0x91000000]  # nop; adrp x0, 0x2000; adr x0, 0x1028; add
    raw = np.frombuffer(b"".join(word.to_bytes(4, "little") for word in words), np.uint8)
    assert aarch64.find_references(raw, BASE, 0x2ABC).tolist() == [0x1004]
    assert aarch64.find_references(raw, BASE, 0x1028).tolist() == [0x1008]
    assert aarch64.find_references(raw, BASE, 0x3000).tolist() == []


@pytest.mark.parametrize(
    ("code", "holds"),
    [
        ("f00fb10b", True),  # lock cmpxchg %ecx, (%rbx)
        ("66f0480fc10b", True),  # a prefix before the lock
        ("8703", True),  # xchg %eax, (%rbx), which locks by itself
        ("64488703", True),  # xchg %rax, %fs:(%rbx)
        ("87c3", False),  # xchg %eax, %ebx
        ("0f8786000000", False),  # ja, by 0x86
        ("b8f0000000", False),  # mov $0xf0, %eax
        ("0fb10b", False),  # cmpxchg without a lock
    ],
)
def test_x86_atomic_operations_are_told_from_bytes_that_look_like_one(code: str, holds: bool) -> None:
    raw = bytes.fromhex(code)
    bytes_, begins = np.frombuffer(raw, np.uint8), starts(Machine.X86_64, raw)
    assert x86_64.holds_atomic(bytes_, begins) is holds
    assert x86_64.may_hold_atomic(bytes_) or not holds


X86_STORES = """
mov [rbx+8], rdi; mov [r12+16], r15; mov [rbx+rcx*8+24], rsi; mov [rbx+0x1000], rdx; mov [r12+0x1008], rdx
movups [rbx+32], xmm1; movaps [r12+48], xmm9; movhps [rbx+64], xmm0; movq [rbx+72], xmm0; movlps [r13+80], xmm10
vmovdqu [rbx+96], xmm1; vmovups [r12+112], xmm12; movdqu [rbx+128], xmm0; movsd [rbx+144], xmm3; vmovaps [rbx], xmm2
"""
ARM_STORES = """
str x1, [x0, #16]; stur x1, [x0, #255]; str x1, [x0, #32752]; stp x1, x2, [x0, #32]; stp q0, q1, [x3, #64]
str q0, [x3, #128]; stur q0, [x3, #-16]; str d0, [x4, #152]; stp d0, d1, [x5, #160]; stlr x1, [x0]; stnp x1, x2, [x0, #176]
sttr x1, [x0, #192]; str x1, [x0, x2]; str x1, [x0], #8; str x1, [x0, #8]!; stp x1, x2, [x0], #16; stur d3, [x0, #200]
"""


def _stores(code: Assembled, first: int, last: int, offsets: list[int], addresses: list[int] | None = None) -> Stores:
    columns = [np.array(column, np.int64) for column in ([first], [last], offsets, addresses or [])]
    return find_stores(code.image, columns[0], columns[1], columns[2], columns[3])


@pytest.mark.parametrize(("machine", "text"), [("x86_64", X86_STORES), ("aarch64", ARM_STORES)])
def test_every_store_that_the_decoder_knows_is_found(assemble: Assemble, machine: str, text: str) -> None:
    """What is not found is not decoded, and a function that is put into a field would be missed."""
    lines = [line.strip() for line in text.replace("\n", ";").split(";") if line.strip()]
    code = assemble(machine, "f:\n" + "\n".join(lines) + "\nend:\n.balign 32\n.zero 32")
    body = decode(code.image, [(code["f"], code["end"] - code["f"])], vectors=True)
    known = [
        (instruction, o.destination.displacement)
        for instruction in body.instructions
        for o in instruction.operations
        if isinstance(o, Set) and isinstance(o.destination, Memory) and isinstance(o.source, Register)
    ]
    assert len(known) >= len(lines)
    for instruction, place in known:
        assert _stores(code, instruction.address, instruction.end, [place]).place.tolist() == [place]
    assert not len(_stores(code, code["f"], code["end"], [0x2468]).site)


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        ("x86_64", "mov [rsp+8], rdi"),
        ("x86_64", "movups [rsp+8], xmm0"),
        ("x86_64", "mov rdi, [rbx+8]"),
        ("x86_64", "mov dword ptr [rbx+8], edi"),
        ("x86_64", "mov qword ptr [rbx+8], 1"),
        ("aarch64", "str x0, [sp, #8]"),
        ("aarch64", "stp x29, x30, [sp, #8]"),
        ("aarch64", "ldr x0, [x1, #8]"),
        ("aarch64", "str w0, [x1, #8]"),
        ("aarch64", "strb w0, [x1, #8]"),
    ],
)
def test_what_stores_no_word_of_an_object_is_passed_over(assemble: Assemble, machine: str, line: str) -> None:
    code = assemble(machine, f"f:\n {line}\nend:\n.balign 32\n.zero 32")
    assert _stores(code, code["f"], code["end"], [8]).site.tolist() == []


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        ("x86_64", "mov [rip+v], rdi"),
        ("x86_64", "movups [rip+v-8], xmm0"),
        ("x86_64", "mov qword ptr [rip+v], 0x12345"),
        ("aarch64", "adrp x0, v\n str x1, [x0, :lo12:v]"),
    ],
)
def test_stores_to_a_variable_are_found_by_its_address(assemble: Assemble, machine: str, line: str) -> None:
    variable = ".hidden v\n.globl v\n.data\n.balign 16\n.zero 32\nv: .zero 16"
    code = assemble(machine, f"f:\n {line}\nend:\n.balign 32\n.zero 32\n{variable}")
    for address, found in ((code["v"], True), (code["v"] + (1 << 20), False)):
        stores = _stores(code, code["f"], code["end"], [], [address])
        assert (stores.place.tolist(), stores.is_global.tolist()) == (([address], [True]) if found else ([], []))
