"""Find the locks that a child of fork() can hang on, in ELF binaries.

    from forkproof import scan
    report = scan("/usr/sbin/named", sysroot="/srv/bookworm-arm64")
    for finding in report.findings:
        print(finding.id, finding.message)

Importing this package costs nothing: the analysis, and what it needs, is imported by the first `scan`.
The types of the result are in `forkproof.model`, its JSON in `forkproof.report.json`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forkproof.model import Report

__version__ = "0.1.0"

__all__ = ["__version__", "scan"]


def scan(
    *targets: str | os.PathLike[str],
    sysroot: str | os.PathLike[str] | None = None,
    library_path: Sequence[str] = (),
    preload: Sequence[str] = (),
    also: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
) -> Report:
    """Analyse programs as ld.so would load them, without running them; the options are those of the command.

    A target is what the command takes: a program, a directory, a package, an archive, an image. Results are kept in the
    directory `cache`, by content, and used again; without it nothing is kept (the command has one of the user's).

    Returns a report. Look at two things: its `findings`, and `errors`, which has a message for everything that was not
    analysed: a target, a library that was not found, a preload in vain. A scan is clean if both are empty. Nothing of
    forkproof.toml is applied: every finding counts.

    Raises `forkproof.errors.UsageError` if no target is named or `sysroot` is no directory, and TypeError where one
    text stands for a list of them. What is wrong with a target raises nothing; a bug of forkproof's does
    if the scan has one program, and is a message in `errors` otherwise.

    One call at a time in a process: the recursion limit and the garbage collector are the process's, and are changed
    while a program is analysed and restored after. Nothing is printed, no process is started, no signal is handled.
    """
    for option, names in (("library_path", library_path), ("preload", preload), ("also", also)):
        if isinstance(names, str):
            raise TypeError(f"{option} is a list of names, not one text: [{names!r}]")
    if not targets:
        from forkproof.errors import UsageError

        raise UsageError("no target", next_step="Name a program, a directory, a package or an image.")
    from forkproof import pipeline
    from forkproof.options import QUIET, ScanOptions

    options = ScanOptions(
        sysroot=None if sysroot is None else Path(sysroot),
        library_path=tuple(library_path),
        preload=tuple(preload),
        also=tuple(also),
        cache=None if cache is None else Path(cache),
    )
    return pipeline.scan([os.fspath(target) for target in targets], options, QUIET)
