"""Which files of artifacts and directories are scanned: programs; of packages also what exports malloc.

Owns: the choice, `--only`, and what is said where nothing is left. Takes: ELF files by path. Gives: paths.
Must never: scan, or follow a link of a directory.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forkproof.errors import InputError
from forkproof.model import Diagnostic

if TYPE_CHECKING:
    from forkproof.artifacts.tree import Tree
    from forkproof.artifacts.world import World
    from forkproof.elf.image import Image

Files = Iterator[tuple[str, Path]]
"""ELF files: the path in the world, and where the content is."""
Chosen = tuple[int, str]
"""The number of an artifact, and a path of it."""

_SKIPPED: Final = ("/usr/lib/debug/", "/proc/", "/sys/", "/dev/", "/boot/")
_LIBC_ONLY: Final = frozenset({"fork", "__tls_get_addr"})
"""Who exports malloc and one of these is a C library, or its loader."""
_NEAREST: Final = 3


class Programs:
    """What of some files is to be scanned."""

    def __init__(self, only: Sequence[str], *, with_libraries: bool) -> None:
        self._only = only
        self._with_libraries = with_libraries
        self._seen: set[tuple[int, int]] = set()
        self._programs: list[Chosen] = []
        self._allocators: list[Chosen] = []
        self._libraries: list[Chosen] = []
        self._left_out: list[tuple[str, Path]] = []
        self._matched: set[str] = set()
        self._foreign = 0
        self._errors: list[InputError] = []
        self._closed: list[str] = []
        """Directories that may not be looked into."""

    @property
    def errors(self) -> list[InputError]:
        """What could not be read."""
        if not self._closed:
            return self._errors
        others = len(self._closed) - 1
        more = f", nor can {others} more director{'ies' if others > 1 else 'y'}" if others else ""
        reason = f"cannot be looked into{more}: Permission denied"
        help_text = "Run as a user who may, or choose with --only what is to be scanned."
        return [*self._errors, InputError(self._closed[0], reason, next_step=help_text)]

    @property
    def chosen(self) -> list[Chosen]:
        """Programs, and what is made to be preloaded."""
        return [*self._programs, *self._allocators]

    @property
    def libraries(self) -> list[Chosen]:
        """What to scan where nothing else is to be scanned."""
        return self._libraries if self._with_libraries else []

    @property
    def notes(self) -> tuple[Diagnostic, ...]:
        """What was left out, and patterns that chose nothing."""
        notes = [
            Diagnostic("warning", "", f"--only {pattern} matches nothing")
            for pattern in self._only
            if self._matched and pattern not in self._matched
        ]
        if self._foreign:
            one = "1 ELF file is for another machine, or no program"
            many = f"{self._foreign} ELF files are for other machines, or no programs"
            notes.append(Diagnostic("info", "", one if self._foreign == 1 else many))
        return tuple(notes)

    def look(self, files: Files, *, of: int = 0, is_package: bool = False) -> None:
        """Sort the files of one artifact."""
        for path, place in files:
            if place.is_dir():
                if not self._only or any(_can_lie_in(path, pattern) for pattern in self._only):
                    self._closed.append(path)
                continue
            status = place.stat()
            if path.startswith(_SKIPPED) or (status.st_dev, status.st_ino) in self._seen:
                continue
            if self._only:
                matching = [pattern for pattern in self._only if fnmatch.fnmatch(path, pattern)]
                if not matching:
                    self._left_out.append((path, place))
                    continue
                self._matched.update(matching)
            self._seen.add((status.st_dev, status.st_ino))
            self._sort((of, path), place, is_package)

    def nothing(self, name: str) -> InputError:
        """Why there is nothing to scan in what is called `name`."""
        others = Programs((), with_libraries=False)
        others.look(iter(self._left_out))
        paths = sorted({path for _, path in others.chosen})
        if not paths:
            help_text = "Name a library of it by its path, or see what it holds."
            return InputError(name, "holds no ELF program for x86-64 or aarch64", next_step=help_text)
        patterns = " ".join(f"--only {pattern}" for pattern in self._only)
        programs = f"{len(paths)} programs" if len(paths) > 1 else "one program"
        near = ", ".join(_nearest(self._only, paths))
        help_text = f"Patterns are matched with whole paths, as a shell does. Nearest: {near}"
        return InputError(name, f"{patterns} matches none of the {programs} in it", next_step=help_text)

    def _sort(self, chosen: Chosen, place: Path, is_package: bool) -> None:
        from forkproof.allocators import is_program
        from forkproof.elf import image as elf
        from forkproof.errors import UnsupportedElf

        try:
            image = elf.load(place)
        except UnsupportedElf:
            self._foreign += 1
            return
        except InputError as error:
            self._errors.append(InputError(chosen[1], error.reason, next_step=error.next_step))
            return
        if is_program(image) and image.soname is None:
            self._programs.append(chosen)
        elif is_package and image.soname is not None:
            self._libraries.append(chosen)
            names = image.dynamic_symbols.by_name
            if self._with_libraries and _defines(image, "malloc") and not _LIBC_ONLY & names.keys():
                self._allocators.append(chosen)


def _nearest(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Those that look like a pattern; by name first, since directories are what is wrong most often."""
    import difflib

    found = dict[str, None]()
    for pattern in patterns:
        name = pattern.rpartition("/")[2]
        found |= dict.fromkeys(path for path in paths if fnmatch.fnmatch(path.rpartition("/")[2], name))
        found |= dict.fromkeys(difflib.get_close_matches(pattern, paths, n=_NEAREST, cutoff=0.0))
    return list(found)[:_NEAREST]


def _defines(image: Image, name: str) -> bool:
    table = image.dynamic_symbols
    return any(bool(table.defined[index]) for index in table.by_name.get(name, ()))


def in_tree(tree: Tree) -> Files:
    """ELF files of an archive."""
    return ((path, entry.blob) for path, entry in tree.files() if entry.blob is not None)


def in_directory(top: Path, inside: str) -> Files:
    """ELF files below a directory, sorted; links are not followed, other file systems are.

    With them what may be one: commands that cannot be read, and, at the end, directories that cannot be looked into.
    """
    from forkproof.artifacts.tree import is_elf

    closed: list[Path] = []

    def note(error: OSError) -> None:
        if isinstance(error, PermissionError):
            closed.append(Path(error.filename))

    for directory, below, names in os.walk(top, onerror=note):
        below.sort()
        for name in sorted(names):
            place = Path(directory, name)
            if is_elf(place) or _is_closed_command(place):
                yield f"{inside}/{place.relative_to(top)}", place
    for place in closed:
        yield (f"{inside}/{place.relative_to(top)}" if place != top else inside or "/"), place


def _is_closed_command(place: Path) -> bool:
    """A file to be executed, as its mode says, of which nothing can be told since it may not be read."""
    try:
        mode = place.lstat().st_mode
        if stat.S_ISREG(mode) and mode & 0o111:
            place.open("rb").close()
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _can_lie_in(directory: str, pattern: str) -> bool:
    """Whether paths below a directory can match: where the pattern begins with plain text, that decides."""
    start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return f"{directory}/".startswith(start) or start.startswith(f"{directory}/")


def in_world(files: Files, world: World) -> Files:
    """Those files of a layer that the world has from there, by the paths that they have in it; closed directories."""
    for path, place in files:
        if place.is_dir():
            yield path, place
            continue
        resolved = world.resolve(path)
        there = world.entry(resolved) if resolved is not None else None
        if resolved is not None and there is not None and there.blob == place:
            yield resolved, place
