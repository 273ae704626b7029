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

    Results are kept in the directory `cache`, by content, and used again: the command has one of the user's.
    A target that cannot be analysed is a message in the report's `errors`; the others are still there.
    """
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
