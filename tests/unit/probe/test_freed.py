"""A lock is made free in a child alone: in memory of this process, read and written as a tracee's is."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator

import pytest

from forkproof.probe import ptrace
from forkproof.probe.sites import Free, Served, freed, is_free
from forkproof.probe.tracee import Memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mem")

Words = ctypes.c_uint32 * 10
OWNER = 4711


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(os.getpid(), ptrace.native())
    yield made
    made.close()


@pytest.mark.parametrize(
    ("free", "taken", "left"),
    [(Free.ZERO, 2, 0), (Free.POSITIVE, 0, 1), (Free.UNWRITTEN, 0b1011, 0b001)],
    ids=["word", "semaphore", "rwlock"],
)
def test_a_word(memory: Memory, free: Free, taken: int, left: int) -> None:
    lock = Words(taken, 7, 8, 9)
    at = ctypes.addressof(lock)
    assert not is_free(memory, at, 4, free)
    assert freed(memory, at, 4, free, OWNER)
    assert is_free(memory, at, 4, free)
    assert list(lock)[:4] == [left, 7, 8, 9], "what lies behind the word is somebody else's"


@pytest.mark.parametrize(
    ("free", "taken", "left"),
    [(Served(4), (6, 9), (9, 9)), (Served(0), (0x70006, 9), (0x70007, 9))],
    ids=["two words", "halves of one"],
)
def test_a_ticket_lock(memory: Memory, free: Served, taken: tuple[int, int], left: tuple[int, int]) -> None:
    lock = Words(*taken)
    at = ctypes.addressof(lock)
    assert not is_free(memory, at, 4, free)
    assert freed(memory, at, 4, free, OWNER)
    assert is_free(memory, at, 4, free)
    assert tuple(lock)[:2] == left


def test_a_mutex_forgets_its_owner(memory: Memory) -> None:
    lock = Words(2, 1, OWNER, 3, 1)
    assert freed(memory, ctypes.addressof(lock), 4, Free.ZERO, OWNER)
    assert list(lock)[:5] == [0, 0, 0, 2, 1]


def test_what_other_processes_see_is_left_alone(memory: Memory) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as shared:
        lock = Words.from_buffer(shared)
        lock[0] = 1
        assert not freed(memory, ctypes.addressof(lock), 4, Free.ZERO, OWNER)
        assert lock[0] == 1
        del lock


def test_nothing_is_mapped(memory: Memory) -> None:
    assert not freed(memory, 8, 4, Free.ZERO, OWNER)
    assert not memory.set_word(8, 0, 4)
