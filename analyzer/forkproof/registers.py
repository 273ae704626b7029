"""Calls through a register that was set before: `mov fork@GOT(%rip), %r14; ...; call *%r14`.

Owns: which functions are worth following for such calls, and the edges that result.
Takes: a linked program and the signatures. Gives: edges of the kind `got`.
Must never: follow a function that sets no register to a function and calls through the same register.
Wrong where: the function is larger than `_FOLLOWED_BYTES`; where the register is kept in memory in between.

Everywhere, calls of what all depends on are followed: forkers, starters of threads, registrars of handlers. In objects
that hardly use their PLT (Rust, -fno-plt), calls of what leads to those are too, through words that nothing changes
once the program runs. Following all would cost as much as all else that is done to build the graph.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CallGraph, EdgeColumns, EdgeKind, known_edges
from forkproof.code.decode import decode
from forkproof.code.index import SCANNERS, CodeIndex
from forkproof.code.register_calls import calls_through
from forkproof.columns import position_in, unique
from forkproof.elf.image import Image
from forkproof.program import Columns, Program, slot_columns
from forkproof.signatures import Signatures

_FOLLOWED_BYTES: Final = 1 << 15
"""Bytes of a function that is followed for calls through registers."""
_OPCODE: Final = 4
"""Bytes that tell which register a call goes through."""


def register_edges(program: Program, signatures: Signatures) -> list[EdgeColumns]:
    """Calls of what everything depends on, in all objects."""
    wanted = _wanted(program, signatures)
    parts = []
    for obj, code in enumerate(program.codes):
        owner, held, _, callee = _set_registers(program, obj)
        parts.append(_edges(program, obj, owner, held, callee, wanted[callee] & (code.unknown_calls[owner] > 0)))
    return [part for part in parts if part is not None]


def edges_leading_on(graph: CallGraph, signatures: Signatures) -> list[EdgeColumns]:
    """Calls of what leads to those, in objects that hardly use their PLT."""
    program, parts = graph.program, list[EdgeColumns | None]()
    chosen = [obj for obj, code in enumerate(program.codes) if _has_no_plt(code)]
    if not chosen:
        return []
    leads = graph.distances(np.flatnonzero(_wanted(program, signatures)), backward=True) > 0
    for obj in chosen:
        code, image = program.codes[obj], program.image(obj)
        owner, held, register, callee = _set_registers(program, obj)
        # Argument registers are set to functions to pass them, and hold something else soon.
        is_used = np.isin(owner * _REGISTERS + register, _called_registers(image, code)) & _is_fixed(image, held)
        is_used &= ~np.isin(register, SCANNERS[image.machine].ARGUMENT_REGISTERS) & leads[callee]
        parts.append(_edges(program, obj, owner, held, callee, is_used))
    return [part for part in parts if part is not None]


def _wanted(program: Program, signatures: Signatures) -> npt.NDArray[np.bool_]:
    """The functions whose calls matter most."""
    names = {forker.name for forker in signatures.forkers} | {*signatures.thread_starters}
    names |= {name for name, callback in signatures.callbacks.items() if "prepare" in callback.when}
    wanted = np.zeros(int(program.base[-1]), bool)
    wanted[list(program.called(sorted(names)))] = True
    return wanted


def _edges(
    program: Program, obj: int, owner: Columns, held: Columns, callee: Columns, chosen: npt.NDArray[np.bool_]
) -> EdgeColumns | None:
    """The calls of some functions through the registers that they set."""
    code, image, base = program.codes[obj], program.image(obj), int(program.base[obj])
    words = dict(zip(held[chosen].tolist(), callee[chosen].tolist(), strict=True))
    found = [
        (caller, words[word], site)
        for caller in unique(owner[chosen]).tolist()
        if int(code.size[caller]) <= _FOLLOWED_BYTES
        for site, word in calls_through(
            decode(image, [(int(code.start[caller]), int(code.size[caller]))]), image.machine, words
        )
    ]
    if not found:
        return None
    source, target, place = (np.array(column, np.int64) for column in zip(*found, strict=True))
    return known_edges(source + base, target, place, np.full(len(found), EdgeKind.GOT))


def _has_no_plt(code: CodeIndex) -> bool:
    """Most calls of other objects go through the GOT: such compilers keep what they load from there in registers."""
    through_stubs = position_in(code.stubs.start, code.sites.direct_target) >= 0
    return len(code.sites.slot_site) > int(np.count_nonzero(through_stubs))


_REGISTERS: Final = 64
"""More than a machine has."""


def _set_registers(program: Program, obj: int) -> tuple[Columns, Columns, Columns, Columns]:
    """(function that sets a register, word or function that it is set to, register, callee), where one is called."""
    code, sites = program.codes[obj], program.codes[obj].sites
    loaded = slot_columns(program, obj, sites.loaded_address)[1]
    taken = program.functions(np.full(len(sites.taken_target), obj), sites.taken_target)
    owner = np.concatenate([code.loaded_owner, code.taken_owner])
    held = np.concatenate([sites.loaded_address, sites.taken_target])
    register = np.concatenate([sites.loaded_register, sites.taken_register])
    callee = np.concatenate([loaded, taken])
    known = (owner >= 0) & (callee >= 0) & (register >= 0)
    return owner[known], held[known], register[known], callee[known]


def _called_registers(image: Image, code: CodeIndex) -> Columns:
    """Function and register of every call through a register, as one number."""
    sites = code.sites.indirect
    owner = code.owners(sites)
    scanner = SCANNERS[image.machine]
    begin, owner = sites[owner >= 0] - scanner.BEFORE, owner[owner >= 0]
    around = np.zeros((len(begin), _OPCODE), np.uint8)
    for rva, size in image.code_ranges:
        inside = (begin >= rva) & (begin <= rva + size - _OPCODE)
        around[inside] = image.read(rva, size)[(begin[inside] - rva)[:, None] + np.arange(_OPCODE)]
    register = scanner.called_registers(around)
    found: Columns = unique((owner * _REGISTERS + register)[register >= 0])
    return found


def _is_fixed(image: Image, words: Columns) -> npt.NDArray[np.bool_]:
    """Nothing writes there once the program runs: what relocation makes read-only, and what always is."""
    writable = np.zeros(len(words), bool)
    for segment in image.segments:
        if segment.writable:
            writable |= (words >= segment.rva) & (words < segment.rva + segment.memory_size)
    for start, size in image.relro:
        writable &= ~((words >= start) & (words < start + size))
    return ~writable
