"""The allocators of a closure: which one the program really uses, and what it has against being forked.

Owns: finding every object that defines an allocator, telling the active one, and the verdict on its fork
      handlers, which follows from its code and from what its registration binds to.
Takes: `Flow`, registrations, signatures, the target's libc. Gives: `AllocatorFacts`.
Must never: let a name decide what code can answer: signatures give family, version and fixes; only a
      libc's own allocator, which its fork quiesces without any registration, is taken from a signature.
Wrong where: handlers quiesce some of the locks (per-lock coverage is not decided here); where a handler
      takes the allocator's lock in a way that the lock evidence does not see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from forkproof.arguments import string_arguments
from forkproof.atfork import REGISTRARS, Registration
from forkproof.callgraph import CERTAIN, EdgeKind, Reach
from forkproof.elf.image import Image, ObjectKind
from forkproof.flow import Flow
from forkproof.locks import NO_LOCKS, LockFunctions, lock_functions
from forkproof.model import Hooks
from forkproof.program import Function, Program
from forkproof.signature_values import AllocatorSignature, Contains
from forkproof.signatures import Signatures
from forkproof.threads import constructor_functions

_CALLED_LATER: Final = CERTAIN | {EdgeKind.DEFERRED, EdgeKind.THREAD}


@dataclass(frozen=True, slots=True)
class LibcFacts:
    """The C library of a target: whose fork it is, and what that fork does by itself."""

    id: str | None
    version: str | None
    objects: frozenset[int]
    """libc.so itself and its parts (libpthread, librt, ld.so, …)."""
    core: int | None
    """The object that defines fork and malloc."""

    @property
    def title(self) -> str:
        """For example "glibc 2.36"."""
        return f"{self.id or 'unknown'} {self.version or ''}".strip()


@dataclass(frozen=True, eq=False)
class AllocatorFacts:
    """One allocator of the closure."""

    object: int
    signature: AllocatorSignature | None
    version: str | None
    defines: tuple[str, ...]
    entries: tuple[Function, ...]
    is_active: bool
    hooks: Hooks
    why: str
    registration: Registration | None
    registered_from: str
    locks: LockFunctions
    flow: Flow

    @cached_property
    def is_used(self) -> bool:
        """The program allocates with it: its malloc is what references bind to, or the program's own code,
        apart from the allocator's, calls it directly, as it does with a hidden malloc or an own operator new."""
        if self.is_active or self.object != 0:
            return self.is_active
        graph = self.flow.graph
        inside = graph.distances(self.entries)
        return any(inside[graph.source[edge]] < 0 for entry in self.entries for edge in graph.edges_to(entry))

    @cached_property
    def telling_locks(self) -> frozenset[Function]:
        """The lock functions that witness paths should end in.

        Where handlers exist but are never registered, those whose words the prepare handler would have
        taken: they are what the missing registration leaves open. An allocator has other locks too, which
        it takes rarely.
        """
        if not self.locks.evidence:
            return frozenset(self.entries)  # no lock was recognised, so any call of the allocator may meet one
        everything = frozenset(self.locks.evidence)
        prepare = self.registration.handlers[0].function if self.registration is not None else None
        if prepare is None:
            return everything
        below = self.flow.graph.distances([prepare])
        words = _words((f for f in everything if below[f] >= 0), self.locks)
        reach = self.flow.graph.distances(self.entries, blocked=self.flow.dying)
        telling = frozenset(f for f in everything if reach[f] >= 0 and self.locks.words(f) & words)
        return telling or everything

    @property
    def title(self) -> str:
        """For example "tcmalloc 2.10"."""
        if self.signature is None:
            return "an allocator without a signature"
        return f"{self.family} {self.version}" if self.version else self.family

    @property
    def family(self) -> str:
        """What the signatures call it."""
        return self.signature.family if self.signature else "unknown"


def find_libc(program: Program, signatures: Signatures) -> LibcFacts:
    """The libc among the objects: the one that defines fork, named by its signature."""
    for item in program.closure.objects:
        names = defined_names(item.image)
        if len(program.codes) > 1 and "fork" not in names:
            continue
        contains = _searcher(item.image)
        for signature in signatures.libcs:
            if signature.matches(item.image.soname or item.image.path.name, None, names, contains) is not None:
                return LibcFacts(
                    signature.id, signature.version_of(contains), _libc_parts(program, item.index), item.index
                )
    return LibcFacts(None, None, frozenset(), None)


def _libc_parts(program: Program, core: int) -> frozenset[int]:
    """libc and the objects built with it: they share symbols of the version GLIBC_PRIVATE."""
    found = {core}
    for item in program.closure.objects:
        versions = item.image.versions
        shared = {n.version for n in versions.needs.values()} | set(versions.definitions.values())
        if "GLIBC_PRIVATE" in shared:
            found.add(item.index)
    return frozenset(found)


def defined_names(image: Image) -> set[str]:
    """Names of all symbols that an object defines."""
    found: set[str] = set()
    for table in (image.dynamic_symbols, image.static_symbols):
        found |= {n for n, d in zip(table.names, table.defined.tolist(), strict=True) if d}
    return found


def find_allocators(flow: Flow, libc: LibcFacts, registrations: tuple[Registration, ...]) -> tuple[AllocatorFacts, ...]:
    """Every allocator of the closure, the active one first, then in load order."""
    active = _active_object(flow)
    found = [
        facts
        for obj in range(len(flow.program.codes))
        if (facts := _allocator(flow, obj, obj == active, libc, registrations)) is not None
    ]
    return tuple(sorted(found, key=lambda f: (not f.is_active, f.object)))


def _searcher(image: Image) -> Contains:
    def contains(pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        return pattern.search(image.data)

    return contains


def _active_object(flow: Flow) -> int | None:
    """The object whose malloc the program's references bind to."""
    program = flow.program
    binding = program.bindings.lookup("malloc")
    if binding is not None:
        return binding.object
    if len(program.codes) == 1 and program.names[0].addresses("malloc"):
        return 0
    return None


def _allocator(
    flow: Flow, obj: int, is_active: bool, libc: LibcFacts, registrations: tuple[Registration, ...]
) -> AllocatorFacts | None:
    program = flow.program
    item = program.closure.objects[obj]
    if obj in libc.objects and obj != libc.core:
        return None  # the dynamic linker's small malloc serves only itself
    names = program.names[obj]
    family = flow.signatures.malloc_family
    defined = tuple(sorted(n for n in family if names.addresses(n)))
    signature = _signature(flow, obj, set(defined))
    own_new = obj == 0 and "_Znwm" in defined
    if not is_active and "malloc" not in defined and signature is None and not own_new:
        return None
    own = () if signature is None else tuple(n for n in sorted(signature.entry_points.exact) if names.addresses(n))
    entries = tuple(f for f in program.called((*defined, *own), [obj]))
    version = signature.version_of(_searcher(item.image)) if signature else None
    return _judged(flow, obj, signature, version, (defined, entries, is_active), libc, registrations)


def _signature(flow: Flow, obj: int, defined: set[str]) -> AllocatorSignature | None:
    item = flow.program.closure.objects[obj]
    image = item.image
    exported = defined_names(image)
    sections = {s.name for s in image.sections}
    has_strings = bool(defined) or image.is_static
    search = _searcher(image) if has_strings else (lambda _: None)
    for signature in flow.signatures.allocators:
        if signature.matches(image.soname, exported, search, sections) is not None:
            return signature
    return None


Surface = tuple[tuple[str, ...], tuple[Function, ...], bool]


def _judged(
    flow: Flow,
    obj: int,
    signature: AllocatorSignature | None,
    version: str | None,
    surface: Surface,
    libc: LibcFacts,
    registrations: tuple[Registration, ...],
) -> AllocatorFacts:
    defined, entries, is_active = surface
    registration, source = None, ""
    locks = NO_LOCKS
    # In a static program libc's object is the program's: there only code that is recognised is libc's malloc.
    is_recognised = signature is not None and signature.builtin is not None
    builtin = obj == libc.core and (is_recognised or len(flow.program.codes) > 1)
    if builtin:
        hooks, why = _builtin(signature, libc)
        locks = replace(NO_LOCKS, evidence=dict.fromkeys(entries, "an allocation function of libc"))
    else:
        locks, (hooks, why, registration, source) = _with_forwarding(flow, obj, entries, libc, registrations)
    return AllocatorFacts(
        obj, signature, version, defined, entries, is_active, hooks, why, registration, source, locks, flow
    )


def _builtin(signature: AllocatorSignature | None, libc: LibcFacts) -> tuple[Hooks, str]:
    answer = signature.quiesced_by_fork_of(libc.id, libc.version) if signature else None
    if answer:
        return Hooks.BUILTIN, f"the fork of {libc.title} takes the locks of its own malloc"
    if answer is False:
        return Hooks.ABSENT, f"the fork of {libc.title} does not take the locks of its own malloc"
    return Hooks.UNKNOWN, "the libc or its version is not known, so neither is what its fork quiesces"


Judgement = tuple[Hooks, str, Registration | None, str]


def _with_forwarding(
    flow: Flow, obj: int, entries: tuple[Function, ...], libc: LibcFacts, registrations: tuple[Registration, ...]
) -> tuple[LockFunctions, Judgement]:
    """The verdict on the object that does the work: a proxy takes no lock itself, and forwards to one that does."""
    reach = flow.graph.distances(entries, blocked=flow.dying)
    base = flow.program.base
    others = [
        other
        for other in range(len(flow.program.codes))
        if other != obj and other not in libc.objects and np.any(reach[base[other] : base[other + 1]] >= 0)
    ]
    first: tuple[LockFunctions, Judgement] | None = None
    for part in (obj, *others):
        mine = _registrations_of(flow, part, registrations)
        handlers = [h.function for r in mine for h in r.handlers if h.function is not None]
        locks = lock_functions(flow, part, [*entries, *handlers])
        judgement = _from_code(flow, part, entries, locks, registrations)
        first = first or (locks, judgement)
        if part == obj and any(reach[f] >= 0 for f in locks.evidence):
            return first
        if part != obj and any(reach[f] >= 0 for f in locks.evidence):
            hooks, why, registration, source = judgement
            name = flow.program.closure.objects[part].name
            return locks, (hooks, f"its allocation paths lead into {name}, of which: {why}", registration, source)
    assert first is not None
    return first


def _from_code(
    flow: Flow,
    obj: int,
    entries: tuple[Function, ...],
    locks: LockFunctions,
    registrations: tuple[Registration, ...],
) -> Judgement:
    """The verdict that the allocator's own code gives.

    1. Without a lock on an allocation path there is nothing to inherit.
    2. A registration counts when its prepare handler, in this object, takes a lock that the allocation
       paths take too; a program's unrelated handlers do not.
    3. It must be reached (constructor or first allocation), and its reference must bind.
    """
    reach = flow.graph.distances(entries)
    used = {f for f in locks.evidence if reach[f] >= 0}
    if not entries:
        return Hooks.UNKNOWN, "its allocation functions were not found in the code", None, ""
    if not used:
        return _without_locks(flow, reach, obj, locks)
    mine = _registrations_of(flow, obj, registrations)
    quiescing = [r for r in mine if _shares_lock(flow, obj, r, used, locks)]
    halves = [r for r in quiescing if r.handlers[2].function is None and r.handlers[2].is_known]
    if halves and len(halves) == len(quiescing):
        why = "its prepare handler takes a lock, and no child handler is registered that could release it in the child"
        return Hooks.ABSENT, why, halves[0], ""
    for registration in sorted(quiescing, key=lambda r: not r.is_effective):
        return _from_registration(flow, obj, entries, registration)
    unresolved = [r for r in mine if r.is_effective and not r.handlers[0].is_known]
    if unresolved:
        return (
            Hooks.UNKNOWN,
            "it registers fork handlers, but which functions they are was not resolved",
            unresolved[0],
            "",
        )
    if looks_up_registrar(flow, obj):
        why = "it looks up pthread_atfork or __register_atfork by name at run time; what it registers is not known"
        return Hooks.UNKNOWN, why, None, ""
    count = (
        "1 function on its allocation paths takes"
        if len(used) == 1
        else f"{len(used)} functions on its allocation paths take"
    )
    other = "; the fork handlers that this object registers take none of these locks" if mine else ""
    return Hooks.ABSENT, f"{count} a lock that waits, and it registers no fork handler for them{other}", None, ""


def looks_up_registrar(flow: Flow, obj: int) -> bool:
    """A constant name of a registrar is passed to dlsym or dlvsym."""
    program, graph = flow.program, flow.graph
    for lookup in program.called(["dlsym", "dlvsym"]):
        sites = [
            int(graph.site[e])
            for e in graph.edges_to(lookup)
            if program.object_of(Function(int(graph.source[e]))) == obj
        ]
        if set(string_arguments(program, obj, np.array(sites, np.int64), 1).values()) & set(REGISTRARS):
            return True
    return False


def _without_locks(flow: Flow, reach: Reach, obj: int, locks: LockFunctions) -> Judgement:
    base = flow.program.base
    unknown = flow.program.codes[obj].unknown_calls
    blind = int(unknown[reach[base[obj] : base[obj + 1]] >= 0].sum())
    if blind:
        calls = "1 call whose target is" if blind == 1 else f"{blind} calls whose targets are"
        why = f"no lock was found on its allocation paths, but they hold {calls} unknown"
        return Hooks.UNKNOWN, why, None, ""
    doubtful = [f for f in locks.doubtful if reach[f] >= 0]
    if doubtful:
        suspect = doubtful[0]
        why = f"no lock was recognised on its allocation paths, but {flow.name(suspect)} {locks.doubtful[suspect]}"
        return Hooks.UNKNOWN, why, None, ""
    atomics = sum(reach[f] >= 0 for f in locks.atomic_only)
    detail = f" ({atomics} use atomic operations that never wait)" if atomics else ""
    return Hooks.NOT_NEEDED, f"no function on its allocation paths takes a lock that waits{detail}", None, ""


def _registrations_of(flow: Flow, obj: int, registrations: tuple[Registration, ...]) -> list[Registration]:
    """Registrations that an object makes, or that others make for it: of a prepare handler that it exports."""
    return [r for r in registrations if r.object == obj or _prepares(flow, r) == obj]


def _prepares(flow: Flow, registration: Registration) -> int | None:
    """The object that holds the prepare handler."""
    prepare = registration.handlers[0].function
    return flow.program.object_of(prepare) if prepare is not None else None


def _shares_lock(flow: Flow, obj: int, registration: Registration, used: set[Function], locks: LockFunctions) -> bool:
    """The prepare handler takes a lock that the allocation paths take: the same function, or the same word."""
    prepare = registration.handlers[0].function
    if prepare is None or flow.program.object_of(prepare) != obj:
        return False
    reach = flow.graph.distances([prepare])
    taken = {f for f in locks.evidence if reach[f] >= 0}
    if taken & used:
        return True
    if not taken:
        return False
    return bool(_words(taken, locks) & _words(used, locks))


def _words(functions: Iterable[Function], locks: LockFunctions) -> frozenset[int]:
    """Addresses of the global locks that these functions take."""
    return frozenset().union(*(locks.words(f) for f in functions))


def _from_registration(flow: Flow, obj: int, entries: tuple[Function, ...], registration: Registration) -> Judgement:
    program = flow.program
    prepare = registration.handlers[0].function
    assert prepare is not None
    handler = flow.name(prepare)
    source = _registered_from(flow, registration.object, entries, registration.outermost)
    if registration.lacking:
        why = (
            f"it would register {handler} with {registration.symbol}; whether that binds is not known, since "
            f"{registration.lacking}, which could define it, is missing"
        )
        return Hooks.UNKNOWN, why, registration, ""
    if not registration.is_effective:
        why = f"it would register {handler} with {registration.symbol}, but {_obstacle(flow, registration)}"
        return Hooks.UNBOUND, why, registration, "never"
    provider = program.closure.objects[registration.binds_to or 0].name
    if source == "not found":
        why = f"it holds a registration of {handler}, but no call was found that leads to it"
        return Hooks.UNKNOWN, why, registration, source
    who = "it" if registration.object == obj else program.closure.objects[registration.object].name
    why = f"{who} registers {handler} from {source}, and {registration.symbol} binds to {provider}"
    return Hooks.EFFECTIVE, why, registration, source


def _obstacle(flow: Flow, registration: Registration) -> str:
    """Why a registration never reaches libc."""
    symbol = registration.symbol
    if registration.swallowed_by is not None:
        culprit = flow.program.closure.objects[registration.swallowed_by].name
        return f"{symbol} binds to {culprit}, whose definition registers nothing"
    words = [
        word for word, holds in (("weak", registration.is_weak), ("unversioned", not registration.version)) if holds
    ]
    return (
        f"its {' '.join([*words, 'reference'])} to {symbol} binds to nothing in this closure, so the call never happens"
    )


def _registered_from(flow: Flow, obj: int, entries: tuple[Function, ...], outermost: Function) -> str:
    """When the registration happens: the earliest of constructor, first allocation, or another call."""
    graph, program = flow.graph, flow.program
    to_call = graph.distances([outermost], _CALLED_LATER, backward=True)
    if any(to_call[f] >= 0 for f in constructor_functions(flow) if program.object_of(f) == obj):
        return "a constructor"
    if any(to_call[f] >= 0 for f in entries):
        return "the first allocation"
    if flow.main is not None and to_call[flow.main] >= 0:
        return "main"
    return "not found"


def is_program(image: Image) -> bool:
    """True for what can be started, False for a library analysed on its own."""
    return image.kind is not ObjectKind.SHARED or image.interpreter is not None
