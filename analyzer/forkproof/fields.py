"""Functions that are put into fields of objects, and called from there: jobs of a pool, callbacks of a loop.

Owns: which fields threads and children call through, what is put into the same fields, and the edges between both.
Takes: a call graph with all other edges, the signatures. Gives: edges of the kinds `field` and `dynamic`.
Must never: be taken for evidence that this very object comes to the call: a field is known by the code's object and its
      offset, and by what is passed along. Findings by such edges are suspected.
Wrong where: objects of two types have functions in the same place; where a library keeps what another one calls.

Who calls `job->run(job->data)` names no function. What is looked for is the other end: a function that stores
its parameter at that offset of something (`submit`), and the functions that are passed to it; or code that stores a
function there itself. If the thread passes another field along, that field must be filled in the same place. Where the
thread adds an index to the address of data (`kinds[i].run(p)`), what the tables hold that its function refers to may be
called. A field may hold a table, too: then it is asked which are put there, and what stands in that place of them.
Calls of `std::function` objects are told apart (`functors`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forkproof.arguments import address_arguments, data_arguments, followed_arguments
from forkproof.callgraph import CALLS, CallGraph, EdgeColumns, EdgeKind, known_edges
from forkproof.code.decode import Body, decode
from forkproof.code.explore import explore
from forkproof.code.index import find_stores
from forkproof.code.operations import (
    Add,
    Address,
    Call,
    Const,
    Memory,
    Operand,
    Register,
    Set,
    Sum,
)
from forkproof.code.sites import Stores
from forkproof.code.state import State
from forkproof.code.stored import registers_stored, stores_of, unknown_calls
from forkproof.code.values import Base, Behind, Entry, Value, Word
from forkproof.columns import among, position_in, unique
from forkproof.elf.image import Machine
from forkproof.functors import Load, Part, functor_part, invokers, load_of
from forkproof.handed import Place, Search, is_fixed
from forkproof.program import Columns, Function
from forkproof.signatures import Signatures
from forkproof.tables import function_pointers, table_targets
from forkproof.virtuals import VirtualTables, virtual_slot

_PRIMITIVE: Final = ("pthread_create",)
"""What shows which object is the libc."""
_DEPTH: Final = 5
"""Calls between where a thread begins and the call through a field,"""
_DEPTH_OF_CHILDREN: Final = 2
"""and between the function that forks and such a call."""
_MOST_CALLERS: Final = 40
"""Functions that call through fields, the nearest to where it begins first; fewer where less deep is looked."""
_LARGEST: Final = 1 << 14
"""Bytes of such a function,"""
_SMALL: Final = 1 << 10
"""and of one that puts its parameter into a field."""
_TINY: Final = 64
"""Bytes of a function that may be no more than a tail call."""
_BLOCKS: Final = 4
"""Blocks, each with one before it, in which it is looked for where a call's target was loaded."""
_FRAMES: Final = frozenset({"rsp", "rbp", "sp", "x29"})
"""Registers by which local variables are found."""
_BEFORE: Final = 160
"""Bytes before a call in which an address that it passes is formed."""
_AFTER: Final = 64
"""Bytes after a function's address is formed in which it is stored."""
_WORD: Final = 8
_TABLE: Final = 1 << 10
"""Bytes of a table of functions: operations of a driver, of a kind of file."""
_FAR: Final = 1 << 12
"""Where an offset is no field's any more."""
_WRAPPER: Final = 256
"""Bytes of a function that may do no more than pass on what it is given,"""
_FEW: Final = 24
"""and calls of one that are followed where no instruction nearby tells what they pass."""
_WRAPPERS: Final = 3
"""Functions that pass on what another one puts into a field."""
_MANY: Final = 64
"""Functions that one field holds, or that may fill one with a table, beyond which it tells nothing."""
_ROUNDS: Final = 3
"""Calls of objects that lead to one another."""
_SEVERAL: Final = 8
"""Functions that are put into `std::function` objects, beyond which each is called one of several."""


class Field(NamedTuple):
    """What a call goes through."""

    object: int
    offset: int
    is_global: bool
    """A variable of that address, not a field behind a pointer."""
    data: int | None
    """The offset of what is passed along; None where that is the thing itself, or anything for a variable."""
    slot: int | None = None
    """Where the function is in the table to which the field points; None: the field holds the function itself."""


class _Kept(NamedTuple):
    """A function that puts a parameter into a field."""

    function: Function
    parameter: int
    field: Field


def field_edges(graph: CallGraph, signatures: Signatures) -> list[EdgeColumns]:
    """Edges from functions that threads or children run, and that call through fields, to what is put there."""
    return _Fields(graph, signatures).edges()


def _edges(found: Sequence[tuple[int, int, int]], kind: EdgeKind) -> list[EdgeColumns]:
    """Edges of (function, callee, site)."""
    if not found:
        return []
    source, target, site = (np.array(column, np.int64) for column in zip(*found, strict=True))
    return [known_edges(source, target, site, np.full(len(found), kind))]


class Origin(NamedTuple):
    """Where a value comes from: a load at a site, a register before it, or a constant for what is not followed."""

    site: int
    operand: Operand


class _Fields(Search):
    """One search of one program."""

    def __init__(self, graph: CallGraph, signatures: Signatures) -> None:
        super().__init__(graph, signatures)
        self.chosen: set[tuple[int, int, int]] = set()
        """(function, callee, site) of calls that choose from a table by an index."""
        self.called: list[tuple[Function, int]] = []
        """(function, site) of the calls of `std::function` objects,"""
        self.virtual: list[tuple[Function, int, int]] = []
        """and of virtual calls, with the place in the table."""
        self.looked: set[Function] = set()
        """Functions whose calls are known."""
        self.tables = VirtualTables(self.program)
        self._words: dict[int, Columns] = {}
        self._receive: dict[int | None, npt.NDArray[np.bool_]] = {}

    def edges(self) -> list[EdgeColumns]:
        """All edges: what objects are called for may call others."""
        base, found = self.program.base, list[EdgeColumns]()
        inside = [f for obj in self._libc for f in range(base[obj], base[obj + 1])]
        begin = np.setdiff1d(unique(self.graph.target[self.graph.kind == EdgeKind.THREAD]), inside)
        children = self._forking() if len(begin) else begin
        for _ in range(_ROUNDS):
            calls = [*self.calls(begin, inside, _DEPTH), *self.calls(children, inside, _DEPTH_OF_CHILDREN)]
            held = self.held({field for _, _, field in calls}) if calls else {}
            kept = {(int(f), to, site) for f, site, field in calls if len(held[field]) <= _MANY for to in held[field]}
            found += _edges(sorted(kept | self.chosen), EdgeKind.FIELD)
            dynamic = [*self._functors(), *self._virtual()]
            if not dynamic:
                break
            found += dynamic
            begin, children = unique(np.concatenate([target for _, target, _, _ in dynamic])), begin[:0]
            self.called, self.virtual, self.chosen = [], [], set()
        return found

    def _forking(self) -> Columns:
        """The functions that fork, and those that call them: what these call may be called in a child."""
        names = {forker.name for forker in self.signatures.forkers if forker.kind != "spawn"}
        forking = {caller for f in self.program.called(sorted(names)) for caller, _ in self._callers(f, self._libc)}
        above = {caller for f in forking for caller, _ in self._callers(f, self._libc)}
        return np.array(sorted(forking | above), np.int64)

    @cached_property
    def _libc(self) -> list[int]:
        return sorted({self.program.object_of(f) for f in self.program.called(_PRIMITIVE)} - {0})

    # ---- calls -----------------------------------------------------------------------------

    def calls(self, begin: Columns, inside: Collection[int], depth: int) -> list[tuple[Function, int, Field]]:
        """(function, site, field) of the calls through fields that these and what they call make, and that nothing has
        explained."""
        reach = self.graph.distances(begin, blocked=inside)
        may_call = self._calls_unknown | self._are_tiny | self._call_variables
        near = np.flatnonzero((reach >= 0) & (reach <= depth) & may_call)
        order = [Function(f) for f in near[np.lexsort((near, reach[near]))].tolist()]
        asked = (f for f in order if f not in self.looked and self._size(f) <= _LARGEST and self._may_jump(f))
        chosen = list(islice(asked, _MOST_CALLERS * depth // _DEPTH))
        self.looked.update(chosen)
        return [(f, site, field) for f in chosen for site, field in self._through_fields(f)]

    @cached_property
    def _are_tiny(self) -> npt.NDArray[np.bool_]:
        """Functions that may be no more than a tail call through a register, which the sites do not tell."""
        return np.concatenate([code.size for code in self.program.codes]) <= _TINY

    def _may_jump(self, function: Function) -> bool:
        """It has calls through what is not known, or what may be a jump through a register or memory."""
        if self._calls_unknown[function] or self._call_variables[function]:
            return True
        obj, rva = self.program.object_of(function), self.program.rva_of(function)
        raw = self.program.image(obj).read(rva, self._size(function))
        if self.program.image(obj).machine is Machine.AARCH64:
            words = np.frombuffer(raw[: len(raw) // 4 * 4].tobytes(), "<u4")
            return bool(np.any(words & 0xFFFFFC1F == 0xD61F0000))  # br
        return bool(np.any((raw[:-1] == 0xFF) & (raw[1:] >> 3 & 7 == 4)))  # jmp r/m64

    @cached_property
    def _call_variables(self) -> npt.NDArray[np.bool_]:
        """Functions with calls through words at known addresses that the program may change."""
        found = []
        for obj, code in enumerate(self.program.codes):
            image, slots = self.program.image(obj), code.sites.slot_address
            changing = [a for a in unique(slots).tolist() if a not in image.slot_symbols and not is_fixed(image, a)]
            owner = code.slot_owner[np.isin(slots, changing)]
            found.append(np.bincount(owner[owner >= 0], minlength=len(code.start)) > 0)
        return np.concatenate(found)

    def _through_fields(self, function: Function) -> Iterator[tuple[int, Field]]:
        obj, rva = self.program.object_of(function), self.program.rva_of(function)
        explained = {site for _, _, site, _ in self.graph.rows_from(function)}
        body = decode(self.program.image(obj), [(rva, self._size(function))])
        found: dict[int, tuple[Origin, Origin]] = {}
        loads: dict[int, Load] = {}
        kept: dict[int, str] = {}
        for position, through in unknown_calls(body):
            site = body.instructions[position].address
            if site in explained:
                continue
            target = self._origin(body, position, through)
            if isinstance(target.operand, Memory):
                found[site] = target, self._origin(body, position, Register(self.convention.arguments[0]))
            elif isinstance(through, Register):  # loaded before ways parted and met
                kept[site] = through.name
            if (load := load_of(body, position, through)) is not None:
                loads[site] = load
        steps = {site: self._step(body, target) for site, (target, _) in found.items()}
        watch = {origin.site for pair in found.values() for origin in pair} | {s for s, _ in steps.values()}
        watch |= {*kept, *loads, *(body.instructions[load.position].address for load in loads.values())}
        machine = self.program.image(obj).machine
        states = explore(body, machine, rva, watch=watch, within=body.leading_to(watch), fields=True).states
        parts = {site: functor_part(body, site, load, machine, states) for site, load in loads.items()}
        self.called += [(function, site) for site, part in parts.items() if part is Part.INVOKER]
        others = {site: load for site, load in loads.items() if parts[site] is None and load.cell.base != "pc"}
        slots = {site: virtual_slot(body, site, load, machine, states) for site, load in others.items()}
        self.virtual += [(function, site, slot) for site, slot in slots.items() if slot is not None]
        for site, name in kept.items():
            value = states[site].register(name) if site in states else None
            if value is not None and isinstance(value.base, Word) and value.offset == 0:
                yield site, Field(obj, value.base.address, True, None)
        for site, (target, data) in found.items():
            if parts.get(site) is not None:
                continue
            step, added = steps[site]
            if step in states and any(self._is_table(obj, states[step].register(part)) for part in added):
                held = table_targets(self.program, function)
                self.chosen |= {(int(function), int(f), site) for f in held if len(held) <= _MANY}
            place = self._place(body, target, states)
            if place is not None and (field := self._table_field(obj, *place, states.get(site))) is not None:
                yield site, field
            if place is not None and place[0] is None:
                yield site, Field(obj, place[1], True, None)
            elif place is not None and 0 <= place[1] < _FAR:
                passed = self._place(body, data, states)
                if passed is not None and passed[0] == place[0] and passed[1] != place[1]:
                    yield site, Field(obj, place[1], False, passed[1])
                elif self._is_itself(body, target, data):
                    yield site, Field(obj, place[1], False, None)

    def _table_field(self, obj: int, table: Base | str, slot: int, state: State | None) -> Field | None:
        """The field that holds a table of functions: a variable's, or one of an object that is passed along."""
        if state is None or not 0 <= slot < _TABLE or slot % _WORD:
            return None
        if isinstance(table, Word):
            return Field(obj, table.address, True, None, slot)
        if not isinstance(table, Behind) or not 0 <= table.offset < _FAR:
            return None
        passed = [state.register(name) for name in self.convention.arguments]
        objects = [p.offset for p in passed if p is not None and p.base == table.base and p.offset <= table.offset]
        is_virtual = table.offset in objects and self.tables.has_classes(obj)
        return Field(obj, table.offset, False, None, slot) if objects and not is_virtual else None

    def _place(self, body: Body, origin: Origin, states: Mapping[int, State]) -> tuple[Base | str, int] | None:
        """The cell that a value is loaded from."""
        end = body.instructions[body.index[origin.site]].end
        is_known = origin.site in states and isinstance(origin.operand, Memory)
        return self._cell(origin.operand, states[origin.site], end) if is_known else None  # type: ignore[arg-type]

    def _step(self, body: Body, target: Origin) -> tuple[int, list[str]]:
        """Where an index is added to the address of a table, to load a call's target, and the registers added."""
        assert isinstance(target.operand, Memory)
        if target.operand.indexed:
            return target.site, [r for r in (target.operand.base, target.operand.by) if r is not None]
        position, wanted = body.index[target.site], target.operand.base
        first = body.block_start(position)
        for instruction in reversed(body.instructions[first:position]):
            for o in instruction.operations:
                place = getattr(o, "destination", None)
                if place != Register(wanted or "") or isinstance(o, Add):
                    continue
                if isinstance(o, Sum):
                    return instruction.address, [r.name for r in (o.left, o.right) if isinstance(r, Register)]
                if isinstance(o, Address) and o.source.indexed:
                    return instruction.address, [r for r in (o.source.base, o.source.by) if r is not None]
                return target.site, []
        return target.site, []

    def _is_table(self, obj: int, value: Value | None) -> bool:
        """The address of data that the loader fills: what an index is added to."""
        image = self.program.image(obj)
        return (
            value is not None
            and value.base is None
            and any(s.rva <= value.offset < s.rva + s.memory_size and not s.executable for s in image.segments)
        )

    def _is_itself(self, body: Body, target: Origin, data: Origin) -> bool:
        """What is passed along is the pointer through which the target was loaded."""
        base = getattr(target.operand, "base", None)
        if base is None or data.operand == Register(base):
            return base is not None
        return self._origin(body, body.index[target.site], Register(base)).operand == data.operand

    def _origin(self, body: Body, position: int, wanted: Operand) -> Origin:
        """Where a value comes from that an instruction uses: the load that gave it, or the register that had it."""
        if isinstance(wanted, Memory) and wanted.base not in _FRAMES:
            return Origin(body.instructions[position].address, wanted)
        first, found = body.block_start(position), None
        for _ in range(_BLOCKS):
            for here in range(position - 1, first - 1, -1):
                site = body.instructions[here].address
                for o in reversed(body.instructions[here].operations):
                    is_lost = isinstance(o, Call) and getattr(wanted, "name", None) in self.convention.destroyed
                    if is_lost:
                        return found or Origin(site, Const(0))
                    if getattr(o, "destination", None) != wanted:
                        continue
                    if not isinstance(o, Set) or o.bits < 64 or isinstance(o.source, Const):
                        return found or Origin(site, Const(0))
                    if isinstance(o.source, Memory):
                        found = Origin(site, o.source)
                        if o.source.base not in _FRAMES:
                            return found
                    wanted = o.source  # a local variable, if it is stored before
            before = body.predecessors.get(first, ())
            if len(before) != 1:
                break
            first = before[0]
            position = body.block_end(first)
        return found or Origin(body.instructions[first].address, wanted)

    def _cell(self, memory: Memory, state: State, end: int) -> tuple[Base | str, int] | None:
        """The thing that a cell is in, and where; None for data, a register's name where no more is known of it."""
        if memory.base == "pc":
            return None, end + memory.displacement
        if memory.base is None:  # an array of an executable with a fixed base
            return (None, memory.displacement) if memory.indexed else None
        value = state.register(memory.base)
        if memory.indexed:
            return None if value is None or value.base is not None else (None, value.offset + memory.displacement)
        if value is None:
            return memory.base, memory.displacement
        is_local = value.base == Entry(self.convention.stack)
        return None if is_local else (value.base, value.offset + memory.displacement)

    def _functors(self) -> list[EdgeColumns]:
        """Edges from the calls of `std::function` objects to what the program puts into such."""
        if not self.called or len(self._invokers) > _MANY:
            return []
        found = [(int(f), int(target), site) for f, site in self.called for target in self._invokers]
        return _edges(found, EdgeKind.FIELD if len(self._invokers) <= _SEVERAL else EdgeKind.DYNAMIC)

    @cached_property
    def _invokers(self) -> list[Function]:
        others = sorted(set(range(len(self.program.codes))) - set(self._libc))
        return sorted(frozenset[Function]().union(*(invokers(self.program, obj) for obj in others)))

    def _virtual(self) -> list[EdgeColumns]:
        """Edges from virtual calls to what stands in the virtual tables of the object's classes."""
        held = {(f, site): self.tables.held(self.program.object_of(f), slot) for f, site, slot in self.virtual}
        found = [
            (int(f), int(to), site)
            for (f, site), functions in held.items()
            if len(functions) <= _MANY
            for to in sorted(functions)
        ]
        return _edges(found, EdgeKind.DYNAMIC)

    # ---- what fields hold ------------------------------------------------------------------

    def held(self, fields: Collection[Field]) -> dict[Field, set[int]]:
        """The functions that are put into these fields; of those that hold more than `_MANY`, not all."""
        found: dict[Field, set[int]] = {field: set() for field in fields}
        for obj, slot in dict.fromkeys((field.object, field.slot) for field in sorted(fields, key=repr)):
            mine = [field for field in fields if (field.object, field.slot) == (obj, slot)]
            for field in mine:
                found[field].update(self._at_first(field))
            self._stored(obj, {field: found[field] for field in mine}, slot)
            passed: dict[tuple[Function, int], set[int]] = {}
            for function, filled in self._receivers(obj, [f for f in mine if len(found[f]) <= _MANY], slot):
                few = [field for field in filled if len(found[field]) <= _MANY]
                for kept in self._keeps(function, few) if few else ():
                    key = kept.function, kept.parameter
                    if key not in passed:
                        passed[key] = {f for place in self._passed_to(kept) for f in self._functions_at(place, slot)}
                    found[kept.field] |= passed[key]
        return found

    def _at_first(self, field: Field) -> Iterator[int]:
        """What a variable holds when the program begins."""
        target = self.program.image(field.object).pointer_at(field.offset) if field.is_global else None
        if target is not None:
            yield from self._functions_at(Place(field.object, target), field.slot)

    def _functions_at(self, place: Place, slot: int | None) -> Iterator[int]:
        """The function at an address that is put into a field, or that of the table there."""
        held = place if slot is None else self._fixed(Place(place.object, place.address + slot))
        function = None if held is None else self._function(held)
        if function is not None:
            yield int(function)

    def _formed(self, obj: int, slot: int | None) -> tuple[Columns, Columns]:
        """(site, address) where an object's code forms addresses of functions, or of tables with one there, by site."""
        sites = self.program.codes[obj].sites
        site, target = sites.taken_site, sites.taken_target
        if slot is not None:
            held = np.flatnonzero(position_in(self._function_words(obj), sites.data_target + slot) >= 0)
            site, target = sites.data_site[held], sites.data_target[held]
        order = np.argsort(site, kind="stable")
        return site[order], target[order]

    def _function_words(self, obj: int) -> Columns:
        """Where an object's data holds addresses of functions."""
        if obj not in self._words:
            self._words[obj] = function_pointers(self.program, obj)[0]
        return self._words[obj]

    def _stored(self, obj: int, held: Mapping[Field, set[int]], slot: int | None) -> None:
        """Add functions whose addresses an object's code stores there, or those of their tables, in the instructions
        after it has formed them."""
        image = self.program.image(obj)
        site, taken = self._formed(obj, slot)
        end = site + _AFTER
        stores = self._stores(obj, held, site, np.minimum(end, np.append(site[1:], end[-1:])))
        for is_global, offset in sorted({(field.is_global, field.offset) for field in held}):
            mine = [field for field in held if (field.is_global, field.offset) == (is_global, offset)]
            found = set[int]()
            chosen = stores.between(site, end, offset, is_global)
            for at, target in zip(site[chosen].tolist(), taken[chosen].tolist(), strict=True):
                if len(found) <= _MANY and any(True for _ in self._functions_at(Place(obj, target), slot)):
                    for cell, after in stores_of(decode(image, [(at, _AFTER)], vectors=True), target):
                        is_variable = cell.base == "pc"
                        place = is_variable, cell.displacement + (after if is_variable else 0)
                        if place == (is_global, offset) and cell.base not in (None, self.convention.stack):
                            found.add(target)
            for field in mine:
                held[field].update(f for target in found for f in self._functions_at(Place(obj, target), slot))

    def _receivers(self, obj: int, fields: Collection[Field], slot: int | None) -> list[tuple[Function, list[Field]]]:
        """Functions that may be passed the address of a function, with those fields of an object that they may fill."""
        base, code = self.program.base, self.program.codes[obj]
        mine = np.flatnonzero(self._receiving(slot)[base[obj] : base[obj + 1]] & (code.size <= _SMALL))
        first, last = code.start[mine], code.start[mine] + code.size[mine]
        stores = self._stores(obj, fields, first, last)
        found: dict[Function, list[Field]] = {}
        for field in fields:
            fills = stores.between(first, last, field.offset, field.is_global)
            if slot is not None and np.count_nonzero(fills) > _MANY:
                continue
            if field.data is not None:
                fills &= stores.between(first, last, field.data, False)
            for function in (mine[fills] + base[obj]).tolist():
                found.setdefault(Function(function), []).append(field)
        # Those with the most callers first: where a field holds too much, that is soon known.
        return sorted(found.items(), key=lambda item: (-len(self.graph.rows_to(item[0])), item[0]))

    def _stores(self, obj: int, fields: Collection[Field], first: Columns, last: Columns) -> Stores:
        """What may store to the fields or to what is passed along, in ranges of an object's code."""
        image = self.program.image(obj)
        addresses = unique(np.array([f.offset for f in fields if f.is_global], np.int64))
        local = [p for f in fields if not f.is_global for p in (f.offset, f.data) if p is not None]
        return find_stores(image, first, last, unique(np.array(local, np.int64)), addresses)

    def _receiving(self, slot: int | None) -> npt.NDArray[np.bool_]:
        """Functions that are called where such an address has just been formed, or by small ones that are."""
        if slot in self._receive:
            return self._receive[slot]
        graph, program = self.graph, self.program
        found = self._receive[slot] = np.zeros(graph.size, bool)
        for obj in range(len(program.codes)):
            taken, _ = self._formed(obj, slot)
            if len(taken):
                first, last = np.searchsorted(graph.source, program.base[obj : obj + 2])
                site = graph.site[first:last]
                before = taken.searchsorted(site) - 1
                near = (before >= 0) & (site - taken[before] <= _BEFORE) & among(graph.kind[first:last], CALLS)
                found[graph.target[first:last][near]] = True
        is_wrapper = np.concatenate([code.size for code in program.codes]) <= _WRAPPER
        for _ in range(_WRAPPERS):
            edges = graph.rows_of(np.flatnonzero(found & is_wrapper))
            found[graph.target[edges[among(graph.kind[edges], CALLS)]]] = True
        return found

    def _keeps(self, function: Function, fields: Collection[Field]) -> Iterator[_Kept]:
        program, arguments = self.program, self.convention.arguments
        obj, rva = program.object_of(function), program.rva_of(function)
        body = decode(program.image(obj), [(rva, self._size(function))], vectors=True)
        stores = registers_stored(body)
        offsets = {memory.displacement for places in stores.values() for memory, _ in places}
        words = {body.instructions[body.index[s]].end + m.displacement for s in stores for m, _ in stores[s]}
        if program.image(obj).machine is Machine.X86_64:  # a variable is named by what stores to it
            fields = [f for f in fields if not f.is_global or f.offset in words]
        fields = [f for f in fields if f.is_global or (f.offset in offsets and (f.data is None or f.data in offsets))]
        if not fields:
            return
        states = explore(body, program.image(obj).machine, rva, watch=stores, fields=True).states
        filled: dict[Base | str, dict[int, Value | None]] = {}
        for site, places in sorted(stores.items()):
            for memory, source in places if site in states else ():
                cell = self._cell(memory, states[site], body.instructions[body.index[site]].end)
                if cell is not None:
                    filled.setdefault(cell[0], {})[cell[1]] = states[site].register(source.name)
        for field in fields:
            for base, cells in filled.items():
                if field.is_global == (base is None) and (field.data is None or field.data in cells):
                    value = cells.get(field.offset)
                    if value is not None and isinstance(value.base, Entry) and self._is_given(value):
                        yield _Kept(function, arguments.index(value.base.register), field)

    def _passed_to(self, kept: _Kept) -> set[Place]:
        """The functions, or tables, that are passed to one that keeps them, by way of others that pass them on."""
        found, pending = set[Place](), [(kept.function, kept.parameter, 0)]
        seen = {(kept.function, kept.parameter)}
        while pending:
            function, parameter, depth = pending.pop()
            calls = self._callers(function, ())
            for obj in sorted({self.program.object_of(caller) for caller, _ in calls}):
                mine = [(caller, site) for caller, site in calls if self.program.object_of(caller) == obj]
                sites = np.array([site for _, site in mine], np.int64)
                passed = self._passed_at(obj, sites, parameter, is_table=kept.field.slot is not None)
                found.update(place for place in passed if place is not None)
                for (caller, site), place in zip(mine, passed, strict=True):
                    is_known = place is not None or depth >= _WRAPPERS
                    if not is_known and self._size(caller) <= _WRAPPER and self._receiving(kept.field.slot)[caller]:
                        new = [(caller, p) for p in self._passes_on(caller, site, parameter)]
                        pending += [(*pair, depth + 1) for pair in new if pair not in seen]
                        seen.update(new)
        return found

    def _passed_at(self, obj: int, sites: Columns, parameter: int, *, is_table: bool) -> list[Place | None]:
        """The address of a function, or of a table, that each of these calls passes."""
        program = self.program
        if is_table:
            tables = data_arguments(program, obj, sites, parameter)
            found = (tables.get(site) for site in sites.tolist())
            places = (None if f is None else (Place(obj, f[0]), f[1]) for f in found)
            return [None if p is None else self._fixed(p[0]) if p[1] else p[0] for p in places]
        passed = address_arguments(program, obj, sites, parameter)
        if len(sites) <= _FEW and np.all(passed < 0):
            passed = followed_arguments(program, obj, sites, parameter, passed)
        functions = (Function(f) for f in passed.tolist())
        return [Place(program.object_of(f), program.rva_of(f)) if f >= 0 else None for f in functions]

    def _passes_on(self, caller: Function, site: int, parameter: int) -> Iterator[int]:
        """Which of its own parameters a function passes along."""
        for call in self._look(caller, lambda at, _: at == site):
            value = call.state.register(self.convention.arguments[parameter])
            if value is not None and isinstance(value.base, Entry) and self._is_given(value):
                yield self.convention.arguments.index(value.base.register)
