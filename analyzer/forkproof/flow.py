"""Control flow across functions: bodies with their cold parts, and what each call does to its caller.

Owns: the joining of a function with the parts that the compiler moved away, the question "does this
      call come back?", and values of arguments at call sites.
Takes: the call graph and the signatures' names of exec, exit and other functions that do not return.
Gives: `Flow`, a memoised service for the analyses that follow single functions.
Must never: be asked about every function of a program: each answer decodes code.
Wrong where: a function returns only through a computed jump; where a noreturn function has no name and
      holds a stray return byte, or what it is given to end for passes through memory (it then counts as returning,
      which keeps paths alive).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from forkproof import golang
from forkproof.callgraph import CALLS, CallGraph, EdgeKind, Reach
from forkproof.code.certain import Constants, comes_back, never
from forkproof.code.conventions import CONVENTIONS, Convention
from forkproof.code.decode import Body, decode
from forkproof.code.explore import CallEffect, Changes, Effects, Exploration, explore
from forkproof.code.operations import Call, Const, Operation, Register, Set
from forkproof.code.state import State
from forkproof.code.values import constant
from forkproof.columns import unique
from forkproof.constant_calls import ConstantCalls
from forkproof.elf.demangle import demangle
from forkproof.elf.image import I64, Machine
from forkproof.model import Frame
from forkproof.program import Function, Program
from forkproof.settled import Settled
from forkproof.signature_values import Forker, NameSet
from forkproof.signatures import Signatures

_RETURN_DEPTH: Final = 4
_NUMBER_DISTANCE: Final = 24
"""Instructions before a call in which a constant argument is looked for."""
_JUMP: Final = int(EdgeKind.JUMP)
_CALLS: Final = CALLS | {EdgeKind.IFUNC}
_RETURNS: Final = CallEffect()
_ENDS: Final = CallEffect(returns=False)
_X86_EPILOGUE: Final = re.compile(
    rb"(?:[\x58-\x5f\xc9]|\x48\x83\xc4.|\x48\x81\xc4....)\xc3|\xc3(?:\x66|\x0f\x1f|\x90|$)", re.DOTALL
)
"""A return after a pop or a stack adjustment, or before padding. The byte C3 alone proves nothing: it is
also the ModRM byte of `mov %eax, %ebx`."""
_X86_TAIL: Final = re.compile(rb"(?:[\x58-\x5f\xc9]|\x48\x83\xc4.|\x48\x81\xc4....)\xe9$", re.DOTALL)
_TAIL_REACH: Final = 8
_BY_POINTER: Final = frozenset({"posix_memalign", "__posix_memalign"})
"""What gives memory in another way than by its result."""
"""Bytes before a tail call that can hold the end of an epilogue."""
_EPILOGUE_REACH: Final = 64
"""Bytes after a call in which a function's end stands, checks of the stack guard included."""
GUARDS: Final = frozenset({"__stack_chk_fail", "__stack_chk_fail_local"})
"""Called on the way out of ordinary functions, when the stack was smashed."""
_REMEMBERED: Final = 16
"""Functions whose states before calls are kept: who asks about one asks again at once."""
_HUGE: Final = 1 << 18
"""Functions above this size (bytes) are not followed: interpreters and unpacked tables."""


@dataclass(frozen=True)
class Passed:
    """What a call passes as one argument: a function, a parameter of the caller, or neither."""

    function: Function | None = None
    parameter: int | None = None
    constant: int | None = None


class Flow:
    """Bodies, explorations and call effects, memoised."""

    def __init__(self, graph: CallGraph, signatures: Signatures, forkers: Mapping[Function, Forker]) -> None:
        self.graph = graph
        self.forkers = forkers
        self.program: Program = graph.program
        self.signatures = signatures
        self.machine: Machine = self.program.image(0).machine
        self.convention: Convention = CONVENTIONS[self.machine]
        self._explored: dict[Function, Exploration] = {}
        self._asked: set[Function] = set()
        self._call_states: OrderedDict[Function, dict[int, State | None]] = OrderedDict()
        self._bodies: dict[Function, Body] = {}
        self._returning: dict[Function, tuple[bool, int]] = {}
        """Whether each returns, and how deep that was looked for."""
        self._parts: dict[Function, tuple[Function, ...]] = {}
        self._owners: dict[Function, Function | None] = {}
        self._sites: dict[Function, dict[int, list[int]]] = {}
        self._ends: dict[tuple[Function, frozenset[Function]], dict[int, bool]] = {}
        self._taken: dict[int, I64] = {}
        self.constant_calls = ConstantCalls(self)
        self.settled = Settled(self)
        self._dead: dict[Function, frozenset[int]] = {}

    @cached_property
    def main(self) -> Function | None:
        """The program's main: what crt1 passes to libc, whether or not a symbol says so."""
        start = self.program.function(0, self.program.image(0).entry)
        named = list(self.program.called(["main"], [0]))
        if start is not None:
            passed = [e for e in self.graph.edges_from(start) if self.graph.kind[e] == EdgeKind.CALLBACK]
            named += [Function(int(self.graph.target[e])) for e in passed]
        return named[0] if named else None

    @cached_property
    def go_system_calls(self) -> frozenset[Function]:
        """Functions of Go's that make the system call whose number they are given."""
        return frozenset(self.program.called(golang.SYSTEM_CALLS))

    def is_go(self, function: Function) -> bool:
        """The function is one of Go's own table, not C that is linked with it."""
        program = self.program
        table = program.image(program.object_of(function)).go_functions
        return bool((table.value == program.rva_of(function)).any())

    def name(self, function: Function) -> str:
        """The name that a report shows: demangled, `main` for main, `sub_<rva>` for nameless code."""
        program = self.program
        obj, start = program.object_of(function), program.rva_of(function)
        if function == self.main and not program.names[obj].is_named(start):
            return "main"
        return demangle(program.names[obj].name(start))

    # ---- bodies ----------------------------------------------------------------------------

    def body(self, function: Function) -> Body:
        """The decoded function, with the cold parts that only it jumps to."""
        found = self._bodies.get(function)
        if found is None:
            obj = self.program.object_of(function)
            found = self._bodies[function] = decode(self.program.image(obj), self.ranges(function))
        return found

    def ranges(self, function: Function) -> list[tuple[int, int]]:
        """(start, size) of a function and of the cold parts that only it jumps to."""
        return [self._extent(function), *(self._extent(part) for part in self.cold_parts(function))]

    def is_decoded(self, function: Function) -> bool:
        """`body` is known already: asking for it costs nothing."""
        return function in self._bodies

    def _extent(self, function: Function) -> tuple[int, int]:
        return self.program.rva_of(function), min(self.program.size_of(function), _HUGE)

    def cold_parts(self, function: Function) -> tuple[Function, ...]:
        """Functions of the table that are really pieces of this one."""
        known = self._parts.get(function)
        if known is None:
            known = self._parts[function] = self._find_cold_parts(function)
        return known

    def _find_cold_parts(self, function: Function) -> tuple[Function, ...]:
        jumps = {
            Function(target)
            for _, target, _, kind in self.graph.rows_from(function)
            if kind == _JUMP and target != function
        }
        return tuple(sorted(part for part in jumps if self.owner_of_part(part) == function))

    def owner_of_part(self, function: Function) -> Function | None:
        """The function that a cold part belongs to; None for a function of its own.

        A part is entered by jumps of one function only, its address is never taken, and no name but
        `*.cold` is on it.
        """
        if function not in self._owners:
            self._owners[function] = self._find_owner(function)
        return self._owners[function]

    def _find_owner(self, function: Function) -> Function | None:
        graph = self.graph
        if not graph.only_jumped_to[function]:
            return None
        callers = {*graph.source[graph.rows_to(function)].tolist()} - {function}
        if len(callers) != 1:
            return None
        obj, rva = self.program.object_of(function), self.program.rva_of(function)
        names = self.program.names[obj].aliases(rva)
        if names and not any(".cold" in name for name in names):
            return None
        owner = Function(callers.pop())
        return owner if self.program.object_of(owner) == obj and not self._is_address_taken(function) else None

    def _is_address_taken(self, function: Function) -> bool:
        obj, rva = self.program.object_of(function), self.program.rva_of(function)
        if obj not in self._taken:
            _, relative = self.program.image(obj).pointers
            self._taken[obj] = np.sort(np.concatenate([self.program.codes[obj].sites.taken_target, relative]))
        taken = self._taken[obj]
        position = int(taken.searchsorted(rva))
        return position < len(taken) and int(taken[position]) == rva

    def whole(self, function: Function) -> Function:
        """The function itself, or the one that it is a cold part of."""
        owner = self.owner_of_part(function)
        return function if owner is None else owner

    # ---- calls -----------------------------------------------------------------------------

    def edges_at(self, function: Function, site: int) -> list[int]:
        """Edges of a function's own control flow at one site (its cold parts included)."""
        known = self._sites.get(function)
        if known is None:
            known = self._sites[function] = {}
            for edge, _, place, kind in self.outgoing_rows(function):
                if kind in _CALLS:
                    known.setdefault(place, []).append(edge)
        return known.get(site, [])

    def outgoing(self, function: Function) -> list[int]:
        """All edges of a function and of its cold parts, jumps between them left out."""
        return [edge for edge, _, _, _ in self.outgoing_rows(function)]

    def outgoing_rows(self, function: Function) -> list[tuple[int, int, int, int]]:
        """`outgoing` as (edge, target, site, kind)."""
        parts = self.cold_parts(function)
        inside = {function, *parts}
        return [
            row
            for part in (function, *parts)
            for row in self.graph.rows_from(part)
            if row[3] != _JUMP or row[1] not in inside
        ]

    @cached_property
    def execs(self) -> frozenset[Function]:
        """Functions that replace the program."""
        return frozenset(self.program.called(self.signatures.exec_names.exact))

    @cached_property
    def dying(self) -> frozenset[Function]:
        """Functions by which a program ends or throws: exit, abort, failed assertions."""
        names = self.signatures.noreturn.exact | self.signatures.exit_names.exact
        return frozenset(self.program.called(sorted(names - self.signatures.exec_names.exact)))

    @cached_property
    def allocating(self) -> frozenset[Function]:
        """Functions whose result is new memory."""
        roles = self.signatures.malloc_family
        names = sorted(n for n, role in roles.items() if role == "allocate" and n not in _BY_POINTER)
        return frozenset(self.program.called(names))

    @cached_property
    def to_memory(self) -> Reach:
        """Distance of every function to the nearest of them."""
        return self.graph.distances(self.allocating, backward=True)

    @cached_property
    def to_exec(self) -> Reach:
        """Distance of every function to the nearest exec, not through functions that call a forker:
        what they run is another process."""
        graph = self.graph
        is_forker = np.zeros(graph.size, bool)
        is_forker[list(self.forkers)] = True
        forking = unique(graph.source[is_forker[graph.target]])
        return graph.distances(self.execs, backward=True, blocked=[*forking.tolist(), *self.forkers])

    def effects(self, function: Function, *, ending: frozenset[Function] = frozenset()) -> Effects:
        """What each call of a function does, for `explore`; calls of `ending` do not come back.

        Decided when a call is met: of a long function, a child often goes through little.
        """
        known = self._ends.setdefault((function, ending), {})

        def effect(site: int) -> CallEffect:
            ends = known.get(site)
            if ends is None:
                ends = known[site] = self._all_end(function, site, ending)
            return _ENDS if ends else _RETURNS

        return effect

    def _all_end(self, function: Function, site: int, ending: frozenset[Function]) -> bool:
        """The call at a site has targets, none of which comes back."""
        targets = [Function(int(self.graph.target[edge])) for edge in self.edges_at(function, site)]
        return bool(targets) and all(t in ending or self.ends_at(function, site, t) for t in targets)

    def returns(self, function: Function, depth: int = _RETURN_DEPTH) -> bool:
        """False when a call of the function is known not to come back."""
        known, deep = self._returning.get(function, (True, -1))
        if known and deep < depth:  # who looked less far may have taken it for returning
            self._returning[function] = True, _RETURN_DEPTH  # a recursive call: assume that it returns
            known = self._decide_returns(function, depth)
            self._returning[function] = known, depth
        return known

    def ends_at(self, function: Function, site: int, target: Function, depth: int = _RETURN_DEPTH) -> bool:
        """A call at a site of a function does not come back: its target never does, or not with these constants."""
        return not self.returns(target, depth) or self.constant_calls.end(function, site, target, depth)

    def ends_on(self, edge: int) -> bool:
        """The call that an edge stands for does not come back."""
        graph = self.graph
        source, target = Function(int(graph.source[edge])), Function(int(graph.target[edge]))
        return self.ends_at(self.whole(source), int(graph.site[edge]), target)

    def loops(self, function: Function, site: int | None) -> bool:
        """A loop of the function goes through an instruction, or through any where none is named."""
        run = self.explored(self.whole(function))
        blocks = sorted(run.successors) if site is None else [run.block_of(site)]
        return any(block in run.onward(block) for block in blocks)

    def _decide_returns(self, function: Function, depth: int) -> bool:
        obj, rva = self.program.object_of(function), self.program.rva_of(function)
        names = self.program.names[obj].aliases(rva)
        ending: tuple[NameSet, ...] = (self.signatures.noreturn, self.signatures.exit_names)
        if any(name in group for name in names for group in ending):
            return False
        if depth == 0:
            return True
        is_plain = (self._has_return(function) and not self._may_end_first(function, depth)) or (
            self._has_returning_tail(function, depth)
        )
        if is_plain and not self._passes_its_end(function, depth):
            return True
        leaving = [row for row in self.outgoing_rows(function) if row[3] in _CALLS]
        if not leaving or (len(leaving) > 64 and self._has_return(function)):
            return True
        return self.may_return(function, {}, depth - 1)

    def may_return(self, function: Function, known: Constants, depth: int) -> bool:
        """Some way through a function that is given these constants, over calls that come back, leads to a return."""

        def judge(site: int, passed: Constants) -> bool:
            targets = [Function(int(self.graph.target[e])) for e in self.edges_at(function, site)]
            return not targets or any(
                self.returns(t, depth) and self.constant_calls.comes_back(t, passed, depth) for t in targets
            )

        return comes_back(self.body(function), self.machine, known, judge)

    def _may_end_first(self, function: Function, depth: int) -> bool:
        """The last call before a return does not come back: a return that the compiler put there in ignorance.

        So it is at -O0 and -O1, and wherever the callee that ends the program is in another file and not
        declared noreturn.
        """
        calls = [(site, t) for _, t, site, kind in self.graph.rows_from(function) if kind in _CALLS and kind != _JUMP]
        calls.sort(reverse=True)
        last = next((c for c in calls if self.program.name_of(Function(c[1])) not in GUARDS), None)
        if last is None:
            return False
        start, size = self._extent(function)
        rest = self.program.image(self.program.object_of(function)).read(
            last[0], max(min(start + size - last[0], _EPILOGUE_REACH), 0)
        )
        return self._holds_return(rest.tobytes()) and not self.returns(Function(last[1]), depth - 1)

    def _passes_its_end(self, function: Function, depth: int) -> bool:
        """Some call does not come back for the constants that it passes: what stands behind it proves nothing."""
        may_end, end = self.constant_calls.may_end, self.constant_calls.end
        return any(
            kind in _CALLS
            and may_end[target]
            and self.returns(Function(target), depth - 1)  # what never does, compilers know or `_may_end_first` finds
            and end(function, site, Function(target), depth - 1)
            for _, target, site, kind in self.graph.rows_from(function)
        )

    def _has_returning_tail(self, function: Function, depth: int) -> bool:
        """A tail call right after an epilogue, to a function that returns: as good as a return, and found as cheaply.

        x86-64 only, where an epilogue is told by its bytes.
        """
        if self.machine is not Machine.X86_64:
            return False
        image = self.program.image(self.program.object_of(function))
        return any(
            _X86_TAIL.search(image.read(site - _TAIL_REACH, _TAIL_REACH + 1).tobytes())
            and self.returns(Function(target), depth - 1)
            for _, target, site, kind in self.outgoing_rows(function)
            if kind in _CALLS
        )

    def _holds_return(self, code: bytes) -> bool:
        return bool(_X86_EPILOGUE.search(code)) if self.machine is Machine.X86_64 else _holds_ret(code)

    def _has_return(self, function: Function) -> bool:
        """A return instruction plainly stands in the function; False means that it must be decoded."""
        obj = self.program.object_of(function)
        image = self.program.image(obj)
        for part in (function, *self.cold_parts(function)):
            start, size = self._extent(part)
            if self._holds_return(image.read(start, size).tobytes()):
                return True
        return False

    # ---- values ----------------------------------------------------------------------------

    def states(self, function: Function, sites: Iterable[int], *, fields: bool = False) -> Mapping[int, State]:
        """What is known before each of these instructions, from the function's entry on; with `fields`, what pointers
        lead to is named.

        Calls count as returning unless a name says otherwise: values do not depend on more.
        """
        watch = frozenset(sites)
        entry = self.program.rva_of(function)
        ends = {int(self.graph.site[e]) for e in self.outgoing(function) if self.graph.target[e] in self.dying}
        body = self.body(function)
        return explore(
            body,
            self.machine,
            entry,
            effects=lambda site: _ENDS if site in ends else _RETURNS,
            watch=watch,
            within=body.leading_to(watch),
            fields=fields,
            words=self.settled.of(function),
        ).states

    def state_before(self, function: Function, site: int) -> State | None:
        """What is known before one call; None where it cannot be made.

        The first time only the ways to it are followed; who asks about a second call of a function asks about more.
        """
        known = self._call_states.get(function)
        if known is not None:
            self._call_states.move_to_end(function)
        elif function not in self._asked:
            self._asked.add(function)
            return self.states(function, [site]).get(site)
        if known is None or site not in known:
            sites = {int(self.graph.site[e]) for e in self.outgoing(function)} | {site, *(known or ())}
            found = self.states(function, sites)
            known = self._call_states[function] = {each: found.get(each) for each in sites}
            if len(self._call_states) > _REMEMBERED:
                self._call_states.popitem(last=False)
        return known[site]

    def constant_before(self, function: Function, site: int, register: str) -> int | None:
        """The constant that the nearest earlier instruction puts into a register, if it does.

        Looks back along the text of the function, not along its control flow: for numbers of system calls
        and flags, which compilers set right before the call.
        """
        body = self.body(function)
        position = body.position(site)
        if position is None:
            return None
        for instruction in reversed(body.instructions[max(0, position - _NUMBER_DISTANCE) : position]):
            for operation in reversed(instruction.operations):
                if isinstance(operation, Call) and register in self.convention.destroyed:
                    return None
                if getattr(operation, "destination", None) == Register(register):
                    return self._constant_put(function, site, operation)
        return None

    def _constant_put(self, function: Function, site: int, operation: Operation) -> int | None:
        """The constant that an operation puts into its register, which still holds it at `site`."""
        if isinstance(operation, Set) and isinstance(operation.source, Const):
            return operation.source.value if operation.bits >= 32 else None
        place = getattr(operation, "destination", None)
        state = self.state_before(function, site)
        return constant(state.register(place.name)) if state is not None and isinstance(place, Register) else None

    def constant_at(self, function: Function, site: int, register: str) -> int | None:
        """The constant that a register is known to hold before a call: most have it put there right before.

        Unlike `constant_before`, which takes the nearest for the right one, along every way to the call.
        """
        near = self.constant_calls.passed(function, site).get(register)
        if near is not None:
            return near
        state = self.state_before(function, site)
        return constant(state.register(register)) if state is not None else None

    def passed(self, function: Function, state: State, argument: int) -> Passed:
        """What an argument register holds in a state."""
        value = state.register(self.convention.arguments[argument])
        if value is None:
            return Passed()
        obj = self.program.object_of(function)
        if value.base is None:
            return Passed(self.program.function(obj, value.offset), None, value.offset)
        name = getattr(value.base, "register", None)
        if name in self.convention.arguments and value.offset == 0:
            return Passed(parameter=self.convention.arguments.index(name))
        address = getattr(value.base, "address", None)
        if address is not None and value.offset == 0:
            return Passed(self.program.slot_target(obj, address))
        return Passed()

    # ---- witnesses -------------------------------------------------------------------------

    def frame(self, function: Function, site: int | None, edge: str) -> Frame:
        """One frame of a witness path."""
        program = self.program
        obj, start = program.object_of(function), program.rva_of(function)
        offset = 0 if site is None else site - start
        return Frame(program.closure.objects[obj].name, self.name(function), offset, edge)

    def frames(self, edges: Iterable[int], last: Function) -> tuple[Frame, ...]:
        """The frames of a path of edges, and its end."""
        graph = self.graph
        result = [
            self.frame(Function(int(graph.source[e])), int(graph.site[e]), EdgeKind(graph.kind[e]).name.lower())
            for e in edges
        ]
        return (*result, self.frame(last, None, ""))

    def explored(self, function: Function) -> Exploration:
        """A function from its entry on, with what each call does."""
        found = self._explored.get(function)
        if found is None:
            found = self._explored[function] = self.explore_from(function, self.program.rva_of(function), {})
        return found

    def explore_from(
        self,
        function: Function,
        start: int,
        known: Mapping[str, int],
        ending: frozenset[Function] = frozenset(),
        *,
        fields: bool = False,
        begin: State | None = None,
        changes: Changes | None = None,
    ) -> Exploration:
        """Run a function from an instruction on, with registers that hold constants there, or all that is known."""
        return explore(
            self.body(function), self.machine, start, known=known, effects=self.effects(function, ending=ending),
            fields=fields, begin=begin, changes=changes, words=self.settled.of(function),
        )  # fmt: skip

    def dead(self, function: Function) -> frozenset[int]:
        """Instructions of a function that no input leads to, for what variables hold that nothing writes."""
        found = self._dead.get(function)
        if found is None:
            words = self.settled.of(function)
            found = frozenset() if words is None else never(self.body(function), self.machine, words)
            self._dead[function] = found
        return found

    def is_dead(self, edge: int) -> bool:
        """The call that an edge stands for is never made."""
        source = Function(int(self.graph.source[edge]))
        if self.settled.of(source) is None:
            return False
        return int(self.graph.site[edge]) in self.dead(self.whole(source))


def _holds_ret(code: bytes) -> bool:
    """AArch64 RET, RETAA or RETAB of any register."""
    words = np.frombuffer(code[: len(code) // 4 * 4], "<u4")
    return bool(np.any((words & 0xFFFFFC1F == 0xD65F0000) | (words & 0xFFFFFBFF == 0xD65F0BFF)))
