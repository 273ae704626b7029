"""What Go's runtime calls its parts, and how its functions pass arguments.

Owns: the names of Go's system call functions and entries, and the registers of its calling convention.
Takes: nothing. Gives: constants.
Must never: decide anything: the code that uses these names does.
Wrong where: Go before 1.17 passed arguments on the stack, so that the numbers of its system calls are not seen.

Source: Go, src/cmd/compile/abi-internal.md; src/syscall/syscall_linux.go; src/runtime/proc.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from forkproof.elf.image import Machine

SYSTEM_CALLS: Final = (
    "syscall.RawSyscall", "syscall.RawSyscall6", "syscall.Syscall", "syscall.Syscall6", "syscall.rawSyscallNoError",
    "golang.org/x/sys/unix.RawSyscall", "golang.org/x/sys/unix.RawSyscall6",
    "golang.org/x/sys/unix.Syscall", "golang.org/x/sys/unix.Syscall6",
)  # fmt: skip
"""Functions whose first argument is the number of a system call, and the others its arguments."""

ARGUMENTS: Final[Mapping[Machine, tuple[str, str]]] = {Machine.X86_64: ("rax", "rbx"), Machine.AARCH64: ("x0", "x1")}
"""The registers of the first two arguments."""

ERRORS: Final[Mapping[Machine, str]] = {Machine.X86_64: "rcx", Machine.AARCH64: "x2"}
"""The register in which they give the error, which is 0 in the child of a fork."""

ENDS: Final[Mapping[Machine, Mapping[int, str]]] = {
    Machine.X86_64: {59: "exec", 322: "exec", 60: "exit", 231: "exit"},
    Machine.AARCH64: {221: "exec", 281: "exec", 93: "exit", 94: "exit"},
}
"""What becomes of a child that makes these system calls: execve, execveat, exit, exit_group."""

ENTRIES: Final = ("runtime.main", "main.main")
"""Where the main goroutine begins, and the program's own code in it: both are called through pointers."""


def is_go(name: str) -> bool:
    """The linker's name of a Go function has its package in front; C's and C++'s have no dot before the first part."""
    return "." in name and not name.startswith("_")
