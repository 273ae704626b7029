"""vfork-misuse: the child of vfork, which runs in its parent's memory, does more than exec or _exit.

Owns: what such a child must not do: return from the function that called vfork, allocate, wait, or change
      what its parent goes on to read.
Takes: `Facts`. Gives: one `Finding` for each function that calls vfork and kind of deed.
Must never: count posix_spawn, which is libc's own vfork and careful, or clone with a stack of its own.
Wrong where: see the page of the rule.

What only the child writes is found by following the function twice, as forks does: once with the result 0
and once as the parent. A cell counts when the parent can read it before it writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from forkproof.code.decode import Body, Instruction
from forkproof.code.explore import Exploration
from forkproof.code.operations import Compare, Memory, Set, Test
from forkproof.facts import Facts, WindowFacts
from forkproof.hazards.evidence import ChildCalls, dead_end, folded, fork_frame, frames_along
from forkproof.model import Answer, Finding, Frame, Severity, Verdict
from forkproof.program import Function

_NEAR: Final = 1
"""Calls below the function that calls vfork which its child makes as a matter of course."""
_PARENT: Final = 0x5A5A
"""A process id, as good as any."""


def find(facts: Facts) -> list[Finding]:
    """All findings about children of vfork."""
    return folded(finding for window in facts.windows if _matters(window) for finding in _of_window(facts, window))


def _matters(window: WindowFacts) -> bool:
    """The child goes on in the function that called, in its parent's memory and on its stack."""
    inner = window.window
    if inner.shares_memory is not Answer.YES or window.reachable is Answer.NO or not inner.levels:
        return False
    if inner.forker.strip("_") != "vfork":  # clone with CLONE_VM gives its child a stack of its own, or it would crash
        return False
    return inner.levels[0].function == inner.function and inner.levels[0].site == inner.site


def _of_window(facts: Facts, window: WindowFacts) -> Iterator[Finding]:
    if window.window.levels[0].returns:
        yield _returns(facts, window)
    yield from _allocates(facts, window)
    yield from _waits(facts, window)
    yield from _writes(facts, window)


def _finding(
    facts: Facts, window: WindowFacts, severity: Severity, what: str, why: str, way: tuple[Frame, ...] = ()
) -> Finding:
    fork = fork_frame(facts, window)
    if window.reachable is not Answer.YES and severity.rank < Severity.LOW.rank:
        severity = Severity.LOW
    is_shown = severity.rank < Severity.LOW.rank
    return Finding(
        rule="vfork-misuse",
        severity=severity,
        verdict=Verdict.REACHABLE if is_shown else Verdict.SUSPECTED,
        target=facts.target,
        object=fork.object,
        message=f"the child of {window.window.forker} in {fork.function} {what}",
        why=why,
        fix="Between vfork and exec do nothing but exec and _exit; posix_spawn does the rest safely.",
        fork=fork,
        requester=way,
    )


def _returns(facts: Facts, window: WindowFacts) -> Finding:
    why = (
        "The child runs on its parent's stack. When it returns, it overwrites the frame in which the parent "
        "will wake up: the parent then returns to wherever the child's calls left an address."
    )
    return _finding(facts, window, Severity.HIGH, "returns from the function that called it", why)


def _allocates(facts: Facts, window: WindowFacts) -> Iterator[Finding]:
    entries = {entry: a for a in facts.allocators if a.is_used for entry in a.entries}
    found = _nearest(facts, window, frozenset(entries))
    if found is not None:
        edges, depth = found
        why = (
            "It works on the heap of its parent, which stands still meanwhile: if the child is killed there, or "
            "exec fails and it exits, the parent's heap keeps what the child did, locks included."
        )
        severity = Severity.MEDIUM if depth <= _NEAR else Severity.LOW
        yield _finding(facts, window, severity, "allocates in its parent's memory", why, _frames(facts, window, edges))


def _waits(facts: Facts, window: WindowFacts) -> Iterator[Finding]:
    blocking = frozenset(facts.flow.program.called(sorted(facts.flow.signatures.blocking.exact)))
    found = _nearest(facts, window, blocking)
    if found is not None:
        why = "The parent's thread stands still until the child execs or exits: it waits for what the child waits for."
        yield _finding(facts, window, Severity.LOW, "waits", why, _frames(facts, window, found[0]))


def _frames(facts: Facts, window: WindowFacts, edges: list[int]) -> tuple[Frame, ...]:
    return frames_along(facts, edges, window.window.function)


def _nearest(facts: Facts, window: WindowFacts, goals: frozenset[Function]) -> tuple[list[int], int] | None:
    """The shortest way of the child to one of these functions that is no way to die."""
    objects = {facts.flow.program.object_of(goal) for goal in goals}
    dead: set[Function] = set()
    while goals:
        calls = ChildCalls(facts, window, objects, dead)
        ways = [(call.depth, f, call) for f, call in calls.all.items() if f in goals]
        if not ways:
            break
        depth, _, call = min(ways, key=lambda way: way[:2])
        edges = calls.way(call)
        end = dead_end(facts, edges[:-1])
        if end is None or end in dead:
            return edges, depth
        dead.add(end)
    return None


# ---- what the parent reads ------------------------------------------------------------------------

_Cell = tuple[str | None, int]


def _writes(facts: Facts, window: WindowFacts) -> Iterator[Finding]:
    """Cells of the frame or of data that only the child writes, and that the parent goes on to read."""
    flow, inner = facts.flow, window.window
    body, register = flow.body(inner.function), flow.convention.result
    position = body.position(inner.site)
    if position is None:
        return
    start = body.instructions[position].end
    # An exec that fails comes back: what the child hands over then is what is looked for.
    child, parent = (flow.explore_from(inner.function, start, {register: value}) for value in (0, _PARENT))
    written = {
        cell
        for instruction in body.instructions
        if instruction.address in child.visited - parent.visited
        for cell in _stores(instruction)
    }
    read = {cell for cell in written if _is_read_first(body, parent, start, cell)}
    frame = {cell for cell in read if cell[0] != "data"}
    for cells, where in ((frame, "its parent's frame"), (read - frame, "data of its parent")):
        if cells:
            why = (
                f"It stores to {len(cells)} of the places in {where} that the parent reads afterwards. That may be "
                "meant, to hand an error over, but only volatile variables are sure to carry it."
            )
            yield _finding(facts, window, Severity.LOW, f"writes {where}, which the parent goes on to read", why)


def _stores(instruction: Instruction) -> Iterator[_Cell]:
    for operation in instruction.operations:
        if isinstance(operation, Set) and isinstance(operation.destination, Memory):
            cell = _cell(instruction, operation.destination)
            if cell is not None:
                yield cell


def _loads(instruction: Instruction) -> Iterator[_Cell]:
    for operation in instruction.operations:
        match operation:
            case Set(_, Memory() as source):
                operands: tuple[object, ...] = (source,)
            case Compare(left, right) | Test(left, right):
                operands = (left, right)
            case _:
                operands = ()
        for operand in operands:
            if isinstance(operand, Memory) and (cell := _cell(instruction, operand)) is not None:
                yield cell


def _cell(instruction: Instruction, memory: Memory) -> _Cell | None:
    """A place in the frame or in data; other pointers may point anywhere."""
    if memory.indexed:
        return None
    if memory.base == "pc":
        return "data", instruction.end + memory.displacement
    return (memory.base, memory.displacement) if memory.base in _FRAME else None


_FRAME: Final = frozenset({"rsp", "rbp", "sp", "x29"})


def _is_read_first(body: Body, run: Exploration, start: int, cell: _Cell) -> bool:
    """The parent can read a cell, from `start` on, before it has written it."""
    seen: set[int] = set()
    pending = [start]
    while pending:
        address = pending.pop()
        if address in seen:
            continue
        seen.add(address)
        first = body.position(address)
        if first is None:
            continue
        is_open = True
        for instruction in body.instructions[first : body.block_end(first)]:
            if cell in _loads(instruction):
                return True
            if cell in _stores(instruction):
                is_open = False
                break
        if is_open:
            pending += run.successors.get(address, ())
    return False
