"""What a probe starts from: the findings of a program, and the plan of where its locks are taken.

Owns: that both come from one scan, or from the cache where one was kept.
Takes: a program and the options of its scan. Gives: a report and a `Plan`, or the text of a plan file.
Must never: run the program, or scan it with what a unit or wrapper preloads: a probe starts it as the command says.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from forkproof import cache, closure, pipeline
from forkproof.errors import InputError
from forkproof.facts import Facts
from forkproof.model import Finding, Report
from forkproof.options import QUIET, Progress, ScanOptions
from forkproof.probe import plan, planfile
from forkproof.probe.plan import Plan


def prepared(program: str, options: ScanOptions, progress: Progress = QUIET) -> tuple[Report, Plan]:
    """Of a scan; InputError where the program cannot be analysed, or there are several."""
    options = replace(options, as_named=True)
    kept = cache.Cache(options.cache) if options.cache is not None else None
    key = _key(program, options) if kept is not None else None
    if kept is not None and key is not None and isinstance(text := kept.get_part(key), str):
        return planfile.load(text, program)
    made: list[Plan] = []

    def note(facts: Facts, findings: list[Finding]) -> None:
        made.append(plan.make(facts, str(options.sysroot or "/"), findings))

    report = pipeline.scan((program,), options, progress, note)
    if not made:
        problem, _, step = "\n  ".join(report.errors).removeprefix(f"{program}: ").partition("\n  ")
        raise InputError(program, problem, next_step=step)
    if len(made) > 1:
        raise InputError(
            program, f"holds {len(made)} programs, and a probe runs one", next_step="Name the program itself."
        )
    if kept is not None and key is not None and not report.errors:
        kept.put_part(key, planfile.dump(report, made[0]))
    return report, made[0]


def plan_text(program: str, options: ScanOptions, progress: Progress = QUIET) -> str:
    """The same as the content of a plan file, for a probe elsewhere."""
    return planfile.dump(*prepared(program, options, progress))


def _key(program: str, options: ScanOptions) -> str | None:
    """What it is kept under: all that the scan reads, and the paths that it tells; None for what it cannot read."""
    sysroot = closure.DirectorySysroot(options.sysroot or Path("/"))
    try:
        whole = cache.key(pipeline.load(program, options, sysroot), sysroot, options)
    except InputError:
        return None
    return hashlib.sha256(f"plan {program} {options.sysroot} {whole}".encode("utf-8", "surrogatepass")).hexdigest()
