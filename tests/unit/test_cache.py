"""The cache of results: what it keeps is what it gives, and what is not an entry is nothing."""

from __future__ import annotations

import hashlib
import os
import stat
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forkproof import cache
from forkproof.cache import Cache, Result
from forkproof.closure import DirectorySysroot, LoadRequest, load
from forkproof.options import ScanOptions
from forkproof.report.json import in_order
from tests.unit.cli.conftest import run
from tests.unit.report import samples

KEY = "ab" * 32
RESULT: Result = (samples.TARGET, in_order((samples.INHERITED, samples.UNBOUND)), list(samples.incident().diagnostics))


@pytest.fixture
def kept(tmp_path: Path) -> Cache:
    found = Cache(tmp_path)
    found.put(KEY, RESULT)
    return found


def entry(kept: Cache) -> Path:
    ((path, _, _),) = kept.entries()
    return path


def test_gives_what_it_kept(kept: Cache) -> None:
    assert kept.get(KEY) == RESULT
    assert kept.get("cd" * 32) is None


class TestDamage:
    def test_every_byte_counts(self, kept: Cache) -> None:
        whole = entry(kept).read_bytes()
        for position in range(0, len(whole), 7):
            entry(kept).write_bytes(whole[:position] + bytes([whole[position] ^ 0x20]) + whole[position + 1 :])
            assert kept.get(KEY) is None, position

    def test_every_length_counts(self, kept: Cache) -> None:
        whole = entry(kept).read_bytes()
        for end in range(0, len(whole), 11):
            entry(kept).write_bytes(whole[:end])
            assert kept.get(KEY) is None, end

    def test_an_entry_under_another_key(self, kept: Cache) -> None:
        other = kept.root / "results" / "cd"
        other.mkdir()
        (other / ("cd" * 32)).write_bytes(entry(kept).read_bytes())
        assert kept.get("cd" * 32) is None

    def test_a_bomb_with_a_good_checksum(self, kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "_LARGEST", 1000)
        assert kept.get(KEY) is None

    def test_no_entry_is_run(self, kept: Cache) -> None:
        body = zlib.compress(b'{"version": 1, "__reduce__": ["os.system", "false"]}')
        digest = hashlib.sha256(KEY.encode() + body).hexdigest().encode()
        entry(kept).write_bytes(b"forkproof-result-1 " + digest + b"\n" + body)
        assert kept.get(KEY) is None

    def test_it_is_written_again(self, kept: Cache) -> None:
        entry(kept).write_bytes(b"")
        kept.put(KEY, RESULT)
        assert kept.get(KEY) == RESULT


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_no_permission_is_no_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    Cache(tmp_path / "x").put(KEY, RESULT)


def test_a_file_in_its_place_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    Cache(tmp_path).put(KEY, RESULT)
    assert Cache(tmp_path).get(KEY) is None


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    found = Cache(tmp_path)

    def write_and_read(_: int) -> Result | None:
        found.put(KEY, RESULT)
        return found.get(KEY)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write_and_read, range(64))) == [RESULT] * 64
    assert len(found.entries()) == 1


def test_others_cannot_read_it(kept: Cache) -> None:
    assert stat.S_IMODE(entry(kept).parent.stat().st_mode) == 0o700


class TestKey:
    def of(self, root: Path, options: ScanOptions = ScanOptions()) -> str:  # noqa: B008 - frozen
        sysroot = DirectorySysroot(root)
        return cache.key(load(LoadRequest(sysroot, "/prog", preload=options.preload)), sysroot, options)

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "prog").write_bytes(Path("/bin/true").read_bytes())
        return tmp_path

    def test_the_same_twice(self, root: Path) -> None:
        assert self.of(root) == self.of(root)

    def test_content(self, root: Path) -> None:
        before = self.of(root)
        (root / "prog").write_bytes(Path("/bin/true").read_bytes() + b"\0")
        assert self.of(root) != before

    def test_options(self, root: Path) -> None:
        assert self.of(root) != self.of(root, ScanOptions(also=("x",)))

    def test_what_is_missing(self, root: Path) -> None:
        assert self.of(root) != self.of(root, ScanOptions(preload=("x",)))

    def test_a_library_that_comes(self, root: Path) -> None:
        before = self.of(root)
        (root / "lib").mkdir()
        for library in Path("/lib/x86_64-linux-gnu").glob("libc.so.6"):
            (root / "lib/libc.so.6").write_bytes(library.read_bytes())
            assert self.of(root) != before


class TestCommand:
    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_info_and_clear(self, tmp_path: Path) -> None:
        assert "0 results" in run("cache", "info").output
        Cache(tmp_path / "forkproof").put(KEY, RESULT)
        assert "1 results" in run("cache", "info").output
        assert "1 results removed" in run("cache", "clear").output
        assert "0 results" in run("cache", "info").output

    def test_prune(self, tmp_path: Path) -> None:
        found = Cache(tmp_path / "forkproof")
        for number in range(4):
            found.put(f"{number}" * 64, RESULT)
            used = time.time() - 86400 * (10 - number)
            os.utime(found._path("results", f"{number}" * 64), (used, used))
        assert "1 results removed" in run("cache", "prune", "--max-age", "9.5").output
        found.get("1" * 64)  # used now: the next to go is another
        size = found.entries()[0][1]
        assert "2 results removed" in run("cache", "prune", "--max-size", str(size)).output
        assert found.get("1" * 64) == RESULT
        assert run("cache", "prune", "--max-size", "1X").exit_code == 2
