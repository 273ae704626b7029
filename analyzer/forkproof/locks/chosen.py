"""What a pointer in memory may hold: targets of calls that are chosen at run time.

Owns: the constants and addresses that code stores into a word of its object, and the functions that a call through a
      word may lead to: what the file holds there, and what any function of the object stores there.
Takes: `Summaries`. Gives: values, functions.
Must never: claim that one of the candidates is called: which one is the run's choice.
Wrong where: a pointer is stored by another object, or through an address that the storing function was given (then a
      candidate is missed); where a table is longer than the next address that code forms (then its rest is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np

from forkproof.code.index import SCANNERS
from forkproof.columns import unique
from forkproof.locks.runs import Run
from forkproof.locks.summary import Summaries
from forkproof.locks.values import Content, Element, Object, Value
from forkproof.program import Function

_TABLE: Final = 4096
"""Bytes after which a table of pointers ends at the latest."""
_MANY: Final = 64
"""Addresses that one pointer is followed to."""


class Stores:
    """What functions store into words of their own object."""

    def __init__(
        self,
        summaries: Summaries,
        wanted: Callable[[Function], bool],
        run: Callable[[Function], Run] | None = None,
    ) -> None:
        """Only functions that are wanted count; `run` follows one in another way than most."""
        self.summaries, self._wanted = summaries, wanted
        self._run = run
        self._known: dict[Value, frozenset[Value]] = {}
        self._followed: dict[Function, Mapping[Value, frozenset[Value]]] = {}

    def of(self, word: Value) -> frozenset[Value]:
        """What is stored into a word; a value with a name is one that is not known."""
        if word not in self._known:
            stores = [self._of_function(f) for f in self.naming(word)]
            self._known[word] = frozenset[Value]().union(*(each.get(word, frozenset()) for each in stores))
        return self._known[word]

    def _of_function(self, function: Function) -> Mapping[Value, frozenset[Value]]:
        if self._run is None:
            return self.summaries.stores(function)
        if function not in self._followed:
            self._followed[function] = self._run(function).stores
        return self._followed[function]

    def naming(self, word: Value) -> list[Function]:
        """The wanted functions that refer to a word, or to a slot that leads to it."""
        assert isinstance(word.base, Object)
        summaries, obj = self.summaries, word.base.number
        program = summaries.program
        image, code, base = program.image(obj), program.codes[obj], int(program.base[obj])
        finder = SCANNERS[image.machine].find_references
        places = self.places(word)
        sites = [finder(image.read(rva, size), rva, p) for rva, size in image.code_ranges for p in places]
        owners = unique(code.owners(np.concatenate(sites))).tolist() if sites else []
        wanted = (Function(base + i) for i in owners if i >= 0)
        return sorted({summaries.flow.whole(f) for f in wanted if self._wanted(f)})

    def places(self, word: Value) -> tuple[int, ...]:
        """The word's address, and the GOT slots through which the object reaches it where others may interpose."""
        assert isinstance(word.base, Object)
        image = self.summaries.program.image(word.base.number)
        table = image.dynamic_symbols
        found = [s for s, symbol in image.slot_symbols.items() if int(table.value[symbol]) == word.offset]
        slots, targets = image.pointers
        return (word.offset, *sorted({*found, *slots[targets == word.offset].tolist()}))


class Chosen:
    """The functions that pointers in memory may lead to."""

    def __init__(self, summaries: Summaries) -> None:
        self.summaries, self.program = summaries, summaries.program
        self.stores = Stores(summaries, lambda _: True)
        self._known: dict[Value, tuple[Function, ...]] = {}

    def functions(self, pointer: Value) -> tuple[Function, ...]:
        """The functions that a pointer may be; none where it does not come out of an object's data."""
        if pointer not in self._known:
            self._known[pointer] = ()  # in a circle of pointers
            found = self._addresses(pointer) if isinstance(pointer.base, Content) else ()
            functions = {self.program.function(obj, rva) for obj, rva in found}
            self._known[pointer] = tuple(sorted(f for f in functions if f is not None))
        return self._known[pointer]

    def _addresses(self, value: Value, depth: int = 4) -> list[tuple[int, int]]:
        """(object, address) that a value may be."""
        base = value.base
        if isinstance(base, Object):
            return [(base.number, value.offset)]
        if depth == 0 or not isinstance(base, Content | Element):
            return []
        begins = self._addresses(Value(base.base, base.offset), depth - 1)
        if isinstance(base, Element):
            found: Iterable[tuple[int, int]] = (place for b in begins for place in self._elements(b, base.stride or 8))
        else:
            found = (target for place in begins for target in self._held(place, depth - 1))
        return list(dict.fromkeys((obj, rva + value.offset) for obj, rva in found))[:_MANY]

    def _elements(self, begin: tuple[int, int], stride: int) -> list[tuple[int, int]]:
        """The elements of a table, which ends where the next thing begins that code refers to."""
        obj, rva = begin
        known = unique(self.program.codes[obj].sites.data_target)
        after = int(known.searchsorted(rva, side="right"))
        end = min(int(known[after]) if after < len(known) else rva + _TABLE, rva + _TABLE)
        return [(obj, place) for place in range(rva, end, stride)]

    def _held(self, place: tuple[int, int], depth: int) -> list[tuple[int, int]]:
        """The addresses that a word may hold: the file's own, and those that code stores."""
        obj, rva = place
        image = self.program.image(obj)
        found = []
        symbol = image.slot_symbols.get(rva)
        binding = None if symbol is None else self.program.bindings.resolve(obj, symbol)
        if binding is not None:
            found.append((binding.object, binding.rva))
        elif symbol is None and (target := image.pointer_at(rva)) is not None:
            found.append((obj, target))
        if any(s.writable and s.rva <= rva < s.rva + s.memory_size for s in image.segments):
            stored = self.stores.of(Value(Object(obj), rva))
            for value in sorted(stored, key=repr):
                # On aarch64 code forms the address of a function as a number.
                found += self._addresses(value, depth) if value.base is not None else [(obj, value.offset)]
        return found
