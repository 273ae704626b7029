"""ELF files that several programs of a scan load: opened and indexed once.

Owns: which images stay open. Takes: paths. Gives: images, the same one for the same file.
Must never: keep more than its limit, but for what the program at hand needs anyway: memory is bounded by the largest
closure, not by the number of programs.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

from forkproof.elf import image as elf
from forkproof.elf.image import Image

LIMIT: Final = 128 << 20
"""Bytes of files that stay open; an image and its index take about as much memory again."""


class SharedImages:
    """The most recently used images, up to a sum of their files' sizes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._size = 0
        self._images: OrderedDict[tuple[int, int, int, int], tuple[Image, int]] = OrderedDict()

    def load(self, path: Path) -> Image:
        """As `elf.load`; a file that has changed is another file."""
        try:
            status = os.stat(path)  # noqa: PTH116 - ValueError for a NUL in both
        except (OSError, ValueError):
            return elf.load(path)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._images.get(key)
        if known is not None:
            self._images.move_to_end(key)
            return known[0]
        image = elf.load(path)
        self._images[key] = image, status.st_size
        self._size += status.st_size
        while self._size > self._limit and len(self._images) > 1:
            _, (_, size) = self._images.popitem(last=False)
            self._size -= size
        return image
