"""What the world's libraries are called and how their functions behave, from ``signatures/**/*.yml``.

Owns:   the schema of those files, the check that they follow it, and the typed form the analysis asks.
Takes:  a directory of YAML files; the names, sections and bytes of one object, handed in by the caller.
Gives:  frozen values: allocators, libcs, forkers, thread starters, callbacks, lock functions, name sets.
Never:  opens an ELF file, imports lief or numpy, or decides a verdict. "libtcmalloc.so.4 is gperftools" is a
        fact about names; whether its fork handlers are bound in this closure is for the code to answer.
Wrong:  a recognition by string can hit a program that merely prints the string; a version is what the binary
        says of itself, so a distributor's backport is invisible. Each file states its own false positives
        and false negatives.

Files are read per directory on first use, because a command that lists allocators has no use for callbacks.
A bad file therefore raises at that first use; ``lint`` reads everything and reports every problem.

YAML is composed to nodes and converted here, not loaded to dictionaries: nodes keep their line, so loading
and linting are the same code, and ``2.10`` without quotes is caught as a float before it turns into 2.1.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar

import yaml

_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_T = TypeVar("_T")

Contains = Callable[["re.Pattern[bytes]"], "re.Match[bytes] | None"]
"""Searches one object's bytes for a pattern: ``lambda pattern: pattern.search(data)`` is a good one."""

MAX_ARGUMENT: Final = 7
"""Arguments 0 to 7 travel in registers on aarch64 (0 to 5 on x86-64); no later one can be tracked."""

MAX_FIX_LENGTH: Final = 300
CLONE_VM: Final = 0x100
CLONE_THREAD: Final = 0x10000

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
    """

    name: str
    callback: int | None
    data: int | None
    origin: Origin


When = Literal["during", "later", "exit", "thread-exit", "new-thread", "new-process", "prepare", "parent", "child"]


@dataclass(frozen=True, slots=True)
class Callback:
    """A function that calls the functions given as ``arguments``.

    ``when[i]`` belongs to ``arguments[i]``: ``during`` the call, ``later`` from an event loop or table, at
    ``exit`` or ``thread-exit``, in a ``new-thread`` or ``new-process``, or as a fork handler (``prepare``,
    ``parent``, ``child``).
    """

    name: str
    arguments: tuple[int, ...]
    when: tuple[When, ...]
    origin: Origin


LockOp = Literal["acquire", "try", "release", "init", "wait", "destroy"]
LockKind = Literal["mutex", "rwlock", "spin", "sem", "once", "guard", "condvar", "barrier", "file"]


@dataclass(frozen=True, slots=True)
class LockFunction:
    """A library function that works on the lock at argument ``argument``.

    ``success`` says which results mean that the lock is now held (``always``: it does not return otherwise,
    errors aside). ``bounded``: it gives up after a time, so it can delay a child but not hang it. ``shared``:
    a reader's lock. ``mutex``: for ``wait``, the argument with the mutex that is released meanwhile.
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


MallocRole = Literal["allocate", "resize", "release", "query"]


@dataclass(frozen=True, slots=True)
class _MallocNames:
    role: MallocRole
    names: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class _Names:
    names: NameSet
    origin: Origin


# -------------------------------------------------------------------------------------- reading a file


@dataclass(frozen=True, slots=True)
class _File:
    """Where the readers below complain. After a complaint they go on with a stand-in; see ``_record``."""

    path: Path
    problems: list[Problem]

    def complain(self, node: yaml.Node | None, message: str) -> None:
        line = 0 if node is None else node.start_mark.line + 1
        self.problems.append(Problem(self.path, line, message))


_Read = Callable[[_File, yaml.Node], Any]


@dataclass(frozen=True, slots=True)
class _Field:
    read: _Read
    required: bool = True


def _kind_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return {"str": "text", "int": "a number", "bool": "true/false", "null": "nothing"}.get(
        node.tag.rpartition(":")[2], f"a {node.tag.rpartition(':')[2]} (quote it?)"
    )


def _scalar(file: _File, node: yaml.Node, tag: str, expected: str) -> str | None:
    if isinstance(node, yaml.ScalarNode) and node.tag == f"tag:yaml.org,2002:{tag}":
        return str(node.value)
    file.complain(node, f"expected {expected}, found {_kind_of(node)}")
    return None


def _text(file: _File, node: yaml.Node) -> str:
    value = _scalar(file, node, "str", "text")
    if value is not None and not value.strip():
        file.complain(node, "expected text, found an empty string")
    return " ".join((value or "").split())


def _number(file: _File, node: yaml.Node) -> int:
    value = _scalar(file, node, "int", "a number")
    try:
        return int(value or "0", 0)
    except ValueError:  # YAML 1.1 also knows 0b1_0, 1:30 and octal 010
        file.complain(node, f"expected a decimal or 0x number, found {value}")
        return 0


def _truth(file: _File, node: yaml.Node) -> bool:
    value = _scalar(file, node, "bool", "true or false")
    return value is not None and value.lower() == "true"


def _index(file: _File, node: yaml.Node) -> int:
    value = _number(file, node)
    if not 0 <= value <= MAX_ARGUMENT:
        file.complain(node, f"argument index {value} out of range 0..{MAX_ARGUMENT}")
    return value


def _optional(read: Callable[[_File, yaml.Node], _T]) -> Callable[[_File, yaml.Node], _T | None]:
    def reader(file: _File, node: yaml.Node) -> _T | None:
        return None if node.tag == "tag:yaml.org,2002:null" else read(file, node)

    return reader


def _choice(*allowed: str) -> _Read:
    def reader(file: _File, node: yaml.Node) -> str:
        value = _scalar(file, node, "str", "one of " + ", ".join(allowed))
        if value is not None and value not in allowed:
            file.complain(node, f"expected one of {', '.join(allowed)}, found {value!r}")
        return value or allowed[0]

    return reader


def _list(read: Callable[[_File, yaml.Node], _T]) -> Callable[[_File, yaml.Node], tuple[_T, ...]]:
    def reader(file: _File, node: yaml.Node) -> tuple[_T, ...]:
        if isinstance(node, yaml.SequenceNode):
            return tuple(read(file, item) for item in node.value)
        file.complain(node, f"expected a list, found {_kind_of(node)}")
        return ()

    return reader


def _sequence(file: _File, node: yaml.Node) -> yaml.Node:
    """A list that is read later, when the rest of the file is known to be good."""
    if not isinstance(node, yaml.SequenceNode):
        file.complain(node, f"expected a list, found {_kind_of(node)}")
    return node


def _names(file: _File, node: yaml.Node) -> NameSet:
    values = _list(_text)(file, node)
    for value in sorted({value for value in values if values.count(value) > 1}):
        file.complain(node, f"{value!r} is listed twice")
    return NameSet.of(values)


def _versions(file: _File, node: yaml.Node) -> VersionRange:
    try:
        return VersionRange.parse(_text(file, node) or "*")
    except ValueError as error:
        file.complain(node, str(error))
        return VersionRange(())


def _regex(file: _File, node: yaml.Node) -> re.Pattern[bytes]:
    text = _scalar(file, node, "str", "a regular expression") or ""
    try:
        return re.compile(text.encode("ascii"))
    except (re.error, UnicodeEncodeError) as error:
        file.complain(node, f"bad regular expression {text!r}: {error}")
        return re.compile(b"")


def _version_regex(file: _File, node: yaml.Node) -> re.Pattern[bytes]:
    pattern = _regex(file, node)
    if pattern.pattern and pattern.groups != 1:
        file.complain(node, f"a version expression has exactly one group, this one has {pattern.groups}")
    return pattern


def _fix_text(file: _File, node: yaml.Node) -> str:
    text = _text(file, node)
    if len(text) > MAX_FIX_LENGTH:
        file.complain(node, f"a fix has at most {MAX_FIX_LENGTH} characters, this one has {len(text)}")
    return text


def _pairs(file: _File, node: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key → (key node, value node); complains of what is no mapping and of keys that come twice."""
    if not isinstance(node, yaml.MappingNode):
        file.complain(node, f"expected a mapping, found {_kind_of(node)}")
        return {}
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if key.value in pairs:
            file.complain(key, f"key {key.value!r} comes twice")
        pairs[key.value] = (key, value)
    return pairs


def _fields(file: _File, node: yaml.Node, fields: Mapping[str, _Field]) -> dict[str, Any]:
    pairs = _pairs(file, node)
    for name in sorted(pairs.keys() - fields.keys()):
        file.complain(pairs[name][0], f"unknown key {name!r}; known here: {', '.join(fields)}")
    for name, each in fields.items():
        if each.required and name not in pairs and isinstance(node, yaml.MappingNode):
            file.complain(node, f"missing key {name!r}")
    return {name: fields[name].read(file, pair[1]) for name, pair in pairs.items() if name in fields}


def _record(make: Callable[..., _T], fields: Mapping[str, _Field]) -> Callable[[_File, yaml.Node], _T | None]:
    """A reader of one mapping; None when there was a complaint, so no value is ever built from stand-ins."""

    def reader(file: _File, node: yaml.Node) -> _T | None:
        before = len(file.problems)
        values = _fields(file, node, fields)
        if len(file.problems) != before:
            return None
        try:
            return make(**values)
        except ValueError as error:
            file.complain(node, str(error))
            return None

    return reader


# ------------------------------------------------------------------------------------------ the schema

_ORIGIN: Final = {
    "source": _Field(_text),
    "test": _Field(_text),
    "false_positives": _Field(_text, required=False),
    "false_negatives": _Field(_text, required=False),
}
_RECOGNISE: Final = _record(
    Recognise,
    {
        "sonames": _Field(_names, required=False),
        "interpreters": _Field(_names, required=False),
        "symbols": _Field(_names, required=False),
        "sections": _Field(_names, required=False),
        "strings": _Field(_list(_regex), required=False),
    },
)
_FIX: Final = _record(Fix, {"rule": _Field(_choice(*RULES)), "versions": _Field(_versions), "text": _Field(_fix_text)})
_BUILTIN: Final = _record(Builtin, {"libc": _Field(_text), "versions": _Field(_versions), "source": _Field(_text)})
_MACHINE: Final = _choice("x86_64", "aarch64")


def _callback(*, name: str, arguments: tuple[int, ...], when: When | tuple[When, ...], origin: Origin) -> Callback:
    """``when`` may be one word for all arguments."""
    each = (when,) * len(arguments) if isinstance(when, str) else when
    if len(each) != len(arguments):
        raise ValueError(f"'when' has {len(each)} words for {len(arguments)} arguments")
    return Callback(name, arguments, each, origin)


_WHEN: Final = _choice(
    "during", "later", "exit", "thread-exit", "new-thread", "new-process", "prepare", "parent", "child"
)


def _one_or_list(read: _Read) -> _Read:
    return lambda file, node: (_list(read) if isinstance(node, yaml.SequenceNode) else read)(file, node)


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of signature file: where it lives, what its entries hold, and what must be unique.

    ``form``: ``one`` entry that is the file, a list of ``entries``, or one list of ``names``.
    """

    directory: str
    form: Literal["one", "entries", "names"]
    make: Callable[..., Any]
    fields: Mapping[str, _Field]
    key: Callable[[Any], str | None] = lambda _: None


_KINDS: Final[Mapping[str, _Kind]] = {
    "allocator": _Kind(
        "allocators",
        "one",
        AllocatorSignature,
        {
            "id": _Field(_text),
            "title": _Field(_text),
            "family": _Field(_text),
            "recognise": _Field(_RECOGNISE, required=False),
            "version": _Field(_list(_version_regex), required=False),
            "entry_points": _Field(_names, required=False),
            "builtin": _Field(_BUILTIN, required=False),
            "fixes": _Field(_list(_FIX)),
        },
        lambda allocator: f"id {allocator.id!r}",
    ),
    "malloc-family": _Kind(
        "allocators",
        "entries",
        _MallocNames,
        {"role": _Field(_choice("allocate", "resize", "release", "query")), "names": _Field(_list(_text))},
        lambda entry: f"role {entry.role!r}",
    ),
    "libc": _Kind(
        "libc",
        "one",
        LibcSignature,
        {
            "id": _Field(_text),
            "title": _Field(_text),
            "recognise": _Field(_RECOGNISE),
            "version": _Field(_list(_version_regex), required=False),
        },
        lambda libc: f"id {libc.id!r}",
    ),
    "forkers": _Kind(
        "forkers",
        "entries",
        Forker,
        {
            "name": _Field(_text),
            "libc": _Field(_text),
            "versions": _Field(_versions),
            "kind": _Field(_choice("fork", "vfork", "daemon", "spawn", "clone")),
            "handlers_run": _Field(_truth),
            "child_result": _Field(_optional(_number)),
            "callback": _Field(_index, required=False),
            "flags": _Field(_index, required=False),
        },
        # Two entries may share a name and a libc if no version is in both; see _overlapping_forkers.
    ),
    "process-syscalls": _Kind(
        "forkers",
        "entries",
        ProcessSyscall,
        {
            "machine": _Field(_MACHINE),
            "name": _Field(_text),
            "number": _Field(_number),
            "flags": _Field(_choice("none", "argument-0", "struct-0")),
            "fixed_flags": _Field(_number),
        },
        lambda call: f"system call {call.number} of {call.machine}",
    ),
    "exec-names": _Kind("forkers", "names", _Names, {"names": _Field(_names)}),
    "exit-names": _Kind("forkers", "names", _Names, {"names": _Field(_names)}),
    "threads": _Kind(
        "threads",
        "entries",
        ThreadStarter,
        {"name": _Field(_text), "callback": _Field(_optional(_index)), "data": _Field(_optional(_index))},
        lambda starter: f"name {starter.name!r}",
    ),
    "callbacks": _Kind(
        "callbacks",
        "entries",
        _callback,
        {"name": _Field(_text), "arguments": _Field(_list(_index)), "when": _Field(_one_or_list(_WHEN))},
        lambda callback: f"name {callback.name!r}",
    ),
    "locks": _Kind(
        "locks",
        "entries",
        LockFunction,
        {
            "name": _Field(_text),
            "op": _Field(_choice("acquire", "try", "release", "init", "wait", "destroy")),
            "kind": _Field(_choice("mutex", "rwlock", "spin", "sem", "once", "guard", "condvar", "barrier", "file")),
            "argument": _Field(_index),
            "success": _Field(_choice("always", "zero", "nonzero"), required=False),
            "bounded": _Field(_truth, required=False),
            "shared": _Field(_truth, required=False),
            "mutex": _Field(_index, required=False),
        },
        lambda lock: f"name {lock.name!r}",
    ),
    "waiters": _Kind("locks", "names", _Names, {"names": _Field(_names)}),
    "wait-syscalls": _Kind(
        "locks",
        "entries",
        WaitSyscall,
        {"machine": _Field(_MACHINE), "name": _Field(_text), "number": _Field(_number)},
        lambda call: f"system call {call.number} of {call.machine}",
    ),
    "noreturn": _Kind("noreturn", "names", _Names, {"names": _Field(_names)}),
}
DIRECTORIES: Final = tuple(dict.fromkeys(kind.directory for kind in _KINDS.values()))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value with its place, so that a clash between two files can name both."""

    kind: str
    value: Any
    file: Path
    line: int


def _compose(file: _File) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(file.path.read_bytes(), Loader=_YamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        text = " ".join(str(getattr(error, "problem", None) or error).split())
        file.problems.append(Problem(file.path, mark.line + 1 if mark else 1, f"not YAML: {text}"))
        return None
    if node is None:
        file.complain(None, "empty file")
    return node


def _make(kind: _Kind, values: dict[str, Any], defaults: Mapping[str, str]) -> object:
    """Fold the origin keys into one ``origin`` value; what an entry says of itself beats its file."""
    origin = dict(defaults) | {name: values.pop(name) for name in _ORIGIN if name in values}
    return kind.make(origin=Origin(**origin), **values)


def _read_entries(file: _File, name: str, defaults: Mapping[str, str], body: yaml.Node) -> Iterator[_Entry]:
    kind = _KINDS[name]
    optional_origin = {key: replace(each, required=False) for key, each in _ORIGIN.items()}
    read = _record(lambda **values: _make(kind, values, defaults), dict(kind.fields) | optional_origin)
    for node in body.value:
        value = read(file, node)
        if value is not None:
            yield _Entry(name, value, file.path, node.start_mark.line + 1)


def _read_document(file: _File, name: str, node: yaml.Node) -> Iterator[_Entry]:
    kind = _KINDS[name]
    fields = {"kind": _Field(_text), **kind.fields, **_ORIGIN}
    if kind.form == "entries":
        fields = {"kind": _Field(_text), "entries": _Field(_sequence), **_ORIGIN}
    values: dict[str, Any] | None = _record(dict, fields)(file, node)
    if values is None:
        return
    del values["kind"]
    if kind.form == "entries":
        yield from _read_entries(file, name, values, values.pop("entries"))
    else:
        yield _Entry(name, _make(kind, values, {}), file.path, 1)


def _read_file(path: Path, directory: str, problems: list[Problem]) -> list[_Entry]:
    file = _File(path, problems)
    node = _compose(file)
    if node is None:
        return []
    pairs = _pairs(file, node)
    allowed = [name for name, kind in _KINDS.items() if kind.directory == directory]
    if "kind" not in pairs:
        if isinstance(node, yaml.MappingNode):
            file.complain(node, f"missing key 'kind'; in {directory}/ one of {', '.join(allowed)}")
        return []
    before = len(problems)
    name = _choice(*allowed)(file, pairs["kind"][1])
    return [] if len(problems) != before else list(_read_document(file, name, node))


# ----------------------------------------------------------------------------- a directory, as a whole


def _duplicates(entries: Sequence[_Entry]) -> Iterator[Problem]:
    first: dict[tuple[str, str], _Entry] = {}
    for entry in entries:
        key = _KINDS[entry.kind].key(entry.value)
        if key is None:
            continue
        other = first.setdefault((entry.kind, key), entry)
        if other is not entry:
            yield Problem(entry.file, entry.line, f"duplicate {key}; first in {other.file.name}:{other.line}")


def _overlapping_forkers(entries: Sequence[_Entry]) -> Iterator[Problem]:
    seen: dict[tuple[str, str], list[_Entry]] = {}
    for entry in (entry for entry in entries if entry.kind == "forkers"):
        forker: Forker = entry.value
        others = seen.setdefault((forker.name, forker.libc), [])
        for other in others:
            if forker.versions.overlaps(other.value.versions):
                what = f"duplicate forker {forker.name!r}: versions overlap {other.file.name}:{other.line}"
                yield Problem(entry.file, entry.line, what)
        others.append(entry)


def _duplicate_malloc_names(entries: Sequence[_Entry]) -> Iterator[Problem]:
    seen: set[str] = set()
    for entry in (entry for entry in entries if entry.kind == "malloc-family"):
        for name in entry.value.names:
            if name in seen:
                yield Problem(entry.file, entry.line, f"duplicate name {name!r}")
            seen.add(name)


def _read_directory(root: Path, directory: str) -> tuple[list[_Entry], list[Problem]]:
    problems: list[Problem] = []
    if not (root / directory).is_dir():
        return [], [Problem(root / directory, 0, "no such directory of signatures")]
    entries = [
        entry for path in sorted((root / directory).glob("*.yml")) for entry in _read_file(path, directory, problems)
    ]
    problems += _duplicates(entries)
    problems += _overlapping_forkers(entries)
    problems += _duplicate_malloc_names(entries)
    return entries, problems


def _stray_files(root: Path) -> Iterator[Problem]:
    """Files that the loader would silently pass over."""
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        if place.parts[0] not in DIRECTORIES and path.suffix in (".yml", ".yaml"):
            yield Problem(path, 0, f"not read here; the directories are {', '.join(DIRECTORIES)}")
        elif path.is_file() and len(place.parts) > 1 and (path.suffix != ".yml" or len(place.parts) > 2):
            yield Problem(path, 0, "not read: signatures are <directory>/<name>.yml")


def lint(directory: Path) -> list[Problem]:
    """Every problem of every file, sorted by place; empty when ``load(directory)`` works throughout."""
    problems = list(_stray_files(directory))
    for name in DIRECTORIES:
        problems += _read_directory(directory, name)[1]
    return sorted(problems)


UNKNOWN_ALLOCATOR: Final = "unknown"


@dataclass(frozen=True)
class Signatures:
    """All signatures below one directory; each part is read when it is first asked for."""

    directory: Path
    _read: dict[str, list[_Entry]] = field(default_factory=dict, repr=False, compare=False)

    def _values(self, kind: str) -> list[Any]:
        directory = _KINDS[kind].directory
        if directory not in self._read:
            entries, problems = _read_directory(self.directory, directory)
            if problems:
                raise SignatureError(min(problems))
            self._read[directory] = entries
        return [entry.value for entry in self._read[directory] if entry.kind == kind]

    def _by_name(self, kind: str) -> Mapping[str, Any]:
        return MappingProxyType({value.name: value for value in self._values(kind)})

    def _name_set(self, kind: str) -> NameSet:
        union = NameSet()
        for value in self._values(kind):
            union |= value.names
        return union

    @cached_property
    def allocators(self) -> tuple[AllocatorSignature, ...]:
        """Sorted by id, without the stand-in for unknown allocators."""
        found: list[AllocatorSignature] = self._values("allocator")
        known = (each for each in found if each.id != UNKNOWN_ALLOCATOR)
        return tuple(sorted(known, key=lambda each: each.id))

    @cached_property
    def unknown_allocator(self) -> AllocatorSignature:
        """Recognises nothing; holds, per rule, the fix that is right for an allocator nobody described."""
        for each in self._values("allocator"):
            if each.id == UNKNOWN_ALLOCATOR and isinstance(each, AllocatorSignature):
                return each
        raise SignatureError(Problem(self.directory / "allocators", 0, f"no allocator {UNKNOWN_ALLOCATOR!r}"))

    def fix_for(self, allocator: AllocatorSignature | None, rule: str, version: str | None) -> Fix | None:
        """The allocator's own fix, else the generic one for ``rule``; None for a rule without any."""
        own = allocator.fix_for(rule, version) if allocator is not None else None
        return own or self.unknown_allocator.fix_for(rule, version)

    @cached_property
    def malloc_family(self) -> Mapping[str, MallocRole]:
        """The standard allocation functions, C and mangled C++, each with what it does."""
        groups: list[_MallocNames] = self._values("malloc-family")
        return MappingProxyType({name: group.role for group in groups for name in group.names})

    @cached_property
    def libcs(self) -> tuple[LibcSignature, ...]:
        return tuple(sorted(self._values("libc"), key=lambda each: str(each.id)))

    @cached_property
    def forkers(self) -> tuple[Forker, ...]:
        """Every entry, for every libc and version; ``forkers_for`` is what an analysis wants."""
        return tuple(self._values("forkers"))

    def forkers_for(self, libc: str | None, version: str | None) -> Mapping[str, Forker]:
        """What each process-creating function does in that libc, in that version.

        Where a libc has entries of its own for a name, the general one says nothing about it: glibc 2.33 has
        no ``_Fork``. With ``version`` None the newest known behaviour counts, with ``libc`` None the general.
        """
        own = {forker.name for forker in self.forkers if forker.libc == libc}
        found = {
            forker.name: forker
            for forker in self.forkers
            if forker.applies_to(libc, version) and (forker.libc == libc or forker.name not in own)
        }
        return MappingProxyType(dict(sorted(found.items())))

    def raw_process_syscalls(self, machine: str) -> Mapping[int, ProcessSyscall]:
        found: list[ProcessSyscall] = self._values("process-syscalls")
        return MappingProxyType({call.number: call for call in found if call.machine == machine})

    @cached_property
    def exec_names(self) -> NameSet:
        return self._name_set("exec-names")

    @cached_property
    def exit_names(self) -> NameSet:
        return self._name_set("exit-names")

    @cached_property
    def thread_starters(self) -> Mapping[str, ThreadStarter]:
        return self._by_name("threads")

    @cached_property
    def callbacks(self) -> Mapping[str, Callback]:
        return self._by_name("callbacks")

    @cached_property
    def locks(self) -> Mapping[str, LockFunction]:
        return self._by_name("locks")

    @cached_property
    def waiters(self) -> NameSet:
        """A call to one of these on the failing side of an atomic operation shows that this side waits."""
        return self._name_set("waiters")

    def wait_syscalls(self, machine: str) -> Mapping[int, WaitSyscall]:
        found: list[WaitSyscall] = self._values("wait-syscalls")
        return MappingProxyType({call.number: call for call in found if call.machine == machine})

    @cached_property
    def noreturn(self) -> NameSet:
        return self._name_set("noreturn")


def default_directory() -> Path:
    """The data in the installed package, else the checkout's own ``signatures/``."""
    packaged = Path(__file__).parent / "signatures"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "signatures"


def load(directory: Path | None = None) -> Signatures:
    """The signatures below ``directory``. Files are read on first use, and that is when a bad one raises."""
    directory = directory or default_directory()
    if not directory.is_dir():
        raise SignatureError(Problem(directory, 0, "no such directory of signatures"))
    return Signatures(directory)


def main(arguments: Sequence[str]) -> int:
    """``lint [DIR]``: 0 clean, 1 problems, 2 usage."""
    if not arguments or arguments[0] != "lint" or len(arguments) > 2:
        print("usage: python -m forkproof.signatures lint [DIR]", file=sys.stderr)
        return 2
    directory = Path(arguments[1]) if len(arguments) == 2 else default_directory()
    problems = lint(directory)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
