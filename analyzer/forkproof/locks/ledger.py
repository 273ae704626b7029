"""The book of one function: which locks it was seen to take and to let go.

Owns: what is held after an acquisition, a release, or a store into the thread's own storage, and the record of each.
Takes: sites and addresses. Gives: `Held`, and the record as sets.
Must never: follow control, or decide whether an attempt succeeded.
"""

from __future__ import annotations

from forkproof.locks.runs import NOTHING, Acquire, Held
from forkproof.locks.values import Element, Entry, Flag, Object, Thread, Value, root


class Ledger:
    """Acquisitions and releases, as they come."""

    def __init__(self, stack: Entry, watched: Held | None) -> None:
        """With `watched`, only those locks are held; flags of the thread always."""
        self.stack, self.watched = stack, watched
        self.on_entry = NOTHING
        self.acquires: dict[tuple[int, Value], Acquire] = {}
        self.again: dict[tuple[int, Value], Acquire] = {}
        self.releases: set[Value] = set()
        self.let_go: set[Value] = set()
        self.posted: set[Value] = set()
        """Semaphores; one that is waited for and posted in one function is a lock, any other may be a signal."""
        self.waited: set[Value] = set()
        """Semaphores that are waited for."""
        self.left_out: set[Value] = set()
        """Locks that were taken, and are not followed."""

    def acquired(self, site: int, address: Value, kind: str, held: Held, *, blocking: bool = True) -> Held:
        """What is held once a lock has been taken; taken while held, it is noted as taken again."""
        event = Acquire(site, address, kind, blocking, held)
        key = site, address
        old = self.acquires.get(key)
        self.acquires[key] = event if old is None else event._replace(held=old.held & held)
        if address in held and not isinstance(address.base, Element):
            self.again[key] = event
        return self.kept(held | {address})

    def released(self, address: Value, held: Held) -> Held:
        """What is held once a lock has been let go: the function's own, or one of its caller's."""
        if isinstance(address.base, Thread):
            self.releases.add(address)
            return frozenset(h for h in held if not _is_of(h, address))
        if address not in held:
            self.release_of_caller(address)
            return held
        self.let_go.add(address)
        return held - {address}

    def released_in_callee(self, fixed: frozenset[Value], held: Held) -> Held:
        """The same for many addresses in objects at once."""
        mine = held & fixed
        self.let_go |= mine
        self.releases |= fixed - mine
        return held - mine

    def release_of_caller(self, address: Value) -> None:
        """A lock that the caller may hold has been let go."""
        begin = root(address.base)
        if isinstance(begin, Object) or (isinstance(begin, Entry) and begin != self.stack):
            self.releases.add(address)

    def stored(self, address: Value, value: Value, held: Held) -> Held:
        """After a store into the thread's own storage: what was known there is not; a constant is, from here on."""
        self.let_go |= {h for h in held if _is_of(h, address)}
        rest = self.released(address, held)
        return rest | {Value(Flag(*address, value.offset), 0)} if value.base is None else rest

    def kept(self, held: Held) -> Held:
        """Of what is held, that which is followed."""
        if self.watched is None:
            return held
        kept = frozenset(h for h in held if h in self.watched or isinstance(h.base, Flag))
        self.left_out |= held - kept
        return kept


def _is_of(held: Value, cell: Value) -> bool:
    return isinstance(held.base, Flag) and (held.base.base, held.base.offset) == cell
