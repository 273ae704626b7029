"""Paths inside a tree stay inside it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from forkproof.closure import DirectorySysroot
from forkproof.errors import UnreadableFile, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with a file, and beside it one that must never be seen."""
    (tmp_path / "outside").write_text("outside")
    tree = tmp_path / "root"
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "usr/bin").mkdir()
    (tree / "usr/lib/libx.so.1").write_text("inside")
    return tree


def test_absolute_links_are_relative_to_the_tree(root: Path) -> None:
    (root / "lib").symlink_to("/usr/lib")
    assert DirectorySysroot(root).resolve("/lib/libx.so.1") == "/usr/lib/libx.so.1"


def test_dots_cannot_escape(root: Path) -> None:
    (root / "usr/lib/up.so").symlink_to("../../../../outside")
    sysroot = DirectorySysroot(root)
    assert sysroot.resolve("/usr/lib/up.so") is None
    assert sysroot.resolve("/../../usr/lib/libx.so.1") == "/usr/lib/libx.so.1"
    with pytest.raises(FileNotFoundError):
        sysroot.read("/../outside")


def test_dots_after_a_link_leave_the_directory_that_it_leads_to(root: Path) -> None:
    (root / "opt").symlink_to("usr/bin")
    assert DirectorySysroot(root).resolve("/opt/../lib/libx.so.1") == "/usr/lib/libx.so.1"


def test_loops_end(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    assert DirectorySysroot(root).resolve("/a/x") is None


def test_long_chains_resolve_up_to_the_limit_of_the_kernel(root: Path) -> None:
    (root / "l0").symlink_to("usr/lib/libx.so.1")
    for number in range(1, 45):
        (root / f"l{number}").symlink_to(f"l{number - 1}")
    sysroot = DirectorySysroot(root)
    assert sysroot.resolve("/l39") == "/usr/lib/libx.so.1"
    assert sysroot.resolve("/l40") is None


def test_host_is_never_a_fallback(root: Path) -> None:
    assert DirectorySysroot(root).resolve("/etc/passwd") is None


def test_usr_stands_in_for_a_top_directory_that_packages_left_out(root: Path) -> None:
    assert DirectorySysroot(root).resolve("/lib/libx.so.1") == "/usr/lib/libx.so.1"
    (root / "lib").mkdir()
    assert DirectorySysroot(root).resolve("/lib/libx.so.1") is None, "separate directories stay separate"


def test_two_names_of_one_file_have_one_identity(root: Path) -> None:
    (root / "usr/lib/libx.so").symlink_to("libx.so.1")
    os.link(root / "usr/lib/libx.so.1", root / "usr/lib/hard.so")
    sysroot = DirectorySysroot(root)
    identities = {sysroot.identity(f"/usr/lib/{name}") for name in ("libx.so", "libx.so.1", "hard.so")}
    assert len(identities) == 1


def test_target_by_host_path_or_by_path_in_the_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysroot = DirectorySysroot(root)
    for target in (str(root / "usr/lib/libx.so.1"), "/usr/lib/libx.so.1", "usr/lib/libx.so.1"):
        assert sysroot.locate(target) == "/usr/lib/libx.so.1"
    monkeypatch.chdir(root / "usr/lib")
    assert sysroot.locate("libx.so.1") == "/usr/lib/libx.so.1"


def test_target_of_the_host_is_not_taken_from_outside_the_tree(root: Path) -> None:
    with pytest.raises(UnreadableFile, match="neither below") as caught:
        DirectorySysroot(root).locate("/bin/sh")
    assert "find" in caught.value.next_step


def test_a_target_that_is_hidden_or_cannot_be_named_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path.is_symlink` raises for these, or calls them missing, as the version of Python has it."""
    host = DirectorySysroot()
    with pytest.raises(UnreadableFile, match="cannot be looked up: File name too long"):
        host.locate(str(tmp_path / ("a" * 300)))

    def refuse(path: str) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "readlink", refuse)
    for sysroot in (host, DirectorySysroot(tmp_path)):
        with pytest.raises(UnreadableFile, match="cannot be looked up: Permission denied") as caught:
            sysroot.locate("/secret/daemon")
        assert "Run as a user who may" in caught.value.next_step


def test_sysroot_must_be_a_directory(root: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        DirectorySysroot(root / "usr/lib/libx.so.1")


def test_contents_and_names(root: Path) -> None:
    sysroot = DirectorySysroot(root)
    assert sysroot.read("/usr/lib/libx.so.1", 3) == b"ins"
    assert sysroot.names_in("/usr") == ("bin", "lib")
    assert sysroot.names_in("/usr/lib/libx.so.1") == ()


def test_fifo_in_the_tree_does_not_stop_the_analysis(root: Path) -> None:
    os.mkfifo(root / "usr/lib/fifo.so")
    assert DirectorySysroot(root).read("/usr/lib/fifo.so", 20) == b""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="/proc tells what is open")  # noqa: PTH112
def test_a_directory_that_is_read_is_closed_again(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        with pytest.raises(IsADirectoryError):
            DirectorySysroot(root).read("/usr/lib")
    assert len(os.listdir("/proc/self/fd")) < before + 20  # noqa: PTH208
