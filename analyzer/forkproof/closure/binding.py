"""Which definition each symbol reference binds to.

Owns: ld.so's symbol lookup, for both libcs: scope, versions, visibility, type classes.
Takes: a `Closure`. Gives: a `Binding` for a (object, symbol), or for a name.
Must never: search for a file, or take a symbol of an object for bound because it exists there.
Wrong where: LD_DYNAMIC_WEAK, LD_BIND_NOT or LD_AUDIT are set; an IFUNC's resolver chooses the code at
      run time (marked, not followed); musl's DT_SYMBOLIC (it has none, and neither have we there).

Cost: one dictionary for each object, name → first candidate, and one for the scope, name → first object
to ask. A dictionary name → list of definitions was tried: its 30 k lists cost Python's collector more than
all lookups. A lookup is remembered by (name, version, class), since a closure repeats itself.

Source: glibc elf/dl-lookup.c (`check_match`, `do_lookup_x`, `_dl_lookup_symbol_x`), elf/dl-reloc.c,
sysdeps/*/dl-machine.h (`elf_machine_type_class`); musl ldso/dynlink.c (`find_sym2`, `do_relocs`).
"""

from __future__ import annotations

from enum import IntFlag
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from forkproof.closure.model import Libc
from forkproof.columns import among, unique
from forkproof.elf.tables import (
    SHN_ABS,
    STB_GLOBAL,
    STB_LOCAL,
    STB_UNIQUE,
    STB_WEAK,
    STT_COMMON,
    STT_FUNC,
    STT_IFUNC,
    STT_NOTYPE,
    STT_OBJECT,
    STT_TLS,
    STV_DEFAULT,
    STV_HIDDEN,
    STV_INTERNAL,
    STV_PROTECTED,
    RelocationKind,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from forkproof.closure.model import Closure
    from forkproof.elf.image import I64, Image

_DT_HASH: Final = 4
_DT_GNU_HASH: Final = 0x6FFFFEF5
_TYPES: Final = (STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_COMMON, STT_TLS, STT_IFUNC)
_BINDINGS: Final = (STB_GLOBAL, STB_WEAK, STB_UNIQUE)
_LOCAL_VISIBILITY: Final = (STV_HIDDEN, STV_INTERNAL)
_ANY: Final = -1
"""In place of a version's number: unversioned."""
_FIRST_REAL_VERSION: Final = 3
"""An unversioned reference takes version index 0, 1 or 2 at once: 2 is the first that an object defines."""


class TypeClass(IntFlag):
    """What kind of relocation asks; it decides what counts as a definition."""

    DATA = 0
    """An address: an executable's PLT entry for an undefined function is the function's address."""
    PLT = 1
    """A call, or TLS: such an entry must not count, or the PLT would jump to itself."""
    COPY = 2
    """The program's copy of a variable asks for the original: the program itself is passed over."""


class Binding(NamedTuple):
    """Where a reference leads."""

    object: int
    symbol: int
    """Index in that object's dynamic symbols."""
    rva: int
    is_ifunc: bool
    """True when `rva` is a resolver, whose result is the function."""


class Reference(NamedTuple):
    """A symbol that an object refers to, and what it binds to in this closure."""

    object: int
    symbol: int
    name: str
    version: str | None
    type_class: TypeClass
    weak: bool
    binding: Binding | None

    @property
    def is_unresolved(self) -> bool:
        """True when ld.so would report a symbol lookup error."""
        return self.binding is None and not self.weak


class _Definitions(NamedTuple):
    """The first definition of each name in each object of the scope, as parallel columns."""

    rows: Mapping[str, int]
    """Name to its row in the first object of the scope that may define it."""
    object: I64
    value: I64
    version: I64
    """As `Bindings._version_numbers`; _ANY satisfies every reference."""
    is_hidden: npt.NDArray[np.bool_]
    is_usable: npt.NDArray[np.bool_]
    """Whether the definition is an ordinary one, and the object's only one of its name."""


class Bindings:
    """All symbol lookups in one closure."""

    def __init__(self, closure: Closure) -> None:
        self._closure = closure
        self._is_musl = closure.libc is Libc.MUSL
        self._tables = [_Table(item.image) for item in closure.objects]
        self._startup = sum(item.is_startup for item in closure.objects)
        self._versions: dict[str, int] = {}
        self._memo: dict[tuple[str, str | None, TypeClass, int], Binding | None] = {}

    def resolve(self, object_index: int, symbol: int, *, type_class: TypeClass = TypeClass.DATA) -> Binding | None:
        """What a reference of an object binds to; None: a weak one to nothing, a strong one unresolved."""
        table = self._tables[object_index]
        if symbol >= len(table.names):
            return None  # a damaged relocation; ld.so would read past the table
        if self._binds_locally(table, symbol):
            return self._at(object_index, symbol) if table.is_defined(symbol) else None
        name = table.names[symbol]
        version = None if self._is_musl else table.version_of(symbol)
        found = self._first(object_index, name, version, type_class)
        if found is None:
            return None
        found = self._the_one(found, name, type_class)
        if table.visibility[symbol] == STV_PROTECTED and table.is_defined(symbol):
            return self._protected(object_index, symbol, found, version, type_class)
        return found

    def resolve_all(self, object_index: int, symbols: I64, *, type_class: TypeClass) -> tuple[I64, I64]:
        """(object, rva) that each reference of an object binds to, -1 for nothing: `resolve` for columns.

        Nearly all references are plain: the first object of the scope that knows the name defines it once,
        visibly, and in the version that is wanted. Those are answered from columns, the rest one by one.
        """
        owner, rva = np.full(len(symbols), -1, np.int64), np.full(len(symbols), -1, np.int64)
        distinct = unique(symbols)
        found, place = self._plainly(object_index, distinct, type_class)
        for row in np.flatnonzero(found < 0).tolist():
            binding = self.resolve(object_index, int(distinct[row]), type_class=type_class)
            if binding is not None:
                found[row], place[row] = binding.object, binding.rva
        position = distinct.searchsorted(symbols)
        owner[:], rva[:] = found[position], place[position]
        return owner, rva

    def _plainly(self, object_index: int, symbols: I64, type_class: TypeClass) -> tuple[I64, I64]:
        """(object, rva) of the plain references; -1 where only `resolve` can tell."""
        table = self._tables[object_index]
        owner, rva = np.full(len(symbols), -1, np.int64), np.full(len(symbols), -1, np.int64)
        is_own_scope = table.is_symbolic and object_index > 0
        if self._is_musl or is_own_scope or type_class is TypeClass.COPY:
            return owner, rva
        columns, plain = table.image.dynamic_symbols, self._plain
        inside = np.flatnonzero(symbols < len(columns))
        mine = symbols[inside]
        asks = (columns.binding[mine] != STB_LOCAL) & (columns.visibility[mine] == STV_DEFAULT)
        inside, mine = inside[asks], mine[asks]
        names, rows = table.names, plain.rows
        at = np.array([rows.get(names[symbol], -1) for symbol in mine.tolist()], np.int64)
        inside, mine, at = inside[at >= 0], mine[at >= 0], at[at >= 0]
        wanted, has = self._version_numbers(table)[mine], plain.version[at]
        fits = (has == wanted) | (has == _ANY) | ((wanted == _ANY) & ~plain.is_hidden[at])
        fits &= plain.is_usable[at] & (plain.object[at] < self._scope_end(object_index, type_class))
        owner[inside[fits]], rva[inside[fits]] = plain.object[at[fits]], plain.value[at[fits]]
        return owner, rva

    @cached_property
    def _plain(self) -> _Definitions:
        """What each object of the scope defines first under a name."""
        rows: dict[str, int] = {}
        parts: list[tuple[npt.NDArray[Any], ...]] = []
        count = sum(len(first) for _, first in self._scope)
        for index, first in reversed(self._scope):
            table, columns = self._tables[index], self._tables[index].image.dynamic_symbols
            symbols = np.fromiter(first.values(), np.int64, len(first))
            count -= len(symbols)
            rows.update(zip(first, range(count, count + len(symbols)), strict=True))
            usable = columns.defined[symbols] & among(columns.binding[symbols], (STB_GLOBAL, STB_WEAK))
            usable &= ~among(columns.visibility[symbols], _LOCAL_VISIBILITY)
            if table.duplicates:
                usable &= np.array([name not in table.duplicates for name in first], bool)
            hidden = np.zeros(len(symbols), bool)
            if table.version is not None and columns.version_index is not None:
                hidden = columns.version_index[symbols] & 0x8000 != 0
            version = self._version_numbers(table)[symbols]
            usable &= ~hidden | (version != _ANY)
            owner = np.full(len(symbols), index, np.int64)
            parts.append((owner, columns.value[symbols], version, hidden, usable))
        joined = [np.concatenate(column[::-1]) for column in zip(*parts, strict=True)]
        return _Definitions(rows, *joined)

    def _version_numbers(self, table: _Table) -> I64:
        """For each symbol a number that stands for the name of its version in the whole closure; _ANY for none."""
        if table.version is None or table.image.dynamic_symbols.version_index is None:
            return np.full(len(table.names), _ANY, np.int64)
        numbers = np.full(0x8000, _ANY, np.int64)
        for index, name in table.version_names.items():
            numbers[index] = self._versions.setdefault(name, len(self._versions))
        found: I64 = numbers[table.image.dynamic_symbols.version_index & 0x7FFF]
        return found

    def lookup(self, name: str, version: str | None = None, *, scope: int | None = None) -> Binding | None:
        """Whose `name` the closure uses, as a call from the program would find it.

        `scope`: an object index; its own definition then comes first if it is linked with -Bsymbolic.
        """
        found = None
        if scope and self._tables[scope].is_symbolic and not self._is_musl:
            found = self._search_one(scope, name, version, TypeClass.PLT)
        if found is None:
            found = self._search(name, version, TypeClass.PLT, len(self._tables))
        return None if found is None else self._the_one(found, name, TypeClass.PLT)

    def all(self) -> Iterator[Reference]:
        """Every distinct reference that ld.so looks up, by object in load order and symbol index.

        A variable that the program copies gives two: the copy asks the library, the rest asks the copy.
        """
        for index in range(len(self._tables)):
            yield from self.of(index)

    def of(self, object_index: int) -> Iterator[Reference]:
        """The references of one object."""
        table = self._tables[object_index]
        seen: set[tuple[int, Binding | None]] = set()
        for symbol, type_class in table.references:
            if self._binds_locally(table, symbol):
                continue
            binding = self.resolve(object_index, symbol, type_class=type_class)
            if (symbol, binding) in seen:
                continue
            seen.add((symbol, binding))
            weak = table.binding[symbol] == STB_WEAK
            name, version = table.names[symbol], table.version_of(symbol)
            yield Reference(object_index, symbol, name, version, type_class, weak, binding)

    @cached_property
    def unresolved(self) -> tuple[Reference, ...]:
        """Strong references that bind to nothing."""
        return tuple(reference for reference in self.all() if reference.is_unresolved)

    # ---- private ------------------------------------------------------------------------------

    def _first(self, index: int, name: str, version: str | None, type_class: TypeClass) -> Binding | None:
        """The first definition in the scopes of an object; -Bsymbolic puts the object before the rest.

        Never the program's own: ld.so gives that scope only to what it maps itself.
        """
        if self._tables[index].is_symbolic and index and not self._is_musl:
            found = self._search_one(index, name, version, type_class)
            if found is not None:
                return found
        return self._search(name, version, type_class, self._scope_end(index, type_class))

    def _scope_end(self, object_index: int, type_class: TypeClass) -> int:
        """How many objects, in load order, are there when the reference is bound.

        What was dlopened later is seen by the startup objects only through calls not yet made.
        """
        end = len(self._tables)
        if self._startup == end or object_index >= self._startup:
            return end
        binds_now = self._is_musl or self._tables[object_index].image.binds_now
        return end if type_class is TypeClass.PLT and not binds_now else self._startup

    def _search(self, name: str, version: str | None, type_class: TypeClass, end: int) -> Binding | None:
        key = name, version, type_class, end
        if key not in self._memo:
            self._memo[key] = self._search_scope(name, version, type_class, end)
        return self._memo[key]

    def _search_scope(self, name: str, version: str | None, type_class: TypeClass, end: int) -> Binding | None:
        """do_lookup_x: the first object of the scope whose matching symbol is visible and global or weak."""
        skip = 0 if type_class is TypeClass.COPY else None
        start = self._first_place.get(name)
        for index, first in self._scope[start:] if start is not None else ():
            if index >= end:
                break
            if name in first and index != skip:
                found = self._match(index, name, version, type_class)
                if found is not None:
                    return self._at(index, found)
        return None

    def _search_one(self, index: int, name: str, version: str | None, type_class: TypeClass) -> Binding | None:
        if name not in self._tables[index].first:
            return None
        found = self._match(index, name, version, type_class)
        return None if found is None else self._at(index, found)

    @cached_property
    def _scope(self) -> list[tuple[int, Mapping[str, int]]]:
        """The objects of the global scope in order, with the names that each may define."""
        return [(index, self._tables[index].first) for index in self._closure.global_scope]

    @cached_property
    def _first_place(self) -> Mapping[str, int]:
        """Name to the first place in `_scope` whose object may define it."""
        result: dict[str, int] = {}
        for place in range(len(self._scope) - 1, -1, -1):
            result.update(dict.fromkeys(self._scope[place][1], place))
        return result

    def _the_one(self, found: Binding, name: str, type_class: TypeClass) -> Binding:
        """do_lookup_unique: a name bound once to an STB_GNU_UNIQUE symbol stays bound to it for all.

        The name alone counts, not the version: so the object that is relocated first decides even for
        one whose own version of the symbol would be found.
        """
        if self._is_musl or type_class is TypeClass.COPY or not self._is_unique(found):
            return found
        return self._unique.get(name, found)

    @cached_property
    def _unique(self) -> Mapping[str, Binding]:
        """Name to the unique symbol that is bound first: objects are relocated in initialisation order.

        A copy relocation enters the program's copy, not the original.
        """
        result: dict[str, Binding] = {}
        names = set().union(*(table.unique_names for table in self._tables))
        for index in self._closure.init_order:
            table = self._tables[index]
            if names.isdisjoint(table.names):
                continue
            for symbol, type_class in table.references:
                name = table.names[symbol]
                if name not in names or name in result or self._binds_locally(table, symbol):
                    continue
                found = self._first(index, name, table.version_of(symbol), type_class)
                if found is not None and self._is_unique(found):
                    result[name] = self._at(index, symbol) if type_class is TypeClass.COPY else found
        return result

    def _is_unique(self, found: Binding) -> bool:
        return self._tables[found.object].binding[found.symbol] == STB_UNIQUE

    def _match(self, index: int, name: str, version: str | None, type_class: TypeClass) -> int | None:
        table = self._tables[index]
        symbols = table.duplicates.get(name) or (table.first[name],)
        if self._is_musl:
            return table.match_musl(symbols, type_class)
        if type_class is TypeClass.PLT and table.has_plt_addresses:
            symbols = [symbol for symbol in symbols if table.is_defined(symbol)]
        found = table.match_glibc(symbols, version)
        if found is None or table.visibility[found] in _LOCAL_VISIBILITY:
            return None
        return found if table.binding[found] in _BINDINGS else None

    def _binds_locally(self, table: _Table, symbol: int) -> bool:
        """References that are never looked up: to local symbols and, for glibc, to hidden ones."""
        if table.binding[symbol] == STB_LOCAL:
            return True
        return not self._is_musl and table.visibility[symbol] in _LOCAL_VISIBILITY

    def _protected(
        self, index: int, symbol: int, found: Binding, version: str | None, type_class: TypeClass
    ) -> Binding:
        """_dl_lookup_symbol_x: a protected symbol keeps its own definition, unless all that comes before
        it is the program's PLT entry, which must stay the function's one address."""
        if self._is_musl or found.object == index:
            return found
        if type_class is not TypeClass.PLT:
            name, end = self._tables[index].names[symbol], self._scope_end(index, type_class)
            real = self._search(name, version, TypeClass.PLT, end)
            if real is None or real.object == index:
                return found
        return self._at(index, symbol)

    def _at(self, index: int, symbol: int) -> Binding:
        table = self._tables[index]
        return Binding(index, symbol, table.value[symbol], table.type[symbol] == STT_IFUNC)


class _Table:
    """The dynamic symbols of one object as lists, which single accesses read faster than arrays."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.is_symbolic = image.is_symbolic

    def is_defined(self, symbol: int) -> bool:
        return self.section[symbol] != 0

    def version_of(self, symbol: int) -> str | None:
        """The version that a reference names; None: unversioned."""
        return None if self.version is None else self.version_names.get(self.version[symbol] & 0x7FFF)

    def match_glibc(self, symbols: Sequence[int], version: str | None) -> int | None:
        """check_match over one object's symbols of the wanted name.

        A versioned reference takes the symbol of that version, else the one unhidden symbol of the base
        version. An unversioned one takes the first of version index 0 to 2, hidden or not, else the one
        unhidden symbol of a later version; two of those are ambiguous and none is taken. An object
        without versions satisfies both with its first symbol.
        """
        if not symbols:
            return None
        if self.version is None:
            return symbols[0]
        fallbacks: list[int] = []
        for symbol in symbols:
            raw = self.version[symbol]
            number = raw & 0x7FFF
            if version is None:
                if number < _FIRST_REAL_VERSION:
                    return symbol
                is_fallback = True
            else:
                name = self.version_names.get(number)
                if name == version:
                    return symbol
                is_fallback = name is None
            if is_fallback and not raw & 0x8000:
                fallbacks.append(symbol)
        return fallbacks[0] if len(fallbacks) == 1 else None

    def match_musl(self, symbols: Sequence[int], type_class: TypeClass) -> int | None:
        """find_sym2: the first symbol that is not of a hidden version, if it may be a definition."""
        for symbol in symbols:
            if self.raw_version is not None and self.raw_version[symbol] & 0x8000:
                continue
            undefined = not self.is_defined(symbol)
            if undefined and (type_class is TypeClass.PLT or self.type[symbol] == STT_TLS):
                return None
            if self.type[symbol] == STT_IFUNC or self.binding[symbol] not in _BINDINGS:
                return None
            return symbol
        return None

    @cached_property
    def names(self) -> list[str]:
        return self.image.dynamic_symbols.names

    @cached_property
    def value(self) -> list[int]:
        return _as_list(self.image.dynamic_symbols.value)

    @cached_property
    def section(self) -> list[int]:
        return _as_list(self.image.dynamic_symbols.section)

    @cached_property
    def binding(self) -> list[int]:
        return _as_list(self.image.dynamic_symbols.binding)

    @cached_property
    def type(self) -> list[int]:
        return _as_list(self.image.dynamic_symbols.type)

    @cached_property
    def visibility(self) -> list[int]:
        return _as_list(self.image.dynamic_symbols.visibility)

    @cached_property
    def raw_version(self) -> list[int] | None:
        column = self.image.dynamic_symbols.version_index
        return None if column is None else _as_list(column)

    @cached_property
    def version(self) -> list[int] | None:
        """The versym column, if glibc looks at it: only where versions are needed or defined at all."""
        versions = self.image.versions
        return self.raw_version if versions.needs or versions.definitions else None

    @cached_property
    def version_names(self) -> Mapping[int, str]:
        """Version index to name; the base version has none, since it cannot be asked for."""
        versions = self.image.versions
        numbers = {*versions.needs, *versions.definitions}
        named = {number: versions.name(number) for number in numbers}
        return {number: name for number, name in named.items() if name is not None}

    @cached_property
    def first(self) -> Mapping[str, int]:
        """Name to the first candidate of that name."""
        names = self.names
        backwards = self.candidates[::-1]
        return dict(zip([names[symbol] for symbol in backwards], backwards, strict=True))

    @cached_property
    def duplicates(self) -> Mapping[str, list[int]]:
        """The candidates of those names that have several, in the order in which they are met."""
        result: dict[str, list[int]] = {}
        if len(self.first) < len(self.candidates):
            for symbol in self.candidates:
                name = self.names[symbol]
                if name in result or self.first[name] != symbol:
                    result.setdefault(name, [self.first[name]]).append(symbol)
        return result

    @cached_property
    def has_plt_addresses(self) -> bool:
        """True when an undefined symbol carries a value: the address that its PLT entry stands for."""
        table = self.image.dynamic_symbols
        return bool(np.any(~table.defined & (table.value != 0)))

    @cached_property
    def references(self) -> list[tuple[int, TypeClass]]:
        """What the relocations ask for."""
        return list(_references(self.image))

    @cached_property
    def unique_names(self) -> frozenset[str]:
        """Names of the STB_GNU_UNIQUE symbols."""
        chosen = np.flatnonzero(self.image.dynamic_symbols.binding == STB_UNIQUE)
        return frozenset(self.names[symbol] for symbol in _as_list(chosen))

    @cached_property
    def candidates(self) -> list[int]:
        """Symbols that the hash table leads to and that carry a value of a kind that can be bound."""
        table = self.image.dynamic_symbols
        has_value = (table.value != 0) | (table.section == SHN_ABS) | (table.type == STT_TLS)
        usable = has_value & among(table.type, _TYPES)
        order = _hashed(self.image)
        return _as_list(order[usable[order]])


def _as_list(column: npt.NDArray[np.integer[Any]]) -> list[int]:
    result: list[int] = column.tolist()
    return result


def _hashed(image: Image) -> npt.NDArray[np.intp]:
    """Symbol indexes that a lookup can reach, in the order in which equal names are met.

    The GNU table lists a run from its first index to the end; equal names keep their order. The old
    table chains symbols of a bucket from the last added to the first, and may leave some out.
    """
    count = len(image.dynamic_symbols)
    if (start := image.dynamic.get(_DT_GNU_HASH)) is not None:
        header = image.read(start, 8).tobytes()
        return np.arange(int.from_bytes(header[4:8], "little"), count, dtype=np.intp)
    if (start := image.dynamic.get(_DT_HASH)) is None:
        return np.zeros(0, np.intp)
    buckets = int.from_bytes(image.read(start, 4).tobytes(), "little")
    words = np.frombuffer(image.read(start + 8, 4 * (buckets + count)).tobytes(), "<u4")
    chain = words[buckets:].tolist()
    result: list[int] = []
    seen = {0}
    for head in words[:buckets].tolist():
        symbol = head
        while symbol not in seen and symbol < len(chain):
            seen.add(symbol)
            result.append(symbol)
            symbol = chain[symbol]
    return np.array(result, dtype=np.intp)


_BY_NUMBER: Final = (TypeClass.DATA, TypeClass.PLT, TypeClass.COPY)
_CLASSES: Final = {
    RelocationKind.PLT: TypeClass.PLT,
    RelocationKind.TLS: TypeClass.PLT,
    RelocationKind.MODULE: TypeClass.PLT,
    RelocationKind.COPY: TypeClass.COPY,
}


def _references(image: Image) -> Iterator[tuple[int, TypeClass]]:
    """The (symbol, class) pairs of an object's relocations, each once, by symbol."""
    table = image.relocations
    no_symbol = among(table.kind, (RelocationKind.RELATIVE, RelocationKind.IRELATIVE))
    chosen = (table.symbol != 0) & ~no_symbol & (table.symbol < len(image.dynamic_symbols))
    classes = np.zeros(max(RelocationKind) + 1, np.int64)
    for kind, type_class in _CLASSES.items():
        classes[kind] = int(type_class)
    packed = unique(table.symbol[chosen].astype(np.int64) * 4 + classes[table.kind[chosen]])
    for value in packed.tolist():
        yield value >> 2, _BY_NUMBER[value & 3]
