"""Calls that start a thread only if the structure that they pass asks for one: timers, notifications of queues.

Owns: what such a call asks for. Takes: `Flow`, and signatures of such functions. Gives: an answer for each call.
Must never: answer "no" where the structure was filled by code that is not followed: that is "unknown".
Wrong where: the structure is changed between by a callee (cells are kept across calls).
"""

from __future__ import annotations

from collections.abc import Mapping

from forkproof.callgraph import CERTAIN
from forkproof.code.state import State
from forkproof.code.values import Cell, Value, Word
from forkproof.elf.image import Image
from forkproof.flow import Flow
from forkproof.model import Answer
from forkproof.program import Function
from forkproof.signature_values import ThreadStarter


def requests(flow: Flow) -> Mapping[int, Answer]:
    """Whether each call, by edge, of a function that has to be asked for a thread asks for one."""
    known = flow.signatures.thread_starters
    conditional = [name for name, starter in known.items() if starter.structure is not None]
    return {
        edge: _is_asked(flow, edge, known[name])
        for function, name in flow.program.called(conditional).items()
        for edge in flow.graph.edges_to(function)
        if int(flow.graph.kind[edge]) in CERTAIN
    }


def _is_asked(flow: Flow, edge: int, starter: ThreadStarter) -> Answer:
    function = flow.whole(Function(int(flow.graph.source[edge])))
    state = flow.state_before(function, int(flow.graph.site[edge]))
    if state is None or starter.structure is None:
        return Answer.UNKNOWN
    pointer = state.register(flow.convention.arguments[starter.structure])
    if pointer is None:
        return Answer.UNKNOWN
    if pointer.base is None and pointer.offset == 0:
        return Answer.NO
    image = flow.program.image(flow.program.object_of(function))
    word = _word(state, (pointer.base, pointer.offset + starter.word), image)
    if word is None:
        return Answer.UNKNOWN
    return Answer.YES if word == starter.equals else Answer.NO


def _word(state: State, cell: Cell, image: Image) -> int | None:
    """The 32-bit constant in a cell, which may have been stored together with the word before it."""
    base, offset = cell
    for place, shift, bits in ((offset, 0, 32), (offset - 4, 32, 64)):
        held = state.cells.get((base, place))
        value = None if held is None or held.bits < bits else _constant(held.value, image)
        if value is not None:
            return value >> shift & 0xFFFFFFFF
    return None


def _constant(value: Value, image: Image) -> int | None:
    """A constant, or one that the code loads from where nothing can change it."""
    if value.base is None:
        return value.offset
    if not isinstance(value.base, Word) or value.offset:
        return None
    address = value.base.address
    fixed = any(s.rva <= address < s.rva + s.file_size and not s.writable for s in image.segments)
    return image.read_u64(address) if fixed else None
