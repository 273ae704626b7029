"""Call frame instructions and DWARF expressions, from bytes."""

from __future__ import annotations

import pytest

from forkproof.probe.cfi import Cie, Fde, ReadWord, Unknown, caller, evaluate, row_at

CIE = Cie(1, -8, 16, 0x1B, is_signal=False, has_augmentation=True, instructions=bytes.fromhex("0c07089001"))
"""def_cfa rsp+8; the return address at cfa-8: what every x86-64 CIE begins with."""


def fde(code: str) -> Fde:
    return Fde(CIE, 0x1000, 0x100, bytes.fromhex(code.replace(" ", "")))


def memory(words: dict[int, int]) -> ReadWord:
    return lambda address, _: words.get(address)


class TestRows:
    def test_before_the_first_push(self) -> None:
        row = row_at(fde("41 0e10 8602"), 0x1000)
        assert (row.cfa_register, row.cfa_offset, 6 in row.rules) == (7, 8, False)

    def test_after_it(self) -> None:
        row = row_at(fde("41 0e10 8602"), 0x1001)
        assert (row.cfa_offset, row.rules[6].value) == (16, -16)

    def test_remember_and_restore(self) -> None:
        code = "41 0e10 0a 41 0e08 41 0b"
        assert [row_at(fde(code), 0x1000 + n).cfa_offset for n in range(4)] == [8, 16, 8, 16]

    def test_restore_to_the_first_row(self) -> None:
        assert 6 not in row_at(fde("41 8602 41 c6"), 0x1002).rules

    @pytest.mark.parametrize(
        ("code", "kind", "value"),
        [
            ("050c 02", "offset", -16),
            ("110c 7f", "offset", 8),
            ("140c 02", "value", -16),
            ("150c 7f", "value", 8),
            ("090c 03", "register", 3),
            ("100c 02 7708", "expression", 0),
            ("160c 02 7708", "value-expression", 0),
            ("070c", "undefined", 0),
            ("080c", "same", 0),
        ],
    )
    def test_register_comes_before_its_rule(self, code: str, kind: str, value: int) -> None:
        rules = row_at(fde(code), 0x1010).rules
        assert {n: (r.kind, r.value) for n, r in rules.items() if n != 16} == {12: (kind, value)}

    def test_unknown_instruction_is_said(self) -> None:
        with pytest.raises(Unknown):
            row_at(fde("3f"), 0x1010)

    def test_cut_off(self) -> None:
        with pytest.raises(Unknown):
            row_at(fde("0e"), 0x1010)


class TestCaller:
    def test_frame_of_a_function_that_pushed_rbp(self) -> None:
        up = caller(fde("41 0e10 8602"), 0x1001, {7: 0x7000, 6: 1}, memory({0x7000: 0xAA, 0x7008: 0x2222}), 7)
        assert up is not None
        assert (up[16], up[6], up[7]) == (0x2222, 0xAA, 0x7010)

    def test_saved_above_the_frame(self) -> None:
        """As in _dl_runtime_resolve on AArch64: the PLT has pushed the return address before."""
        up = caller(fde("1110 7f"), 0x1001, {7: 0x7000, 12: 5}, memory({0x7010: 0x2222}), 7)
        assert up is not None
        assert (up[16], up[12]) == (0x2222, 5)

    def test_same_value(self) -> None:
        up = caller(fde("0806"), 0x1001, {7: 0x7000, 6: 3}, memory({0x7000: 0x2222}), 7)
        assert up is not None
        assert (up[16], up[6]) == (0x2222, 3)

    def test_outermost_frame(self) -> None:
        assert caller(fde("0710"), 0x1001, {7: 0x7000}, memory({}), 7) is None

    def test_unreadable_stack_ends_it(self) -> None:
        assert caller(fde(""), 0x1001, {7: 0x7000}, memory({}), 7) is None


class TestExpressions:
    @pytest.mark.parametrize(
        ("code", "value"),
        [
            ("32 33 22", 5),
            ("35 33 1c", 2),
            ("0a3412", 0x1234),
            ("09ff 20", 0),
            ("31 12 22", 2),
            ("3f 3b 2a 33 24", 8),
            ("32 2308", 10),
            ("31 2801 00 38 39", 9),
        ],
    )
    def test_arithmetic(self, code: str, value: int) -> None:
        assert evaluate(bytes.fromhex(code.replace(" ", "")), {}, memory({}), None) == value

    def test_plt_entry(self) -> None:
        """breg7 8; breg16 0; lit15; and; lit11; ge; lit3; shl; plus: a PLT stub before and after its push."""
        code = bytes.fromhex("77088000 3f1a3b2a332422".replace(" ", ""))
        assert evaluate(code, {7: 0x7000, 16: 0x1010}, memory({}), None) == 0x7008
        assert evaluate(code, {7: 0x7000, 16: 0x101B}, memory({}), None) == 0x7010

    def test_memory(self) -> None:
        assert evaluate(bytes.fromhex("7700 06"), {7: 0x7000}, memory({0x7000: 42}), None) == 42
        with pytest.raises(Unknown):
            evaluate(bytes.fromhex("7700 06"), {7: 0x7000}, memory({}), None)

    def test_empty(self) -> None:
        with pytest.raises(Unknown):
            evaluate(b"", {}, memory({}), None)
