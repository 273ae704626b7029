"""The allocator rules: atfork-unbound, atfork-absent, and inherited-lock for "a lock of this allocator".

Owns: the four conditions of an inherited lock for the active allocator, the ranking of what follows,
      and the wording of why.
Takes: `Facts` of one program. Gives: `Finding`s.
Must never: state a condition that was not found; what is unknown lowers the verdict to `suspected`.
Wrong where: see the pages of the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from forkproof.allocators import AllocatorFacts
from forkproof.callgraph import CERTAIN, EdgeKind, Reach
from forkproof.code.explore import CallEffect, explore
from forkproof.facts import Facts, WindowFacts
from forkproof.hazards.evidence import (
    FOLLOWED,
    existing_threads,
    folded,
    nearest,
    other_threads,
    starts_near,
    threads_sentence,
)
from forkproof.locks.coverage import AllocatorLock
from forkproof.locks.goals import AllocatorLocks, Goal
from forkproof.locks.identity import lock_of
from forkproof.locks.ordinary import Rank
from forkproof.model import (
    Answer,
    Conditions,
    Finding,
    Frame,
    Hooks,
    Severity,
    Verdict,
    WindowKind,
)
from forkproof.program import Function
from forkproof.threads import ThreadSource

_ABOUT = 2
"""Calls by which a way may be longer than the shortest and still be preferred for coming first."""
_ROUNDS = 12
"""How often a way around what only happens after a failure is looked for."""
_FAILED = "only after something has failed"
_DYING = "only on its way out (exit, abort, assertion)"
_FAILING = (_FAILED, _DYING)
_NEAR = 1
"""A child that is about to exec allocates, as a matter of course, in its own function or one call below (a
string copied, a directory opened). Deeper ways are mostly what it does when a call fails. A child that
lives on takes every ordinary way sooner or later."""


@dataclass(frozen=True, slots=True)
class _Requester:
    """How the child asks for the lock."""

    frames: tuple[Frame, ...]
    rare: str
    """Why it is no matter of course; empty where it is."""
    depth: int
    """Calls from the child's own code to the allocator."""
    is_chance: bool = False
    """What the child calls for it does without the allocator at other times."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """How a thread comes to hold the lock."""

    frames: tuple[Frame, ...] = ()
    exists: Answer = Answer.UNKNOWN
    after_failure: bool = False
    """Every way that was found begins with a system call that has failed."""


def find(facts: Facts) -> list[Finding]:
    """All findings about the allocators that a program allocates with."""
    return [finding for allocator in facts.allocators if allocator.is_used for finding in _of_one(facts, allocator)]


def _of_one(facts: Facts, active: AllocatorFacts) -> list[Finding]:
    found = [
        finding
        for window in facts.windows
        for goal in facts.goals_of(active, window)
        if (finding := _inherited(facts, active, window, goal)) is not None
    ]
    inherited = folded(found)
    return [*inherited, *_registration(facts, active, inherited), *_incomplete(facts, active, inherited)]


def _incomplete(facts: Facts, active: AllocatorFacts, inherited: list[Finding]) -> list[Finding]:
    """Locks that the handlers leave: one finding each for those that are taken often, one for all the rare ones."""
    locks = facts.locks_of(active) if active.hooks is Hooks.EFFECTIVE else None
    if locks is None:
        return []
    name = facts.object_name(active.object)
    prepare = active.registration.handlers[0].function if active.registration is not None else None
    handler = facts.flow.name(prepare) if prepare is not None else "its prepare handler"
    found = [_left_open(facts, active, goal, (name, handler), inherited) for goal in locks.goals]
    rare = [lock for lock in locks.coverage.uncovered if locks.is_rare(lock)]
    if rare:
        found.append(_left_rare(facts, active, locks, rare, (name, handler)))
    if locks.coverage.kept_in_child:
        found.append(_kept(facts, active, locks, (name, handler)))
    return found


def _left_open(
    facts: Facts, active: AllocatorFacts, goal: Goal, names: tuple[str, str], inherited: list[Finding]
) -> Finding:
    name, handler = names
    follow = [f for f in inherited if f.lock == goal.lock]
    worst = min((f.severity for f in follow), key=lambda s: s.rank, default=Severity.MEDIUM)
    is_reachable = any(f.verdict is Verdict.REACHABLE for f in follow)
    when = (
        "every allocation can take it"
        if goal.occasion.rank is Rank.ALWAYS
        else "allocations take it as the heap's state demands"
    )
    consequence = "" if follow else _no_consequence(facts)
    return Finding(
        rule="atfork-incomplete",
        severity=worst,
        verdict=Verdict.REACHABLE if is_reachable else Verdict.SUSPECTED,
        target=facts.target,
        object=name,
        message=f"the fork handlers of {name} do not take {goal.lock.name}",
        why=f"{handler} runs before fork and does not hold {goal.lock.name} when it returns; {when}.{consequence}",
        fix=facts.fix(active, "atfork-incomplete"),
        lock=goal.lock,
    )


def _left_rare(
    facts: Facts, active: AllocatorFacts, locks: AllocatorLocks, rare: list[AllocatorLock], names: tuple[str, str]
) -> Finding:
    name, handler = names
    reasons = []
    for each in rare:
        lock = lock_of(facts.flow.program, each.taken.address, active.object)
        why = locks.occasions[each.taken.address].why or "on long ways through rare states of the heap"
        reasons.append(f"{lock.name} ({why})")
    count = "a lock" if len(rare) == 1 else f"{len(rare)} locks"
    return Finding(
        rule="atfork-incomplete",
        severity=Severity.LOW,
        verdict=Verdict.SUSPECTED,
        target=facts.target,
        object=name,
        message=f"the fork handlers of {name} leave {count} that is rarely taken"
        if len(rare) == 1
        else f"the fork handlers of {name} leave {count} that are rarely taken",
        why=f"{handler} does not take " + ", ".join(reasons) + ".",
        fix=facts.fix(active, "atfork-incomplete"),
        count=len(rare),
    )


def _kept(facts: Facts, active: AllocatorFacts, locks: AllocatorLocks, names: tuple[str, str]) -> Finding:
    name, handler = names
    program = facts.flow.program
    kept = [lock_of(program, value, active.object) for value in locks.coverage.kept_in_child]
    return Finding(
        rule="atfork-incomplete",
        severity=Severity.MEDIUM,
        verdict=Verdict.SUSPECTED,
        target=facts.target,
        object=name,
        message=f"the child handler of {name} does not let go of {kept[0].name}",
        why=f"{handler} takes {', '.join(k.name for k in kept)}, and no way through the child handler releases it or "
        "makes it anew: the child's next allocation that needs it waits for itself.",
        fix=facts.fix(active, "atfork-incomplete"),
        lock=kept[0],
        count=len(kept),
    )


def _registration(facts: Facts, active: AllocatorFacts, inherited: list[Finding]) -> list[Finding]:
    """The cause, once for the object: as severe as the worst hang that it leads to."""
    rule = {Hooks.UNBOUND: "atfork-unbound", Hooks.ABSENT: "atfork-absent"}.get(active.hooks)
    if rule is None:
        return []
    name = facts.object_name(active.object)
    worst = min((f.severity for f in inherited), key=lambda s: s.rank, default=None)
    severity = worst or (Severity.LOW if facts.is_program else Severity.MEDIUM)
    verdict = Verdict.REACHABLE if any(f.verdict is Verdict.REACHABLE for f in inherited) else Verdict.SUSPECTED
    consequence = "" if worst else _no_consequence(facts)
    what = "never registers its fork handlers" if rule == "atfork-unbound" else "has locks and no fork handlers"
    return [
        Finding(
            rule=rule,
            severity=severity,
            verdict=verdict,
            target=facts.target,
            object=name,
            message=f"{name} ({active.title}) {what}",
            why=f"{name}: {active.why}.{consequence}",
            fix=facts.fix(active, rule),
            lock=None,
        )
    ]


def _no_consequence(facts: Facts) -> str:
    if not facts.is_program:
        return " Any program that forks with it while another thread allocates can hang in the child."
    if facts.gaps:
        return f" Whether this program can hang on it is not known: {facts.gaps[0]}."
    if facts.hidden_forkers:
        return f" The program keeps the address of {facts.hidden_forkers[0]}: when that is called is not known."
    if not facts.windows:
        return " No call of a forker was found in this program."
    return " No fork of this program was shown to hang on it."


def _inherited(facts: Facts, active: AllocatorFacts, window: WindowFacts, goal: Goal) -> Finding | None:
    """inherited-lock for one window and lock, or None where a necessary condition is shown not to hold."""
    quiesced, not_quiesced = _not_quiesced(facts, active, window, goal)
    if quiesced is Answer.NO or window.window.kind not in FOLLOWED or window.window.shares_memory is Answer.YES:
        return None
    if window.threads is Answer.NO or window.reachable is Answer.NO:
        return None
    requester = _requester(facts, active, goal, window)
    if requester is None and window.window.is_complete:
        return None
    holder = _holder(facts, goal, window.source)
    answers = (
        window.threads,
        holder.exists,
        Answer.YES if requester else Answer.UNKNOWN,
        quiesced,
    )
    name = facts.object_name(active.object)
    conditions = Conditions(
        threads=threads_sentence(facts, window),
        holder=_holder_sentence(name, holder),
        requester=_requester_sentence(window, requester),
        not_quiesced=not_quiesced,
        answers=answers,
    )
    # What handlers take, or would take if they were registered, matters by that alone.
    is_plain = goal.is_plain or active.hooks is not Hooks.ABSENT
    severity, verdict = _rank(answers, window, requester, holder, goal, is_plain=is_plain)
    fork = facts.flow.frame(window.window.function, window.window.site, "fork")
    return Finding(
        rule="inherited-lock",
        severity=severity,
        verdict=verdict,
        target=facts.target,
        object=name,
        message=_message(name, goal, fork, verdict),
        why=_why(_cause(active, window), conditions),
        fix=facts.fix(active, _cause(active, window)),
        lock=goal.lock,
        fork=fork,
        holder=holder.frames,
        requester=requester.frames if requester else (),
        conditions=conditions,
    )


def _cause(active: AllocatorFacts, window: WindowFacts) -> str:
    """The rule that names the cause; handlers cannot help where the forker runs none."""
    if not window.window.handlers_run:
        return "inherited-lock"
    causes = {
        Hooks.UNBOUND: "atfork-unbound",
        Hooks.ABSENT: "atfork-absent",
        Hooks.EFFECTIVE: "atfork-incomplete",
    }
    return causes.get(active.hooks, "inherited-lock")


def _not_quiesced(facts: Facts, active: AllocatorFacts, window: WindowFacts, goal: Goal) -> tuple[Answer, str]:
    name = facts.object_name(active.object)
    if active.hooks is Hooks.NOT_NEEDED:
        return Answer.NO, f"{name} takes no lock"
    if window.window.shares_memory is Answer.UNKNOWN:
        return Answer.UNKNOWN, (
            f"{window.window.forker} runs no fork handlers; its flags are not known, and with CLONE_VM the child "
            "would share memory instead of inheriting locks"
        )
    if active.hooks in (Hooks.EFFECTIVE, Hooks.BUILTIN):
        if window.window.handlers_run and active.hooks is Hooks.BUILTIN:
            return Answer.NO, f"{name}: {active.why}"
        if window.window.handlers_run:
            return Answer.YES, f"{name}: {active.why}, but it does not hold {goal.lock.name} when it returns"
        return Answer.YES, f"{window.window.forker} runs no fork handlers and quiesces nothing"
    answer = Answer.UNKNOWN if active.hooks is Hooks.UNKNOWN else Answer.YES
    return answer, f"{name}: {active.why}"


def _rank(
    answers: tuple[Answer, Answer, Answer, Answer],
    window: WindowFacts,
    requester: _Requester | None,
    holder: _Holder,
    goal: Goal,
    *,
    is_plain: bool,
) -> tuple[Severity, Verdict]:
    """High needs all four conditions, on paths that a program takes while it runs normally.

    `is_plain`: and so does the allocator.
    """
    unknown = sum(a is Answer.UNKNOWN for a in answers)
    if window.window.kind is WindowKind.EXEC and requester is not None and requester.rare in _FAILING:
        # The child is there to exec, and asks for the lock only if something does not work.
        is_known = not unknown and window.reachable is Answer.YES
        return Severity.LOW, Verdict.REACHABLE if is_known else Verdict.SUSPECTED
    if window.reachable is not Answer.YES:
        # The program's own code is there to be run, and when it runs is one question, not two; most code
        # of a library is not run by this program.
        unknown = max(unknown, 1) if window.threads is not Answer.UNKNOWN else unknown
        if not window.is_own or unknown > 1:
            return Severity.LOW, Verdict.SUSPECTED
    if unknown:
        # A failure on top of what is not known is no more than a possibility.
        fails = requester is not None and requester.rare in _FAILING
        return (Severity.MEDIUM if unknown == 1 and is_plain and not fails else Severity.LOW), Verdict.SUSPECTED
    if window.window.kind is WindowKind.EXEC and not is_plain:
        return Severity.LOW, Verdict.REACHABLE
    is_ordinary = requester is not None and not requester.rare and not holder.after_failure
    is_ordinary = is_ordinary and is_plain and starts_near(window) and not window.is_deferred
    if window.window.kind is WindowKind.EXEC and requester is not None:
        is_ordinary = is_ordinary and requester.depth <= _NEAR and not requester.is_chance
    # A lock that the handlers of an otherwise careful allocator leave must be one that every allocation takes.
    if answers[3] is Answer.YES and goal.occasion.rank is not Rank.ALWAYS and goal.is_left:
        is_ordinary = False
    return (Severity.HIGH if is_ordinary else Severity.MEDIUM), Verdict.REACHABLE


def _requester(facts: Facts, active: AllocatorFacts, goal: Goal, window: WindowFacts) -> _Requester | None:
    """The shortest way from the child's code to the lock; ways after a failure come later, ways to die last."""
    name = facts.object_name(active.object)

    def made(way: _Way, rare: str) -> _Requester:
        flow, graph = facts.flow, facts.flow.graph
        edge = way.edges[0]
        first = flow.frame(way.start, int(graph.site[edge]), EdgeKind(graph.kind[edge]).name.lower())
        frames = (first, *goal.frames(way.edges[1:], Function(int(graph.target[edge]))))
        return _Requester(frames, rare, _depth(frames, name), _is_chance(facts, way.edges))

    found = _ordinary_way(facts, goal, partial(_child_way, facts, window))
    if found is not None and not found[1]:
        return made(found[0], "")
    if handled := _from_handlers(facts, active, goal, window):
        return _Requester(goal.frames(handled.edges, handled.start), _condition(facts, handled), 0)
    if found is not None:
        return made(found[0], _FAILED)
    dying = _child_way(facts, window, goal.to_lock_dying, ())
    return made(dying, _DYING) if dying is not None else None


def _is_chance(facts: Facts, edges: Sequence[int]) -> bool:
    """The function that the child calls enters the allocator on some ways only, and not in a loop: a logger that
    needs memory for long messages."""
    if len(edges) < 2:
        return False
    graph, flow = facts.flow.graph, facts.flow
    called, entered = (Function(int(graph.target[e])) for e in edges[:2])
    entries = [f for allocator in facts.allocators if allocator.is_used for f in allocator.entries]
    if entered not in entries or called in entries or flow.program.object_of(called) in facts.summaries.libc_objects:
        return False
    sites = {int(graph.site[e]) for e in flow.outgoing(called) if Function(int(graph.target[e])) in entries}
    return not any(flow.loops(called, site) for site in sites) and facts.failures.does_without(called, sites)


class _Way(NamedTuple):
    """Call edges from a function on to one that takes a lock; none where it takes the lock itself."""

    start: Function
    edges: list[int]


def _ordinary_way(
    facts: Facts,
    goal: Goal,
    search: Callable[[Reach, Collection[int]], _Way | None],
    kinds: Collection[EdgeKind] = CERTAIN,
) -> tuple[_Way, bool] | None:
    """The first way that a search gives which needs no failure, or else the first; and whether it needs one.

    A failure is a system call that has failed, or a function that never comes back: an error handler that exits.
    """
    without: set[int] = set()
    reach, first = goal.to_lock if kinds is CERTAIN else goal.to_lock_without((), kinds), None
    for _ in range(_ROUNDS):
        way = search(reach, without)
        if way is None:
            break
        failing = [*facts.failures.among(way.edges), *filter(facts.flow.ends_on, way.edges)]
        if not failing:
            return way, False
        first = first or way
        without.update(failing)
        reach = goal.to_lock_without(without, kinds)
    return (first, True) if first is not None else None


def _from_handlers(facts: Facts, active: AllocatorFacts, goal: Goal, window: WindowFacts) -> _Way | None:
    """A child handler of another object that asks for the lock itself, or starts a thread that does."""
    if not window.window.handlers_run:
        return None
    kinds = CERTAIN | {EdgeKind.THREAD}
    handlers = [
        r.handlers[2].function
        for r in facts.registrations
        if r.is_effective and r.object != active.object and r.handlers[2].function is not None
    ]

    def search(reach: Reach, without: Collection[int]) -> _Way | None:
        start = nearest(handlers, reach)
        if start is None:
            return None
        return _Way(start, facts.flow.graph.path(start, reach, kinds, without=without, slack=_ABOUT) or [])

    found = _ordinary_way(facts, goal, search, kinds)
    return found[0] if found is not None and not found[1] else None


def _condition(facts: Facts, handler: _Way) -> str:
    """Why a fork handler may leave out the call that leads to the lock: it can return without it (QEMU's does)."""
    if not handler.edges:
        return ""
    flow, site = facts.flow, int(facts.flow.graph.site[handler.edges[0]])
    ordinary = flow.effects(handler.start)
    without = explore(
        flow.body(handler.start),
        flow.machine,
        flow.program.rva_of(handler.start),
        effects=lambda s: CallEffect(returns=False) if s == site else ordinary(s),
    )
    return "only if its fork handler finds a reason" if without.returns else ""


def _depth(frames: tuple[Frame, ...], allocator: str) -> int:
    """How many frames stand outside the allocator before it is entered for good."""
    outside = [i for i, frame in enumerate(frames) if frame.object != allocator]
    return outside[-1] if outside else 0


def _child_way(facts: Facts, window: WindowFacts, reach: Reach, without: Collection[int]) -> _Way | None:
    """Of the child's calls that lead to the lock on a way about as short as can be, the first that it makes."""
    flow, graph = facts.flow, facts.flow.graph
    calls = [
        (int(reach[graph.target[edge]]), (depth, int(graph.site[edge])), edge, level.function)
        for depth, level in enumerate(window.window.levels)
        for edge in level.edges
        if edge not in without
        and reach[graph.target[edge]] >= 0
        and Function(int(graph.target[edge])) not in flow.forkers
    ]
    if not calls:
        return None
    shortest = min(distance for distance, *_ in calls)
    _, edge, function = min((place, e, f) for distance, place, e, f in calls if distance <= shortest + _ABOUT)
    rest = graph.path(Function(int(graph.target[edge])), reach, without=without) or ()
    return _Way(function, [edge, *rest])


def _thread_way(facts: Facts, threads: Collection[Function], reach: Reach, without: Collection[int]) -> _Way | None:
    """The shortest way from a thread's start to the lock."""
    start = nearest(threads, reach)
    return None if start is None else _Way(start, facts.flow.graph.path(start, reach, without=without) or [])


def _holder(facts: Facts, goal: Goal, source: ThreadSource | None) -> _Holder:
    """How a thread comes to the lock, and whether that thread can exist.

    1. threads of the known source and of constructors, which exist at the fork; main, where a thread forks;
    2. any other thread of the program: evidence only where it is unknown which threads exist.
    """
    groups = (
        (existing_threads(facts, source), Answer.YES),
        (other_threads(facts), Answer.UNKNOWN if source else Answer.YES),
    )
    for threads, answer in groups:
        found = _ordinary_way(facts, goal, partial(_thread_way, facts, threads))
        if found is not None:
            way, after_failure = found
            return _Holder(goal.frames(way.edges, way.start), answer, after_failure)
    return _Holder()


def _holder_sentence(name: str, holder: _Holder) -> str:
    frames = holder.frames
    if not frames:
        return f"which thread takes a lock of {name} was not found"
    rare = ", only after something has failed" if holder.after_failure else ""
    doubt = "" if holder.exists is Answer.YES else "; whether that thread exists at the fork is not known"
    return f"the thread that begins in {frames[0].function} reaches {frames[-1].function}{rare}{doubt}"


def _requester_sentence(window: WindowFacts, requester: _Requester | None) -> str:
    if requester is None:
        return "the child goes on in callers that were not all found; whether it allocates is not known"
    if requester.rare:
        return f"the child reaches {requester.frames[-1].function} {requester.rare}"
    verb = {"daemonize": "lives on and", "exec": "before exec"}.get(window.window.kind.value, "")
    return f"the child {verb} reaches {requester.frames[-1].function} from {requester.frames[0].function}".replace(
        "  ", " "
    )


def _message(name: str, goal: Goal, fork: Frame, verdict: Verdict) -> str:
    can = "can" if verdict is Verdict.REACHABLE else "may"
    lock = f"a lock of {name}" if goal.address is None else f"{goal.lock.name} of {name}"
    return f"a child forked in {fork.function} {can} hang for ever on {lock}"


def _why(rule: str, conditions: Conditions) -> str:
    cause = f"Caused by {rule}: " if rule != "inherited-lock" else ""
    return f"{cause}{conditions.not_quiesced}. A thread that does not exist in the child can own the lock there."
