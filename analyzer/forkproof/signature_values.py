"""What a signature says: one frozen type for each kind of entry.

Owns:   the values of ``signatures/**/*.yml`` and what one of them can tell by itself: ranges of versions, sets of
        names, what an object is recognised by.
Takes:  names, sections and bytes of one object, handed in by the caller. Gives: frozen values.
Never:  reads a file; ``signature_files`` does, and ``signatures`` answers questions over all entries.
Wrong:  a recognition by string can hit a program that merely prints the string; a version is what the binary
        says of itself, so a distributor's backport is invisible. Each file states its own false positives
        and false negatives.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

Contains = Callable[["re.Pattern[bytes]"], "re.Match[bytes] | None"]
"""Searches one object's bytes for a pattern: ``lambda pattern: pattern.search(data)`` is a good one."""

CLONE_VM: Final = 0x100
CLONE_THREAD: Final = 0x10000

EDITIONS: Final = ("2008", "2017", "2024")
"""Editions of POSIX whose lists of async-signal-safe functions are known; 2008 with its second corrigendum."""

RULES: Final = (
    "atfork-unbound",
    "atfork-absent",
    "atfork-incomplete",
    "atfork-order",
    "handler-unsafe",
    "lock-reentry",
    "inherited-lock",
)


# -------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with one signature file. ``line`` counts from 1; 0 means the file as a whole."""

    file: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


class SignatureError(ValueError):
    """The signatures cannot be used as they are; carries the first problem, ``lint`` shows the others."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem}; see them all with: python -m forkproof.signatures lint")
        self.file = problem.file
        self.line = problem.line
        self.message = problem.message


# -------------------------------------------------------------------------------------------- versions

_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)")
_LEADING_VERSION = re.compile(r"\d+(?:\.\d+)*")


def _release(version: str) -> tuple[int, ...] | None:
    """The leading dotted number, without trailing zeros: ``2.10.0`` and ``2.10`` are the same release."""
    found = _LEADING_VERSION.match(version)
    if found is None:
        return None
    parts = [int(part) for part in found.group().split(".")]
    while len(parts) > 1 and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


_COMPARE: Final[Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}


@dataclass(frozen=True, slots=True)
class VersionRange:
    """A conjunction of bounds, written ``>=2.5,<2.11``; ``*`` is every version."""

    clauses: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> VersionRange:
        """Raises ValueError when ``text`` is not a range."""
        if text.strip() == "*":
            return cls(())
        return cls(tuple(cls._clause(part.strip()) for part in text.split(",")))

    @staticmethod
    def _clause(text: str) -> tuple[str, tuple[int, ...]]:
        found = _CLAUSE.fullmatch(text)
        release = _release(found.group(2)) if found else None
        if found is None or release is None:
            raise ValueError(f"not a version bound: {text!r} (expected e.g. '>=2.5,<2.11' or '*')")
        return found.group(1), release

    def contains(self, version: str | None) -> bool | None:
        """Whether ``version`` lies in the range; None when it is unknown and the answer depends on it.

        ``*`` holds whatever the version, so it answers True even for None. Text after the leading dotted
        number is ignored: ``2.36-9+deb12u14`` is 2.36.
        """
        if not self.clauses:
            return True
        release = _release(version) if version is not None else None
        if release is None:
            return None
        return all(_COMPARE[operator](release, bound) for operator, bound in self.clauses)

    @property
    def is_open(self) -> bool:
        """No upper bound: it describes the newest version known here."""
        return all(operator in (">", ">=", "!=") for operator, _ in self.clauses)

    def overlaps(self, other: VersionRange) -> bool:
        """Whether some version is in both. The answer can change only at a bound and right behind one."""
        bounds = {(0,)} | {bound for _, bound in (*self.clauses, *other.clauses)}
        samples = [".".join(map(str, parts)) for bound in bounds for parts in (bound, (*bound, 1))]
        return any(self.contains(sample) and other.contains(sample) for sample in samples)


# ----------------------------------------------------------------------------------------------- names


@dataclass(frozen=True, slots=True)
class NameSet:
    """Names, exact or as case-sensitive fnmatch patterns. ``in`` is one hash lookup for an exact name."""

    exact: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    _pattern: re.Pattern[str] | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.patterns:
            pattern = re.compile("|".join(fnmatch.translate(each) for each in self.patterns))
            object.__setattr__(self, "_pattern", pattern)

    @classmethod
    def of(cls, names: Iterable[str]) -> NameSet:
        """Anything with ``*``, ``?`` or ``[`` is a pattern."""
        exact, patterns = set(), []
        for name in names:
            if any(special in name for special in "*?["):
                patterns.append(name)
            else:
                exact.add(name)
        return cls(frozenset(exact), tuple(sorted(set(patterns))))

    def __contains__(self, name: object) -> bool:
        if name in self.exact:
            return True
        return self._pattern is not None and isinstance(name, str) and self._pattern.match(name) is not None

    def __bool__(self) -> bool:
        return bool(self.exact or self.patterns)

    def first_of(self, names: Collection[str]) -> str | None:
        """The first member among ``names`` in sorted order, exact ones before patterns; None without one."""
        exact = [name for name in self.exact if name in names]
        if exact or self._pattern is None:
            return min(exact, default=None)
        return min(filter(self._pattern.match, names), default=None)

    def __or__(self, other: NameSet) -> NameSet:
        return NameSet.of((*self.exact, *self.patterns, *other.exact, *other.patterns))


# ------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a statement comes from, how anyone can check it, and where it is known to be wrong."""

    source: str
    test: str
    false_positives: str | None = None
    false_negatives: str | None = None


Evidence = Literal["soname", "interpreter", "symbol", "section", "string"]


@dataclass(frozen=True, slots=True)
class Match:
    """An object was recognised: as what, by which kind of evidence, and the evidence itself."""

    id: str
    by: Evidence
    evidence: str


@dataclass(frozen=True, slots=True)
class Recognise:
    """Any one of these is enough."""

    sonames: NameSet = NameSet()
    interpreters: NameSet = NameSet()
    symbols: NameSet = NameSet()
    sections: NameSet = NameSet()
    strings: tuple[re.Pattern[bytes], ...] = ()

    def by_name(
        self, soname: str | None, interpreter: str | None, symbols: Collection[str], sections: Collection[str]
    ) -> tuple[Evidence, str] | None:
        if soname is not None and soname in self.sonames:
            return "soname", soname
        if interpreter is not None and interpreter in self.interpreters:
            return "interpreter", interpreter
        if (symbol := self.symbols.first_of(symbols)) is not None:
            return "symbol", symbol
        section = self.sections.first_of(sections)
        return None if section is None else ("section", section)

    def by_string(self, contains: Contains) -> tuple[Evidence, str] | None:
        for pattern in self.strings:
            if (found := contains(pattern)) is not None:
                return "string", found.group().decode("ascii", "backslashreplace")
        return None


def _first_version(patterns: Iterable[re.Pattern[bytes]], contains: Contains) -> str | None:
    for pattern in patterns:
        if (found := contains(pattern)) is not None:
            return found.group(1).decode("ascii", "backslashreplace")
    return None


@dataclass(frozen=True, slots=True)
class Builtin:
    """This allocator belongs to a libc whose own ``fork`` quiesces it, in these versions."""

    libc: str
    versions: VersionRange
    source: str


@dataclass(frozen=True, slots=True)
class Fix:
    """One fix that is right for these versions, in the imperative."""

    rule: str
    versions: VersionRange
    text: str


@dataclass(frozen=True, slots=True)
class AllocatorSignature:
    id: str
    title: str
    family: str
    origin: Origin
    recognise: Recognise = Recognise()
    version: tuple[re.Pattern[bytes], ...] = ()
    entry_points: NameSet = NameSet()
    builtin: Builtin | None = None
    fixes: tuple[Fix, ...] = ()

    def matches(
        self,
        soname: str | None,
        symbol_names: Collection[str],
        contains: Contains,
        section_names: Collection[str] = (),
    ) -> Match | None:
        """Recognise one object by soname, then a symbol that it *defines*, a section, and last a string.

        Hand in defined symbols only: a program that merely calls ``mi_malloc`` is not mimalloc. Give a set:
        lookups are by hash. ``contains`` costs about 0.6 ms per MiB and pattern, so ask only about objects
        that define a name of ``Signatures.malloc_family`` or have no dynamic symbols (static programs).
        """
        found = self.recognise.by_name(soname, None, symbol_names, section_names)
        found = found or self.recognise.by_string(contains)
        return None if found is None else Match(self.id, *found)

    def version_of(self, contains: Contains) -> str | None:
        """What the binary says its version is; None when it does not say. Ask only after ``matches``."""
        return _first_version(self.version, contains)

    def fix_for(self, rule: str, version: str | None) -> Fix | None:
        """The first fix whose range holds ``version``; for an unknown version, the first that may apply.

        Guessing is right there: the rule has fired, so the object *is* one of the affected versions.
        """
        answers = [(fix.versions.contains(version), fix) for fix in self.fixes if fix.rule == rule]
        certain = [fix for answer, fix in answers if answer]
        possible = [fix for answer, fix in answers if answer is None]
        return next(iter(certain or possible), None)

    def quiesced_by_fork_of(self, libc: str | None, version: str | None) -> bool | None:
        """Whether ``fork`` of that libc quiesces this allocator by itself; None when the version decides."""
        if self.builtin is None or self.builtin.libc != libc:
            return False
        return self.builtin.versions.contains(version)


@dataclass(frozen=True, slots=True)
class LibcSignature:
    id: str
    title: str
    origin: Origin
    recognise: Recognise
    version: tuple[re.Pattern[bytes], ...] = ()

    def matches(
        self,
        soname: str | None,
        interpreter: str | None,
        symbol_names: Collection[str],
        contains: Contains,
    ) -> Match | None:
        """Recognise a libc itself, a program that runs on one (interpreter), or a static one (strings)."""
        found = self.recognise.by_name(soname, interpreter, symbol_names, ())
        found = found or self.recognise.by_string(contains)
        return None if found is None else Match(self.id, *found)

    def version_of(self, contains: Contains) -> str | None:
        return _first_version(self.version, contains)


ForkerKind = Literal["fork", "vfork", "daemon", "spawn", "clone"]


@dataclass(frozen=True, slots=True)
class Forker:
    """A library function that creates a process.

    ``kind``: ``fork`` returns in the child, which may live on; ``daemon`` too, and the parent exits;
    ``vfork`` shares memory until exec; ``spawn`` runs nothing of the caller's in the child; ``clone`` runs
    the argument ``callback``, and ``flags`` is the argument with its CLONE_* word.
    ``handlers_run``: fork handlers run, and the libc quiesces its own locks.
    ``child_result``: what the function returns in the child, None when it does not return there.
    """

    name: str
    libc: str
    versions: VersionRange
    kind: ForkerKind
    handlers_run: bool
    child_result: int | None
    origin: Origin
    callback: int | None = None
    flags: int | None = None

    def applies_to(self, libc: str | None, version: str | None) -> bool:
        """An unknown version counts as the newest: only ranges without an upper bound apply."""
        if self.libc not in ("any", libc):
            return False
        answer = self.versions.contains(version)
        return self.versions.is_open if answer is None else answer


Creates = Literal["process", "shared", "thread", "unknown"]


@dataclass(frozen=True, slots=True)
class ProcessSyscall:
    """A system call that creates a task.

    ``flags`` says where its CLONE_* word is: in argument 0, in the first member of the structure that
    argument 0 points to, or nowhere, and then it is always ``fixed_flags``.
    """

    machine: str
    name: str
    number: int
    flags: Literal["none", "argument-0", "struct-0"]
    fixed_flags: int
    origin: Origin

    def creates(self, flags: int | None) -> Creates:
        """``shared`` is a process in the same address space (vfork): it inherits no copies of locks."""
        word = self.fixed_flags if self.flags == "none" else flags
        if word is None:
            return "unknown"
        if word & CLONE_THREAD:
            return "thread"
        return "shared" if word & CLONE_VM else "process"


@dataclass(frozen=True, slots=True)
class WaitSyscall:
    machine: str
    name: str
    number: int
    origin: Origin


@dataclass(frozen=True, slots=True)
class ThreadStarter:
    """Starts a thread in the function given as argument ``callback``, with argument ``data`` as its argument.

    ``callback`` is None when the entry is hidden in an object (std::thread's state and its virtual table).
    ``structure``, ``word``, ``equals``: it does so only if the structure that this argument points to has this
    32-bit number at this offset; a null pointer has not. ``function``, ``parameter``: where in it the function is, and
    what that is given.
    """

    name: str
    callback: int | None
    data: int | None
    origin: Origin
    structure: int | None = None
    word: int = 0
    equals: int = 0
    function: int | None = None
    parameter: int | None = None


@dataclass(frozen=True, slots=True)
class FutureFunction:
    """Waits until a future has its result, or tells who waits that it has.

    ``bounded``: the argument that says whether the wait ends after a time; 0 is no.
    """

    name: str
    op: Literal["wait", "tell"]
    origin: Origin
    bounded: int | None = None


@dataclass(frozen=True, slots=True)
class FillFunction:
    """Fills the block that argument ``block`` points to, of as many bytes as argument ``length`` says."""

    name: str
    block: int
    length: int
    origin: Origin


@dataclass(frozen=True, slots=True)
class ReportFunction:
    """Tells of something that has gone wrong if argument ``argument`` is a constant with any of these ``bits``."""

    name: str
    argument: int
    bits: int
    origin: Origin


When = Literal["during", "later", "exit", "thread-exit", "new-thread", "new-process", "prepare", "parent", "child"]


@dataclass(frozen=True, slots=True)
class Callback:
    """A function that calls the functions given as ``arguments``.

    ``when[i]`` belongs to ``arguments[i]``: ``during`` the call, ``later`` from an event loop or table, at
    ``exit`` or ``thread-exit``, in a ``new-thread`` or ``new-process``, or as a fork handler (``prepare``,
    ``parent``, ``child``). ``word``: the arguments are pointers to structures, which have the functions at this offset.
    """

    name: str
    arguments: tuple[int, ...]
    when: tuple[When, ...]
    origin: Origin
    word: int | None = None


LockOp = Literal["acquire", "try", "release", "init", "wait", "destroy", "use"]
LockKind = Literal["mutex", "rwlock", "spin", "sem", "once", "guard", "condvar", "barrier", "file", "object"]


@dataclass(frozen=True, slots=True)
class LockFunction:
    """A library function that works on the lock at argument ``argument``.

    ``success`` says which results mean that the lock is now held (``always``: it does not return otherwise,
    errors aside). ``bounded``: it gives up after a time, so it can delay a child but not hang it. ``shared``:
    a reader's lock. ``mutex``: for ``wait``, the argument with the mutex that is released meanwhile. ``use``: it takes
    the lock of an object and lets it go, as libc's code shows.
    """

    name: str
    op: LockOp
    kind: LockKind
    argument: int
    origin: Origin
    success: Literal["always", "zero", "nonzero"] = "always"
    bounded: bool = False
    shared: bool = False
    mutex: int | None = None


@dataclass(frozen=True, slots=True)
class LibcLockNames:
    """A lock of a libc that its code does not show as such.

    `functions` take it; `quiesced` says how fork does it, and is empty when it does not; `rare` says why
    running programs hardly ever take it, `seldom` why they seldom call these functions, each of which takes it.
    `same_as` is a function of that libc whose own code shows the lock, and so where it lies.
    """

    name: str
    libc: str
    versions: VersionRange
    functions: NameSet
    origin: Origin
    quiesced: str = ""
    rare: str = ""
    seldom: str = ""
    same_as: str = ""

    def applies_to(self, libc: str | None, version: str | None) -> bool:
        """An unknown version counts as the newest."""
        contains = self.versions.contains(version)
        return self.libc == libc and (self.versions.is_open if contains is None else contains)


@dataclass(frozen=True, slots=True)
class LibcArea:
    """What the locks that these functions of a libc take have to do with, and why they are rarely taken."""

    area: str
    names: tuple[str, ...]
    origin: Origin
    rare: str = ""
    seldom: str = ""


@dataclass(frozen=True, slots=True)
class HandlerLock:
    """Whether a libc holds the lock of its list of fork handlers while it runs them."""

    libc: str
    versions: VersionRange
    held: bool
    origin: Origin


@dataclass(frozen=True, slots=True)
class SignalSafe:
    """Functions that POSIX calls async-signal-safe, since an edition and perhaps until one."""

    names: tuple[str, ...]
    since: str
    origin: Origin
    until: str | None = None


MallocRole = Literal["allocate", "resize", "release", "query"]


@dataclass(frozen=True, slots=True)
class MallocNames:
    role: MallocRole
    names: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Names:
    names: NameSet
    origin: Origin
