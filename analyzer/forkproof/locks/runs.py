"""What following one function with its locks gives, and what it asks.

Owns: the products of `forkproof.locks.interpret` (acquisitions, calls, ways to return, feasible blocks), and the
      questions about called functions, `Calls`.
Takes: nothing. Gives: frozen values.
Must never: know how a function is followed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

from forkproof.code.decode import Body
from forkproof.code.operations import Atomic
from forkproof.locks.values import ZERO, Content, Value, Word
from forkproof.signature_values import LockFunction

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
    fixed: frozenset[Value] = NOTHING
    """More releases, of addresses in objects: these are the same in anybody's terms, and many."""


class Calls(Protocol):
    """What an interpretation asks about the functions that are called."""

    def targets(self, site: int) -> tuple[int, ...]:
        """Functions that the call or tail call at a site may lead to."""

    def comes_back(self, site: int) -> bool:
        """False when the call is known not to return."""

    def is_lock(self, semaphore: Value) -> bool:
        """Whether a semaphore is, or may be, one that begins with something to take."""

    def keeps(self, site: int) -> frozenset[str]:
        """Registers that the call at a site leaves as they were, against the convention."""

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

    def given(self, target: int) -> Value | None:
        """What each call of the target returns, if it is one of the object's own that only gives a variable."""

    def gives_thread_cell(self, target: int) -> bool:
        """Whether the target is `__tls_get_addr`."""

    def is_descriptor(self, address: int) -> bool:
        """Whether ld.so puts a descriptor of a thread's variable there, whose function gives its offset."""

    def waits(self, target: int) -> bool:
        """Whether the target waits: futex, sched_yield, nanosleep and what calls them."""

    def tells_time(self, target: int) -> bool:
        """Whether the target tells the time, or gets it from what it calls."""

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
    bits: int = 64
    """How many of the low bits are looked at. If only one is, and `equal` is None: that one is the other's."""

    @property
    def tells(self) -> bool:
        """It says what the value is there, or is not."""
        return self.equal is not None or self.bits == 1


def zero_words(required: Iterable[Turn]) -> frozenset[Value]:
    """The words in memory that must be 0."""
    return frozenset(t.value for t in required if t.equal and t.other == ZERO and _is_word(t.value))


def _is_word(value: Value) -> bool:
    return isinstance(value.base, Content | Word)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The feasible control flow of one function, by positions of blocks."""

    entry: int
    successors: Mapping[int, tuple[int, ...]]
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
                after = self.successors.get(block, ())
                if block in self.ends or not after:
                    continue
                if (all if block in self.turns else any)(a in sure for a in after):
                    sure.add(block)
                    changed = True
        return self.entry in sure

    def passes(self, block: int, goals: Collection[int]) -> bool:
        """Every way through a block leads through a goal, before it or after it, if arguments are chosen so."""
        edges = {(b, after) for b, targets in self.successors.items() for after in targets if after in goals}
        is_before = self.entry in goals or self._way(block, frozenset(edges)) is None
        return is_before or block not in self._avoiding(goals)

    def _avoiding(self, goals: Collection[int]) -> set[int]:
        """Blocks from which the function can return without a goal, whatever the arguments are."""
        found = set(self.ends).difference(goals)
        frontier = sorted(found)
        while frontier:
            for block in self._before.get(frontier.pop(), ()):
                if block in found or block in goals:
                    continue
                if block in self.turns or found.issuperset(self.successors[block]):
                    found.add(block)
                    frontier.append(block)
        return found

    @cached_property
    def _before(self) -> Mapping[int, tuple[int, ...]]:
        """The blocks that lead to each block."""
        found: dict[int, list[int]] = {}
        for block, targets in self.successors.items():
            for target in targets:
                found.setdefault(target, []).append(block)
        return {block: tuple(before) for block, before in found.items()}

    def requires(self, goal: int) -> tuple[Turn, ...]:
        """The sides of branches without which a block cannot be reached.

        Compilers test one condition in several places, each on a way of its own: all ways lead through one of them.
        Where the other side ends the program, nothing that goes on is left to choose.
        """
        if goal not in self._required:
            self._required[goal] = self._find_required(goal)
        return self._required[goal]

    @cached_property
    def _required(self) -> dict[int, tuple[Turn, ...]]:
        return {}

    def _find_required(self, goal: int) -> tuple[Turn, ...]:
        way = self._way(goal, frozenset())
        if way is None:
            return ()
        steps = {
            turn[1:] if turn.tells else block: (block, turn)
            for block, after in pairwise(way)
            for turn in self.turns.get(block, ())
            if turn.target == after and self._is_choice(block, after)
        }
        if not steps:
            return ()
        leading = self._leading_to(goal)
        bridges = self._bridges(way, leading)
        found = []
        for block, turn in steps.values():
            edges = {edge for edge in self._showing(block, turn) if edge[0] in leading and edge[1] in leading}
            if edges <= bridges if len(edges) == 1 else not self._is_reached(goal, edges, leading):
                found.append(turn)
        return tuple(found)

    def needs(self, goal: int, edges: Collection[tuple[int, int]]) -> bool:
        """No way leads to a block without one of these edges."""
        return self._way(goal, frozenset(edges)) is None

    def _leading_to(self, goal: int) -> set[int]:
        """Blocks from which a block can be reached, itself included."""
        found, frontier = {goal}, [goal]
        while frontier:
            for block in self._before.get(frontier.pop(), ()):
                if block not in found:
                    found.add(block)
                    frontier.append(block)
        return found

    def _bridges(self, way: list[int], among: set[int]) -> set[tuple[int, int]]:
        """The edges of a way that every way to its end uses, in one walk.

        From each block on the way, in order, go everywhere but along the way: an edge of it is a bridge if no block
        beyond was met by then.
        """
        place = {block: i for i, block in enumerate(way)}
        found, seen, farthest = set(), set(way), 0
        for here, (block, after) in enumerate(pairwise(way)):
            frontier = [block]
            while frontier:
                each = frontier.pop()
                for onward in self.successors.get(each, ()):
                    if each == block and onward == after:
                        continue
                    if onward in place:
                        farthest = max(farthest, place[onward])
                    elif onward in among and onward not in seen:
                        seen.add(onward)
                        frontier.append(onward)
            if farthest <= here:
                found.add((block, after))
        return found

    def _is_reached(self, goal: int, without: Collection[tuple[int, int]], among: set[int]) -> bool:
        """A block is reached from the entry through these blocks, without using these edges."""
        seen, frontier = {self.entry}, [self.entry]
        while frontier:
            here = frontier.pop()
            if here == goal:
                return True
            for after in self.successors.get(here, ()):
                if after in among and after not in seen and (here, after) not in without:
                    seen.add(after)
                    frontier.append(after)
        return False

    def asks_again(self, block: int, required: Iterable[Turn], until: Collection[int] = ()) -> bool:
        """Beyond a block, a word is looked at that had to be 0 on the way to it: double-checked initialisation.

        Under the lock another thread may have come first. A list that is filled up when it is empty is just filled.
        `until`: blocks that let the lock go; a loop looks there whether it is to go on.
        """
        words = zero_words(required)
        return bool(words) and not words.isdisjoint(self.asked_beyond(block, until))

    def asked_beyond(self, block: int, until: Collection[int] = ()) -> frozenset[Value]:
        """The words that are compared with 0 from a block on, as far as some others."""
        if block in until:
            return frozenset()
        seen, frontier = {block}, [block]
        while frontier:
            for after in self.successors.get(frontier.pop(), ()):
                if after not in seen and after not in until:
                    seen.add(after)
                    frontier.append(after)
        return frozenset(t.value for b in seen for t in self.turns.get(b, ()) if t.other == ZERO and _is_word(t.value))

    def _is_choice(self, block: int, after: int) -> bool:
        """The function returns on another side of a branch too, if it does at all."""
        return not self.ends or any(other in self._returning for other in self.successors[block] if other != after)

    @cached_property
    def _returning(self) -> frozenset[int]:
        """Blocks from which the function can return."""
        found, frontier = set(self.ends), list(self.ends)
        while frontier:
            more = set(self._before.get(frontier.pop(), ())) - found
            found |= more
            frontier += more
        return frozenset(found)

    def _showing(self, block: int, turn: Turn) -> set[tuple[int, int]]:
        """The edges on which a side of a branch shows the same as this one."""
        return self._shown[turn[1:]] if turn.tells else {(block, turn.target)}

    @cached_property
    def _shown(self) -> dict[object, set[tuple[int, int]]]:
        """The edges by what they show."""
        found: dict[object, set[tuple[int, int]]] = {}
        for block, turns in self.turns.items():
            for turn in turns:
                found.setdefault(turn[1:], set()).add((block, turn.target))
        return found

    def _way(self, goal: int, without: frozenset[tuple[int, int]]) -> list[int] | None:
        """Blocks of a shortest way from the entry to a block that uses none of these edges."""
        came: dict[int, int] = {self.entry: self.entry}
        frontier = [self.entry]
        for here in frontier:
            if here == goal:
                way = [here]
                while way[-1] != self.entry:
                    way.append(came[way[-1]])
                return way[::-1]
            for after in self.successors.get(here, ()):
                if after not in came and (here, after) not in without:
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
    """What it stores into words of objects: constants, addresses, and names for what is not known."""
    own_stores: Mapping[Value, frozenset[Value]]
    """What it stores into variables of the thread."""
    met: Mapping[Value, tuple[Value, ...]]
    """The values that a name stands for which was given where ways meet, of those that turns look at."""
    touched: frozenset[Value]
    """Addresses of which it matters here whether they are held: to take, release or try them, or to store there."""
    body: Body
    complete: bool

    def meant(self, value: Value) -> frozenset[Value]:
        """The values that a value may be: itself, or those that met where it got its name."""
        found: set[Value] = set()
        pending = [value]
        while pending:
            each = pending.pop()
            if each not in found:
                found.add(each)
                pending += self.met.get(each, ())
        return frozenset(v for v in found if v not in self.met)

    def block_of(self, site: int) -> int:
        """The block that holds an instruction."""
        position = self.body.position(site) or 0
        return self.body.block_start(position)


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
