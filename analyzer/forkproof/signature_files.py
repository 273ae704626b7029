"""The signatures' files: their schema, how they are read, and what is wrong with them.

Owns:   the schema of ``signatures/**/*.yml``, and the check that the files follow it.
Takes:  a directory of YAML files.
Gives:  the typed values of ``signatures``, each with its place, and problems with file and line.
Never:  answers a question about a library; that is ``signatures``.
Wrong:  a file that follows the schema may still say what is not so; its ``test`` key names how to find out.

YAML is composed to nodes and converted here, not loaded to dictionaries: nodes keep their line, so loading
and linting are the same code, and ``2.10`` without quotes is caught as a float before it turns into 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import yaml

from forkproof.signature_values import (
    EDITIONS,
    RULES,
    AllocatorSignature,
    Builtin,
    Callback,
    FillFunction,
    Fix,
    Forker,
    FutureFunction,
    HandlerLock,
    LibcArea,
    LibcLockNames,
    LibcSignature,
    LockFunction,
    MallocNames,
    Names,
    NameSet,
    Origin,
    Problem,
    ProcessSyscall,
    Recognise,
    ReportFunction,
    SignalSafe,
    ThreadStarter,
    VersionRange,
    WaitSyscall,
    When,
)

_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_T = TypeVar("_T")

MAX_ARGUMENT: Final = 7
"""Arguments 0 to 7 travel in registers on aarch64 (0 to 5 on x86-64); no later one can be tracked."""

MAX_FIX_LENGTH: Final = 300

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
class Field:
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


def _fields(file: _File, node: yaml.Node, fields: Mapping[str, Field]) -> dict[str, Any]:
    pairs = _pairs(file, node)
    for name in sorted(pairs.keys() - fields.keys()):
        file.complain(pairs[name][0], f"unknown key {name!r}; known here: {', '.join(fields)}")
    for name, each in fields.items():
        if each.required and name not in pairs and isinstance(node, yaml.MappingNode):
            file.complain(node, f"missing key {name!r}")
    return {name: fields[name].read(file, pair[1]) for name, pair in pairs.items() if name in fields}


def _record(make: Callable[..., _T], fields: Mapping[str, Field]) -> Callable[[_File, yaml.Node], _T | None]:
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
    "source": Field(_text),
    "test": Field(_text),
    "false_positives": Field(_text, required=False),
    "false_negatives": Field(_text, required=False),
}
_RECOGNISE: Final = _record(
    Recognise,
    {
        "sonames": Field(_names, required=False),
        "interpreters": Field(_names, required=False),
        "symbols": Field(_names, required=False),
        "sections": Field(_names, required=False),
        "strings": Field(_list(_regex), required=False),
    },
)
_FIX: Final = _record(Fix, {"rule": Field(_choice(*RULES)), "versions": Field(_versions), "text": Field(_fix_text)})
_BUILTIN: Final = _record(Builtin, {"libc": Field(_text), "versions": Field(_versions), "source": Field(_text)})
_MACHINE: Final = _choice("x86_64", "aarch64")


def _callback(
    *, name: str, arguments: tuple[int, ...], when: When | tuple[When, ...], origin: Origin, word: int | None = None
) -> Callback:
    """``when`` may be one word for all arguments."""
    each = (when,) * len(arguments) if isinstance(when, str) else when
    if len(each) != len(arguments):
        raise ValueError(f"'when' has {len(each)} words for {len(arguments)} arguments")
    return Callback(name, arguments, each, origin, word)


_WHEN: Final = _choice(
    "during", "later", "exit", "thread-exit", "new-thread", "new-process", "prepare", "parent", "child"
)


def _one_or_list(read: _Read) -> _Read:
    return lambda file, node: (_list(read) if isinstance(node, yaml.SequenceNode) else read)(file, node)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of signature file: where it lives, what its entries hold, and what must be unique.

    ``form``: ``one`` entry that is the file, a list of ``entries``, or one list of ``names``.
    """

    directory: str
    form: Literal["one", "entries", "names"]
    make: Callable[..., Any]
    fields: Mapping[str, Field]
    key: Callable[[Any], str | None] = lambda _: None


KINDS: Final[Mapping[str, Kind]] = {
    "allocator": Kind(
        "allocators",
        "one",
        AllocatorSignature,
        {
            "id": Field(_text),
            "title": Field(_text),
            "family": Field(_text),
            "recognise": Field(_RECOGNISE, required=False),
            "version": Field(_list(_version_regex), required=False),
            "entry_points": Field(_names, required=False),
            "builtin": Field(_BUILTIN, required=False),
            "fixes": Field(_list(_FIX)),
        },
        lambda allocator: f"id {allocator.id!r}",
    ),
    "malloc-family": Kind(
        "allocators",
        "entries",
        MallocNames,
        {"role": Field(_choice("allocate", "resize", "release", "query")), "names": Field(_list(_text))},
        lambda entry: f"role {entry.role!r}",
    ),
    "libc": Kind(
        "libc",
        "one",
        LibcSignature,
        {
            "id": Field(_text),
            "title": Field(_text),
            "recognise": Field(_RECOGNISE),
            "version": Field(_list(_version_regex), required=False),
        },
        lambda libc: f"id {libc.id!r}",
    ),
    "libc-locks": Kind(
        "libc",
        "entries",
        LibcLockNames,
        {
            "name": Field(_text),
            "libc": Field(_text),
            "versions": Field(_versions),
            "functions": Field(_names),
            "quiesced": Field(_text, required=False),
            "rare": Field(_text, required=False),
            "seldom": Field(_text, required=False),
            "same_as": Field(_text, required=False),
        },
        # Versions may differ under one name.
    ),
    "libc-areas": Kind(
        "libc",
        "entries",
        LibcArea,
        {
            "area": Field(_text),
            "names": Field(_list(_text)),
            "rare": Field(_text, required=False),
            "seldom": Field(_text, required=False),
        },
        lambda entry: f"area {entry.area!r}",
    ),
    "fork-handlers": Kind(
        "libc",
        "entries",
        HandlerLock,
        {"libc": Field(_text), "versions": Field(_versions), "held": Field(_truth)},
    ),
    "signal-safe": Kind(
        "posix",
        "entries",
        SignalSafe,
        {
            "names": Field(_list(_text)),
            "since": Field(_choice(*EDITIONS)),
            "until": Field(_choice(*EDITIONS), required=False),
        },
    ),
    "forkers": Kind(
        "forkers",
        "entries",
        Forker,
        {
            "name": Field(_text),
            "libc": Field(_text),
            "versions": Field(_versions),
            "kind": Field(_choice("fork", "vfork", "daemon", "spawn", "clone")),
            "handlers_run": Field(_truth),
            "child_result": Field(_optional(_number)),
            "callback": Field(_index, required=False),
            "flags": Field(_index, required=False),
        },
        # Two entries may share a name and a libc if no version is in both; see _overlapping_forkers.
    ),
    "process-syscalls": Kind(
        "forkers",
        "entries",
        ProcessSyscall,
        {
            "machine": Field(_MACHINE),
            "name": Field(_text),
            "number": Field(_number),
            "flags": Field(_choice("none", "argument-0", "struct-0")),
            "fixed_flags": Field(_number),
        },
        lambda call: f"system call {call.number} of {call.machine}",
    ),
    "exec-names": Kind("forkers", "names", Names, {"names": Field(_names)}),
    "exit-names": Kind("forkers", "names", Names, {"names": Field(_names)}),
    "threads": Kind(
        "threads",
        "entries",
        ThreadStarter,
        {
            "name": Field(_text),
            "callback": Field(_optional(_index)),
            "data": Field(_optional(_index)),
            "structure": Field(_index, required=False),
            "word": Field(_number, required=False),
            "equals": Field(_number, required=False),
            "function": Field(_number, required=False),
            "parameter": Field(_number, required=False),
        },
        lambda starter: f"name {starter.name!r}",
    ),
    "callbacks": Kind(
        "callbacks",
        "entries",
        _callback,
        {
            "name": Field(_text),
            "arguments": Field(_list(_index)),
            "when": Field(_one_or_list(_WHEN)),
            "word": Field(_number, required=False),
        },
        lambda callback: f"name {callback.name!r}",
    ),
    "locks": Kind(
        "locks",
        "entries",
        LockFunction,
        {
            "name": Field(_text),
            "op": Field(_choice("acquire", "try", "release", "init", "wait", "destroy")),
            "kind": Field(_choice("mutex", "rwlock", "spin", "sem", "once", "guard", "condvar", "barrier", "file")),
            "argument": Field(_index),
            "success": Field(_choice("always", "zero", "nonzero"), required=False),
            "bounded": Field(_truth, required=False),
            "shared": Field(_truth, required=False),
            "mutex": Field(_index, required=False),
        },
        lambda lock: f"name {lock.name!r}",
    ),
    "waiters": Kind("locks", "names", Names, {"names": Field(_names)}),
    "clocks": Kind("locks", "names", Names, {"names": Field(_names)}),
    "error-texts": Kind("failures", "names", Names, {"names": Field(_names)}),
    "aborts": Kind("failures", "names", Names, {"names": Field(_names)}),
    "reports": Kind(
        "failures",
        "entries",
        ReportFunction,
        {"name": Field(_text), "argument": Field(_index), "bits": Field(_number)},
        lambda function: f"name {function.name!r}",
    ),
    "fills": Kind(
        "locks",
        "entries",
        FillFunction,
        {"name": Field(_text), "block": Field(_index), "length": Field(_index)},
        lambda function: f"name {function.name!r}",
    ),
    "wait-syscalls": Kind(
        "locks",
        "entries",
        WaitSyscall,
        {"machine": Field(_MACHINE), "name": Field(_text), "number": Field(_number)},
        lambda call: f"system call {call.number} of {call.machine}",
    ),
    "blocking": Kind("locks", "names", Names, {"names": Field(_names)}),
    "joins": Kind("threads", "names", Names, {"names": Field(_names)}),
    "pools": Kind("threads", "names", Names, {"names": Field(_names)}),
    "futures": Kind(
        "threads",
        "entries",
        FutureFunction,
        {"name": Field(_text), "op": Field(_choice("wait", "tell")), "bounded": Field(_index, required=False)},
        lambda function: f"name {function.name!r}",
    ),
    "noreturn": Kind("noreturn", "names", Names, {"names": Field(_names)}),
}
DIRECTORIES: Final = tuple(dict.fromkeys(kind.directory for kind in KINDS.values()))


@dataclass(frozen=True, slots=True)
class Entry:
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


def _make(kind: Kind, values: dict[str, Any], defaults: Mapping[str, str]) -> object:
    """Fold the origin keys into one ``origin`` value; what an entry says of itself beats its file."""
    origin = dict(defaults) | {name: values.pop(name) for name in _ORIGIN if name in values}
    return kind.make(origin=Origin(**origin), **values)


def _read_entries(file: _File, name: str, defaults: Mapping[str, str], body: yaml.Node) -> Iterator[Entry]:
    kind = KINDS[name]
    optional_origin = {key: replace(each, required=False) for key, each in _ORIGIN.items()}
    read = _record(lambda **values: _make(kind, values, defaults), dict(kind.fields) | optional_origin)
    for node in body.value:
        value = read(file, node)
        if value is not None:
            yield Entry(name, value, file.path, node.start_mark.line + 1)


def _read_document(file: _File, name: str, node: yaml.Node) -> Iterator[Entry]:
    kind = KINDS[name]
    fields = {"kind": Field(_text), **kind.fields, **_ORIGIN}
    if kind.form == "entries":
        fields = {"kind": Field(_text), "entries": Field(_sequence), **_ORIGIN}
    values: dict[str, Any] | None = _record(dict, fields)(file, node)
    if values is None:
        return
    del values["kind"]
    if kind.form == "entries":
        yield from _read_entries(file, name, values, values.pop("entries"))
    else:
        yield Entry(name, _make(kind, values, {}), file.path, 1)


def _read_file(path: Path, directory: str, problems: list[Problem]) -> list[Entry]:
    file = _File(path, problems)
    node = _compose(file)
    if node is None:
        return []
    pairs = _pairs(file, node)
    allowed = [name for name, kind in KINDS.items() if kind.directory == directory]
    if "kind" not in pairs:
        if isinstance(node, yaml.MappingNode):
            file.complain(node, f"missing key 'kind'; in {directory}/ one of {', '.join(allowed)}")
        return []
    before = len(problems)
    name = _choice(*allowed)(file, pairs["kind"][1])
    return [] if len(problems) != before else list(_read_document(file, name, node))


# ----------------------------------------------------------------------------- a directory, as a whole


def _duplicates(entries: Sequence[Entry]) -> Iterator[Problem]:
    first: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        key = KINDS[entry.kind].key(entry.value)
        if key is None:
            continue
        other = first.setdefault((entry.kind, key), entry)
        if other is not entry:
            yield Problem(entry.file, entry.line, f"duplicate {key}; first in {other.file.name}:{other.line}")


def _overlapping_forkers(entries: Sequence[Entry]) -> Iterator[Problem]:
    seen: dict[tuple[str, str], list[Entry]] = {}
    for entry in (entry for entry in entries if entry.kind == "forkers"):
        forker: Forker = entry.value
        others = seen.setdefault((forker.name, forker.libc), [])
        for other in others:
            if forker.versions.overlaps(other.value.versions):
                what = f"duplicate forker {forker.name!r}: versions overlap {other.file.name}:{other.line}"
                yield Problem(entry.file, entry.line, what)
        others.append(entry)


def _duplicate_malloc_names(entries: Sequence[Entry]) -> Iterator[Problem]:
    seen: set[str] = set()
    for entry in (entry for entry in entries if entry.kind == "malloc-family"):
        for name in entry.value.names:
            if name in seen:
                yield Problem(entry.file, entry.line, f"duplicate name {name!r}")
            seen.add(name)


def read_directory(root: Path, directory: str) -> tuple[list[Entry], list[Problem]]:
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
        problems += read_directory(directory, name)[1]
    return sorted(problems)
