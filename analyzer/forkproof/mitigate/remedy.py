"""What an allocator's missing fork handlers need: a shim that can be right, or a reason why none can.

Owns: the decision, finding by finding. Takes: `Facts` and findings. Gives: `Remedy`s and `Refusal`s.
Must never: take a function's name for what it does. Functions that lock and unlock everything are known by their code:
      after one the locks of the allocation paths are held, after the other they are not.
Wrong where: the code of such a function does what the scan does not see (it then sees the lock as left open).

    atfork-unbound   the registration is there, what it calls is not: the shim defines that, and passes it on to libc
    atfork-absent    nothing registers: the shim does, if the allocator exports functions that are right as handlers
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from forkproof.allocators import AllocatorFacts
from forkproof.atfork import Registration
from forkproof.elf.tables import STT_FUNC, STV_DEFAULT
from forkproof.facts import Facts
from forkproof.locks.coverage import Cover, coverage, prepared_by
from forkproof.locks.goals import allocator_locks
from forkproof.locks.identity import is_resolved, lock_of
from forkproof.locks.runs import NOTHING, Held
from forkproof.mitigate.parameters import read_arguments
from forkproof.model import Finding
from forkproof.program import Function

RULES: Final = frozenset({"atfork-unbound", "atfork-absent"})
_REGISTRARS: Final = ("__register_atfork", "pthread_atfork")
"""In libc; glibc's has the first name, musl's the second."""
_MOST: Final = 400
"""Exported functions of an allocator that are looked at."""
_OTHERWISE: Final = (
    "Until it is fixed where it is made: fork before the first thread starts, let children exec at once through "
    "posix_spawn, or run the program with another allocator (see forkproof matrix)."
)


@dataclass(frozen=True, slots=True)
class Remedy:
    """What a shim is to do about one finding."""

    finding: Finding
    library: str
    registrar: str
    """libc's function that registers handlers."""
    defines: str = ""
    """The registrar that the allocator calls and nobody defines; the shim does."""
    handlers: tuple[str, str, str] | None = None
    """Functions of the allocator that the shim registers as prepare, parent, child."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no shim would be right, and what to do instead."""

    finding: Finding
    why: str
    instead: str


Decision = Remedy | Refusal


def decide(facts: Facts, findings: Sequence[Finding]) -> tuple[Decision, ...]:
    """For each finding that a shim might help against."""
    return tuple(_decided(facts, finding) for finding in findings if finding.rule in RULES)


def _decided(facts: Facts, finding: Finding) -> Decision:
    used = [a for a in facts.allocators if a.is_used and facts.object_name(a.object) == finding.object]
    registrar = _registrar(facts)
    image = facts.flow.program.closure.program.image
    if not used:
        return Refusal(finding, f"{finding.object} is not an allocator that the program uses", _OTHERWISE)
    if image.is_static:
        return Refusal(finding, "the program is static: the dynamic linker preloads nothing into it", _instead(finding))
    if not facts.is_program:
        return Refusal(finding, f"{facts.target} is a library: name a program that loads it", _instead(finding))
    if registrar is None:
        return Refusal(finding, f"{facts.libc.title} exports no function that registers handlers", _instead(finding))
    make = _unbound if finding.rule == "atfork-unbound" else _absent
    return make(facts, finding, used[0], registrar)


def _instead(finding: Finding) -> str:
    return finding.fix or _OTHERWISE


def _registrar(facts: Facts) -> str | None:
    """The function of libc by which a shim can register; a hidden version of it cannot be linked against."""
    if facts.libc.core is None:
        return None
    table = facts.flow.program.image(facts.libc.core).dynamic_symbols
    hidden = table.version_index
    for wanted in _REGISTRARS:
        for row, name in enumerate(table.names):
            if name == wanted and table.defined[row] and not (hidden is not None and int(hidden[row]) & 0x8000):
                return wanted
    return None


# atfork-unbound.


def _unbound(facts: Facts, finding: Finding, allocator: AllocatorFacts, registrar: str) -> Decision:
    registration = allocator.registration
    assert registration is not None
    if registration.swallowed_by == 0:
        why = f"the program defines {registration.symbol} itself, and its definition comes before any preloaded one"
        return Refusal(finding, why, _instead(finding))
    if registration.symbol == registrar:
        why = f"{registration.symbol} is libc's own, and the library cannot see it"
        return Refusal(finding, why, _instead(finding))
    handler = _handler_name(facts, registration)
    why = (
        f"{finding.object} registers {handler} as soon as its reference to {registration.symbol} binds; "
        f"{facts.libc.title} has {registrar}, to which the shim passes the handlers on"
    )
    return Remedy(finding, finding.object, registrar, defines=registration.symbol, why=why)


def _handler_name(facts: Facts, registration: Registration) -> str:
    prepare = registration.handlers[0].function
    return facts.flow.name(prepare) if prepare is not None else "its handlers"


# atfork-absent.


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two exported functions that can be handlers."""

    lock: str
    unlock: str
    left: int
    """Locks that stay open, all of them rarely taken."""


def _absent(facts: Facts, finding: Finding, allocator: AllocatorFacts, registrar: str) -> Decision:
    if allocator.object in facts.libc.objects:
        return Refusal(finding, "it is libc's own allocator, which only its own fork can quiesce", _instead(finding))
    if allocator.registration is not None:
        why = f"{allocator.why}; a second prepare handler would wait for the first"
        return Refusal(finding, why, _instead(finding))
    locks = _lock_names(facts, allocator)
    pair, tried = _best_pair(facts, allocator)
    if pair is not None:
        left = f", but for {pair.left} that are rarely taken" if pair.left else ""
        why = (
            f"after {pair.lock} every lock of the allocation paths is held ({', '.join(locks)}){left}, after "
            f"{pair.unlock} none is, and neither takes an argument"
        )
        return Remedy(
            finding, finding.object, registrar, handlers=(pair.lock, pair.unlock, pair.unlock), why=why
        )  # fmt: skip
    why = f"{finding.object} exports no pair of functions of which one takes the locks of its allocation paths"
    why += f" ({', '.join(locks)})" if locks else ", whose names and number the code does not tell"
    why += " and the other gives them back: what cannot be locked from outside cannot be made safe from outside"
    if tried:
        why += f". Nearest: {tried}"
    return Refusal(finding, why, _instead(finding))


def _lock_names(facts: Facts, allocator: AllocatorFacts) -> list[str]:
    found = coverage(facts.summaries, allocator.entries, [allocator.object], (None, None))
    resolved = [lock.taken.address for lock in found.locks if is_resolved(lock.taken.address)]
    return list(dict.fromkeys(lock_of(facts.flow.program, a, allocator.object).name for a in resolved))


def _best_pair(facts: Facts, allocator: AllocatorFacts) -> tuple[_Pair | None, str]:
    """The pair that leaves least open; names decide only between equals. And what came nearest, in words."""
    summaries, exports = facts.summaries, dict(_exports(facts, allocator))
    lockers = {f: n for f, n in exports.items() if _holds(facts, f)}
    pairs: list[_Pair] = []
    nearest = ""
    for function, name in lockers.items():
        if read_arguments(facts.flow, function):
            continue
        left = _left_open(facts, allocator, function)
        if left is None:
            nearest = nearest or f"{name}, which leaves locks open"
            continue
        held = prepared_by(summaries, function)[0]
        for other, unlock in exports.items():
            if other != function and _frees(facts, other, held) and not read_arguments(facts.flow, other):
                pairs.append(_Pair(name, unlock, left))
        nearest = nearest or f"{name}, after which nothing that is exported gives the locks back"
    pairs.sort(key=lambda p: (p.left, "child" not in p.unlock, len(p.unlock), p.lock, p.unlock))
    return (pairs[0] if pairs else None), nearest


def _exports(facts: Facts, allocator: AllocatorFacts) -> Iterator[tuple[Function, str]]:
    """Exported functions that can do something to locks, the allocation functions left out."""
    program = facts.flow.program
    table = program.image(allocator.object).dynamic_symbols
    seen = set(allocator.entries)
    for row, name in enumerate(table.names[: _MOST * 10]):
        if not table.defined[row] or table.type[row] != STT_FUNC or table.visibility[row] != STV_DEFAULT:
            continue
        function = program.function(allocator.object, int(table.value[row]))
        if function is not None and function not in seen:
            seen.add(function)
            yield function, name


def _holds(facts: Facts, function: Function) -> bool:
    """On each way it returns with the same locks held, and they can be named: one that only tries does not."""
    if not facts.summaries.relevant[function]:
        return False
    held, is_complete = prepared_by(facts.summaries, function)
    if not is_complete or not held or not all(is_resolved(value) for value in held):
        return False
    run = facts.summaries.interpreted_run(function, NOTHING, joined=True)
    return all(way.held == held for way in run.exits)


def _left_open(facts: Facts, allocator: AllocatorFacts, prepare: Function) -> int | None:
    """Locks that stay open with this prepare handler; None if one of them matters, or which they are is not known."""
    judged = allocator_locks(
        facts.summaries, allocator.object, allocator.entries, (prepare, None), is_effective=True
    )  # fmt: skip
    covers = [lock.cover for lock in judged.coverage.locks]
    is_known = Cover.UNRESOLVED not in covers and (Cover.COVERED in covers or Cover.ASSUMED in covers)
    return None if judged.goals or not is_known else covers.count(Cover.UNCOVERED)


def _frees(facts: Facts, function: Function, held: Held) -> bool:
    """With these locks held on entry, it returns with none of them held, and takes no other."""
    run = facts.summaries.interpreted_run(function, held, held, joined=True)
    if not run.complete or not run.exits or facts.summaries.of(function).taken:
        return False
    freed = run.releases | run.let_go
    same = facts.summaries.arrays.same
    return all(any(same(p, f) for f in freed) for p in held)
