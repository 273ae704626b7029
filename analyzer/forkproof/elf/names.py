"""What the functions of one object are called.

Owns: the merge of names from `.dynsym`, `.symtab`, `.gnu_debugdata` (xz-compressed mini debug info),
      separate debug files (by build-id, then by debuglink) and Go's own table, and demangling for display.
Takes: an `Image`, and a way to open a debug file of its sysroot. Gives: names by address.
Must never: decide a verdict by a name, or open anything outside the sysroot.
Wrong where: identical code was folded by the linker (one address, many names: the plainest is shown).

Source: GDB manual, "Separate Debug Files" and "MiniDebugInfo".
"""

from __future__ import annotations

import hashlib
import lzma
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.columns import among
from forkproof.elf.image import Image, load_symbols
from forkproof.elf.tables import I64, STB_LOCAL, STT_FUNC, STT_IFUNC, STT_OBJECT, SymbolTable
from forkproof.errors import InputError

DebugFinder = Callable[[str], Path | None]
"""Gives the host path of a path inside the sysroot, or None when nothing is there."""
_MINI_DEBUG_LIMIT: Final = 256 << 20


class FunctionNames:
    """Names of the functions of one object, by start address. Tables are read on first use.

    `path` is where the object lies in its sysroot, next to which a debuglink is looked for.
    """

    def __init__(self, image: Image, path: str = "", find: DebugFinder | None = None) -> None:
        self._image = image
        self._path = path
        self._find = find
        self._aliases: dict[int, tuple[str, ...]] = {}

    def aliases(self, rva: int) -> tuple[str, ...]:
        """Every name of the function at an address, the plainest first; empty when it has none."""
        known = self._aliases.get(rva)
        if known is None:
            known = self._aliases[rva] = self._find_aliases(rva)
        return known

    def name(self, rva: int) -> str:
        """The plainest name, as the linker knows it; `sub_<rva>` for nameless code."""
        names = self.aliases(rva)
        return names[0] if names else f"sub_{rva:x}"

    def is_named(self, rva: int) -> bool:
        """True when some table names the function."""
        return bool(self.aliases(rva))

    @property
    def has_names(self) -> bool:
        """Some function has a name, here or in a debug file; Go's own count where there is no other code than Go's."""
        table, (values, _) = self._tables[1], self._by_address[1]
        return self._image.has_names or (table is not self._image.go_functions and len(values) > 0)

    def known(self, names: Iterable[str]) -> list[str]:
        """Those of the names that a function here bears, in the order given."""
        wanted = list(names)
        asked = set(wanted)
        borne = set[str]().union(*(table.keys() & asked for table in self._first))
        return [name for name in wanted if name in borne]

    def addresses(self, name: str) -> tuple[int, ...]:
        """Addresses of the functions that bear a name; a local name may have several."""
        found = {table[name] for table in self._first if name in table}
        for others in self._others:
            found |= others.get(name, set())
        return tuple(sorted(found))

    @cached_property
    def variables(self) -> Mapping[int, tuple[str, int]]:
        """Name and size of the variable at an address, the shortest name where there are several."""
        found: dict[int, tuple[str, int]] = {}
        for table in self._tables:
            names = table.names
            for row in np.flatnonzero(table.defined & (table.type == STT_OBJECT) & (table.size > 0)).tolist():
                address, name = int(table.value[row]), names[row]
                if address not in found or len(name) < len(found[address][0]):
                    found[address] = name, int(table.size[row])
        return found

    def variable_at(self, address: int) -> tuple[int, str, int] | None:
        """(start, name, size) of the variable that holds an address."""
        at = address if address in self.variables else self._last_before(address)
        name, size = self.variables.get(at, ("", 0))
        return (at, name, size) if (at == address and name) or address < at + size else None

    def _last_before(self, address: int) -> int:
        index = bisect_right(self._starts, address) - 1
        return self._starts[index] if index >= 0 else -1

    @cached_property
    def _starts(self) -> list[int]:
        return sorted(self.variables)

    @cached_property
    def _named(self) -> list[tuple[list[str], list[int]]]:
        """For each table, names and addresses of its functions, in parallel."""
        found = []
        for table, (values, positions) in zip(self._tables, self._by_address, strict=True):
            names = table.names
            found.append(([names[position] for position in positions.tolist()], values.tolist()))
        return found

    @cached_property
    def _first(self) -> list[dict[str, int]]:
        """For each table, one address of each name: a set for each of a closure's 50 k names would cost more."""
        return [dict(zip(names, values, strict=True)) for names, values in self._named]

    @cached_property
    def _others(self) -> list[dict[str, set[int]]]:
        """For each table, the addresses of those names that have several."""
        result = []
        for (names, values), first in zip(self._named, self._first, strict=True):
            found: dict[str, set[int]] = {}
            if len(first) < len(names):
                for name, value in zip(names, values, strict=True):
                    if first[name] != value:
                        found.setdefault(name, set()).add(value)
            result.append(found)
        return result

    def _find_aliases(self, rva: int) -> tuple[str, ...]:
        names: dict[str, bool] = {}
        for table, (values, positions) in zip(self._tables, self._by_address, strict=True):
            first, last = np.searchsorted(values, [rva, rva + 1])
            for index in positions[first:last].tolist():
                name, is_local = table.names[index], bool(table.binding[index] == STB_LOCAL)
                if name:
                    names[name] = names.get(name, True) and is_local
        return tuple(sorted(names, key=lambda n: (names[n], *plainness(n))))

    @cached_property
    def _by_address(self) -> tuple[tuple[I64, npt.NDArray[np.intp]], ...]:
        """For each table, the addresses of its functions, sorted, and their positions."""
        found = []
        for table in self._tables:
            positions = np.flatnonzero(among(table.type, (STT_FUNC, STT_IFUNC)) & table.defined)
            positions = positions[np.argsort(table.value[positions], kind="stable")]
            found.append((table.value[positions], positions))
        return tuple(found)

    @cached_property
    def _tables(self) -> tuple[SymbolTable, ...]:
        own = self._image.dynamic_symbols
        if len(self._image.static_symbols):
            return own, self._image.static_symbols
        debug = self._debug_file() or self._mini_debug()
        return own, debug.static_symbols if debug is not None else self._image.go_functions

    def _debug_file(self) -> Image | None:
        for path in self.debug_paths() if self._find else ():
            host = self._find(path) if self._find else None
            try:
                image = load_symbols(host.read_bytes(), host) if host else None
            except (InputError, OSError):
                continue
            if image and image.build_id == self._image.build_id and len(image.static_symbols):
                return image
        return None

    def debug_paths(self) -> Iterator[str]:
        """Where a separate debug file is sought, should the object need one; paths in the sysroot."""
        if build_id := self._image.build_id:
            yield f"/usr/lib/debug/.build-id/{build_id[:2]}/{build_id[2:]}.debug"
        section = self._image.section(".gnu_debuglink")
        if section:
            raw = self._image.bytes[section.offset : section.offset + section.size].tobytes()
            name = raw.split(b"\0")[0].decode("utf-8", "backslashreplace")
            if name and "/" not in name:
                folder = self._path.rpartition("/")[0]
                yield from (f"{folder}/{name}", f"{folder}/.debug/{name}", f"/usr/lib/debug{folder}/{name}")

    @cached_property
    def debug_digests(self) -> tuple[tuple[str, str], ...]:
        """(path, SHA-256) of every file that lies where a debug file is sought: what names depend on."""
        places = ((path, self._find(path)) for path in self.debug_paths()) if self._find else ()
        return tuple((path, _digest(host)) for path, host in places if host is not None)

    def _mini_debug(self) -> Image | None:
        section = self._image.section(".gnu_debugdata")
        if section is None:
            return None
        raw = self._image.bytes[section.offset : section.offset + section.size].tobytes()
        try:
            text = lzma.LZMADecompressor().decompress(raw, _MINI_DEBUG_LIMIT)
            return load_symbols(text, self._image.path)
        except (lzma.LZMAError, InputError):
            return None


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def plainness(name: str) -> tuple[int, int, str]:
    """Sort key that puts `fork` before `__fork` and `__libc_fork`."""
    return len(name) - len(name.lstrip("_")) if not name.startswith("_Z") else 0, len(name), name
