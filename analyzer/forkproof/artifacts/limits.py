"""What an archive may cost, and the reader that stops when it costs more.

Owns: the limits, decompression, the counting of what comes out. Takes: a file of any kind. Gives: a stream of plain
bytes, or `BadArchive` that names the archive, what it exceeded, and the way out.
Must never: hold more than a buffer, or trust a size that an archive claims.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import zstandard

from forkproof.errors import InputError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_GIB: Final = 1 << 30
WINDOW: Final = 128 << 20
"""What a zstd frame may ask for as its window: what `zstd -22` uses; `--long=31` asks for 2 GiB of memory."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Far above any real package or image; an archive beyond them is an attack, or wants to be unpacked by hand."""

    unpacked: int = 64 * _GIB
    """Bytes that may come out of one compressed stream."""
    ratio: int = 1000
    """How many times its compressed size, once `free` bytes have come out."""
    free: int = 256 << 20
    kept: int = 16 * _GIB
    """Bytes of ELF files that are written to the temporary directory."""
    text: int = 256 << 20
    """Bytes of configuration that are held in memory."""
    entries: int = 1_000_000
    headers: int = 4 << 20
    """Bytes that the headers between two members may take."""
    path: int = 4096


DEFAULT: Final = Limits()

_DAMAGED: Final = (
    EOFError,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    gzip.BadGzipFile,
    ValueError,
    OverflowError,
    OSError,
)


class BadArchive(InputError):
    """An archive that is damaged, exceeds a limit, or uses what forkproof does not read."""


def exceeded(name: str, what: str) -> BadArchive:
    """The error for a limit."""
    help_text = "If you trust it, unpack it yourself and name the directory."
    return BadArchive(name, f"refused: {what}", next_step=help_text)


@contextmanager
def damaged(name: str) -> Iterator[None]:
    """Whatever a decoder raises on bad input becomes one error that names the archive."""
    try:
        yield
    except InputError:
        raise
    except RecursionError as error:
        raise BadArchive(name, "damaged: headers nested without end") from error
    except _DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise BadArchive(name, f"damaged: {reason}", next_step="Fetch it again, and compare its checksum.") from error


class Readable(Protocol):
    """All that is asked of a stream."""

    def read(self, size: int, /) -> bytes:
        """Up to size bytes; none at the end."""
        ...


class Counted(io.RawIOBase):
    """A stream that counts what is read, and raises when a budget is gone."""

    def __init__(self, stream: Readable, name: str) -> None:
        self._stream, self._name = stream, name
        self.count = 0
        self.budget: int | None = None
        """What may still be read; None for no limit."""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """See io.RawIOBase."""
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        view[: len(data)] = data
        self.count += len(data)
        if self.budget is not None:
            self.budget -= len(data)
            if self.budget < 0:
                raise exceeded(self._name, "its headers take more than any real archive's")
        self.check()
        return len(data)

    def check(self) -> None:
        """For those who count more."""


class _Unpacked(Counted):
    """What a decompressor gives, held to its limits."""

    def __init__(self, stream: Readable, packed: Counted, name: str, limits: Limits) -> None:
        super().__init__(stream, name)
        self._packed, self._limits = packed, limits

    def check(self) -> None:
        limits = self._limits
        if self.count > limits.unpacked:
            raise exceeded(self._name, f"it unpacks to more than {limits.unpacked >> 30} GiB")
        if self.count > limits.free and self.count > limits.ratio * max(1, self._packed.count):
            raise exceeded(self._name, f"it unpacks to more than {limits.ratio} times its size")


def unpacked(stream: Readable, name: str, limits: Limits) -> Counted:
    """The stream as plain bytes: gzip, xz, lzma, bzip2 and zstd are recognised by what they begin with."""
    buffered = io.BufferedReader(Counted(stream, name), 1 << 16)
    head = buffered.peek(6)[:6]
    packed = buffered.raw
    assert isinstance(packed, Counted)
    plain: Readable
    if head.startswith(b"\x1f\x8b"):
        plain = gzip.GzipFile(fileobj=buffered)
    elif head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        plain = lzma.LZMAFile(buffered)  # noqa: SIM115 - the stream is the caller's
    elif head.startswith(b"BZh"):
        plain = bz2.BZ2File(buffered)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW)
        plain = decoder.stream_reader(buffered, read_across_frames=True)
    else:
        plain = buffered
    return _Unpacked(plain, packed, name, limits)
