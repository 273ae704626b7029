"""atfork-order: fork handlers that run in an order in which one waits for what another holds.

Owns: the order in which registrations take place, where it is known, and a fork simulated over them.
Takes: `Facts`. Gives: findings.
Must never: report two handlers whose order of registration is not known.
Wrong where: a registration happens only under a condition; where two constructors of one object both register.

Prepare handlers run last registered first, parent and child handlers first registered first (pthread_atfork(3)).
Four things go wrong:
  1. a prepare handler waits for a lock that one that ran before it holds: every fork hangs;
  2. a child handler waits for a lock that a later one is to release: every child hangs;
  3. two prepare handlers take their locks in one order and a thread takes the same two in the other: a fork
     and that thread wait for each other;
  4. a function forks while it holds a lock that a prepare handler waits for: its fork waits for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from forkproof.atfork import Registration
from forkproof.callgraph import CALLS, CERTAIN, EdgeKind
from forkproof.facts import Facts, WindowFacts
from forkproof.forks import Level
from forkproof.locks.chosen import Stores
from forkproof.locks.coverage import prepared_by
from forkproof.locks.identity import Match, is_resolved, lock_of
from forkproof.locks.summary import Taken, step_frames
from forkproof.locks.values import Object, Value
from forkproof.model import Answer, Finding, Lock, Severity, Verdict
from forkproof.program import Function

_MOST_FUNCTIONS: Final = 500
"""Functions with locks below a thread's entry; what does more is not followed for the order of its locks."""
_KIND: Final = 16
"""Where glibc's pthread_mutex_t says what kind it is (struct __pthread_mutex_s, 64-bit)."""
_RECURSIVE: Final = 1
_CALLED_LATER: Final = CERTAIN | {EdgeKind.DEFERRED, EdgeKind.THREAD}


@dataclass(frozen=True, slots=True)
class _Holding:
    """A lock that a prepare handler has taken and kept."""

    address: Value
    by: Registration


def find(facts: Facts) -> list[Finding]:
    """What goes wrong between the handlers that the program registers."""
    windows = [w for w in facts.windows if w.window.handlers_run and w.reachable is not Answer.NO]
    if not windows or not any(r.is_effective for r in facts.registrations):
        return []
    near = _near(facts, windows)
    found = {finding.id: finding for window in windows for finding in _forking(facts, window, near)}
    ordered = _in_order(facts)
    if len(ordered) < 2:
        return list(found.values())
    found |= {finding.id: finding for finding in [*_prepare(facts, ordered), *_child(facts, ordered)]}
    if facts.has_forks_among_threads:
        found |= {finding.id: finding for finding in _crossing(facts, ordered)}
    return list(found.values())


def _in_order(facts: Facts) -> list[Registration]:
    """Effective registrations whose place in the order is known, first registered first."""
    keyed: dict[tuple[int, ...], Registration] = {}
    doubtful: set[tuple[int, ...]] = set()
    for registration in facts.registrations:
        place = _place(facts, registration)
        if registration.is_effective and place is not None:
            if place in keyed and keyed[place].chain != registration.chain:
                doubtful.add(place)
            keyed[place] = registration
    return [keyed[place] for place in sorted(keyed) if place not in doubtful]


def _place(facts: Facts, registration: Registration) -> tuple[int, ...] | None:
    """Constructors come first, in the order in which objects are initialised; then main, in the order of its calls."""
    flow = facts.flow
    graph, program = flow.graph, flow.program
    outermost, site = registration.chain[0]
    to_call = graph.distances([outermost], _CALLED_LATER, backward=True)
    for rank, obj in enumerate(program.closure.init_order):
        for rva in program.image(obj).constructors:
            function = program.function(obj, rva)
            if function is not None and to_call[function] >= 0:
                return 0, rank, site if function == outermost else 0
    if flow.main is None or to_call[flow.main] < 0:
        return None
    if flow.main == outermost:
        return 1, site
    sites = [place for _, target, place, _ in graph.rows_from(flow.main) if to_call[target] >= 0]
    return (1, min(sites)) if sites else None


def _taken(facts: Facts, handler: Function | None) -> tuple[Taken, ...]:
    """Locks with an address that a handler waits for."""
    if handler is None:
        return ()
    return tuple(t for t in facts.summaries.of(handler).taken if t.blocking and is_resolved(t.address))


def _prepared(facts: Facts, registration: Registration) -> frozenset[Value]:
    prepare = registration.handlers[0].function
    return prepared_by(facts.summaries, prepare)[0] if prepare is not None else frozenset()


def _prepare(facts: Facts, ordered: list[Registration]) -> Iterator[Finding]:
    held, same = list[_Holding](), facts.summaries.arrays.same
    for registration in reversed(ordered):
        for taken in _taken(facts, registration.handlers[0].function):
            for holding in held:
                if same(taken.address, holding.address) is Match.EXACT:
                    yield _finding(facts, (holding, registration), taken, 0)
        held += [_Holding(address, registration) for address in _prepared(facts, registration) if is_resolved(address)]


def _child(facts: Facts, ordered: list[Registration]) -> Iterator[Finding]:
    same = facts.summaries.arrays.same
    held = [_Holding(a, r) for r in ordered for a in _prepared(facts, r) if is_resolved(a)]
    for registration in ordered:
        child = registration.handlers[2].function
        for taken in _taken(facts, child):
            for holding in held:
                if holding.by is not registration and same(taken.address, holding.address) is Match.EXACT:
                    yield _finding(facts, (holding, registration), taken, 2)
        held = [holding for holding in held if holding.by is not registration]


def _near(facts: Facts, windows: list[WindowFacts]) -> frozenset[Function]:
    """Of the functions that fork, and what they call, those that may hold a lock which a prepare handler waits for:
    those that name it, and callers of those that return with it."""
    flow, summaries = facts.flow, facts.summaries
    levels = {level.function for w in windows for level in w.window.levels if summaries.relevant[level.function]}
    if not levels:
        return frozenset()
    prepares = {p for r in facts.registrations if r.is_effective and (p := r.handlers[0].function) is not None}
    locks = {t.address for prepare in prepares for t in _taken(facts, prepare)}
    stores = Stores(summaries, lambda function: function not in prepares)
    named = {f for lock in sorted(locks, key=repr) if isinstance(lock.base, Object) for f in stores.naming(lock)}
    called = flow.graph.distances(levels, CALLS) >= 0
    found = {f for f in named if called[f]}
    pending = sorted(found)
    while pending:
        function = pending.pop()
        if any(e.held & locks for e in summaries.of(function).exits):
            edges = flow.graph.edges_to(function)
            sources = (int(flow.graph.source[e]) for e in edges if int(flow.graph.kind[e]) in CALLS)
            callers = {flow.whole(Function(f)) for f in sources if called[f]}
            pending += sorted(callers - found)
            found |= callers
    return frozenset(found)


def _forking(facts: Facts, window: WindowFacts, near: frozenset[Function]) -> Iterator[Finding]:
    """What the thread that forks holds itself, and a prepare handler waits for."""
    summaries = facts.summaries
    for level in window.window.levels:
        if not summaries.relevant[level.function] or level.function not in near:
            continue
        calls = [call.held for call in summaries.run(level.function).calls if call.site == level.site]
        held = frozenset.intersection(*calls) if calls else frozenset[Value]()
        for registration in facts.registrations if held else ():
            prepare = registration.handlers[0].function if registration.is_effective else None
            for taken in _taken(facts, prepare):
                is_held = any(summaries.arrays.same(taken.address, h) is Match.EXACT for h in held)
                if is_held and prepare is not None and not _is_recursive(facts, taken):
                    yield _waits_for_itself(facts, level, registration, prepare, taken)


def _is_recursive(facts: Facts, taken: Taken) -> bool:
    """A lock that its owner may take again: a mutex made so in the file, a reader's."""
    base, offset = taken.address
    if not isinstance(base, Object) or taken.kind not in ("mutex", "spin"):
        return True  # made at run time, or a lock for readers: not known
    kind = facts.flow.program.image(base.number).read(offset + _KIND, 4).tobytes()
    return taken.kind == "mutex" and int.from_bytes(kind, "little") == _RECURSIVE


def _crossing(facts: Facts, ordered: list[Registration]) -> Iterator[Finding]:
    """Locks that prepare handlers take in one order, and a thread in the other."""
    sequence = [
        _Holding(address, registration)
        for registration in reversed(ordered)
        for address in sorted(_prepared(facts, registration), key=repr)
        if is_resolved(address)
    ]
    same = facts.summaries.arrays.same
    entries = [*facts.threads.entries, *([facts.flow.main] if facts.flow.main is not None else [])]
    for entry in entries if len({holding.by.chain for holding in sequence}) > 1 else ():
        followed = facts.flow.graph.distances([entry]) >= 0
        if int((followed & facts.summaries.relevant).sum()) > _MOST_FUNCTIONS:
            continue
        for taken in facts.summaries.of(entry).taken:
            for first, holding in enumerate(sequence):
                if not taken.blocking or same(taken.address, holding.address) is not Match.EXACT:
                    continue
                for later in sequence[first + 1 :]:
                    is_other = later.by is not holding.by
                    if is_other and any(same(gate, later.address) is Match.EXACT for gate in taken.gates):
                        yield _crossed(facts, entry, taken, (holding, later))


def _finding(facts: Facts, sides: tuple[_Holding, Registration], taken: Taken, which: int) -> Finding:
    holding, registration = sides
    lock = _lock(facts, holding)
    waiting = facts.flow.name(registration.handlers[which].function or Function(-1))
    holder = facts.flow.name(holding.by.handlers[0].function or Function(-1))
    where = "every fork" if which == 0 else "every child"
    order = "runs after it" if which == 0 else "runs before the handler that releases it"
    return Finding(
        rule="atfork-order",
        severity=Severity.MEDIUM,
        verdict=Verdict.SUSPECTED,
        target=facts.target,
        object=facts.object_name(registration.object),
        message=f"{where} can wait for {lock.name}: {waiting} asks for what {holder} holds",
        why=f"{holder} takes {lock.name} before fork and keeps it; {waiting} {order} and waits for the same lock. "
        "Prepare handlers run last registered first, child handlers first registered first.",
        fix="Register in the order of dependence: what others' handlers need registers first (it is then locked "
        "last and released first); or let handlers neither allocate nor log.",
        lock=lock,
        requester=step_frames(facts.flow, taken.path),
    )


def _waits_for_itself(
    facts: Facts, level: Level, registration: Registration, prepare: Function, taken: Taken
) -> Finding:
    lock = lock_of(facts.flow.program, taken.address, registration.object)
    forking, handler = facts.flow.name(level.function), facts.flow.name(prepare)
    return Finding(
        rule="atfork-order",
        severity=Severity.MEDIUM,
        verdict=Verdict.SUSPECTED,
        target=facts.target,
        object=facts.object_name(registration.object),
        message=f"a fork in {forking} waits for {lock.name}, which {forking} holds: {handler} asks for it before fork",
        why=f"{forking} holds {lock.name} when it forks. {handler} runs in the same thread before the fork and waits "
        "for the same lock: unless it is one that its owner may take again, the fork never comes.",
        fix=f"Let {lock.name} go before the fork, or let the handler know that the thread which forks has it.",
        lock=lock,
        fork=facts.flow.frame(level.function, level.site, ""),
        requester=step_frames(facts.flow, taken.path),
    )


def _crossed(facts: Facts, entry: Function, taken: Taken, pair: tuple[_Holding, _Holding]) -> Finding:
    first, later = (_lock(facts, holding) for holding in pair)
    thread = facts.flow.name(entry)
    return Finding(
        rule="atfork-order",
        severity=Severity.MEDIUM,
        verdict=Verdict.REACHABLE,
        target=facts.target,
        object=facts.object_name(pair[0].by.object),
        message=f"a fork takes {first.name} before {later.name}; {thread} takes them the other way round",
        why=f"The prepare handlers take {first.name} and then {later.name}. The thread that begins in {thread} holds "
        f"{later.name} when it asks for {first.name}: the two can wait for each other, and the fork never comes.",
        fix="Let the handlers take the locks in the order in which the program does: register them in the reverse of "
        "that order, since prepare handlers run last registered first.",
        lock=first,
        holder=step_frames(facts.flow, taken.path),
    )


def _lock(facts: Facts, holding: _Holding) -> Lock:
    return lock_of(facts.flow.program, holding.address, holding.by.object)
