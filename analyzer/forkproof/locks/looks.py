"""Loops that look at a word until another thread has changed it.

Owns: their shapes: a block that only loads, and the look before a compare-and-swap that is tried once the word is 0.
Takes: decoded functions. Gives: answers.
Must never: call a loop a wait that is left when the word is not as hoped: that is a try.
Wrong where: the word that is looked at is another than the one that is exchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final

from forkproof.code.conventions import Convention
from forkproof.code.decode import Body
from forkproof.code.explore import Exploration
from forkproof.code.operations import (
    Add,
    Address,
    Atomic,
    AtomicKind,
    Bits,
    BitsOf,
    Branch,
    Call,
    Compare,
    Condition,
    Const,
    Forget,
    Memory,
    Operand,
    Operation,
    Register,
    Reserve,
    Set,
    Sum,
    Syscall,
    Test,
)

LOOP_BLOCKS: Final = 6
"""Blocks in a loop that does nothing but try again."""


def expects_what_was_0(body: Body, run: Exploration, site: int, expects: Operand | None) -> bool:
    """A compare-and-swap that expects what it has just read, after waiting until that was 0.

    Every way to it comes from a branch that has shown so, and whose other side comes back to look again: a claim that
    is given up when somebody else has the word leaves the loop there.
    """
    begin = run.block_of(site)
    if begin is None or not isinstance(expects, Register) or _is_set_between(body, begin, site, expects):
        return False
    before = [b for b, following in run.successors.items() if begin in following and b != begin]
    return bool(before) and all(
        _shows_0(body, b, begin, expects)
        and all(_leads_to(run, other, b) for other in run.successors[b] if other != begin)
        for b in before
    )


def _is_set_between(body: Body, begin: int, site: int, register: Register) -> bool:
    instructions = body.instructions[body.index[begin] : body.index[site]]
    return any(getattr(o, "destination", None) == register for i in instructions for o in i.operations)


def _shows_0(body: Body, block: int, target: int, register: Register) -> bool:
    """The edge from a block to a target is the one on which a register holds 0."""
    first = body.index[block]
    looked_at: Operand | None = None
    for instruction in body.instructions[first : body.block_end(first)]:
        for operation in instruction.operations:
            match operation:
                case Test(left, right) if left == right:
                    looked_at = left
                case Compare(left, Const(0)):
                    looked_at = left
                case Branch(condition, where, operand, bits) if condition in (Condition.EQ, Condition.NE) and bits > 1:
                    seen = looked_at if operand is None else operand
                    return seen == register and (condition is Condition.EQ) is (where == target)
    return False


def _leads_to(run: Exploration, start: int, goal: int) -> bool:
    """A block leads to another within a few."""
    frontier = {start}
    for _ in range(LOOP_BLOCKS):
        if goal in frontier:
            return True
        frontier = {n for b in frontier for n in run.successors.get(b, ())}
    return False


def waits_for_memory(body: Body, stack: str) -> bool:
    """Some block that jumps back to itself can end only when another thread changes a word that it loads.

    It stores nothing, calls nothing and advances no register; the address that it loads from stays.
    """
    starts = [*body.leaders, len(body.instructions)]
    for first, last in pairwise(starts):
        block = body.instructions[first:last]
        operations = [o for instruction in block for o in instruction.operations]
        ends = operations[-1] if operations else None
        if isinstance(ends, Branch) and ends.target == block[0].address and _only_loads(operations[:-1], stack):
            return True
    return False


def _only_loads(operations: Sequence[Operation], stack: str) -> bool:
    written = {o.destination.name for o in operations if isinstance(o, Set) and isinstance(o.destination, Register)}
    read: list[Memory] = []
    for operation in operations:
        if isinstance(operation, Add | Sum | Call | Atomic | Syscall):
            return False
        if isinstance(operation, Set):
            if isinstance(operation.destination, Memory):
                return False
            read += [operation.source] if isinstance(operation.source, Memory) else []
        if isinstance(operation, Compare | Test):
            read += [o for o in (operation.left, operation.right) if isinstance(o, Memory)]
    return any(not c.indexed and c.base != stack and c.base not in written for c in read)


_TURN_REACH: Final = 48
"""Instructions after a ticket has been drawn within which it is compared."""
_PAIR_REACH: Final = 8
"""Instructions between a load-exclusive and its store-exclusive."""


def waits_for_turn(body: Body, helped: Collection[int], convention: Convention) -> bool:
    """What an addition found is compared with a word that is loaded in the same block, in a loop that does not add.

    `helped`: calls that add. What is compared and what is done then is for the interpretation to tell.
    """
    return any(
        _is_compared_in_a_loop(body, position, register, convention)
        for position in range(len(body.instructions))
        for register in _found_by_addition(body, position, helped, convention)
    )


def _found_by_addition(
    body: Body, position: int, helped: Collection[int], convention: Convention
) -> Iterator[Register]:
    """The register that has what an addition found, where an instruction is one, or begins one."""
    instruction = body.instructions[position]
    if instruction.address in helped:
        yield Register(convention.result)
    for operation in instruction.operations:
        if isinstance(operation, Atomic) and operation.kind is AtomicKind.ADD and operation.result is not None:
            yield operation.result
        if isinstance(operation, Reserve):
            after = body.instructions[position + 1 : position + _PAIR_REACH]
            added = {
                o.destination
                for i in after
                for o in i.operations
                if isinstance(o, Add) and o.left == operation.destination
            }
            if any(isinstance(o, Atomic) and o.stores in added for i in after for o in i.operations):
                yield operation.destination


def _is_compared_in_a_loop(body: Body, position: int, register: Register, convention: Convention) -> bool:
    holders: set[Operand] = {register}
    loaded: set[Operand] = set()
    home, leaders = _block(body, position), set(body.leaders)
    for here in range(position + 1, min(position + _TURN_REACH, len(body.instructions))):
        if here in leaders:
            loaded = set()
        for operation in body.instructions[here].operations:
            match operation:
                case Compare(left, right) | Test(left, right):
                    others = {right} if left in holders else {left} if right in holders else set()
                    is_word = any(o in loaded or _is_word(o, convention) for o in others)
                    if is_word and _is_around(body, _block(body, here), home):
                        return True
                case Call():
                    holders = {o for o in holders if not (isinstance(o, Register) and o.name in convention.destroyed)}
                case Set(destination, source) | Forget(destination, made=Bits(left=source)):
                    holders = holders | {destination} if source in holders else holders - {destination}
                    is_loaded = source in loaded or _is_word(source, convention)
                    loaded = loaded | {destination} if is_loaded else loaded - {destination}
                case Add(destination, left):
                    holders = holders | {destination} if left in holders else holders - {destination}
                case Forget(destination) | Sum(destination) | Address(destination):
                    holders, loaded = holders - {destination}, loaded - {destination}
        if not holders:
            return False
    return False


def _is_word(operand: Operand, convention: Convention) -> bool:
    return isinstance(operand, Memory) and operand.base != convention.stack


def _block(body: Body, position: int) -> int:
    return body.block_start(position)


def _is_around(body: Body, block: int, home: int) -> bool:
    """A block leads to itself within a few, without the one where the ticket is drawn."""
    frontier = set(body.predecessors.get(block, ())) - {home}
    for _ in range(LOOP_BLOCKS):
        if block in frontier:
            return True
        frontier = {b for f in frontier for b in body.predecessors.get(f, ())} - {home}
    return False


def waits_for_bits(body: Body, helped: Mapping[int, Atomic]) -> Iterator[tuple[int, Memory]]:
    """Where bits of a word are set by an operation that tells what they were, and who finds them set comes back.

    `helped`: calls that do such an operation. That the bits are the same is for the interpretation to tell.
    """
    looks: list[tuple[int, int]] | None = None
    for position, instruction in enumerate(body.instructions):
        atomics = [o for o in instruction.operations if isinstance(o, Atomic)]
        atomics += [helped[instruction.address]] if instruction.address in helped else []
        for atomic in atomics:
            if not _sets_bits(body, position, atomic):
                continue
            home, first = _block(body, position), _block(body, _begin(body, position, atomic))
            if atomic.expects is not None and _made(body, position, atomic.expects) in (BitsOf.AND, BitsOf.AND_NOT):
                if _is_around(body, home, -1):
                    yield instruction.address, atomic.cell
                continue
            looks = _bit_looks(body) if looks is None else looks
            if any(
                _comes_back(body, target, block, home, first)
                and (_comes_to(body, home, {block}) or _comes_to(body, block, {home}))
                for block, target in looks
            ):
                yield instruction.address, atomic.cell


def _begin(body: Body, position: int, atomic: Atomic) -> int:
    """Of an exclusive pair its load; of anything else where it is."""
    if atomic.kind is AtomicKind.EXCLUSIVE:
        for before in range(position - 1, max(position - _PAIR_REACH, 0) - 1, -1):
            if any(isinstance(o, Set) and o.source == atomic.cell for o in body.instructions[before].operations):
                return before
    return position


def _comes_back(body: Body, target: int, block: int, home: int, first: int) -> bool:
    """Who has found the bits set looks again, or tries again where the operation comes before the look. Who looks first
    and goes on to the operation where they are set does not wait: it takes the head of a list that is not empty."""
    if block != home and _is_reached(body, block, without=first):
        return _comes_to(body, target, {block}, without=first)
    return _comes_to(body, target, {home, block})


def _is_reached(body: Body, block: int, without: int) -> bool:
    """A way leads from the entry to a block, and not by way of another one."""
    entry, seen, frontier = body.position(body.entry), {without}, [block]
    while frontier:
        here = frontier.pop()
        if here == entry:
            return True
        if here not in seen:
            seen.add(here)
            frontier += body.predecessors.get(here, ())
    return False


def _sets_bits(body: Body, position: int, atomic: Atomic) -> bool:
    if atomic.kind is AtomicKind.SET_BITS:
        return True
    is_exchange = atomic.kind in (AtomicKind.COMPARE_SWAP, AtomicKind.EXCLUSIVE)
    return is_exchange and atomic.stores is not None and _made(body, position, atomic.stores) is BitsOf.OR


def _made(body: Body, position: int, register: Operand) -> BitsOf | None:
    """How the bits of a register were made, a few instructions before."""
    for before in range(position - 1, max(position - _PAIR_REACH, 0) - 1, -1):
        for operation in body.instructions[before].operations:
            if getattr(operation, "destination", None) == register:
                if isinstance(operation, Set) and isinstance(operation.source, Register):
                    return _made(body, before, operation.source)
                made = operation.made if isinstance(operation, Forget) else None
                return made.kind if made is not None else None
    return None


def _bit_looks(body: Body) -> list[tuple[int, int]]:
    """Blocks that end by looking at bits, and where each leads if they are set."""
    found = []
    for block in body.leaders:
        end = body.block_end(block)
        asks = has_sign = False
        masked = set[Operand]()
        for instruction in body.instructions[block:end]:
            for operation in instruction.operations:
                match operation:
                    case Test(left, right) if left != right:
                        asks, has_sign = True, False
                    case Test(left) | Compare(left, Const(0)):
                        asks, has_sign = left in masked, True
                    case Forget(destination, made=Bits(kind=BitsOf.AND)):
                        masked.add(destination)
                        asks = True
                    case Atomic() | Forget(made=Bits()):
                        asks = has_sign = False  # its flags tell of something else
                    case Branch(condition, target, operand, bits, bit):
                        is_equality = condition in (Condition.EQ, Condition.NE)
                        is_told = asks if operand is None else bits == 1
                        is_told = is_told if is_equality else has_sign or operand is not None
                        if bit is None and not (is_told and condition in (*_CLEAR, *_SET)):
                            continue
                        is_clear = condition in _CLEAR if bit is None else not bit.is_set
                        following = end if is_clear else body.position(target)
                        found += [(block, following)] if following is not None else []
    return found


_CLEAR: Final = (Condition.EQ, Condition.GE, Condition.NOT_NEGATIVE)
_SET: Final = (Condition.NE, Condition.LT, Condition.NEGATIVE)
"""Conditions that are met where a bit is clear, and where it is set."""


def _comes_to(body: Body, start: int, goals: set[int], without: int | None = None) -> bool:
    """Control comes from a block to one of others within a few, and not by way of another one."""
    frontier, seen = goals, {without} if without is not None else set[int]()
    for _ in range(LOOP_BLOCKS):
        if start in frontier:
            return True
        seen |= frontier
        frontier = {b for f in frontier for b in body.predecessors.get(f, ())} - seen
    return False
