"""Which calls a function makes only after a system call has failed, and which functions only report the worst and end.

Owns: one assumption, and what it excludes: no system call returns a negative number, no exec comes back, and
      nobody has a reason to read errno, to ask what an error is called, or to warn.
Takes: `Flow`, and the objects of the C library. Gives: sites of calls; yes or no for a function.
Must never: be evidence that a call does not happen. It ranks: what programs do when open(2) fails is not what
      they do as a matter of course.
Wrong where: a program expects the failure (EAGAIN in a loop, a file that need not exist), and where it does not
      read errno and failure is positive (pthread_create), which is not known to be a failure here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import numpy as np

from forkproof.callgraph import CALLS
from forkproof.code.decode import Body
from forkproof.code.explore import CallEffect, Effects, Exploration, explore
from forkproof.code.operations import Memory, Set
from forkproof.elf.image import Machine
from forkproof.flow import GUARDS, Flow
from forkproof.program import Function

_SUCCEEDS = CallEffect(succeeds=True)
_ENDS = CallEffect(returns=False)
_GIVES_ZERO = CallEffect(result=0)
_ERRNO = "__errno_location"
"""The address of errno, in glibc and musl (Linux Standard Base, baselib---errno-location)."""
_SOON = 3
"""Instructions after a call of it in which errno is read, if it is."""
_NEAR = 2
"""Calls between a function and the exec that it is there for, at most."""
_SEVERAL = 3
"""Calls, at least, of a function that reports the worst; what is called once may be what its caller is there for."""
_STANDS_STILL = {
    Machine.X86_64: re.compile(rb"(?:\xe8....|\xff\x15....)\xeb\xfe", re.DOTALL),
    Machine.AARCH64: re.compile(rb"....\x00\x00\x00\x14", re.DOTALL),
}
"""A call, and a jump to itself: what `for (;;);` behind a call becomes, as in g_error of glib's gmessages.h."""
_CALL_AND_JUMP = 8
"""Bytes of them, at most."""
_LARGEST = 20_000
"""Instructions of a function that is looked at; in larger ones, every call counts as ordinary."""


class Failures:
    """The answers for one program; a function is followed when it is first asked about."""

    def __init__(self, flow: Flow, libc_objects: Iterable[int]) -> None:
        self.flow = flow
        self._libc = frozenset(libc_objects)
        self._sites: dict[Function, frozenset[int]] = {}
        self._entering: dict[Function, bool] = {}
        self._execing: dict[Function, bool] = {}
        self._exits = frozenset(flow.program.called(flow.signatures.exit_names.exact - {"abort"}))
        self.texts = frozenset(flow.program.called(flow.signatures.error_texts.exact))
        """Functions that say what an error is: called when something has failed."""
        named = flow.signatures.reports
        self._reports = {f: named[name] for f, name in flow.program.called(sorted(named)).items()}
        self._bad_ends = dict.fromkeys(flow.program.called(flow.signatures.aborts.exact), True)

    def among(self, edges: Iterable[int]) -> list[int]:
        """Those of some call edges that are taken only after a failure."""
        graph = self.flow.graph
        return [
            e for e in edges if int(graph.site[e]) in self.sites(Function(int(graph.source[e]))) or self._reports_one(e)
        ]

    def _reports_one(self, edge: int) -> bool:
        """The call writes a message that says so by a constant."""
        report = self._reports.get(Function(int(self.flow.graph.target[edge])))
        if report is None:
            return False
        source = self.flow.whole(Function(int(self.flow.graph.source[edge])))
        passed = self.flow.constant_calls.passed(source, int(self.flow.graph.site[edge]))
        return bool(passed.get(self.flow.convention.arguments[report.argument], 0) & report.bits)

    def last(self, edges: Iterable[int]) -> set[int]:
        """Those of some call edges behind which a function stands still, and all of that kind to the same functions."""
        graph, found = self.flow.graph, set[int]()
        for edge in edges:
            if edge not in found and self._is_last(edge):
                alike = graph.edges_to(Function(int(graph.target[edge])))
                if len(alike) >= _SEVERAL:
                    found.update(e for e in alike if self._is_last(e))
        return found

    def _is_last(self, edge: int) -> bool:
        graph, program = self.flow.graph, self.flow.program
        obj = program.object_of(Function(int(graph.source[edge])))
        code = program.image(obj).read(int(graph.site[edge]), _CALL_AND_JUMP).tobytes()
        return int(graph.kind[edge]) in CALLS and _STANDS_STILL[self.flow.machine].match(code) is not None

    def sites(self, function: Function) -> frozenset[int]:
        """The calls of a function, or of the one that it is a cold part of, that it makes only after a failure."""
        whole = self.flow.whole(function)
        found = self._sites.get(whole)
        if found is None:
            found = self._sites[whole] = self._find(whole)
        return found

    def does_without(self, function: Function, sites: Collection[int]) -> bool:
        """A function comes back without any of these calls when no system call has failed."""
        body, ordinary = self.flow.body(function), self.flow.effects(function)
        assumed = self._assumed(function, body) if len(body.instructions) <= _LARGEST else {}
        effects = _with({**assumed, **dict.fromkeys(sites, _ENDS)}, ordinary)
        return explore(body, self.flow.machine, self.flow.program.rva_of(function), effects=effects).returns

    def is_fatal(self, function: Function) -> bool:
        """It never comes back, and all that it ends in is abort or an exit that tells of a failure."""
        return not self.flow.returns(function) and self._ends_badly(function)

    def _ends_badly(self, function: Function) -> bool:
        """All calls of it that do not come back are such, if there are any, and it does not exec.

        Whether it comes to them is not asked.
        """
        known = self._bad_ends.get(function)
        if known is None:
            self._bad_ends[function] = False  # what calls itself on the way
            edges = [e for e in self.flow.outgoing(function) if int(self.flow.graph.kind[e]) in CALLS]
            known = self._bad_ends[function] = self._all_bad(function, edges)
        return known

    def _all_bad(self, function: Function, edges: list[int]) -> bool:
        flow, found = self.flow, False
        for edge in edges:
            target, site = Function(int(flow.graph.target[edge])), int(flow.graph.site[edge])
            if target in flow.execs:
                return False
            if flow.program.name_of(target) in GUARDS:
                continue
            if target in self._exits:
                if not flow.constant_calls.passed(function, site).get(flow.convention.arguments[0]):
                    return False
                found = True
            elif flow.ends_on(edge):
                if not self._ends_badly(target):
                    return False
                found = True
        return found

    def _find(self, function: Function) -> frozenset[int]:
        flow = self.flow
        body, start = flow.body(function), flow.program.rva_of(function)
        if len(body.instructions) > _LARGEST:
            return frozenset()
        assumed = self._assumed(function, body)
        if not assumed:
            return frozenset()
        ordinary = flow.effects(function)
        anyhow = flow.explored(function)
        lucky = explore(body, flow.machine, start, effects=_with(assumed, ordinary))
        if _goes_on(anyhow) and not _goes_on(lucky):  # errno is saved on every way: that tells nothing
            assumed = {site: effect for site, effect in assumed.items() if effect is _SUCCEEDS}
            lucky = explore(body, flow.machine, start, effects=_with(assumed, ordinary))
        return frozenset(t.site for t in anyhow.transfers) - {t.site for t in lucky.transfers}

    def _assumed(self, function: Function, body: Body) -> dict[int, CallEffect]:
        flow, assumed = self.flow, {}
        for edge in flow.outgoing(function):
            site, target = int(flow.graph.site[edge]), Function(int(flow.graph.target[edge]))
            reads = flow.program.name_of(target) == _ERRNO and self._reads_errno(body, site)
            if reads or target in self.texts or self._ends_in_exec(target):
                assumed[site] = _ENDS
            elif self._enters_kernel(target):
                assumed[site] = _SUCCEEDS
        return assumed

    def _ends_in_exec(self, function: Function) -> bool:
        """An exec, or what comes back only if one has failed."""
        if function in self.flow.execs:
            return True
        known = self._execing.get(function)
        if known is None:
            self._execing[function] = False  # what calls itself on the way
            known = self._execing[function] = 0 <= self.flow.to_exec[function] <= _NEAR and self._fails_back(function)
        return known

    def _fails_back(self, function: Function) -> bool:
        """It does not return if all that it calls does well, and gives 0."""
        flow, body = self.flow, self.flow.body(function)
        assumed = self._assumed(function, body) if len(body.instructions) <= _LARGEST else {}
        ordinary = _with(assumed, flow.effects(function))

        def effect(site: int) -> CallEffect:
            usual = ordinary(site)
            return _GIVES_ZERO if usual.returns else usual

        return not explore(body, flow.machine, flow.program.rva_of(function), effects=effect).returns

    def _reads_errno(self, body: Body, site: int) -> bool:
        """The first use of the address that a call returned is a load: errno is not set to 0, or kept for later."""
        position = body.position(site)
        if position is None:
            return False
        result = self.flow.convention.result
        for instruction in body.instructions[position + 1 : position + 1 + _SOON]:
            for operation in instruction.operations:
                if isinstance(operation, Set):
                    places = (operation.source, operation.destination)
                    used = next((p for p in places if isinstance(p, Memory) and p.base == result), None)
                    if used is not None:
                        return used is operation.source
        return False

    def _enters_kernel(self, function: Function) -> bool:
        """A function of the C library whose own code makes a system call."""
        known = self._entering.get(function)
        if known is None:
            program = self.flow.program
            obj = program.object_of(function)
            known = obj in self._libc
            if known:
                code, index = program.codes[obj], function - int(program.base[obj])
                begin = int(code.start[index])
                first, last = np.searchsorted(code.sites.syscalls, [begin, begin + int(code.size[index])])
                known = bool(first < last)
            self._entering[function] = known
        return known


def _goes_on(run: Exploration) -> bool:
    """It returns, or goes round in a loop, as threads do."""
    return run.returns or any(block in run.onward(block) for block in run.successors)


def _with(assumed: dict[int, CallEffect], ordinary: Effects) -> Effects:
    def effect(site: int) -> CallEffect:
        usual = ordinary(site)
        return assumed.get(site, usual) if usual.returns else usual

    return effect
