"""What the rules ask about the locks of a program's C library.

Owns: the questions, and the keeping of the answers for other programs with the same libc.
Takes: `Flow`, the target's libc, what is known of parts of programs (`forkproof.cache.Parts`). Gives: `LibcLocks`,
      which computes what it is asked for, once.
Must never: give another answer because something was kept: `forkproof.content` is the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from forkproof.callgraph import Reach
from forkproof.content import Part, part_of
from forkproof.libc_code import Address, Catalogue, LibcLock, Method, derive
from forkproof.libc_usual import Usual
from forkproof.program import Function
from forkproof.signature_values import LockFunction, Origin

if TYPE_CHECKING:
    from forkproof.allocators import LibcFacts
    from forkproof.cache import Json, Parts
    from forkproof.flow import Flow


class LibcLocks:
    """The locks of one libc."""

    def __init__(self, flow: Flow, libc: LibcFacts, parts: Parts) -> None:
        self.flow, self.libc, self.parts = flow, libc, parts
        self._ways: dict[int, Reach] = {}
        self._reaching: dict[tuple[object, ...], Reach] = {}
        self._calling: dict[frozenset[Function], Reach] = {}

    @cached_property
    def _part(self) -> Part:
        return part_of(self.flow, self.libc.objects, "libc", self.libc.id, self.libc.version)

    @cached_property
    def _catalogue(self) -> Catalogue:
        kept = self.parts.get(self._part.key)
        if kept is not None:
            return _unpacked(kept, self._part)
        found = derive(self.flow, self.libc)
        packed = _packed(found, self._part)
        if packed is not None:
            self.parts.put(self._part.key, packed)
        return found

    @property
    def all(self) -> tuple[LibcLock, ...]:
        """Every lock: those found in the code, then those that signatures describe."""
        return self._catalogue.locks

    @property
    def public(self) -> Mapping[Function, str]:
        """libc's functions that programs call, with their plainest names."""
        return self._catalogue.public

    @cached_property
    def using(self) -> dict[Function, LockFunction]:
        """libc's functions that take the lock of an object that they are given, if no signature names them."""
        named = self.flow.program.called(sorted(self.flow.signatures.locks), self.libc.objects)
        origin = Origin("the code of the libc", "forkproof graph")
        return {
            f: LockFunction(self.public[f], "use", "object", argument, origin)
            for f, argument in self._catalogue.of_objects.items()
            if f not in named
        }

    @cached_property
    def inherited(self) -> tuple[LibcLock, ...]:
        """The locks that nothing quiesces: a child gets them as they are."""
        return tuple(lock for lock in self.all if not lock.quiesced)

    def taken_by(self, function: Function) -> list[LibcLock]:
        """The locks that a call of this function of libc may take."""
        mask = self._catalogue.may_take.get(function, 0)
        return [lock for bit, lock in enumerate(self.all, 1) if mask >> bit & 1] if mask else []

    def takes_inherited(self, function: Function) -> bool:
        """A call of this function of libc may take a lock that nothing quiesces."""
        return bool(self._catalogue.may_take.get(function, 0) & self._inherited_bits)

    @cached_property
    def _inherited_bits(self) -> int:
        return sum(2 << self._numbers[id(lock)] for lock in self.inherited)

    def takes_any(self, function: Function) -> bool:
        """A call of this function of libc may take some lock, quiesced or not."""
        return bool(self._catalogue.may_take.get(function, 0))

    def usual_takers(self, lock: LibcLock, starts: frozenset[Function], *, writing: bool) -> list[Function]:
        """libc's public functions that these lead to and whose call takes the lock as a matter of course."""
        bit, called = 2 << self._numbers[id(lock)], self._called(starts)
        able = sorted(
            f for f, mask in self._catalogue.may_take.items() if mask & bit and f in self.public and called[f] >= 0
        )
        return [f for f in able if self.is_usual(f, lock, writing=writing)]

    def is_usual(self, function: Function, lock: LibcLock, *, writing: bool = False) -> bool:
        """A call of this function of libc takes the lock as a matter of course; `writing`: not only to read."""
        number = self._numbers[id(lock)]
        known = self._judged.setdefault((number, writing), {})
        found = known.get(function)
        return self._usual.judge(function, lock, 2 << number, known, writing=writing) if found is None else found

    def _called(self, starts: frozenset[Function]) -> Reach:
        found = self._calling.get(starts)
        if found is None:
            found = self._calling[starts] = self.flow.graph.distances(starts, blocked=self.flow.dying)
        return found

    def reaching(
        self,
        lock: LibcLock,
        starts: frozenset[Function],
        dead: frozenset[Function],
        without: frozenset[int],
        *,
        until: frozenset[Function],
        writing: bool,
    ) -> Reach:
        """Number of calls from each of `starts` to one of `usual_takers`, up to the nearest of `until`.

        No way leads through `dead` functions or along an edge of `without`, nor through libc by another function: what
        that does on its rare ways is no matter of course.
        """
        key = self._numbers[id(lock)], writing, starts, dead, without, until
        reach = self._reaching.get(key)
        if reach is None:
            takers = self.usual_takers(lock, starts, writing=writing)
            graph, base, core = self.flow.graph, self.flow.program.base, self.libc.core
            blocked = self._called(starts) < 0  # what they do not lead to is on no way from them
            if core is not None:
                blocked[base[core] : base[core + 1]] = True
                blocked[takers] = False
            blocked[[*self.flow.dying, *dead]] = True
            reach = graph.distances(takers, backward=True, blocked=blocked, without=without, until=until)
            self._reaching[key] = reach
        return reach

    def way_to(self, lock: LibcLock, function: Function) -> list[int]:
        """Call edges inside libc from a function to one that takes the lock itself."""
        number = self._numbers[id(lock)]
        reach = self._ways.get(number)
        if reach is None:
            graph, dying = self.flow.graph, self.flow.dying
            reach = self._ways[number] = graph.distances(lock.takers, backward=True, blocked=dying)
        return self.flow.graph.path(function, reach) or []

    @cached_property
    def _judged(self) -> dict[tuple[int, bool], dict[Function, bool]]:
        """By lock, what is known to take it as a matter of course, or not to; other programs' questions included."""
        kept = self.parts.get(f"{self._part.key} usual") or []
        self._kept = sum(len(answers) for _, _, _, answers in kept)
        return {
            (number, writing): dict(zip(self._part.functions(places), answers, strict=True))
            for number, writing, places, answers in kept
        }

    def keep(self) -> None:
        """Keep what was judged for other programs."""
        if "_judged" not in self.__dict__ or sum(map(len, self._judged.values())) == self._kept:
            return
        rows = [
            (number, writing, [self._part.place(f) for f in known], list(known.values()))
            for (number, writing), known in self._judged.items()
        ]
        self.parts.put(f"{self._part.key} usual", rows)

    @cached_property
    def _usual(self) -> Usual:
        return Usual(self.flow, self._catalogue)

    @cached_property
    def _numbers(self) -> Mapping[int, int]:
        return {id(lock): number for number, lock in enumerate(self.all)}


# ---- the catalogue as JSON -------------------------------------------------------------------


def _packed(catalogue: Catalogue, part: Part) -> Json:
    """None where a lock lies outside of the part: then the catalogue is one program's own."""
    addresses = [lock.address for lock in catalogue.locks if lock.address is not None]
    if any(address.object not in part.objects for address in addresses):
        return None

    def places(functions: Iterable[Function]) -> list[tuple[int, int]]:
        return [part.place(function) for function in sorted(functions)]

    def address(found: Address) -> tuple[int, int]:
        return part.objects.index(found.object), found.rva

    return {
        "methods": [(part.place(f), m.kind, m.shared) for f, m in catalogue.methods.items()],
        "locks": [
            [
                *(lock.address and address(lock.address), lock.name, places(lock.takers), places(lock.writers)),
                *(lock.quiesced, lock.rare, lock.seldom, lock.is_described),
            ]
            for lock in catalogue.locks
        ],
        "acquires": [
            (address(a), [(part.place(f), sites) for f, sites in takers.items()])
            for a, takers in catalogue.acquires.items()
        ],
        "may_take": [(part.place(f), f"{mask:x}") for f, mask in catalogue.may_take.items()],
        "public": [(part.place(f), name) for f, name in catalogue.public.items()],
        "of_objects": [(part.place(f), parameter) for f, parameter in catalogue.of_objects.items()],
    }


def _unpacked(kept: Json, part: Part) -> Catalogue:
    def functions(places: Iterable[Any]) -> list[Function]:
        return part.functions(places)

    def address(place: Json) -> Address:
        return Address(part.objects[place[0]], place[1])

    def rows(name: str) -> Iterator[tuple[Function, list[Any]]]:
        return zip(functions(row[0] for row in kept[name]), (row[1:] for row in kept[name]), strict=True)

    locks = tuple(
        LibcLock(place and address(place), name, frozenset(functions(t)), frozenset(functions(w)), *words)
        for place, name, t, w, *words in kept["locks"]
    )
    acquires = {
        address(place): dict(zip(functions(t for t, _ in takers), (tuple(s) for _, s in takers), strict=True))
        for place, takers in kept["acquires"]
    }
    return Catalogue(
        {function: Method(kind, shared) for function, (kind, shared) in rows("methods")},
        locks,
        acquires,
        {function: int(mask, 16) for function, (mask,) in rows("may_take")},
        {function: name for function, (name,) in rows("public")},
        {function: parameter for function, (parameter,) in rows("of_objects")},
    )
