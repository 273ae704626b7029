"""From a finding to what a probe forces: acquire sites, the fork, names.

Owns: the choice of sites for a finding. Takes: `Facts`. Gives: `Plan`.
Must never: run anything, or judge a site: whether an instruction acquires is seen when it is executed (`sites`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from forkproof.allocators import AllocatorFacts
from forkproof.callgraph import CALLS, Function
from forkproof.code import aarch64
from forkproof.code.decode import listing
from forkproof.code.operations import Atomic
from forkproof.elf.image import Machine
from forkproof.facts import Facts
from forkproof.flow import Flow
from forkproof.probe.sites import AcquireSite

_PAIR_BYTES = 48


@dataclass(frozen=True, slots=True)
class Plan:
    """What to force for the findings of one program."""

    sites: Mapping[str, tuple[AcquireSite, ...]]
    """By the object at fault."""
    known: Mapping[tuple[str, int], str]
    """Names that the scan gave to nameless functions: (path, rva) to name."""
    active: tuple[str, ...]
    """Allocators that the program uses and that take locks."""


def make(facts: Facts, root: str = "/") -> Plan:
    """The acquire sites of every allocator, in the paths that a process started in `root` will map."""
    names = dict.fromkeys(facts.object_name(a.object) for a in facts.allocators)
    inside = _Inside(Path(root).resolve())
    sites = {name: tuple(dict.fromkeys(map(inside.site, sites_of(facts, name)))) for name in names}
    known = {(inside.path(path), rva): name for (path, rva), name in known_names(facts).items()}
    return Plan(sites, known, tuple(active_objects(facts)))


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
    graph, locks = flow.graph, flow.signatures.locks
    for edge in allocator.locks.waits.get(function, ()):
        name = flow.program.name_of(Function(int(graph.target[edge])))
        known = locks.get(name)
        if known is not None and known.op == "acquire":
            yield AcquireSite(_path(flow, function), int(graph.site[edge]), callee=name)


def _atomics(flow: Flow, function: Function) -> Iterator[AcquireSite]:
    """Atomic instructions, and calls of AArch64 helpers that stand for them."""
    program, path = flow.program, _path(flow, function)
    image = program.image(program.object_of(function))
    for instruction in flow.body(function).instructions:
        if any(isinstance(o, Atomic) for o in instruction.operations):
            yield AcquireSite(path, _beginning(flow, function, instruction.address))
    if image.machine is Machine.AARCH64:
        for edge in flow.outgoing(function):
            target = Function(int(flow.graph.target[edge]))
            if flow.graph.kind[edge] in CALLS and _is_helper(flow, target):
                yield AcquireSite(path, int(flow.graph.site[edge]))


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
