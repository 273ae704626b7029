"""Property: whatever a function really does is among what `explore` says that it can do.

Some hundred random functions (a fixed seed each run) are assembled into one program, which calls each and prints
what it returned: natively, or by qemu-user for the other machine. `explore`, starting with the same two arguments
known, must allow that result: a path that runs was not ruled out, and a value that is claimed is the value.
"""

# ruff: noqa: E501, S311 - a line of assembly is one line here; random programs are no secrets
from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest

from fixtures.build import Toolchain
from forkproof.code.decode import decode
from forkproof.code.explore import explore
from forkproof.code.values import Value
from forkproof.elf.image import load
from tests.support.machines import runner

FUNCTIONS = 1000
LENGTH = 12
#: Where wrong widths, signs and carries show.
CONSTANTS = (0, 1, 2, 5, -1, -2, 255, 256, 0x1FF, 0x7FFFFFFF, -0x80000000, 127, 128)
Lines = Iterator[str]


class X86:
    """Random x86-64 functions in Intel syntax."""

    SYNTAX = ".intel_syntax noprefix"
    WIDE = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9")
    HALF = ("eax", "ecx", "edx", "esi", "edi", "r8d", "r9d")
    WORD = ("ax", "cx", "dx", "si", "di", "r8w", "r9w")
    BYTE = ("al", "cl", "dl", "sil", "dil", "r8b", "r9b")
    HIGH = ("ah", "ch", "dh")
    CONDITIONS = ("e", "ne", "l", "ge", "g", "le", "b", "ae", "a", "be", "s", "ns")
    SLOTS = ("[rsp-16]", "[rsp-24]", "[rsp-32]")
    HALF_SLOTS = ("[rsp-12]", "[rsp-20]", "[rsp-28]")
    PREFIX: ClassVar = {64: "qword ptr ", 32: "dword ptr ", 16: "word ptr ", 8: "byte ptr "}

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def register(self, bits: int) -> str:
        return self.random.choice({64: self.WIDE, 32: self.HALF, 16: self.WORD, 8: self.BYTE + self.HIGH}[bits])

    def constant(self, bits: int = 32) -> int:
        low, high = (-128, 127) if bits == 8 else (-32768, 32767) if bits == 16 else (-(1 << 31), (1 << 31) - 1)
        return self.random.choice([c for c in CONSTANTS if low <= c <= high])

    def step(self) -> str:
        pick, bits = self.random.choice, self.random.choice((64, 32, 32, 16, 8))
        a, b = self.register(bits), self.register(bits)
        if set(self.HIGH) & {a, b}:  # cannot be encoded with REX registers
            a, b = pick(("ah", "al", "dl")), pick(("ch", "cl", "dh"))
        c, wide, half = self.constant(bits), self.register(64), self.register(32)
        slot = self.PREFIX[bits] + pick(self.SLOTS + (self.HALF_SLOTS if bits < 64 else ()))
        condition = pick(self.CONDITIONS)
        return pick(
            (
                f"mov {a}, {c}", f"mov {a}, {b}", f"mov {a}, {c}", f"mov {slot}, {a}", f"mov {a}, {slot}",
                f"mov {slot}, {c}", f"add {a}, {c}", f"sub {a}, {c}", f"inc {a}", f"dec {a}", f"xor {a}, {a}",
                f"xor {a}, {b}", f"and {a}, {c}", f"or {a}, {c}", f"sub {a}, {b}", f"add {a}, {b}", f"neg {a}",
                f"not {a}", f"xchg {a}, {b}", f"cmp {a}, {c}", f"cmp {a}, {b}", f"test {a}, {a}", f"test {a}, {c}",
                f"cmp {slot}, {c}", f"lea {wide}, [rsp-24]", f"lea {half}, [rdi+{abs(c)}]", f"lea {wide}, [rsi+rdx]",
                f"movzx {half}, {pick(self.BYTE)}", f"movsx {half}, {pick(self.BYTE)}",
                f"movsx {wide}, {pick(self.WORD)}", f"movsxd {wide}, {half}", f"movzx {half}, {pick(self.WORD)}",
                f"movzx {half}, byte ptr {pick(self.SLOTS)}", "cdqe", "cwde", "cdq", "cqo", f"shl {a}, 1",
                f"set{condition} {pick(self.BYTE)}", f"cmov{condition} {half}, {self.register(32)}",
                f"push {wide}\n pop {self.register(64)}", f"sar {a}, 3", f"imul {half}, {self.register(32)}, 3",
                f"mul {half}", f"xadd {a}, {b}", f"cmpxchg {a}, {b}", "stc", "clc", f"sbb {a}, {b}", f"adc {a}, {c}",
                f"bt {half}, 3", f"lock xadd {self.PREFIX[64]}[rsp-24], {wide}", f"bswap {half}",
                f"lock cmpxchg {self.PREFIX[32]}[rsp-32], {half}", f"add {slot}, {c}", f"inc {slot}",
                f"lock add {slot}, {c}", "pxor xmm0, xmm0\n movups xmmword ptr [rsp-32], xmm0",
            )
        )  # fmt: skip

    def branch(self, label: str) -> str:
        return f"j{self.random.choice(self.CONDITIONS)} {label}"

    def begin(self) -> Lines:
        yield from (f" mov {register}, {self.constant()}" for register in self.WIDE[:4] + self.HALF[5:])

    def leave(self, number: int) -> Lines:
        if self.random.random() < 0.6:  # which path it was, rather than what it computed
            yield f" mov eax, {1000 + number}"
        yield " ret"


class Arm:
    """Random AArch64 functions."""

    SYNTAX = ""
    CONDITIONS = ("eq", "ne", "lt", "ge", "gt", "le", "lo", "hs", "hi", "ls", "mi", "pl", "vs", "vc")
    SLOTS = ("[sp]", "[sp, #8]", "[sp, #16]")

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def step(self) -> str:
        pick = self.random.choice
        kind = pick("xw")
        a, b, d = (f"{kind}{self.random.randrange(6)}" for _ in range(3))
        w, x, v = f"w{self.random.randrange(6)}", f"x{self.random.randrange(6)}", f"w{self.random.randrange(6)}"
        y = pick([f"x{n}" for n in range(6) if f"x{n}" != x])
        c, small = pick(CONSTANTS), pick([c for c in CONSTANTS if 0 <= c <= 4095])
        slot, condition = pick(self.SLOTS), pick(self.CONDITIONS)
        half = pick((*self.SLOTS, "[sp, #4]", "[sp, #12]"))
        return pick(
            (
                f"mov {a}, #{c if -65536 <= c < 65536 else 7}", f"mov {a}, {b}", f"mov {w}, #-1", f"mov {x}, #-1",
                f"add {a}, {b}, #{small}", f"sub {a}, {b}, #{small}", f"subs {a}, {b}, #{small}",
                f"adds {a}, {b}, #{small}", f"subs {a}, {b}, {d}", f"add {a}, {b}, {d}", f"cmp {a}, #{small}",
                f"cmp {a}, {b}", f"cmn {a}, #{small}", f"tst {a}, #0xff", f"tst {a}, {b}", f"str {a}, {slot}",
                f"ldr {a}, {slot}", f"ldrb {w}, {slot}", f"strb {w}, {slot}", f"ldrsw {x}, {slot}",
                f"ldrh {w}, {slot}", f"strh {w}, {slot}", f"ldrsb {w}, {slot}", f"stp {x}, {y}, [sp]",
                f"ldp {x}, {y}, [sp]", f"sxtw {x}, {w}", f"uxtb {w}, {v}", f"uxtw {x}, {w}", f"sxtb {w}, {v}",
                f"csel {a}, {b}, {d}, {condition}", f"cset {a}, {condition}", f"csinc {a}, {b}, {d}, {condition}",
                f"ccmp {a}, #1, #0, {condition}", f"ccmn {a}, {b}, #4, {condition}", f"neg {a}, {b}", f"negs {a}, {b}",
                f"mvn {a}, {b}", f"movk {a}, #5, lsl #16", f"movn {a}, #2", f"movz {a}, #1, lsl #16",
                f"and {a}, {b}, #1", f"ands {a}, {b}, #3", f"bics {a}, {b}, {d}", f"orr {a}, {b}, {d}",
                f"eor {a}, {a}, {a}", f"lsl {a}, {b}, #3", f"bfi {a}, {b}, #0, #8", f"ubfx {a}, {b}, #0, #8",
                f"adc {a}, {b}, {d}", f"sbcs {a}, {b}, {d}", f"mov {a}, {kind}zr", f"add {a}, {b}, #1, lsl #12",
                f"cmp {x}, {w}, sxtw", f"add {x}, {y}, {w}, uxtw", f"mov {x}, sp\n sub {x}, {x}, {x}",
                f"str {x}, [sp, #-16]!\n ldr {y}, [sp], #16", f"str xzr, {slot}", f"str wzr, {half}",
                "movi v0.2d, #0\n str q0, [sp]", "movi v1.2d, #0\n stp d1, d1, [sp, #8]", f"str {w}, {half}",
                f"ldr {w}, {half}", f"ldrsw {x}, {half}", f"stp {w}, wzr, [sp]", f"ldp {w}, {v if v != w else 'w9'}, [sp]",
            )
        )  # fmt: skip

    def branch(self, label: str) -> str:
        a = f"{self.random.choice('xw')}{self.random.randrange(6)}"
        return self.random.choice(
            (
                f"b.{self.random.choice(self.CONDITIONS)} {label}",
                f"b.{self.random.choice(self.CONDITIONS)} {label}",
                f"cbz {a}, {label}",
                f"cbnz {a}, {label}",
                f"tbz {a}, #{31 if a[0] == 'w' else 63}, {label}",
                f"tbnz {a}, #{31 if a[0] == 'w' else 63}, {label}",
                f"tbnz {a}, #3, {label}",
            )
        )

    def begin(self) -> Lines:
        yield " sub sp, sp, #32"
        yield from (f" mov {'xw'[n % 2]}{n}, #{self.random.choice([0, 1, 5, -1, -2, 255, 256])}" for n in range(2, 6))

    def leave(self, number: int) -> Lines:
        if self.random.random() < 0.6:
            yield f" mov w0, #{1000 + number}"
        yield " add sp, sp, #32"
        yield " ret"


def _function(number: int, generator: X86 | Arm) -> Lines:
    random = generator.random
    yield f" .globl f{number}\n .type f{number}, %function\nf{number}:"
    yield from generator.begin()
    exits = 3
    for at in range(LENGTH):
        yield f" {generator.step()}"
        if at % 3 == 2:
            yield f" {generator.branch(f'.Lexit{number}_{random.randrange(exits)}')}"
    yield from generator.leave(exits)
    for label in range(exits):
        yield f".Lexit{number}_{label}:"
        yield from generator.leave(label)
    yield f" .size f{number}, . - f{number}"


def _program(machine: str, directory: Path, arguments: list[tuple[int, int]]) -> Path:
    toolchain = Toolchain(machine)
    assembly, driver, program = directory / "f.s", directory / "main.c", directory / f"sound-{machine}"
    make: Callable[[int], X86 | Arm] = X86 if machine == "x86_64" else Arm
    lines = [line for n in range(len(arguments)) for line in _function(n, make(n))]
    syntax = X86.SYNTAX if machine == "x86_64" else Arm.SYNTAX
    assembly.write_text("\n".join([syntax, ".text", *lines, ".section .note.GNU-stack", ""]))
    names = "".join(f"long f{n}(long, long);\n" for n in range(len(arguments)))
    calls = "".join(f'    printf("%ld\\n", f{n}({a}L, {b}L));\n' for n, (a, b) in enumerate(arguments))
    driver.write_text(f"#include <stdio.h>\n{names}int main(void)\n{{\n{calls}    return 0;\n}}\n")
    command: list[str | Path] = [toolchain.compiler(driver), "-static", "-o", program, assembly, driver]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_happens_was_foreseen(machine: str, tmp_path: Path) -> None:
    start = runner(machine)
    if start is None or Toolchain(machine).missing(Path("f.s")):
        pytest.skip(f"no way to build and run programs for {machine} here")
    random = Random(1)
    arguments = [(random.choice(CONSTANTS), random.choice(CONSTANTS)) for _ in range(FUNCTIONS)]
    program = _program(machine, tmp_path, arguments)
    printed = subprocess.run([*start, program], capture_output=True, text=True, check=True).stdout
    returned = [int(line) for line in printed.split()]
    image = load(program)
    table, names = image.static_symbols, ("rdi", "rsi") if machine == "x86_64" else ("x0", "x1")
    wrong, known = [], 0
    for number, (pair, actual) in enumerate(zip(arguments, returned, strict=True)):
        index = table.by_name[f"f{number}"][0]
        entry, size = int(table.value[index]), int(table.size[index])
        body = decode(image, [(entry, size)])
        found = explore(body, image.machine, entry, known=dict(zip(names, pair, strict=True)))
        known += None not in found.results
        if not any(_allows(value, actual) for value in found.results):
            wrong.append(f"f{number}{pair} returned {actual:#x}; foreseen: {found.results}")
    assert wrong == []
    assert known > FUNCTIONS // 20, "the functions are too random to say anything"


def _allows(value: Value | None, actual: int) -> bool:
    """Unknown allows anything; registers hold what the C code left there at entry, so those are unknown, too."""
    return value is None or value.base is not None or (value.offset - actual) % (1 << 64) == 0
