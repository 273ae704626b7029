"""Calls through a register that a word was loaded into somewhere before, or that pass an address formed there."""

from __future__ import annotations

import pytest

from forkproof.code.register_calls import arguments_at, calls_through
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


_TWICE = {
    "x86_64": "f: lea rbx, begin[rip]\nmov rdx, rbx\ncall begin\nmov rdx, rbx\nsite: call begin\nret\n"
    "begin: ret\nend:\n",
    "aarch64": "f: adr x19, begin\nmov x2, x19\nbl begin\nmov x2, x19\nsite: bl begin\nret\nbegin: ret\nend:\n",
}
_THIRD = {"x86_64": "rdx", "aarch64": "x2"}


@pytest.mark.parametrize("machine", _TWICE)
def test_an_address_that_is_kept_is_passed_again(machine: str, assemble: Assemble) -> None:
    code = assemble(machine, _TWICE[machine])
    passed = arguments_at(code.body(), code.machine, [code["site"]], _THIRD[machine])
    assert list(passed) == [(code["site"], code["begin"])]


@pytest.mark.parametrize("machine", _TWICE)
def test_a_register_that_the_call_before_destroyed_passes_nothing(machine: str, assemble: Assemble) -> None:
    text = _TWICE[machine].replace("mov rdx, rbx\nsite", "site").replace("mov x2, x19\nsite", "site")
    code = assemble(machine, text)
    assert not list(arguments_at(code.body(), code.machine, [code["site"]], _THIRD[machine]))
