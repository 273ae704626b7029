"""What an acquiring instruction locks and when it has got the lock, read off registers."""

from __future__ import annotations

import pytest

from forkproof.elf.image import Machine
from forkproof.probe import sites
from forkproof.probe.ptrace import MACHINES, Registers
from forkproof.probe.sites import Acquire, AcquireSite, Form, Free, Served, decode_site, value_of

SITE = 0x1000


class Code:
    """An image that is nothing but code at SITE."""

    def __init__(self, machine: Machine, code: bytes) -> None:
        self.machine, self.code = machine, code

    def read(self, rva: int, size: int) -> _Bytes:
        return _Bytes(self.code[rva - SITE : rva - SITE + size])


class _Bytes(bytes):
    def tobytes(self) -> bytes:
        return bytes(self)


def acquire(machine: Machine, code: str, callee: str = "") -> Acquire:
    return decode_site(AcquireSite("/x", SITE, callee=callee), Code(machine, bytes.fromhex(code)))  # type: ignore[arg-type]


def registers(machine: Machine, **values: int) -> Registers:
    description = MACHINES[machine.value]
    return Registers(description, tuple(values.get(name, 0) for name in description.registers))


X86, ARM = Machine.X86_64, Machine.AARCH64


class TestX86:
    def test_cmpxchg_of_a_global(self) -> None:
        found = acquire(X86, "f00fb115f00f0000")  # lock cmpxchg [rip+0xff0], edx
        before = registers(X86, rip=SITE + 0x7F00_0000_0000, rdx=1)
        assert (found.form, found.width) == (Form.COMPARE, 4)
        assert found.lock(before) == 0x7F00_0000_0000 + SITE + 8 + 0xFF0
        assert found.is_acquire(before)
        assert found.got(before, registers(X86, rax=0), 0) is True
        assert found.got(before, registers(X86, rax=1), 0) is False

    def test_cmpxchg_that_expects_a_pointer_is_no_acquire(self) -> None:
        found = acquire(X86, "f0480fb137")  # lock cmpxchg [rdi], rsi
        assert not found.is_acquire(registers(X86, rax=0x1234, rsi=1))
        assert found.width == 8

    @pytest.mark.parametrize(("count", "new", "takes"), [(1, 0, True), (3, 2, True), (1, 2, False), (0, 1, False)])
    def test_cmpxchg_that_counts_down_takes_a_permit_where_the_code_says_so(
        self, count: int, new: int, takes: bool
    ) -> None:
        code = Code(X86, bytes.fromhex("f00fb117"))  # lock cmpxchg [rdi], edx
        at = registers(X86, rax=count, rdx=new)
        permit = decode_site(AcquireSite("/x", SITE, is_permit=True), code)  # type: ignore[arg-type]
        assert (permit.is_acquire(at), permit.free_at(at)) == (takes, Free.POSITIVE)
        plain = decode_site(AcquireSite("/x", SITE), code)  # type: ignore[arg-type]
        assert (plain.is_acquire(at), plain.free_at(at)) == (count == 0, Free.ZERO)

    def test_release_by_exchange_is_no_acquire(self) -> None:
        found = acquire(X86, "8707")  # xchg [rdi], eax
        assert (found.form, found.lock(registers(X86, rdi=0x5000))) == (Form.EXCHANGE, 0x5000)
        assert not found.is_acquire(registers(X86, rax=0))
        assert found.is_acquire(registers(X86, rax=1))
        assert found.got(registers(X86, rax=1), registers(X86, rax=0), 0) is True

    def test_indexed_operand(self) -> None:
        found = acquire(X86, "f00fb14c8310")  # lock cmpxchg [rbx+rax*4+0x10], ecx
        assert found.lock(registers(X86, rbx=0x1000, rax=3)) == 0x1000 + 12 + 0x10

    def test_bit_test_and_set(self) -> None:
        found = acquire(X86, "f00fba2f00")  # lock bts dword [rdi], 0
        assert found.form is Form.BIT
        assert found.got(registers(X86), registers(X86, eflags=0x246), 0) is True
        assert found.got(registers(X86), registers(X86, eflags=0x247), 0) is False

    def test_counter_is_not_understood_and_therefore_none(self) -> None:
        assert acquire(X86, "f00fc107").form is Form.UNKNOWN  # lock xadd [rdi], eax

    @pytest.mark.parametrize(("result", "got"), [(0, True), (16, False)])
    def test_call_that_returns_a_status(self, result: int, got: bool) -> None:
        found = acquire(X86, "e8fb0f0000", "pthread_mutex_lock")
        assert found.lock(registers(X86, rdi=0x6000)) == 0x6000
        assert found.exits == (SITE + 5,)
        assert found.got(registers(X86), registers(X86, rax=result), 0) is got

    def test_call_that_returns_nothing_has_got_it(self) -> None:
        assert acquire(X86, "e8fb0f0000", "flockfile").got(registers(X86), registers(X86, rax=7), 0) is True

    @pytest.mark.parametrize(
        ("name", "value"),
        [("rax", 0x1122_3344_5566_7788), ("eax", 0x5566_7788), ("ax", 0x7788), ("al", 0x88), ("ah", 0x77)],
    )
    def test_parts_of_a_register(self, name: str, value: int) -> None:
        assert value_of(registers(X86, rax=0x1122_3344_5566_7788), name) == value

    @pytest.mark.parametrize(("name", "value"), [("r9d", 0x5566_7788), ("r9b", 0x88), ("sil", 0x21), ("bpl", 0)])
    def test_parts_of_others(self, name: str, value: int) -> None:
        assert value_of(registers(X86, r9=0x1122_3344_5566_7788, rsi=0x4321), name) == value


class TestAarch64:
    def test_compare_and_swap(self) -> None:
        found = acquire(ARM, "417ce088")  # casa w0, w1, [x2]
        before = registers(ARM, x0=0, x1=1, x2=0x7000)
        assert (found.form, found.width, found.lock(before)) == (Form.COMPARE, 4, 0x7000)
        assert found.is_acquire(before)
        assert found.got(before, registers(ARM, x0=0), 0) is True
        assert found.got(before, registers(ARM, x0=2), 0) is False

    def test_exchange(self) -> None:
        found = acquire(ARM, "4180a0b8")  # swpa w0, w1, [x2]
        assert (found.form, found.stores, found.result) == (Form.EXCHANGE, "w0", "w1")

    def test_exclusive_pair_comes_out_behind_its_store_or_by_the_branch(self) -> None:
        # ldaxr w3, [x0]; cmp w3, #0; b.ne +12; stxr w4, w1, [x0]; cbnz w4, -16; ret
        found = acquire(ARM, "03fc5f88 7f000071 61000054 017c0488 84ffff35 c0035fd6".replace(" ", ""))
        assert found.form is Form.EXCLUSIVE
        assert found.exits == (SITE + 16, SITE + 20)
        before = registers(ARM, x0=0x7000, x1=1)
        assert found.got(before, registers(ARM, pc=SITE + 16, x4=0), 0) is True
        assert found.got(before, registers(ARM, pc=SITE + 16, x4=1), 0) is None, "the store failed: it goes round again"
        assert found.got(before, registers(ARM, pc=SITE + 20), 0) is False

    def test_reference_count_by_exclusives_is_none(self) -> None:
        # ldxr w3, [x0]; add w3, w3, #1; stxr w4, w3, [x0]
        assert acquire(ARM, "037c5f886304001103 7c0488".replace(" ", "")).form is Form.UNKNOWN

    def test_zero_register(self) -> None:
        assert value_of(registers(ARM, x0=5), "wzr") == 0
        assert value_of(registers(ARM, x7=1 << 40 | 3), "w7") == 3


def test_every_status_function_is_told_from_those_that_return_nothing() -> None:
    names = ["pthread_mutex_lock", "__pthread_mutex_lock", "sem_wait", "mtx_lock"]
    assert all(sites._STATUS.match(name) for name in names)
    assert not sites._STATUS.match("g_mutex_lock")


class Words:
    """A memory of words."""

    def __init__(self, **words: int) -> None:
        self.words = {int(address, 16): value for address, value in words.items()}

    def word(self, address: int, _size: int = 8) -> int | None:
        return self.words.get(address)


class TestTarget:
    """The function that a call through a pointer leads to."""

    @pytest.mark.parametrize(
        ("machine", "code", "before", "words"),
        [
            (X86, "ff15f00f0000", {"rip": SITE}, {hex(SITE + 6 + 0xFF0): 0x7777}),  # call [rip+0xff0]
            (X86, "ff25f00f0000", {"rip": SITE}, {hex(SITE + 6 + 0xFF0): 0x7777}),  # jmp [rip+0xff0]
            (X86, "ffd0", {"rax": 0x7777}, {}),  # call rax
            (ARM, "20003fd6", {"x1": 0x7777}, {}),  # blr x1
            (ARM, "20001fd6", {"x1": 0x7777}, {}),  # br x1
        ],
    )
    def test_of_a_pointer(self, machine: Machine, code: str, before: dict[str, int], words: dict[str, int]) -> None:
        found = acquire(machine, code, callee="pthread_mutex_lock")
        assert found.form is Form.CALL
        assert found.target(registers(machine, **before), Words(**words)) == 0x7777  # type: ignore[arg-type]

    @pytest.mark.parametrize(("machine", "code"), [(X86, "e800000000"), (X86, "e900000000"), (ARM, "40000094")])
    def test_a_direct_call_has_none(self, machine: Machine, code: str) -> None:
        found = acquire(machine, code, callee="pthread_mutex_lock")
        assert found.form is Form.CALL
        assert found.target(registers(machine), Words()) is None  # type: ignore[arg-type]


class TestTicket:
    """A fetch-and-add that draws a ticket: the lock is the word that says whose turn it is."""

    TURN = SITE + 0x2004

    @pytest.mark.parametrize(
        ("machine", "code", "before", "result"),
        [
            (X86, "f00fc115f81f0000", {"rip": SITE, "rdx": 1}, "rdx"),  # lock xadd [rip+0x1ff8], edx
            (ARM, "200020b8", {"pc": SITE, "x0": 1, "x1": SITE + 0x2000}, "x0"),  # ldadd w0, w0, [x1]
        ],
    )
    def test_of_two_words(self, machine: Machine, code: str, before: dict[str, int], result: str) -> None:
        code_at = Code(machine, bytes.fromhex(code))
        found = decode_site(AcquireSite("/x", SITE, turn=self.TURN), code_at)  # type: ignore[arg-type]
        at = registers(machine, **before)
        assert (found.form, found.lock(at), found.free_at(at)) == (Form.TICKET, self.TURN, Served(-4))
        words = Words(**{hex(self.TURN): 7, hex(self.TURN - 4): 7})
        assert found.is_free(at, words)  # type: ignore[arg-type]
        words.words[self.TURN - 4] = 8
        assert not found.is_free(at, words)  # type: ignore[arg-type]
        assert found.got(at, registers(machine, **{result: 7}), 0, words) is True  # type: ignore[arg-type]
        assert found.got(at, registers(machine, **{result: 8}), 0, words) is False  # type: ignore[arg-type]

    def test_of_halves_of_one_word(self) -> None:
        site = AcquireSite("/x", SITE, turn=SITE + 0x2000)
        found = decode_site(site, Code(X86, bytes.fromhex("f00fc115f81f0000")))  # type: ignore[arg-type]
        at = registers(X86, rip=SITE, rdx=1 << 16)
        assert found.free_at(at) == Served(0)
        assert found.is_free(at, Words(**{hex(SITE + 0x2000): 0x50005}))  # type: ignore[arg-type]
        assert not found.is_free(at, Words(**{hex(SITE + 0x2000): 0x60005}))  # type: ignore[arg-type]
        assert found.got(at, registers(X86, rdx=0x50005), 0) is True
        assert found.got(at, registers(X86, rdx=0x60005), 0) is False

    def test_an_addition_elsewhere_is_no_acquire(self) -> None:
        assert acquire(X86, "f00fc115f81f0000").form is Form.UNKNOWN
        assert acquire(ARM, "200020b8").form is Form.UNKNOWN
