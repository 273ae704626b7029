"""Does a thread spin by looking at a word? One round of loops that do, and of loops that do something as well."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forkproof.probe.ptrace import MACHINES, Registers
from forkproof.probe.spin import repeats, spins_on

AT, LOCK, OTHER, STACK = 0x1000, 0x5000, 0x6000, 0x7000
COUNTERS = {"x86_64": "r15", "aarch64": "x28"}
ADDRESSES = {"rdi": LOCK, "rsi": OTHER, "rsp": STACK, "x0": LOCK, "x1": OTHER, "sp": STACK}
LOOK, NOP = "8b07", "90"  # mov eax, [rdi]
LOOK_ARM, NOP_ARM = "000040b9", "1f2003d5"  # ldr w0, [x0]


class Thread:
    """Runs the instructions of a loop one after the other, round and round."""

    def __init__(self, machine: str, instructions: list[str]) -> None:
        self.machine, self.codes, self.at = MACHINES[machine], [bytes.fromhex(i) for i in instructions], 0
        self.process = SimpleNamespace(memory=self)
        self.stack, self.counted, self.counter = bytes(8), 1, 0
        self.grows = ""

    def read(self, address: int, size: int) -> bytes:
        if address == self.registers.pc:
            return self.codes[self.at][:size]
        return self.stack

    def word(self, address: int, size: int) -> int:
        assert (address, size) == (LOCK, 4)
        return self.counted

    @property
    def registers(self) -> Registers:
        pc = AT + sum(map(len, self.codes[: self.at]))
        values = {**ADDRESSES, self.machine.pc: pc, COUNTERS[self.machine.name]: self.counter}
        return Registers(self.machine, tuple(values.get(name, 0) for name in self.machine.registers))

    def step(self, _: object) -> bool:
        self.at = (self.at + 1) % len(self.codes)
        self.counter += self.grows == "register"
        self.counted += self.grows == "word"
        self.stack = bytes([self.stack[0] + (self.grows == "stack"), *self.stack[1:]])
        return True


def spins(machine: str, instructions: list[str]) -> bool:
    thread = Thread(machine, instructions)
    stage: Any = SimpleNamespace(machine=machine, session=SimpleNamespace(step=thread.step))
    return spins_on(stage, thread, lambda address: address == LOCK)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "loop"),
    [
        ("x86_64", [LOOK, "85c0", NOP]),  # test eax, eax
        ("x86_64", ["833f00", "f390"]),  # cmp dword ptr [rdi], 0; pause
        ("x86_64", ["89442408", LOOK]),  # mov [rsp + 8], eax: a variable of the function's own
        ("aarch64", [LOOK_ARM, NOP_ARM]),
        ("aarch64", ["00fcdf88", "3f2003d5"]),  # ldar w0, [x0]; yield
    ],
)
def test_a_loop_that_only_looks(machine: str, loop: list[str]) -> None:
    assert spins(machine, loop)


@pytest.mark.parametrize(
    ("machine", "loop"),
    [
        ("x86_64", [NOP, "8b06"]),  # looks at something else
        ("x86_64", [LOOK, "8906"]),  # mov [rsi], eax
        ("x86_64", [LOOK, "830601"]),  # add dword ptr [rsi], 1
        ("x86_64", [LOOK, "0f1106"]),  # movups [rsi], xmm0
        ("x86_64", [LOOK, "f348ab"]),  # rep stosq
        ("x86_64", [LOOK, "f00fb10e"]),  # lock cmpxchg [rsi], ecx
        ("x86_64", [LOOK, "0f05"]),  # syscall: read
        ("x86_64", [LOOK, *[NOP] * 200]),  # too far round
        ("aarch64", [LOOK_ARM, "200000b9"]),  # str w0, [x1]
        ("aarch64", [NOP_ARM, NOP_ARM]),
    ],
)
def test_a_loop_that_does_something_or_looks_elsewhere(machine: str, loop: list[str]) -> None:
    assert not spins(machine, loop)


def goes_round(machine: str, instructions: list[str], grows: str = "", where: str = "/bin/program") -> bool:
    thread = Thread(machine, instructions)
    thread.grows = grows
    modules = SimpleNamespace(address=lambda *_: SimpleNamespace(object=where))
    stage: Any = SimpleNamespace(machine=machine, session=SimpleNamespace(step=thread.step), modules=modules)
    return repeats(stage, thread)  # type: ignore[arg-type]


EXCHANGE, EXCHANGE_ARM = "8707", "0180a1b8"  # xchg [rdi], eax; swpa w1, w1, [x0]


@pytest.mark.parametrize(("machine", "exchange"), [("x86_64", EXCHANGE), ("aarch64", EXCHANGE_ARM)])
class TestGoesRoundForEver:
    @pytest.mark.parametrize("pause", [[], ["pause"]])
    def test_nothing_changes(self, machine: str, exchange: str, pause: list[str]) -> None:
        hint = {"x86_64": "f390", "aarch64": "3f2003d5"}[machine]
        assert goes_round(machine, [exchange, *[hint for _ in pause]])

    @pytest.mark.parametrize("grows", ["register", "word", "stack"])
    def test_it_counts(self, machine: str, exchange: str, grows: str) -> None:
        assert not goes_round(machine, [exchange], grows)

    def test_it_asks_the_kernel(self, machine: str, exchange: str) -> None:
        assert not goes_round(machine, [exchange, {"x86_64": "0f05", "aarch64": "010000d4"}[machine]])

    def test_it_reads_a_clock_of_which_nothing_is_left(self, machine: str, exchange: str) -> None:
        assert not goes_round(machine, [exchange, {"x86_64": "0f31", "aarch64": "41e03bd5"}[machine]])

    def test_in_the_kernels_code(self, machine: str, exchange: str) -> None:
        assert not goes_round(machine, [exchange], where="")


def test_a_store_exclusive_is_not_judged() -> None:
    assert not goes_round("aarch64", ["017c5f88", "017c0288"])  # ldxr w1, [x0]; stxr w2, w1, [x0]
