"""The call graph of a whole closure: every object's edges with their kind, in one set of columns.

Owns: the resolution of sites to functions through PLT, GOT, bindings and callback arguments, and searches over the
      result.
Takes: the linked `Program` and the signatures of callbacks.
Gives: a `CallGraph`.
Must never: treat an unknown target as no target: unknown calls are counted by function.
Wrong where: a callback's address reaches the call through a variable (then the edge is missing and the
      call stands as unknown); where a table is filled at run time; where code is generated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from forkproof.arguments import address_arguments, followed_arguments
from forkproof.code.values import Value
from forkproof.columns import among, position_in, spans, unique
from forkproof.program import Columns, Function, Program, slot_columns
from forkproof.signatures import Signatures

Reach = npt.NDArray[np.int32]
"""A distance in edges for every function; -1 where there is no path."""


class EdgeKind(IntEnum):
    """How a caller leads to a callee; the names are the report's words."""

    DIRECT = 1
    """A call instruction that names the function."""
    JUMP = 2
    """A tail call, or a jump to the function's cold part."""
    PLT = 3
    GOT = 4
    """A call through a GOT slot (-fno-plt, weak references)."""
    CALLBACK = 5
    """The callee is passed to a function that calls it before it returns."""
    IFUNC = 6
    """The callee may be chosen by an IFUNC resolver."""
    THREAD = 7
    """The callee is started in a new thread."""
    DEFERRED = 8
    """The callee is passed to a function that keeps it for later (exit, event loop)."""
    TABLE = 9
    """The caller refers to a constant table that holds the callee: low confidence."""
    FIELD = 10
    """A thread's code calls through a field of an object into which the callee is put: of which object is not known."""
    DYNAMIC = 11
    """The same where the callee is one of several that objects hold in one place."""


CERTAIN: Final = frozenset(
    {EdgeKind.DIRECT, EdgeKind.JUMP, EdgeKind.PLT, EdgeKind.GOT, EdgeKind.CALLBACK, EdgeKind.IFUNC}
)
"""Edges of one thread's own control flow."""
CALLS: Final = frozenset({EdgeKind.DIRECT, EdgeKind.JUMP, EdgeKind.PLT, EdgeKind.GOT})
"""Edges of instructions that transfer control to the callee themselves."""
_BLOCKED: Final = -2


EdgeColumns = tuple[Columns, Columns, Columns, npt.NDArray[np.uint8]]
"""Sources, targets, sites and kinds of edges, in any order."""


@dataclass(frozen=True, eq=False)
class ImportCalls:
    """Calls through loader-filled slots that name a symbol, bound or not, as parallel columns."""

    object: Columns
    caller: Columns
    site: Columns
    symbol: Columns
    target: Columns
    """Function number, or -1 where the reference binds to no function."""


class _Steps(NamedTuple):
    """Edges of some kinds, sorted by where a step along them begins."""

    begin: Columns
    """Of each function, the first of its steps; one more than there are functions."""
    end: npt.NDArray[np.int32]
    """The function that each step leads to."""


class Start(NamedTuple):
    """A start of a thread."""

    caller: int
    site: int
    entry: int
    """What it begins in."""


Given = tuple[int, Value]
"""A value in the words of the function that starts a thread, and the object whose addresses it has."""


@dataclass(frozen=True, eq=False)
class CallGraph:
    """Edges as parallel columns, sorted by source and site."""

    program: Program
    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    site: Columns
    kind: npt.NDArray[np.uint8]
    imports: ImportCalls
    given: Mapping[Start, Given] = field(default_factory=dict)
    """What threads get that begin by way of wrappers."""

    @property
    def size(self) -> int:
        """Number of functions."""
        return int(self.program.base[-1])

    @cached_property
    def _out(self) -> Columns:
        return np.searchsorted(self.source, np.arange(self.size + 1))

    @cached_property
    def _by_target(self) -> npt.NDArray[np.int32]:
        # Sorting packed numbers is several times faster than argsort.
        packed = self.target.astype(np.int64) << 32 | np.arange(len(self.target))
        packed.sort()
        return (packed & 0xFFFFFFFF).astype(np.int32)

    @cached_property
    def _numbers(self) -> npt.NDArray[np.int32]:
        return np.arange(len(self.target), dtype=np.int32)

    @cached_property
    def _in(self) -> Columns:
        return np.searchsorted(self.target[self._by_target], np.arange(self.size + 1))

    def grown(self, more: list[EdgeColumns], given: Mapping[Start, Given] | None = None) -> CallGraph:
        """The same with a few more edges, put into their places: to sort all of them again takes longer."""
        if not more:
            return self
        source, target, site, kind = concatenated(more)
        order = np.argsort(_order(source, site), kind="stable")
        source, target, site, kind = source[order], target[order], site[order], kind[order]
        at = _order(self.source, self.site).searchsorted(_order(source, site), side="right")
        grown = CallGraph(
            self.program,
            np.insert(self.source, at, source),
            np.insert(self.target, at, target),
            np.insert(self.site, at, site),
            np.insert(self.kind, at, kind),
            self.imports,
            given or self.given,
        )
        # The same for the order by targets: all edges of one target are in order.
        new = at + np.arange(len(at))
        moved = np.delete(grown._numbers, new)[self._by_target]
        by = np.lexsort((new, target))
        to = target[by]
        room = zip(self._in[to].tolist(), self._in[to + 1].tolist(), new[by].tolist(), strict=True)
        place = [first + int(moved[first:last].searchsorted(position)) for first, last, position in room]
        every = np.arange(self.size + 1)
        vars(grown).update(
            _by_target=np.insert(moved, place, new[by]),
            _in=self._in + to.searchsorted(every),
            _out=self._out + source.searchsorted(every),
        )
        return grown

    def edges_from(self, function: Function) -> range:
        """Edge positions that leave a function, in site order."""
        return range(int(self._out[function]), int(self._out[function + 1]))

    def rows_from(self, function: Function) -> Iterator[tuple[int, int, int, int]]:
        """(edge position, target, site, kind) of what leaves a function, as plain numbers: for loops."""
        first, last = int(self._out[function]), int(self._out[function + 1])
        columns = (column[first:last].tolist() for column in (self.target, self.site, self.kind))
        return zip(range(first, last), *columns, strict=True)

    def rows_of(self, functions: Columns) -> Columns:
        """Edge positions that leave any of these functions."""
        return spans(self._out[functions], self._out[functions + 1])

    def edges_to(self, function: Function) -> list[int]:
        """Edge positions that lead to a function."""
        found: list[int] = self.rows_to(function).tolist()
        return found

    def rows_to(self, function: Function) -> npt.NDArray[np.int32]:
        """`edges_to` as a column: for functions that are called from everywhere."""
        return self._by_target[self._in[function] : self._in[function + 1]]

    @cached_property
    def only_jumped_to(self) -> npt.NDArray[np.bool_]:
        """Functions that no edge but jumps leads to."""
        found = np.ones(self.size, bool)
        found[self.target[self.kind != EdgeKind.JUMP]] = False
        return found

    def distances(
        self,
        roots: Iterable[int],
        kinds: Iterable[EdgeKind] = CERTAIN,
        *,
        backward: bool = False,
        blocked: Iterable[int] | npt.NDArray[np.bool_] = (),
        without: Collection[int] = (),
        until: Collection[int] = (),
    ) -> Reach:
        """Number of edges from the nearest root to each function (or from it to a root); -1: no path.

        No path leads through a `blocked` function, or along an edge of `without`. With `until`, what is farther than
        the nearest of those functions is not looked for.

        Breadth first, one vectorised step a level: O(edges) in all.
        """
        along = frozenset(kinds)
        pointers, step = self._steps(along, backward)
        if without:  # a step that leads back to where it begins leads nowhere
            step, begins = step.copy(), self.target if backward else self.source
            edges = self._stepped(along, backward)
            for edge in without:
                begin = begins[edge]
                first, last = pointers[begin], pointers[begin + 1]
                at = first + edges[first:last].searchsorted(edge)  # of one function's steps, the edges are in order
                if at < last and edges[at] == edge:
                    step[at] = begin
        distance = np.full(self.size, -1, np.int32)
        distance[blocked if isinstance(blocked, np.ndarray) else list(blocked)] = _BLOCKED
        frontier = unique(np.fromiter(map(int, roots), np.int64))
        distance[frontier] = 0
        place = np.empty(self.size, np.int32)
        wanted = np.array(list(until), np.int64)
        level = 0
        while len(frontier) and not (len(wanted) and distance[wanted].max() >= 0):
            level += 1
            ends = step[spans(pointers[frontier], pointers[frontier + 1])]
            new = ends[distance[ends] == -1]
            # Each once, in any order: the last that put its number in the function's place. Sorting costs more.
            numbers = self._numbers[: len(new)]
            place[new] = numbers
            frontier = new[place[new] == numbers]
            distance[frontier] = level
        distance[distance == _BLOCKED] = -1
        return distance

    def _steps(self, kinds: frozenset[EdgeKind], backward: bool) -> _Steps:
        """The steps along edges of some kinds; searches repeat, with the same kinds."""
        known = self._known_steps.get((kinds, backward))
        if known is None:
            begins, ends = (self._in, self.source) if backward else (self._out, self.target)
            edges = self._by_target if backward else self._numbers
            usable = among(self.kind, kinds)[edges]
            before = np.zeros(len(edges) + 1, np.int64)
            np.cumsum(usable, out=before[1:])
            known = self._known_steps[kinds, backward] = _Steps(before[begins], ends[edges[usable]])
        return known

    def _stepped(self, kinds: frozenset[EdgeKind], backward: bool) -> npt.NDArray[np.int32]:
        """The edge that each step goes along. Kept apart, as few searches leave any out: it takes a megabyte or two."""
        found = self._known_stepped.get((kinds, backward))
        if found is None:
            edges = self._by_target if backward else self._numbers
            found = self._known_stepped[kinds, backward] = edges[among(self.kind, kinds)[edges]]
        return found

    @cached_property
    def _known_stepped(self) -> dict[tuple[frozenset[EdgeKind], bool], npt.NDArray[np.int32]]:
        return {}

    @cached_property
    def _known_steps(self) -> dict[tuple[frozenset[EdgeKind], bool], _Steps]:
        return {}

    def spread(self, reached: npt.NDArray[np.bool_], new: Columns, kinds: Iterable[EdgeKind]) -> None:
        """Add to `reached` the functions `new` and what leads on from them."""
        allowed = np.zeros(max(EdgeKind) + 1, bool)
        allowed[[int(k) for k in kinds]] = True
        while len(new):
            reached[new] = True
            edges = spans(self._out[new], self._out[new + 1])
            ends = self.target[edges[allowed[self.kind[edges]]]]
            new = unique(ends[~reached[ends]])

    def path(
        self,
        start: Function,
        distance: Reach,
        kinds: Iterable[EdgeKind] = CERTAIN,
        *,
        without: Collection[int] = (),
        slack: int = 0,
    ) -> list[int] | None:
        """Edge positions of a shortest path from `start` along falling `distance` (backward distances).

        Among equals, the more certain kind and then the first site win, so the answer is stable. With `slack`, the
        path may be longer by as many edges, and the first site wins: what is called first is asked for first.
        """
        allowed = frozenset(kinds)
        if distance[start] < 0:
            return None
        result = []
        here = start
        while distance[here] > 0:
            steps = [
                e
                for e in self.edges_from(here)
                if 0 <= distance[self.target[e]] < distance[here] + slack
                and EdgeKind(self.kind[e]) in allowed
                and e not in without
            ]
            best = min(steps, key=lambda e: (0 if slack else self.kind[e], self.site[e]))
            slack -= int(distance[self.target[best]] - distance[here]) + 1
            result.append(best)
            here = Function(int(self.target[best]))
        return result


# ---- building ---------------------------------------------------------------------------------


def build(program: Program, signatures: Signatures) -> CallGraph:
    """Resolve every site of every object.

    1. direct branches, and branches to stubs;
    2. calls through GOT slots;
    3. IFUNC resolvers to what they choose from;
    4. calls through registers, of the few functions on which all depends, and of what leads to those;
    5. callbacks: address arguments of functions that call them;
    6. what is handed over in closures, and by way of wrappers of what starts threads;
    7. what is put into fields that threads call through.
    Table edges are left to `forkproof.tables`: most questions do not need them.
    """
    # Imported here, since they take what this module makes.
    from forkproof.fields import field_edges
    from forkproof.handed import handed_edges
    from forkproof.registers import edges_leading_on, register_edges

    parts: list[EdgeColumns] = []
    imports: list[ImportCalls] = []
    for obj in range(len(program.codes)):
        edges, calls = _object_edges(program, obj)
        parts += edges
        imports.append(calls)
    parts += register_edges(program, signatures)
    joined = ImportCalls(*(np.concatenate([getattr(c, n) for c in imports]) for n in ImportCalls.__dataclass_fields__))
    parts += _callback_edges(program, concatenated(parts), signatures)
    graph = sorted_graph(program, parts, joined)
    graph = graph.grown(edges_leading_on(graph, signatures))
    graph = graph.grown(*handed_edges(graph, signatures))
    return graph.grown(field_edges(graph, signatures))


def concatenated(parts: list[EdgeColumns]) -> EdgeColumns:
    source, target, site, kind = (np.concatenate(column) for column in zip(*parts, strict=True))
    return source, target, site, kind


def sorted_graph(program: Program, parts: list[EdgeColumns], imports: ImportCalls) -> CallGraph:
    source, target, site, kind = concatenated(parts)
    order = np.argsort(_order(source, site), kind="stable").astype(np.int32)
    callers, callees = source[order].astype(np.int32), target[order].astype(np.int32)
    return CallGraph(program, callers, callees, site[order], kind[order].astype(np.uint8), imports)


def _order(source: npt.NDArray[np.integer], site: Columns) -> Columns:
    """One key instead of two: function numbers stay below 2**22, addresses below 2**41."""
    return source.astype(np.int64) << 41 | site


def known_edges(source: Columns, target: Columns, site: Columns, kind: npt.NDArray[np.integer]) -> EdgeColumns:
    known = (source >= 0) & (target >= 0)
    return source[known], target[known], site[known], kind[known].astype(np.uint8)


def _object_edges(program: Program, obj: int) -> tuple[list[EdgeColumns], ImportCalls]:
    code, base = program.codes[obj], int(program.base[obj])
    sites = code.sites
    to_function = np.searchsorted(code.start, sites.direct_target)
    is_start = to_function < len(code.start)
    is_start[is_start] = code.start[to_function[is_start]] == sites.direct_target[is_start]
    local = np.where(is_start, to_function + base, -1)
    caller = np.where(code.direct_owner >= 0, code.direct_owner + base, -1)
    plain = np.where(sites.direct_jump, int(EdgeKind.JUMP), int(EdgeKind.DIRECT))
    edges = [known_edges(caller, local, sites.direct_site, plain)]

    stub = np.searchsorted(code.stubs.start, sites.direct_target)
    is_stub = ~is_start & (stub < len(code.stubs.start))
    is_stub[is_stub] = code.stubs.start[stub[is_stub]] == sites.direct_target[is_stub]
    slot_caller = np.where(code.slot_owner >= 0, code.slot_owner + base, -1)
    via = np.concatenate([code.stubs.slot[stub[is_stub]], sites.slot_address])
    callers = np.concatenate([caller[is_stub], slot_caller])
    places = np.concatenate([sites.direct_site[is_stub], sites.slot_site])
    kinds = np.concatenate([np.full(int(is_stub.sum()), EdgeKind.PLT), np.full(len(slot_caller), EdgeKind.GOT)])
    symbol, target = slot_columns(program, obj, via)
    edges.append(known_edges(callers, target, places, kinds))
    named = (symbol >= 0) & (callers >= 0)
    calls = ImportCalls(np.full(int(named.sum()), obj), callers[named], places[named], symbol[named], target[named])
    edges += _resolver_edges(program, obj)
    return edges, calls


def _resolver_edges(program: Program, obj: int) -> list[EdgeColumns]:
    """IFUNC resolvers lead to every function whose address they take."""
    code, base = program.codes[obj], int(program.base[obj])
    chosen = position_in(code.ifunc_resolvers, code.taken_owner) >= 0
    target = np.searchsorted(code.start, code.sites.taken_target[chosen])
    kind = np.full(len(target), EdgeKind.IFUNC)
    return [known_edges(code.taken_owner[chosen] + base, target + base, code.sites.taken_site[chosen], kind)]


# ---- callbacks --------------------------------------------------------------------------------

WHEN_KINDS: Final[Mapping[str, EdgeKind | None]] = {
    "during": EdgeKind.CALLBACK,
    "later": EdgeKind.DEFERRED,
    "exit": EdgeKind.DEFERRED,
    "thread-exit": EdgeKind.DEFERRED,
    "new-thread": EdgeKind.THREAD,
    "new-process": None,
    "prepare": None,
    "parent": None,
    "child": None,
}


def callback_roles(signatures: Signatures) -> dict[str, list[tuple[int, EdgeKind]]]:
    """Argument index and edge kind for every function that calls or starts its argument."""
    roles: dict[str, list[tuple[int, EdgeKind]]] = {}
    for name, callback in signatures.callbacks.items():
        for argument, when in zip(callback.arguments, callback.when, strict=True):
            if (kind := WHEN_KINDS[when]) is not None and callback.word is None:
                roles.setdefault(name, []).append((argument, kind))
    for name, starter in signatures.thread_starters.items():
        if starter.callback is not None:
            roles.setdefault(name, []).append((starter.callback, EdgeKind.THREAD))
    return roles


def _callback_edges(program: Program, edges: EdgeColumns, signatures: Signatures) -> list[EdgeColumns]:
    """Edges from callers of functions with a role to the functions that they pass."""
    source, target, site, kind = edges
    roles = callback_roles(signatures)
    start = program.function(0, program.image(0).entry)
    by_target = {int(f): roles[name] for f, name in program.called(roles).items()}
    has_role = np.zeros(int(program.base[-1]), bool)
    has_role[list(by_target)] = True
    groups: dict[tuple[int, int, EdgeKind], list[int]] = {}
    # Whatever crt1 calls is given main as its first argument: that is how main is found in stripped
    # static programs, whose __libc_start_main has no name.
    groups[0, 0, EdgeKind.CALLBACK] = np.flatnonzero(source == (-1 if start is None else start)).tolist()
    for edge in np.flatnonzero(has_role[target] & (kind != EdgeKind.IFUNC)).tolist():
        obj = program.object_of(Function(int(source[edge])))
        for argument, role in by_target[int(target[edge])]:
            groups.setdefault((obj, argument, role), []).append(edge)
    parts = []
    for (obj, argument, role), members in sorted(groups.items()):
        chosen = np.array(members, np.int64)
        passed = address_arguments(program, obj, site[chosen], argument)
        if role is EdgeKind.THREAD:
            passed = followed_arguments(program, obj, site[chosen], argument, passed)
        parts.append(known_edges(source[chosen], passed, site[chosen], np.full(len(chosen), role)))
    return parts
