"""Archives become trees: the same files from every container, links as they are, layers on top of one another."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from forkproof.artifacts.open import opened
from forkproof.artifacts.tree import Kind
from forkproof.artifacts.world import World
from tests.support import archives
from tests.support.archives import Device, Hard, Link, Members

TRUE = Path("/bin/true").read_bytes()
LIBRARY = next(Path("/lib").glob("*-linux-gnu/libdl.so.2")).read_bytes()

FILES: Members = {
    "/usr": None,
    "/usr/bin": None,
    "/usr/bin/prog": TRUE,
    "/usr/bin/other": Hard("/usr/bin/prog"),
    "/usr/bin/link": Link("prog"),
    "/usr/lib/libx.so.1": TRUE + b"x",
    "/usr/lib/libx.so": Link("/usr/lib/libx.so.1"),
    "/etc/ld.so.preload": b"/usr/lib/libx.so\n",
    "/dev/null": Device(),
    "/usr/share/doc": b"long text " * 1000,
}


def in_rpm_order(members: Members) -> Members:
    """rpm puts the content with the last of several hard links."""
    turned = dict(members)
    turned["/usr/bin/prog"], turned["/usr/bin/other"] = Hard("/usr/bin/other"), TRUE
    return turned


def layout(directory: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def relative(members: Members) -> Members:
    """Without the leading slash, as tar writes names."""
    return {
        path[1:]: Hard(content.target[1:]) if isinstance(content, Hard) else content
        for path, content in members.items()
    }


def from_here(members: Members) -> Members:
    """As dpkg-deb writes names: ./usr."""
    return {p: Hard(f".{c.target}") if isinstance(c, Hard) else c for p, c in members.items()}


def _forms() -> Iterator[tuple[str, bytes | dict[str, bytes]]]:
    """Each container: a file, or the files of a directory."""
    for how in ("", "gz", "xz", "zst"):
        yield f"deb-{how or 'plain'}", archives.deb(from_here(FILES), how)
        yield f"tar-{how or 'plain'}", archives.compressed(archives.tar(relative(FILES)), how)
    for how in ("gz", "xz", "zst"):
        yield f"rpm-{how}", archives.rpm(in_rpm_order(FILES), how)
    yield "tar-pax", archives.tar(relative(FILES), tarfile.PAX_FORMAT)
    yield "oci", archives.oci([relative(FILES)])
    yield "oci-zst", archives.oci([relative(FILES)], "zst")
    yield "oci-tar", archives.tar(archives.oci([relative(FILES)]))
    yield "docker", archives.docker([relative(FILES)])
    yield "docker-gz", archives.compressed(archives.docker([relative(FILES)]), "gz")


FORMS = dict(_forms())


@pytest.fixture(params=FORMS)
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "artifact"
    form = FORMS[request.param]
    layout(path, form) if isinstance(form, dict) else path.write_bytes(form)
    return str(path)


def test_every_container_has_the_same_files(artifact: str) -> None:
    with opened([artifact], None) as (scope,):
        world = scope.sysroot
        assert isinstance(world, World)
        assert scope.errors == ()
        assert world.read("/usr/bin/prog") == TRUE
        assert world.read("/usr/lib/libx.so", 4) == b"\x7fELF"
        assert world.resolve("/usr/bin/link") == "/usr/bin/prog"
        assert world.identity("/usr/bin/other") == world.identity("/usr/bin/link") != world.identity("/usr/lib/libx.so")
        assert world.read("/etc/ld.so.preload") == b"/usr/lib/libx.so\n"
        assert world.read("/usr/share/doc", 8) == b"long tex"
        device = world.entry("/dev/null")
        assert device is not None
        assert device.kind is Kind.OTHER
        assert set(world.names_in("/usr/bin")) == {"link", "other", "prog"}
        assert [start.name for start in scope.starts][:1] in (["/usr/bin/other"], ["/usr/bin/prog"])


def test_nothing_is_left_behind(artifact: str) -> None:
    with opened([artifact], None) as (scope,):
        place = scope.sysroot.host_path("/usr/bin/prog")
        assert place.exists()
    assert not place.parent.exists()


def test_a_device_is_never_opened(artifact: str) -> None:
    with opened([artifact], None) as (scope,), pytest.raises(OSError, match="device"):
        scope.sysroot.read("/dev/null")


class TestLayers:
    LOWER: ClassVar[Members] = {
        "bin/a": TRUE,
        "bin/b": TRUE + b"b",
        "opt/x/1": TRUE + b"1",
        "opt/x/2": TRUE + b"2",
        "opt/y/1": TRUE + b"3",
        "lib": Link("usr/lib"),
    }

    def paths(self, tmp_path: Path, *layers: Members) -> set[str]:
        path = tmp_path / "image.tar"
        path.write_bytes(archives.tar(archives.oci([self.LOWER, *layers])))
        with opened([str(path)], None) as (scope,):
            return {start.name for start in scope.starts}

    def test_a_whiteout_removes_from_below(self, tmp_path: Path) -> None:
        assert "/bin/a" not in self.paths(tmp_path, {"bin/.wh.a": b""})
        assert "/opt/x/1" not in self.paths(tmp_path, {"opt/.wh.x": b""})

    def test_whiteouts_apply_to_lower_layers_only(self, tmp_path: Path) -> None:
        found = self.paths(
            tmp_path, {"opt/x/3": TRUE + b"4", "opt/x/.wh..wh..opq": b"", "bin/a": TRUE, "bin/.wh.a": b""}
        )
        assert {"/opt/x/3", "/bin/a", "/opt/y/1"} <= found
        assert not {"/opt/x/1", "/opt/x/2"} & found

    def test_a_later_layer_wins(self, tmp_path: Path) -> None:
        path = tmp_path / "image.tar"
        path.write_bytes(archives.docker([self.LOWER, {"bin/a": TRUE + b"new"}]))
        with opened([str(path)], None) as (scope,):
            assert scope.sysroot.read("/bin/a") == TRUE + b"new"

    def test_a_file_in_place_of_a_directory(self, tmp_path: Path) -> None:
        found = self.paths(tmp_path, {"opt/x": TRUE + b"5"})
        assert "/opt/x" in found
        assert "/opt/x/1" not in found

    def test_a_hard_link_to_a_lower_layer(self, tmp_path: Path) -> None:
        path = tmp_path / "image.tar"
        path.write_bytes(archives.docker([self.LOWER, {"bin/c": Hard("bin/a")}]))
        with opened([str(path)], None) as (scope,):
            assert scope.sysroot.read("/bin/c") == TRUE

    def test_each_image_is_a_world(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one.tar", tmp_path / "two.tar"
        one.write_bytes(archives.docker([{"bin/a": TRUE}]))
        two.write_bytes(archives.docker([{"bin/a": TRUE + b"2"}]))
        with opened([str(one), str(two)], None) as scopes:
            assert [scope.sysroot.read("/bin/a") for scope in scopes] == [TRUE, TRUE + b"2"]
            assert [start.prefix for scope in scopes for start in scope.starts] == [
                f"{one} (app:1):",
                f"{two} (app:1):",
            ]

    def test_other_machines_are_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "image.tar"
        path.write_bytes(archives.tar(archives.oci([self.LOWER], machine="s390x")))
        with opened([str(path)], None) as (scope,):
            assert "holds no image for linux/amd64" in str(scope.errors[0])


class TestOneWorld:
    def test_packages_before_the_sysroot(self, tmp_path: Path) -> None:
        package, root = tmp_path / "x.deb", tmp_path / "root"
        package.write_bytes(archives.deb({"/lib/libx.so.1": LIBRARY + b"new", "/usr/bin/prog": TRUE}))
        (root / "usr/lib").mkdir(parents=True)
        (root / "lib").symlink_to("usr/lib")
        (root / "usr/lib/libx.so.1").write_bytes(LIBRARY + b"old")
        (root / "usr/lib/liby.so.1").write_bytes(LIBRARY + b"y")
        with opened([str(package)], root) as (scope,):
            world = scope.sysroot
            assert world.resolve("/lib/libx.so.1") == "/usr/lib/libx.so.1"
            assert world.read("/usr/lib/libx.so.1") == LIBRARY + b"new"
            assert world.read("/lib/liby.so.1") == LIBRARY + b"y"
            assert world.names_in("/lib") == ("libx.so.1", "liby.so.1")
            assert [start.name for start in scope.starts] == ["/usr/bin/prog"]

    def test_packages_without_a_base_are_merged(self, tmp_path: Path) -> None:
        package = tmp_path / "x.deb"
        package.write_bytes(archives.deb({"/lib/libx.so.1": LIBRARY, "/usr/lib/liby.so.1": LIBRARY + b"y"}))
        with opened([str(package)], None) as (scope,):
            names = scope.sysroot.names_in("/usr/lib")
            assert names == scope.sysroot.names_in("/lib") == ("libx.so.1", "liby.so.1")

    def test_the_host_is_never_behind(self, tmp_path: Path) -> None:
        package = tmp_path / "x.deb"
        package.write_bytes(archives.deb({"/usr/bin/prog": TRUE}))
        with opened([str(package)], None) as (scope,):
            assert scope.sysroot.resolve("/etc/passwd") is None

    def test_links_stay_inside(self, tmp_path: Path) -> None:
        package = tmp_path / "x.deb"
        links: Members = {
            "/a": Link("/etc/passwd"),
            "/b": Link("../../../../etc/passwd"),
            "/c": Link("c"),
            "/d": Link("/"),
        }
        package.write_bytes(archives.deb({**links, "/usr/bin/prog": TRUE}))
        with opened([str(package)], None) as (scope,):
            assert [scope.sysroot.resolve(path) for path in ("/a", "/b", "/c")] == [None, None, None]
            assert scope.sysroot.resolve("/d/d/d/usr/bin/prog") == "/usr/bin/prog"

    def test_a_file_beside_packages(self, tmp_path: Path) -> None:
        package, program = tmp_path / "x.deb", tmp_path / "prog"
        package.write_bytes(archives.deb({"/usr/lib/libx.so.1": LIBRARY}))
        program.write_bytes(TRUE)
        with opened([str(package), str(program)], None) as (scope,):
            assert [start.name for start in scope.starts] == [str(program)]
            assert scope.sysroot.resolve("/usr/lib/libx.so.1")

    def test_only(self, tmp_path: Path) -> None:
        package = tmp_path / "x.deb"
        package.write_bytes(archives.deb({"/usr/bin/a": TRUE, "/usr/sbin/b": TRUE + b"b"}))
        with opened([str(package)], None, ["/usr/sbin/*"]) as (scope,):
            assert [start.name for start in scope.starts] == ["/usr/sbin/b"]


class TestDirectories:
    def test_a_root_is_its_own_sysroot(self, tmp_path: Path) -> None:
        (tmp_path / "usr/bin").mkdir(parents=True)
        (tmp_path / "usr/bin/prog").write_bytes(TRUE)
        (tmp_path / "usr/bin/text").write_text("no program")
        with opened([str(tmp_path)], None) as (scope,):
            assert (scope.label, [start.name for start in scope.starts]) == (str(tmp_path), ["/usr/bin/prog"])

    def test_another_is_a_part_of_this_machine(self, tmp_path: Path) -> None:
        (tmp_path / "prog").write_bytes(TRUE)
        with opened([str(tmp_path)], None) as (scope,):
            assert (scope.label, [start.name for start in scope.starts]) == ("/", [f"{tmp_path}/prog"])

    def test_or_of_the_sysroot_that_it_lies_in(self, tmp_path: Path) -> None:
        (tmp_path / "usr/bin").mkdir(parents=True)
        (tmp_path / "usr/bin/prog").write_bytes(TRUE)
        with opened([str(tmp_path / "usr/bin")], tmp_path) as (scope,):
            assert [start.name for start in scope.starts] == ["/usr/bin/prog"]

    def test_or_stands_before_the_sysroot(self, tmp_path: Path) -> None:
        out, root = tmp_path / "out", tmp_path / "root"
        out.mkdir()
        (root / "usr/lib").mkdir(parents=True)
        (out / "prog").write_bytes(TRUE)
        with opened([str(out)], root) as (scope,):
            assert [start.name for start in scope.starts] == ["/prog"]
            assert scope.sysroot.resolve("/usr/lib") == "/usr/lib"

    def test_a_build_root_stands_before_the_sysroot_that_it_lies_in(self, tmp_path: Path) -> None:
        (tmp_path / "build/usr/bin").mkdir(parents=True)
        (tmp_path / "build/usr/bin/prog").write_bytes(TRUE)
        (tmp_path / "usr/lib").mkdir(parents=True)
        with opened([str(tmp_path / "build")], tmp_path) as (scope,):
            assert [start.name for start in scope.starts] == ["/usr/bin/prog"]
            assert scope.sysroot.resolve("/usr/lib") == "/usr/lib"

    def test_an_empty_one_is_an_error(self, tmp_path: Path) -> None:
        with opened([str(tmp_path)], None) as (scope,):
            assert "holds no ELF program" in str(scope.errors[0])
