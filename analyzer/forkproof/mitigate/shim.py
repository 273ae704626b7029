"""The shim: its source, for a packager to review, and its compilation.

Owns: the C text and the compiler's command line. Takes: `Remedy`s. Gives: text, and a library.
Must never: put a name from a file into C code other than as a quoted symbol, or keep a library for the wrong machine.

Both kinds of shim only ever call libc's registration, and only what the allocator itself defines runs at a fork.
The handlers are registered without a DSO handle, as libc's own compatibility pthread_atfork does for old programs:
they stay registered until the process ends, which is right for an allocator, since nothing can unload it.
A shim that registers by itself is built with -z initfirst: its handlers are then the first that are registered, so
that prepare runs last, when other libraries' prepare handlers have allocated, and parent and child run first.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forkproof.elf.image import load
from forkproof.errors import InputError
from forkproof.mitigate.remedy import Remedy

MARK: Final = "Written by forkproof mitigate"
_SYMBOL: Final = re.compile(r"[A-Za-z0-9_.$@]+")
_WIDTH: Final = 92
_MACHINES: Final = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}


@dataclass(frozen=True, slots=True)
class Shim:
    """A shim that has been built."""

    path: Path
    source: str
    command: tuple[str, ...]
    """How it was built."""
    is_kept: bool = True
    """False for one that was made to be looked at."""


# The source.


def source(remedies: Sequence[Remedy], target: str) -> str:
    """The C text; deterministic."""
    provided = sorted({(r.defines, r.registrar) for r in remedies if r.defines})
    registered = sorted({(r.handlers, r.registrar) for r in remedies if r.handlers is not None})
    body = [_declaration(name) for name in sorted({r.registrar for r in remedies})]
    body += [_definition(name, registrar) for name, registrar in provided]
    if registered:
        body += [_constructor(registered)]
    return _comment(remedies, target) + "\n" + "\n".join(body)


def _comment(remedies: Sequence[Remedy], target: str) -> str:
    lines = [f"{MARK}: fork handlers that are missing, registered from outside.", ""]
    for remedy in remedies:
        lines += [*_filled(f"For {target}: {remedy.finding.message}; {remedy.why}."), ""]
    lines += [
        "Build:  cc -shared -fPIC -O2 -Wl,-z,initfirst -o libforkshim.so THIS.c",
        "Use:    LD_PRELOAD, before the allocator if that is preloaded too. Set-user-ID programs",
        "        ignore LD_PRELOAD: link the library in front of the allocator instead.",
        "Remove: when the allocator registers its handlers itself, and forkproof scan agrees.",
    ]
    return "/* " + "\n * ".join(_harmless(line) for line in lines).replace(" \n", "\n") + "\n */\n"


def _harmless(text: str) -> str:
    """Text from files cannot end the comment, or hold what an editor would act on."""
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in text).replace("*/", "*?")


def _filled(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= _WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


_PARAMETERS: Final = "handler prepare, handler parent, handler child"


def _declaration(registrar: str) -> str:
    dso = ", void *dso" if registrar.startswith("__") else ""
    return f"typedef void (*handler)(void);\nextern int {registrar}({_PARAMETERS}{dso});\n"


def _call(registrar: str, handlers: str) -> str:
    return f"{registrar}({handlers}{', (void *)0' if registrar.startswith('__') else ''})"


def _definition(name: str, registrar: str) -> str:
    """What the allocator calls and nobody defines."""
    dso = ", void *dso" if name.startswith("__") else ""
    unused = "    (void)dso;\n" if dso else ""
    return (
        f'__attribute__((visibility("default")))\nint {name}({_PARAMETERS}{dso})\n{{\n'
        f"{unused}    return {_call(registrar, 'prepare, parent, child')};\n}}\n"
    )


def _constructor(registered: Sequence[tuple[tuple[str, str, str], str]]) -> str:
    """Registers what the allocator exports; where it is not loaded, as in other programs, nothing happens."""
    symbols = sorted({symbol for handlers, _ in registered for symbol in handlers})
    number = {symbol: n for n, symbol in enumerate(symbols)}
    lines = [f'extern void handler_{number[s]}(void) __asm__("{_quoted(s)}") __attribute__((weak));' for s in symbols]
    lines += ["", "__attribute__((constructor)) static void register_handlers(void)", "{"]
    for handlers, registrar in registered:
        names = [f"handler_{number[s]}" for s in handlers]
        condition = " && ".join(dict.fromkeys(names))
        lines += [f"    if ({condition})", f"        {_call(registrar, ', '.join(names))};"]
    return "\n".join([*lines, "}", ""])


def _quoted(symbol: str) -> str:
    if not _SYMBOL.fullmatch(symbol):
        raise InputError(symbol, "is no name of a symbol that a compiler takes", next_step="Write the shim by hand.")
    return symbol


# The compiler.


def compiler(machine: str, asked: str | None) -> list[str]:
    """The command that compiles for a machine."""
    command = shlex.split(asked) if asked else []
    if not command:
        is_own = platform.machine() in _MACHINES.get(machine, (machine,))
        command = ["gcc" if is_own else f"{machine}-linux-gnu-gcc"]
    if shutil.which(command[0]) is None:
        package = f"gcc-{machine.replace('_', '-')}-linux-gnu" if "linux-gnu" in command[0] else "gcc"
        raise InputError(
            command[0], f"no such compiler, and {machine} needs one", next_step=f"Install {package}, or name one: --cc"
        )
    return command


def build(text: str, output: Path, machine: str, asked: str | None) -> Shim:
    """Compile the source to a library at `output`."""
    command = [*compiler(machine, asked), "-shared", "-fPIC", "-O2", "-Wl,-z,initfirst", f"-Wl,-soname,{output.name}"]
    with tempfile.TemporaryDirectory(prefix="forkproof-shim-") as folder:
        Path(folder, "shim.c").write_text(text, encoding="ascii")
        done = subprocess.run(
            [*command, "-o", "shim.so", "shim.c"], cwd=folder, capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(command[0], f"could not build the shim: {last}", next_step="Name another one: --cc")
        made = load(Path(folder, "shim.so")).machine.value
        if made != machine:
            problem = f"builds for {made}, and the program is for {machine}"
            raise InputError(command[0], problem, next_step=f"--cc {machine}-linux-gnu-gcc")
        fresh = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copyfile(Path(folder, "shim.so"), fresh)
        fresh.chmod(0o755)
        fresh.rename(output)
    return Shim(output, text, (*command, "-o", output.name, output.with_suffix(".c").name))
