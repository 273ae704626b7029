"""unsafe-call: the child of a fork in a threaded program calls functions of libc that take locks.

Owns: the three grades. A hang is possible: the lock is not quiesced by this libc's fork, and a thread can
      hold it. POSIX forbids the call, but this libc's fork quiesces what it takes. Unknown: the libc.
Takes: `Facts`. Gives: `Finding`s: one for each lock and function that forks, and one note for the rest.
Must never: speak of a fork before the first thread, or call a function unsafe because a list does not name
      it: what takes no lock in this libc cannot hang.
Wrong where: see the page of the rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from forkproof.facts import Facts, WindowFacts
from forkproof.hazards.evidence import (
    FOLLOWED,
    ChildCall,
    ChildCalls,
    bodies_of_child,
    child_handlers,
    dead_end,
    existing_threads,
    folded,
    fork_frame,
    frames_along,
    names_of,
    nearest,
    other_threads,
    rank,
    starts_near,
    threads_sentence,
    too_early,
)
from forkproof.hazards.guards import Guards
from forkproof.libc_code import LibcLock
from forkproof.model import Answer, Conditions, Finding, Frame, Lock, Severity, Verdict, WindowKind
from forkproof.program import Function

_LEAVES: Final = 1, 3
"""Calls below a child's own code. A child that execs or exits soon does, as a matter of course, what stands in
its own function or one call below; deeper ways are mostly what it does when a call fails, and beyond the
second number hardly anybody goes."""
_LIVES: Final = 4, 8
"""The same for a child that lives on, which goes further."""
_ROUNDS: Final = 12
"""How often ways around what only happens after a failure are looked for."""
_HELD_NEAR: Final = 5
"""Functions between a thread's begin and its call of libc, on a way that it goes as a matter of course."""
_HELD_OFTEN: Final = 2
"""The same for what programs seldom call, where the thread is seen to call it in a loop."""
_EDITION: Final = "2024"
_JUDGED: Final = (
    "are objects that the program names itself: fork leaves them as they are, and inherited-lock judges each that the "
    "code tells"
)


def find(facts: Facts) -> list[Finding]:
    """All findings about calls of libc in children of forks."""
    windows = [w for w in facts.windows if _matters(w)]
    if not windows:
        return []
    if facts.libc.core is None or len(facts.flow.program.codes) == 1:
        in_c = [w for w in windows if not facts.flow.is_go(w.window.function)]
        return _unknown(facts, in_c[0]) if in_c else []
    return folded(f for window in windows for f in _Window(facts, window).findings())


def _matters(window: WindowFacts) -> bool:
    inner = window.window
    lives_apart = inner.kind in FOLLOWED and inner.shares_memory is not Answer.YES and bool(inner.levels)
    return lives_apart and window.threads is not Answer.NO and window.reachable is not Answer.NO


def _unknown(facts: Facts, window: WindowFacts) -> list[Finding]:
    """The third grade: what libc's functions lock is not known."""
    reason = "the C library is part of the program" if facts.libc.core is not None else "the C library was not found"
    return [
        Finding(
            rule="unsafe-call",
            severity=Severity.NOTE,
            verdict=Verdict.SUSPECTED,
            target=facts.target,
            object=facts.object_name(0),
            message="whether children of forks call functions of libc that can hang is not known",
            why=f"{reason}, so which of its functions take locks that fork leaves as they are was not judged.",
            fix="Scan a dynamically linked build, or keep to async-signal-safe functions between fork and exec.",
            fork=fork_frame(facts, window),
        )
    ]


@dataclass(frozen=True, slots=True)
class _Request:
    """How the child asks for one lock."""

    lock: LibcLock
    function: Function
    call: ChildCall
    way: tuple[int, ...]
    is_usual: bool

    @property
    def order(self) -> tuple[bool, int, int]:
        return not self.is_usual, self.call.depth, self.function


@dataclass(frozen=True, slots=True)
class _Holder:
    """A thread that takes the lock as a matter of course."""

    start: Function
    edges: tuple[int, ...]
    exists: Answer


class _Window:
    """The findings about one window."""

    def __init__(self, facts: Facts, window: WindowFacts) -> None:
        self.facts, self.window = facts, window
        self.flow, self.graph, self.locks = facts.flow, facts.flow.graph, facts.libc_locks
        self.core = facts.libc.core if facts.libc.core is not None else -1
        self.guards = Guards(facts, window)
        self.guarded: set[int] = set()
        self.dead: set[Function] = set()
        self.failing: set[int] = set(too_early(facts, window.source))
        self.calls = self._calls()
        self.ordinary = self._ordinary_calls()
        self.fork = fork_frame(facts, window)

    @cached_property
    def bodies(self) -> list[Function]:
        """What the child is there to run, where that never comes back."""
        return bodies_of_child(self.facts, self.window)

    def _calls(self) -> ChildCalls:
        """What the child calls of libc, on ways that do not end in a function that never comes back."""
        while True:
            calls = self._child_calls()
            telling = (c for f, c in calls.all.items() if c.depth and self.locks.takes_inherited(f))
            ends = (dead_end(self.facts, calls.way(call)[:-1], self.bodies) for call in telling)
            found = {end for end in ends if end is not None} - self.dead
            if not found:
                return calls
            self.dead |= found

    def _child_calls(self) -> ChildCalls:
        handlers = child_handlers(self.facts, self.window)
        return ChildCalls(self.facts, self.window, [self.core], self.dead, handlers, self.failing)

    def _ordinary_calls(self) -> ChildCalls:
        """What the child calls of libc without a system call that has failed."""
        calls = self.calls
        for _ in range(_ROUNDS):
            telling = (c for f, c in calls.all.items() if self.locks.takes_inherited(f))
            found = {e for call in telling for e in self.facts.failures.among(calls.way(call))}
            if not found:
                break
            self.failing |= found
            calls = self._child_calls()
        return calls

    def findings(self) -> list[Finding]:
        """One for each lock that a thread is likely to hold; the rest, and what POSIX says, as one each."""
        found, rest = [], []
        for request in self._requests():
            holder = self._holder(request) if request.is_usual else None
            hang = self._hang(request, holder) if holder is not None else None
            if hang is not None and hang.severity.rank <= Severity.MEDIUM.rank:
                found.append((request.function, hang))
            else:
                rest.append((request.function, hang))
        named = {function for function, _ in found}
        others = [(function, hang) for function, hang in rest if function not in named]
        if self.window.reachable is not Answer.YES:
            return [hang for _, hang in found]
        return [*(hang for _, hang in found), *self._rare(others), *self._tolerated()]

    def _requests(self) -> list[_Request]:
        """The best way to each lock that nothing quiesces at this fork: the nearest usual one, or the nearest."""
        best: dict[int, _Request] = {}
        for function, anyhow in sorted(self.calls.all.items(), key=lambda item: (item[1].depth, item[0])):
            ordinary = self.ordinary.all.get(function)
            calls, call = (self.calls, anyhow) if ordinary is None else (self.ordinary, ordinary)
            for lock in self.locks.taken_by(function):
                old = best.get(id(lock))
                if lock.quiesced and self.window.window.handlers_run:
                    continue
                if old is not None and old.order < (False, call.depth, function):
                    continue  # it is usual, and as near
                is_usual = ordinary is not None and self.locks.is_usual(function, lock)
                request = _Request(lock, function, call, tuple(calls.way(call)), is_usual)
                if old is None or request.order < old.order:
                    best[id(lock)] = request
        return sorted(best.values(), key=lambda r: r.order)

    def _holder(self, request: _Request) -> _Holder | None:
        """A thread that takes the lock as a matter of course; a reader waits for writers only.

        Not under a lock that a prepare handler takes: then the thread has let both go when the fork comes.
        """
        lock = request.lock
        only_reads = lock.writers != lock.takers and not self.locks.is_usual(request.function, lock, writing=True)
        unseen = Answer.UNKNOWN if self.window.source else Answer.YES
        threads = (existing_threads(self.facts, self.window.source), Answer.YES), (other_threads(self.facts), unseen)
        starts = frozenset(f for group, _ in threads for f in group)
        first = frozenset(next((group for group, _ in threads if group), ()))
        while True:
            ends = frozenset(self.dead), frozenset(self.failing | self.guarded)
            reach = self.locks.reaching(lock, starts, *ends, until=first, writing=only_reads)
            found = [(f, answer) for group, answer in threads if (f := nearest(group, reach)) is not None]
            if not found:
                return None
            start, exists = found[0]
            edges = self.graph.path(start, reach, without=self.failing | self.guarded) or []
            guarded = {edge for edge in edges if self.guards.guards(edge)}
            self.guarded |= guarded
            if guarded:
                continue
            end = dead_end(self.facts, edges[:-1])
            failing = self.facts.failures.among(edges) if end is None else []
            self.failing.update(failing)
            if failing:
                continue
            if end is None or end in self.dead:
                last = Function(int(self.graph.target[edges[-1]])) if edges else start
                return _Holder(start, (*edges, *self.locks.way_to(lock, last)), exists)
            self.dead.add(end)

    # ---- grades ------------------------------------------------------------------------------

    def _hang(self, request: _Request, holder: _Holder) -> Finding:
        facts, lock, name = self.facts, request.lock, self._name(request.function)
        answers = (self.window.threads, holder.exists, Answer.YES, Answer.YES)
        severity, verdict = self._rank(answers, request, holder)
        can = "can" if verdict is Verdict.REACHABLE else "may"
        libc = facts.object_name(self.core)
        quiesced = self._not_quiesced(lock)
        thread = frames_along(facts, holder.edges, holder.start)
        doubt = "" if holder.exists is Answer.YES else "; whether that thread exists at the fork is not known"
        taker = f"{thread[-1].function}, which takes it{doubt}"
        conditions = Conditions(
            threads=threads_sentence(facts, self.window),
            holder=f"the thread that begins in {thread[0].function} reaches {taker}",
            requester=f"the child calls {name}, which takes it as a matter of course",
            not_quiesced=quiesced,
            answers=answers,
        )
        why_rare = lock.rare or lock.seldom
        rare = f" It is rare: {why_rare}." if why_rare else ""
        return Finding(
            rule="unsafe-call",
            severity=severity,
            verdict=verdict,
            target=facts.target,
            object=libc,
            message=f"a child forked in {self.fork.function} {can} hang for ever in {name}, on {lock.name}",
            why=f"{name} is not async-signal-safe, and {quiesced}. A thread that does not exist in the child can own "
            f"the lock there.{rare}",
            fix=self._fix(name),
            lock=self._model(lock),
            fork=self.fork,
            holder=thread,
            requester=self._frames(request),
            conditions=conditions,
        )

    def _model(self, lock: LibcLock) -> Lock:
        if lock.address is None:
            return Lock(self.facts.object_name(self.core), lock.name, None, "field")
        return Lock(self.facts.object_name(lock.address.object), lock.name, lock.address.rva, "global")

    def _rank(
        self, answers: tuple[Answer, Answer, Answer, Answer], request: _Request, holder: _Holder
    ) -> tuple[Severity, Verdict]:
        """By how ordinary the ways of the child and of the thread are.

        What programs hardly ever take is low; so is what they seldom call, but medium where the thread itself calls it
        in a loop. What needs a thread to go a long way, or one that may not exist yet, is low, too: most daemons fork
        before they start theirs, in an order that tables and event loops hide.
        """
        near, far = _LIVES if self.window.window.kind is WindowKind.DAEMONIZE else _LEAVES
        outside = [
            e for e in holder.edges if self.flow.program.object_of(Function(int(self.graph.source[e]))) != self.core
        ]
        is_ordinary = request.call.depth <= near and starts_near(self.window)
        severity, verdict = rank(answers, self.window, is_ordinary=is_ordinary)
        is_doubtful = request.call.depth > far or len(outside) > _HELD_NEAR or Answer.UNKNOWN in answers
        if is_doubtful or request.lock.rare:
            most = Severity.LOW
        elif request.lock.seldom:
            most = Severity.MEDIUM if len(outside) <= _HELD_OFTEN and self._repeats(outside) else Severity.LOW
        else:
            most = Severity.HIGH
        return max(severity, most, key=lambda s: s.rank), verdict

    def _repeats(self, edges: list[int]) -> bool:
        """Some call on the way is made again and again: what programs seldom do, this one does."""
        calls = ((Function(int(self.graph.source[e])), int(self.graph.site[e])) for e in edges)
        return any(self.flow.loops(caller, site) for caller, site in calls)

    def _not_quiesced(self, lock: LibcLock) -> str:
        if not self.window.window.handlers_run:
            return f"{self.window.window.forker} quiesces none of libc's locks"
        return f"the fork of {self.facts.libc.title} neither takes {lock.name} nor re-initialises it"

    def _fix(self, name: str) -> str:
        if self.window.window.kind is WindowKind.DAEMONIZE:
            return f"Fork before the first thread is started, or keep {name} out of what the child does."
        return f"Call {name} before the fork and pass the result on, or use posix_spawn."

    def _frames(self, request: _Request) -> tuple[Frame, ...]:
        edges = [*request.way, *self.locks.way_to(request.lock, request.function)]
        return frames_along(self.facts, edges, request.function)

    def _rare(self, others: list[tuple[Function, Finding | None]]) -> list[Finding]:
        """Locks that no thread is likely to hold, or that the child asks for on rare ways: one finding."""
        if not others:
            return []
        calls = names_of(self._name(f) for f, _ in others)
        note = self._note(
            "locks that fork leaves as they are",
            f"a child forked in {self.fork.function} calls functions of libc whose locks fork leaves as they are",
            f"It can come to {calls}. For each, no thread was seen to take the lock as a matter of course, or the "
            "child takes it on rare ways only, or running programs hardly ever take it.",
            "Between fork and exec, keep to async-signal-safe functions (signal-safety(7)).",
        )
        hangs = [hang for _, hang in others if hang is not None]
        if not hangs:
            return [note]
        best = hangs[0]
        return [
            replace(
                note,
                severity=Severity.LOW,
                holder=best.holder,
                requester=best.requester,
                conditions=best.conditions,
                why=f"{note.why} The nearest: {best.message}.",
            )
        ]

    def _tolerated(self) -> list[Finding]:
        """Calls that POSIX forbids here, and after which nothing of this libc's own is left locked."""
        if not self.window.window.handlers_run:
            return []
        allowed = self.flow.signatures.signal_safe(_EDITION)
        forbidden = [
            f
            for f in self.calls.all
            if self.locks.takes_any(f)
            and not self._aliases(f) & allowed
            and all(lock.quiesced for lock in self.locks.taken_by(f))
        ]
        given = {self._name(f) for f in forbidden if self._is_for_given(f)}
        quiesced = {self._name(f) for f in forbidden} - given
        if quiesced:
            return [self._quiesced(quiesced, given)]
        return [self._on_given(given)] if given else []

    def _is_for_given(self, function: Function) -> bool:
        """What it locks, waits for or lets go is an object of its caller's: fork knows nothing of that."""
        return bool(self._aliases(function) & self.flow.signatures.locks.keys()) or not self.locks.taken_by(function)

    def _quiesced(self, names: set[str], given: set[str]) -> Finding:
        title = self.facts.libc.title
        also = f" The locks of {names_of(given)} {_JUDGED}."
        return self._note(
            "locks that fork quiesces",
            f"a child forked in {self.fork.function} calls what POSIX forbids there and {title} tolerates",
            f"They are not async-signal-safe, but the fork of {title} quiesces the locks that they take: "
            f"{names_of(names)}. Another libc, or an allocator that is preloaded, may not.{also if given else ''}",
            "Nothing, on this libc; for portable code, keep to signal-safety(7).",
        )

    def _on_given(self, names: set[str]) -> Finding:
        return self._note(
            "locks of the program's own",
            f"a child forked in {self.fork.function} uses locks of the program's own, which POSIX forbids there",
            f"The locks of {names_of(names)} {_JUDGED}. {self.facts.libc.title}'s own state needs nothing there.",
            "See what inherited-lock says of the lock; for portable code, keep to signal-safety(7).",
        )

    def _note(self, locks: str, message: str, why: str, fix: str) -> Finding:
        libc = self.facts.object_name(self.core)
        return Finding(
            rule="unsafe-call",
            severity=Severity.NOTE,
            verdict=Verdict.SUSPECTED,
            target=self.facts.target,
            object=libc,
            message=message,
            why=why,
            fix=fix,
            lock=Lock(libc, locks, None, "several"),
            fork=self.fork,
        )

    def _name(self, function: Function) -> str:
        return self.locks.public.get(function) or self.flow.name(function)

    def _aliases(self, function: Function) -> set[str]:
        program = self.flow.program
        return set(program.names[program.object_of(function)].aliases(program.rva_of(function)))
