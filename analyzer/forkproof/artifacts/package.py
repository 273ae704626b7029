"""Packages of distributions: what is in a .deb and in an .rpm, as trees.

Owns: the two containers around their payloads. Takes: an open file. Gives: members added to a tree.
Must never: run a maintainer script, or trust a length.

Both containers are read here, in a few lines each, after a look at libraries: arpy loops for ever on a member of
negative size and opens other files for "thin" archives; rpmfile unpacks zstd payloads into memory at once and takes
sockets for directories. Neither is meant for hostile input, and python-debian is GPL.

Source: deb(5); the RPM file format, rpm.org "RPM v4 packages"; cpio(5), "New ASCII format".
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import IO, Final

from forkproof.artifacts import tar
from forkproof.artifacts.limits import BadArchive, Counted, Readable, damaged, unpacked
from forkproof.artifacts.tree import DIRECTORY, Entry, Kind, Store, Tree, normal

DEB: Final = b"!<arch>\n"
RPM: Final = b"\xed\xab\xee\xdb"
_HEADER: Final = b"\x8e\xad\xe8\x01"
_NEWC: Final = (b"070701", b"070702")


# .deb: an ar archive of debian-binary, control.tar.* and data.tar.*.


def read_deb(stream: IO[bytes], tree: Tree, store: Store) -> None:
    """Add the files that a Debian package installs."""
    data = _ar_member(stream, tree.name, b"data.tar")
    tar.read_tree(unpacked(data, tree.name, store.limits), tree, store)


def _ar_member(stream: IO[bytes], name: str, wanted: bytes) -> Readable:
    """The first member whose name begins so; deb(5) allows no long names."""
    stream.seek(len(DEB))
    while len(header := stream.read(60)) == 60:
        label, digits = header[:16].rstrip(b" /"), header[48:58].strip()
        if header[58:] != b"`\n" or not digits.isdigit():
            raise BadArchive(name, "damaged: a member header of the ar archive is none")
        size = int(digits)
        if label.startswith(wanted):
            return _Part(stream, size)
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise BadArchive(name, f"damaged: no {wanted.decode()} in it", next_step="Fetch it again: dpkg-deb --info FILE")


class _Part:
    """The next `size` bytes of a stream, as a stream."""

    def __init__(self, stream: Readable, size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int, /) -> bytes:
        """Up to size bytes."""
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        return data


# .rpm: a lead, two headers, and a compressed cpio archive.


def read_rpm(stream: IO[bytes], tree: Tree, store: Store) -> None:
    """Add the files that an RPM package installs."""
    with damaged(tree.name):
        stream.seek(96)
        _skip_header(stream, tree.name, align=8)
        _skip_header(stream, tree.name, align=1)
    payload = unpacked(stream, tree.name, store.limits)
    with damaged(tree.name):
        _read_cpio(payload, tree, store)


def _skip_header(stream: IO[bytes], name: str, align: int) -> None:
    fixed = stream.read(16)
    if len(fixed) < 16 or not fixed.startswith(_HEADER):
        raise BadArchive(name, "damaged: no RPM header where one was expected")
    entries, size = struct.unpack(">II", fixed[8:])
    size += 16 * entries
    stream.seek(size + -size % align, io.SEEK_CUR)


def _read_cpio(stream: Counted, tree: Tree, store: Store) -> None:
    """Members of a "new ASCII" cpio archive. Only the last of a set of hard links carries their content."""
    waiting: dict[str, list[str]] = {}
    while (member := _cpio_header(stream, tree.name)) is not None:
        name, mode, links, size, inode = member
        left = [size]

        def read(wanted: int, left: list[int] = left) -> bytes:
            with damaged(tree.name):
                data = stream.read(min(wanted, left[0])) or b""
            left[0] -= len(data)
            return data

        store.count(tree.name)
        path = normal(name, store.limits)
        if path is None:
            tree.note(f"left out, since its name leads out of the archive or is too long: {name[:200]}")
        elif path != "/":
            entry = _cpio_entry(path, mode, size, read, tree, store)
            paths = waiting.setdefault(inode, []) if links > 1 and entry.kind is Kind.FILE else []
            paths.append(path)
            for each in paths if size or links <= 1 else [path]:
                tree.add(each, entry)
        _skip(stream, left[0] + -size % 4, tree.name)


def _cpio_header(stream: Counted, name: str) -> tuple[str, int, int, int, str] | None:
    """Name, mode, number of links, size and inode of the next member; None at the trailer."""
    fixed = _exactly(stream, 110, name)
    if fixed[:6] not in _NEWC:
        what = (
            "files above 4 GiB (stripped cpio)" if fixed[:6] == b"07070X" else "no cpio header where one was expected"
        )
        raise BadArchive(name, f"cannot be read: {what}", next_step="Unpack it with rpm2archive; name the directory.")
    fields = [int(fixed[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    inode, mode, links, size, length = fields[0], fields[1], fields[4], fields[6], fields[11]
    if not 0 < length <= 1 << 16:
        raise BadArchive(name, "damaged: a member's name is longer than any path")
    raw = _exactly(stream, length, name)
    _exactly(stream, -(110 + length) % 4, name)
    text = raw.rstrip(b"\0").decode("utf-8", "surrogateescape")
    return None if text == "TRAILER!!!" else (text, mode, links, size, f"{fields[7]}:{fields[8]}:{inode}")


def _cpio_entry(path: str, mode: int, size: int, read: Callable[[int], bytes], tree: Tree, store: Store) -> Entry:
    kind = mode & 0o170000
    if kind == 0o040000:
        return DIRECTORY
    if kind == 0o120000:
        return Entry(Kind.LINK, link=read(min(size, store.limits.path)).decode("utf-8", "surrogateescape"))
    if kind == 0o100000:
        return store.file(tree.name, path, read)
    return Entry(Kind.OTHER)


def _exactly(stream: Counted, size: int, name: str) -> bytes:
    """So many bytes, not many."""
    parts = []
    while size > 0:
        chunk = stream.read(size)
        if not chunk:
            raise BadArchive(name, "damaged: it ends in the middle of a member", next_step="Fetch it again.")
        size -= len(chunk)
        parts.append(chunk)
    return b"".join(parts)


def _skip(stream: Counted, size: int, name: str) -> None:
    """Past the rest of a member."""
    while size > 0:
        size -= len(_exactly(stream, min(size, 1 << 20), name))
