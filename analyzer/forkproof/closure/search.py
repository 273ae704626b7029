"""Where ld.so looks for a library, and which file it takes.

Owns: the order of the search for both libcs, the substitution of $ORIGIN and its like, and the test that
      a candidate must pass before it is taken.
Takes: a name and the object that asks for it. Gives: `Found`, or `NotFound` with every place looked in.
Must never: open more of a candidate than its first bytes, or know what is already loaded; `load` does.
Wrong where: the program runs set-user-ID (ld.so then trusts less; not modelled), LD_AUDIT changes names,
      or a relative directory is searched and the program starts elsewhere than `cwd`.

The order, ld.so(8): DT_RPATH of the asker and of those that loaded it, unless the asker has DT_RUNPATH;
LD_LIBRARY_PATH; DT_RUNPATH of the asker alone; /etc/ld.so.cache; the built-in directories, unless the
asker was linked with -z nodefaultlib. musl: LD_LIBRARY_PATH; RPATH or RUNPATH, which are one thing there,
of the asker and of those that loaded it; the system path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from forkproof.closure.ldcache import CACHE, configured_directories, parse_cache
from forkproof.closure.model import Libc, LookedIn
from forkproof.elf.image import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forkproof.closure.ldcache import Cache
    from forkproof.closure.rules import LoaderRules
    from forkproof.closure.sysroot import Sysroot
    from forkproof.elf.image import Image

_TOKEN: Final = re.compile(r"\$(?:\{(ORIGIN|LIB|PLATFORM)\}|(ORIGIN|LIB|PLATFORM)(?![A-Za-z0-9_]))")
_NAMED: Final = "path in the name"
_DF_1_NODEFLIB: Final = 0x800
DT_FLAGS_1: Final = 0x6FFFFFFB
_MACHINE_NUMBER: Final = {Machine.X86_64: 62, Machine.AARCH64: 183}


@dataclass(frozen=True, eq=False, slots=True)
class Asker:
    """An object whose DT_NEEDED entry (or dlopen) starts a search."""

    path: str
    origin: str
    """What $ORIGIN means in it."""
    image: Image
    loaded_by: Asker | None

    @property
    def chain(self) -> Iterator[Asker]:
        """The asker, the object that caused it to be loaded, and so on up."""
        step: Asker | None = self
        while step is not None:
            yield step
            step = step.loaded_by


@dataclass(frozen=True, slots=True)
class Found:
    """The file that ld.so takes."""

    path: str
    how: str


@dataclass(frozen=True, slots=True)
class NotFound:
    """Nothing, or a file that ld.so would stop at."""

    looked_in: tuple[LookedIn, ...]

    @property
    def reason(self) -> str:
        """The last obstacle in a few words."""
        bad = [place for place in self.looked_in if place.outcome != "no such file"]
        if bad:
            return f"{bad[-1].path}: {bad[-1].outcome}"
        is_path = {place.source for place in self.looked_in} == {_NAMED}
        return "no such file in the sysroot" if is_path else "no such file in any search directory"


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory, or one full path from the cache, and the rule that names it."""

    path: str
    source: str
    is_file: bool = False


@dataclass(frozen=True, eq=False)
class Search:
    """All searches of one program start."""

    sysroot: Sysroot
    rules: LoaderRules
    program: Asker
    library_path: tuple[str, ...]
    cwd: str
    _subdirectories: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def find(self, name: str, asker: Asker | None) -> Found | NotFound:
        """Look for `name` as ld.so does on behalf of `asker` (None: nobody, as for a musl preload)."""
        looked: list[LookedIn] = []
        for path, source in self._candidates(name, asker, looked):
            outcome, is_final = self._verify(path)
            if outcome is None:
                return Found(path, source)
            looked.append(LookedIn(path, source, outcome))
            if is_final:
                break
        return NotFound(tuple(looked))

    @cached_property
    def has_cache(self) -> bool:
        """False when the sysroot has no (readable) ld.so.cache and ld.so.conf stands in for it."""
        return self._cache is not None

    # ---- candidates ---------------------------------------------------------------------------

    def _candidates(self, name: str, asker: Asker | None, looked: list[LookedIn]) -> Iterator[tuple[str, str]]:
        """Existing files that may be the library; the places that hold none go to `looked`."""
        if "/" in name:
            expanded = self._expand(name, asker) if asker is not None else name
            if expanded is not None:
                yield self._absolute(expanded), _NAMED
            return
        for place in self._places(name, asker):
            if place.is_file:
                yield place.path, place.source
                continue
            found = False
            for subdirectory in self._present(place.path):
                path = f"{place.path.rstrip('/')}/{subdirectory}{name}"
                if self.sysroot.resolve(path) is not None:
                    found = True
                    yield path, place.source
            if not found:
                looked.append(LookedIn(f"{place.path.rstrip('/')}/{name}", place.source, "no such file"))

    def _places(self, name: str, asker: Asker | None) -> Iterator[_Place]:
        if self.rules.libc is Libc.MUSL:
            yield from self._environment()
            for step in asker.chain if asker is not None else ():
                yield from self._own_path(step, step.image.runpath or step.image.rpath, "RUNPATH")
            yield from (_Place(path, "system path") for path in self.rules.directories)
            return
        if asker is None or not asker.image.runpath:
            yield from self._inherited(asker)
        yield from self._environment()
        if asker is not None:
            yield from self._own_path(asker, asker.image.runpath, "RUNPATH")
        yield from self._from_cache(name, asker or self.program)
        if not _has_no_default_libraries(asker or self.program):
            yield from (_Place(path, "built-in directory") for path in self.rules.directories)

    def _inherited(self, asker: Asker | None) -> Iterator[_Place]:
        """DT_RPATH of the asker, of those that loaded it, and of the program, each once."""
        chain = list(asker.chain) if asker is not None else []
        if self.program not in chain:
            chain.append(self.program)
        for step in chain:
            if not step.image.runpath:
                yield from self._own_path(step, step.image.rpath, "RPATH")

    def _environment(self) -> Iterator[_Place]:
        separated = [part for item in self.library_path for part in re.split("[:;]", item)]
        yield from self._own_path(self.program, separated, "LD_LIBRARY_PATH")

    def _from_cache(self, name: str, asker: Asker) -> Iterator[_Place]:
        if self._cache is None:
            yield from (_Place(path, "ld.so.conf") for path in self._configured)
            return
        path = self._cache.lookup(name, self.rules.machine, self.rules.hwcaps)
        if path is None:
            return
        built_in = tuple(f"{directory}/" for directory in self.rules.directories)
        if _has_no_default_libraries(asker) and path.startswith(built_in):
            return
        yield _Place(path, "ld.so.cache", is_file=True)

    def _own_path(self, owner: Asker, parts: Sequence[str], kind: str) -> Iterator[_Place]:
        """The directories of one search path, tokens replaced, each once; an empty one is the cwd."""
        source = kind if kind == "LD_LIBRARY_PATH" else f"{kind} of {owner.path}"
        if self.rules.libc is Libc.MUSL and any(_has_foreign_token(part) for part in parts):
            return
        expanded = (self._expand(part, owner) for part in parts)
        absolute = (self._absolute(part).rstrip("/") or "/" for part in expanded if part is not None)
        yield from (_Place(path, source) for path in dict.fromkeys(absolute))

    @cached_property
    def _cache(self) -> Cache | None:
        try:
            return parse_cache(self.sysroot.read(CACHE))
        except OSError:
            return None

    @cached_property
    def _configured(self) -> tuple[str, ...]:
        return configured_directories(self.sysroot)

    def _present(self, directory: str) -> tuple[str, ...]:
        """Those hardware subdirectories of a search directory that exist, best first, and itself."""
        if directory not in self._subdirectories:
            present = (s for s in self.rules.subdirectories if not s or self._exists(f"{directory}/{s}"))
            self._subdirectories[directory] = tuple(present)
        return self._subdirectories[directory]

    def _exists(self, path: str) -> bool:
        return self.sysroot.resolve(path) is not None

    # ---- names and files ----------------------------------------------------------------------

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"{self.cwd.rstrip('/')}/{path}"

    def _expand(self, text: str, owner: Asker) -> str | None:
        """Replace the dynamic string tokens; None where that leaves nothing of a text that had some."""
        values = {"ORIGIN": owner.origin, "LIB": self.rules.lib_token, "PLATFORM": self.rules.platform_token}
        result = _TOKEN.sub(lambda match: values[match[1] or match[2]], text)
        return None if text and not result else result

    def _verify(self, path: str) -> tuple[str | None, bool]:
        """Why a file is not taken (None: it is), and whether the search ends with it.

        elf/dl-load.c, open_verify: a file of another class or machine is passed over, as is one that
        cannot be opened; anything else that is not a loadable object stops the program.
        """
        try:
            head = self.sysroot.read(path, 20)
        except FileNotFoundError:
            return "no such file", False
        except OSError as error:
            return f"cannot be read: {error.strerror or error}", False
        if head[:4] != b"\x7fELF" or len(head) < 20:
            return "not an ELF file", True
        if head[4] != 2 or int.from_bytes(head[18:20], "little") != _MACHINE_NUMBER[self.rules.machine]:
            # musl takes the first file that opens; when it cannot map it, the library is missing.
            return "for another machine", self.rules.libc is Libc.MUSL
        return None, False


def _has_no_default_libraries(asker: Asker) -> bool:
    return bool(asker.image.dynamic.get(DT_FLAGS_1, 0) & _DF_1_NODEFLIB)


def _has_foreign_token(part: str) -> bool:
    """musl drops a whole search path for one "$" that does not begin $ORIGIN or ${ORIGIN}."""
    return re.search(r"\$(?!ORIGIN|\{ORIGIN\})", part) is not None
