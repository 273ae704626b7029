"""Fork windows: every call that creates a process, and what its child runs afterwards.

Owns: finding the calls of forkers (library functions and raw system calls), following the child through
      the function that forks and, where it returns in the child, through the callers, and telling what
      becomes of the child.
Takes: `Flow`, and the forkers of the target's libc. Gives: `ForkWindow`s.
Must never: run anything, or assume that a wrapper is a forker because of its name.
Wrong where: the result of fork reaches the decision through memory that the exploration does not follow
      (then both sides count as the child's, which is said in the outcomes): a list of children, a field of a
      field; where the caller of a wrapper calls it through a pointer (the window's kind is then unknown
      beyond that point).

How a child is told from its parent: the code after the call is followed twice, once with the result 0
and once with a positive one; branches that the result decides are taken on one side only. In a caller, what the
function returned tells them apart, or what it left in memory: see marks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forkproof import golang
from forkproof.callgraph import CALLS, Reach
from forkproof.code.explore import Changes, Exploration
from forkproof.code.index import SCANNERS
from forkproof.code.state import State, joined
from forkproof.code.values import Value, constant
from forkproof.columns import among
from forkproof.elf.image import Machine
from forkproof.elf.names import plainness
from forkproof.flow import Flow
from forkproof.marks import (
    Cells,
    Mark,
    changes_by,
    child_words,
    constants_after,
    marks_left,
    marks_passed_on,
    marks_seen,
    may_mark,
    parent_words,
    state_after,
)
from forkproof.model import Answer, WindowKind
from forkproof.program import Function, Program
from forkproof.signature_values import Forker, ForkerKind
from forkproof.signatures import Signatures

_CLONE_VM: Final = 0x100
_FLAGS_BITS: Final = 64
"""Of struct clone_args.flags."""
_PARENT_RESULT: Final = 0x5A5A
_MAX_LEVELS: Final = 24
"""Callers followed for one window; beyond, the rest of the child's life is unknown."""
_MAX_UNREACHED_LEVELS: Final = 4
_NUMBER_REACH: Final = 192
"""Bytes before a system call in which its number must stand."""
_MAX_RESULTS: Final = 3
"""Constants that a wrapper may return and that are still followed one by one."""
_NEAR: Final = 3
"""A callee this close to exec is taken to be there for it."""


Results = tuple[int, ...]


class _Left(NamedTuple):
    """What a call leaves by which the child and its parent are told apart."""

    child: Results = ()
    """What it returns in the child, if those are few constants."""
    parent: Results = ()
    marks: tuple[Mark, ...] = ()

    def agreed(self, other: _Left) -> _Left:
        """What is left, whichever of the two it is."""
        return _Left(
            _either(self.child, other.child),
            _either(self.parent, other.parent),
            tuple(mark for mark in self.marks if mark in other.marks),
        )


def _either(one: Results, other: Results) -> Results:
    values = tuple(sorted({*one, *other}))
    return values if one and other and len(values) <= _MAX_RESULTS else ()


class _Place(NamedTuple):
    """Where the child goes on: after a call."""

    function: Function
    site: int
    is_jump: bool
    """A tail call, after which it goes on in the callers."""
    left: _Left


@dataclass(frozen=True, slots=True)
class Level:
    """The part of the child's life that runs in one function."""

    function: Function
    site: int
    """The call after which it begins."""
    start: int
    """The instruction at which it begins: behind that call, or where a function does that is given to a clone."""
    edges: tuple[int, ...]
    """Call edges that the child can run here."""
    outcomes: frozenset[str]
    returns: bool
    parent_returns: bool
    left: _Left
    """What the function returns in both, and leaves in memory."""
    weight: int
    """Instructions that only the child can run, less those that only the parent can."""
    parted: frozenset[int]
    """Calls among `edges` that the parent cannot come to after this fork, by site; empty when the two were not
    told apart."""
    parent_values: tuple[int, ...]
    """What the call at `site` gives to the parent, if that is known."""
    runs: tuple[Exploration, ...] = field(default=(), repr=False)
    """What the child can do here, for each value that the call can have given to it."""
    visited: frozenset[int] = field(default=frozenset(), repr=False)
    """Addresses of the instructions that the child can run here."""


@dataclass(frozen=True, slots=True)
class ForkWindow:
    """One call of a forker."""

    forker: str
    function: Function
    site: int
    handlers_run: bool
    shares_memory: Answer
    """vfork and CLONE_VM: the child runs in the parent's memory, where other threads still release locks."""
    kind: WindowKind
    levels: tuple[Level, ...]
    outcomes: tuple[str, ...]
    is_complete: bool
    """False when some callers of a wrapper were not followed."""


@dataclass(frozen=True, slots=True)
class _Site:
    """A call of a forker, before the child is followed."""

    name: str
    kind: ForkerKind
    handlers_run: bool
    shares_memory: Answer
    function: Function
    site: int
    is_jump: bool
    callback: int | None = None
    """Which argument the child runs, for clone(2)."""


def find_forkers(
    program: Program, signatures: Signatures, libc: str | None, version: str | None, libc_objects: frozenset[int]
) -> dict[Function, Forker]:
    """The functions of the closure that create processes, by the signatures of the target's libc."""
    known = signatures.forkers_for(libc, version)
    everywhere = frozenset(range(len(program.codes)))
    names = sorted(known, key=plainness)  # the plainest first
    found = program.called([n for n in names if not golang.is_go(n)], libc_objects or everywhere)
    found |= program.called([n for n in names if golang.is_go(n)], everywhere)
    return {function: known[name] for function, name in found.items()}


def find_windows(
    flow: Flow, libc_objects: frozenset[int], roots: Reach, may_run: npt.NDArray[np.bool_]
) -> list[ForkWindow]:
    """All windows of the program, those of libc's own functions left out, in object and address order.

    `roots` is the distance of every function from the program's roots: callers of a wrapper that nothing
    reaches are followed only as far as needed to tell what the wrapper does. A window that nothing may ever
    reach (`may_run`) is not followed at all: no finding can come of it, and half of a closure's are such.
    """
    result = []
    for site in sorted(
        [*_sites(flow, libc_objects), *_raw_sites(flow, libc_objects)], key=lambda s: (s.function, s.site)
    ):
        if site.kind == "spawn":
            result.append(_window(site, WindowKind.SPAWN, (), ("exec",), is_complete=True))
        elif not may_run[site.function]:
            result.append(_window(site, WindowKind.UNKNOWN, (), (), is_complete=False))
        elif site.kind == "clone":
            result.append(_clone(flow, site, roots))
        else:
            result.append(_Follower(flow, roots, site.function).window(site))
    return result


def _window(
    site: _Site, kind: WindowKind, levels: tuple[Level, ...], outcomes: tuple[str, ...], *, is_complete: bool
) -> ForkWindow:
    return ForkWindow(
        site.name, site.function, site.site, site.handlers_run, site.shares_memory, kind, levels, outcomes, is_complete
    )


def _sites(flow: Flow, libc_objects: frozenset[int]) -> Iterator[_Site]:
    """Calls of library forkers."""
    graph, forkers = flow.graph, flow.forkers
    is_forker = np.zeros(graph.size, bool)
    is_forker[list(forkers)] = True
    seen: set[tuple[int, int]] = set()
    for edge in np.flatnonzero(is_forker[graph.target] & among(graph.kind, CALLS)).tolist():
        function, site = Function(int(graph.source[edge])), int(graph.site[edge])
        if function in forkers or (function, site) in seen or _is_libc_code(flow, function, libc_objects):
            continue
        if _starts_thread(flow, function):
            continue
        seen.add((function, site))
        forker = forkers[Function(int(graph.target[edge]))]
        whole = flow.whole(function)
        yield _Site(
            forker.name, forker.kind, forker.handlers_run, _shares_memory(flow, forker, whole, site), whole, site,
            _is_jump(flow, function, site), forker.callback,
        )  # fmt: skip


def _starts_thread(flow: Flow, function: Function) -> bool:
    """pthread_create and its like, which call clone too."""
    program = flow.program
    names = program.names[program.object_of(function)].aliases(program.rva_of(function))
    return any(name in flow.signatures.thread_starters for name in names)


def _is_libc_code(flow: Flow, function: Function, libc_objects: frozenset[int]) -> bool:
    """Code of libc's own, which its forkers and thread starters run on behalf of their callers."""
    program = flow.program
    obj = program.object_of(function)
    if obj not in libc_objects:
        return False
    if len(program.codes) > 1:
        return True
    # A static program: libc and the program share one object. libc's own callers have reserved names.
    return any(name.startswith("__") for name in program.names[obj].aliases(program.rva_of(function)))


def _shares_memory(flow: Flow, forker: Forker, function: Function, site: int) -> Answer:
    if forker.kind == "vfork":
        return Answer.YES
    if forker.kind != "clone" or forker.flags is None:
        return Answer.NO
    flags = flow.constant_before(function, site, flow.convention.arguments[forker.flags])
    if flags is None:
        return Answer.UNKNOWN
    return Answer.YES if flags & _CLONE_VM else Answer.NO


def _raw_sites(flow: Flow, libc_objects: frozenset[int]) -> Iterator[_Site]:
    """System calls that create a process, made with syscall(2) or with the instruction itself."""
    calls = flow.signatures.raw_process_syscalls(flow.machine.value)
    seen = set()
    for function, site, number_register, flags_register in _system_calls(flow, libc_objects):
        image = flow.program.image(flow.program.object_of(function))
        window = image.read(max(site - _NUMBER_REACH, 0), min(site, _NUMBER_REACH)).tobytes()
        if not SCANNERS[flow.machine].mentions(window, calls):
            continue
        number = flow.constant_before(function, site, number_register)
        call = calls.get(number) if number is not None else None
        if call is None or (function, site) in seen or function in flow.forkers or _starts_thread(flow, function):
            continue
        seen.add((function, site))
        flags = _flags(flow, function, site, flags_register, call.flags)
        creates = call.creates(flags)
        if creates != "thread":
            shared = {"shared": Answer.YES, "process": Answer.NO}.get(creates, Answer.UNKNOWN)
            # In a static program without names the instruction stands in libc's own fork, handlers and all.
            runs_handlers = len(flow.program.codes) == 1 and not flow.forkers and not len(image.go_functions)
            kind: ForkerKind = "vfork" if shared is Answer.YES else "fork"
            runs_handlers &= kind == "fork"
            yield _Site(call.name, kind, runs_handlers, shared, function, site, is_jump=False)


def _flags(flow: Flow, function: Function, site: int, register: str, where: str) -> int | None:
    """The CLONE_ flags that a system call is given: as an argument, or in front of the structure that one points to."""
    if where == "argument-0":
        return flow.constant_before(function, site, register)
    state = flow.state_before(function, site) if where == "struct-0" else None
    pointer = state.register(register) if state is not None else None
    held = state.cells.get((pointer.base, pointer.offset)) if state is not None and pointer is not None else None
    return held.value.offset if held is not None and held.value.base is None and held.bits == _FLAGS_BITS else None


def _system_calls(flow: Flow, libc_objects: frozenset[int]) -> Iterator[tuple[Function, int, str, str]]:
    """(function, site, registers of the number and of the first argument) of system calls outside libc."""
    graph, program, arguments = flow.graph, flow.program, flow.convention.arguments
    wrappers = dict.fromkeys(program.called(["syscall"]), (arguments[0], arguments[1]))
    wrappers |= dict.fromkeys(sorted(flow.go_system_calls), golang.ARGUMENTS[flow.machine])
    for target, registers in wrappers.items():
        for edge in graph.edges_to(target):
            function = Function(int(graph.source[edge]))
            if int(graph.kind[edge]) in CALLS and not _is_libc_code(flow, function, libc_objects):
                yield flow.whole(function), int(graph.site[edge]), *registers
    for obj, code in enumerate(program.codes):
        if obj in libc_objects and len(program.codes) > 1:
            continue
        sites = code.sites.syscalls
        for site, owner in zip(sites.tolist(), code.owners(sites).tolist(), strict=True):
            if owner >= 0:
                function = flow.whole(Function(int(program.base[obj]) + owner))
                if not _is_libc_code(flow, function, libc_objects):
                    yield function, site, flow.convention.syscall_number, arguments[0]


def _is_jump(flow: Flow, function: Function, site: int) -> bool:
    """The transfer at a site is a tail call."""
    image = flow.program.image(flow.program.object_of(function))
    if flow.machine is Machine.X86_64:
        code = image.read(site, 2).tobytes()
        return code[:1] in (b"\xe9", b"\xeb", b"\x0f") or code == b"\xff\x25"
    word = int.from_bytes(image.read(site, 4).tobytes(), "little")
    return word & 0xFC000000 != 0x94000000 and word & 0xFFFFFC1F != 0xD63F0000


def _clone(flow: Flow, site: _Site, roots: Reach) -> ForkWindow:
    """clone(2): the child runs the function passed to it and then exits."""
    callback = None
    if site.callback is not None:
        state = flow.state_before(site.function, site.site)
        callback = flow.passed(site.function, state, site.callback).function if state else None
    if callback is None:
        return _window(site, WindowKind.UNKNOWN, (), (), is_complete=False)
    level = _Follower(flow, roots, callback).body_of(callback, site.site)
    kind = WindowKind.EXEC if "exec" in level.outcomes else WindowKind.EXIT
    return _window(site, kind, (level,), tuple(sorted(level.outcomes | {"exit"})), is_complete=True)


class _Follower:
    """Follows one child; a new instance for each window."""

    def __init__(self, flow: Flow, roots: Reach, home: Function) -> None:
        self.flow, self.roots, self.home = flow, roots, home
        self.is_complete = True

    def window(self, site: _Site) -> ForkWindow:
        """The child of one call of fork, vfork or daemon."""
        levels = self._levels(site)
        outcomes = sorted(set().union(*(level.outcomes for level in levels)) if levels else set())
        kind = WindowKind.DAEMONIZE if site.kind == "daemon" else _kind(levels)
        if site.shares_memory is Answer.UNKNOWN and kind is WindowKind.DAEMONIZE:
            kind = WindowKind.UNKNOWN  # a clone whose flags are not known may as well start a thread
        return _window(site, kind, tuple(levels), tuple(outcomes), is_complete=self.is_complete)

    def _levels(self, site: _Site) -> list[Level]:
        """Where the child comes to, nearest first. What is come to in two ways is followed with what both agree on."""
        limit = _MAX_LEVELS if self.roots[site.function] >= 0 else _MAX_UNREACHED_LEVELS
        left = _Left((0,), () if site.kind == "daemon" else (_PARENT_RESULT,))
        levels: dict[tuple[Function, int], Level] = {}
        arrived: dict[tuple[Function, int], _Left] = {}
        pending = [_Place(site.function, site.site, site.is_jump, left)]
        while pending:
            place = pending.pop(0)
            key = place.function, place.site
            known = arrived.get(key)
            left = place.left if known is None else known.agreed(place.left)
            if left == known:
                continue
            arrived[key], place = left, place._replace(left=left)
            if place.is_jump:
                pending[:0] = self._callers(place.function, self._passed_on(place))
                continue
            if len(levels) >= limit and key not in levels:
                self.is_complete = False
                break
            level = levels[key] = self._after(place)
            if level.returns:
                pending += self._callers(level.function, level.left)
        return list(levels.values())

    def _callers(self, function: Function, left: _Left) -> list[_Place]:
        """The calls behind which the child goes on when `function` has returned."""
        graph = self.flow.graph
        found = {
            (Function(int(graph.source[edge])), int(graph.site[edge]))
            for edge in graph.edges_to(function)
            if graph.kind[edge] in CALLS
        }
        return [_Place(self.flow.whole(f), site, _is_jump(self.flow, f, site), left) for f, site in sorted(found)]

    def _passed_on(self, place: _Place) -> _Left:
        """What a tail call leaves to the callers of the function that makes it."""
        function, site, _, left = place
        before = self._all_before(function, site) if left.marks else None
        return left._replace(marks=marks_passed_on(left.marks, before, self.flow.convention))

    def _all_before(self, function: Function, site: int) -> State | None:
        """What is known before a call, the names of what pointers lead to included."""
        return self.flow.states(function, [site], fields=True).get(site)

    def _after(self, place: _Place) -> Level:
        """What the child can do in a function after a call, by which it came there.

        What was known before that call is dear to follow, and made use of only where a word in memory tells the child
        from its parent, or may do so in the callers.
        """
        flow, convention, (function, site, _, left) = self.flow, self.flow.convention, place
        if flow.body(function).position(site) is None:
            return Level(
                function, site, site, (), frozenset({"unknown"}), False, False, _Left(), 0, frozenset(), left.parent
            )
        before = self._all_before(function, site) if left.marks else None
        marks = marks_seen(left.marks, before, site)
        if marks:
            sides = self._sides(place, state_after(before, site, convention, marks), marks, self._changes(function))
            level = self.level(function, site, sides, left.parent)
        else:
            sides = self._sides(place, constants_after(flow.state_before(function, site), convention))
            level = self.level(function, site, sides, left.parent)
            if not sides.told_apart or not may_mark(sides.child.final, sides.parent.final, convention):
                return level
            known = state_after(self._all_before(function, site), site, convention)
            sides = self._sides(place, known, changes=self._changes(function))
        found = marks_left(sides.child.final, sides.parent.final, convention)
        return replace(level, left=level.left._replace(marks=found))

    def _sides(self, place: _Place, known: State, marks: Sequence[Mark] = (), changes: Changes | None = None) -> _Sides:
        """The code behind a call, followed as the child and, where something tells them apart, as the parent.

        `known` is what both know there; `changes` limits how long it is believed of memory.
        """
        function, site, _, left = place
        if self._is_go_call(function, site):
            known.registers[golang.ERRORS[self.flow.machine]] = Value(None, 0)
        body, register = self.flow.body(function), self.flow.convention.result
        start = body.instructions[body.index[site]].end

        def explored(result: int | None, words: Cells) -> Exploration:
            returned = {} if result is None else {register: Value(None, result)}
            begin = State({**known.registers, **returned}, {**known.cells, **words})
            return self._explored(function, start, begin, changes)

        knows = bool(left.child) or any(constant(value) is not None for value in known.registers.values())
        return _Sides(
            start,
            _Merged([explored(value, child_words(marks)) for value in left.child or (None,)]),
            _Merged([explored(value, parent_words(marks)) for value in left.parent or (None,) * bool(marks)]),
            told_apart=bool(marks) or (bool(left.parent) and knows),
        )

    def _changes(self, function: Function) -> Changes:
        """What calls of a function may change in memory that a child knows."""
        graph, reach = self.flow.graph, self._to_fork
        return changes_by(
            self.flow.convention,
            lambda site: any(reach[graph.target[edge]] >= 0 for edge in self.flow.edges_at(function, site)),
        )

    @cached_property
    def _to_fork(self) -> Reach:
        return self.flow.graph.distances([self.home], backward=True)

    def _is_go_call(self, function: Function, site: int) -> bool:
        """A system call through a function of Go's, which gives its error in another register."""
        targets = {Function(int(self.flow.graph.target[e])) for e in self.flow.edges_at(function, site)}
        return bool(targets) and targets <= self.flow.go_system_calls

    def level(self, function: Function, site: int, sides: _Sides, parent_values: Results = ()) -> Level:
        """A part of the child's life, as it was followed."""
        start, run, other, told_apart = sides
        edges = tuple(dict.fromkeys(e for t in run.sites for e in self.flow.edges_at(function, t)))
        return Level(
            function,
            site,
            start,
            edges,
            self._outcomes(run.returns, edges),
            run.returns,
            other.returns if told_apart else run.returns,
            _Left(run.constants, other.constants),
            len(run.visited - other.visited) - len(other.visited - run.visited) if told_apart else 0,
            frozenset(run.sites) - other.visited if told_apart else frozenset(),
            parent_values,
            run.runs,
            run.visited,
        )

    def _explored(self, function: Function, start: int, begin: State, changes: Changes | None = None) -> Exploration:
        """With fields: the result of a fork may be kept in one behind a pointer that is loaded again."""
        return self.flow.explore_from(function, start, {}, self.flow.execs, fields=True, begin=begin, changes=changes)

    def body_of(self, function: Function, site: int) -> Level:
        """All of a function that a call at a site makes a child run."""
        start = self.flow.program.rva_of(function)
        run = _Merged([self._explored(function, start, State())])
        return self.level(function, site, _Sides(start, run, _Merged([]), told_apart=False))

    def _outcomes(self, returns: bool, edges: tuple[int, ...]) -> frozenset[str]:
        flow, graph = self.flow, self.flow.graph
        found = set()
        for edge in edges:
            target = Function(int(graph.target[edge]))
            if target in flow.forkers:
                found.add("fork")
            elif target in flow.go_system_calls:
                found |= self._go_end(edge)
            elif 0 <= flow.to_exec[target] <= _NEAR:
                found.add("exec")
            elif flow.ends_on(edge):
                found.add("exec" if flow.to_exec[target] >= 0 and not self._is_abnormal(target) else "exit")
        if returns:
            found.add("return")
        elif not found & {"exec", "exit"}:
            found.add("loop")
        return frozenset(found)

    def _go_end(self, edge: int) -> set[str]:
        """What a system call made through a function of Go's does to the child, if it ends it."""
        flow = self.flow
        function = flow.whole(Function(int(flow.graph.source[edge])))
        number = flow.constant_before(function, int(flow.graph.site[edge]), golang.ARGUMENTS[flow.machine][0])
        end = golang.ENDS[flow.machine].get(number) if number is not None else None
        return set() if end is None else {end}

    def _is_abnormal(self, function: Function) -> bool:
        """abort, assertion failures and the like: how a program dies, not what its child is for."""
        program = self.flow.program
        obj = program.object_of(function)
        names = program.names[obj].aliases(program.rva_of(function))
        signatures = self.flow.signatures
        return any(n in signatures.noreturn or n in signatures.exit_names for n in names)


class _Sides(NamedTuple):
    """What the child and its parent can do in the same code, from where it begins."""

    start: int
    child: _Merged
    parent: _Merged
    told_apart: bool


class _Merged:
    """Several explorations of one function, for each value that a call may have returned, as one."""

    def __init__(self, runs: Sequence[Exploration]) -> None:
        self.runs = tuple(runs)
        self.returns = any(run.returns for run in runs)
        self.visited: frozenset[int] = frozenset().union(*(run.visited for run in runs))
        self.sites = sorted({transfer.site for run in runs for transfer in run.transfers})
        self.constants = _constants(runs)
        self.final = joined(run.final for run in runs)


def _constants(runs: Sequence[Exploration]) -> Results:
    """What the function returns, if those are few constants; else nothing."""
    values = {value for run in runs for value in run.results}
    constants = {value.offset for value in values if value is not None and value.base is None}
    return tuple(sorted(constants)) if len(constants) == len(values) <= _MAX_RESULTS else ()


def _kind(levels: list[Level]) -> WindowKind:
    """What becomes of the child, by the first level that tells it from its parent.

    The child lives on in the program when it returns where its parent does not (the parent waited and
    exits), or when it has the larger part of a function in which neither returns.
    """
    if not levels:
        return WindowKind.UNKNOWN
    first, beyond = levels[0], levels[1:]
    if first.returns and not first.parent_returns:
        return WindowKind.DAEMONIZE
    if "exec" in first.outcomes:
        return WindowKind.EXEC
    if not first.returns:
        return _kind_of_end(first)
    for level in beyond:
        if level.returns and not level.parent_returns:
            return WindowKind.DAEMONIZE
    if any("exec" in level.outcomes and not level.returns for level in beyond):
        return WindowKind.EXEC
    if beyond and beyond[-1].returns and beyond[-1].weight > 0 and _returns_as_child(beyond[-1]):
        return WindowKind.DAEMONIZE  # nothing calls this function: its return ends both, the child does more
    ends = {_kind_of_end(level) for level in beyond if not level.returns and level.weight}
    for kind in (WindowKind.DAEMONIZE, WindowKind.EXIT):  # who lives on in one of the callers comes to most
        if kind in ends:
            return kind
    return WindowKind.UNKNOWN


def _returns_as_child(level: Level) -> bool:
    """Where only memory tells the child from its parent, the call may have failed, and a return may be of that."""
    return bool(level.parent_values) or not level.outcomes & {"exec", "exit"}


def _kind_of_end(level: Level) -> WindowKind:
    """The child never leaves this function: it works here and exits, or it has taken the parent's place."""
    takes_over = not level.parent_returns and level.weight > 0
    return WindowKind.DAEMONIZE if takes_over or "exit" not in level.outcomes else WindowKind.EXIT
