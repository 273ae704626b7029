"""The locks of Debian's allocators, counted: rows of docs/locks.md whose every lock was looked up in the source."""

from __future__ import annotations

import importlib.util
import sys
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


def test_handlers_that_bind_to_nothing_hold_what_they_would(tables: ModuleType, sysroot_arm64: Path) -> None:
    """The same source on aarch64: the same locks, and nobody to take them."""
    row = tables.row(sysroot_arm64, "bookworm-arm64", "libtcmalloc_minimal.so.4")
    assert (row.handlers, row.found, row.prepared) == ("unbound", 6, 2)
