"""Which arguments a function reads: one that reads none can be a fork handler.

Owns: that question. Takes: `Flow` and a function. Gives: positions of arguments.
Must never: answer "none" where a call that may pass an argument on is not understood.
Wrong where: one side of a branch overwrites an argument that the other side, later in the code, reads: instructions are
      looked at in their order.
"""

from __future__ import annotations

import re
from typing import Final

from forkproof.code.decode import listing
from forkproof.elf.image import Machine
from forkproof.flow import Flow
from forkproof.program import Function

_DEPTH: Final = 4
_COPIES: Final = re.compile(r"mov|movabs|movs?x|movsxd|movz[wx]?|lea|pop|set\w+")
"""x86-64: instructions that only write their first operand."""
_CLEARS: Final = ("xor", "sub", "pxor")
_A64_READS: Final = re.compile(r"st|cmp|cmn|tst|cb|tb|fcmp|ccmp|movk|bfi|bfxil|cas|br$|blr$|ret")
"""AArch64: instructions that read their first operand as well, or instead."""
_X86_NAMES: Final = (
    r"(?:rdi|edi|dil?)", r"(?:rsi|esi|sil?)", r"(?:[re]?dx|dl|dh)", r"(?:[re]?cx|cl|ch)", r"r8[dwb]?", r"r9[dwb]?"
)  # fmt: skip
_X86: Final = tuple(re.compile(rf"\b{name}\b") for name in _X86_NAMES)
_A64: Final = tuple(re.compile(rf"\b[xw]{number}\b") for number in range(8))


def read_arguments(flow: Flow, function: Function, depth: int = _DEPTH) -> frozenset[int]:
    """Positions of arguments that are read before anything else is put into their registers."""
    image = flow.program.image(flow.program.object_of(function))
    is_x86 = image.machine is Machine.X86_64
    names = _X86 if is_x86 else _A64
    found: set[int] = set()
    written: set[int] = set()
    for start, size in flow.body(function).parts:
        for address, _, mnemonic, text in listing(image.read(start, size).tobytes(), start, image.machine):
            if _is_call(mnemonic, is_x86=is_x86):
                found |= _passed_on(flow, function, address, depth) - written
                written = set(range(len(names)))
                continue
            reads, writes = _operands(mnemonic, text, is_x86=is_x86)
            found |= {i for i, name in enumerate(names) if name.search(reads)} - written
            written |= {i for i, name in enumerate(names) if name.fullmatch(writes.strip())}
    return frozenset(found)


def _is_call(mnemonic: str, *, is_x86: bool) -> bool:
    last = mnemonic.rpartition(" ")[2]
    return last == "call" if is_x86 else last in ("bl", "blr")


def _passed_on(flow: Flow, function: Function, site: int, depth: int) -> frozenset[int]:
    """What the functions called at a site read; all of it where that is not known."""
    targets = [Function(int(flow.graph.target[e])) for e in flow.edges_at(function, site)]
    if not targets or depth == 0:
        return frozenset(range(len(flow.convention.arguments)))
    return frozenset().union(*(read_arguments(flow, t, depth - 1) for t in targets if t != function))


def _operands(mnemonic: str, text: str, *, is_x86: bool) -> tuple[str, str]:
    """(text that is read, register that is only written)."""
    first, _, rest = text.partition(",")
    last = mnemonic.rpartition(" ")[2]
    if "[" in first:
        return text, ""
    if is_x86:
        is_cleared = last in _CLEARS and first.strip() == rest.strip()
        return ("", first) if is_cleared else (rest, first) if _COPIES.fullmatch(last) else (text, "")
    return (text, "") if _A64_READS.match(last) else (rest, first)
