"""Calls through a register that a word was loaded into somewhere before."""

from __future__ import annotations

import pytest

from forkproof.code.register_calls import calls_through
from tests.unit.code.conftest import Assemble

_LOOP = {
    "x86_64": "f: mov r14, slot[rip]\nagain: nop\nsite: call r14\ndec ebx\njne again\nret\nend:\n.data\nslot: .quad 0",
    "aarch64": "f: adrp x19, slot\nldr x19, [x19, :lo12:slot]\nagain: nop\nsite: blr x19\nsubs w20, w20, #1\n"
    "b.ne again\nret\nend:\n.data\n.balign 8\nslot: .quad 0",
}
_OTHER_WAY = {
    "x86_64": "f: mov r14, slot[rip]\ntest edi, edi\nje site\nmov r14, rsi\nsite: call r14\nret\nend:\n"
    ".data\nslot: .quad 0",
    "aarch64": "f: adrp x19, slot\nldr x19, [x19, :lo12:slot]\ncbz w0, site\nmov x19, x1\nsite: blr x19\nret\nend:\n"
    ".data\n.balign 8\nslot: .quad 0",
}


@pytest.mark.parametrize("machine", _LOOP)
def test_a_register_that_calls_keep_holds_the_word_round_after_round(machine: str, assemble: Assemble) -> None:
    code = assemble(machine, _LOOP[machine])
    assert list(calls_through(code.body(), code.machine, {code["slot"]})) == [(code["site"], code["slot"])]


@pytest.mark.parametrize("machine", _LOOP)
def test_other_words_are_not_asked_for(machine: str, assemble: Assemble) -> None:
    code = assemble(machine, _LOOP[machine])
    assert not list(calls_through(code.body(), code.machine, {code["slot"] + 8}))


@pytest.mark.parametrize("machine", _OTHER_WAY)
def test_what_another_way_puts_there_is_not_known(machine: str, assemble: Assemble) -> None:
    code = assemble(machine, _OTHER_WAY[machine])
    assert not list(calls_through(code.body(), code.machine, {code["slot"]}))
