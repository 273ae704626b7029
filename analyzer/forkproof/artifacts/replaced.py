"""A sysroot with some libraries exchanged: what would happen with this one in place of that.

Owns: the exchange, by file name. Takes: a sysroot and files of this machine. Gives: a `Sysroot`.
Must never: make a library appear where the sysroot has none of that name: ld.so would not find it there either.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

from forkproof.closure.sysroot import Sysroot


class ReplacedSysroot:
    """The inner sysroot, but for files of these names."""

    def __init__(self, inner: Sysroot, files: Mapping[str, Path]) -> None:
        self._inner = inner
        self._files = files

    @property
    def is_host(self) -> bool:
        """As the inner one."""
        return self._inner.is_host

    def resolve(self, path: str) -> str | None:
        """As the inner one: a name that exists keeps its place."""
        return self._inner.resolve(path)

    def identity(self, path: str) -> Hashable:
        """That of the file that stands there now."""
        file = self._file(path)
        return ("replaced", str(file)) if file is not None else self._inner.identity(path)

    def read(self, path: str, size: int = -1) -> bytes:
        """The new file, or the inner one's."""
        file = self._file(path)
        if file is None:
            return self._inner.read(path, size)
        with file.open("rb") as stream:
            return stream.read(size)

    def names_in(self, path: str) -> tuple[str, ...]:
        """As the inner one."""
        return self._inner.names_in(path)

    def host_path(self, path: str) -> Path:
        """The new file, or the inner one's."""
        return self._file(path) or self._inner.host_path(path)

    def locate(self, target: str) -> str:
        """As the inner one."""
        return self._inner.locate(target)

    def _file(self, path: str) -> Path | None:
        file = self._files.get(path.rpartition("/")[2])
        return file if file is not None and self._inner.resolve(path) is not None else None
