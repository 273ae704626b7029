"""The dynamic linker's own constants: its built-in directories and the tokens that it substitutes.

Owns: what distinguishes one ld.so from another before any library is sought.
Takes: the interpreter's image where there is one. Gives: a frozen `LoaderRules`.
Must never: search; it says where a search would go.
Wrong where: an ld.so was built to hide its strings; the table for Debian's and Fedora's layouts stands in.

Source: glibc elf/dl-load.c (`system_dirs`), elf/dl-hwcaps.c, sysdeps/x86/dl-hwcap.h; musl ldso/dynlink.c.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forkproof.closure.model import Libc
from forkproof.elf.image import Machine

if TYPE_CHECKING:
    from forkproof.elf.image import Image

_DIRECTORY_RUN: Final = re.compile(rb"(?<=\0)(?:/(?:[\w.+:@~-]+/)*lib[\w.+-]*/(?:[\w.+-]+/)*\0)+")
"""`system_dirs` in glibc's ld.so: directories with a final slash and a NUL, one after another."""

_TRIPLET: Final = {Machine.X86_64: "x86_64-linux-gnu", Machine.AARCH64: "aarch64-linux-gnu"}
_PLATFORM: Final = {Machine.X86_64: "x86_64", Machine.AARCH64: "aarch64"}

_LEVELS: Final = {
    "x86-64-v2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}
"""The x86-64 psABI's levels in the words of /proc/cpuinfo; each needs the ones above it too."""


@dataclass(frozen=True, slots=True)
class LoaderRules:
    """What the search depends on besides the objects."""

    libc: Libc
    machine: Machine
    directories: tuple[str, ...]
    """glibc: built in, searched last. musl: the system path."""
    lib_token: str
    """$LIB."""
    platform_token: str
    """$PLATFORM."""
    hwcaps: tuple[str, ...]
    """glibc-hwcaps subdirectories in use, best first."""
    subdirectories: tuple[str, ...]
    """What is tried below every search directory, in order; the last one is "", the directory itself."""


def glibc_rules(machine: Machine, interpreter: Image | None, hwcaps: tuple[str, ...]) -> LoaderRules:
    """The constants of a glibc ld.so; `interpreter` None: those of Debian's and Fedora's builds together."""
    directories = _built_in(interpreter) or _usual_directories(machine)
    first = directories[0].strip("/")
    known = interpreter is None or interpreter.data.find(b"glibc-hwcaps") >= 0
    named = tuple(f"glibc-hwcaps/{name}/" for name in hwcaps) if known else ()
    platform = "haswell" if machine is Machine.X86_64 and "x86-64-v3" in hwcaps else _PLATFORM[machine]
    has_legacy = interpreter is not None and interpreter.data.find(b"Legacy HWCAP subdirectories") >= 0
    legacy = _legacy(machine, hwcaps) if has_legacy else ()
    return LoaderRules(
        libc=Libc.GLIBC,
        machine=machine,
        directories=directories,
        lib_token=first.removeprefix("usr/"),
        platform_token=platform,
        hwcaps=hwcaps if known else (),
        subdirectories=(*named, *legacy, ""),
    )


def musl_rules(machine: Machine, directories: tuple[str, ...]) -> LoaderRules:
    """The constants of a musl ld.so; `directories` come from /etc/ld-musl-ARCH.path or its default."""
    return LoaderRules(Libc.MUSL, machine, directories, "lib", _PLATFORM[machine], (), ("",))


def _built_in(interpreter: Image | None) -> tuple[str, ...]:
    if interpreter is None:
        return ()
    runs = [match.group()[:-1].decode() for match in _DIRECTORY_RUN.finditer(interpreter.data)]
    best = max(runs, key=len, default="")
    return tuple(part.rstrip("/") for part in best.split("\0") if part)


def _usual_directories(machine: Machine) -> tuple[str, ...]:
    triplet = _TRIPLET[machine]
    return (f"/lib/{triplet}", f"/usr/lib/{triplet}", "/lib", "/usr/lib", "/lib64", "/usr/lib64")


def _legacy(machine: Machine, hwcaps: tuple[str, ...]) -> tuple[str, ...]:
    """The subdirectories of glibc before 2.37: every subset of these names, the fuller ones first."""
    names = ["tls", _PLATFORM[machine]]
    if machine is Machine.X86_64:
        levels = {"haswell": "x86-64-v3", "avx512_1": "x86-64-v4"}
        names[1:1] = [name for name, level in levels.items() if level in hwcaps]
    subsets = itertools.product(*((f"{name}/", "") for name in names))
    return tuple(path for path in map("".join, subsets) if path)


@cache
def host_hwcaps(cpuinfo: str = "/proc/cpuinfo") -> tuple[str, ...]:
    """The glibc-hwcaps subdirectories that this machine's CPU supports, best first."""
    try:
        lines = Path(cpuinfo).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ()
    line = next((line for line in lines if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    supported: list[str] = []
    for level, needs in _LEVELS.items():
        if not flags.issuperset(needs.split()):
            break
        supported.insert(0, level)
    return tuple(supported)
