"""Calling conventions: which register has which part in a call.

Source: System V psABI for x86-64, 3.2; AAPCS64, 6.1; syscall(2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from forkproof.code import lift_aarch64, lift_x86_64
from forkproof.elf.image import Machine


@dataclass(frozen=True, slots=True)
class Convention:
    """The registers that a machine's calling convention gives a role."""

    arguments: tuple[str, ...]
    result: str
    stack: str
    destroyed: frozenset[str]
    syscall_number: str


CONVENTIONS: Final[Mapping[Machine, Convention]] = {
    machine: Convention(m.ARGUMENTS, m.RESULT, m.STACK, m.CALL_DESTROYS, m.SYSCALL_NUMBER)
    for machine, m in ((Machine.X86_64, lift_x86_64), (Machine.AARCH64, lift_aarch64))
}
