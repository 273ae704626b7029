"""Instructions to operations: the cases on which following a fork's result depends, from their encoding."""

from __future__ import annotations

from types import ModuleType

import pytest

from forkproof.code import lift_aarch64, lift_x86_64
from forkproof.code.disassembler import disassemble
from forkproof.code.operations import (
    Add,
    Atomic,
    AtomicKind,
    Bit,
    Branch,
    Call,
    Compare,
    Condition,
    Const,
    Forget,
    ForgetFlags,
    Jump,
    JumpUnknown,
    Memory,
    Operation,
    Register,
    Return,
    Set,
    SetIf,
    Syscall,
)
from forkproof.code.operations import Test as And
from forkproof.elf.image import Machine

RAX, RCX, RDI, RSI, RSP = (Register(name) for name in ("rax", "rcx", "rdi", "rsi", "rsp"))
X0, X1, X2, X8, SP = (Register(name) for name in ("x0", "x1", "x2", "x8", "sp"))
HERE = 0x1000

X86 = {
    "85c0": (And(RAX, RAX, 32),),  # test eax, eax
    "83f8ff": (Compare(RAX, Const(-1), 32),),  # cmp eax, -1
    "31c0": (Set(RAX, Const(0)), Compare(Const(0), Const(0), 64)),  # xor eax, eax
    "89c7": (Set(RDI, RAX, 32),),  # mov edi, eax
    "b805000000": (Set(RAX, Const(5), 32),),
    "b005": (Forget(RAX),),  # mov al, 5: the rest of rax stays
    "0fb6c1": (Set(RAX, RCX, 8),),  # movzx eax, cl
    "0fbec1": (Set(RAX, RCX, 8, signed=True), Set(RAX, RAX, 32)),  # movsx eax, cl
    "4863c1": (Set(RAX, RCX, 32, signed=True),),  # movsxd rax, ecx
    "88e1": (Forget(RCX), ForgetFlags()),  # mov cl, ah
    "f6c402": (ForgetFlags(),),  # test ah, 2 is not a test of bit 1
    "488b0510000000": (Set(RAX, Memory("pc", 0x10)),),
    "890510000000": (Set(Memory("pc", 0x10), RAX, 32),),
    "c744240c07000000": (Set(Memory("rsp", 12), Const(7), 32),),
    "ffc8": (Compare(RAX, Const(1), 32, carry=False), Add(RAX, RAX, -1, 32)),  # dec eax
    "83e803": (Compare(RAX, Const(3), 32), Add(RAX, RAX, -3, 32)),  # sub eax, 3
    "50": (Add(RSP, RSP, -8), Set(Memory("rsp", 0), RAX)),
    "58": (Set(RAX, Memory("rsp", 0)), Add(RSP, RSP, 8)),
    "f348ab": (Forget(RDI), Forget(RCX)),  # rep stosq
    "48ad": (Forget(RSI), Forget(RAX)),  # lodsq
    "a4": (Forget(RDI), Forget(RSI)),  # movsb
    "f2ae": (Forget(RDI), Forget(RCX), ForgetFlags()),  # repne scasb
    "9c": (Add(RSP, RSP, -8), Set(Memory("rsp", 0), Register("?"))),  # pushfq
    "87d1": (Forget(RCX), Forget(Register("rdx"))),  # xchg ecx, edx
    "f00fb10f": (Atomic(Memory("rdi", 0), RCX, RAX, AtomicKind.COMPARE_SWAP, RAX), Forget(RAX), ForgetFlags()),
    "f2f00fb10f": (  # xacquire lock cmpxchg
        Atomic(Memory("rdi", 0), RCX, RAX, AtomicKind.COMPARE_SWAP, RAX),
        Forget(RAX),
        ForgetFlags(),
    ),
    "870f": (Atomic(Memory("rdi", 0), RCX, None, AtomicKind.SWAP, RCX), Forget(RCX)),  # xchg [rdi], ecx
    "0f1107": (Set(Memory("rdi", 0), Register("?"), 128),),  # movups [rdi], xmm0
    "f3c3": (Return(),),  # repz ret
    "c3": (Return(),),
    "0f05": (Forget(RCX), Forget(Register("r11")), Syscall()),
    "e8fb000000": (Call(0x1100, None),),
    "67e8fa000000": (Call(0x1100, None),),
    "ff15fa1f0000": (Call(None, Memory("pc", 0x1FFA)),),
    "ffd0": (Call(None, RAX),),
    "e9fb000000": (Jump(0x1100),),
    "f2ff25f91f0000": (JumpUnknown(Memory("pc", 0x1FF9)),),
    "7efe": (Branch(Condition.LE, 0x1000),),
    "e2fe": (Forget(RCX), Branch(Condition.UNKNOWN, 0x1000)),  # loop
    "64488b042528000000": (Set(RAX, Memory(None, 0x28, True, None, True)),),  # mov rax, fs:0x28
    "f30f1efa": (),  # endbr64
}
ARM = {
    0x34000100: (Branch(Condition.EQ, 0x1020, X0, 32),),  # cbz w0
    0x37F80100: (Branch(Condition.LT, 0x1020, X0, 32),),  # tbnz w0, #31
    0x36080100: (Branch(Condition.UNKNOWN, 0x1020, bit=Bit(X0, 1, is_set=False)),),  # tbz w0, #1
    0x7100041F: (Compare(X0, Const(1), 32),),  # cmp w0, #1
    0x3100041F: (Compare(X0, Const(-1), 32),),  # cmn w0, #1
    0x6A00001F: (And(X0, X0, 32, carry=False),),  # tst w0, w0
    0x5280014A: (Set(Register("x10"), Const(10), 32),),  # mov w10, #10
    0x12800000: (Set(X0, Const(-1), 32),),  # mov w0, #-1
    0x2A0003E1: (Set(X1, X0, 32),),  # mov w1, w0
    0x93407C01: (Set(X1, X0, 32, signed=True),),  # sxtw x1, w0
    0xF9400401: (Set(X1, Memory("x0", 8)),),  # ldr x1, [x0, #8]
    0x39400001: (Set(X1, Memory("x0", 0), 8),),  # ldrb w1, [x0]
    0xB9800001: (Set(X1, Memory("x0", 0), 32, signed=True),),  # ldrsw x1, [x0]
    0xB9000FE0: (Set(Memory("sp", 12), X0, 32),),  # str w0, [sp, #12]
    0xB9000FFF: (Set(Memory("sp", 12), Const(0), 32),),  # str wzr, [sp, #12]
    0xA9BF07E0: (Add(SP, SP, -16), Set(Memory("sp", 0), X0), Set(Memory("sp", 8), X1)),  # stp x0, x1, [sp, #-16]!
    0xA8C107E0: (Set(X0, Memory("sp", 0)), Set(X1, Memory("sp", 8)), Add(SP, SP, 16)),  # ldp x0, x1, [sp], #16
    0x3D8003E0: (Set(Memory("sp", 0), Register("?"), 128),),  # str q0, [sp]
    0x11000400: (Add(X0, X0, 1, 32),),  # add w0, w0, #1
    0x91400400: (Add(X0, X0, 0x1000),),  # add x0, x0, #1, lsl #12
    0x71000400: (Compare(X0, Const(1), 32), Add(X0, X0, -1, 32)),  # subs w0, w0, #1
    0x31000400: (ForgetFlags(), Add(X0, X0, 1, 32)),  # adds w0, w0, #1
    0x1A9F17E0: (SetIf(X0, Condition.EQ),),  # cset w0, eq
    0x88A17C02: (Atomic(Memory("x0", 0), X2, X1, AtomicKind.COMPARE_SWAP, X1), Forget(X1)),  # cas w1, w2, [x0]
    0xB8218002: (Atomic(Memory("x0", 0), X1, None, AtomicKind.SWAP, X2), Forget(X2)),  # swp w1, w2, [x0]
    0x88087C01: (Atomic(Memory("x0", 0), X1, None, AtomicKind.EXCLUSIVE, X8), Forget(X8)),  # stxr w8, w1, [x0]
    0x94000040: (Call(0x1100, None),),
    0xD63F0020: (Call(None, X1),),  # blr x1
    0xD61F0020: (JumpUnknown(X1),),  # br x1
    0x14000040: (Jump(0x1100),),
    0xD65F03C0: (Return(),),
    0xD65F0BFF: (Return(),),  # retaa
    0xD503233F: (),  # paciasp
    0xD503245F: (),  # bti c
    0xD4000001: (Syscall(),),
}


@pytest.mark.parametrize(("code", "expected"), X86.items())
def test_x86_64(code: str, expected: tuple[Operation, ...]) -> None:
    ((_, length, mnemonic, operands),) = disassemble(Machine.X86_64, bytes.fromhex(code), HERE)
    assert length == len(code) // 2
    assert lift_x86_64.lift(mnemonic.decode(), operands.decode()) == expected


@pytest.mark.parametrize(("word", "expected"), ARM.items(), ids=lambda v: hex(v) if isinstance(v, int) else None)
def test_aarch64(word: int, expected: tuple[Operation, ...]) -> None:
    ((_, _, mnemonic, operands),) = disassemble(Machine.AARCH64, word.to_bytes(4, "little"), HERE)
    assert lift_aarch64.lift(mnemonic.decode(), operands.decode()) == expected


@pytest.mark.parametrize("lifter", [lift_x86_64, lift_aarch64])
def test_branches_that_are_not_remembered_are_lifted_as_all_others(lifter: ModuleType) -> None:
    for mnemonic, make in lifter.BRANCHES.items():
        text = lifter.TARGET.decode() + "1f40"
        assert lifter.lift(mnemonic.decode(), text) == (make(0x1F40),), mnemonic
