"""Findings in, findings with verdicts out: which runs to make, and what they prove together.

Owns: the order of the runs (census, steering, control) and the verdict.
Takes: a `Plan`, findings, a command. Gives: `ProbeRecord`s.
Must never: confirm an inherited lock without a control run that passed, or refute while some lock could be held across
      the fork.
Wrong where: the program forks only on an input that the command line does not give: then it is inconclusive, and
      says what was reached.

    confirmed      a child waits for the lock that was held at the fork, and does not where it was not held;
                   or a thread waits for a lock that it took itself while all others stood still (`reenter`)
    refuted        every lock that was tried was the forking thread's own at the fork; or lets its owner in again
    inconclusive   everything else, with what was reached
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final

from forkproof.model import Finding, Frame, Lock, ProbeRecord, Severity, Verdict
from forkproof.options import QUIET, Progress
from forkproof.probe import beforehand, covered, reenter
from forkproof.probe import census as counting
from forkproof.probe.census import Census
from forkproof.probe.plan import Plan
from forkproof.probe.pointers import Key, Way
from forkproof.probe.sites import AcquireSite
from forkproof.probe.stack import Address, Module
from forkproof.probe.stage import Command, Stage, decoded
from forkproof.probe.steer import Cast, Outcome, Performance, perform
from forkproof.probe.watch import Lock as Word

_ATTEMPTS: Final = 6
"""Steered runs for one fork: each with a lock that the runs before did not try."""
_MISSED: Final = 3
"""Runs in which nobody comes to a lock that others were seen to take, beside the last."""
_CENSUSES: Final = 3
"""Runs without steering that are made beside the first, while no lock was seen on both sides of a fork;"""
_PATIENT: Final = 3.0
"""all but one of them only where they take no longer than these seconds together."""
_CONTROLS: Final = 2
"""Control runs that are made either way, with a thread stopped early or late, where the one before showed nothing."""
_FORKS: Final = 3
"""Forks of one finding that are steered, one after the other,"""
_HELD_FORKS: Final = 12
"""and where whoever calls has the lock, not handlers that take it at every fork."""
_STOPPED: Final = "with the thread stopped before the acquire"
_FREED: Final = "with the lock made free in the child at its start"
_OFTEN: Final = 4
"""A lock that other threads took so often before the fork will be taken again while the forking thread waits there."""
_HUNG_TIMES: Final = 10
"""A program that was seen to hang on itself may never come to fork: it gets so many times as long as that took."""
RULES: Final = frozenset({"inherited-lock", "atfork-unbound", "atfork-absent", "atfork-incomplete", "unsafe-call"})
"""Rules whose claim is that a child can inherit a taken lock: what steering can show."""
_REENTRY: Final = "lock-reentry"
"""The rule whose claim is that a thread comes back for the lock that it has: no fork is needed for that."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which findings to probe, and for how long."""

    command: Command
    seconds: float = 60.0
    """For each run."""
    finding: str | None = None
    rule: str | None = None
    lock: str | None = None
    """Only this one, by its name."""
    covered: bool = False
    """Also locks that the scan calls protected."""

    def takes(self, finding: Finding) -> bool:
        """This one is to be probed."""
        return (
            is_probed(finding)
            and self.names(finding.lock)
            and (self.finding is None or finding.id == self.finding)
            and (self.rule is None or finding.rule == self.rule)
        )

    def names(self, lock: Lock | None) -> bool:
        """The lock is the one that was asked for, or might be: all of an allocator's as one."""
        return self.lock is None or lock is None or lock.rva is None or lock.name == self.lock


def is_probed(finding: Finding) -> bool:
    """A finding whose claim this probe can show; of libc's locks only those that have an address."""
    has_address = finding.lock is not None and finding.lock.rva is not None
    return (finding.rule in RULES and finding.rule != "unsafe-call") or (
        finding.rule in ("unsafe-call", _REENTRY) and has_address
    )


@dataclass(slots=True, eq=False)
class _Try:
    """All runs for one fork."""

    runs: list[Performance] = field(default_factory=list)
    control: Performance | None = None
    hung: Performance | None = None


class Prover:
    """Probes the findings of one program."""

    def __init__(self, wanted: Wanted, progress: Progress = QUIET) -> None:
        self.wanted, self.progress = wanted, progress
        self.census: Census | None = None
        self._census_lines: tuple[str, ...] = ()
        self.seconds = 0.0
        self._tries: dict[tuple[str, int], _Try] = {}
        self._sites: dict[str, tuple[AcquireSite, ...]] = {}
        self._known: Mapping[tuple[str, int], str] = {}
        self._claims: Mapping[tuple[str, int], Lock] = {}
        self._pointers: Mapping[Key, Way] = {}
        self._asked: set[Lock] = set()

    def prove(self, plan: Plan, findings: list[Finding]) -> list[Finding]:
        """The findings, those that were probed with their records."""
        begun = time.monotonic()
        chosen = [f for f in findings if self.wanted.takes(f)]
        target = self.wanted.command.arguments[0]
        asked = covered.questions(plan, target, findings, self.wanted.lock) if self.wanted.covered else []
        objects = sorted({f.object for f in (*chosen, *asked)})
        if objects:
            self._known, self._claims, self._pointers = plan.known, plan.claims, plan.pointers
            self._sites = {name: plan.sites.get(name, ()) for name in objects}
            self._asked = {lock for lock in plan.locks if lock.name == self.wanted.lock}
        proven = self._reentries([f for f in chosen if f.rule == _REENTRY])
        forking = [f for f in chosen if f.rule != _REENTRY]
        if asked or forking:
            hangs = any(f.verdict is Verdict.CONFIRMED for f in proven.values())
            self.census = self._count(_HUNG_TIMES * (time.monotonic() - begun) if hangs else self.wanted.seconds)
        # Findings of a fork first: those of a whole object are shown by any of its forks.
        proven |= {id(f): self._proven(f) for f in sorted(forking, key=lambda f: f.fork is None)}
        self.seconds = time.monotonic() - begun
        return [proven.get(id(f), f) for f in findings] + [covered.answered(self._proven(f)) for f in asked]

    # ---- the runs --------------------------------------------------------------------------

    def _stage(self, sites: Sequence[AcquireSite], fork: Frame | None) -> Stage:
        return Stage(self.wanted.command, sites, fork, self._known)

    def _count(self, seconds: float) -> Census:
        self.progress.stage("probe: a run without steering", 0, 0)
        every = tuple(dict.fromkeys(site for sites in self._sites.values() for site in sites))
        begun, census = time.monotonic(), self._census_run(every, seconds)
        for again in range(_CENSUSES):
            if not census.may_have_missed or (again and time.monotonic() - begun > _PATIENT):
                break
            census.add(self._census_run(every, seconds))
        self._census_lines = (*census_lines(census), *claim_lines(census, self._claims))
        return census

    def _census_run(self, sites: Sequence[AcquireSite], seconds: float) -> Census:
        with self._stage(sites, None) as stage:
            return counting.take(stage, min(seconds, self.wanted.seconds), self._pointers)

    def _perform(self, finding: Finding, cast: Cast) -> Performance:
        step = "steering" if cast.holds else "the control run"
        self.progress.stage(f"probe: {step}, fork {cast.number} of {finding.id}", 0, 0)
        with self._stage(self._sites[finding.object], finding.fork) as stage:
            return perform(stage, cast, self.wanted.seconds)

    # ---- one finding -----------------------------------------------------------------------

    def _proven(self, finding: Finding) -> Finding:
        return judged(finding, self._record(finding))

    def _record(self, finding: Finding) -> ProbeRecord:
        assert self.census is not None
        census = self.census
        blank = ProbeRecord(
            Verdict.INCONCLUSIVE, "", self.wanted.command.arguments, census=self._census_lines
        )  # fmt: skip
        if not self._sites[finding.object]:
            return replace(blank, why=f"no place is known where {finding.object} takes a lock")
        numbers = [n for n, fork in enumerate(matching(census, finding.fork), 1)]
        if not numbers:
            return replace(blank, why=_not_reached(census, finding))
        tries = self._known_tries(finding)
        for number in numbers[:_HELD_FORKS]:
            if not any(t.hung for t in tries) and (number <= _FORKS or _depends_on_caller(tries)):
                fresh = self._try(finding, number)
                tries = tries if fresh in tries else [*tries, fresh]
        record = self._verdict(finding, blank, tries)
        if record.verdict is Verdict.REFUTED and _depends_on_caller(tries) and len(tries) < len(numbers):
            why = (
                f"{record.why}. But only {len(tries)} of {len(numbers)} forks were tried, and the lock is the caller's"
            )
            return replace(record, verdict=Verdict.INCONCLUSIVE, why=why)
        return record

    def _reentries(self, findings: list[Finding]) -> dict[int, Finding]:
        """One run for all of them, which is enough where no thread comes back for any; otherwise one for each."""
        seen = self._reenter(findings) if len(findings) > 1 else None
        if seen is not None and seen.outcome is not reenter.Outcome.NEVER:
            seen = None
        return {id(f): judged(f, self._reentered(f, seen or self._reenter([f]))) for f in findings}

    def _reenter(self, findings: Sequence[Finding]) -> reenter.Reentered:
        """A run in which a thread, all others standing still, takes such a lock and comes back for it, or does not."""
        self.progress.stage(f"probe: {', '.join(f.id for f in findings)}", 0, 0)
        sites = dict.fromkeys(site for f in findings for site in self._sites[f.object])
        with self._stage(tuple(sites), None) as stage:
            return reenter.perform(
                stage, lambda place: any(is_of(place, f.lock) for f in findings), self.wanted.seconds
            )  # fmt: skip

    def _reentered(self, finding: Finding, seen: reenter.Reentered) -> ProbeRecord:
        blank = ProbeRecord(Verdict.INCONCLUSIVE, "", self.wanted.command.arguments, lock=finding.lock)
        name = finding.lock.name if finding.lock is not None else "the lock"
        match seen.outcome:
            case reenter.Outcome.RECURSIVE:
                why = f"a thread came back for {name} while it had it, and the lock let it in again: it is recursive"
                return replace(blank, verdict=Verdict.REFUTED, why=why)
            case reenter.Outcome.NEVER:
                taken = sum(times for place, times in seen.taken.items() if is_of(place, finding.lock))
                often = f"{taken} times" if taken else "never"
                why = (
                    f"{name} was taken {often}, and no thread came back for it while it had it; the program {seen.end}"
                )
                return replace(blank, why=why)
        assert seen.lock is not None
        assert seen.watched is not None
        why = (
            f"a thread took {name} at {seen.lock.address:#x}, came back for it before any other thread had run, and "
            "waits for itself"
        )
        return replace(
            blank,
            verdict=Verdict.CONFIRMED,
            why=why,
            lock_address=f"{seen.lock.address:#x}",
            holder=seen.holder,
            waiters=seen.watched.waiters,
            syscalls=seen.watched.syscalls,
            samples=seen.watched.samples,
            watched_ms=seen.watched.milliseconds,
        )

    def _known_tries(self, finding: Finding) -> list[_Try]:
        """Runs that were made for other findings and tell of this one too: of the same object and, if given, fork."""
        key = self._fork_key(finding)
        return [t for (k, _), t in self._tries.items() if k == key or k.startswith(f"{key}\0")]

    def _try(self, finding: Finding, number: int) -> _Try:
        """Steer one fork until a child hangs, the fork proves protected, or nothing is left to try."""
        key = self._fork_key(finding), number
        if key in self._tries:
            return self._tries[key]
        assert self.census is not None
        found = self._tries[key] = _Try()
        left = frozenset(lock for lock in self.census.wanted if self._is_meant(lock, finding))
        if not left and (self._asked or self._is_named(finding.lock)):
            return found
        cast = Cast(
            number, left, leader_too=any(not f.is_leader for f in matching(self.census, finding.fork)),
            early=all(self.census.others[lock] < _OFTEN for lock in left),
        )  # fmt: skip
        missed = 0
        for _ in range(_ATTEMPTS):
            run = self._perform(finding, cast)
            if run.outcome is Outcome.PROTECTED:
                run = self._challenged(finding, cast, run)
            if run.outcome is Outcome.NO_HOLDER and run.entry is not None and left and not missed:
                before = self._beforehand(finding, cast, left, run.entry)
                if before.outcome in (Outcome.HUNG, Outcome.PASSED):
                    run = replace(before, entry=run.entry)
            # Which lock a thread waits for when the fork's handlers hold some is chance: where it was seen to take this
            # one, it is tried both ways, twice.
            if run.outcome is Outcome.NO_HOLDER and (not cast.early or (left and missed < _MISSED)):
                missed += 1
                cast = replace(cast, early=not cast.early)
                continue
            found.runs.append(run)
            if run.outcome is Outcome.HUNG and run.lock is not None:
                found.hung, found.control = run, self._compared(finding, cast, run.lock, run.entry)
                break
            if run.outcome is Outcome.KEPT and run.lock is not None:
                found.hung, found.control = run, self._freed(finding, cast, run.lock)
                break
            if run.outcome not in (Outcome.PASSED, Outcome.PROTECTED) or run.lock is None:
                break
            if run.lock.address not in left or left == {run.lock.address}:
                break
            left -= {run.lock.address}
            cast = replace(cast, locks=left)
        return found

    def _challenged(self, finding: Finding, cast: Cast, run: Performance) -> Performance:
        """A fork that had the lock: does it wait for it, or did its handlers only try? See `beforehand`."""
        assert run.lock is not None
        if run.entry is None:
            return run
        found = self._beforehand(finding, cast, frozenset({run.lock.address}), run.entry)
        match found.outcome:
            case Outcome.HUNG | Outcome.PASSED:
                return replace(found, entry=run.entry)
            case Outcome.PROTECTED:
                also = "; where a thread had it before the fork began, the forking thread waited for it"
                return replace(run, reached=run.reached + also)
        missed = f"{run.reached}; whether it waits where a thread has it before was not seen: {_said(found)}"
        return replace(run, reached=missed, is_callers=found.is_callers)

    def _beforehand(self, finding: Finding, cast: Cast, locks: frozenset[int], entry: tuple[str, int]) -> Performance:
        self.progress.stage(f"probe: a thread that has the lock first, fork {cast.number} of {finding.id}", 0, 0)
        first = replace(cast, locks=locks, early=False)
        with self._stage(self._sites[finding.object], finding.fork) as stage:
            return beforehand.perform(stage, first, entry, self.wanted.seconds)

    def _compared(self, finding: Finding, cast: Cast, lock: Word, entry: tuple[str, int] | None = None) -> Performance:
        """The control run; where there is an `entry`, with the thread stopped before the fork began.

        Where no thread comes to be stopped in it, or another has the lock, which is chance: again, and at last with the
        lock made free.
        """
        same = replace(cast, locks=frozenset({lock.address}), holds=False)
        orders = (cast.early, not cast.early) * _CONTROLS
        runs: Iterator[Performance] = (self._perform(finding, replace(same, early=early)) for early in orders)
        if entry is not None:
            runs = chain([self._beforehand(finding, same, same.locks, entry)], runs)
        for control in runs:
            if control.outcome not in (Outcome.NO_HOLDER, Outcome.HUNG):
                return control
        freed = self._freed(finding, cast, lock)
        return freed if freed.outcome is Outcome.PASSED else control

    def _freed(self, finding: Finding, cast: Cast, lock: Word) -> Performance:
        """The child starts with the lock made free. One that does not ask for it then shows nothing: again."""
        for _ in range(_ATTEMPTS):
            control = self._perform(finding, replace(cast, frees=lock, early=False))
            if control.outcome is not Outcome.LOST:
                break
        return control

    def _is_meant(self, seen: int, finding: Finding) -> bool:
        """A lock that was seen is one that the finding speaks of, and that was asked for, if one was."""
        assert self.census is not None
        if self.census.sites[seen].isdisjoint(self._sites[finding.object]):
            return False
        place = self.census.places.get(seen)
        is_it = self._is_of(seen, finding.lock)
        return is_it and (not self._asked or any(is_of(place, each) for each in self._asked))

    def _is_of(self, seen: int, lock: Lock | None) -> bool:
        """A lock that was seen is the one that a finding names, by its address or by the pointers that lead to it."""
        assert self.census is not None
        if lock is None or not self._is_pointed(lock):
            return is_of(self.census.places.get(seen), lock)
        found = self.census.pointed.get(_key(lock), set())
        # A ticket lock has two words.
        return seen in found or (
            found.isdisjoint(self.census.sites) and any(abs(seen - each) < _TICKET_REACH for each in found)
        )

    def _is_pointed(self, lock: Lock | None) -> bool:
        return lock is not None and _key(lock) in self._pointers

    def _is_named(self, lock: Lock | None) -> bool:
        """The finding says where its lock is."""
        return lock is not None and (lock.rva is not None or self._is_pointed(lock))

    def _fork_key(self, finding: Finding) -> str:
        """Findings with the same key are the same runs; one that names less is told by those that name more."""
        lock, fork = finding.lock, finding.fork
        parts = [finding.object, *([lock.name] if lock is not None and self._is_named(lock) else [])]
        return "\0".join([*parts, *([fork.object, fork.function] if fork is not None else [])])

    def _is_idle(self, finding: Finding) -> bool:
        """No thread took such a lock, on either side of a fork, and it would have been seen: a site is understood at
        which the scan names it, or any of the object's where it names none."""
        assert self.census is not None
        sites = self._sites[finding.object]
        named = {place for place, lock in self._claims.items() if lock == finding.lock}
        understood = {(a.site.object, a.site.rva) for a in decoded(sites)}
        is_seen = bool(understood & named if named else understood)
        taken = (lock for lock, where in self.census.sites.items() if not where.isdisjoint(sites))
        return is_seen and not any(self._is_of(lock, finding.lock) for lock in taken)

    # ---- the verdict -----------------------------------------------------------------------

    def _verdict(self, finding: Finding, blank: ProbeRecord, tries: list[_Try]) -> ProbeRecord:
        for number, attempt in enumerate(tries, 1):
            if attempt.hung is not None and attempt.control is not None:
                return self._hung(finding, blank, attempt.hung, attempt.control, number)
        runs = [(n, run) for n, attempt in enumerate(tries, 1) for run in attempt.runs]
        protected = [(n, run) for n, run in runs if run.outcome is Outcome.PROTECTED]
        held = [(n, run) for n, run in runs if run.outcome is Outcome.PASSED]
        kept = [(n, run) for n, run in runs if run.outcome is Outcome.KEPT]
        unseen = [run for run in (t.runs[0] for t in tries if t.runs) if run.outcome is Outcome.NO_HOLDER]
        is_open = _depends_on_caller(tries) and any(not run.is_alone for run in unseen)
        if protected and not held and not kept and not is_open:
            number, run = protected[0]
            tried = len({r.lock.address for _, r in protected if r.lock})
            why = (
                f"the fork is protected: {run.reached}. "
                f"So it was for {tried} lock{'s' if tried > 1 else ''} that other threads and the child take"
            )
            return replace(self._told(finding, blank, run, number), verdict=Verdict.REFUTED, why=why)
        if not runs:
            name = finding.lock.name if finding.lock is not None else "a lock"
            if self._is_idle(finding):
                why = f"nobody was seen to take {name} in a run without steering, which came to the fork"
                return replace(blank, why=why, scan_severity=finding.severity)
            return replace(blank, why=f"no other thread and child were seen to take {name} in the run without steering")
        number, run = (kept or held or [(n, r) for n, r in runs if is_open and r in unseen] or runs)[-1]
        return replace(self._told(finding, blank, run, number), why=_undecided(run))

    def _hung(
        self, finding: Finding, blank: ProbeRecord, run: Performance, control: Performance, number: int
    ) -> ProbeRecord:
        record = replace(self._told(finding, blank, run, number), control=_control(control))
        if control.outcome is not Outcome.PASSED:
            why = "the child waited for the lock, but the control run cannot be compared: " + record.control
            return replace(record, why=why)
        assert record.lock is not None
        is_kept = run.outcome is Outcome.KEPT
        whose = f"{run.keeper} had at the fork" if is_kept else "a thread of its parent held at the fork"
        changed = _FREED if control.is_freed else "with that thread stopped before the acquire"
        why = (
            f"a child waits for {record.lock.name or 'the lock'} at {record.lock_address}, which {whose} and which no "
            f"thread of its own has; {changed}, nothing else changed, it does not"
        )
        return replace(record, verdict=Verdict.CONFIRMED, why=why)

    def _told(self, finding: Finding, blank: ProbeRecord, run: Performance, number: int) -> ProbeRecord:
        """What a run leaves as evidence."""
        watched = run.watched
        return replace(
            blank,
            lock=finding.lock if self._is_pointed(finding.lock) else named_lock(run, finding),
            lock_address=f"{run.lock.address:#x}" if run.lock is not None else "",
            fork=run.fork,
            fork_number=number,
            holder=run.holder,
            waiters=watched.waiters if watched is not None else (),
            syscalls=watched.syscalls if watched is not None else (),
            samples=watched.samples if watched is not None else 0,
            watched_ms=watched.milliseconds if watched is not None else 0,
        )


def _depends_on_caller(tries: Sequence[_Try]) -> bool:
    """A fork was found protected, but not by handlers, which take the lock at every fork: by who called it there."""
    return any(run.outcome is Outcome.PROTECTED and run.is_callers for t in tries for run in t.runs)


def judged(finding: Finding, record: ProbeRecord) -> Finding:
    """The finding with what its probe said.

    A confirmed one is high: the scan's rank says how likely a hang is, and this one has been seen. That gates need no
    second rule for it, and that every format shows it, is why the rank is raised rather than the exit code. One whose
    lock nobody took, in a run that came to its fork, is ranked one lower: what it needs does not happen in every run.
    """
    if record.verdict is Verdict.INCONCLUSIVE:
        severity = finding.severity.lowered if record.scan_severity is not None else finding.severity
        record = replace(record, scan_severity=finding.severity if severity is not finding.severity else None)
        return replace(finding, severity=severity, probe=record)
    if record.verdict is Verdict.CONFIRMED and finding.severity is not Severity.HIGH:
        record = replace(record, scan_severity=finding.severity)
        finding = replace(finding, severity=Severity.HIGH)
    return replace(finding, probe=record, verdict=record.verdict)


def _key(lock: Lock) -> Key:
    return lock.object, lock.name


_TICKET_REACH: Final = 256
"""Bytes between the words of a ticket lock, at most."""
_ARRAY_REACH: Final = 1 << 20
"""Bytes after the start of an array of locks within which its elements lie."""


def is_of(place: Address | None, lock: Lock | None) -> bool:
    """Whether a lock that was seen is the one that a finding names; any is, where the finding names none by address."""
    if lock is None or lock.rva is None or lock.form not in ("global", "array"):
        return True
    if place is None or not place.object or Module.of(place.object).name != lock.object:
        return False
    if lock.form == "global":  # the next one may be another lock
        return place.rva == lock.rva
    return lock.rva <= place.rva < lock.rva + _ARRAY_REACH


def matching(census: Census, fork: Frame | None) -> list[counting.Fork]:
    """The forks that belong to a finding: the function that forks is on the stack."""
    if fork is None:
        return census.forks
    return [
        seen for seen in census.forks if any((f.object, f.function) == (fork.object, fork.function) for f in seen.stack)
    ]


def _not_reached(census: Census, finding: Finding) -> str:
    where = f"{finding.fork.function} in {finding.fork.object}" if finding.fork is not None else "a fork"
    others = list(dict.fromkeys(_forker(f.stack) for f in census.forks))
    seen = f"it forked in {', '.join(others[:4])}" if others else "it did not fork at all"
    return f"{where} was not reached with this command line: {seen}, and the program {census.end}"


def _forker(stack: tuple[Frame, ...]) -> str:
    """The innermost function of the program, or of whatever is not libc, on a fork's stack."""
    inner = [f for f in reversed(stack) if not f.object.startswith(("libc.", "libc-", "ld-"))]
    return inner[0].function if inner else "libc"


def _undecided(run: Performance) -> str:
    match run.outcome:
        case Outcome.PASSED if run.watched is not None:
            asked = "asked for it" if run.watched.was_asked else "did not ask for it"
            return f"the lock was held across the fork, but the child {asked} and did not hang: {run.watched.story}"
        case Outcome.HUNG:
            return "the child waited for the lock; no control run was made"
    return _said(run)


def _control(control: Performance) -> str:
    match control.outcome:
        case Outcome.PASSED if control.watched is not None:
            return f"{_FREED if control.is_freed else _STOPPED}: {control.watched.story}"
        case Outcome.HUNG if control.is_freed:
            return "the child hung although it started with the lock free"
        case Outcome.HUNG:
            return "the child hung although the thread had been stopped before it had the lock"
    return _said(control)


def _said(run: Performance) -> str:
    """How a run ended, in words."""
    return f"{run.outcome.value}: {run.reached}" if run.reached else run.outcome.value


def named_lock(run: Performance, finding: Finding) -> Lock | None:
    """The lock that was tried, by the symbol at its address where there is one."""
    if run.lock is None:
        return finding.lock
    path, rva = run.place
    named = finding.lock
    if named is not None and named.rva == rva and path and Module.of(path).name == named.object:
        return named
    if not path:
        return Lock(finding.object, "a lock in a heap or on a stack", None, "field")
    module = Module.of(path)
    return Lock(module.name, module.data_name(rva), rva, "global")


def census_lines(census: Census) -> Iterable[str]:
    """The census in words, a line for each lock."""
    words = {"other": "other threads before a fork", "leader": "the first thread", "child": "children"}
    for taken in census.taken():
        yield f"{place_name(taken.place, taken.lock)}: {words[taken.by]}, {taken.times} times"


def claim_lines(census: Census, claims: Mapping[tuple[str, int], Lock]) -> Iterable[str]:
    """Whether the sites at which the scan names a lock took that one: what it says of addresses, seen in a run.

    A site may take other locks besides, as one in a function that is given the lock does.
    """
    taken: dict[AcquireSite, list[int]] = {}
    for lock, sites in census.sites.items():
        for site in sites:
            taken.setdefault(site, []).append(lock)
    known = [
        (site, locks, claims[site.object, site.rva])
        for site, locks in taken.items()
        if (site.object, site.rva) in claims
    ]
    right = 0
    for site, locks, claim in sorted(known, key=lambda row: (row[0].object, row[0].rva)):
        if any(is_of(census.places[lock], claim) for lock in locks):
            right += 1
            continue
        module = Module.of(site.object)
        name, start = module.function(site.rva)
        seen = ", ".join(place_name(census.places[lock], lock) for lock in sorted(locks))
        where = f"{name}+{site.rva - start:#x} of {module.name}"
        yield f"at {where} the scan says {claim.name}; what was taken there is {seen}"
    if known:
        yield f"{right} of {len(known)} sites that ran and at which the scan names a lock took that lock"


def place_name(place: Address, lock: int) -> str:
    if not place.object:
        return f"{lock:#x}"
    module = Module.of(place.object)
    return f"{module.data_name(place.rva)} in {module.name}"
