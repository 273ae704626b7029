"""What code does only in a thread that is new to it: the thread's own variables still hold what they began with.

Owns: the sides of branches that a thread takes until it has a state of its own, and whether it then gets one.
Takes: `Summaries`, the functions that run often. Gives: an answer for one step of a way.
Must never: take a thread's list of free blocks that is empty again for a thread without a list: what runs often must
      not store into the variable what it has found by way of it.
Wrong where: a variable is changed through its address by a function that got it from elsewhere (then it counts as
      settled); where a program finds its variables without a word that ld.so fills in (then nothing is said).

A cell is settled if what runs often stores into it a new state at most: an address, what a call has returned, a
parameter. A number counts only if it begins as one that somebody wrote down: counters begin as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np

from forkproof.callgraph import CALLS, Reach
from forkproof.code.operations import Add, Address, Atomic, Call, Memory, Set
from forkproof.locks.chosen import Stores
from forkproof.locks.runs import Turn
from forkproof.locks.summary import Step, Summaries
from forkproof.locks.values import TELLING, ZERO, Content, Entry, Named, Object, Thread, Value, Word, root
from forkproof.program import Function

_SETS_UP: Final = 4
"""Calls below a step within which a new thread gets its state."""


class _Cell(NamedTuple):
    """A variable of the thread, by its place among those of an object."""

    number: int
    place: int


class Newcomers:
    """Answers for the steps of one program's ways."""

    def __init__(self, summaries: Summaries, reach: Callable[[], Reach]) -> None:
        """`reach`: distances from the functions that run often."""
        self.summaries, self._reach = summaries, reach
        self._stores = Stores(summaries, lambda _: True)
        self._settled: dict[_Cell, bool] = {}
        self._far: dict[Function, frozenset[int]] = {}
        self._named: dict[_Cell, Mapping[Function, set[int]]] = {}
        self._setters: dict[tuple[_Cell, Function], frozenset[Value]] = {}

    def is_only_for(self, step: Step) -> bool:
        """A function gets to an instruction in a new thread only, which has a state of its own afterwards."""
        run = self.summaries.run(step.function)
        sides = {(b, t.target): cell for b, turns in run.blocks.turns.items() for t in turns if (cell := self._new(t))}
        if not sides or not run.blocks.needs(run.block_of(step.site), sides):
            return False
        cells = {cell for cell in sides.values() if self._is_settled(cell)}
        sides = {side: cell for side, cell in sides.items() if cell in cells}
        if not sides or not run.blocks.needs(run.block_of(step.site), sides):
            return False
        return any(self._is_set(cell, step) for cell in cells)

    # ---- what a new thread finds -----------------------------------------------------------

    def _new(self, turn: Turn) -> _Cell | None:
        """The variable that is as it began on this side of a branch; a pointer that leads nowhere is, too."""
        for value, other in ((turn.value, turn.other), (turn.other, turn.value)):
            base = value.base
            if turn.equal is None or value.offset != 0 or not isinstance(base, Content | Word):
                continue
            if isinstance(base.base, Thread):
                cell = self._cell(base.base, base.offset)
                if cell is not None and self._is_first(cell, other, turn, is_pointer=isinstance(base, Content)):
                    return cell
            elif turn.equal and other == ZERO and isinstance(base.base, Content):
                thread = base.base.base
                cell = self._cell(thread, base.base.offset) if isinstance(thread, Thread) else None
                if cell is not None and self._is_field_first(cell, base.offset):
                    return cell
        return None

    def _cell(self, thread: Thread, offset: int) -> _Cell | None:
        word = thread.of
        if not isinstance(word, Content) or not isinstance(word.base, Object):
            return None
        place = self.summaries.program.image(word.base.number).thread_slots.get(word.offset)
        return None if place is None else _Cell(word.base.number, place + offset)

    def _first(self, cell: _Cell) -> Value:
        """What the variable holds in a new thread."""
        image = self.summaries.program.image(cell.number)
        rva, size = image.thread_image or (0, 0)
        if cell.place >= size:
            return ZERO
        target = image.pointer_at(rva + cell.place)
        if target is not None and any(s.rva <= target < s.rva + s.memory_size for s in image.segments):
            return Value(Object(cell.number), target)
        return Value(None, int.from_bytes(image.read(rva + cell.place, 8).tobytes(), "little"))

    def _is_first(self, cell: _Cell, other: Value, turn: Turn, *, is_pointer: bool) -> bool:
        first = self._first(cell)
        if turn.equal and is_pointer and turn.bits == 64 and (other == ZERO or (other == first and first.base)):
            return True
        mask = (1 << min(turn.bits, 64)) - 1
        is_known = first.base is None and other.base is None and first.offset & mask != 0
        return is_known and ((first.offset ^ other.offset) & mask == 0) is turn.equal

    def _is_field_first(self, cell: _Cell, offset: int) -> bool:
        """The variable begins as a pointer to an object whose field is 0 in the file."""
        first = self._first(cell)
        if not isinstance(first.base, Object):
            return False
        image = self.summaries.program.image(cell.number)
        place = first.offset + offset
        return image.pointer_at(place) is None and not image.read(place, 8).any()

    # ---- what it gets ----------------------------------------------------------------------

    def _is_settled(self, cell: _Cell) -> bool:
        """What runs often stores into it no more than a new state."""
        if cell not in self._settled:
            often = [f for f in self._naming(cell) if self._reach()[f] >= 0]
            self._settled[cell] = all(self._is_state(f, value) for f in often for value in self._stored(cell, f))
        return self._settled[cell]

    def _is_state(self, function: Function, value: Value) -> bool:
        """It was not found by way of what the thread has, as the next block of a list is."""
        base, convention = value.base, self.summaries.flow.convention
        if isinstance(base, Content):
            return isinstance(root(base), Object)
        if isinstance(base, Entry):
            return base.register in convention.arguments
        if not isinstance(base, Named):
            return base is None or isinstance(base, Object | Thread)
        body = self.summaries.flow.body(function)
        position = body.position(base.site)
        is_call = position is not None and any(isinstance(o, Call) for o in body.instructions[position].operations)
        return is_call and base.register in (convention.result, "nonzero")

    def _is_set(self, cell: _Cell, step: Step) -> bool:
        """The function, or what it calls there, stores into the variable, or so far into what it is given."""
        flow = self.summaries.flow
        called = [Function(int(flow.graph.target[e])) for e in flow.edges_at(step.function, step.site)]
        near = flow.graph.distances(called, CALLS)
        setters = [f for f in self._naming(cell) if f == step.function or 0 <= near[f] <= _SETS_UP]
        if any(self._stored(cell, f) for f in setters):
            return True
        if cell.place < TELLING:
            return False
        below = np.flatnonzero((near >= 0) & (near <= _SETS_UP)).tolist()
        return any(cell.place in self._places(Function(f)) for f in below)

    def _places(self, function: Function) -> frozenset[int]:
        """How far behind what it is given a function stores, as one does that gets the address of all variables."""
        if function not in self._far:
            operations = [o for i in self.summaries.flow.body(function).instructions for o in i.operations]
            cells = [o.cell for o in operations if isinstance(o, Atomic)]
            cells += [o.destination for o in operations if isinstance(o, Set) and isinstance(o.destination, Memory)]
            places = {c.displacement for c in cells if not c.thread and c.base != "pc"}
            if any(c.displacement == 0 for c in cells):
                places |= {o.value for o in operations if isinstance(o, Add)}
            self._far[function] = frozenset(places)
        return self._far[function]

    def _stored(self, cell: _Cell, function: Function) -> frozenset[Value]:
        """What a function stores into the variable."""
        known = self._setters.get((cell, function))
        if known is None:
            known = frozenset[Value]()
            if self._may_store(function, self._naming(cell)[function]):
                stores = self.summaries.run(function).own_stores.items()
                known = known.union(
                    *(v for at, v in stores if isinstance(at.base, Thread) and self._cell(at.base, at.offset) == cell)
                )
            self._setters[cell, function] = known
        return known

    def _naming(self, cell: _Cell) -> Mapping[Function, set[int]]:
        """The functions that refer to a word which tells where variables are, up to the cell's own, with how far the
        cell is behind these."""
        known = self._named.get(cell)
        if known is None:
            found: dict[Function, set[int]] = {}
            for slot, place in self.summaries.program.image(cell.number).thread_slots.items():
                if place <= cell.place:
                    for function in self._stores.naming(Value(Object(cell.number), slot)):
                        found.setdefault(function, set()).add(cell.place - place)
            known = self._named[cell] = dict(sorted(found.items()))
        return known

    def _may_store(self, function: Function, far: set[int]) -> bool:
        """Its code can store so far behind an address: what instructions add on the way counts once or twice. To follow
        all that refer to variables takes long."""
        operations = [o for i in self.summaries.flow.body(function).instructions for o in i.operations]
        cells = [o.cell for o in operations if isinstance(o, Atomic)]
        cells += [o.destination for o in operations if isinstance(o, Set) and isinstance(o.destination, Memory)]
        rest = {distance - cell.displacement for cell in cells for distance in far}
        added = {0, *(o.value for o in operations if isinstance(o, Add))}
        added |= {o.source.displacement for o in operations if isinstance(o, Address)}
        return any(each - one in added for each in rest for one in added)
