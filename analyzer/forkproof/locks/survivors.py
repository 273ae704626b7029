"""Which registers a call leaves as they were, though the calling convention lets it change them.

Owns: the registers that a function and those that it calls write, by their code.
Takes: `Flow` and a function. Gives: names of registers.
Must never: trust a convention: a register survives where nothing that the callee can run writes it.
Wrong where: it tells too little: of functions that are large, call far down, through pointers, or another object.

GCC knows what a function of the same file writes (-fipa-ra, part of -O2), and keeps the address of a lock in a register
over a call that would destroy it by the convention. The unlock that follows then names its lock by that register.
"""

from __future__ import annotations

from typing import Final

from forkproof.callgraph import CALLS, EdgeKind
from forkproof.code.operations import Atomic, Call, JumpUnknown, Register, Syscall
from forkproof.flow import Flow
from forkproof.program import Function

_MOST_BYTES: Final = 1024
"""Of a function that is looked at."""
_DEPTH: Final = 3
"""Calls below it that are."""
INSIDE: Final = frozenset({EdgeKind.DIRECT, EdgeKind.JUMP})
"""Kinds of calls that no code of a linker comes between, AArch64's veneers left out."""
_VENEER: Final = frozenset({"x16", "x17"})
"""A linker may put code between a call and its target, which uses these."""


class Survivors:
    """What is known of the functions that were asked about."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._known: dict[Function, frozenset[str]] = {}
        self._after: dict[tuple[Function, int], frozenset[str]] = {}

    def after(self, function: Function, site: int) -> frozenset[str]:
        """Registers that every function called at a site leaves alone; none where one of them may be outside."""
        found = self._after.get((function, site))
        if found is None:
            graph, edges = self.flow.graph, self.flow.edges_at(function, site)
            is_inside = bool(edges) and all(graph.kind[e] in INSIDE for e in edges)
            each = [self.of(Function(int(graph.target[e]))) for e in edges] if is_inside else [frozenset[str]()]
            found = self._after[function, site] = frozenset.intersection(*each)
        return found

    def of(self, function: Function) -> frozenset[str]:
        """Registers that the convention lets a callee change, and this one does not."""
        if function not in self._known:
            self._known[function] = self._unwritten(function, _DEPTH) - {self.flow.convention.result} - _VENEER
        return self._known[function]

    def _unwritten(self, function: Function, depth: int) -> frozenset[str]:
        flow, program = self.flow, self.flow.program
        if not 0 < program.size_of(function) <= _MOST_BYTES:
            return frozenset()
        left = set(flow.convention.destroyed)
        for instruction in flow.body(function).instructions:
            for operation in instruction.operations:
                if isinstance(operation, JumpUnknown | Syscall):
                    return frozenset()
                if isinstance(operation, Call) and not flow.edges_at(function, instruction.address):
                    return frozenset()
                written = getattr(operation, "destination", None)
                written = operation.result if isinstance(operation, Atomic) else written
                if isinstance(written, Register):
                    left.discard(written.name)
        for _, target, _, kind in flow.outgoing_rows(function):
            if kind in CALLS and left:
                is_inside = kind in INSIDE and program.object_of(Function(target)) == program.object_of(function)
                left &= self._unwritten(Function(target), depth - 1) if is_inside and depth else set()
        return frozenset(left)
