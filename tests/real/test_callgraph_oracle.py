"""Functions, PLT stubs and direct call edges against binutils, over at least 40 MB of code on each machine.

Oracle: tests/support/objdump.py, which reads what `objdump -d` and `readelf` print; the rule for an edge is there.
Compared: edges as (site, target, call or jump), and as (function, target); functions; stubs; and the same of
stripped copies.

`python -m tests.real.test_callgraph_oracle` prints the table of docs/callgraph.md;
`python -m tests.real.test_callgraph_oracle FILE...` compares some files and lists every difference.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from forkproof.closure import DirectorySysroot, LoadRequest
from forkproof.closure import load as load_closure
from forkproof.code.index import CodeIndex, index_code
from forkproof.elf.image import Image, load
from tests.support import objdump
from tests.support.objdump import Edge
from tools.sysroot import find

pytestmark = [pytest.mark.real, pytest.mark.together("machine")]

IS_WHOLE: Final = os.environ.get("FORKPROOF_ORACLE") == "whole" or __name__ == "__main__"
"""All programs are compared, which takes minutes (`make callgraph-check`); otherwise the last of each list."""
_SOME: Final = 3
LEAST_CODE: Final = 40_000_000 if IS_WHOLE else 5_000_000
"""Bytes on each machine."""
LEAST_RATIO: Final = 0.999

SYSROOTS: Final = {"x86_64": "bookworm-amd64", "aarch64": "bookworm-arm64"}
#: These, and their closures. C, C++ and assembly, PIE and fixed base, lazy and BIND_NOW.
PROGRAMS: Final = {
    "x86_64": (
        "/usr/bin/qemu-system-x86_64",
        "/usr/sbin/mariadbd",
        "/usr/lib/postgresql/15/bin/postgres",
        "/usr/sbin/squid",
        "/usr/bin/git",
        "/usr/bin/python3.11",
        "/usr/sbin/named",
    ),
    "aarch64": (
        "/usr/bin/qemu-system-aarch64",
        "/usr/bin/qemu-system-arm",
        "/usr/bin/qemu-storage-daemon",
        "/usr/bin/python3.11",
        "/usr/bin/perl",
        "/usr/bin/git",
        "/usr/bin/redis-check-rdb",
        "/usr/lib/systemd/systemd",
        "/usr/sbin/nginx",
    ),
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """One object: what the oracle says, and what forkproof says."""

    path: Path
    code: int
    expected: set[Edge]
    found: set[Edge]
    expected_calls: set[tuple[int, int]]
    """(function, target)."""
    found_calls: set[tuple[int, int]]
    named: set[int]
    """Functions of some table."""
    expected_functions: set[int]
    found_functions: set[int]
    expected_stubs: dict[int, str]
    found_stubs: set[int]

    @property
    def missing(self) -> list[Edge]:
        return sorted(self.expected - self.found)

    @property
    def chance(self) -> list[Edge]:
        return sorted(self.found - self.expected)


def compare(path: Path) -> Comparison:
    """Read one object both ways."""
    image = load(path)
    index = index_code(image)
    machine = image.machine.value
    table, listing = objdump.functions(path, machine), objdump.listing(path, machine)
    extents = objdump.extents(table, listing)
    expected = objdump.edges(extents, listing)
    sites = np.array([edge.site for edge in expected], np.int64)
    owners = extents.owners(sites).tolist()
    found = set(_edges(index))
    return Comparison(
        path,
        sum(size for _, size in image.code_ranges),
        expected,
        found,
        {(owner, edge.target) for owner, edge in zip(owners, expected, strict=True)},
        _calls(index),
        set(table.known),
        set(extents.starts.tolist()),
        set(index.start.tolist()),
        {start: name for start, name in listing.stubs.items() if _is_code(name)},
        set(index.stubs.start.tolist()),
    )


def _is_code(label: str) -> bool:
    """Objdump labels the TLS descriptor trampoline of AArch64 as if it were a stub, with a wrong name."""
    return label not in ("*ABS*@plt", "*ABS*+0x4@plt", "_ZSt15__once_callable@plt", "_ZSt11__once_call@plt")


def _edges(index: CodeIndex) -> Iterator[Edge]:
    sites = index.sites
    columns = (sites.direct_site, sites.direct_target, sites.direct_jump)
    return (Edge(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def _calls(index: CodeIndex) -> set[tuple[int, int]]:
    if not len(index.start):
        return set()
    owners = index.start[index.direct_owner].tolist()
    return set(zip(owners, index.sites.direct_target.tolist(), strict=True))


def _objects(machine: str) -> list[Path]:
    """Every object of the programs' closures, once."""
    root = find(SYSROOTS[machine])
    if root is None:
        pytest.skip(f"no sysroot {SYSROOTS[machine]}: make sysroots SYSROOTS={SYSROOTS[machine]}")
    if objdump.tool("objdump", machine) is None:
        pytest.skip(f"no objdump for {machine}: apt-get install binutils-{machine.replace('_', '-')}-linux-gnu")
    found: dict[Path, None] = {}
    sysroot = DirectorySysroot(root)
    for program in PROGRAMS[machine] if IS_WHOLE else PROGRAMS[machine][-_SOME:]:
        if sysroot.resolve(program) is not None:
            closure = load_closure(LoadRequest(sysroot, program))
            found |= dict.fromkeys(item.image.path.resolve() for item in closure.objects)
    return list(found)


@cache
def _compared(machine: str) -> tuple[Comparison, ...]:
    return tuple(compare(path) for path in _objects(machine))


MACHINES = pytest.mark.parametrize("machine", [pytest.param(m, marks=pytest.mark.slow) for m in SYSROOTS])


@MACHINES
def test_enough_code_is_compared(machine: str) -> None:
    assert sum(one.code for one in _compared(machine)) >= LEAST_CODE


@MACHINES
def test_edges_by_site_agree(machine: str) -> None:
    expected = sum(len(one.expected) for one in _compared(machine))
    found = sum(len(one.found) for one in _compared(machine))
    common = sum(len(one.expected & one.found) for one in _compared(machine))
    assert common / expected >= LEAST_RATIO, "recall"
    assert common / found >= LEAST_RATIO, "precision"


@MACHINES
def test_edges_by_function_agree(machine: str) -> None:
    expected = sum(len(one.expected_calls) for one in _compared(machine))
    found = sum(len(one.found_calls) for one in _compared(machine))
    common = sum(len(one.expected_calls & one.found_calls) for one in _compared(machine))
    assert common / expected >= LEAST_RATIO, "recall"
    assert common / found >= LEAST_RATIO, "precision"


@MACHINES
def test_no_object_is_an_exception(machine: str) -> None:
    """Totals must not hide one bad object: nowhere more than the start files' few, or one in a thousand."""
    odd = [
        f"{one.path}: {len(one.missing)} missing, {len(one.chance)} by chance, of {len(one.expected)}"
        for one in _compared(machine)
        if len(one.missing) + len(one.chance) > max(5, len(one.expected) / 1000)
    ]
    assert odd == []


@MACHINES
def test_aarch64_finds_nothing_by_chance(machine: str) -> None:
    if machine == "aarch64":  # every instruction is a word, and decodes exactly
        assert [edge for one in _compared(machine) for edge in one.chance] == []


@MACHINES
def test_every_function_of_a_table_is_known(machine: str) -> None:
    lacking = {one.path.name: one.named - one.found_functions for one in _compared(machine)}
    assert {name: functions for name, functions in lacking.items() if functions} == {}


@MACHINES
def test_functions_are_not_invented(machine: str) -> None:
    """What no table names is called; an x86-64 call may be a chance match, at most once in an object."""
    for one in _compared(machine):
        assert len(one.found_functions - one.expected_functions) <= 1, one.path


@MACHINES
def test_stubs_are_those_that_objdump_labels(machine: str) -> None:
    for one in _compared(machine):
        assert one.found_stubs == set(one.expected_stubs), one.path


# ---- stripped copies ---------------------------------------------------------------------------

_COPIED: Final = ("libc.so.6", "libcrypto.so.3", "libstdc++.so.6", "libglib-2.0.so.0", "python3.11", "git")


def _strip(image: Image, copy: Path) -> None:
    tool = objdump.tool("strip", image.machine.value)
    if tool is None:
        pytest.skip(f"no strip for {image.machine.value}")
    subprocess.run([tool, "--strip-all", "-o", copy, image.path], check=True, capture_output=True)


def _without_sections(image: Image, copy: Path) -> None:
    """No section headers at all: e_shoff, e_shnum and e_shstrndx are 0, as sstrip(1) leaves them."""
    data = bytearray(image.path.read_bytes())
    struct.pack_into("<Q", data, 40, 0)
    struct.pack_into("<HHH", data, 58, 64, 0, 0)
    copy.write_bytes(data)


@pytest.mark.parametrize("name", _COPIED)
@pytest.mark.parametrize("machine", list(SYSROOTS))
def test_stripped_copy_has_the_same_edges(machine: str, name: str, tmp_path: Path) -> None:
    before, after = _copied(machine, name, _strip, tmp_path)
    assert after.start.tolist() == before.start.tolist()
    assert after.stubs.start.tolist() == before.stubs.start.tolist()
    assert after.stubs.slot.tolist() == before.stubs.slot.tolist()
    assert set(_edges(after)) == set(_edges(before))


@pytest.mark.parametrize("name", _COPIED)
@pytest.mark.parametrize("machine", list(SYSROOTS))
def test_copy_without_section_headers_has_the_same_edges(machine: str, name: str, tmp_path: Path) -> None:
    """Read-only data may then share a segment with code: a word of it that looks like a call is one edge more."""
    before, after = _copied(machine, name, _without_sections, tmp_path)
    assert set(before.start.tolist()) <= set(after.start.tolist())
    assert len(after.start) - len(before.start) <= 1 + len(before.start) // 1000
    assert after.stubs.start.tolist() == before.stubs.start.tolist()
    assert set(_edges(before)) <= set(_edges(after))
    assert len(after.sites.direct_site) - len(before.sites.direct_site) <= 1 + len(before.sites.direct_site) // 1000


def _copied(
    machine: str, name: str, change: Callable[[Image, Path], None], directory: Path
) -> tuple[CodeIndex, CodeIndex]:
    path = next((p for p in _candidates(machine, name) if p.exists()), None)
    if path is None:
        pytest.skip(f"no {name} in {SYSROOTS[machine]}")
    image = load(path.resolve())
    copy = directory / name
    change(image, copy)
    return index_code(image), index_code(load(copy))


def _candidates(machine: str, name: str) -> Iterator[Path]:
    root = find(SYSROOTS[machine])
    if root is None:
        pytest.skip(f"no sysroot {SYSROOTS[machine]}: make sysroots SYSROOTS={SYSROOTS[machine]}")
    for folder in (f"usr/lib/{machine}-linux-gnu", "usr/bin"):
        yield root / folder / name


# ---- by hand -----------------------------------------------------------------------------------


def _table(comparisons: Iterable[tuple[str, tuple[Comparison, ...]]]) -> Iterator[str]:
    yield "| machine | objects | code, MB | functions | edges | missing | by chance | recall | precision |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for label, several in comparisons:
        yield _row(f"{label}, by site", several, [(len(c.expected), len(c.missing), len(c.chance)) for c in several])
        by_function = [
            (len(c.expected_calls), len(c.expected_calls - c.found_calls), len(c.found_calls - c.expected_calls))
            for c in several
        ]
        yield _row(f"{label}, by function", several, by_function)


def _row(label: str, several: tuple[Comparison, ...], counts: list[tuple[int, int, int]]) -> str:
    total, missing, chance = (sum(column) for column in zip(*counts, strict=True))
    right = total - missing
    return (
        f"| {label} | {len(several)} | {sum(c.code for c in several) / 1e6:.1f} "
        f"| {sum(len(c.expected_functions) for c in several):,} | {total:,} | {missing} | {chance} "
        f"| {right / total:.3%} | {right / (right + chance):.3%} |"
    )


def _differences(one: Comparison) -> Iterator[str]:
    yield f"{one.path}: {one.code / 1e6:.2f} MB of code, {len(one.expected)} edges"
    yield from (f"    missing {edge.site:#x} -> {edge.target:#x}" for edge in one.missing)
    yield from (f"    chance  {edge.site:#x} -> {edge.target:#x}" for edge in one.chance)
    yield from (f"    unknown function {start:#x}" for start in sorted(one.expected_functions - one.found_functions))
    yield from (f"    invented function {start:#x}" for start in sorted(one.found_functions - one.expected_functions))


def main() -> None:
    """Print the table, or the differences of some files."""
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print("\n".join(_differences(compare(Path(name).resolve()))))
        return
    assert shutil.which("readelf") is not None, "binutils is not installed"
    print("\n".join(_table((machine, _compared(machine)) for machine in SYSROOTS)))


if __name__ == "__main__":
    main()
