"""Functions that are handed over: to wrappers of what starts threads, in closures, in objects with tables.

Owns: what a function does with what it is given ("calls the third word of the table that its second argument is",
      "starts a thread in a field of its first"), and the edges from those who give.
Takes: a call graph with the edges that sites show, the signatures. Gives: more edges, of the kinds `callback` and
      `thread`.
Must never: name a function that the values on the way to the call do not name; follow what nobody asks about: it begins
      at main and at the starts of threads, and goes from there to callers and to what is called with known values.
Wrong where: a callee that is not followed changes the field between (cells are kept across calls).

Values are those of `explore`, with fields. What a function does is told in terms of its own parameters; at each call of
it they are replaced by what the caller passes, and whatever then begins at the caller's own parameters is what the
caller does in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import (
    CALLS,
    WHEN_KINDS,
    CallGraph,
    EdgeColumns,
    EdgeKind,
    Given,
    Start,
    callback_roles,
    known_edges,
)
from forkproof.code.conventions import CONVENTIONS
from forkproof.code.decode import Body, decode
from forkproof.code.explore import explore
from forkproof.code.members import virtual_ways, without_addends
from forkproof.code.operations import Call, Jump, JumpUnknown, Memory, Operand, Register
from forkproof.code.state import State
from forkproof.code.values import Behind, Cell, Entry, Value, Word
from forkproof.elf.image import Image
from forkproof.functors import Part, is_manager
from forkproof.program import Function
from forkproof.signature_values import Callback, ThreadStarter
from forkproof.signatures import Signatures

_DEEPEST: Final = 5
"""Functions that pass something on to one another."""
_LEVELS: Final = 1
"""Calls between a function and the call of what it is given,"""
_LEVELS_OF_MAIN: Final = 2
"""and between main and the call of what it hands over."""
_TABLE_WORDS: Final = 8
"""Words of a table, or of a closure, in which functions are looked for."""
_LARGEST: Final = 1 << 14
"""Bytes of a function in which one call is looked at,"""
_TINY: Final = 96
"""and of one that hardly does more than pass something on;"""
_SMALL: Final = 1 << 11
"""and of one that is followed for all that it calls: a trampoline, a runtime's start."""
_MOST_CALLS: Final = 400
"""Calls of a function that is followed for what it calls."""
_MOST_ROLES: Final = 8
"""Things that one function does with what it is given."""
_MOST_CALLERS: Final = 500
_ONCE: Final = "pthread_once"
"""What runs `std::call_once`, when it is given"""
_ONCE_PROXY: Final = "__once_proxy"
"""this: what it shall call lies in variables of the thread."""
_PRIMITIVE: Final = ("pthread_create",)
"""What all others that start threads call in the end: it shows which object is the libc."""


class Place(NamedTuple):
    """An address of an object."""

    object: int
    address: int


Known = Place | Value
"""A value in the words of one function; addresses say whose."""


@dataclass(frozen=True, slots=True)
class Role:
    """A function calls something that it is given, or starts a thread with it."""

    kind: EdgeKind
    target: Value
    """In terms of the function's parameters."""
    arguments: tuple[Known | None, ...]
    """What the target is called with."""


class _Call(NamedTuple):
    """A call or tail call in a function, with what is known there."""

    site: int
    target: Operand | int | None
    state: State


def handed_edges(graph: CallGraph, signatures: Signatures) -> tuple[list[EdgeColumns], Mapping[Start, Given]]:
    """All edges that can be found so, and what the threads among them are given."""
    search = Search(graph, signatures)
    search.follow_starts()
    search.follow_main()
    known = {
        (int(graph.source[e]), int(graph.target[e]), int(graph.site[e]), int(graph.kind[e]))
        for source in {edge[0] for edge in search.found}
        for e in graph.edges_from(Function(source))
    }
    new = sorted(search.found - known)
    if not new:
        return [], {}
    source, target, site, kind = (np.array(column, np.int64) for column in zip(*new, strict=True))
    return [known_edges(source, target, site, kind)], search.passed


class Search:
    """One search of one program."""

    def __init__(self, graph: CallGraph, signatures: Signatures) -> None:
        self.graph, self.program, self.signatures = graph, graph.program, signatures
        self.convention = CONVENTIONS[self.program.image(0).machine]
        self.found: set[tuple[int, int, int, int]] = set()
        self.passed: dict[Start, Given] = {}
        self._calls: dict[tuple[Function, int], tuple[_Call, ...]] = {}
        self._does: dict[tuple[Function, int], tuple[Role, ...]] = {}

    # ---- where it begins -------------------------------------------------------------------

    def follow_starts(self) -> None:
        """From what starts threads, by signature, to its callers, and to those who call these."""
        roles = self._named_roles()
        pending = [(f, role, 0) for f in sorted(roles) for role in roles[f]]
        seen = {(f, role) for f, role, _ in pending}
        counts: dict[Function, int] = {}
        own = {self.program.object_of(f) for f in self.program.called(_PRIMITIVE)} - {0}
        while pending:
            function, role, depth = pending.pop(0)
            for caller, site in self._callers(function, own):
                for new in self._applied(caller, site, role):
                    if (caller, new) not in seen and depth < _DEEPEST and counts.get(caller, 0) < _MOST_ROLES:
                        seen.add((caller, new))
                        counts[caller] = counts.get(caller, 0) + 1
                        pending.append((caller, new, depth + 1))

    def follow_main(self) -> None:
        """From main to what it hands over: a runtime that calls the program's own main in a closure."""
        start = self.program.function(0, self.program.image(0).entry)
        edges = [] if start is None else self.graph.edges_from(start)
        for edge in [e for e in edges if self.graph.kind[e] == EdgeKind.CALLBACK]:
            self._what_is_done(Function(int(self.graph.target[edge])), _LEVELS_OF_MAIN)

    def _named_roles(self) -> dict[Function, list[Role]]:
        """What functions with names do, as signatures tell."""
        arguments = self.convention.arguments
        starters = self.signatures.thread_starters
        kinds = callback_roles(self.signatures)
        names = {n: [i for i, kind in roles if kind is EdgeKind.THREAD] for n, roles in kinds.items()}
        found: dict[Function, list[Role]] = {}
        for function, name in self.program.called([n for n, places in names.items() if places]).items():
            data = starters[name].data if name in starters else None
            given = () if data is None else (_entry(arguments[data]),)
            found[function] = [Role(EdgeKind.THREAD, _entry(arguments[i]), given) for i in names[name]]
        held = {n: s for n, s in starters.items() if s.structure is not None and s.function is not None}
        for function, name in self.program.called(held).items():
            found[function] = [_in_structure(held[name], arguments)]
        called = {n: c for n, c in self.signatures.callbacks.items() if c.word is not None}
        for function, name in self.program.called(called).items():
            found[function] = list(_called_from_structure(called[name], arguments))
        return found

    def _callers(self, function: Function, without: Collection[int]) -> list[tuple[Function, int]]:
        """Calls of a function, (caller, site); a libc starts threads of its own for what its callers ask by name."""
        graph = self.graph
        edges = [e for e in graph.edges_to(function) if int(graph.kind[e]) in CALLS]
        calls = sorted({(Function(int(graph.source[e])), int(graph.site[e])) for e in edges})
        return [call for call in calls if self.program.object_of(call[0]) not in without][:_MOST_CALLERS]

    # ---- what is done with what is given ---------------------------------------------------

    def _applied(self, caller: Function, site: int, role: Role) -> Iterator[Role]:
        """A function calls another, which does something with what it is given: edges, and what the caller does."""
        known = self._named_at(caller, site, role.kind)
        if known and not any(self._what_is_done(f, _LEVELS) for f in known if self._may_call(f, _LEVELS)):
            return  # nothing more can come of it: most threads begin in a function that is named where they start
        for call in self._look(caller, lambda at, _: at == site) if self._size(caller) <= _LARGEST else ():
            given = self._arguments(caller, call.state)
            yield from self._resolved(caller, call, role, given, _DEEPEST)

    def _named_at(self, caller: Function, site: int, kind: EdgeKind) -> list[Function]:
        rows = self.graph.rows_from(caller)
        return [Function(target) for _, target, place, found in rows if place == site and found == kind]

    def _resolved(
        self, caller: Function, call: _Call, role: Role, given: Sequence[Known | None], depth: int
    ) -> Iterator[Role]:
        """The same in terms of the caller: an edge where a function is named, a role where it is a parameter's."""
        target = self._replaced(role.target, given, caller, call.state)
        arguments = tuple(self._put(argument, given, caller, call.state) for argument in role.arguments)
        if isinstance(target, Value):
            if self._is_given(target):
                yield Role(role.kind, target, tuple(a if self._is_of_caller(a) else None for a in arguments))
            return
        function = None if target is None else self._function(target)
        if function is None:
            return
        self.found.add((int(caller), int(function), call.site, int(role.kind)))
        if role.kind is EdgeKind.THREAD and arguments and arguments[0] is not None:
            first, obj = arguments[0], self.program.object_of(caller)
            told = (first.object, Value(None, first.address)) if isinstance(first, Place) else (obj, first)
            self.passed.setdefault(Start(int(caller), call.site, int(function)), told)
        if depth and self._may_call(function, _LEVELS) and self._hands_over(arguments, call.state):
            for inner in self._what_is_done(function, _LEVELS):
                kind = role.kind if role.kind is EdgeKind.THREAD else inner.kind
                yield from self._resolved(caller, call, Role(kind, inner.target, inner.arguments), arguments, depth - 1)

    def _what_is_done(self, function: Function, levels: int) -> tuple[Role, ...]:
        """What a function calls that it is given, itself or by way of what it calls, so many levels down."""
        known = self._does.get((function, levels))
        if known is None:
            self._does[function, levels] = ()  # what calls itself adds nothing
            roles = dict.fromkeys(self._roles_by_code(function, levels))
            known = self._does[function, levels] = tuple(roles)[:_MOST_ROLES]
        return known

    def _roles_by_code(self, function: Function, levels: int) -> Iterator[Role]:
        for call in self._calls_of(function, levels):
            given = self._arguments(function, call.state)
            target = self._target(function, call)
            if isinstance(target, Place) and self._function(target) in self._once:
                yield from self._done_once(function, call, given)
            if isinstance(target, Value) and self._is_given(target):
                yield Role(EdgeKind.CALLBACK, target, tuple(a if self._is_of_caller(a) else None for a in given))
            callee = self._function(target) if isinstance(target, Place) else None
            if callee is not None and self._may_call(callee, levels - 1) and self._hands_over(given, call.state):
                for role in self._what_is_done(callee, levels - 1):
                    yield from self._resolved(function, call, role, given, _DEEPEST)

    def _done_once(self, function: Function, call: _Call, given: Sequence[Known | None]) -> Iterator[Role]:
        """What `std::call_once` calls at last: the `std::function` objects that the caller has made for it.

        So a future gets its result: from a function that is called with the caller's object.
        """
        stack = Entry(self.convention.stack)
        if not isinstance(given[1], Place) or self._function(given[1]) not in self._once_proxies:
            return
        for base, offset in sorted(place for place in call.state.cells if place[0] == stack):
            manager = self._content(Value(base, offset), function, call.state)
            invoker = self._content(Value(base, offset + 8), function, call.state)
            if isinstance(manager, Place) and isinstance(invoker, Place) and self._is_manager(manager):
                # The first argument may say where a large result goes: then the object is the second.
                called, functor = (_entry(name) for name in self.convention.arguments[:2])
                role = Role(EdgeKind.CALLBACK, called, (functor, functor))
                objects = Value(base, offset - Part.MANAGER.value)
                yield from self._resolved(function, call, role, [invoker, objects], _DEEPEST)

    def _is_manager(self, place: Place) -> bool:
        function = self._function(place)
        return function is not None and is_manager(
            self.program.image(self.program.object_of(function)), self.program.rva_of(function), self._size(function)
        )

    @cached_property
    def _once(self) -> frozenset[Function]:
        return frozenset(self.program.called([_ONCE]) if self._once_proxies else ())

    @cached_property
    def _once_proxies(self) -> frozenset[Function]:
        return frozenset(self.program.called([_ONCE_PROXY]))

    def _may_call(self, function: Function, levels: int) -> bool:
        """Calls through registers or memory stand in the function, or so many levels below it.

        A jump through a register is a tail call or a switch, which the sites do not tell: tiny functions are asked.
        """
        if levels < 0:
            return False
        if self._calls_unknown[function] or self._size(function) <= _TINY:
            return True
        below = [e for e in self.graph.edges_from(function) if int(self.graph.kind[e]) in CALLS] if levels else []
        return any(self._calls_unknown[self.graph.target[e]] for e in below)

    @cached_property
    def _calls_unknown(self) -> npt.NDArray[np.bool_]:
        return np.concatenate([code.unknown_calls for code in self.program.codes]) > 0

    def _hands_over(self, given: Sequence[Known | None], state: State) -> bool:
        """Something that can be called, or hold what can, is among the arguments."""
        return any(v is not None and (self._can_be_called(v) or self._holds_function(v, state)) for v in given)

    def _can_be_called(self, value: Known) -> bool:
        if isinstance(value, Value):
            return self._begins_at_parameter(value)
        return self._function(value) is not None or any(
            self._function(held) is not None
            for word in range(_TABLE_WORDS)
            if (held := self._fixed(Place(value.object, value.address + 8 * word))) is not None
        )

    def _holds_function(self, value: Known, state: State) -> bool:
        return isinstance(value, Value) and any(
            (value.base, value.offset + 8 * word) in state.cells for word in range(_TABLE_WORDS)
        )

    def _is_small(self, function: Function) -> bool:
        return self._size(function) <= _SMALL and len(self.graph.edges_from(function)) <= _MOST_CALLS

    # ---- values ----------------------------------------------------------------------------

    def _arguments(self, function: Function, state: State) -> tuple[Known | None, ...]:
        return tuple(self._known(function, state.register(name)) for name in self.convention.arguments)

    def _known(self, function: Function, value: Value | None) -> Known | None:
        """A value of `explore`, with the object that its addresses are of."""
        if value is None:
            return None
        obj = self.program.object_of(function)
        if value.base is None:
            return Place(obj, value.offset)
        if isinstance(value.base, Word):
            held = self._fixed(Place(obj, value.base.address))
            return value if held is None else Place(held.object, held.address + value.offset)
        return value

    def _put(self, value: Known | None, given: Sequence[Known | None], caller: Function, state: State) -> Known | None:
        return value if value is None or isinstance(value, Place) else self._replaced(value, given, caller, state)

    def _replaced(self, value: Value, given: Sequence[Known | None], caller: Function, state: State) -> Known | None:
        """A value in terms of a callee's parameters, in those of its caller."""
        begin: Known | None
        if isinstance(value.base, Entry):
            arguments = self.convention.arguments
            place = arguments.index(value.base.register) if value.base.register in arguments else len(given)
            begin = given[place] if place < len(given) else None
        elif isinstance(value.base, Behind):
            pointer = self._replaced(Value(value.base.base, value.base.offset), given, caller, state)
            begin = None if pointer is None else self._content(pointer, caller, state)
        else:
            begin = None
        return None if begin is None else _moved(begin, value.offset)

    def _content(self, pointer: Known, caller: Function, state: State) -> Known | None:
        """What a cell holds."""
        cell: Cell | None = None
        if isinstance(pointer, Value):
            cell = pointer.base, pointer.offset
        elif pointer.object == self.program.object_of(caller):
            cell = None, pointer.address
        if cell is not None and cell in state.cells:
            held = state.cells[cell]
            return None if held is None or held.bits < 64 else self._known(caller, held.value)
        if isinstance(pointer, Place):
            return self._fixed(pointer)
        return Value(Behind(pointer.base, pointer.offset), 0) if self._begins_at_parameter(pointer) else None

    def _fixed(self, place: Place) -> Place | None:
        """What the loader puts into a word that nothing changes afterwards."""
        image = self.program.image(place.object)
        if not is_fixed(image, place.address):
            return None
        symbol = image.slot_symbols.get(place.address)
        if symbol is not None:
            binding = self.program.bindings.resolve(place.object, symbol)
            return None if binding is None else Place(binding.object, binding.rva)
        target = image.pointer_at(place.address)
        return None if target is None else Place(place.object, target)

    def _function(self, place: Place) -> Function | None:
        found = self.program.function(place.object, place.address)
        return found if found is not None else self.program.stub_target(place.object, place.address)

    def _is_given(self, value: Value) -> bool:
        """It begins at a parameter, through loads or not."""
        return value.offset == 0 and self._begins_at_parameter(value)

    def _begins_at_parameter(self, value: Value) -> bool:
        base = value.base
        while isinstance(base, Behind):
            base = base.base
        return isinstance(base, Entry) and base.register in self.convention.arguments

    def _is_of_caller(self, value: Known | None) -> bool:
        return isinstance(value, Place) or (value is not None and self._begins_at_parameter(value))

    # ---- code ------------------------------------------------------------------------------

    def _calls_of(self, function: Function, levels: int) -> tuple[_Call, ...]:
        """The calls of a function that can call what it is given, themselves or so many levels down, in order, with
        what is known before each."""
        known = self._calls.get((function, levels))
        if known is None:
            obj = self.program.object_of(function)

            def matters(to: Operand | int | None) -> bool:
                callee = self._function(Place(obj, to)) if isinstance(to, int) else None
                known = callee is not None and (callee in self._once or self._may_call(callee, levels - 1))
                return known or not isinstance(to, int)

            found = self._look(function, lambda _, to: matters(to)) if self._is_small(function) else ()
            known = self._calls[function, levels] = tuple(found)
        return known

    def _look(self, function: Function, matters: Callable[[int, Operand | int | None], bool]) -> Iterator[_Call]:
        """The calls that matter, of which the sites and the targets are told."""
        program = self.program
        obj, rva = program.object_of(function), program.rva_of(function)
        body = decode(program.image(obj), [(rva, self._size(function))], vectors=True)
        targets = {site: to for site, to in _transfers(body) if matters(site, to)}
        if not targets:
            return
        within = body.leading_to(targets)
        if virtual := virtual_ways(body, targets):
            within -= virtual
            body = without_addends(body, targets, self.convention.arguments[0])
        states = explore(body, program.image(obj).machine, rva, watch=targets, within=within, fields=True).states
        for site in sorted(targets):
            if site in states:
                yield _Call(site, targets[site], states[site])

    def _size(self, function: Function) -> int:
        obj = self.program.object_of(function)
        return int(self.program.codes[obj].size[function - int(self.program.base[obj])])

    def _target(self, function: Function, call: _Call) -> Known | None:
        """What a call goes to."""
        obj = self.program.object_of(function)
        match call.target:
            case int():
                return Place(obj, call.target)
            case Register():
                return self._known(function, call.state.register(call.target.name))
            case Memory(base=None, indexed=False):
                return self._fixed(Place(obj, call.target.displacement))
            case Memory(base=str(base), indexed=False):
                pointer = self._known(function, call.state.register(base))
                return (
                    None
                    if pointer is None
                    else self._content(_moved(pointer, call.target.displacement), function, call.state)
                )
            case _:
                return None


def _transfers(body: Body) -> Iterator[tuple[int, Operand | int | None]]:
    """(site, where to) of the calls and tail calls of a function."""
    for instruction in body.instructions:
        for operation in instruction.operations:
            if isinstance(operation, Call):
                yield instruction.address, _absolute(operation.target, operation.through, instruction.end)
            elif isinstance(operation, Jump) and not body.contains(operation.target):
                yield instruction.address, operation.target
            elif isinstance(operation, JumpUnknown) and not body.orphans:
                yield instruction.address, _absolute(None, operation.through, instruction.end)


def _absolute(target: int | None, through: Operand | None, end: int) -> Operand | int | None:
    if target is None and isinstance(through, Memory) and through.base == "pc":
        return through._replace(base=None, displacement=end + through.displacement)
    return target if target is not None else through


def _in_structure(starter: ThreadStarter, arguments: Sequence[str]) -> Role:
    """What starts a thread in a function that a structure holds."""
    assert starter.structure is not None
    assert starter.function is not None
    begin = Entry(arguments[starter.structure])
    given = () if starter.parameter is None else (Value(Behind(begin, starter.parameter), 0),)
    return Role(EdgeKind.THREAD, Value(Behind(begin, starter.function), 0), given)


def _called_from_structure(callback: Callback, arguments: Sequence[str]) -> Iterator[Role]:
    """What calls functions that structures hold: a signal handler."""
    assert callback.word is not None
    for argument, when in zip(callback.arguments, callback.when, strict=True):
        if (kind := WHEN_KINDS[when]) is not None:
            yield Role(kind, Value(Behind(Entry(arguments[argument]), callback.word), 0), ())


def _entry(register: str) -> Value:
    return Value(Entry(register), 0)


def _moved(value: Known, by: int) -> Known:
    if isinstance(value, Place):
        return Place(value.object, value.address + by)
    return Value(value.base, value.offset + by)


def is_fixed(image: Image, address: int) -> bool:
    """Nothing can write there once the program runs."""
    if any(start <= address < start + size for start, size in image.relro):
        return True
    return not image.is_writable(address)
