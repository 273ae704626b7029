"""Which machines' programs can be built here, and which can be run."""

from __future__ import annotations

import platform
import shutil
from functools import cache
from pathlib import Path

from fixtures.build import DEFAULT_OUTPUT, Result, Toolchain, build

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
