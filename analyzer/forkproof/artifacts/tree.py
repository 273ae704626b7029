"""The files of an archive as a tree that exists nowhere but here.

Owns: what is kept of each member: the content of ELF files (in a temporary directory, under numbers) and of small
      texts that say how programs are started (in memory); of everything else that it exists.
Takes: members, in any order. Gives: a `Tree`.
Must never: create a file under a name from an archive. That is what makes path tricks harmless: a link is a string, a
      path is a key, ".." is refused, and nothing is ever followed on this machine.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from forkproof.artifacts.limits import DEFAULT, BadArchive, Limits, exceeded
from forkproof.model import Diagnostic

_CHUNK: Final = 1 << 20
_HEAD: Final = 64
_LARGEST_TEXT: Final = 4 << 20
_TEXTS: Final = re.compile(
    r"/etc/|/(?:lib|etc|run)/systemd/|/(?:s?bin|libexec|lib)/[^/]*$|^/(?:oci-layout|index\.json|manifest\.json|[0-9a-f]{64}\.json)$"
)
"""Paths whose content can say how a program is started, or what the loader does."""


class Kind(Enum):
    """What a path is."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "other"
    """A device, a FIFO, a socket: exists, and is never opened."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One member. Two paths are one file exactly when they have the same Entry: a hard link."""

    kind: Kind
    link: str = ""
    """Where a symbolic link leads."""
    blob: Path | None = None
    """The content of an ELF file."""
    data: bytes = b""
    """The content of a text, or the first bytes of what was not kept."""
    is_whole: bool = False
    """`data` is everything."""


DIRECTORY: Final = Entry(Kind.DIRECTORY)


class Store:
    """Where contents go, for all archives of a run together; the directory is removed by who made it."""

    def __init__(self, directory: Path, limits: Limits = DEFAULT) -> None:
        self.limits = limits
        self._directory = directory
        self._number = 0
        self._kept = self._text = self._entries = 0

    def count(self, archive: str) -> None:
        """One entry more."""
        self._entries += 1
        if self._entries > self.limits.entries:
            raise exceeded(archive, f"more than {self.limits.entries} files")

    def file(self, archive: str, path: str, read: Callable[[int], bytes]) -> Entry:
        """The entry of a regular file; `read(n)` gives up to n bytes of it, none at its end."""
        head = _exactly(read, _HEAD)
        if head.startswith(b"\x7fELF"):
            return Entry(Kind.FILE, blob=self._write(archive, head, read), data=head)
        if (_TEXTS.search(path) and b"\0" not in head[:4]) or path == "/etc/ld.so.cache":
            data = head + _exactly(read, _LARGEST_TEXT + 1 - len(head))
            if len(data) <= _LARGEST_TEXT:
                self._text += len(data)
                if self._text > self.limits.text:
                    raise exceeded(archive, f"more than {self.limits.text >> 20} MiB of configuration")
                return Entry(Kind.FILE, data=data, is_whole=True)
        return Entry(Kind.FILE, data=head, is_whole=len(head) < _HEAD)

    def spool(self, archive: str, read: Callable[[int], bytes]) -> Path:
        """A file with the whole content, whatever it is: a layer of an image."""
        return self._write(archive, b"", read)

    def _write(self, archive: str, head: bytes, read: Callable[[int], bytes]) -> Path:
        self._number += 1
        path = self._directory / str(self._number)
        chunk = head or read(_CHUNK)
        try:
            with path.open("xb") as stream:
                while chunk:
                    self._kept += len(chunk)
                    if self._kept > self.limits.kept:
                        raise exceeded(archive, f"more than {self.limits.kept >> 30} GiB of programs and libraries")
                    stream.write(chunk)
                    chunk = read(_CHUNK)
        except OSError as error:
            help_text = f"Set TMPDIR to a directory with more room than {self._directory.parent}."
            reason = error.strerror or str(error)
            raise BadArchive(archive, f"cannot be unpacked: {reason}", next_step=help_text) from error
        return path


def is_text(path: str) -> bool:
    """Whether what is there can say how a program is started, or what the loader does."""
    return _TEXTS.search(path) is not None or path == "/etc/ld.so.cache"


def is_elf(path: Path) -> bool:
    """A regular file that begins as ELF files do."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as stream:
            return stream.read(4) == b"\x7fELF"
    except OSError:
        return False


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    """Up to size bytes, in as many reads as it takes."""
    parts = []
    while size > 0 and (chunk := read(size)):
        parts.append(chunk)
        size -= len(chunk)
    return b"".join(parts)


@dataclass(eq=False)
class Tree:
    """Paths to entries; directories that no member names are made up."""

    name: str
    entries: dict[str, Entry] = field(default_factory=lambda: {"/": DIRECTORY})
    diagnostics: list[Diagnostic] = field(default_factory=list)
    _children: dict[str, dict[str, None]] = field(default_factory=dict, repr=False)

    def add(self, path: str, entry: Entry) -> None:
        """Put an entry at a path; what was there goes, unless both are directories."""
        known = self.entries.get(path)
        if known is not None and known.kind is entry.kind is Kind.DIRECTORY:
            return
        self.entries[path] = entry
        while path != "/":
            above, _, name = path.rpartition("/")
            above = above or "/"
            siblings = self._children.setdefault(above, {})
            if name in siblings:
                return
            siblings[name] = None
            self.entries.setdefault(above, DIRECTORY)
            path = above

    def remove(self, path: str) -> None:
        """Take out a path and everything below it."""
        above, _, name = path.rpartition("/")
        self._children.get(above or "/", {}).pop(name, None)
        pending = [path]
        while pending:
            each = pending.pop()
            self.entries.pop(each, None)
            pending += [f"{each}/{name}" for name in self._children.pop(each, {})]

    def names_in(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        return sorted(self._children.get(path, {}))

    def files(self) -> Iterator[tuple[str, Entry]]:
        """Regular files, sorted by path."""
        return ((path, entry) for path, entry in sorted(self.entries.items()) if entry.kind is Kind.FILE)

    def note(self, message: str, level: str = "warning") -> None:
        """Something that a reader should know of this archive."""
        self.diagnostics.append(Diagnostic(level, self.name, message))


def normal(name: str, limits: Limits) -> str | None:
    """A member's name as an absolute path; None for one that leads out of the archive, or is too long."""
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts or "\0" in name or len(name) > limits.path:
        return None
    return "/" + "/".join(parts)
