"""What the world's libraries are called and how their functions behave: the questions that the analysis asks.

Owns:   the questions over all of ``signatures/**/*.yml``; ``signature_values`` has the types of the answers,
        ``signature_files`` reads the files.
Takes:  a directory of signatures. Gives: allocators, libcs, forkers, thread starters, callbacks,
        lock functions, name sets.
Never:  opens an ELF file, imports lief or numpy, or decides a verdict. "libtcmalloc.so.4 is gperftools" is a
        fact about names; whether its fork handlers are bound in this closure is for the code to answer.
Wrong:  where a signature is.

Files are read per directory on first use, because a command that lists allocators has no use for callbacks.
A bad file therefore raises at that first use; ``lint`` reads everything and reports every problem.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from forkproof.signature_values import (
    AllocatorSignature,
    Callback,
    FillFunction,
    Fix,
    Forker,
    FutureFunction,
    HandlerLock,
    LibcArea,
    LibcLockNames,
    LibcSignature,
    LockFunction,
    MallocNames,
    MallocRole,
    NameSet,
    Problem,
    ProcessSyscall,
    ReportFunction,
    SignalSafe,
    SignatureError,
    ThreadStarter,
    WaitSyscall,
)

if TYPE_CHECKING:
    from forkproof.signature_files import Entry

UNKNOWN_ALLOCATOR: Final = "unknown"


@dataclass(frozen=True)
class Signatures:
    """All signatures below one directory; each part is read when it is first asked for."""

    directory: Path
    _read: dict[str, list[Entry]] = field(default_factory=dict, repr=False, compare=False)

    def _values(self, kind: str) -> list[Any]:
        # At first use: the readers know these values, and a command that asks for nothing needs no YAML.
        from forkproof import signature_files

        directory = signature_files.KINDS[kind].directory
        if directory not in self._read:
            entries, problems = signature_files.read_directory(self.directory, directory)
            if problems:
                raise SignatureError(min(problems))
            self._read[directory] = entries
        return [entry.value for entry in self._read[directory] if entry.kind == kind]

    def _by_name(self, kind: str) -> Mapping[str, Any]:
        return MappingProxyType({value.name: value for value in self._values(kind)})

    def _name_set(self, kind: str) -> NameSet:
        union = NameSet()
        for value in self._values(kind):
            union |= value.names
        return union

    @cached_property
    def allocators(self) -> tuple[AllocatorSignature, ...]:
        """Sorted by id, without the stand-in for unknown allocators."""
        found: list[AllocatorSignature] = self._values("allocator")
        known = (each for each in found if each.id != UNKNOWN_ALLOCATOR)
        return tuple(sorted(known, key=lambda each: each.id))

    @cached_property
    def unknown_allocator(self) -> AllocatorSignature:
        """Recognises nothing; holds, per rule, the fix that is right for an allocator nobody described."""
        for each in self._values("allocator"):
            if each.id == UNKNOWN_ALLOCATOR and isinstance(each, AllocatorSignature):
                return each
        raise SignatureError(Problem(self.directory / "allocators", 0, f"no allocator {UNKNOWN_ALLOCATOR!r}"))

    def fix_for(self, allocator: AllocatorSignature | None, rule: str, version: str | None) -> Fix | None:
        """The allocator's own fix, else the generic one for ``rule``; None for a rule without any."""
        own = allocator.fix_for(rule, version) if allocator is not None else None
        return own or self.unknown_allocator.fix_for(rule, version)

    @cached_property
    def malloc_family(self) -> Mapping[str, MallocRole]:
        """The standard allocation functions, C and mangled C++, each with what it does."""
        groups: list[MallocNames] = self._values("malloc-family")
        return MappingProxyType({name: group.role for group in groups for name in group.names})

    @cached_property
    def libcs(self) -> tuple[LibcSignature, ...]:
        return tuple(sorted(self._values("libc"), key=lambda each: str(each.id)))

    @cached_property
    def forkers(self) -> tuple[Forker, ...]:
        """Every entry, for every libc and version; ``forkers_for`` is what an analysis wants."""
        return tuple(self._values("forkers"))

    def forkers_for(self, libc: str | None, version: str | None) -> Mapping[str, Forker]:
        """What each process-creating function does in that libc, in that version.

        Where a libc has entries of its own for a name, the general one says nothing about it: glibc 2.33 has
        no ``_Fork``. With ``version`` None the newest known behaviour counts, with ``libc`` None the general.
        """
        own = {forker.name for forker in self.forkers if forker.libc == libc}
        found = {
            forker.name: forker
            for forker in self.forkers
            if forker.applies_to(libc, version) and (forker.libc == libc or forker.name not in own)
        }
        return MappingProxyType(dict(sorted(found.items())))

    def raw_process_syscalls(self, machine: str) -> Mapping[int, ProcessSyscall]:
        found: list[ProcessSyscall] = self._values("process-syscalls")
        return MappingProxyType({call.number: call for call in found if call.machine == machine})

    @cached_property
    def exec_names(self) -> NameSet:
        return self._name_set("exec-names")

    @cached_property
    def exit_names(self) -> NameSet:
        return self._name_set("exit-names")

    @cached_property
    def thread_starters(self) -> Mapping[str, ThreadStarter]:
        return self._by_name("threads")

    @cached_property
    def callbacks(self) -> Mapping[str, Callback]:
        return self._by_name("callbacks")

    @cached_property
    def locks(self) -> Mapping[str, LockFunction]:
        return self._by_name("locks")

    @cached_property
    def waiters(self) -> NameSet:
        """A call to one of these on the failing side of an atomic operation shows that this side waits."""
        return self._name_set("waiters")

    @cached_property
    def error_texts(self) -> NameSet:
        """Functions that say what an error is."""
        return self._name_set("error-texts")

    @cached_property
    def aborts(self) -> NameSet:
        """Functions by which a program ends that finds itself broken."""
        return self._name_set("aborts")

    @cached_property
    def clocks(self) -> NameSet:
        """Functions that tell the time."""
        return self._name_set("clocks")

    def wait_syscalls(self, machine: str) -> Mapping[int, WaitSyscall]:
        found: list[WaitSyscall] = self._values("wait-syscalls")
        return MappingProxyType({call.number: call for call in found if call.machine == machine})

    def libc_locks_for(self, libc: str | None, version: str | None) -> tuple[LibcLockNames, ...]:
        """Locks of that libc that its code does not show."""
        found: list[LibcLockNames] = self._values("libc-locks")
        return tuple(each for each in found if each.applies_to(libc, version))

    @cached_property
    def libc_areas(self) -> Mapping[str, LibcArea]:
        """What the lock of a libc's function has to do with: time zone, locale, …"""
        found: list[LibcArea] = self._values("libc-areas")
        return MappingProxyType({name: each for each in found for name in each.names})

    def holds_handler_lock(self, libc: str | None, version: str | None) -> bool | None:
        """Whether that libc holds the lock of its fork handlers while it runs them; None when it is not known."""
        found: list[HandlerLock] = self._values("fork-handlers")
        mine = [each for each in found if each.libc == libc and each.versions.contains(version)]
        return mine[0].held if len(mine) == 1 else None

    @cached_property
    def blocking(self) -> NameSet:
        """Functions that wait for another thread, another process or for time."""
        return self._name_set("blocking")

    @cached_property
    def joins(self) -> NameSet:
        """Functions that come back when a thread that was started has ended."""
        return self._name_set("joins")

    @cached_property
    def pools(self) -> NameSet:
        """Functions that wait for threads which their library keeps, and does not start again in a child."""
        return self._name_set("pools")

    @cached_property
    def futures(self) -> Mapping[str, FutureFunction]:
        """What waits for the results of futures, and what tells that they are there."""
        return self._by_name("futures")

    @cached_property
    def reports(self) -> Mapping[str, ReportFunction]:
        """What writes messages of all kinds, and how one says that something has gone wrong."""
        return self._by_name("reports")

    @cached_property
    def fills(self) -> Mapping[str, FillFunction]:
        """What fills a block of memory."""
        return self._by_name("fills")

    def signal_safe(self, edition: str) -> frozenset[str]:
        """The async-signal-safe functions of one edition of POSIX."""
        found: list[SignalSafe] = self._values("signal-safe")
        valid = (each for each in found if each.since <= edition and (each.until is None or edition < each.until))
        return frozenset(name for each in valid for name in each.names)

    @cached_property
    def noreturn(self) -> NameSet:
        return self._name_set("noreturn")


def default_directory() -> Path:
    """The data in the installed package, else the checkout's own ``signatures/``."""
    packaged = Path(__file__).parent / "signatures"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "signatures"


def load(directory: Path | None = None) -> Signatures:
    """The signatures below ``directory``. Files are read on first use, and that is when a bad one raises."""
    directory = directory or default_directory()
    if not directory.is_dir():
        raise SignatureError(Problem(directory, 0, "no such directory of signatures"))
    return Signatures(directory)


def main(arguments: Sequence[str]) -> int:
    """``lint [DIR]``: 0 clean, 1 problems, 2 usage."""
    if not arguments or arguments[0] != "lint" or len(arguments) > 2:
        print("usage: python -m forkproof.signatures lint [DIR]", file=sys.stderr)
        return 2
    from forkproof import signature_files

    problems = signature_files.lint(Path(arguments[1]) if len(arguments) == 2 else default_directory())
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
