"""glibc's ld.so as an oracle for `forkproof.closure`, and forkproof's answer in the same shape.

ld.so is asked with LD_TRACE_LOADED_OBJECTS=1 LD_WARN=1 LD_BIND_NOW=1 LD_DEBUG=bindings: it maps the program
and its libraries, prints each binding that it makes, and stops before any code of theirs runs.

Left out of the comparison, on purpose: the vDSO, which is the kernel's; and ld.so's own references, since it
does not relocate itself in trace mode.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from forkproof.closure import Bindings, Closure, DirectorySysroot, LoadRequest, TypeClass, load

Bound = tuple[str, str, str, str | None]
"""(from, to, symbol, version)."""

_LINE: Final = re.compile(r"binding file (\S+) \[0\] to (\S+) \[0\]: \w+ symbol `([^']*)'(?: \[(.*)\])?$")
LISTED: Final = re.compile(r"\t(?:\S+ => )?(/?\S+) \(0x")
_TRACE: Final = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_WARN": "1", "LD_BIND_NOW": "1", "LD_DEBUG": "bindings"}


@dataclass(frozen=True)
class Case:
    """A program and the environment in which ld.so meets it."""

    program: str
    preload: tuple[str, ...] = ()
    library_path: tuple[str, ...] = ()
    root: Path = Path("/")
    emulator: str = ""
    label: str = ""
    """What to call it when the path is a temporary one."""

    def __str__(self) -> str:
        return " ".join([self.label or self.program, *(f"+{name}" for name in self.preload)])

    def request(self) -> LoadRequest:
        return LoadRequest(DirectorySysroot(self.root), self.program, self.library_path, self.preload)


@dataclass(frozen=True)
class Outcome:
    """What a dynamic linker did, or what we say that it does."""

    order: tuple[str, ...]
    bindings: frozenset[Bound]


# ---- the two sides -----------------------------------------------------------------------------


def ours(case: Case) -> Outcome:
    """What forkproof says, reduced to what the oracle prints."""
    closure = load(case.request())
    assert columns_differ(closure) == []
    order = tuple(closure.objects[index].path for index in closure.global_scope)[1:]
    interpreter = {item.path for item in closure.objects if item.why == "interpreter"}
    return Outcome(order, frozenset(bound for bound in bound_by(closure) if bound[0] not in interpreter))


def oracle(case: Case) -> Outcome:
    """What ld.so says."""
    environment = dict(_TRACE)
    if case.preload:
        environment["LD_PRELOAD"] = " ".join(case.preload)
    if case.library_path:
        environment["LD_LIBRARY_PATH"] = ":".join(case.library_path)
    program = case.program if case.root == Path("/") else str(case.root) + case.program
    output, bindings, _ = ask(program, environment, case)
    listed = (match[1] for line in output.splitlines() if (match := LISTED.match(line)))
    order = tuple(path for path in listed if not path.startswith("linux-vdso"))
    named = frozenset((case.program if b[0] == program else b[0], *_renamed(b, program, case)) for b in bindings)
    return Outcome(order, named)


def _renamed(bound: Bound, program: str, case: Case) -> tuple[str, str, str | None]:
    return case.program if bound[1] == program else bound[1], bound[2], bound[3]


def bound_by(closure: Closure) -> set[Bound]:
    """Every binding of a closure."""
    paths = [item.path for item in closure.objects]
    return {
        (paths[r.object], paths[r.binding.object], r.name, r.version)
        for r in Bindings(closure).all()
        if r.binding is not None
    }


def columns_differ(closure: Closure) -> list[str]:
    """Where `resolve_all` says something else than `resolve`, over every symbol and class of references."""
    bindings, found = Bindings(closure), []
    for item in closure.objects:
        symbols = np.arange(len(item.image.dynamic_symbols), dtype=np.int64)
        for type_class in TypeClass.DATA, TypeClass.PLT, TypeClass.COPY:
            owners, places = bindings.resolve_all(item.index, symbols, type_class=type_class)
            for symbol, owner, place in zip(symbols.tolist(), owners.tolist(), places.tolist(), strict=True):
                one = bindings.resolve(item.index, symbol, type_class=type_class)
                if (owner, place) != ((-1, -1) if one is None else (one.object, one.rva)):
                    found.append(f"{item.name}: symbol {symbol}, {type_class!r}: {owner, place}, not {one}")
    return found


def ask(
    command: str | tuple[str, ...], environment: dict[str, str], case: Case | None = None
) -> tuple[str, set[Bound], str]:
    """Start a program with ld.so's debugging on: its output, the bindings, and the whole log."""
    with TemporaryDirectory() as directory:
        environment = {**environment, "LD_DEBUG_OUTPUT": f"{directory}/log"}
        arguments = [command] if isinstance(command, str) else list(command)
        if case is not None and case.emulator:
            settings = (part for name, value in environment.items() for part in ("-E", f"{name}={value}"))
            arguments = [case.emulator, "-L", str(case.root), *settings, *arguments]
            environment = {}
        done = subprocess.run(
            arguments, env={"PATH": "/usr/bin", **environment}, capture_output=True, text=True, check=False, timeout=120
        )
        logs = (path.read_text(errors="backslashreplace") for path in sorted(Path(directory).iterdir()))
        log = "\n".join(logs)
    found = {_as_bound(match) for line in log.splitlines() if (match := _LINE.search(line))}
    return done.stdout, {bound for bound in found if not bound[0].startswith("linux-vdso")}, log


def _as_bound(match: re.Match[str]) -> Bound:
    source, target, symbol, version = match.groups()
    return source, target, symbol, version


def differences(case: Case) -> list[str]:
    """What ld.so and forkproof disagree on; empty when they agree."""
    expected, actual = oracle(case), ours(case)
    assert expected.bindings, f"the oracle printed nothing for {case}"
    result = [] if expected.order == actual.order else [f"order: ld.so {expected.order}, ours {actual.order}"]
    result += [f"ld.so only: {bound}" for bound in sorted(expected.bindings - actual.bindings, key=str)]
    return result + [f"ours only: {bound}" for bound in sorted(actual.bindings - expected.bindings, key=str)]
