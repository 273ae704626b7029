"""Packages and images, written by hand: what dpkg-deb, rpmbuild and docker would write, and what attackers would.

A member is a path with bytes (a file), a `Link`, a `Hard`, or None (a directory).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import zstandard


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Hard:
    """A hard link."""

    target: str


@dataclass(frozen=True)
class Device:
    """/dev/null, by another name."""


Members = Mapping[str, "bytes | Link | Hard | Device | None"]


def tar(members: Members, form: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            data = None
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, Link):
                info.type, info.linkname = tarfile.SYMTYPE, content.target
            elif isinstance(content, Hard):
                info.type, info.linkname = tarfile.LNKTYPE, content.target
            elif isinstance(content, Device):
                info.type = tarfile.CHRTYPE
            else:
                info.size, data = len(content), io.BytesIO(content)
            archive.addfile(info, data)
    return stream.getvalue()


def compressed(data: bytes, how: str) -> bytes:
    if how == "gz":
        return gzip.compress(data, 1, mtime=0)
    if how == "xz":
        return lzma.compress(data, preset=0)
    if how == "zst":
        return zstandard.ZstdCompressor(1).compress(data)
    assert not how
    return data


def _ar(members: Mapping[str, bytes]) -> bytes:
    parts = [b"!<arch>\n"]
    for name, data in members.items():
        parts += [
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode(),
            data,
            b"\n" * (len(data) % 2),
        ]
    return b"".join(parts)


def deb(members: Members, how: str = "xz") -> bytes:
    """deb(5)."""
    suffix = f".{how}" if how else ""
    control = compressed(tar({"./control": b"Package: x\n"}), how)
    data = compressed(tar({f".{path}": content for path, content in members.items()}), how)
    return _ar({"debian-binary": b"2.0\n", f"control.tar{suffix}": control, f"data.tar{suffix}": data})


def cpio(members: Members) -> bytes:
    """The new ASCII format; the last of some hard links carries the content, as rpm writes them."""
    parts, inodes = [], dict[str, int]()
    links = [content.target for content in members.values() if isinstance(content, Hard)]
    for number, (path, content) in enumerate([*members.items(), ("TRAILER!!!", None)], 1):
        mode, data = 0o040755, b""
        if isinstance(content, Link):
            mode, data = 0o120777, content.target.encode()
        elif isinstance(content, Device):
            mode = 0o020666
        elif content is not None:
            mode, data = 0o100755, b"" if isinstance(content, Hard) else content
        first = content.target if isinstance(content, Hard) else path
        inode = inodes.setdefault(first, number)
        count = 1 + links.count(first)
        name = (path if path == "TRAILER!!!" else f".{path}").encode() + b"\0"
        fields = (inode, mode, 0, 0, count, 0, len(data), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(f"{field:08x}".encode() for field in fields) + name
        parts += [header, b"\0" * (-len(header) % 4), data, b"\0" * (-len(data) % 4)]
    return b"".join(parts)


def rpm(members: Members, how: str = "zst") -> bytes:
    """RPM v4: a lead, a signature header, a header, the payload."""
    lead = b"\xed\xab\xee\xdb\x03\0" + bytes(90)

    def header(entries: int, store: bytes) -> bytes:
        index = b"".join(struct.pack(">4I", 1000 + i, 7, 0, len(store)) for i in range(entries))
        return b"\x8e\xad\xe8\x01" + bytes(4) + struct.pack(">II", entries, len(store)) + index + store

    signature = header(1, b"sig")
    signature += bytes(-len(signature) % 8)
    return lead + signature + header(3, b"name\0version\0") + compressed(cpio(members), how)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def oci(
    layers: list[Members],
    how: str = "gz",
    machine: str = "amd64",
    name: str = "app:1",
    environment: Sequence[str] = (),
) -> dict[str, bytes]:
    """The files of an OCI layout."""
    return oci_of([compressed(tar(layer), how) for layer in layers], machine, name, environment)


def oci_of(
    blobs: list[bytes], machine: str = "amd64", name: str = "app:1", environment: Sequence[str] = ()
) -> dict[str, bytes]:
    """The same from layers that are tar streams already."""
    config = json.dumps({"architecture": machine, "os": "linux", "config": {"Env": list(environment)}}).encode()
    described = [{"digest": f"sha256:{_digest(blob)}", "size": len(blob), "mediaType": "layer"} for blob in blobs]
    manifest = json.dumps(
        {"schemaVersion": 2, "config": {"digest": f"sha256:{_digest(config)}"}, "layers": described}
    ).encode()
    entry = {
        "digest": f"sha256:{_digest(manifest)}",
        "platform": {"architecture": machine, "os": "linux"},
        "annotations": {"org.opencontainers.image.ref.name": name},
    }
    files = {f"blobs/sha256/{_digest(each)}": each for each in (*blobs, config, manifest)}
    return {
        **files,
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
    }


def docker(layers: list[Members], name: str = "app:1", environment: Sequence[str] = ()) -> bytes:
    """What `docker save` wrote before it wrote OCI layouts."""
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {"Env": list(environment)}}).encode()
    named = f"{_digest(config)}.json"
    blobs = {f"{_digest(tar(layer))}/layer.tar": tar(layer) for layer in layers}
    manifest = [{"Config": named, "RepoTags": [name], "Layers": list(blobs)}]
    return tar({**blobs, named: config, "manifest.json": json.dumps(manifest).encode()})
