"""Programs to scan, and the world in which they run: what opening targets gives.

Owns: `Scope`, and what a unit or a wrapper script preloads into a program. Takes: a sysroot and paths. Gives: `Start`s.
Must never: look for programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

from forkproof.closure.sysroot import Sysroot
from forkproof.errors import InputError
from forkproof.model import Diagnostic

if TYPE_CHECKING:
    from forkproof.artifacts.start import Preload


@dataclass(frozen=True, slots=True)
class Start:
    """A program to be scanned."""

    name: str
    """As `Sysroot.locate` takes it."""
    preload: tuple[str, ...] = ()
    """What its unit or wrapper puts into LD_PRELOAD."""
    source: str = ""
    """The file that says so."""
    library_path: tuple[str, ...] = ()
    """LD_LIBRARY_PATH of the image."""
    prefix: str = ""
    """Put before the target's path where several artifacts have it: which one it is of."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Programs that run in one world."""

    sysroot: Sysroot
    label: str
    """What the report calls the sysroot."""
    starts: tuple[Start, ...]
    diagnostics: tuple[Diagnostic, ...] = ()
    errors: tuple[InputError, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """The environment that an image gives to its processes."""

    preload: tuple[str, ...] = ()
    library_path: tuple[str, ...] = ()
    source: str = ""


NOTHING: Final = Given()


def named(root: Sysroot, names: Sequence[str], *, as_named: bool = False) -> list[Start]:
    """Names as they are, unless a unit or a script of the sysroot preloads something into such a program.

    `as_named`: whatever those preload. A script stands for the program that it ends in all the same.
    """
    known = None if as_named else _Known(root)
    return [_named(root, name, known) for name in names]


def _named(root: Sysroot, name: str, known: _Known | None) -> Start:
    from forkproof.artifacts import start

    try:
        path = root.locate(name)
        script = start.of_script(root, path)
        if script is not None:
            return Start(script[0], script[1].libraries, script[1].source)
        how = known.preloads.get(root.resolve(path) or path) if known is not None else None
    except InputError:
        how = None
    return Start(name, how.libraries, how.source) if how is not None else Start(name)


def once(root: Sysroot, starts: Sequence[Start]) -> tuple[Start, ...]:
    """Each program once, however it was spelled; a link to a program is one of its own, as its name can matter."""
    known: dict[Start, Start] = {}
    for start in starts:
        try:
            place = root.locate(start.name)
        except InputError:
            place = start.name
        known.setdefault(replace(start, name=place), start)
    return tuple(known.values())


def in_order(sysroot: Sysroot, paths: Sequence[tuple[str, str]], given: Given = NOTHING) -> list[Start]:
    """Each program once, with what its unit or wrapper preloads, or else the image's environment."""
    known = _Known(sysroot)
    starts = []
    for path, prefix in sorted(paths):
        preload = known.preloads.get(sysroot.resolve(path) or path)
        how = (preload.libraries, preload.source) if preload is not None else (given.preload, given.source)
        starts.append(Start(path, *(how if how[0] else ((), "")), given.library_path, prefix))
    return starts


class _Known:
    """What units and wrappers of a sysroot preload, by resolved path; read when the first program is looked up."""

    def __init__(self, sysroot: Sysroot) -> None:
        self._sysroot = sysroot

    @cached_property
    def preloads(self) -> dict[str, Preload]:
        """A unit wins over a script that nobody has to use."""
        from forkproof.artifacts import start

        return {**start.wrapped(self._sysroot), **start.preloads(self._sysroot)}
