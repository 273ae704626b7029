"""What calls pass: the addresses, strings and data that an argument register holds at call sites.

Owns: the search backwards from a call, vectorised, and by following the function where that finds nothing.
Takes: a `Program`, the sites of calls in one object, an argument's number. Gives: columns or mappings by site.
Must never: give an address of which it is not sure.
Wrong where: an address comes to the call through memory (then nothing is told).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from forkproof.code.conventions import CONVENTIONS
from forkproof.code.decode import decode, keep_register
from forkproof.code.index import SCANNERS, CodeIndex
from forkproof.code.operations import JumpUnknown, Register, Syscall
from forkproof.code.register_calls import arguments_at
from forkproof.columns import position_in, unique
from forkproof.elf.image import Image
from forkproof.program import Columns, Program, slot_columns

_Writes = tuple[Columns, Columns, npt.NDArray[np.bool_]]
_NO_REGISTER: Final = -2
_FOLLOWED_BYTES: Final = 1 << 15
"""Bytes of a function that is followed for what it passes."""
_CALLBACK_REACH: Final = 160
"""Bytes before a call in which its function argument is looked for."""
_SMALL: Final = 1 << 10
"""Bytes of a function that may leave an argument's register alone,"""
_FEW: Final = 8
"""and such functions that one call leads to."""


def address_arguments(program: Program, obj: int, sites: Columns, argument: int) -> Columns:
    """Function numbers whose address the nearest earlier instruction puts into an argument register.

    The instruction must lie in the same function, within `_CALLBACK_REACH` bytes, and no other call may come in between
    that may change the register: calls of small functions of the same object often do not, and compilers know.
    -1 where none is found.
    """
    result = np.full(len(sites), -1, np.int64)
    passed = _addresses_passed(program, obj, sites, argument)
    function = program.functions(np.full(len(passed.row), obj), passed.word)
    stubs = program.codes[obj].stubs
    stub = position_in(stubs.start, passed.word)
    slot = np.where(passed.is_load, passed.word, stubs.slot[stub] if len(stubs.slot) else -1)
    through = passed.is_load | (stub >= 0)
    function[through] = slot_columns(program, obj, slot[through])[1]
    found = passed.kept(np.flatnonzero(function >= 0))
    result[passed.row[found]] = function[found]
    return result


def followed_arguments(program: Program, obj: int, sites: Columns, argument: int, passed: Columns) -> Columns:
    """`passed`, and where that has none what functions that form addresses hold in the argument's register.

    Two threads that begin in one function get its address from a register that is kept.
    """
    code, image = program.codes[obj], program.image(obj)
    names = CONVENTIONS[image.machine].arguments
    owner = code.owners(sites)
    missing = np.flatnonzero((passed < 0) & (owner >= 0) & np.isin(owner, code.taken_owner))
    if argument >= len(names) or not len(missing):
        return passed
    found = passed.copy()
    for caller in unique(owner[missing]).tolist():
        if int(code.size[caller]) > _FOLLOWED_BYTES:
            continue
        rows = missing[owner[missing] == caller]
        body = decode(image, [(int(code.start[caller]), int(code.size[caller]))])
        for site, address in arguments_at(body, image.machine, sites[rows].tolist(), names[argument]):
            function = program.function(obj, address)
            found[rows[sites[rows] == site]] = -1 if function is None else function
    return found


def string_arguments(program: Program, obj: int, sites: Columns, argument: int) -> dict[int, str]:
    """Site to the constant string whose address is passed there, found in the same way."""
    image = program.image(obj)
    passed = _addresses_passed(program, obj, sites, argument)
    result = {}
    for found in passed.kept(np.flatnonzero(~passed.is_load)).tolist():
        text = image.read_string(int(passed.word[found]))
        if text and text.isprintable():
            result[int(sites[passed.row[found]])] = text
    return result


def data_arguments(program: Program, obj: int, sites: Columns, argument: int) -> dict[int, tuple[int, bool]]:
    """Site to the address that is passed there, and whether it is loaded from there, found in the same way."""
    passed = _addresses_passed(program, obj, sites, argument)
    return {
        int(sites[passed.row[found]]): (int(passed.word[found]), bool(passed.is_load[found]))
        for found in passed.kept(np.arange(len(passed.row))).tolist()
    }


@dataclass(frozen=True, eq=False)
class _Passed:
    """Instructions that put an address into an argument register shortly before a call, as parallel columns."""

    image: Image
    register: str
    row: Columns
    """Which of the call sites that were asked about."""
    call: Columns
    place: Columns
    word: Columns
    """The address, or where the argument is loaded from."""
    is_load: npt.NDArray[np.bool_]

    def kept(self, rows: Columns) -> Columns:
        """Those of these rows whose register nothing sets again before the call.

        The columns of sites hold only some of the instructions that write registers; a plain move is not
        among them. So what lies between is decoded.
        """
        between = list(zip(self.place[rows].tolist(), (self.call - self.place)[rows].tolist(), strict=True))
        return rows[keep_register(self.image, between, self.register)]


def _addresses_passed(program: Program, obj: int, sites: Columns, argument: int) -> _Passed:
    """The nearest earlier instruction of each call that forms or loads an address for the argument."""
    code, image = program.codes[obj], program.image(obj)
    names = CONVENTIONS[image.machine].arguments
    numbers = SCANNERS[image.machine].ARGUMENT_REGISTERS
    register = numbers[argument] if argument < len(numbers) else _NO_REGISTER
    place, address, is_load = _register_writes(code, register)
    position = place.searchsorted(sites) - 1
    row = np.flatnonzero(position >= 0)
    position, call = position[row], sites[row]
    at, name = place[position], names[argument] if argument < len(names) else ""
    good = (at > _last(code.calls_outside, call)) & (call - at <= _CALLBACK_REACH)
    good &= code.owners(at) == code.owners(call)
    for crossing in np.flatnonzero(good & (at < _last(code.all_calls, call))).tolist():
        good[crossing] = _survives(image, code, int(at[crossing]), int(call[crossing]), name)
    row, call, position = row[good], call[good], position[good]
    return _Passed(image, name, row, call, at[good], address[position], is_load[position])


def _last(sites: Columns, call: Columns) -> Columns:
    """The last of these sites before each call; -1 where there is none."""
    before = sites.searchsorted(call) - 1
    return np.where(before >= 0, sites[before], -1) if len(sites) else np.full(len(call), -1)


def _survives(image: Image, code: CodeIndex, at: int, call: int, register: str) -> bool:
    """No function that is called between two places changes a register: GCC's -fipa-ra relies on that.

    Such functions call nothing but their like; what leaves the object, or calls through a register, may change it.
    """
    sites = code.sites
    written = Register(register)
    pending = sites.direct_target[(sites.direct_site > at) & (sites.direct_site < call)].tolist()
    seen = set(pending)
    while pending:
        start = pending.pop()
        place = int(code.start.searchsorted(start))
        if len(seen) > _FEW or place == len(code.start) or code.start[place] != start:
            return False
        size = int(code.size[place])
        outside = code.calls_outside[code.calls_outside.searchsorted(start) :]
        if size > _SMALL or (len(outside) and outside[0] < start + size):
            return False
        body = decode(image, [(start, size)])
        operations = [o for instruction in body.instructions for o in instruction.operations]
        if any(isinstance(o, JumpUnknown | Syscall) or getattr(o, "destination", None) == written for o in operations):
            return False
        inner = sites.direct_target[(sites.direct_site >= start) & (sites.direct_site < start + size)].tolist()
        pending += [target for target in inner if target not in seen]
        seen.update(inner)
    return True


_WRITES: Final[WeakKeyDictionary[CodeIndex, dict[int, _Writes]]] = WeakKeyDictionary()


def _register_writes(code: CodeIndex, register: int) -> _Writes:
    """(site, address, whether it is loaded from there) of what puts an address into a register, by site."""
    known = _WRITES.setdefault(code, {})
    if register not in known:
        sites = code.sites
        columns = []
        for prefix, address in (("taken", "target"), ("data", "target"), ("loaded", "address")):
            mine = getattr(sites, f"{prefix}_register") == register
            place = getattr(sites, f"{prefix}_site")[mine]
            columns.append(
                (place, getattr(sites, f"{prefix}_{address}")[mine], np.full(len(place), prefix == "loaded"))
            )
        place, value, is_load = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.argsort(place, kind="stable")
        known[register] = place[order], value[order], is_load[order]
    return known[register]
