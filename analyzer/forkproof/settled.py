"""Variables that nothing writes: they hold what the file says for as long as the program runs.

Owns: which variables those are, among the small ones that an object keeps to itself.
Takes: `Flow`. Gives: a number for a word that is loaded, or None.
Must never: call a variable settled that anything may write: another object can write what is exported or copied,
      and whoever has its address may, too.
Wrong where: code reaches a variable from another's address (`(&a)[1]`), or by a register that one block fills and
      another uses for more than this one variable.

Compilers make constants of such variables themselves when they optimise. At -O0 they do not, and `static int debug;
if (debug) …` looks like a branch that goes both ways. Only symbols tell where a variable ends, so a stripped object has
none that are settled.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from forkproof.code.decode import Body, Instruction
from forkproof.code.explore import CallEffect, Explorer, Words
from forkproof.code.index import SCANNERS
from forkproof.code.operations import (
    Add,
    Address,
    Branch,
    Call,
    Compare,
    Forget,
    Jump,
    JumpUnknown,
    Memory,
    Operation,
    Register,
    Return,
    Set,
    Test,
)
from forkproof.code.state import State
from forkproof.columns import unique
from forkproof.elf.headers import ObjectKind
from forkproof.elf.image import Machine
from forkproof.elf.tables import STT_OBJECT
from forkproof.program import Function

if TYPE_CHECKING:
    from forkproof.flow import Flow

_LARGEST: Final = 1 << 20
"""Bytes of an object's code that is searched: who ships a program of more has optimised it."""
_MOST: Final = 64
"""Functions that are looked at for one variable."""
_SIZES: Final = frozenset({1, 2, 4, 8})
_SECTIONS: Final = (".data", ".bss")
_STUBS: Final = (".plt", ".plt.got", ".plt.sec")
_PAGE: Final = 4096
_WIDEST: Final = 16
"""Bytes that an operation of which the width is not told may write."""


class _Use(NamedTuple):
    """What a function does with the words that it refers to."""

    known: frozenset[int]
    """Instructions whose operands in memory were understood."""
    others: frozenset[int]
    """Words that it stores to, or of which it passes the address on."""
    pages: frozenset[int]
    """Pages of which it keeps the address for more than a block."""


class Settled:
    """Answers for the variables of one program, memoised."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._objects: dict[int, Words | None] = {}
        self._known: dict[tuple[int, int], int | None] = {}
        self._uses: dict[Function, _Use] = {}

    def of(self, function: Function) -> Words | None:
        """What tells the words of a function's object; None where it has no such variables."""
        obj = self.flow.program.object_of(function)
        if obj not in self._objects:
            self._objects[obj] = self._teller(obj) if self._variables(obj) else None
        return self._objects[obj]

    def _teller(self, obj: int) -> Words:
        variables = self._variables(obj)

        def word(address: int, bits: int) -> int | None:
            size = variables.get(address)
            if size is None or bits > size * 8:
                return None
            if (obj, address) not in self._known:
                self._known[obj, address] = None  # while it is found out
                self._known[obj, address] = self._held(obj, address, size)
            held = self._known[obj, address]
            return None if held is None else held & ((1 << bits) - 1)

        return word

    @cached_property
    def _by_object(self) -> dict[int, dict[int, int]]:
        return {}

    def _variables(self, obj: int) -> dict[int, int]:
        """The small variables that only this object knows, by address."""
        if obj not in self._by_object:
            self._by_object[obj] = dict(self._find_variables(obj))
        return self._by_object[obj]

    def _find_variables(self, obj: int) -> Iterator[tuple[int, int]]:
        image = self.flow.program.image(obj)
        sections = [s for name in _SECTIONS if (s := image.section(name)) is not None]
        table = image.static_symbols
        if sum(size for _, size in image.code_ranges) > _LARGEST or not len(table):
            return
        rows = np.flatnonzero(table.defined & (table.type == STT_OBJECT))
        exported = set(image.dynamic_symbols.value[image.dynamic_symbols.defined].tolist())
        starts, ends = table.value[rows], table.value[rows] + table.size[rows]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            is_small = end - start in _SIZES and start not in exported
            is_data = is_small and any(s.rva <= start and end <= s.rva + s.size for s in sections)
            if is_data and int(np.count_nonzero((starts < end) & (ends > start))) == 1:
                yield start, end - start

    # ---- who writes ----------------------------------------------------------------------------

    def _held(self, obj: int, address: int, size: int) -> int | None:
        image = self.flow.program.image(obj)
        _, targets = image.pointers
        within = range(address, address + size)
        if np.any((targets >= address) & (targets < address + size)) or any(image.pointer_at(a) for a in within):
            return None
        if any(a in image.slot_symbols for a in within) or self._is_named_absolutely(obj, address, size):
            return None
        if not self._is_only_read(obj, address, size):
            return None
        return int.from_bytes(image.read(address, size).tobytes(), "little")

    def _is_named_absolutely(self, obj: int, address: int, size: int) -> bool:
        """A program that lies where it was linked may name a word in its code and data without a relocation."""
        image = self.flow.program.image(obj)
        if image.kind is not ObjectKind.EXECUTABLE:
            return False
        data = bytes(image.data)
        return any((address + at).to_bytes(4, "little") in data for at in range(size))

    def _is_only_read(self, obj: int, address: int, size: int) -> bool:
        program = self.flow.program
        image, code, base = program.image(obj), program.codes[obj], int(program.base[obj])
        finder = SCANNERS[image.machine].find_references
        offsets = range(size if image.machine is Machine.X86_64 else 1)
        sites = [finder(image.read(r, n), r, address + at) for r, n in image.code_ranges for at in offsets]
        found = unique(np.concatenate(sites))
        found = found[[not any(begin <= site < end for begin, end in self._stubs(obj)) for site in found.tolist()]]
        owners = unique(code.owners(found)).tolist()
        functions = {self.flow.whole(Function(base + index)) for index in owners if index >= 0}
        if -1 in owners or len(functions) > _MOST:
            return False
        known = {address for function in functions for address in self._use(function).known}
        if image.machine is Machine.X86_64 and not all(
            self._instruction_at(functions, s) in known for s in found.tolist()
        ):
            return False
        words, page = range(address, address + size), address & -_PAGE
        uses = [self._use(function) for function in functions]
        return not any(page in use.pages or any(w in use.others for w in words) for use in uses)

    def _instruction_at(self, functions: set[Function], place: int) -> int | None:
        """The instruction that holds a displacement."""
        bodies = (self.flow.body(function) for function in functions)
        found = (body.addresses[bisect_right(body.addresses, place) - 1] for body in bodies if body.contains(place))
        return next(found, None)

    def _stubs(self, obj: int) -> list[tuple[int, int]]:
        """Where an object's calls of others go through, which only load from slots."""
        found = (self.flow.program.image(obj).section(name) for name in _STUBS)
        return [(s.rva, s.rva + s.size) for s in found if s is not None]

    def _use(self, function: Function) -> _Use:
        known = self._uses.get(function)
        if known is None:
            known = self._uses[function] = _Looker(self.flow.body(function), self.flow.machine).use()
        return known


class _Looker(Explorer):
    """Runs a function, and notes what it does with addresses of variables, and with the pages that lead to them."""

    def __init__(self, body: Body, machine: Machine) -> None:
        super().__init__(body, machine, lambda _: CallEffect(), frozenset())
        self.known, self.others, self.pages, self.kept = (set[int]() for _ in range(4))

    def use(self) -> _Use:
        """All of the function, what it only comes to by an exception included."""
        self.run(self.body.entry, {})
        instructions, position = self.body.instructions, 0
        while position < len(instructions):
            end = self.body.block_end(position)
            if position not in self.inputs:
                self.pages |= self.kept
                state = State()
                for here in range(position, end):
                    self._instruction(instructions[here], here, state)
                self._leave_block(state)
            position = end
        return _Use(frozenset(self.known), frozenset(self.others), frozenset(self.pages))

    def _enter(self, position: int, state: State, *, is_last: bool = True) -> None:
        """A page that is known on one way only is one that somebody may use as he likes."""
        old = self.inputs.get(position)
        self._leave_block(state)
        if old is not None:
            for one, other in ((old, state), (state, old)):
                self.pages.update(
                    v.offset
                    for name, v in one.registers.items()
                    if v is not None and v.base is None and not v.offset % _PAGE and other.register(name) != v
                )
        super()._enter(position, state, is_last=is_last)

    def _leave_block(self, state: State) -> None:
        """An address that a register keeps for another block is used there in ways that are not looked at."""
        for value in state.registers.values():
            if value is not None and value.base is None:
                (self.others if value.offset % _PAGE else self.kept).add(value.offset)

    def _passes(self, state: State, names: Iterable[str]) -> None:
        for name in names:
            value = state.register(name)
            if value is not None and value.base is None:
                (self.others if value.offset % _PAGE else self.pages).add(value.offset)

    def _instruction(self, instruction: Instruction, position: int, state: State) -> list[int] | None:
        operations = instruction.operations
        is_read = bool(operations) and all(isinstance(o, Set | Compare | Test | Add) for o in operations)
        for operation in operations:
            for place in self._memories(operation):
                self._note(instruction, operation, place, state, is_read=is_read)
            self._note_registers(operation, state)
        if not operations or any(isinstance(o, Call | Jump | JumpUnknown) for o in operations):
            self._passes(state, self.convention.arguments)
        if any(isinstance(o, Return) for o in operations):
            self._passes(state, [self.convention.result])
        return super()._instruction(instruction, position, state)

    def _note(
        self, instruction: Instruction, operation: Operation, place: Memory, state: State, *, is_read: bool
    ) -> None:
        cell = self._cell(instruction, place, state)
        if cell is None and place.indexed and place.base not in (None, "pc"):
            base = state.register(str(place.base))
            if base is not None and base.base is None:
                self.others.add(base.offset)
                self.pages.add(base.offset & -_PAGE)
        elif cell is not None and cell[0] is None:
            self.known.add(instruction.address)
            is_stored = isinstance(operation, Set) and operation.destination == place
            if (not is_read or is_stored) and not isinstance(operation, Address):
                size = operation.bits // 8 if isinstance(operation, Set) else _WIDEST
                self.others.update(range(cell[1], cell[1] + size))

    @staticmethod
    def _memories(operation: Operation) -> Iterator[Memory]:
        for part in operation:
            if isinstance(part, Memory):
                yield part

    def _note_registers(self, operation: Operation, state: State) -> None:
        """An address that is stored, or counted with, is passed on; one that is moved is followed."""
        if isinstance(operation, Add | Compare | Test | Branch):
            return
        if isinstance(operation, Set) and isinstance(operation.destination, Register):
            return
        sources = [part.name for part in operation if isinstance(part, Register)]
        destination = getattr(operation, "destination", None)
        if isinstance(operation, Forget):  # of what was there, too: a conditional move may leave it
            among = [part for part in operation.among if isinstance(part, Register)]
            self._passes(state, [*sources, *(part.name for part in among)])
        else:
            self._passes(state, (name for name in sources if destination != Register(name)))
