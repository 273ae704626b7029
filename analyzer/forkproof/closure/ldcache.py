"""What ldconfig leaves behind: /etc/ld.so.cache and the configuration that it is made from.

Owns: the cache's binary format and ld.so.conf's text.
Takes: bytes, or a sysroot for the text (it includes other files). Gives: frozen tables.
Must never: decide when the cache is asked; `search` does.
Wrong where: the cache is older than the libraries. ld.so then goes wrong in the same way.

Source: glibc sysdeps/generic/dl-cache.h and elf/dl-cache.c (format "glibc-ld.so.cache1.1"); ldconfig(8).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forkproof.closure.sysroot import glob
from forkproof.elf.image import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from forkproof.closure.sysroot import Sysroot

CACHE: Final = "/etc/ld.so.cache"
CONFIGURATION: Final = "/etc/ld.so.conf"

_MAGIC: Final = b"glibc-ld.so.cache1.1"
_OLD_MAGIC: Final = b"ld.so-1.7.0"
_HEADER: Final = 48
_ENTRY: Final = struct.Struct("<iIIIQ")
_OLD_ENTRY: Final = 12
_EXTENSION_MAGIC: Final = 0xEAA42174
_HWCAP_TAG: Final = 1
_EXTENSION_BIT: Final = 1 << 62
_ISA_BITS: Final = 0x3FF << 32
_MAX_INCLUDES: Final = 64

_FLAGS: Final = {Machine.X86_64: 0x0303, Machine.AARCH64: 0x0A03}
"""Entry flags that ld.so accepts: an ELF library for libc 6, of this machine's 64-bit ABI."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One library file that ldconfig found."""

    flags: int
    path: str
    hwcap: str | None
    """Its glibc-hwcaps subdirectory, or None for the baseline."""
    legacy: bool
    """Marked for a subdirectory of the kind that glibc 2.37 no longer knows."""


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache by soname; the entries of each in file order."""

    entries: Mapping[str, tuple[CacheEntry, ...]]

    def lookup(self, name: str, machine: Machine, hwcaps: tuple[str, ...]) -> str | None:
        """The path that ld.so takes: the best supported hwcaps entry, else the first baseline one."""
        flags = _FLAGS[machine]
        usable = [e for e in self.entries.get(name, ()) if e.flags == flags and not e.legacy]
        named = [entry for entry in usable if entry.hwcap in hwcaps]
        if named:
            return min(named, key=lambda entry: hwcaps.index(entry.hwcap or "")).path
        return next((entry.path for entry in usable if entry.hwcap is None), None)


def parse_cache(data: bytes) -> Cache | None:
    """Decode the cache; None when it is not one of the current format, or is damaged."""
    start = _new_format_start(data)
    if start is None or len(data) < start + _HEADER:
        return None
    count, _, _, extension = struct.unpack_from("<IIB3xI", data, start + len(_MAGIC))
    if start + _HEADER + count * _ENTRY.size > len(data):
        return None
    names = _hwcap_names(data, start, extension)
    table: dict[str, list[CacheEntry]] = {}
    for index in range(count):
        flags, key, value, _, hwcap = _ENTRY.unpack_from(data, start + _HEADER + index * _ENTRY.size)
        name, path = _text(data, start + key), _text(data, start + value)
        if name is None or path is None:
            return None
        is_named = hwcap & ~_ISA_BITS & ~0xFFFFFFFF == _EXTENSION_BIT
        label = names.get(hwcap & 0xFFFFFFFF, "?") if is_named else None
        table.setdefault(name, []).append(CacheEntry(flags, path, label, bool(hwcap) and not is_named))
    return Cache({name: tuple(entries) for name, entries in table.items()})


def _new_format_start(data: bytes) -> int | None:
    """Offset of the current format, which `ldconfig -c compat` puts behind a table of the old one."""
    if data.startswith(_MAGIC):
        return 0
    if not data.startswith(_OLD_MAGIC) or len(data) < 16:
        return None
    (count,) = struct.unpack_from("<I", data, 12)
    start = (16 + count * _OLD_ENTRY + 7) & ~7
    return start if data[start : start + len(_MAGIC)] == _MAGIC else None


def _hwcap_names(data: bytes, start: int, extension: int) -> Mapping[int, str]:
    """Extension section 1: string offsets of the glibc-hwcaps subdirectories, by index."""
    at = start + extension
    if extension == 0 or at + 8 > len(data):
        return {}
    magic, count = struct.unpack_from("<II", data, at)
    if magic != _EXTENSION_MAGIC:
        return {}
    for position in range(at + 8, min(at + 8 + 16 * count, len(data) - 15), 16):
        tag, _, offset, size = struct.unpack_from("<IIII", data, position)
        if tag == _HWCAP_TAG and start + offset + size <= len(data):
            words = struct.unpack_from(f"<{size // 4}I", data, start + offset)
            return {index: _text(data, start + word) or "?" for index, word in enumerate(words)}
    return {}


def _text(data: bytes, start: int) -> str | None:
    end = data.find(b"\0", start)
    return None if end < 0 else data[start:end].decode("utf-8", "backslashreplace")


def configured_directories(sysroot: Sysroot) -> tuple[str, ...]:
    """The directories of ld.so.conf and the files that it includes, in order, each once."""
    seen: set[str] = set()
    return tuple(dict.fromkeys(_configured(sysroot, CONFIGURATION, seen)))


def _configured(sysroot: Sysroot, path: str, seen: set[str]) -> Iterator[str]:
    if path in seen or len(seen) > _MAX_INCLUDES:
        return
    seen.add(path)
    try:
        text = sysroot.read(path).decode("utf-8", "replace")
    except OSError:
        return
    for raw in text.splitlines():
        words = raw.split("#", 1)[0].replace(",", " ").split()
        if words[:1] == ["include"]:
            for pattern in words[1:]:
                absolute = pattern if pattern.startswith("/") else f"{path.rpartition('/')[0]}/{pattern}"
                for name in glob(sysroot, absolute):
                    yield from _configured(sysroot, name, seen)
        elif words[:1] != ["hwcap"]:
            # "DIR=TYPE" was libc5's way to tell the library type; ldconfig still drops the type.
            yield from (word.split("=", 1)[0].rstrip("/") or "/" for word in words)
