"""The result document: what a scan says, as frozen values that every format renders.

Owns: the vocabulary of the report (version 1) and its types. Nothing here knows ELF or numpy.
Takes: plain values. Gives: plain values; `forkproof.report` turns them into JSON and text.
Must never: hold an address of one run of a program, or anything that changes between two scans of
the same input.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

_MADE_UP: Final = re.compile(r"\b(?:sub|lock|data)_[0-9a-f]+\b|0x[0-9a-f]+")
"""Names that change with every build, since an address is in them."""
_VERSION: Final = re.compile(r" \d+(?:\.\d+)+")
"""As in "a lock of tcmalloc 2.10"."""


class Verdict(Enum):
    """How far a finding has been shown (weakest first)."""

    SUSPECTED = "suspected"
    """A condition is unknown."""
    REACHABLE = "reachable"
    """All four conditions were shown from the code."""
    CONFIRMED = "confirmed"
    """A probe saw the child wait for the absent owner, and the control run did not hang."""
    REFUTED = "refuted"
    """A probe held the lock and the fork waited for it."""
    INCONCLUSIVE = "inconclusive"


class Severity(Enum):
    """What a finding is worth to a packager; ordered by `rank`."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """0 for high, larger for milder."""
        return list(Severity).index(self)

    @property
    def lowered(self) -> Severity:
        """One step milder; low and note stay: below them is nothing that anybody would look at."""
        return {Severity.HIGH: Severity.MEDIUM, Severity.MEDIUM: Severity.LOW}.get(self, self)


class Answer(Enum):
    """A question that may have no answer."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class WindowKind(Enum):
    """What becomes of the child of a fork."""

    EXEC = "exec"
    """Runs another program soon."""
    EXIT = "exit"
    """Does something and exits."""
    DAEMONIZE = "daemonize"
    """Returns to the callers of the fork and lives on in the same program."""
    SPAWN = "spawn"
    """libc creates the child and replaces it; nothing of the caller's runs in it."""
    UNKNOWN = "unknown"


class Hooks(Enum):
    """What an allocator has against being forked while locked."""

    EFFECTIVE = "effective"
    """It registers handlers, and the registration binds in this closure."""
    UNBOUND = "unbound"
    """It would register handlers, but the reference binds to nothing here."""
    ABSENT = "absent"
    """It takes locks and registers nothing."""
    INCOMPLETE = "incomplete"
    """Handlers run, but leave out locks of the allocation paths."""
    BUILTIN = "builtin"
    """libc's own fork quiesces it."""
    NOT_NEEDED = "not-needed"
    """Its allocation paths take no lock that waits."""
    UNKNOWN = "unknown"


def named(function: str) -> str:
    """The name without the version of a release, or nothing where the analyzer made it of an address."""
    return "" if _MADE_UP.search(function) else _VERSION.sub("", function)


def program_name(path: str) -> str:
    """What a target is recognised by in another report: its file's name."""
    return path.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Frame:
    """One function of a witness path; `edge` says how the next frame is reached from it."""

    object: str
    function: str
    offset: int
    """Distance in bytes from the function's start to the call (0: the function itself)."""
    edge: str = ""
    """direct, jump, plt, got, callback, table, ifunc, thread, fork, return, exit handler; empty for the last frame."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock, or "a lock of this allocator" where the analysis goes no further."""

    object: str
    name: str
    rva: int | None
    form: str
    """global, array, field, allocator, unknown."""


@dataclass(frozen=True, slots=True)
class Allocator:
    """An object of the closure that defines malloc or a known allocator's entry points."""

    object: str
    family: str
    version: str | None
    defines: tuple[str, ...]
    active: bool
    """True when the program's own references to malloc bind to it."""
    hooks: Hooks
    registered_by: tuple[Frame, ...]
    """The call chain that registers the handlers, outermost first."""
    handlers: tuple[str, ...]
    """Names of prepare, parent and child, where resolved."""
    registered_from: str
    """constructor, first allocation, call, never, or empty where it does not apply."""
    prepare_locks: tuple[Lock, ...]
    uncovered_locks: tuple[Lock, ...]
    why: str
    coverage: str = ""
    """How far prepare_locks and uncovered_locks were looked into: "judged", "N locks unresolved", "not judged" (no
    fork was seen that needs them, or libc is in the same file), or empty where no handler is registered or needed."""


@dataclass(frozen=True, slots=True)
class Window:
    """One call of a forker, and what the child runs after it."""

    forker: str
    function: str
    kind: WindowKind
    handlers_run: bool
    call_site: Frame
    reachable: Answer
    """Whether the call can be reached from the program's main, constructors or threads."""
    threads: Answer
    """Whether another thread can exist when it opens."""
    path: tuple[Frame, ...]
    """Shortest path from a root of the program to the call."""
    outcomes: tuple[str, ...]
    """exec, exit, return, loop: what child paths end in."""


@dataclass(frozen=True, slots=True)
class ClosureEntry:
    """One object of a target's closure."""

    name: str
    path: str
    build_id: str | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Launch:
    """What the scan took on from a file of the system that says how the program is started."""

    source: str
    """A systemd unit or drop-in, a wrapper script, or /etc/ld.so.preload."""
    preload: tuple[str, ...]
    """What it preloads; empty for a script that only starts the program."""


@dataclass(frozen=True, slots=True)
class Target:
    """What was learnt about one program."""

    path: str
    machine: str
    build_id: str | None
    interpreter: str | None
    libc: str
    """For example "glibc 2.36", "musl 1.2.3", "unknown"."""
    closure: tuple[ClosureEntry, ...]
    missing: tuple[str, ...]
    allocators: tuple[Allocator, ...]
    threads: Answer
    thread_sources: tuple[tuple[Frame, ...], ...]
    windows: tuple[Window, ...]
    sysroot: str = "/"
    """What the target was scanned with; see `forkproof.options`."""
    library_path: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    launches: tuple[Launch, ...] = ()
    """Why more is preloaded than was asked for: such a preload changes the verdict."""
    incomplete: tuple[str, ...] = ()
    """What else than `missing` keeps the answer from being complete: a preload in vain, a library that is damaged."""
    not_known: tuple[str, ...] = ()
    """Further questions without an answer, which no other field tells: each could hide a finding."""

    @property
    def name(self) -> str:
        """What a program is recognised by in another report."""
        return program_name(self.path)

    @property
    def gap(self) -> str:
        """Why not everything of it was analysed; empty where everything was."""
        names = ", ".join(dict.fromkeys(library.rsplit("/", 1)[-1] for library in self.missing))
        return f"not found: {names}" if names else next(iter(self.incomplete), "")


@dataclass(frozen=True, slots=True)
class Conditions:
    """The four necessary conditions, each a sentence that claims only what was found, with its answer."""

    threads: str
    holder: str
    requester: str
    not_quiesced: str
    answers: tuple[Answer, Answer, Answer, Answer]


class Baseline(Enum):
    """How a finding stands to the report that a team has accepted."""

    NEW = "new"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Suppression:
    """Why a finding is known and does not count, and until when."""

    reason: str
    expires: str | None
    """The last day on which it holds, as YYYY-MM-DD; None for ever."""
    source: str
    """The file and the entry that say so."""


@dataclass(frozen=True, slots=True)
class Override:
    """What a policy makes of a rule: whoever reads the report learns that the gate is not forkproof's own."""

    rule: str
    severity: Severity | None
    """What the rule's findings are ranked as; None where it is off, and they are left out."""
    findings: int
    """How many there were."""
    source: str
    """The file that says so."""


@dataclass(frozen=True, slots=True)
class ProbeThread:
    """A thread at the moment that matters."""

    name: str
    """For example "thread 2 of the child": numbered in the order in which a process got its threads."""
    doing: str
    """For example "futex(0x7ffff7fc1000, FUTEX_WAIT_PRIVATE, 2)", "spinning", "about to return from the acquire"."""
    stack: tuple[Frame, ...]
    """Outermost frame first; `offset` is where the call returns to, as gdb shows it."""


@dataclass(frozen=True, slots=True)
class ProbeRecord:
    """What a probe did and saw: the evidence for its verdict.

    The one part of a report that is of a run. Programs are run with fixed addresses, so that those repeat.
    """

    verdict: Verdict
    why: str
    """In a sentence or two; for inconclusive, what was reached instead."""
    command: tuple[str, ...]
    lock: Lock | None = None
    """The lock that was held, or tried."""
    lock_address: str = ""
    fork: tuple[Frame, ...] = ()
    """The stack of the thread that forked."""
    fork_number: int = 0
    """Which of the forks that belong to the finding, from 1."""
    holder: ProbeThread | None = None
    waiters: tuple[ProbeThread, ...] = ()
    """The child's threads that wait for the lock."""
    syscalls: tuple[str, ...] = ()
    """The child's system calls from the fork on, the last ones."""
    samples: int = 0
    """How often the child was looked at, and always found waiting."""
    watched_ms: int = 0
    control: str = ""
    """What the child did in the control run, in which the same thread was stopped before it had the lock."""
    census: tuple[str, ...] = ()
    """Which locks the program took in a run without steering, and by which threads."""
    scan_severity: Severity | None = None
    """What the scan had ranked the finding, where the probe changed that: a hang that was shown is high; one whose lock
    nobody took, in a run that came to the fork, is one step lower."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One hazard of one target."""

    rule: str
    severity: Severity
    verdict: Verdict
    target: str
    object: str
    message: str
    why: str
    fix: str
    lock: Lock | None = None
    fork: Frame | None = None
    holder: tuple[Frame, ...] = ()
    requester: tuple[Frame, ...] = ()
    conditions: Conditions | None = None
    probe: ProbeRecord | None = None
    count: int = 1
    """How many findings that differ only in call site were folded into this one."""
    suppression: Suppression | None = None
    baseline: Baseline | None = None
    """None where no baseline was given."""

    @property
    def is_open(self) -> bool:
        """Whether a gate counts it: neither refuted, nor suppressed, nor accepted before."""
        is_known = self.suppression is not None or self.baseline is Baseline.UNCHANGED
        return self.verdict is not Verdict.REFUTED and not is_known

    @property
    def fingerprint(self) -> str:
        """What a finding of the next build is recognised by; unlike `id`, it holds no `sub_<rva>` either.

        A function without a name is known by the named functions on the child's way to the lock. Two findings
        can share a fingerprint; who compares reports counts them.
        """
        parts = [self.rule, program_name(self.target), self.object]
        parts += [named(self.lock.name)] if self.lock else []
        if self.fork is not None:
            parts += [self.fork.object, named(self.fork.function)]
            parts += [] if named(self.fork.function) else [named(frame.function) for frame in self.requester]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def id(self) -> str:
        """Stable across rebuilds: rule, sonames, lock name and function names; no addresses, no paths."""
        parts = [self.rule, program_name(self.target), self.object]
        parts += [self.lock.name] if self.lock else []
        parts += [f"{self.fork.object}:{self.fork.function}"] if self.fork else []
        digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:10]
        return f"{self.rule}-{digest}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Something that could not be resolved, or that a reader should know; never a finding."""

    level: str
    """error (something was not analysed), warning, info."""
    object: str
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """The document: targets in the order given, findings most severe first."""

    targets: tuple[Target, ...] = ()
    findings: tuple[Finding, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    errors: tuple[str, ...] = field(default=())
    """Targets that could not be analysed, as messages; they also stand among the diagnostics."""
    overrides: tuple[Override, ...] = ()
    """Rules that a policy has ranked otherwise or switched off, in the order of their names."""
