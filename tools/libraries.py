"""Programs that use a library in a thread and in a child: how often they hang, what a scan says, what a probe shows.

Owns: the matrix of docs/libraries.md: `python -m tools.libraries`, or `make library-check`. Each file of
      fixtures/libraries is one use of one library of Debian 12; built with `driver.c`, it is a program whose thread
      makes that use all the time while its children, one after the other, make it once.
Takes: the sysroot bookworm-amd64-libraries (`python tools/sysroot.py bookworm-amd64-libraries`), gcc and g++, x86-64.
Gives: a row for each.
Must never: tell from the scan what the truth is. A child has hung that is still there after two seconds.
Wrong where: a lock is held so shortly that no fork of a hundred meets it: a row without hung children is no proof.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from tools.sysroot import find

SOURCES: Final = Path(__file__).resolve().parents[1] / "fixtures" / "libraries"
NAMES: Final = sorted(p.stem for p in SOURCES.glob("*.c*") if p.stem != "driver")
SYSROOT: Final = "bookworm-amd64-libraries"
_WORD: Final = re.compile(r"^// (link|include): (.*)$", re.MULTILINE)
_PLACES: Final = (
    "usr/lib/x86_64-linux-gnu/openblas-pthread", "usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu",
)  # fmt: skip
_ENOUGH: Final = 3
"""Children that hang, after which no more are made."""
_LONGEST: Final = 600
"""Seconds for all probes of one program."""


def build(name: str, root: Path, folder: Path) -> Path:
    """Compile one program against the sysroot's headers and libraries."""
    source = next(SOURCES.glob(f"{name}.c*"))
    told = dict(_WORD.findall(source.read_text(encoding="utf-8")))
    places = [f"-I{root / 'usr/include' / word}" for word in told.get("include", "").split()]
    link = shlex.split(told.get("link", "").replace("$ROOT", str(root)))
    output, common = folder / name, ["-O2", "-w", "-pthread", f"--sysroot={root}", f"-I{SOURCES}", *places]
    subprocess.run(["gcc", *common, "-c", SOURCES / "driver.c", "-o", folder / "driver.o"], check=True)
    compiler = "g++" if source.suffix == ".cc" else "gcc"
    rest = [f"-Wl,-rpath-link={root / place}" for place in _PLACES]
    subprocess.run([compiler, *common, source, folder / "driver.o", "-o", output, *link, *rest], check=True)
    return output


def environment(root: Path) -> Mapping[str, str]:
    """That in which a program finds the sysroot's libraries."""
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(str(root / place) for place in _PLACES)}


def run(program: Path, root: Path, forks: int) -> str:
    """How many children hung, of how many, until enough have."""
    try:
        done = subprocess.run(
            [program, str(forks), str(_ENOUGH)], capture_output=True, text=True, env=environment(root), check=True,
            timeout=20 + forks / 4, stdin=subprocess.DEVNULL, cwd=program.parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "did not end"
    except subprocess.CalledProcessError as error:
        return f"ended with {error.returncode}"
    return "{} of {}".format(*done.stdout.split()[-2:])


def asked(what: str, program: Path, root: Path, *arguments: str) -> list[dict[str, Any]]:
    """The findings of `forkproof scan` or `forkproof probe`, without any cache."""
    places = [f"--library-path={root / place}" for place in _PLACES]
    command = [sys.executable, "-m", "forkproof", what, "--no-cache", "--format", "json", "--fail-on", "never", *places]
    done = subprocess.run(
        [*command, *arguments, program, *(("1",) if what == "probe" else ())], capture_output=True, text=True,
        env=environment(root), timeout=_LONGEST, check=False, cwd=program.parent,
    )  # fmt: skip
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return findings


def row(name: str, program: Path, root: Path, *, forks: int, probes: bool) -> str:
    """One row of the table."""
    truth = run(program, root, forks) if forks else "not run"
    ranks = Counter(f["severity"] for f in asked("scan", program, root))
    said = ", ".join(f"{ranks[rank]} {rank}" for rank in ("high", "medium", "low") if ranks[rank]) or "nothing"
    shown = "not run"
    if probes:
        try:
            found = [f for f in asked("probe", program, root, "--") if f["probe"]]
            locks = sorted(f["lock"]["name"] for f in found if f["probe"]["verdict"] == "confirmed")
            shown = ", ".join(locks) or "none"
        except subprocess.TimeoutExpired:
            shown = "did not end"
    return f"| {name} | {truth} | {said} | {shown} |"


@click.command()
@click.option("--only", multiple=True, type=click.Choice(NAMES), help="Programs; all without.")
@click.option("--forks", default=100, show_default=True, help="Children of each; 0: do not run them.")
@click.option("--no-probes", is_flag=True, help="Scan only.")
def main(only: Sequence[str], forks: int, *, no_probes: bool) -> None:
    """Print the matrix."""
    root = find(SYSROOT)
    if root is None:
        sys.exit(f"python tools/sysroot.py {SYSROOT} makes what this needs")
    print("| use | children that hung | scan | locks that a probe confirmed |\n|---|--:|---|---|")
    with tempfile.TemporaryDirectory(prefix="forkproof-libraries-") as scratch:
        for name in only or NAMES:
            program = build(name, root, Path(scratch))
            print(row(name, program, root, forks=forks, probes=not no_probes), flush=True)


if __name__ == "__main__":
    main()
