"""Archives that were made to harm: each is refused with a message, or harmless; none reaches a file of this machine."""

from __future__ import annotations

import io
import lzma
import resource
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from forkproof.artifacts import limits, package, tar
from forkproof.artifacts.limits import DEFAULT, BadArchive, Limits, unpacked
from forkproof.artifacts.open import opened
from forkproof.artifacts.tree import Store, Tree
from tests.support import archives
from tests.support.archives import Hard, Link, Members
from tests.unit.artifacts.test_trees import LIBRARY, TRUE

SMALL = replace(DEFAULT, unpacked=1 << 20, free=1 << 16, kept=1 << 18, text=1 << 16, entries=50, headers=1 << 16)


def read(data: bytes, tmp_path: Path, allowed: Limits = SMALL) -> Tree:
    tree, store = Tree("x.tar"), Store(tmp_path, allowed)
    tar.read_tree(unpacked(io.BytesIO(data), "x.tar", allowed), tree, store)
    return tree


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A tar header that claims what it likes."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = kind
    block[124:136] = f"{size:011o}\0".encode() if size < 8**11 else b"\x80" + struct.pack(">3xQ", size)
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


class TestPaths:
    NAMES = ("../../etc/cron.d/x", "/../x", "a/../../x", "./../x", "usr/../../../x")

    @pytest.mark.parametrize("name", NAMES)
    def test_names_that_lead_out_are_left_out(self, name: str, tmp_path: Path) -> None:
        tree = read(archives.tar({name: TRUE, "good": TRUE}), tmp_path)
        assert set(tree.entries) == {"/", "/good"}
        assert "leads out" in tree.diagnostics[0].message

    def test_writing_through_a_link(self, tmp_path: Path) -> None:
        """The classic: a link to a directory outside, then a file below it."""
        outside = tmp_path / "outside"
        outside.mkdir()
        place = tmp_path / "place"
        place.mkdir()
        tree = read(archives.tar({"a": Link(str(outside)), "a/evil": TRUE}), place)
        assert list(outside.iterdir()) == []
        assert tree.entries["/a/evil"].blob is not None

    def test_a_hard_link_out(self, tmp_path: Path) -> None:
        tree = read(archives.tar({"a": Hard("/etc/passwd"), "b": Hard("../../etc/passwd")}), tmp_path)
        assert set(tree.entries) == {"/"}
        assert len(tree.diagnostics) == 2

    def test_names_on_this_machine_are_numbers(self, tmp_path: Path) -> None:
        read(archives.tar({"x/\udcff;rm -rf": TRUE}), tmp_path)
        assert [each.name for each in tmp_path.iterdir()] == ["1"]

    def test_names_that_are_too_long(self, tmp_path: Path) -> None:
        assert set(read(archives.tar({"d/" * 3000 + "x": TRUE}), tmp_path).entries) == {"/"}

    def test_a_link_of_an_oci_directory(self, tmp_path: Path) -> None:
        files = archives.oci([{"bin/a": TRUE}])
        secret = tmp_path / "secret"
        secret.write_bytes(files["index.json"])
        layout = tmp_path / "layout"
        (layout / "blobs/sha256").mkdir(parents=True)
        (layout / "oci-layout").write_bytes(files["oci-layout"])
        (layout / "index.json").write_bytes(files["index.json"])
        for name in files:
            if name.startswith("blobs"):
                (layout / name).symlink_to(secret)
        with opened([str(layout)], None) as (scope,):
            assert "damaged" in str(scope.errors[0])

    @pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "md5:00", "", "sha256:" + "0" * 63])
    def test_a_digest_is_no_path(self, digest: str, tmp_path: Path) -> None:
        index = f'{{"manifests": [{{"digest": "{digest}"}}]}}'.encode()
        path = tmp_path / "x.tar"
        path.write_bytes(archives.tar({"oci-layout": b"{}", "index.json": index, "blobs/sha256/x": b"x"}))
        with opened([str(path)], None) as (scope,):
            assert "digest" in str(scope.errors[0])


class TestBombs:
    def refused(self, data: bytes, tmp_path: Path, allowed: Limits = SMALL) -> str:
        with pytest.raises(BadArchive) as caught:
            read(data, tmp_path, allowed)
        assert "x.tar" in str(caught.value)
        assert caught.value.exit_code == 3
        return str(caught.value)

    @pytest.mark.parametrize("how", ["gz", "xz", "zst"])
    def test_size(self, how: str, tmp_path: Path) -> None:
        data = archives.compressed(archives.tar({"zeros": bytes(4 << 20)}), how)
        assert "unpack" in self.refused(data, tmp_path)

    def test_ratio(self, tmp_path: Path) -> None:
        allowed = replace(SMALL, unpacked=1 << 40, ratio=20)
        data = archives.compressed(archives.tar({"zeros": bytes(4 << 20)}), "gz")
        assert "20 times" in self.refused(data, tmp_path, allowed)

    def test_count(self, tmp_path: Path) -> None:
        data = archives.tar({f"f{i}": b"" for i in range(60)})
        assert "more than 50 files" in self.refused(data, tmp_path)

    def test_programs(self, tmp_path: Path) -> None:
        data = archives.tar({f"f{i}": b"\x7fELF" + bytes(1 << 17) for i in range(3)})
        assert "programs and libraries" in self.refused(data, tmp_path)

    def test_configuration(self, tmp_path: Path) -> None:
        data = archives.tar({f"etc/f{i}": b"x" * (1 << 15) for i in range(3)})
        assert "configuration" in self.refused(data, tmp_path)

    @pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
    def test_headers(self, kind: bytes, tmp_path: Path) -> None:
        """tarfile reads an extension header into memory, whatever size it claims."""
        data = header("a", 512) + TRUE[:512] + header("name", 1 << 30, kind) + b"x" * (1 << 19)
        assert "headers" in self.refused(data, tmp_path)

    @pytest.mark.parametrize("size", [1 << 20, 1 << 40, (1 << 63) - 1])
    def test_claims(self, size: int, tmp_path: Path) -> None:
        """A member that ends long before it says: no loop over what is not there."""
        assert "damaged" in self.refused(header("a", size) + b"x" * 600, tmp_path)

    def test_sparse(self, tmp_path: Path) -> None:
        block = bytearray(header("hole", 0, b"S"))
        block[483:495] = f"{1 << 30:011o}\0".encode()
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        assert "sparse" in self.refused(bytes(block) + bytes(1024), tmp_path)

    def test_nested_headers(self, tmp_path: Path) -> None:
        chain = b"".join(header("n", 1, b"L") + b"n" + bytes(511) for _ in range(5000))
        allowed = replace(SMALL, unpacked=1 << 30, headers=1 << 30)
        assert "damaged" in self.refused(chain + bytes(1024), tmp_path, allowed)

    def test_a_zstd_window_of_two_gigabytes(self, tmp_path: Path) -> None:
        frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(31 - 10) << 3]) + b"\x01\x00\x00"
        assert "damaged" in self.refused(frame, tmp_path)

    def test_memory_is_bounded(self, tmp_path: Path) -> None:
        """A tenth of a gigabyte of zeros in four kilobytes."""
        data = archives.compressed(archives.tar({"zeros": bytes(100 << 20)}), "zst")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read(data, tmp_path, replace(DEFAULT, ratio=1 << 30))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


class TestDamage:
    @pytest.mark.parametrize("how", ["", "gz", "xz", "zst"])
    def test_every_truncation_is_an_error_or_a_whole_tree(self, how: str, tmp_path: Path) -> None:
        data = archives.compressed(archives.tar({"a": TRUE, "b": LIBRARY}), how)
        for end in range(0, len(data), max(1, len(data) // 40)):
            place = tmp_path / str(end)
            place.mkdir()
            try:
                tree = read(data[:end], place, DEFAULT)
            except BadArchive:
                continue
            assert not tree.entries.keys() - {"/", "/a", "/b"}

    def test_what_follows_the_last_member(self, tmp_path: Path) -> None:
        good = archives.tar({"a": TRUE})
        with pytest.raises(BadArchive, match="follows the last member"):
            read(good + b"x" * 20480, tmp_path, DEFAULT)

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"!<arch>\n" + b"debian-binary   " + b"-60".rjust(42) + b"`\n", "member header"),
            (b"!<arch>\n" + b"debian-binary   " + b"x" * 42 + b"`\n", "member header"),
            (b"!<arch>\n", "no data.tar"),
            (b"!<arch>\ndebian-binary", "no data.tar"),
        ],
    )
    def test_deb(self, data: bytes, said: str, tmp_path: Path) -> None:
        with pytest.raises(BadArchive, match=said):
            package.read_deb(io.BytesIO(data), Tree("x.deb"), Store(tmp_path))

    def test_rpm(self, tmp_path: Path) -> None:
        good = archives.rpm({"/usr/bin/a": TRUE}, "gz")
        for end in range(0, len(good), 997):
            with pytest.raises(BadArchive):
                package.read_rpm(io.BytesIO(good[:end]), Tree("x.rpm"), Store(tmp_path))

    def test_rpm_with_files_above_four_gigabytes(self, tmp_path: Path) -> None:
        body = archives.cpio({"/a": b"x"}).replace(b"070701", b"07070X", 1)
        whole = archives.rpm({}, "gz")
        start = whole.index(b"\x1f\x8b")
        with pytest.raises(BadArchive, match="4 GiB"):
            package.read_rpm(io.BytesIO(whole[:start] + body), Tree("x.rpm"), Store(tmp_path))

    @pytest.mark.parametrize(
        "raised",
        [EOFError(), zlib.error("x"), lzma.LZMAError("x"), tarfile.ReadError("x"), RecursionError(), OSError(5, "x")],
    )
    def test_whatever_a_decoder_raises_names_the_archive(self, raised: Exception) -> None:
        with pytest.raises(BadArchive, match=r"x\.tar: damaged"), limits.damaged("x.tar"):
            raise raised

    def test_one_bad_archive_costs_only_itself(self, tmp_path: Path) -> None:
        bad, good = tmp_path / "bad.deb", tmp_path / "good.deb"
        bad.write_bytes(archives.deb({"/usr/bin/a": TRUE})[:-200])
        good.write_bytes(archives.deb({"/usr/bin/b": TRUE}))
        with opened([str(bad), str(good)], None) as (scope,):
            assert [start.name for start in scope.starts] == ["/usr/bin/b"]
            assert str(bad) in str(scope.errors[0])

    def test_a_manifest_that_refers_to_itself(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tar"
        path.write_bytes(archives.tar({"manifest.json": b'[{"Layers": ["manifest.json"]}]', "a/layer.tar": b"x"}))
        with opened([str(path)], None) as (scope,):
            assert "damaged" in str(scope.errors[0])


def test_a_full_disk_is_not_a_damaged_archive(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match=r"cannot be unpacked.*\n.*TMPDIR"):
        read(archives.tar({"a": TRUE}), tmp_path / "gone", DEFAULT)


def test_a_member_that_is_a_device_is_no_file(tmp_path: Path) -> None:
    members: Members = {"dev/null": archives.Device(), "bin/a": TRUE}
    assert {path for path, _ in read(archives.tar(members), tmp_path, DEFAULT).files()} == {"/bin/a"}
