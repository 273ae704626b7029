"""What scans of programs gave, kept by the content of everything that they were made from.

Owns: the key, the directory, and what is believed of a file in it.
Takes: a loaded closure and what was asked for. Gives: the result of an earlier scan, or nothing.
Must never: fail a scan, believe a damaged file, or run what it reads: an entry is JSON under its own checksum, so a
      corrupted, truncated or foreign one is a miss. Entries appear by one rename, so runs at the same time do no harm.

The unit is one program, not one object. Indexing the objects is a quarter of a scan, so that summaries of objects alone
could make a second run a third faster; programs make it many times faster, and the objects that programs share are
shared in memory (`forkproof.shared`). The price: a new libc makes every program of a system new.

The key covers the bytes of every object and of every separate debug file, their paths, what is missing, the options,
and forkproof's own sources and signatures: whoever edits one of these begins with an empty cache, and cannot forget to.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forkproof.model import Diagnostic, Finding, Report, Target
from forkproof.report import json as report_json

if TYPE_CHECKING:
    from forkproof.closure import Closure, Sysroot
    from forkproof.options import ScanOptions

_SCHEMA: Final = "2"
_MAGIC: Final = b"forkproof-entry-2 "
_RESULTS: Final = "results"
_PARTS: Final = "parts"
_KEPT: Final = 256
"""Parts that stay in memory; the largest, a libc's catalogue, has some 50 KB."""
_LARGEST: Final = 64 << 20
"""Bytes that an entry may unpack to."""

Result = tuple[Target, list[Finding], list[Diagnostic]]
Json = Any
"""What json.loads gives."""


def directory() -> Path:
    """Where it is: below $XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "forkproof"


@once
def _own_sources() -> str:
    """A digest of forkproof's code and signatures."""
    from forkproof import signatures

    roots = (Path(__file__).parent, signatures.default_directory())
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(each for each in root.rglob("*") if each.suffix in {".py", ".yml"}):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def key(closure: Closure, sysroot: Sysroot, options: ScanOptions) -> str:
    """What the result of scanning this closure is kept under."""
    from forkproof.elf.names import FunctionNames

    def debug(path: str) -> Path | None:
        try:
            return sysroot.host_path(path)
        except (OSError, ValueError):
            return None

    if options.jobs > 1:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:  # hashing lets go of the interpreter lock
            list(pool.map(lambda each: each.image.sha256, closure.objects))
    objects = []
    for each in closure.objects:
        files = FunctionNames(each.image, each.path, debug).debug_digests
        objects.append((each.name, each.path, each.why, each.needed, each.in_scope, each.image.sha256, files))
    whole = (
        _SCHEMA,
        _own_sources(),
        objects,
        [(each.name, each.needed_by) for each in closure.missing],
        [(note.level, note.object, note.message) for note in closure.diagnostics],
        closure.init_order,
        (options.library_path, options.preload, options.also),
    )
    return hashlib.sha256(repr(whole).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Cache:
    """One directory; it need not exist."""

    root: Path

    def get(self, key: str) -> Result | None:
        """The result, or None for whatever is not exactly an entry."""
        text = self._read(_RESULTS, key)
        return None if text is None else _parsed(text)

    def put(self, key: str, result: Result) -> None:
        """Keep a result. A full disk or a directory without permission costs the entry, nothing else."""
        target, findings, notes = result
        self._write(_RESULTS, key, report_json.render(Report((target,), tuple(findings), tuple(notes))))

    def get_part(self, key: str) -> Json:
        """What was found about a part of programs, as `put_part` got it; None for nothing."""
        text = self._read(_PARTS, key)
        return None if text is None else json.loads(text)

    def put_part(self, key: str, value: object) -> None:
        """Keep what was found about a part of programs: JSON."""
        self._write(_PARTS, key, json.dumps(value, separators=(",", ":")))

    def _read(self, kind: str, key: str) -> str | None:
        path = self._path(kind, key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        text = _decoded(raw, kind, key)
        if text is not None:
            _touch(path)
        return text

    def _write(self, kind: str, key: str, text: str) -> None:
        path = self._path(kind, key)
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_bytes(_encoded(kind, key, text))
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def entries(self) -> list[tuple[Path, int, float]]:
        """Path, size and time of last use of each entry, the longest unused first."""
        found = []
        for path in self._files():
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (entry[2], entry[0]))

    def prune(self, *, largest: int, days: float) -> tuple[int, int]:
        """Remove what was not used for so many days, then the longest unused until the rest fits; counts and bytes."""
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        oldest = time.time() - days * 86400
        removed = freed = 0
        for path, size, used in entries:
            if used >= oldest and total - freed <= largest:
                break
            path.unlink(missing_ok=True)
            removed, freed = removed + 1, freed + size
        return removed, freed

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def _files(self) -> Iterator[Path]:
        """Entries, and what writers that were killed have left."""
        for kind in (_RESULTS, _PARTS):
            for place in sorted((self.root / kind).glob("[0-9a-f][0-9a-f]")):
                yield from sorted(place.iterdir())


def _touch(path: Path) -> None:
    """Note the use; `prune` goes by it."""
    with suppress(OSError):
        os.utime(path)


def _head(kind: str, key: str, body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(f"{kind}/{key}".encode() + body).hexdigest().encode()


def _encoded(kind: str, key: str, text: str) -> bytes:
    body = zlib.compress(text.encode("ascii"), 1)
    return _head(kind, key, body) + b"\n" + body


def _decoded(raw: bytes, kind: str, key: str) -> str | None:
    head, _, body = raw.partition(b"\n")
    if head != _head(kind, key, body):
        return None
    try:
        decoder = zlib.decompressobj()
        text = decoder.decompress(body, _LARGEST)
        return text.decode("ascii") if decoder.eof else None
    except (zlib.error, UnicodeDecodeError):
        return None


def _parsed(text: str) -> Result | None:
    try:
        report = report_json.parse(text)
    except (report_json.BadReport, json.JSONDecodeError):
        return None
    if len(report.targets) != 1:
        return None
    return report.targets[0], list(report.findings), list(report.diagnostics)


class Parts:
    """What was found about parts of programs (`forkproof.content`), by key.

    In memory for the programs of one scan, and in a cache's directory if there is one.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._cache = cache
        self._known: OrderedDict[str, Json] = OrderedDict()

    def get(self, key: str) -> Json:
        """What was put there: JSON, to be read only; None for nothing."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        value = None if self._cache is None else self._cache.get_part(_with_sources(key))
        if value is not None:
            self._keep(key, value)
        return value

    def put(self, key: str, value: object) -> None:
        """Keep a value."""
        self._keep(key, value)
        if self._cache is not None:
            self._cache.put_part(_with_sources(key), value)

    def _keep(self, key: str, value: object) -> None:
        self._known[key] = value
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)


def _with_sources(key: str) -> str:
    return hashlib.sha256(f"{_SCHEMA} {_own_sources()} {key}".encode()).hexdigest()
