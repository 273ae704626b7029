"""The locks of Debian's allocators, counted: rows of docs/locks.md whose every lock was looked up in the source."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.real
TOOL = Path(__file__).parents[2] / "tools/lock_tables.py"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock_tables", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_minimal_flavour(tables: ModuleType, sysroot_amd64: Path) -> None:
    """Held: pageheap_lock and the central lists. Gated by the first: the metadata allocator's and the system
    allocator's. Left: the new handler's and the logger's, which are rare."""
    row = tables.row(sysroot_amd64, "bookworm-amd64", "libtcmalloc_minimal.so.4")
    assert (row.handlers, row.found, row.prepared, row.gated, row.left, row.rare) == ("effective", 6, 2, 2, 2, 2)


def test_full_flavour(tables: ModuleType, sysroot_amd64: Path) -> None:
    row = tables.row(sysroot_amd64, "bookworm-amd64", "libtcmalloc.so.4")
    assert (row.handlers, row.prepared, row.left, row.rare, row.unresolved) == ("effective", 2, 4, 4, 0)


@pytest.mark.parametrize(
    ("system", "left", "open_"),
    [("bullseye-amd64", 7, 2), ("bookworm-amd64", 8, 2), ("trixie-amd64", 14, 3)],
)
def test_debug_flavour(tables: ModuleType, sysroot: Callable[[str], Path], system: str, left: int, open_: int) -> None:
    """MallocBlock::alloc_map_lock_ and free_queue_lock_ are taken by every call, and no handler takes them.

    In 2.16 the table of threads is the third."""
    row = tables.row(sysroot(system), system, "libtcmalloc_debug.so.4")
    assert (row.handlers, row.left, row.left - row.rare) == ("incomplete", left, open_)


@pytest.mark.parametrize("system", ["trixie-amd64", "trixie-arm64"])
@pytest.mark.parametrize("library", ["libtcmalloc_minimal.so.4", "libtcmalloc.so.4"])
def test_2_16_leaves_the_table_of_threads(
    tables: ModuleType, sysroot: Callable[[str], Path], system: str, library: str
) -> None:
    """SlowTLS::lock_, which a thread's first allocation takes; 2.17 has it in its handlers (8560276). All else that is
    left is rare: metadata_alloc_lock is taken without pageheap_lock only until TLS is ready."""
    root = sysroot(system)
    lines = list(tables.describe(tables.analysed(root, tables.path_of(system, library))))
    often = [line.split("; ")[1] for line in lines if line.startswith("uncovered") and "; open: " in line]
    assert often == ["tcmalloc::SlowTLS::lock_"]


def test_a_lock_behind_an_array_is_no_element_of_it(tables: ModuleType, sysroot: Callable[[str], Path]) -> None:
    """emergency_malloc_lock of 2.16 lies 134 steps behind the first of 128 central lists: prepare does not hold it."""
    root = sysroot("trixie-amd64")
    lines = list(tables.describe(tables.analysed(root, tables.path_of("trixie-amd64", "libtcmalloc.so.4"))))
    assert any(line.startswith("uncovered; libtcmalloc.so.4+0x1f41c0; rare: only for one value") for line in lines)


def test_handlers_that_bind_to_nothing_hold_what_they_would(tables: ModuleType, sysroot_arm64: Path) -> None:
    """The same source on aarch64: the same locks, and nobody to take them."""
    row = tables.row(sysroot_arm64, "bookworm-arm64", "libtcmalloc_minimal.so.4")
    assert (row.handlers, row.found, row.prepared) == ("unbound", 6, 2)
