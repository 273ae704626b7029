"""Errors that reach a user, with what was wrong and what to do next.

Owns: the hierarchy below and the exit codes of the command.
Takes: the facts of a failure (path, problem, next step); the text is derived from them.
Must never: print, exit, or swallow another exception.

    ForkproofError              exit code, problem, help
      UsageError                the command line asks for something impossible         (2)
      InputError                one file cannot be analysed; the rest of a run goes on (3)
        UnreadableFile            missing, a directory, a device, no permission, …
        NotElf                    no ELF magic
        UnsupportedElf            ELF, but 32-bit, big-endian, another machine, …
        DamagedElf                ELF whose headers point outside the file, …
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

EXIT_CLEAN: Final = 0
EXIT_FINDINGS: Final = 1
EXIT_USAGE: Final = 2
EXIT_INPUT: Final = 3
EXIT_INTERNAL: Final = 4


class ForkproofError(Exception):
    """Base of everything that forkproof raises on purpose."""

    exit_code: int = EXIT_INTERNAL

    def __init__(self, problem: str, *, next_step: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.problem}\n  {self.next_step}" if self.next_step else self.problem


class UsageError(ForkproofError):
    """The request cannot be meant as written."""

    exit_code = EXIT_USAGE


class InputError(ForkproofError):
    """One input file cannot be analysed."""

    exit_code = EXIT_INPUT
    usual_step: str = ""
    """What to do next where the one who raises it knows nothing better."""

    def __init__(self, path: Path | str, problem: str, *, next_step: str = "") -> None:
        super().__init__(f"{path}: {problem}", next_step=next_step or self.usual_step)
        self.path = str(path)
        self.reason = problem


class UnreadableFile(InputError):
    """The file could not be opened as a regular file."""

    usual_step = "Name a regular file that you may read."


class NotElf(InputError):
    """The file does not begin with the ELF magic number."""

    usual_step = "Name an ELF program, a package, an image, an archive or a directory; file FILE tells what this is."


class UnsupportedElf(InputError):
    """An ELF file outside ELF64 little-endian x86-64 / aarch64."""

    usual_step = "If there is a build of it for x86-64 or aarch64, name that."


class DamagedElf(InputError):
    """An ELF file whose own headers contradict its content."""

    usual_step = "Fetch it again, or compare it with its package: dpkg --verify PACKAGE, rpm --verify PACKAGE."


def bug(error: Exception) -> str:
    """What went wrong inside of forkproof, and where, in words for people."""
    import traceback

    here = Path(__file__).parent
    ours = [each for each in traceback.extract_tb(error.__traceback__) if Path(each.filename).is_relative_to(here)]
    where = f" at {Path(ours[-1].filename).relative_to(here)}:{ours[-1].lineno}" if ours else ""
    what = f"{type(error).__name__}: {error}{where}"
    return f"internal error: {what}\n  This is a bug in forkproof, not in what it analysed."
