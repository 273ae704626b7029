"""What following one function with its locks gives, and what it asks.

Owns: the products of `forkproof.locks.interpret` (acquisitions, calls, ways to return, feasible blocks), and the
      questions about called functions, `Calls`.
Takes: nothing. Gives: frozen values.
Must never: know how a function is followed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

from forkproof.code.decode import Body
from forkproof.code.operations import Atomic
from forkproof.locks.values import Value
from forkproof.signatures import LockFunction

Held = frozenset[Value]
NOTHING: Final[Held] = frozenset()


class Exit(NamedTuple):
    """One way to return: what is held then, and what the result tells of it (zero, nonzero, or None)."""

    held: Held
    result: str | None


class Effect(NamedTuple):
    """What a call of a function does to the locks of its caller, in the callee's terms."""

    exits: tuple[Exit, ...]
    releases: frozenset[Value]


class Calls(Protocol):
    """What an interpretation asks about the functions that are called."""

    def targets(self, site: int) -> tuple[int, ...]:
        """Functions that the call or tail call at a site may lead to."""

    def comes_back(self, site: int) -> bool:
        """False when the call is known not to return."""

    def library(self, target: int) -> LockFunction | None:
        """What the target does, if it is a lock function of a library."""

    def helper(self, target: int) -> Atomic | None:
        """The atomic operation that an outline-atomics helper does on its caller's registers."""

    def effect(self, target: int, arguments: tuple[Value, ...]) -> Effect | None:
        """What the target does to locks, in the caller's terms; None: nothing."""

    def is_relevant(self, target: int) -> bool:
        """Whether calls of the target are to be noted."""

    def parameters(self, target: int) -> frozenset[int]:
        """Which arguments the target's locks depend on."""

    def chosen(self, pointer: Value) -> tuple[int, ...]:
        """Functions that a call through a pointer of memory may lead to; none unless such calls are followed."""

    def gives_thread_cell(self, target: int) -> bool:
        """Whether the target is `__tls_get_addr`."""

    def is_descriptor(self, address: int) -> bool:
        """Whether ld.so puts a descriptor of a thread's variable there, whose function gives its offset."""

    def waits(self, target: int) -> bool:
        """Whether the target waits: futex, sched_yield, nanosleep and what calls them."""

    def enters_wait(self) -> bool:
        """Whether the function's own system calls enter a wait."""

    def slot(self, address: int) -> Value | None:
        """What a loader-filled word holds for good."""

    def is_data(self, address: int) -> bool:
        """Whether a number is an address in the object."""


class Acquire(NamedTuple):
    """One acquisition. `blocking` is False for tries, which never wait."""

    site: int
    address: Value
    kind: str
    blocking: bool
    held: Held


class CallSite(NamedTuple):
    """A call of a function that matters, with what is passed and held."""

    site: int
    target: int
    arguments: tuple[Value, ...]
    held: Held
    is_chosen: bool = False
    """The target is one that a pointer in memory may hold."""


class Turn(NamedTuple):
    """A branch that neither arguments nor an attempt decide: what must hold on one side of it."""

    target: int
    """The block on that side."""
    value: Value
    other: Value
    equal: bool | None
    """The value equals the other there, or not; None for orders and tests of bits."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The feasible control flow of one function, by positions of blocks."""

    entry: int
    successors: Mapping[int, frozenset[int]]
    ends: frozenset[int]
    """Blocks from which the function returns."""
    turns: Mapping[int, tuple[Turn, ...]]

    def surely_reaches(self, goals: Collection[int]) -> bool:
        """Every way from the entry to a return leads through a goal, if arguments are chosen so that one does.

        The least solution of: a goal reaches; a block whose branch an argument decides, or an attempt at a lock, if
        one of its successors does; any other if all do, and it does not return.
        """
        sure = set(goals)
        blocks = set(self.successors) | {t for targets in self.successors.values() for t in targets}
        changed = True
        while changed:
            changed = False
            for block in blocks - sure:
                after = self.successors.get(block, frozenset())
                if block in self.ends or not after:
                    continue
                if (all if block in self.turns else any)(a in sure for a in after):
                    sure.add(block)
                    changed = True
        return self.entry in sure

    def requires(self, goal: int) -> tuple[Turn, ...]:
        """The sides of branches without which a block cannot be reached: they all lie on any way to it."""
        way = self._way(goal, None)
        if way is None:
            return ()
        steps = [
            (block, turn)
            for block, after in pairwise(way)
            for turn in self.turns.get(block, ())
            if turn.target == after
        ]
        return tuple(turn for block, turn in steps if self._way(goal, (block, turn.target)) is None)

    def _way(self, goal: int, without: tuple[int, int] | None) -> list[int] | None:
        """Blocks of a shortest way from the entry to a block that does not use one edge."""
        came: dict[int, int] = {self.entry: self.entry}
        frontier = [self.entry]
        for here in frontier:
            if here == goal:
                way = [here]
                while way[-1] != self.entry:
                    way.append(came[way[-1]])
                return way[::-1]
            for after in self.successors.get(here, ()):
                if after not in came and (here, after) != without:
                    came[after] = here
                    frontier.append(after)
        return None


@dataclass(frozen=True, eq=False)
class Run:
    """What one function does with locks."""

    acquires: tuple[Acquire, ...]
    calls: tuple[CallSite, ...]
    exits: tuple[Exit, ...]
    releases: frozenset[Value]
    """Addresses that it may release without having acquired them."""
    let_go: frozenset[Value]
    """Addresses that it releases after it has acquired them, or held them on entry."""
    again: tuple[Acquire, ...]
    """Blocking acquisitions of what is held already."""
    waiting_calls: frozenset[int]
    """Sites of calls that try, in a function that waits when they fail."""
    blocks: Blocks
    stores: Mapping[Value, frozenset[Value]]
    """Constants and addresses that it stores into words of objects."""
    body: Body
    complete: bool

    def block_of(self, site: int) -> int:
        """The block that holds an instruction."""
        position = self.body.position(site) or 0
        return self.body.leaders[max(bisect_right(self.body.leaders, position) - 1, 0)]


def told_exits(exits: set[Exit], let_go: set[Value], most: int) -> tuple[Exit, ...]:
    """The ways to return as a caller is told them, at most `most`."""
    return _joined(_balanced(exits, let_go), most)


def _balanced(exits: set[Exit], let_go: set[Value]) -> set[Exit]:
    """Exits without the locks that the function lets go on another way to the same result.

    Ways on which it seems to keep them are ways that no input takes: a state that is always one of two, a flag that
    was set where the lock was taken.
    """
    found = set()
    for held, result in exits:
        others = [h for h, r in exits if r == result]
        found.add(Exit(frozenset(x for x in held if x not in let_go or all(x in h for h in others)), result))
    return found


def _joined(exits: set[Exit], most: int) -> tuple[Exit, ...]:
    """The ways to return, as few as tell what is held; too many are one that holds what any of them holds."""
    by_result: dict[str | None, set[Held]] = {}
    for held, result in exits:
        by_result.setdefault(result, set()).add(held)
    if len({held for held, _ in exits}) <= 1:
        return tuple(Exit(held, None) for held in {held for held, _ in exits})
    if len(exits) <= most:
        return tuple(sorted(exits, key=in_order))
    return (Exit(frozenset().union(*(held for held, _ in exits)), None),)


def in_order(exit_: tuple[Held, str | None]) -> tuple[list[str], str]:
    """A key that does not depend on the order of a set."""
    return sorted(map(repr, exit_[0])), exit_[1] or ""
