"""One function at a time through the disassembler.

Owns: the lifting of a function's instructions to operations, and its splitting into basic blocks.
Takes: bytes and their address. Gives: `Body`.
Must never: be run over whole objects: 1 M instructions a second is slow next to a vectorised scan.
Wrong where: data stands between instructions (x86-64 switch tables in code are rare; AArch64 literal
      pools decode as undefined and end a block).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forkproof.code import lift_aarch64, lift_x86_64
from forkproof.code.disassembler import disassemble
from forkproof.code.operations import Branch, Call, Jump, JumpUnknown, Memory, Operation, Register, Return, Stop
from forkproof.elf.image import Image, Machine

_BRANCHES: Final = (Branch, Jump)
_LEAVING: Final = (Jump, JumpUnknown, Return, Stop)
"""What does not go on to the next instruction."""
_ENDING: Final = frozenset({Branch, *_LEAVING})
"""What ends a block. Most instructions are none of these, which their types tell at once."""


class Instruction(NamedTuple):
    """A decoded instruction and what it does.

    Prefixes that change nothing (`bnd call`, `addr32 call`, `data16 rex.W call`) are left off branches,
    so that their address is the opcode's: the site that the scanners report.
    """

    address: int
    size: int
    operations: tuple[Operation, ...]

    @property
    def end(self) -> int:
        """Address of the next instruction."""
        return self.address + self.size


@dataclass(frozen=True, eq=False)
class Body:
    """The instructions of one function (its cold parts included), in address order."""

    entry: int
    instructions: tuple[Instruction, ...]
    parts: tuple[tuple[int, int], ...]
    """(start, size) of each range that belongs to the function."""
    prefixed: Mapping[int, int] = field(default_factory=dict)
    """Where the prefixes of a branch begin, to the branch's own address."""

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of the instructions, by position."""
        return tuple(instruction.address for instruction in self.instructions)

    @cached_property
    def index(self) -> dict[int, int]:
        """Position of each instruction by address (of its prefixes, too)."""
        found = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        found.update([(start, found[address]) for start, address in self.prefixed.items()])
        return found

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """Positions at which basic blocks begin."""
        index = self.index
        found = {index[start] for start, _ in self.parts if start in index}
        for position, operations in self._ending:
            found.add(position + 1)
            for operation in operations:
                if isinstance(operation, _BRANCHES) and operation.target in index:
                    found.add(index[operation.target])
        return tuple(sorted(p for p in found if p < len(self.instructions)))

    @cached_property
    def _ending(self) -> list[tuple[int, tuple[Operation, ...]]]:
        """The position and the operations of each instruction that ends a block."""
        return [
            (position, operations)
            for position, (_, _, operations) in enumerate(self.instructions)
            if not _ENDING.isdisjoint(map(type, operations))
        ]

    @cached_property
    def orphans(self) -> tuple[int, ...]:
        """Leaders that no branch names and nothing falls into: what a computed jump may lead to."""
        index = self.index
        named = {index[start] for start, _ in self.parts if start in index}
        stops = set()
        for position, operations in self._ending:
            for operation in operations:
                if isinstance(operation, _BRANCHES) and operation.target in index:
                    named.add(index[operation.target])
                if isinstance(operation, _LEAVING):
                    stops.add(position + 1)
        found = (p for p in self.leaders if p not in named and (p in stops or not p))
        return tuple(p for p in found if not self._is_padding(p, named))

    def _is_padding(self, position: int, named: set[int]) -> bool:
        """No-operations between what leaves and what a branch names, which compilers put there to align it."""
        end = position
        while end < len(self.instructions) and not self.instructions[end].operations:
            end += 1
        return end == len(self.instructions) or (end > position and end in named)

    @cached_property
    def predecessors(self) -> Mapping[int, tuple[int, ...]]:
        """The blocks that may lead to each block, by position; what a value would decide is not decided."""
        found: dict[int, list[int]] = {leader: [] for leader in self.leaders}
        for leader in self.leaders:
            end = self.block_end(leader)
            for following in self._following(self.instructions[end - 1], end):
                found.setdefault(following, []).append(leader)
        return {block: tuple(before) for block, before in found.items()}

    def _following(self, last: Instruction, end: int) -> Iterator[int]:
        """Blocks that may follow one with this last instruction."""
        for operation in last.operations:
            if isinstance(operation, _BRANCHES) and operation.target in self.index:
                yield self.index[operation.target]
            if isinstance(operation, JumpUnknown):
                yield from self.orphans
            if isinstance(operation, _LEAVING):
                return
        yield end

    @cached_property
    def ranks(self) -> Mapping[int, int]:
        """The blocks numbered in reverse postorder of a depth-first search from the entry: outside of loops, a block
        comes after all that lead to it (Aho, Lam, Sethi, Ullman, Compilers, 9.6.5)."""
        following: dict[int, list[int]] = {leader: [] for leader in self.leaders}
        for block, before in self.predecessors.items():
            for each in before:
                following[each].append(block)
        entry = self.index.get(self.entry)
        finished: list[int] = []
        seen: set[int] = set()
        for start in (*(() if entry is None else (entry,)), *self.leaders):
            way = [] if start in seen else [(start, iter(following.get(start, ())))]
            seen.add(start)
            while way:
                block, rest = way[-1]
                onward = next((b for b in rest if b not in seen), None)
                if onward is None:
                    finished.append(block)
                    way.pop()
                else:
                    seen.add(onward)
                    way.append((onward, iter(following.get(onward, ()))))
        return {block: rank for rank, block in enumerate(reversed(finished))}

    def leading_to(self, addresses: Iterable[int]) -> frozenset[int]:
        """The blocks from which one of these instructions may be reached, their own included."""
        positions = [self.index[address] for address in addresses if address in self.index]
        pending = [self.block_start(position) for position in positions]
        found: set[int] = set()
        while pending:
            block = pending.pop()
            if block not in found:
                found.add(block)
                pending += self.predecessors.get(block, ())
        return frozenset(found)

    def position(self, address: int) -> int | None:
        """Position of the instruction at an address."""
        return self.index.get(address)

    def contains(self, address: int) -> bool:
        """True for addresses inside the function."""
        return any(start <= address < start + size for start, size in self.parts)

    def block_start(self, position: int) -> int:
        """Position of the first instruction of the block that holds `position`."""
        return self.leaders[max(bisect_right(self.leaders, position) - 1, 0)]

    def block_end(self, position: int) -> int:
        """Position after the last instruction of the block that holds `position`."""
        known = self._ends.get(position)  # blocks are asked for by their first instruction
        if known is not None:
            return known
        following = bisect_right(self.leaders, position)
        return self.leaders[following] if following < len(self.leaders) else len(self.instructions)

    @cached_property
    def _ends(self) -> Mapping[int, int]:
        return dict(zip(self.leaders, (*self.leaders[1:], len(self.instructions)), strict=True))


def decode(image: Image, parts: Iterable[tuple[int, int]], *, vectors: bool = False) -> Body:
    """Disassemble the ranges of one function, the first of which holds its entry; moves of vectors too, if asked."""
    ranges = tuple(parts)
    lift = _vector_lifter(image.machine) if vectors else _lifter(image.machine)
    text = lift_x86_64 if image.machine is Machine.X86_64 else lift_aarch64
    branches, sign, digits = text.BRANCHES, text.TARGET, len(text.TARGET)
    found: list[Instruction] = []
    prefixed: dict[int, int] = {}
    new = tuple.__new__  # without the call in Python that a named tuple is made by: there are hundreds of thousands
    for start, size in sorted(ranges):
        code = image.read(start, size).tobytes()
        for address, length, mnemonic, operands in disassemble(image.machine, code, start):
            branch = branches.get(mnemonic)
            if branch is not None and operands[:digits] == sign:
                operations: tuple[Operation, ...] = (branch(int(operands[digits:], 16)),)
            else:
                operations = lift(mnemonic, operands)
            may_have_prefix = length > _SHORTEST and operations and type(operations[0]) in _TRANSFERS
            if may_have_prefix and (prefix := _prefix(code, address - start, length, operations)):
                prefixed[address] = address + prefix
                found.append(Instruction(address + prefix, length - prefix, operations))
            else:
                found.append(new(Instruction, (address, length, operations)))
    return Body(ranges[0][0], tuple(found), ranges, prefixed)


def listing(code: bytes, address: int, machine: Machine) -> tuple[tuple[int, int, str, str], ...]:
    """(address, size, mnemonic, operands) of instructions in a row, as text: where operations do not tell enough."""
    return tuple(
        (at, size, name.decode(), text.decode()) for at, size, name, text in disassemble(machine, code, address)
    )


@cache
def _lifter(machine: Machine) -> Callable[[bytes, bytes], tuple[Operation, ...]]:
    """Operations of one instruction, remembered by its text: compilers repeat themselves."""
    lift = lift_x86_64.lift if machine is Machine.X86_64 else lift_aarch64.lift
    return lru_cache(maxsize=1 << 16)(lambda mnemonic, operands: lift(mnemonic.decode(), operands.decode()))


@cache
def _vector_lifter(machine: Machine) -> Callable[[bytes, bytes], tuple[Operation, ...]]:
    """The same, and what moves vector registers."""
    from forkproof.code import vectors

    ordinary = _lifter(machine)

    def lift(mnemonic: bytes, operands: bytes) -> tuple[Operation, ...]:
        found = vectors.lift(machine, mnemonic.decode(), operands.decode())
        return ordinary(mnemonic, operands) if found is None else found

    return lru_cache(maxsize=1 << 14)(lift)


_BATCH: Final = 512
"""Snippets decoded in one go."""
_SHORTEST: Final = 5
"""Bytes of `call rel32`: nothing shorter has prefixes that need to come off."""
_TRANSFERS: Final = frozenset({Call, Jump, JumpUnknown})
"""What `_prefix` knows."""


def _prefix(code: bytes, at: int, length: int, operations: tuple[Operation, ...]) -> int:
    """Number of bytes before the opcode of a branch that the scanners know; 0 for anything else."""
    match operations:
        case (Call(int()) | Jump(),):
            return length - 5 if code[at + length - 5] in (0xE8, 0xE9) else 0
        case (Call(None, Memory("pc")) | JumpUnknown(Memory("pc")),):
            return length - 6
        case _:
            return 0


def boundaries(image: Image, start: int, size: int) -> frozenset[int]:
    """Addresses of the instructions in a range, decoded one after the other from its start."""
    code = image.read(start, size).tobytes()
    return frozenset(address for address, _, _, _ in disassemble(image.machine, code, start))


def keep_register(image: Image, snippets: Sequence[tuple[int, int]], register: str) -> npt.NDArray[np.bool_]:
    """For each (start, size) of code without branches, whether its instructions after the first leave a register alone.

    All are decoded in one go, as if they followed each other: a call of the disassembler costs more than the few
    instructions of one. After one whose last instruction runs over its end, decoding begins anew.
    """
    writes = _writer(image.machine, register)
    codes = [image.read(start, size).tobytes() for start, size in snippets]
    result = np.ones(len(codes), bool)
    begin = 0
    while begin < len(codes):
        begin = _note_writes(image.machine, codes, begin, writes, result)
    return result


def _note_writes(
    machine: Machine,
    codes: Sequence[bytes],
    begin: int,
    writes: Callable[[bytes, bytes], bool],
    kept: npt.NDArray[np.bool_],
) -> int:
    """Decode snippets from `begin` on; gives the first of which nothing is known yet."""
    batch = codes[begin : begin + _BATCH]
    ends = list(accumulate(len(code) for code in batch))
    row, is_first = 0, True
    for address, size, mnemonic, operands in disassemble(machine, b"".join(batch), 0):
        while address >= ends[row]:
            row, is_first = row + 1, True
        if address + size > ends[row]:
            return begin + row + 1
        kept[begin + row] &= is_first or not writes(mnemonic, operands)
        is_first = False
    return begin + len(batch)


@cache
def _writer(machine: Machine, register: str) -> Callable[[bytes, bytes], bool]:
    lift, written = _lifter(machine), Register(register)
    return lambda mnemonic, operands: any(
        getattr(operation, "destination", None) == written for operation in lift(mnemonic, operands)
    )
