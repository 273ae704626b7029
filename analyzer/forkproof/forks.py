"""Fork windows: every call that creates a process, and what its child runs afterwards.

Owns: finding the calls of forkers (library functions and raw system calls), following the child through
      the function that forks and, where it returns in the child, through the callers, and telling what
      becomes of the child.
Takes: `Flow`, and the forkers of the target's libc. Gives: `ForkWindow`s.
Must never: run anything, or assume that a wrapper is a forker because of its name.
Wrong where: the result of fork reaches the decision through memory that the exploration does not follow
      (then both sides count as the child's, which is said in the outcomes); where the caller of a
      wrapper calls it through a pointer (the window's kind is then unknown beyond that point).

How a child is told from its parent: the code after the call is followed twice, once with the result 0
and once with a positive one; branches that the result decides are taken on one side only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from forkproof.callgraph import EdgeKind, Function, Program, Reach
from forkproof.code.explore import Exploration
from forkproof.elf.image import Machine
from forkproof.elf.names import plainness
from forkproof.flow import Flow
from forkproof.model import WindowKind
from forkproof.signatures import Forker, ForkerKind, Signatures

_CLONE_VM: Final = 0x100
_PARENT_RESULT: Final = 0x5A5A
_MAX_LEVELS: Final = 24
"""Callers followed for one window; beyond, the rest of the child's life is unknown."""
_MAX_UNREACHED_LEVELS: Final = 4
_NEAR: Final = 3
"""A callee this close to exec is taken to be there for it."""
_CALL_KINDS: Final = frozenset({EdgeKind.DIRECT, EdgeKind.JUMP, EdgeKind.PLT, EdgeKind.GOT})


@dataclass(frozen=True, slots=True)
class Level:
    """The part of the child's life that runs in one function."""

    function: Function
    site: int
    """The call after which it begins."""
    edges: tuple[int, ...]
    """Call edges that the child can run here."""
    outcomes: frozenset[str]
    returns: bool
    parent_returns: bool
    child_result: int | None
    parent_result: int | None
    weight: int
    """Instructions that only the child can run, less those that only the parent can."""


@dataclass(frozen=True, slots=True)
class ForkWindow:
    """One call of a forker."""

    forker: str
    function: Function
    site: int
    handlers_run: bool
    shares_memory: bool
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
    shares_memory: bool
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
    objects = libc_objects or frozenset(range(len(program.codes)))
    plainest_first = sorted(known, key=plainness)
    return {function: known[name] for function, name in program.called(plainest_first, objects).items()}


def find_windows(flow: Flow, libc_objects: frozenset[int], roots: Reach) -> list[ForkWindow]:
    """All windows of the program, those of libc's own functions left out, in object and address order.

    `roots` is the distance of every function from the program's roots: callers of a wrapper that nothing
    reaches are followed only as far as needed to tell what the wrapper does.
    """
    result = []
    for site in sorted([*_sites(flow, libc_objects), *_raw_sites(flow, libc_objects)], key=lambda s: (s.function, s.site)):
        if site.kind == "spawn":
            result.append(_window(site, WindowKind.SPAWN, (), ("exec",), is_complete=True))
        elif site.kind == "clone":
            result.append(_clone(flow, site, roots))
        else:
            result.append(_Follower(flow, roots).window(site))
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
    for edge in np.flatnonzero(is_forker[graph.target] & np.isin(graph.kind, [int(k) for k in _CALL_KINDS])).tolist():
        function, site = Function(int(graph.source[edge])), int(graph.site[edge])
        if function in forkers or (function, site) in seen or _is_libc_code(flow, function, libc_objects):
            continue
        seen.add((function, site))
        forker = forkers[Function(int(graph.target[edge]))]
        whole = flow.whole(function)
        yield _Site(
            forker.name, forker.kind, forker.handlers_run, _shares_memory(flow, forker, whole, site), whole, site,
            _is_jump(flow, function, site), forker.callback,
        )  # fmt: skip


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


def _shares_memory(flow: Flow, forker: Forker, function: Function, site: int) -> bool:
    if forker.kind == "vfork":
        return True
    if forker.kind != "clone" or forker.flags is None:
        return False
    flags = flow.constant_before(function, site, flow.convention.arguments[forker.flags])
    return flags is not None and bool(flags & _CLONE_VM)


def _raw_sites(flow: Flow, libc_objects: frozenset[int]) -> Iterator[_Site]:
    """System calls that create a process, made with syscall(2) or with the instruction itself."""
    calls = flow.signatures.raw_process_syscalls(flow.machine.value)
    arguments = flow.convention.arguments
    seen = set()
    for function, site, number_register, shift in _system_calls(flow, libc_objects):
        number = flow.constant_before(function, site, number_register)
        call = calls.get(number) if number is not None else None
        if call is None or (function, site) in seen or function in flow.forkers:
            continue
        seen.add((function, site))
        flags = flow.constant_before(function, site, arguments[shift]) if call.flags == "argument-0" else None
        creates = call.creates(flags)
        if creates != "thread":
            shared = creates == "shared"
            # In a static program without names the instruction stands in libc's own fork, handlers and all.
            runs_handlers = len(flow.program.codes) == 1 and not flow.forkers
            yield _Site(call.name, "vfork" if shared else "fork", runs_handlers, shared, function, site, False)


def _system_calls(flow: Flow, libc_objects: frozenset[int]) -> Iterator[tuple[Function, int, str, int]]:
    """(function, site, register of the number, index of the first argument) of system calls outside libc."""
    graph, program = flow.graph, flow.program
    for target in program.called(["syscall"]):
        for edge in graph.edges_to(target):
            function = Function(int(graph.source[edge]))
            if graph.kind[edge] in _CALL_KINDS and not _is_libc_code(flow, function, libc_objects):
                yield flow.whole(function), int(graph.site[edge]), flow.convention.arguments[0], 1
    for obj, code in enumerate(program.codes):
        if obj in libc_objects and len(program.codes) > 1:
            continue
        sites = code.sites.syscalls
        for site, owner in zip(sites.tolist(), code.owners(sites).tolist(), strict=True):
            if owner >= 0:
                function = flow.whole(Function(int(program.base[obj]) + owner))
                if not _is_libc_code(flow, function, libc_objects):
                    yield function, site, flow.convention.syscall_number, 0


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
        state = flow.states(site.function, [site.site]).get(site.site)
        callback = flow.passed(site.function, state, site.callback).function if state else None
    if callback is None:
        return _window(site, WindowKind.UNKNOWN, (), (), is_complete=False)
    level = _Follower(flow, roots).level(callback, flow.program.rva_of(callback), site.site, {}, {})
    kind = WindowKind.EXEC if "exec" in level.outcomes else WindowKind.EXIT
    return _window(site, kind, (level,), tuple(sorted(level.outcomes | {"exit"})), is_complete=True)


class _Follower:
    """Follows one child; a new instance for each window."""

    def __init__(self, flow: Flow, roots: Reach) -> None:
        self.flow, self.roots = flow, roots
        self.is_complete = True

    def window(self, site: _Site) -> ForkWindow:
        """The child of one call of fork, vfork or daemon."""
        levels = self._levels(site)
        outcomes = sorted(set().union(*(level.outcomes for level in levels)) if levels else set())
        kind = WindowKind.DAEMONIZE if site.kind == "daemon" else _kind(levels)
        return _window(site, kind, tuple(levels), tuple(outcomes), is_complete=self.is_complete)

    def _levels(self, site: _Site) -> list[Level]:
        child = 0
        limit = _MAX_LEVELS if self.roots[site.function] >= 0 else _MAX_UNREACHED_LEVELS
        parent_ends = site.kind == "daemon"
        levels: list[Level] = []
        if site.is_jump:
            pending = self._callers(site.function, child, None if parent_ends else _PARENT_RESULT)
        else:
            pending = [(site.function, site.site, child, None if parent_ends else _PARENT_RESULT)]
        seen = {(function, place) for function, place, _, _ in pending}
        while pending:
            function, place, child_result, parent_result = pending.pop(0)
            if len(levels) >= limit:
                self.is_complete = False
                break
            level = self.after(function, place, child_result, parent_result)
            levels.append(level)
            if not level.returns:
                continue
            for caller in self._callers(function, level.child_result, level.parent_result):
                if caller[:2] not in seen:
                    seen.add(caller[:2])
                    pending.append(caller)
        return levels

    def _callers(
        self, function: Function, child: int | None, parent: int | None
    ) -> list[tuple[Function, int, int | None, int | None]]:
        """Where the child goes on after `function` returned; tail calls are passed through."""
        graph = self.flow.graph
        result: list[tuple[Function, int, int | None, int | None]] = []
        pending, seen = [function], {function}
        while pending:
            callee = pending.pop()
            for edge in graph.edges_to(callee):
                if graph.kind[edge] not in _CALL_KINDS:
                    continue
                source, site = Function(int(graph.source[edge])), int(graph.site[edge])
                caller = self.flow.whole(source)
                if not _is_jump(self.flow, source, site):
                    result.append((caller, site, child, parent))
                elif caller not in seen:
                    seen.add(caller)
                    pending.append(caller)
        return sorted(set(result), key=lambda item: (item[0], item[1]))

    def after(self, function: Function, site: int, child: int | None, parent: int | None) -> Level:
        """What the child can do in `function` after the call at `site`."""
        register = self.flow.convention.result
        body = self.flow.body(function)
        position = body.position(site)
        if position is None:
            return Level(function, site, (), frozenset({"unknown"}), False, False, None, None, 0)
        start = body.instructions[position].end
        known_child = {} if child is None else {register: child}
        known_parent = {} if parent is None else {register: parent}
        return self.level(function, start, site, known_child, known_parent)

    def level(
        self, function: Function, start: int, site: int, child: dict[str, int], parent: dict[str, int]
    ) -> Level:
        """Explore from `start` as the child and as the parent."""
        flow = self.flow
        run = flow.explore_from(function, start, child, flow.execs)
        other = flow.explore_from(function, start, parent, flow.execs) if parent else None
        edges = tuple(e for t in run.transfers for e in flow.edges_at(function, t.site))
        return Level(
            function,
            site,
            tuple(dict.fromkeys(edges)),
            self._outcomes(run, edges),
            run.returns,
            other.returns if other else run.returns,
            _constant(run),
            _constant(other) if other else None,
            len(run.visited - other.visited) - len(other.visited - run.visited) if other else 0,
        )

    def _outcomes(self, run: Exploration, edges: tuple[int, ...]) -> frozenset[str]:
        flow, graph = self.flow, self.flow.graph
        found = set()
        for edge in edges:
            target = Function(int(graph.target[edge]))
            if target in flow.forkers:
                found.add("fork")
            elif 0 <= flow.to_exec[target] <= _NEAR:
                found.add("exec")
            elif not flow.returns(target):
                found.add("exec" if flow.to_exec[target] >= 0 and not self._is_abnormal(target) else "exit")
        if run.returns:
            found.add("return")
        elif not found & {"exec", "exit"}:
            found.add("loop")
        return frozenset(found)

    def _is_abnormal(self, function: Function) -> bool:
        """abort, assertion failures and the like: how a program dies, not what its child is for."""
        program = self.flow.program
        obj = program.object_of(function)
        names = program.names[obj].aliases(program.rva_of(function))
        signatures = self.flow.signatures
        return any(n in signatures.noreturn or n in signatures.exit_names for n in names)


def _constant(run: Exploration) -> int | None:
    """The one constant that every return gives, if so."""
    if len(run.results) != 1 or run.results[0] is None or run.results[0].base is not None:
        return None
    return run.results[0].offset


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
    if any(not level.returns and level.weight for level in beyond):
        return next(_kind_of_end(level) for level in beyond if not level.returns and level.weight)
    return WindowKind.UNKNOWN


def _kind_of_end(level: Level) -> WindowKind:
    """The child never leaves this function: it works here and exits, or it has taken the parent's place."""
    takes_over = not level.parent_returns and level.weight > 0
    return WindowKind.DAEMONIZE if takes_over or "exit" not in level.outcomes else WindowKind.EXIT
