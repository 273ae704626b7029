"""Locks behind pointers: where one lies in a running process.

Owns: the way from a variable of an object, over fields, to a lock. Takes: a scan's value, a process.
Gives: an address, or none where a pointer on the way is null or not to be read.
Must never: guess: a lock that an element of an array leads to has no such way.
Wrong where: the pointers change between the moment they are followed and the fork.
"""

from __future__ import annotations

from typing import NamedTuple

from forkproof.locks.values import Content, Object, Value
from forkproof.probe.stack import Modules
from forkproof.probe.tracee import Process

Key = tuple[str, str]
"""A lock as a report names it: its object, its name."""


class Way(NamedTuple):
    """From a variable to a lock."""

    path: str
    """The file of the object."""
    offsets: tuple[int, ...]
    """The variable's address in it, then what is added to each pointer that is found."""

    def follow(self, process: Process, modules: Modules) -> int | None:
        """The run-time address of the lock."""
        at = modules.runtime(process, self.path, self.offsets[0])
        for offset in self.offsets[1:]:
            pointer = process.memory.word(at) if at is not None else None
            at = pointer + offset if pointer else None
        return at


def offsets_of(value: Value) -> tuple[int, tuple[int, ...]] | None:
    """The object in which the way to a value begins, and the offsets."""
    base, offsets = value.base, [value.offset]
    while isinstance(base, Content):
        offsets.append(base.offset)
        base = base.base
    return (base.number, tuple(reversed(offsets))) if isinstance(base, Object) and len(offsets) > 1 else None
