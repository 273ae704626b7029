"""Blocks of memory that a function fills: a lock that lies in one is new afterwards.

Owns: which calls and instructions fill how much, from where on.
Takes: `Flow`. Gives: the words of each block, as values of `explore`.
Must never: name a block of which the beginning or the length is not a constant.
Wrong where: a block is longer than `_LONGEST` (the rest is left out); where it is filled with locks that are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from forkproof.code.explore import State
from forkproof.code.operations import Forget, Register
from forkproof.code.values import Value
from forkproof.elf.image import Machine
from forkproof.flow import Flow
from forkproof.program import Function

_FILLING: Final = {
    "memset": 2, "__memset_chk": 2, "memcpy": 2, "__memcpy_chk": 2, "memmove": 2, "__memmove_chk": 2, "mempcpy": 2,
    "bzero": 1, "explicit_bzero": 1,
}  # fmt: skip
"""Which argument is the length; the first is where the block begins. POSIX, and what _FORTIFY_SOURCE makes of them."""
_LONGEST: Final = 1 << 14
_WORD: Final = 4
_REPEATED: Final = b"\xf3"
_STRINGS: Final = b"\xaa\xab\xa4\xa5"
"""Opcodes of stosb, stos, movsb and movs."""


def filled(flow: Flow, function: Function) -> Iterator[tuple[int, list[Value]]]:
    """Where a function fills a block of constant length, and each word of that."""
    lengths = {**_calls(flow, function), **_strings(flow, function)}
    for site, state in flow.states(function, lengths).items() if lengths else ():
        begin, counter, width = lengths[site]
        start, count = state.register(begin), _constant(state, counter)
        if start is not None and count is not None:
            size = min(count * width, _LONGEST)
            yield site, [start._replace(offset=start.offset + at) for at in range(0, size - _WORD + 1, _WORD)]


def _constant(state: State, register: str) -> int | None:
    value = state.register(register)
    return value.offset if value is not None and value.base is None else None


def _calls(flow: Flow, function: Function) -> dict[int, tuple[str, str, int]]:
    """(register of the beginning, register of the count, bytes counted) of each call that fills."""
    names, arguments = flow.program.called(sorted(_FILLING)), flow.convention.arguments
    rows = ((int(flow.graph.site[e]), Function(int(flow.graph.target[e]))) for e in flow.outgoing(function))
    return {site: (arguments[0], arguments[_FILLING[names[to]]], 1) for site, to in rows if to in names}


def _strings(flow: Flow, function: Function) -> dict[int, tuple[str, str, int]]:
    """The same of x86-64's repeated string instructions, which are told apart by their bytes."""
    if flow.machine is not Machine.X86_64:
        return {}
    image, found = flow.program.image(flow.program.object_of(function)), {}
    for instruction in flow.body(function).instructions:
        if Forget(Register("rdi")) in instruction.operations:
            code = image.read(instruction.address, instruction.end - instruction.address).tobytes()
            if code[:1] == _REPEATED and code[-1] in _STRINGS:
                width = 1 if code[-1] % 2 == 0 else 8 if code[1] & 0xF8 == 0x48 else 4
                found[instruction.address] = "rdi", "rcx", width
    return found
