"""Snippets of C, many to a file, compiled and analysed once for each way to build them.

A *case* is a few lines of C in which `@` stands for the case's own name, so that hundreds of them fit in one
translation unit without knowing of each other:

    Case("exit_in_child", "exit", '''
        int @main(void) { if (fork() == 0) _exit(0); return 0; }
    ''')

A *build* is a machine with the flags that matter. All cases of a table become one shared object for each build, which
is compiled, linked to a real libc and analysed when the first test asks for it; nothing is run.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from forkproof import facts, signatures
from forkproof.allocators import find_libc
from forkproof.cache import Parts
from forkproof.facts import Facts, WindowFacts
from forkproof.locks import LockFunctions, lock_functions
from forkproof.model import Finding
from forkproof.options import ScanOptions
from forkproof.pipeline import RULES, call_graph
from forkproof.program import Function

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

PRELUDE: Final = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <libintl.h>
#include <malloc.h>
#include <pthread.h>
#include <pty.h>
#include <sched.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <syslog.h>
#include <threads.h>
#include <time.h>
#include <pwd.h>
#include <unistd.h>
#define NOINLINE __attribute__((noinline, noclone, noipa))
#define OPAQUE __attribute__((noinline, noclone))
#define COLD __attribute__((cold, noinline, noclone, noipa))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
NOINLINE void work(int n) { asm volatile("" :: "r"(n) : "memory"); }
NOINLINE int ask(void) { int n = 1; asm volatile("" : "+r"(n) :: "memory"); return n; }
"""
_COMPILERS: Final = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}
_INTERPRETERS: Final = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}


@dataclass(frozen=True)
class Build:
    """A machine and the flags that change the code."""

    machine: str
    flags: tuple[str, ...] = ("-O2",)

    def __str__(self) -> str:
        return "".join([self.machine, *self.flags])

    def also(self, *flags: str) -> Build:
        """The same with more flags."""
        return Build(self.machine, (*self.flags, *flags))


LEVELS: Final = ("-O0", "-O1", "-O2", "-Os")
BUILDS: Final = tuple(Build(machine, (level,)) for machine in _COMPILERS for level in LEVELS)
MACHINES: Final = tuple(Build(machine) for machine in _COMPILERS)


@dataclass(frozen=True)
class Case:
    """A snippet with what is expected of it."""

    name: str
    expected: str
    code: str
    only: tuple[str, ...] = ()
    """Machines, or flags, of which a build must have one; all builds if empty."""
    wrong: str = ""
    """Why the answer is known to be wrong, in the builds that `wrong_in` names (all if it is empty)."""
    wrong_in: tuple[str, ...] = ()

    def applies(self, build: Build) -> bool:
        return not self.only or bool({build.machine, *build.flags} & set(self.only))

    def marks(self, build: Build) -> list[pytest.MarkDecorator]:
        """What pytest must know of a case in a build."""
        names = {build.machine, *build.flags, str(build)}
        is_wrong = self.wrong and (not self.wrong_in or names & set(self.wrong_in))
        return [pytest.mark.xfail(reason=self.wrong)] if is_wrong else []

    @property
    def text(self) -> str:
        return self.code.replace("@", f"{self.name}__")


def parameters(cases: Sequence[Case], builds: Iterable[Build] = BUILDS) -> list[ParameterSet]:
    """A parameter for each case and each build that it applies to."""
    return [
        pytest.param(case, build, id=f"{case.name}-{build}", marks=case.marks(build))
        for build in builds
        for case in cases
        if case.applies(build)
    ]


# ---- building ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to compile. Hashable, so that it is compiled and analysed once."""

    build: Build
    code: str
    kind: str = "library"
    name: str = "snippet"
    uses: tuple[Plan, ...] = ()
    """Libraries to link with, in this order."""
    language: str = "c"


_KEPT = 24
"""Analysed programs that are kept: each takes 20 to 60 MB."""


@cache
def _directory() -> Path:
    """One root for the session; removed with pytest's other temporary files' parent, /tmp."""
    import atexit

    path = Path(tempfile.mkdtemp(prefix="forkproof-snippets-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _compiler(machine: str, language: str) -> str:
    command = _COMPILERS[machine].replace("gcc", "g++" if language == "c++" else "gcc")
    found = shutil.which(command)
    if found is None:
        pytest.skip(f"{command} is not installed")
    return found


@cache
def _root(machine: str) -> Path:
    """A sysroot with a real libc and nothing else."""
    root = _directory() / machine
    interpreter = root / _INTERPRETERS[machine].lstrip("/")
    interpreter.parent.mkdir(parents=True)
    (root / "lib").mkdir(exist_ok=True)
    for source, target in ((interpreter.name, interpreter), ("libc.so.6", root / "lib" / "libc.so.6")):
        command = [_compiler(machine, "c"), f"-print-file-name={source}"]
        shutil.copyfile(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), target)
    return root


@cache
def compiled(plan: Plan) -> Path:
    """Compile and link a plan; gives the path in its machine's sysroot."""
    root = _root(plan.build.machine)
    if plan.kind == "library":
        output = root / "lib" / f"lib{plan.name}-{len(list(root.glob('lib/*')))}.so"
    else:
        output = root / "bin" / str(len(list(root.glob("bin/*")))) / plan.name
    output.parent.mkdir(parents=True, exist_ok=True)
    libraries = [compiled(used) for used in plan.uses]
    shape = {
        "library": ("-shared", "-fPIC", f"-Wl,-soname,lib{plan.name}.so"),
        "program": ("-fPIE", "-pie"),
        "fixed": ("-fno-pie", "-no-pie"),
        "static": ("-static",),
    }[plan.kind]
    # No inlining of what the snippets call by name, and no merging of snippets that are the same.
    plain = ("-w", "-g0", "-fno-ipa-icf", "-fno-builtin")
    link = ("-Wl,--no-as-needed", "-Wl,-rpath,/lib", "-Wl,--allow-shlib-undefined")
    source = ("-x", plan.language, "-", "-x", "none")
    command = [_compiler(plan.build.machine, plan.language), *plain, *source, *plan.build.flags, *shape]
    command += ["-o", str(output), *link, *map(str, libraries)]
    done = subprocess.run(command, input=plan.code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if plan.kind == "library":
        _put(output, plan)
    return output


@lru_cache(maxsize=_KEPT)
def analysed(plan: Plan) -> Facts:
    """All facts of a plan's program."""
    path = compiled(plan)
    for used in plan.uses:
        _put(compiled(used), used)
    root = _root(plan.build.machine)
    known = _known()
    target = "/" + str(path.relative_to(root))
    graph = call_graph(target, ScanOptions(sysroot=root), known)
    return facts.gather(target, graph, known, find_libc(graph.program, known), _parts())


def _put(path: Path, plan: Plan) -> None:
    """Give a library the name under which the dynamic linker looks for it."""
    named = path.with_name(f"lib{plan.name}.so")
    named.unlink(missing_ok=True)
    named.hardlink_to(path)


@cache
def _parts() -> Parts:
    """What is found about libc is the same for all."""
    return Parts()


@cache
def _known() -> signatures.Signatures:
    return signatures.load()


@lru_cache(maxsize=_KEPT)
def table(cases: tuple[Case, ...], build: Build) -> Facts:
    """The facts of all cases of a table in one library."""
    code = PRELUDE + "\n".join(case.text for case in cases if case.applies(build))
    return analysed(Plan(build, code))


def program(build: Build, code: str, *uses: Plan, kind: str = "program", language: str = "c") -> Facts:
    """The facts of one program."""
    return analysed(Plan(build, PRELUDE + code, kind, "program", uses, language))


def library(build: Build, name: str, code: str, *uses: Plan) -> Plan:
    """A library for programs to use."""
    return Plan(build, PRELUDE + code, "library", name, uses)


# ---- asking -----------------------------------------------------------------------------------


def function(found: Facts, name: str) -> Function:
    """The function of the target with a name."""
    return next(iter(found.flow.program.called([name], [0])))


def windows_of(found: Facts, case: Case | str) -> list[WindowFacts]:
    """The windows in a case's functions, by address."""
    prefix = f"{case.name}__" if isinstance(case, Case) else case
    return [w for w in found.windows if found.flow.name(w.window.function).startswith(prefix)]


@lru_cache(maxsize=_KEPT)
def _locks(found: Facts) -> LockFunctions:
    return lock_functions(found.flow, 0, found.roots)


def locks_of(found: Facts) -> LockFunctions:
    """The lock functions of the target, reached from whatever it exports."""
    return _locks(found)


def findings_of(found: Facts) -> list[Finding]:
    """What the rules say."""
    findings = [finding for find in RULES for finding in find(found)]
    found.keep()
    return findings
