"""Programs to scan, and the world in which they run: what opening targets gives.

Owns: `Scope`, and what a unit or a wrapper script preloads into a program. Takes: a sysroot and paths. Gives: `Start`s.
Must never: look for programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forkproof.closure.sysroot import Sysroot
from forkproof.errors import InputError
from forkproof.model import Diagnostic


@dataclass(frozen=True, slots=True)
class Start:
    """A program to be scanned."""

    name: str
    """As `Sysroot.locate` takes it."""
    preload: tuple[str, ...] = ()
    """What its unit or wrapper puts into LD_PRELOAD."""
    source: str = ""
    """The file that says so."""
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


def named(root: Sysroot, name: str) -> Start:
    """A name as it is, unless a unit or a script of the sysroot preloads something into that program."""
    from forkproof.artifacts import start

    try:
        path = root.locate(name)
        script = start.of_script(root, path)
        if script is not None:
            return Start(script[0], script[1].libraries, script[1].source)
        known = start.preloads(root).get(root.resolve(path) or path)
    except InputError:
        known = None
    return Start(name, known.libraries, known.source) if known is not None else Start(name)


def in_order(sysroot: Sysroot, paths: Sequence[tuple[str, str]]) -> list[Start]:
    """Each program once, with what its unit or wrapper preloads."""
    from forkproof.artifacts import start

    known = {**start.wrapped(sysroot), **start.preloads(sysroot)} if paths else {}
    starts = []
    for path, prefix in sorted(paths):
        preload = known.get(sysroot.resolve(path) or path)
        how = (preload.libraries, preload.source) if preload is not None else ((), "")
        starts.append(Start(path, *how, prefix))
    return starts
