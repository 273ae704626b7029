"""Several layers of files as one tree in which programs would run: artifacts in front, a sysroot behind.

Owns: the sysroot of a scan of artifacts. Takes: trees of archives and directories, the first that has a path wins.
Gives: a `Sysroot`. Must never: write, follow a link outside of the layers, or fall back to this machine.
Wrong where: below the directories of `_JOINED`, one layer has a link where another has a directory: the link wins, and
what the other has in the directory is not seen.

A directory never hides what another layer has in it. Systems keep /lib as a directory or as a link to usr/lib, and so
do the artifacts in front of them; both must meet, whichever is in front:

    /lib in front    /lib behind    the world's /lib
    a link           a link         the link
    a link           a directory    the link, and what is in the directory is found in /usr/lib, too
    a directory      a link         the same
    a directory      a directory    one directory, with what both have; /usr/lib is another

Layers without /lib have no say. A part of a system (a package, a build root) is installed where the rest of the system
keeps its libraries: its /lib is its /usr/lib, whatever the others do.
"""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
import stat
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from forkproof.artifacts.tree import DIRECTORY, Entry, Kind, Tree, is_elf, is_text
from forkproof.errors import UnreadableFile

_MAX_LINKS: Final = 40
_MERGED: Final = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Top directories that a merged-/usr distribution makes links into /usr."""
_JOINED: Final = (*_MERGED, "/usr/sbin", "/usr/lib64", "/usr/lib32")
"""Directories that some systems have as links to others: Fedora's and Arch's are below /usr."""


class Layer(Protocol):
    """Files by path; links are not followed."""

    @property
    def is_part(self) -> bool:
        """A package or a build root, rather than a system of its own."""
        ...

    def entry(self, path: str) -> Entry | None:
        """What is at a path."""
        ...

    def names_in(self, path: str) -> Sequence[str]:
        """The names in a directory."""
        ...

    def held(self) -> Iterator[tuple[str, Entry]]:
        """Everything that a scan may read: ELF files, texts that say how programs are started, links."""
        ...


class TreeLayer:
    """The tree of an archive."""

    def __init__(self, tree: Tree, *, is_part: bool) -> None:
        self._tree = tree
        self.is_part: Final = is_part

    def entry(self, path: str) -> Entry | None:
        """The archive's entry."""
        return self._tree.entries.get(path)

    def names_in(self, path: str) -> list[str]:
        """The archive's names."""
        return self._tree.names_in(path)

    def held(self) -> Iterator[tuple[str, Entry]]:
        """Whatever was kept of the archive."""
        return _held(self._tree)


def _held(tree: Tree) -> Iterator[tuple[str, Entry]]:
    return ((path, entry) for path, entry in sorted(tree.entries.items()) if _is_read(path, entry))


def _is_read(path: str, entry: Entry) -> bool:
    """A scan may come to it. Documentation is full of links."""
    is_way = entry.kind is Kind.LINK and not path.startswith("/usr/share/")
    return is_way or entry.blob is not None or (entry.is_whole and is_text(path))


class DirectoryLayer:
    """A directory of this machine."""

    def __init__(self, root: Path | str, *, is_part: bool) -> None:
        self.root: Final = str(root).rstrip("/")
        self.is_part: Final = is_part

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

    def held(self) -> Iterator[tuple[str, Entry]]:
        """What an archive of the directory would keep."""
        for directory, below, names in os.walk(self.root):
            below.sort()
            for name in sorted([*below, *names]):
                place = Path(directory, name)
                path = str(place).removeprefix(self.root)
                entry = self.entry(path)
                if entry is None or entry.kind is Kind.DIRECTORY:
                    continue
                if is_elf(place) or is_text(path) or (entry.kind is Kind.LINK and _is_read(path, entry)):
                    yield path, entry


class FileLayer:
    """Single files of this machine, under their own absolute paths."""

    is_part: Final = True

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

    def held(self) -> Iterator[tuple[str, Entry]]:
        """The files."""
        return _held(self._tree)


_Names = tuple[tuple[str, str], ...]
"""Directories with a slash behind, and what a layer calls each of them, too."""


def _places(path: str, names: _Names) -> Iterator[str]:
    """What a path is called in a layer."""
    yield path
    for place, name in names:
        if f"{path}/".startswith(place):
            yield name + path[len(place) - 1 :]


def _in_layer(layer: Layer, names: _Names, path: str) -> Entry | None:
    """Of two with one name, the one that is no link: systems had /usr/bin/x → /bin/x before both were one."""
    first = None
    for place in _places(path, names):
        entry = layer.entry(place)
        if entry is not None and entry.kind is not Kind.LINK:
            return entry
        first = first or entry
    return first


class World:
    """The layers as a Sysroot; see `forkproof.closure.sysroot` for what the methods mean."""

    is_host: Final = False

    def __init__(self, name: str, layers: Sequence[Layer]) -> None:
        self.name = name
        self._layers = tuple(layers)
        self._resolved: dict[str, str | None] = {}
        self._entries: dict[str, tuple[int, Entry] | None] = {}
        self._links = {path: link for path in _JOINED if (link := self._link(path)) is not None}
        self._other_names = tuple(self._names_of(layer) for layer in layers)

    def entry(self, path: str) -> Entry | None:
        """What is at a path. A link wins over a directory in front of it, as when a package is unpacked."""
        found = self.provider(path)
        return found[1] if found is not None else None

    def provider(self, path: str) -> tuple[int, Entry] | None:
        """Which layer's entry is at a path, and the entry; of a directory, the first that has one."""
        if path not in self._entries:
            self._entries[path] = self._provider(path)
        return self._entries[path]

    def place(self, path: str) -> str | None:
        """A path with all links followed but the last, as what is at a layer's path is called here."""
        above, _, name = path.rpartition("/")
        resolved = self.resolve(above or "/")
        return f"{resolved.rstrip('/')}/{name}" if resolved is not None else None

    def is_joined(self, path: str) -> bool:
        """A directory of systems that is a link here, whatever single layers have."""
        return path in self._links

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
        names = (
            layer.names_in(place)
            for layer, others in zip(self._layers, self._other_names, strict=True)
            for place in _places(resolved, others)
        )
        return tuple(sorted(set(itertools.chain.from_iterable(names))))

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

    # ---- how the layers meet ------------------------------------------------------------------

    def _link(self, path: str) -> Entry | None:
        """What a directory of `_JOINED` is a link to, for all layers: one has the link, or no system has either."""
        entries = [(layer, layer.entry(path)) for layer in self._layers]
        link = next((entry for _, entry in entries if entry is not None and entry.kind is Kind.LINK), None)
        if link is not None or path not in _MERGED or any(entry and not layer.is_part for layer, entry in entries):
            return link
        is_there = any(entry or layer.entry(f"/usr{path}") for layer, entry in entries)
        return Entry(Kind.LINK, link=f"usr{path}") if is_there else None

    def _names_of(self, layer: Layer) -> _Names:
        """What this layer calls directories for which others have a link."""
        pairs = [(self._leads_to(path), path) for path in self._links]
        if layer.is_part:
            pairs += [pair for path in _MERGED for pair in ((f"/usr{path}", path), (path, f"/usr{path}"))]
        there = [(place, name, layer.entry(name)) for place, name in dict.fromkeys(pairs)]
        return tuple((f"{place}/", name) for place, name, entry in there if entry and entry.kind is Kind.DIRECTORY)

    def _leads_to(self, path: str) -> str:
        """The end of the links of `_JOINED`, whether or not anything is there."""
        for _ in _JOINED:
            start = next((each for each in self._links if path == each or path.startswith(f"{each}/")), None)
            if start is None:
                break
            target = posixpath.join(posixpath.dirname(start), self._links[start].link)
            path = posixpath.normpath(target + path[len(start) :])
        return path

    def _provider(self, path: str) -> tuple[int, Entry] | None:
        if path in self._links:
            return 0, self._links[path]
        first = None
        for number, layer in enumerate(self._layers):
            entry = _in_layer(layer, self._other_names[number], path)
            if entry is None:
                continue
            if entry.kind is Kind.LINK or (first is None and entry.kind is not Kind.DIRECTORY):
                return number, entry
            first = first or (number, entry)
        return first

    # ---- files --------------------------------------------------------------------------------

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
                return None
            if entry.kind is Kind.LINK:
                links += 1
                if links > _MAX_LINKS:
                    return None
                done = [] if entry.link.startswith("/") else done[:-1]
                pending += entry.link.split("/")[::-1]
            elif entry.kind is not Kind.DIRECTORY and any(each not in ("", ".") for each in pending):
                return None
        return "/" + "/".join(done)
