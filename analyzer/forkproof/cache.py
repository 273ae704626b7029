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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forkproof.model import Diagnostic, Finding, Report, Target
from forkproof.report import json as report_json

if TYPE_CHECKING:
    from forkproof.closure import Closure, Sysroot
    from forkproof.options import ScanOptions

_SCHEMA: Final = "1"
_MAGIC: Final = b"forkproof-result-1 "
_LARGEST: Final = 64 << 20
"""Bytes that an entry may unpack to."""

Result = tuple[Target, list[Finding], list[Diagnostic]]


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

    with ThreadPoolExecutor(2) as pool:  # hashing lets go of the interpreter lock
        list(pool.map(lambda each: each.image.sha256, closure.objects))
    objects = []
    for each in closure.objects:
        places = FunctionNames(each.image, each.path, debug).debug_paths()
        files = [(path, _digest(found)) for path in places if (found := debug(path)) is not None]
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


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Cache:
    """One directory; it need not exist."""

    root: Path

    def get(self, key: str) -> Result | None:
        """The result, or None for whatever is not exactly an entry."""
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        found = _decoded(raw, key)
        if found is not None:
            _touch(path)
        return found

    def put(self, key: str, result: Result) -> None:
        """Keep a result. A full disk or a directory without permission costs the entry, nothing else."""
        path = self._path(key)
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_bytes(_encoded(key, result))
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

    def _path(self, key: str) -> Path:
        return self.root / "results" / key[:2] / key

    def _files(self) -> Iterator[Path]:
        """Entries, and what writers that were killed have left."""
        for place in sorted((self.root / "results").glob("[0-9a-f][0-9a-f]")):
            yield from sorted(place.iterdir())


def _touch(path: Path) -> None:
    """Note the use; `prune` goes by it."""
    with suppress(OSError):
        os.utime(path)


def _encoded(key: str, result: Result) -> bytes:
    target, findings, notes = result
    body = zlib.compress(report_json.render(Report((target,), tuple(findings), tuple(notes))).encode("ascii"), 1)
    return _MAGIC + hashlib.sha256(key.encode() + body).hexdigest().encode() + b"\n" + body


def _decoded(raw: bytes, key: str) -> Result | None:
    head, _, body = raw.partition(b"\n")
    if head != _MAGIC + hashlib.sha256(key.encode() + body).hexdigest().encode():
        return None
    try:
        decoder = zlib.decompressobj()
        text = decoder.decompress(body, _LARGEST)
        report = report_json.parse(text.decode("ascii")) if decoder.eof else None
    except (zlib.error, report_json.BadReport, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if report is None or len(report.targets) != 1:
        return None
    return report.targets[0], list(report.findings), list(report.diagnostics)
