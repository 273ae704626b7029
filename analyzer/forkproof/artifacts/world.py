"""Several layers of files as one tree in which programs would run: artifacts in front, a sysroot behind.

Owns: the sysroot of a scan of artifacts. Takes: trees of archives and directories, the first that has a path wins.
Gives: a `Sysroot`. Must never: write, follow a link outside of the layers, or fall back to this machine.

Packages that were built for split directories are installed by dpkg and rpm through /lib → usr/lib; so a package's /lib
is /usr/lib here, too. Images and directories are taken as they are.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Final, Protocol

from forkproof.artifacts.tree import DIRECTORY, Entry, Kind, Tree
from forkproof.errors import UnreadableFile

_MAX_LINKS: Final = 40
_MERGED: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


class Layer(Protocol):
    """Files by path; links are not followed."""

    def entry(self, path: str) -> Entry | None:
        """What is at a path."""
        ...

    def names_in(self, path: str) -> Sequence[str]:
        """The names in a directory."""
        ...


class TreeLayer:
    """The tree of an archive."""

    def __init__(self, tree: Tree, *, is_package: bool) -> None:
        self._tree = tree
        self._is_package = is_package

    def entry(self, path: str) -> Entry | None:
        """The archive's entry; of a package, what it has in /lib is in /usr/lib."""
        entries = self._tree.entries
        if not self._is_package:
            return entries.get(path)
        parts = path.split("/", 3)
        if parts[1] in _MERGED and len(parts) == 2 and (path in entries or f"/usr{path}" in entries):
            return Entry(Kind.LINK, link=f"usr{path}")
        split = _split(path)
        return entries.get(path) or (entries.get(split) if split else None)

    def names_in(self, path: str) -> list[str]:
        """Of both directories that are one."""
        split = _split(path) if self._is_package else None
        return self._tree.names_in(path) + (self._tree.names_in(split) if split else [])


def _split(path: str) -> str | None:
    """/lib/x for /usr/lib/x: where a package may have it."""
    parts = path.split("/", 3)
    return path.removeprefix("/usr") if len(parts) > 2 and parts[1] == "usr" and parts[2] in _MERGED else None


class DirectoryLayer:
    """A directory of this machine."""

    def __init__(self, root: Path | str) -> None:
        self.root: Final = str(root).rstrip("/")

    def entry(self, path: str) -> Entry | None:
        """What lstat(2) says; `world` has followed the links on the way."""
        here = self.root + path
        try:
            mode = os.lstat(here).st_mode
            if stat.S_ISLNK(mode):
                return Entry(Kind.LINK, link=os.readlink(here))  # noqa: PTH115 - the same
        except (OSError, ValueError):
            return None
        if stat.S_ISDIR(mode):
            return DIRECTORY
        return Entry(Kind.FILE, blob=Path(here)) if stat.S_ISREG(mode) else Entry(Kind.OTHER)

    def names_in(self, path: str) -> list[str]:
        """As os.listdir."""
        try:
            return os.listdir(self.root + path)  # noqa: PTH208 - names are all that is wanted
        except OSError:
            return []


class FileLayer:
    """Single files of this machine, under their own absolute paths."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._tree = Tree("files")
        for path in paths:
            self._tree.add(path, Entry(Kind.FILE, blob=Path(path)))

    def entry(self, path: str) -> Entry | None:
        """The file."""
        return self._tree.entries.get(path)

    def names_in(self, path: str) -> list[str]:
        """The files."""
        return self._tree.names_in(path)


class World:
    """The layers as a Sysroot; see `forkproof.closure.sysroot` for what the methods mean."""

    is_host: Final = False

    def __init__(self, name: str, layers: Sequence[Layer]) -> None:
        self.name = name
        self._layers = tuple(layers)
        self._resolved: dict[str, str | None] = {}

    def entry(self, path: str) -> Entry | None:
        """What is at a path. A link wins over a directory in front of it, as when a package is unpacked."""
        found = [entry for layer in self._layers if (entry := layer.entry(path)) is not None]
        if not found:
            return None
        if found[0].kind is Kind.DIRECTORY:
            return next((entry for entry in found if entry.kind is Kind.LINK), found[0])
        return found[0]

    def resolve(self, path: str) -> str | None:
        """Follow links and dots within the layers."""
        if path not in self._resolved:
            self._resolved[path] = self._walk(path)
        return self._resolved[path]

    def identity(self, path: str) -> Hashable:
        """The content's place, or the path for what has none."""
        entry = self._file(path)
        return str(entry.blob) if entry.blob is not None else self.resolve(path)

    def read(self, path: str, size: int = -1) -> bytes:
        """What is kept of a file; OSError for the rest."""
        entry = self._file(path)
        if entry.blob is not None:
            with entry.blob.open("rb") as stream:
                return stream.read(size)
        if not entry.is_whole and not 0 <= size <= len(entry.data):
            raise OSError(errno.ENODATA, "not an ELF file, and its content was not kept", path)
        return entry.data if size < 0 else entry.data[:size]

    def names_in(self, path: str) -> tuple[str, ...]:
        """Of all layers."""
        resolved = self.resolve(path)
        if resolved is None:
            return ()
        return tuple(sorted({name for layer in self._layers for name in layer.names_in(resolved)}))

    def host_path(self, path: str) -> Path:
        """Where the content of an ELF file lies."""
        entry = self._file(path)
        if entry.blob is None:
            raise UnreadableFile(path, "is no ELF file")
        return entry.blob

    def locate(self, target: str) -> str:
        """A path in the layers."""
        path = target if target.startswith("/") else f"/{target}"
        resolved = self.resolve(path)
        if resolved is None:
            raise UnreadableFile(target, f"does not exist in {self.name}", next_step="Check the spelling.")
        entry = self.entry(resolved)
        if entry is None or entry.blob is None:
            raise UnreadableFile(target, "is no ELF file", next_step="Name a program or a shared library.")
        return path

    def _file(self, path: str) -> Entry:
        resolved = self.resolve(path)
        entry = self.entry(resolved) if resolved is not None else None
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "no such file in the artifacts", path)
        if entry.kind is Kind.OTHER:
            raise OSError(errno.ENXIO, "a device or a socket", path)
        if entry.kind is Kind.DIRECTORY:
            raise IsADirectoryError(errno.EISDIR, "is a directory", path)
        return entry

    def _walk(self, path: str) -> str | None:
        pending = path.split("/")[::-1]
        done: list[str] = []
        links = 0
        while pending:
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                del done[-1:]
                continue
            done.append(part)
            entry = self.entry("/" + "/".join(done))
            if entry is None:
                if len(done) != 1 or part not in _MERGED or self.entry(f"/usr/{part}") is None:
                    return None
                done.insert(0, "usr")
            elif entry.kind is Kind.LINK:
                links += 1
                if links > _MAX_LINKS:
                    return None
                done = [] if entry.link.startswith("/") else done[:-1]
                pending += entry.link.split("/")[::-1]
            elif entry.kind is not Kind.DIRECTORY and any(each not in ("", ".") for each in pending):
                return None
        return "/" + "/".join(done)
