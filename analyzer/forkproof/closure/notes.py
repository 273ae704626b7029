"""Libraries that an object announces it may dlopen.

Owns: the "ELF dlopen metadata" note (owner FDO, type 0x407c0c0a), which systemd and others emit.
Takes: an image. Gives: one `MayOpen` for each entry of each note.
Must never: decide whether the library is loaded; the note is an intention, not a fact.
Wrong where: section headers are stripped (the note is found by its section), or the program opens
      libraries that it does not announce; most do.

Source: the UAPI group's "Package Metadata for Executable Files", section on dlopen metadata.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkproof.elf.image import Image

_TYPE: Final = 0x407C0C0A
_OWNER: Final = b"FDO\0"


@dataclass(frozen=True, slots=True)
class MayOpen:
    """One optional dependency; the first soname that exists is the one opened."""

    sonames: tuple[str, ...]
    feature: str
    priority: str
    """required, recommended or suggested."""


def announced(image: Image) -> tuple[MayOpen, ...]:
    """The dlopen notes of an object, in file order; entries that are not as specified are passed over."""
    section = image.section(".note.dlopen")
    if section is None:
        return ()
    raw = image.bytes[section.offset : section.offset + section.size].tobytes()
    return tuple(entry for description in _descriptions(raw) for entry in _entries(description))


def _descriptions(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at + 12 <= len(raw):
        name_size, size, kind = struct.unpack_from("<III", raw, at)
        name = at + 12
        start = name + (name_size + 3 & ~3)
        if kind == _TYPE and raw[name : name + name_size] == _OWNER:
            yield raw[start : start + size]
        at = start + (size + 3 & ~3)


def _entries(description: bytes) -> Iterator[MayOpen]:
    try:
        document = json.loads(description.rstrip(b"\0"))
    except ValueError:
        return
    for item in document if isinstance(document, list) else ():
        if not isinstance(item, dict):
            continue
        sonames = item.get("soname")
        if isinstance(sonames, list) and sonames and all(isinstance(name, str) for name in sonames):
            feature, priority = str(item.get("feature", "")), str(item.get("priority", "recommended"))
            yield MayOpen(tuple(sonames), feature, priority)
