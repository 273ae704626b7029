"""Which locks of an allocator its fork handlers take, and which they leave.

Owns: the comparison of what the allocation paths can take with what the prepare handler holds when it returns.
Takes: `Summaries`, the allocation functions, a registration. Gives: `Coverage`.
Must never: count a lock that prepare takes and lets go again; count an unresolved address as uncovered.
Wrong where: the handler takes a lock through an object that only the run knows and no field tells (then the lock is
      unresolved); where a lock is taken only on ways that no input takes.

A lock of the allocation paths is
  covered     prepare holds it at its exit (or assumed to: the same field of the same kind of object);
  gated       each time that it is taken, a covered lock is held: nobody can hold it across a fork;
  nested      each time that it is taken, one and the same uncovered lock is held, which the child meets first;
  uncovered   neither, and its address is known;
  unresolved  neither, and its address is not known; one for each place where such a lock is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from forkproof.callgraph import CALLS
from forkproof.code.decode import Body
from forkproof.code.operations import Const, Memory, Set
from forkproof.locks.chosen import Stores
from forkproof.locks.identity import Match, is_resolved
from forkproof.locks.runs import Held
from forkproof.locks.summary import Summaries, Taken, openness
from forkproof.locks.values import TELLING, Content, Entry, Object, Value, chain, root
from forkproof.program import Function

Same = Callable[[Value, Value], Match]


class Cover(Enum):
    """What becomes of a lock at a fork."""

    COVERED = "covered"
    ASSUMED = "assumed covered"
    GATED = "gated"
    NESTED = "nested"
    UNCOVERED = "uncovered"
    UNRESOLVED = "unresolved"


@dataclass(frozen=True, slots=True)
class AllocatorLock:
    """One lock of the allocation paths."""

    taken: Taken
    """The most open way to it; its first step is an allocation function."""
    entries: int
    """How many of the allocation functions can take it."""
    cover: Cover


@dataclass(frozen=True, slots=True)
class Coverage:
    """All locks of an allocator's allocation paths."""

    locks: tuple[AllocatorLock, ...]
    prepared: tuple[Value, ...]
    kept_in_child: tuple[Value, ...]
    """Locks that prepare holds and the child handler does not let go."""
    is_complete: bool
    """False where a computed jump hid some of the handler."""

    @property
    def uncovered(self) -> tuple[AllocatorLock, ...]:
        """Those that a child can inherit taken."""
        return tuple(lock for lock in self.locks if lock.cover is Cover.UNCOVERED)


def taken_by(
    summaries: Summaries, entries: Iterable[Function], objects: Iterable[int]
) -> dict[Value, tuple[Taken, int]]:
    """The locks of these objects that functions can wait for: the most open way to each, and how many lead there."""
    wanted = frozenset(objects)
    found: dict[Value, tuple[Taken, int]] = {}
    for entry in entries:
        for taken in summaries.of(entry).taken:
            if not taken.blocking or not _is_of(summaries, taken, wanted):
                continue
            old = found.get(taken.address)
            if old is None:
                found[taken.address] = taken, 1
            else:
                best = min(old[0], taken, key=openness)
                found[taken.address] = best._replace(gates=old[0].gates & taken.gates), old[1] + 1
    return found


def _is_of(summaries: Summaries, taken: Taken, objects: frozenset[int]) -> bool:
    """The lock lies in one of the objects, or code of them takes it from somewhere unknown."""
    begin = root(taken.address.base)
    if isinstance(begin, Object):
        return begin.number in objects
    return summaries.program.object_of(taken.path[-1].function) in objects


def prepared_by(summaries: Summaries, prepare: Function) -> tuple[Held, bool]:
    """What a prepare handler holds at its exit, on whichever way it gets there, and whether all of it was seen."""
    if prepare not in summaries.prepared:
        run = summaries.interpreted_run(prepare, frozenset(), joined=True)
        summaries.prepared[prepare] = frozenset().union(*(e.held for e in run.exits)), run.complete
    return summaries.prepared[prepare]


def tried_by(summaries: Summaries, prepare: Function) -> Held:
    """What a prepare handler only tries to take, and goes on without: it may hold that at its exit, or not."""
    run, taken = summaries.run(prepare), summaries.of(prepare).taken
    waited_for = {t.address for t in taken if t.blocking}
    tried = {t.address for t in taken if not t.blocking} | run.touched
    undone = waited_for | run.releases | run.let_go | set(run.stores)
    return frozenset(a for a in tried - undone if any(a not in e.held for e in run.exits))


def surely_lets_go(summaries: Summaries, function: Function, address: Value) -> bool:
    """Every way through a function leads over a call that releases a lock or makes it new, if it has it."""
    run = summaries.interpreted_run(function, frozenset({address}), frozenset({address}))
    edges = summaries.flow.outgoing(function)
    sites = [
        int(summaries.graph.site[e]) for e in edges if _releases(summaries, Function(int(summaries.graph.target[e])))
    ]
    return address in run.let_go and run.blocks.surely_reaches({run.block_of(site) for site in sites})


def _releases(summaries: Summaries, callee: Function) -> bool:
    lock = summaries.library.get(callee)
    return bool(summaries.of(callee).releases) if lock is None else lock.op in ("release", "init")


def coverage(
    summaries: Summaries,
    entries: Iterable[Function],
    objects: Iterable[int],
    handlers: tuple[Function | None, Function | None],
) -> Coverage:
    """Compare allocation paths with a prepare and a child handler."""
    prepare, child = handlers
    prepared, complete = prepared_by(summaries, prepare) if prepare is not None else (frozenset(), True)
    same = summaries.arrays.same
    kept = _kept(summaries, child, prepared) if child is not None and complete else ()
    found = taken_by(summaries, entries, objects)
    covers = {address: _cover(same, address, prepared) for address in found}
    for address in (a for a, cover in covers.items() if cover is Cover.UNCOVERED):
        if _is_kept_where(summaries, address, prepared):
            covers[address] = Cover.ASSUMED
    locks: dict[object, AllocatorLock] = {}
    for address, (taken, count) in found.items():
        cover = covers[address]
        if cover in (Cover.UNCOVERED, Cover.UNRESOLVED):
            if _is_gated(same, taken, prepared):
                cover = Cover.GATED
            elif any(covers.get(gate) is Cover.UNCOVERED and gate != address for gate in taken.gates):
                cover = Cover.NESTED
        key = _place(summaries, taken) if cover is Cover.UNRESOLVED else address
        if key not in locks or openness(taken) < openness(locks[key].taken):
            locks[key] = AllocatorLock(taken, count, cover)
    ordered = sorted(locks.values(), key=lambda lock: (len(lock.taken.path), repr(lock.taken.address)))
    return Coverage(tuple(ordered), tuple(sorted(prepared, key=repr)), kept, complete)


def _place(summaries: Summaries, taken: Taken) -> object:
    """What tells a lock without a known address: the place where it is taken, and the field that it is there.

    A function that locks what it is given tells nothing: then it is who calls that.
    """
    last = taken.path[-1].function
    is_method = any(t.address.offset == 0 and isinstance(t.address.base, Entry) for t in summaries.of(last).taken)
    return taken.path[-2:] if is_method else (taken.path[-1], chain(taken.address))


def _kept(summaries: Summaries, child: Function, prepared: Held) -> tuple[Value, ...]:
    """Prepared locks that no way through the child handler lets go or makes anew, of those that are known for sure."""
    run = summaries.interpreted_run(child, prepared, prepared, joined=True)
    if not run.complete or not run.exits:
        return ()
    freed, same = run.releases | run.let_go, summaries.arrays.same
    return tuple(sorted((p for p in prepared if is_resolved(p) and not any(same(p, f) for f in freed)), key=repr))


def _cover(same: Same, address: Value, prepared: Held) -> Cover:
    best = max((same(address, p) for p in prepared), default=Match.NO)
    if best is Match.EXACT:
        return Cover.COVERED
    if best is Match.ASSUMED:
        return Cover.ASSUMED
    return Cover.UNCOVERED if is_resolved(address) else Cover.UNRESOLVED


def _is_kept_where(summaries: Summaries, address: Value, prepared: Held) -> bool:
    """A lock behind a global pointer may be one behind a field: a function that has the pointer stores that field.

    So jemalloc's first base: arenas are walked by prepare, each with its base; the first arena is given that one.
    """
    pointer = address.base
    if not isinstance(pointer, Content) or not isinstance(pointer.base, Object):
        return False
    behind = (p.base for p in prepared if p.offset == address.offset and isinstance(p.base, Content))
    fields = {b.offset for b in behind if b.offset >= TELLING and not isinstance(b.base, Object)}
    if not fields:
        return False
    flow, graph, word = summaries.flow, summaries.graph, Value(pointer.base, pointer.offset)
    stores = Stores(summaries, lambda _: True)
    places = set(stores.places(word))
    naming = [f for f in stores.naming(word) if _loads(flow.body(f), places)]
    giving = [f for f in naming if summaries.given(f) == Value(pointer, 0)]
    asking = {Function(int(graph.source[e])) for f in giving for e in graph.edges_to(f) if int(graph.kind[e]) in CALLS}
    return any(
        isinstance(o, Set) and isinstance(o.destination, Memory) and o.destination.displacement in fields
        for function in {*naming, *asking}
        for instruction in flow.body(function).instructions
        for o in instruction.operations
    )


def _loads(body: Body, places: set[int]) -> bool:
    """A function loads a word at one of these addresses: AArch64's finder tells no more than a page."""
    sets = [(i, o) for i in body.instructions for o in i.operations if isinstance(o, Set)]
    pages = {o.source.value for _, o in sets if isinstance(o.source, Const)}
    loads = [(i, o.source) for i, o in sets if isinstance(o.source, Memory) and not o.source.indexed]
    return any(base + m.displacement in places for i, m in loads for base in ((i.end,) if m.base == "pc" else pages))


def _is_gated(same: Same, taken: Taken, prepared: Held) -> bool:
    return any(same(gate, p) is not Match.NO for gate in taken.gates for p in prepared)
