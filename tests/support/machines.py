"""Which machines' programs can be built here, and which can be run."""

from __future__ import annotations

import platform
import shutil
from functools import cache
from pathlib import Path

import pytest

from fixtures.build import DEFAULT_OUTPUT, Result, Toolchain, build
from fixtures.truth import VARIANTS

NATIVE = platform.machine()
#: Where Debian's cross compilers keep the libraries of the other machine.
CROSS_ROOT = "/usr/{machine}-linux-gnu"


def can_build(machine: str) -> bool:
    return Toolchain(machine).missing(Path("any.c")) is None


@cache
def built(machine: str) -> Result:
    """All fixtures of a machine, built at most once; a file lock keeps pytest's workers apart."""
    return build(machine, DEFAULT_OUTPUT)


def runner(machine: str) -> list[str] | None:
    """What to put before a program's path to run it here; None if nothing will."""
    if machine == NATIVE:
        return []
    qemu = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    root = Path(CROSS_ROOT.format(machine=machine))
    return [qemu, "-L", str(root)] if qemu and root.is_dir() else None


def arm64_root(result: Result, root: Path) -> Path:
    """A sysroot that holds the arm64 fixtures as / and the cross compiler's C library; skips the test without that."""
    libraries = Path(CROSS_ROOT.format(machine="aarch64")) / "lib"
    linker = "ld-linux-aarch64.so.1"
    if not (libraries / linker).exists():
        pytest.skip(f"not installed: {libraries / linker}")
    shutil.copytree(result.tree.root(), root, ignore=shutil.ignore_patterns(*VARIANTS, ".stubs", ".stamps"))
    (root / "lib/aarch64-linux-gnu").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(libraries / linker, root / "lib" / linker)
    shutil.copyfile(libraries / "libc.so.6", root / "lib/aarch64-linux-gnu/libc.so.6")
    return root
