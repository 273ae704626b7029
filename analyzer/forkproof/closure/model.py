"""What a load is asked for and what comes out of it.

Owns: the frozen types that cross the border of `forkproof.closure`.
Takes and gives: nothing but data; the behaviour is in `load` and `binding`.
Must never: open a file or know a search rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from forkproof.closure.sysroot import Sysroot
    from forkproof.elf.image import Image
    from forkproof.model import Diagnostic


class Libc(Enum):
    """Whose dynamic linker maps the program; it decides the rules of search and of symbol lookup."""

    GLIBC = "glibc"
    MUSL = "musl"
    NONE = "none"
    """A static program: nothing is searched and nothing is bound."""


@dataclass(frozen=True, slots=True)
class LookedIn:
    """One place in which a library was sought."""

    path: str
    source: str
    """The rule that led there: "RUNPATH of /usr/bin/x", "ld.so.cache", …"""
    outcome: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A library that ld.so would not find: the program would not start."""

    name: str
    needed_by: tuple[str, ...]
    looked_in: tuple[LookedIn, ...]
    """Every place, in the order of the search made for the first object that needs it."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A program as it would be started.

    `target`, `library_path` and `preload` are what the command line and the environment would hold:
    the paths are paths of the sysroot (for `target` see `Sysroot.locate`).
    """

    sysroot: Sysroot
    target: str
    library_path: tuple[str, ...] = ()
    """LD_LIBRARY_PATH, one directory an element."""
    preload: tuple[str, ...] = ()
    """LD_PRELOAD, one library an element."""
    also: tuple[str, ...] = ()
    """Libraries opened after start-up with dlopen(…, RTLD_GLOBAL), in this order."""
    hwcaps: tuple[str, ...] | None = None
    """glibc-hwcaps subdirectories that the CPU supports, best first, such as ("x86-64-v3", "x86-64-v2").
    None: what this machine's CPU supports when the sysroot is this machine's own "/", else none."""
    cwd: str | None = None
    """What relative search directories start from. None: this process's directory on "/", else "/"."""


@dataclass(frozen=True, eq=False, slots=True)
class LoadedObject:
    """One object of the closure."""

    index: int
    name: str
    """DT_SONAME, or else the last part of the path."""
    path: str
    """In the sysroot, as ld.so spells it (`$ORIGIN/../lib` keeps its dots)."""
    host_path: Path
    """Where the file is on this machine, symbolic links resolved."""
    image: Image
    why: str
    needed: tuple[int, ...]
    """Indexes of the objects that its DT_NEEDED entries led to, in order; missing ones left out."""
    in_scope: bool
    """False for an interpreter that no object needs: it is mapped, but no symbol is sought in it."""
    is_startup: bool
    """False when it came with `also`."""


@dataclass(frozen=True, eq=False, slots=True)
class Closure:
    """What ld.so would map, in load order; object 0 is the program."""

    libc: Libc
    objects: tuple[LoadedObject, ...]
    missing: tuple[Missing, ...]
    diagnostics: tuple[Diagnostic, ...]
    init_order: tuple[int, ...]
    """Object indexes in the order in which their constructors run."""

    @property
    def program(self) -> LoadedObject:
        """The target itself."""
        return self.objects[0]

    @property
    def global_scope(self) -> tuple[int, ...]:
        """Indexes of the objects in which a symbol is sought, in order."""
        return tuple(item.index for item in self.objects if item.in_scope)

    def find(self, name: str) -> LoadedObject | None:
        """The first object with this soname or path."""
        return next((item for item in self.objects if name in (item.name, item.path)), None)
