"""From findings to what a probe forces: acquire sites, names of locks and functions.

Owns: the choice of sites. Takes: `Facts` and findings. Gives: `Plan`.
Must never: run anything, or judge a site: whether an instruction acquires, and which lock, is seen when it is executed
      (`sites`); so a site too many costs a breakpoint, and one too few a verdict.
Wrong where: a lock is taken by code that neither calls a lock function by name nor stands on a finding's witness paths.

Where a lock is taken:
  an allocator's   in the functions for which there is evidence that they take a lock;
  libc's own       in the functions that `libc_locks` found to take it;
  any other        at the ends of the finding's witness paths, and where the lock's object calls a lock function.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from forkproof.allocators import AllocatorFacts
from forkproof.callgraph import CALLS
from forkproof.code import aarch64
from forkproof.code.decode import listing
from forkproof.code.operations import Atomic
from forkproof.code.values import Value
from forkproof.elf.image import Machine
from forkproof.facts import Facts
from forkproof.flow import Flow
from forkproof.locks.identity import is_resolved, lock_of
from forkproof.model import Finding, Frame, Lock
from forkproof.probe.pointers import Key, Way, offsets_of
from forkproof.probe.sites import AcquireSite
from forkproof.program import Function

_PAIR_BYTES: Final = 48
_MUTEX_LOCK: Final = "pthread_mutex_lock"
_MOST_CALLS: Final = 400
"""Calls of lock functions in one object that become sites."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to force for the findings of one program."""

    sites: Mapping[str, tuple[AcquireSite, ...]]
    """By the object at fault."""
    known: Mapping[tuple[str, int], str]
    """Names that the scan gave to nameless functions: (path, rva) to name."""
    active: tuple[str, ...]
    """Allocators that the program uses and that take locks."""
    locks: tuple[Lock, ...] = ()
    """Locks that can be asked for by name: those of the allocators' allocation paths."""
    claims: Mapping[tuple[str, int], Lock] = field(default_factory=dict)
    """Which lock the scan says is taken at a site, by (path, rva): what a run shows can be held against it."""
    pointers: Mapping[Key, Way] = field(default_factory=dict)
    """Where locks lie that are reached by pointers."""


def make(facts: Facts, root: str = "/", findings: Sequence[Finding] = ()) -> Plan:
    """The acquire sites for these findings and of every allocator, in the paths that a process in `root` will map."""
    inside = _Inside(Path(root).resolve())
    found: dict[str, dict[AcquireSite, None]] = {}
    for name in dict.fromkeys(facts.object_name(a.object) for a in facts.allocators):
        found[name] = dict.fromkeys(map(inside.site, sites_of(facts, name)))
    own = set(found) - {facts.object_name(obj) for obj in facts.libc.objects}
    for finding in findings:
        if finding.lock is not None and finding.object not in own:
            found.setdefault(finding.object, {}).update(dict.fromkeys(map(inside.site, _named_sites(facts, finding))))
    known = {(inside.path(path), rva): name for (path, rva), name in known_names(facts).items()}
    sites = {name: tuple(rows) for name, rows in found.items()}
    claims = {(inside.path(path), rva): lock for (path, rva), lock in _claims(facts, findings)}
    pointers = {key: Way(inside.path(path), offsets) for key, path, offsets in _pointers(facts, findings)}
    return Plan(sites, known, tuple(active_objects(facts)), tuple(_locks(facts)), claims, pointers)


def _pointers(facts: Facts, findings: Sequence[Finding]) -> Iterator[tuple[Key, str, tuple[int, ...]]]:
    """The ways to the locks of findings that lie behind pointers."""
    wanted = {(f.lock.object, f.lock.name) for f in findings if f.lock is not None and f.lock.form == "field"}
    program, everywhere = facts.flow.program, np.ones(facts.flow.graph.size, bool)
    for address in facts.other_locks.places(everywhere) if wanted else ():
        found = offsets_of(address)
        if found is not None:
            lock = lock_of(program, address, found[0])
            if (lock.object, lock.name) in wanted:
                yield (lock.object, lock.name), str(program.closure.objects[found[0]].host_path), found[1]


def _claims(facts: Facts, findings: Sequence[Finding]) -> Iterator[tuple[tuple[str, int], Lock]]:
    """At the ends of a finding's witness paths its lock is taken, if it is one by address."""
    for finding in findings:
        if finding.lock is not None and finding.lock.rva is not None and finding.lock.form in ("global", "array"):
            for path in filter(None, (finding.holder, finding.requester)):
                for site in _ends(facts, path[-1]):
                    yield (site.object, site.rva), finding.lock


def _locks(facts: Facts) -> Iterator[Lock]:
    """The locks of the allocation paths that lie at addresses of their own."""
    for allocator in facts.allocators:
        judged = facts.locks_of(allocator) if allocator.is_used else None
        for lock in judged.coverage.locks if judged is not None else ():
            if is_resolved(lock.taken.address):
                yield lock_of(facts.flow.program, lock.taken.address, allocator.object)


# Locks that are not an allocator's.


def _named_sites(facts: Facts, finding: Finding) -> Iterator[AcquireSite]:
    """Where the finding's lock is taken."""
    assert finding.lock is not None
    objects = [i for i in range(len(facts.flow.program.codes)) if facts.object_name(i) == finding.lock.object]
    for path in filter(None, (finding.holder, finding.requester)):
        yield from _turns(facts, path[-1], finding.lock)
        yield from _witness_sites(facts, path[-1])
    for obj in objects:
        if obj in facts.libc.objects:
            yield from _libc_sites(facts, obj, finding.lock)
        else:
            yield from islice(_calls_in(facts, obj), _MOST_CALLS)


def _witness_sites(facts: Facts, frame: Frame) -> Iterator[AcquireSite]:
    """The end of a witness path is an acquire site; other atomic operations of that function may be one as well."""
    yield from _ends(facts, frame)
    for function in _functions_of(facts, frame):
        yield from _atomics(facts.flow, function, _permits(facts, function))


def _permits(facts: Facts, function: Function) -> frozenset[int]:
    """Where a function takes the permit of a semaphore."""
    summaries = facts.other_locks.summaries
    taken = summaries.run(function).acquires if summaries.relevant[function] else ()
    return frozenset(acquire.site for acquire in taken if acquire.kind == "permit")


def _turns(facts: Facts, frame: Frame, lock: Lock) -> Iterator[AcquireSite]:
    """The end again, as the place where a ticket may be drawn: the lock is the word that says whose turn it is. Other
    additions in the function are no acquires."""
    if lock.form == "global" and frame.object == lock.object:
        for site in _ends(facts, frame):
            yield replace(site, turn=lock.rva)


def _ends(facts: Facts, frame: Frame) -> Iterator[AcquireSite]:
    """Where a frame stands; where that is a call of a function of libc's that takes the lock of an object which it is
    given (readdir), in that function: what is passed is no lock."""
    flow, using = facts.flow, facts.libc_locks.using
    for function in _functions_of(facts, frame):
        site = flow.program.rva_of(function) + frame.offset
        called = {Function(int(flow.graph.target[e])) for e in flow.edges_at(function, site)} & using.keys()
        for target in sorted(called):
            yield from _taken_in(flow, target)
        if not called:
            is_permit = site in _permits(facts, function)
            yield AcquireSite(_path(flow, function), site, callee=_callee(flow, function, site), is_permit=is_permit)


def _taken_in(flow: Flow, function: Function) -> Iterator[AcquireSite]:
    """In a function itself: inlined locks, and calls of lock functions that have names."""
    yield from _atomics(flow, function)
    for edge in flow.outgoing(function):
        name = flow.program.name_of(Function(int(flow.graph.target[edge])))
        if flow.graph.kind[edge] in CALLS and _acquires(flow, name):
            yield AcquireSite(_path(flow, function), int(flow.graph.site[edge]), callee=name)


def _functions_of(facts: Facts, frame: Frame) -> Iterator[Function]:
    for obj in range(len(facts.flow.program.codes)):
        if facts.object_name(obj) == frame.object:
            yield from _functions_called(facts.flow, obj, frame.function)


def _functions_called(flow: Flow, obj: int, name: str) -> list[Function]:
    """The functions that a report calls so."""
    program = flow.program
    if name.startswith("sub_") and (function := program.function(obj, int(name[4:], 16))) is not None:
        return [function]
    found = list(program.called([name], [obj]))
    everything = range(int(program.base[obj]), int(program.base[obj + 1]))
    return found or [Function(f) for f in everything if flow.name(Function(f)) == name]


def _libc_sites(facts: Facts, obj: int, lock: Lock) -> Iterator[AcquireSite]:
    """In the functions of libc that take it: inlined locks, and calls of lock functions that have names."""
    flow, libc = facts.flow, facts.libc_locks
    if lock.rva is not None and obj != libc.libc.core:
        yield from _pointer_calls(facts, obj, lock.rva)
    for known in libc.all:
        if known.address is None or (known.address.object, known.address.rva) != (obj, lock.rva):
            continue
        for function in sorted(known.takers):
            yield from _taken_in(flow, function)


def _pointer_calls(facts: Facts, obj: int, lock: int) -> Iterator[AcquireSite]:
    """Calls through a pointer that are given a lock: glibc's dynamic linker calls `pthread_mutex_lock` so
    (elf/rtld-mutex.c of glibc 2.34). Whether a call takes the lock or lets it go is seen when it is executed."""
    flow, code, base = facts.flow, facts.flow.program.codes[obj], int(facts.flow.program.base[obj])
    path, argument = str(flow.program.closure.objects[obj].host_path), flow.convention.arguments[0]
    sites = np.concatenate([code.sites.slot_site, code.sites.indirect])
    owners = code.owners(sites)
    for owner in np.unique(owners[owners >= 0]).tolist():
        states = flow.states(Function(base + owner), sites[owners == owner].tolist())
        for site, state in sorted(states.items()):
            if state.register(argument) == Value(None, lock):
                yield AcquireSite(path, site, callee=_MUTEX_LOCK)


def _calls_in(facts: Facts, obj: int) -> Iterator[AcquireSite]:
    """Calls of lock functions in an object."""
    flow, graph = facts.flow, facts.flow.graph
    names = sorted(name for name in flow.signatures.locks if _acquires(flow, name))
    for target, name in flow.program.called(names).items():
        for edge in graph.edges_to(target):
            function = Function(int(graph.source[edge]))
            if graph.kind[edge] in CALLS and flow.program.object_of(function) == obj:
                yield AcquireSite(_path(flow, function), int(graph.site[edge]), callee=name)


def _callee(flow: Flow, function: Function, site: int) -> str:
    names = [flow.program.name_of(Function(int(flow.graph.target[e]))) for e in flow.edges_at(function, site)]
    return next((name for name in names if _acquires(flow, name)), "")


def _acquires(flow: Flow, name: str) -> bool:
    known = flow.signatures.locks.get(name)
    return known is not None and known.op == "acquire"


# Where files lie.


@dataclass(frozen=True, slots=True)
class _Inside:
    """Paths of files of a sysroot as a process sees them whose root it is."""

    root: Path

    def path(self, path: str) -> str:
        """Without the sysroot's own directory."""
        found = Path(path)
        return str(Path("/") / found.relative_to(self.root)) if found.is_relative_to(self.root) else path

    def site(self, site: AcquireSite) -> AcquireSite:
        """The same for a site."""
        return replace(site, object=self.path(site.object))


# An allocator's locks.


def sites_of(facts: Facts, name: str) -> Iterator[AcquireSite]:
    """Every acquire site of an allocator that its allocation paths lead to."""
    for allocator in facts.allocators:
        if facts.object_name(allocator.object) == name:
            yield from allocator_sites(facts.flow, allocator)


def active_objects(facts: Facts) -> list[str]:
    """Allocators that the program uses and that take locks."""
    return [facts.object_name(a.object) for a in facts.allocators if a.is_used and a.locks.evidence]


def known_names(facts: Facts) -> dict[tuple[str, int], str]:
    """main, where no symbol says so."""
    flow = facts.flow
    if flow.main is None:
        return {}
    program = flow.program
    item = program.closure.objects[program.object_of(flow.main)]
    return {(str(item.host_path), program.rva_of(flow.main)): flow.name(flow.main)}


def allocator_sites(flow: Flow, allocator: AllocatorFacts) -> Iterator[AcquireSite]:
    """Of the functions for which there is evidence that they take a lock."""
    for function in sorted(allocator.locks.evidence):
        yield from _library_calls(flow, allocator, function)
        yield from _atomics(flow, function)


def _path(flow: Flow, function: Function) -> str:
    return str(flow.program.closure.objects[flow.program.object_of(function)].host_path)


def _library_calls(flow: Flow, allocator: AllocatorFacts, function: Function) -> Iterator[AcquireSite]:
    """Calls of pthread_mutex_lock and its like."""
    graph = flow.graph
    for edge in allocator.locks.waits.get(function, ()):
        name = flow.program.name_of(Function(int(graph.target[edge])))
        if _acquires(flow, name):
            yield AcquireSite(_path(flow, function), int(graph.site[edge]), callee=name)


def _atomics(flow: Flow, function: Function, permits: Collection[int] = ()) -> Iterator[AcquireSite]:
    """Atomic instructions, and calls of AArch64 helpers that stand for them; at some, a permit is taken."""
    program, path = flow.program, _path(flow, function)
    image = program.image(program.object_of(function))
    for instruction in flow.body(function).instructions:
        if any(isinstance(o, Atomic) for o in instruction.operations):
            begin, is_permit = _beginning(flow, function, instruction.address), instruction.address in permits
            yield AcquireSite(path, begin, is_permit=is_permit)
    if image.machine is Machine.AARCH64:
        for edge in flow.outgoing(function):
            target = Function(int(flow.graph.target[edge]))
            if flow.graph.kind[edge] in CALLS and _is_helper(flow, target):
                site = int(flow.graph.site[edge])
                yield AcquireSite(path, site, is_permit=site in permits)


def _is_helper(flow: Flow, function: Function) -> bool:
    image = flow.program.image(flow.program.object_of(function))
    return aarch64.outline_atomic_pointer(image.read(flow.program.rva_of(function), 24)) is not None


def _beginning(flow: Flow, function: Function, address: int) -> int:
    """Where an atomic operation begins: a store-exclusive at its load-exclusive, a locked one at its prefix."""
    image = flow.program.image(flow.program.object_of(function))
    if image.machine is Machine.X86_64:
        return address
    rows = listing(image.read(address - _PAIR_BYTES, _PAIR_BYTES + 4).tobytes(), address - _PAIR_BYTES, image.machine)
    if not rows or not rows[-1][2].startswith("st"):
        return address
    loads = [row[0] for row in rows if row[2].startswith("ld") and "xr" in row[2]]
    return loads[-1] if loads else address
