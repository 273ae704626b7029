"""A program and its libraries with their code joined: which function is meant, object by object.

Owns: global function numbers, and the resolution of addresses, slots, stubs and symbols to functions.
Takes: a closure. Gives: a `Program`: closure, bindings, code indexes, names.
Must never: follow code; that is `forkproof.callgraph` and what uses it.
Wrong where: a binding is (see `forkproof.closure`).

A *function number* indexes all functions of all objects: object i's are base[i] .. base[i+1].
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Final, NewType
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from forkproof.closure import Bindings, Closure, Sysroot, TypeClass
from forkproof.code.index import CodeIndex, index_code
from forkproof.columns import position_in, unique
from forkproof.elf.image import I64, Image
from forkproof.elf.names import FunctionNames
from forkproof.errors import InputError

Function = NewType("Function", int)
"""A function number; -1 is never one."""
Columns = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Program:
    """A linked program: a closure with its bindings and the code of each object."""

    closure: Closure
    bindings: Bindings
    codes: tuple[CodeIndex, ...]
    names: tuple[FunctionNames, ...]
    _slots: dict[tuple[int, int], Function | None] = field(default_factory=dict, repr=False)

    @cached_property
    def base(self) -> I64:
        """First function number of each object, then the number of all functions."""
        return np.concatenate([[0], np.cumsum([len(code) for code in self.codes])]).astype(np.int64)

    @cached_property
    def start(self) -> I64:
        """RVA of every function."""
        return np.concatenate([code.start for code in self.codes]) if self.codes else np.zeros(0, np.int64)

    @cached_property
    def is_nameless(self) -> bool:
        """A static program without symbols: where main is, and what it calls of libc, is not known."""
        return self.closure.program.image.is_static and not self.names[0].has_names

    def image(self, obj: int) -> Image:
        """The image of an object."""
        return self.closure.objects[obj].image

    def object_of(self, function: Function) -> int:
        """Index of the object that holds a function."""
        return bisect_right(self._bases, function) - 1

    @cached_property
    def _bases(self) -> list[int]:
        bases: list[int] = self.base.tolist()
        return bases

    def rva_of(self, function: Function) -> int:
        """Start address of a function in its object."""
        return int(self.start[function])

    def size_of(self, function: Function) -> int:
        """Bytes of a function, its cold parts left out; 0 where that is not known."""
        obj = self.object_of(function)
        return int(self.codes[obj].size[function - int(self.base[obj])])

    def function(self, obj: int, rva: int) -> Function | None:
        """The function that begins at an address, if one does."""
        index = self.codes[obj].function_starting(rva)
        return Function(int(self.base[obj]) + index) if index >= 0 else None

    def functions(self, objects: Columns, rvas: Columns) -> Columns:
        """The function numbers that begin at addresses of objects; -1 where none does."""
        # One search in all functions of the closure, by object and then address: addresses stay below 2**48.
        position = position_in(self._ordered, objects << 48 | rvas)
        position[(rvas < 0) | (rvas >= 1 << 48)] = -1
        return position

    @cached_property
    def _ordered(self) -> I64:
        """Object and start of every function as one rising number."""
        counts = np.diff(self.base)
        return np.repeat(np.arange(len(counts), dtype=np.int64) << 48, counts) | self.start

    def name_of(self, function: Function) -> str:
        """The plainest linker name of a function."""
        obj = self.object_of(function)
        return self.names[obj].name(self.rva_of(function))

    def called(self, names: Iterable[str], objects: Iterable[int] | None = None) -> dict[Function, str]:
        """The functions of the closure that bear one of these names, exported or local."""
        wanted = list(names)
        result: dict[Function, str] = {}
        for obj in range(len(self.codes)) if objects is None else objects:
            for name in self.names[obj].known(wanted):
                for rva in self.names[obj].addresses(name):
                    if (function := self.function(obj, rva)) is not None:
                        result.setdefault(function, name)
        return result

    def slot_target(self, obj: int, slot: int) -> Function | None:
        """The function that a loader-filled word leads to, through the closure's bindings."""
        key = obj, slot
        if key not in self._slots:
            self._slots[key] = self._slot_target(obj, slot)
        return self._slots[key]

    def _slot_target(self, obj: int, slot: int) -> Function | None:
        image = self.image(obj)
        if (symbol := image.slot_symbols.get(slot)) is not None:
            return self.symbol_target(obj, symbol)
        if (target := image.pointer_at(slot)) is not None:
            return self.function(obj, target)
        return None

    def stub_target(self, obj: int, rva: int) -> Function | None:
        """The function that a PLT stub leads to: the address of an import, in code that is not PIC."""
        stubs = self.codes[obj].stubs
        index = int(np.searchsorted(stubs.start, rva))
        if index < len(stubs.start) and int(stubs.start[index]) == rva:
            return self.slot_target(obj, int(stubs.slot[index]))
        return None

    def symbol_target(self, obj: int, symbol: int) -> Function | None:
        """The function that a dynamic symbol reference binds to; None for data, or when nothing binds.

        Sought as a call is (TypeClass.PLT): where a fixed-base executable lends its PLT entry as the
        address of a function, the function itself is wanted.
        """
        binding = self.bindings.resolve(obj, symbol, type_class=TypeClass.PLT)
        return None if binding is None else self.function(binding.object, binding.rva)


_INDEXED: Final[WeakKeyDictionary[Image, CodeIndex]] = WeakKeyDictionary()
"""The index of every image that is open: programs of one scan share libraries (`forkproof.shared`)."""


def _index_all(images: list[Image], threads: int) -> tuple[CodeIndex, ...]:
    """Index every image, on one thread or two: the scanners spend their time in numpy, which lets go of the
    interpreter lock. The largest go first, so that no long one is left for the end."""
    waiting = sorted(range(len(images)), key=lambda i: len(images[i].data))
    found: dict[int, CodeIndex] = {}
    failures: list[BaseException] = []

    def work() -> None:
        while waiting and not failures:
            try:
                position = waiting.pop()
            except IndexError:  # the other thread took the last one
                return
            try:
                image = images[position]
                known = _INDEXED.get(image)
                found[position] = known if known is not None else index_code(image)
                _INDEXED[image] = found[position]
                _ = image.sha256  # a report wants it: here the other thread can work meanwhile
                image.release()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                failures.append(error)

    helpers = [Thread(target=work, name="indexer") for _ in range(1, threads)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return tuple(found[i] for i in range(len(images)))


def link(closure: Closure, sysroot: Sysroot, threads: int = 2) -> Program:
    """Index the code of every object and join it with the closure's bindings."""

    def finder(path: str) -> Path | None:
        try:
            return sysroot.host_path(path)
        except (OSError, InputError):
            return None

    codes = _index_all([item.image for item in closure.objects], threads)
    names = tuple(FunctionNames(item.image, item.path, finder) for item in closure.objects)
    return Program(closure, Bindings(closure), codes, names)


def slot_columns(program: Program, obj: int, slots: Columns) -> tuple[Columns, Columns]:
    """(dynamic symbol or -1, function number or -1) for each slot address."""
    image = program.image(obj)
    distinct = unique(slots)
    symbols = image.symbols_at(distinct)
    owner = np.full(len(distinct), obj, np.int64)
    place = image.pointers_at(distinct)
    for slot, resolver in image.irelative_slots.items():
        place[distinct == slot] = resolver
    named = symbols >= 0
    owner[named], place[named] = program.bindings.resolve_all(obj, symbols[named], type_class=TypeClass.PLT)
    inverse = distinct.searchsorted(slots)
    return symbols[inverse], program.functions(owner, place)[inverse]
