"""Artifacts that hold the same paths, and layers that keep /lib in different places: nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from forkproof.artifacts import Scope
from forkproof.artifacts.open import opened
from forkproof.artifacts.tree import Entry, Kind, Tree
from forkproof.artifacts.world import DirectoryLayer, TreeLayer, World
from tests.support import archives
from tests.support.archives import Link, Members

TRUE = Path("/bin/true").read_bytes()
LIBRARY = next(Path("/lib").glob("*-linux-gnu/libdl.so.2")).read_bytes()
OLD, NEW = TRUE + b"old", TRUE + b"new"

# Where systems keep their libraries.


def tree(paths: str, *, is_part: bool = False) -> TreeLayer:
    """Files by path; "/a>b" is a link."""
    made = Tree("t")
    for path in paths.split():
        name, is_link, target = path.partition(">")
        entry = Entry(Kind.LINK, link=target) if is_link else Entry(Kind.FILE, data=path.encode(), is_whole=True)
        made.add(name, entry)
    return TreeLayer(made, is_part=is_part)


FORMS = {
    "link": "/lib>usr/lib /lib64>usr/lib64 /usr/lib/NAME /usr/lib64/NAME",
    "directory": "/lib/NAME /lib64/NAME /usr/lib/other-NAME",
    "absolute link": "/lib>/usr/lib /lib64>/usr/lib64 /usr/lib/NAME /usr/lib64/NAME",
    "lib64 in lib": "/lib>usr/lib /lib64>usr/lib /usr/lib64>lib /usr/lib/NAME",
}


@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize(("front", "behind"), list(itertools.product(FORMS, FORMS)))
def test_directories_and_links_meet(front: str, behind: str, is_part: bool) -> None:
    layers = [tree(FORMS[front].replace("NAME", "a"), is_part=is_part), tree(FORMS[behind].replace("NAME", "b"))]
    world = World("w", layers)
    for path in ("/lib/a", "/lib/b", "/lib64/a", "/lib64/b"):
        assert world.resolve(path) is not None, path
        assert world.read(path)
    assert {"a", "b"} <= set(world.names_in("/lib")) & set(world.names_in("/lib64"))
    is_merged = {front, behind} != {"directory"}
    assert (world.resolve("/usr/lib/b") is not None) is is_merged


@pytest.mark.parametrize("place", ["/lib", "/usr/lib"])
@pytest.mark.parametrize("behind", FORMS)
def test_a_part_is_installed_where_the_system_keeps_its_libraries(place: str, behind: str) -> None:
    world = World("w", [tree(f"{place}/b", is_part=True), tree(FORMS[behind].replace("NAME", "b"))])
    assert world.read("/lib/b") == world.read("/usr/lib/b") == f"{place}/b".encode()


def test_a_system_is_taken_as_it_is() -> None:
    world = World("w", [tree("/lib/a /usr/lib/b /usr/bin/x>/bin/x /bin/x")])
    assert (world.resolve("/usr/lib/a"), world.resolve("/lib/b")) == (None, None)
    assert world.resolve("/usr/bin/x") == "/bin/x"


def test_a_link_to_its_own_name_before_both_were_one() -> None:
    world = World("w", [tree("/bin>usr/bin"), tree("/usr/bin/x>/bin/x /bin/x /bin/y")])
    assert world.resolve("/usr/bin/x") == world.resolve("/bin/x") == "/usr/bin/x"
    assert world.read("/bin/x") == b"/bin/x"


def test_programs_in_sbin_that_is_a_link() -> None:
    world = World("w", [tree("/usr/sbin/a", is_part=True), tree("/sbin>usr/sbin /usr/sbin>bin /usr/bin/b")])
    assert world.resolve("/sbin/a") == world.resolve("/usr/sbin/a") == "/usr/bin/a"
    assert set(world.names_in("/usr/sbin")) == {"a", "b"}


def test_links_that_lead_nowhere_end() -> None:
    world = World("w", [tree("/lib>lib64 /lib64>lib"), tree("/lib/a /lib64/b")])
    assert world.resolve("/lib/a") is None


def test_a_directory_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "lib/x").mkdir(parents=True)
    (tmp_path / "lib/x/liba.so").write_bytes(LIBRARY)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/ld.so").symlink_to("/lib/x/liba.so")
    for package in ("/usr/lib/y", "/lib/y", "/usr/lib/x/y", "/lib>usr/lib /usr/lib/y"):
        world = World("w", [tree(package, is_part=True), DirectoryLayer(tmp_path, is_part=False)])
        assert world.read("/lib64/ld.so") == LIBRARY, package


# Artifacts that hold the same paths.


def deb(place: Path, members: Members) -> str:
    place.write_bytes(archives.deb(members))
    return str(place)


def made(form: str, place: Path, members: Members) -> str:
    """A package, or a directory."""
    if form == "deb":
        return deb(place, members)
    for path, content in members.items():
        where = place / path[1:]
        where.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            where.symlink_to(content.target)
        elif isinstance(content, bytes):
            where.write_bytes(content)
    return str(place)


def told(scopes: Sequence[Scope]) -> list[tuple[str, bytes]]:
    """Every target, and the last bytes of what is scanned."""
    found = []
    for scope in scopes:
        for start in scope.starts:
            path = scope.sysroot.host_path(scope.sysroot.locate(start.name))
            found.append((f"{start.prefix}{start.name}", path.read_bytes()[-3:]))
    return found


@pytest.fixture(params=["deb", "directory"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system to stand behind."""
    (tmp_path / "root/usr/lib").mkdir(parents=True)
    (tmp_path / "root/usr/lib/libz.so.1").write_bytes(LIBRARY + b"sys")
    return tmp_path / "root"


def test_each_program_is_scanned_from_its_own_artifact(form: str, tmp_path: Path, root: Path) -> None:
    one = made(form, tmp_path / "one", {"/usr/sbin/d": OLD})
    two = made(form, tmp_path / "two", {"/usr/sbin/d": NEW, "/usr/sbin/e": TRUE})
    with opened([one, two], root) as scopes:
        expected = [(f"{one}:/usr/sbin/d", b"old"), (f"{two}:/usr/sbin/d", b"new"), ("/usr/sbin/e", TRUE[-3:])]
        assert told(scopes) == expected
        (warning,) = [note.message for scope in scopes for note in scope.diagnostics if note.level == "warning"]
        assert f"holds /usr/sbin/d otherwise than {one}" in warning
    with opened([two, one], root) as scopes:
        assert sorted(told(scopes)) == sorted(expected)


def test_libraries_of_the_own_artifact_come_first(form: str, tmp_path: Path, root: Path) -> None:
    one = made(form, tmp_path / "one", {"/usr/bin/a": OLD, "/usr/lib/libx.so.1": Link("libx.so.1.1")})
    members: Members = {
        "/usr/bin/b": NEW,
        "/usr/lib/libx.so.1": Link("libx.so.1.2"),
        "/usr/lib/libx.so.1.2": LIBRARY + b"two",
    }
    two = made(form, tmp_path / "two", members)
    three = made(form, tmp_path / "three", {"/usr/bin/c": TRUE, "/usr/lib/libx.so.1.1": LIBRARY + b"one"})
    with opened([one, two, three], root) as scopes:
        libraries = {s.name: scope.sysroot.read("/usr/lib/libx.so.1")[-3:] for scope in scopes for s in scope.starts}
        assert libraries == {"/usr/bin/a": b"one", "/usr/bin/b": b"two", "/usr/bin/c": b"one"}
        assert all(scope.sysroot.read("/usr/lib/libz.so.1")[-3:] == b"sys" for scope in scopes)


def test_what_is_the_same_in_both_is_scanned_once(form: str, tmp_path: Path, root: Path) -> None:
    one, two = (made(form, tmp_path / name, {"/usr/sbin/d": OLD, "/usr/doc": b"x"}) for name in ("one", "two"))
    with opened([one, two], root) as (scope,):
        assert told([scope]) == [("/usr/sbin/d", b"old")]
        assert scope.diagnostics == ()


def test_however_it_is_spelled_a_program_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "daemon").write_bytes(OLD)
    (tmp_path / "link").symlink_to("daemon")
    monkeypatch.chdir(tmp_path)
    with opened(["daemon", "./daemon", str(tmp_path / "daemon"), "link", "none"], None) as (scope,):
        assert [start.name for start in scope.starts] == ["daemon", "link", "none"]
    with opened([str(tmp_path), "daemon", "link"], None) as (scope,):
        assert [Path(start.name).name for start in scope.starts] == ["daemon", "link"]


def test_texts_that_nothing_reads_may_differ(tmp_path: Path) -> None:
    one = deb(tmp_path / "one", {"/usr/bin/a": OLD, "/usr/share/doc/x/changelog.gz": b"one"})
    two = deb(tmp_path / "two", {"/usr/bin/b": NEW, "/usr/share/doc/x/changelog.gz": b"two"})
    with opened([one, two], None) as (scope,):
        assert scope.diagnostics == ()


def test_a_package_of_each_layout_holds_the_same_path(tmp_path: Path) -> None:
    one, two = deb(tmp_path / "one", {"/sbin/d": OLD}), deb(tmp_path / "two", {"/usr/sbin/d": NEW})
    with opened([one, two], None) as scopes:
        assert told(scopes) == [(f"{one}:/usr/sbin/d", b"old"), (f"{two}:/usr/sbin/d", b"new")]


def test_a_package_replaces_a_program_of_the_image(tmp_path: Path) -> None:
    image = tmp_path / "image.tar"
    image.write_bytes(archives.docker([{"usr/sbin/d": OLD, "usr/sbin/e": TRUE}]))
    package = deb(tmp_path / "new", {"/usr/sbin/d": NEW})
    with opened([str(image), package], None) as scopes:
        assert told(scopes) == [("/usr/sbin/d", b"new"), ("/usr/sbin/e", TRUE[-3:])]


def test_a_single_file_means_itself(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(OLD)
    package = deb(tmp_path / "p", {str(tmp_path / "d"): NEW})
    with opened([package, str(tmp_path / "d")], None) as scopes:
        assert told(scopes) == [(f"{tmp_path}/d", b"old"), (f"{package}:{tmp_path}/d", b"new")]


def test_a_program_of_the_sysroot_beside_a_package(tmp_path: Path, root: Path) -> None:
    (root / "usr/bin").mkdir()
    (root / "usr/bin/true").write_bytes(OLD)
    package = deb(tmp_path / "p", {"/usr/lib/libx.so.1": LIBRARY})
    for name in ("/usr/bin/true", f"{root}/usr/bin/true"):
        with opened([package, name], root) as scopes:
            assert told(scopes) == [("/usr/bin/true", b"old")]


# --only.


def test_a_pattern_that_matches_nothing(form: str, tmp_path: Path, root: Path) -> None:
    members = {"/usr/sbin/named": OLD, "/usr/bin/dig": NEW, "/usr/lib/libx.so.1": LIBRARY}
    with opened([made(form, tmp_path / "p", members)], root, ["/usr/bin/named"]) as (scope,):
        (error,) = scope.errors
        assert "--only /usr/bin/named matches none of the 2 programs in it" in str(error)
        assert "Nearest: /usr/sbin/named" in str(error)


def test_one_of_two_patterns_matches_nothing(tmp_path: Path) -> None:
    with opened([deb(tmp_path / "p", {"/usr/bin/a": OLD})], None, ["/usr/bin/a", "b"]) as (scope,):
        assert scope.errors == ()
        assert [note.message for note in scope.diagnostics] == ["--only b matches nothing"]
