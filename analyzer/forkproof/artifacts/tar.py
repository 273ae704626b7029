"""Members of a tar stream: the layers of images, the payload of .deb files, tarballs.

Owns: the walk over a tar stream. Takes: a stream of plain bytes. Gives: members, one at a time, each to be read before
the next. Must never: seek, keep a list of members, or let a header cost more than the limits say.

The standard library's tarfile decodes; it trusts the sizes of its extension headers, so what it reads between two
members is counted here. Sparse members are refused: neither packages nor images have them, and a hole costs nothing to
claim.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from forkproof.artifacts.limits import BadArchive, Counted, Limits, damaged
from forkproof.artifacts.tree import DIRECTORY, Entry, Kind, Store, Tree, normal


@dataclass(frozen=True, slots=True)
class Member:
    """One member; `read` gives its content, if it is a file."""

    name: str
    kind: Kind
    link: str
    hard: bool
    """`link` names the member that this is another name of."""
    size: int
    read: Callable[[int], bytes]


def members(stream: Counted, name: str, limits: Limits) -> Iterator[Member]:
    """All members, in order."""
    with damaged(name):
        stream.budget = limits.headers
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            while (info := _next(archive, stream, name, limits)) is not None:
                content = archive.extractfile(info) if _has_content(info) else None
                yield _member(info, content, name)
                # `next` would skip the rest, but count it as headers; and it would go on long after the end of a
                # stream whose last header claims a size of 2⁶³.
                while content is not None and content.read(1 << 20):
                    pass
            rest = archive.fileobj
            assert rest is not None
            while chunk := rest.read(1 << 20):
                if chunk.strip(b"\0"):
                    raise BadArchive(name, "damaged: something that is no member follows the last member")


def _next(archive: tarfile.TarFile, stream: Counted, name: str, limits: Limits) -> tarfile.TarInfo | None:
    """The next header. tarfile's list of members is emptied: an archive can have a million."""
    stream.budget = limits.headers
    info = archive.next()
    stream.budget = None
    archive.members = []  # type: ignore[attr-defined] # documented nowhere, and the same since Python 2.3
    if info is not None and info.issparse():
        help_text = "Unpack it yourself and name the directory."
        raise BadArchive(name, f"refused: {info.name[:200]} is a sparse file", next_step=help_text)
    return info


def _has_content(info: tarfile.TarInfo) -> bool:
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def _member(info: tarfile.TarInfo, content: IO[bytes] | None, name: str) -> Member:
    kind = Kind.OTHER
    if info.isdir():
        kind = Kind.DIRECTORY
    elif info.issym():
        kind = Kind.LINK
    elif info.isreg() or info.islnk():
        kind = Kind.FILE

    def read(size: int) -> bytes:
        with damaged(name):
            return content.read(size) if content is not None else b""

    return Member(info.name, kind, info.linkname, info.islnk(), info.size, read)


def read_tree(stream: Counted, tree: Tree, store: Store) -> None:
    """Add all members to a tree."""
    for member in members(stream, tree.name, store.limits):
        add(tree, member, store)


def add(tree: Tree, member: Member, store: Store) -> None:
    """One member to a tree."""
    store.count(tree.name)
    path = normal(member.name, store.limits)
    if path is None:
        tree.note(f"left out, since its name leads out of the archive or is too long: {member.name[:200]}")
        return
    if path == "/":
        return
    if member.hard:
        _add_hard(tree, path, member, store)
    elif member.kind is Kind.FILE:
        tree.add(path, store.file(tree.name, path, member.read))
    elif member.kind is Kind.LINK:
        tree.add(path, Entry(Kind.LINK, link=member.link))
    else:
        tree.add(path, DIRECTORY if member.kind is Kind.DIRECTORY else Entry(Kind.OTHER))


def _add_hard(tree: Tree, path: str, member: Member, store: Store) -> None:
    target = normal(member.link, store.limits)
    known = tree.entries.get(target) if target is not None else None
    if known is None or known.kind is Kind.DIRECTORY:
        tree.note(f"left out, a hard link to what the archive does not hold: {path} to {member.link[:200]}")
    else:
        tree.add(path, known)
