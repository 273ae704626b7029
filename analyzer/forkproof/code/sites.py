"""What a scanner finds in the code of one object, as columns.

Owns: the column types that both machines' scanners fill, and the map of addresses that a branch can
      meaningfully lead to.
Takes: nothing. Gives: `Sites`. Must never: know an instruction encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from forkproof.elf.image import I64, U8

Bool = npt.NDArray[np.bool_]


def _no_addresses() -> I64:
    return np.zeros(0, np.int64)


def _no_flags() -> Bool:
    return np.zeros(0, np.bool_)


class EntryMap:
    """Constant-time test whether an address is a function start or a PLT stub."""

    def __init__(self, low: int, high: int, functions: I64, stubs: I64) -> None:
        self.low, self.high = low, high
        self._kind = np.zeros(max(high - low, 0), np.uint8)
        self._mark(functions, 1)
        self._mark(stubs, 2)

    def _mark(self, addresses: I64, kind: int) -> None:
        inside = addresses[(addresses >= self.low) & (addresses < self.high)]
        self._kind[inside - self.low] = kind

    def kinds(self, addresses: I64) -> U8:
        """0 nothing, 1 function start, 2 PLT stub, for each address."""
        result = np.zeros(len(addresses), np.uint8)
        inside = (addresses >= self.low) & (addresses < self.high)
        result[inside] = self._kind[addresses[inside] - self.low]
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Landmarks:
    """What an address that code forms can mean in one object."""

    entries: EntryMap
    fixed: range = range(0)
    """The addresses of an executable with a fixed base, which its code may hold as immediates."""
    data: tuple[tuple[int, int], ...] = ()
    """(start, end) of what may hold pointers."""
    words: I64 = field(default_factory=_no_addresses)
    """Words that the loader fills with addresses of functions, sorted."""

    def is_data(self, addresses: I64) -> Bool:
        """Whether each address lies in such data."""
        found = np.zeros(len(addresses), bool)
        for start, end in self.data:
            found |= (addresses >= start) & (addresses < end)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Sites:
    """Columns of code sites; columns with a common prefix are parallel.

    direct_*    branches to a function start or a PLT stub of this object
    slot_*      calls and jumps through a word in memory (GOT), at a known address
    taken_*     the address of a function, put into a register (register -1: into memory)
    loaded_*    a word at a known address, loaded into a register
    data_*      the address of something that is not a function, put into a register
    indirect    calls through a register or a computed address: targets unknown
    syscalls    instructions that enter the kernel (on x86-64, byte patterns: verify before use)
    """

    direct_site: I64 = field(default_factory=_no_addresses)
    direct_target: I64 = field(default_factory=_no_addresses)
    direct_jump: Bool = field(default_factory=_no_flags)
    slot_site: I64 = field(default_factory=_no_addresses)
    slot_address: I64 = field(default_factory=_no_addresses)
    slot_jump: Bool = field(default_factory=_no_flags)
    taken_site: I64 = field(default_factory=_no_addresses)
    taken_target: I64 = field(default_factory=_no_addresses)
    taken_register: I64 = field(default_factory=_no_addresses)
    loaded_site: I64 = field(default_factory=_no_addresses)
    loaded_address: I64 = field(default_factory=_no_addresses)
    loaded_register: I64 = field(default_factory=_no_addresses)
    data_site: I64 = field(default_factory=_no_addresses)
    data_target: I64 = field(default_factory=_no_addresses)
    data_register: I64 = field(default_factory=_no_addresses)
    indirect: I64 = field(default_factory=_no_addresses)
    syscalls: I64 = field(default_factory=_no_addresses)


_Found = TypeVar("_Found", "Sites", "Stores")


def concatenate(parts: list[_Found]) -> _Found:
    """What was found in several code ranges, one at least, in the order of the ranges."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return type(first)(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(first)})


@dataclass(frozen=True, slots=True, eq=False)
class Stubs:
    """PLT stubs: where each begins and the GOT slot that it jumps through."""

    start: I64
    slot: I64


@dataclass(frozen=True, slots=True, eq=False)
class Stores:
    """Code that may store a word: parallel columns. What looks like a store need not be one."""

    site: I64
    place: I64
    """An address, or an offset from whatever a register holds."""
    is_global: Bool

    def between(self, first: I64, last: I64, place: int, is_global: bool) -> Bool:
        """For each range (from, to) of code, whether one of these stores goes there."""
        sites = np.sort(self.site[(self.place == place) & (self.is_global == is_global)])
        found: Bool = sites.searchsorted(last) > sites.searchsorted(first)
        return found
