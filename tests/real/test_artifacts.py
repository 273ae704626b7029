"""Whole scans of what packagers hold: the same findings from packages, tarballs, images and directories."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import forkproof
from fixtures.build import Result
from forkproof.model import Launch, Report, Severity
from tests.support import archives
from tests.support.archives import Link, Members
from tests.support.command import forkproof as command
from tools.debs import place

if TYPE_CHECKING:
    from forkproof.model import Finding

RUNTIME = ("libc.so.6", "ld-linux-x86-64.so.2", "libgcc_s.so.1")


def told(report: Report) -> set[tuple[str, str, str]]:
    return {(finding.id, finding.severity.value, finding.verdict.value) for finding in report.findings}


# A fixture and its C library, put into each kind of container.


@pytest.fixture(scope="module")
def members(built_x86_64: Result) -> Members:
    root = built_x86_64.tree.root()
    libraries = Path("/lib/x86_64-linux-gnu")
    if not libraries.is_dir():
        pytest.skip("needs an x86-64 Debian for its C library")
    files: dict[str, bytes | Link | archives.Hard | archives.Device | None] = {
        "/usr/bin/daemon_unhooked": (root / "daemon_unhooked").read_bytes(),
        "/usr/bin/liballoc_spin.so": (root / "liballoc_spin.so").read_bytes(),
        "/usr/lib64/ld-linux-x86-64.so.2": Link("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
    }
    return files | {f"/usr/lib/x86_64-linux-gnu/{name}": (libraries / name).read_bytes() for name in RUNTIME}


def split(members: Members) -> tuple[Members, Members]:
    """The program and its library, and the rest."""
    ours = {path: content for path, content in members.items() if path.startswith("/usr/bin/")}
    return ours, {path: content for path, content in members.items() if path not in ours}


def relative(members: Members) -> Members:
    return {path[1:]: content for path, content in members.items()}


@pytest.fixture(params=["deb", "rpm", "tar", "oci", "docker", "directory"])
def containers(request: pytest.FixtureRequest, members: Members, tmp_path: Path) -> list[Path]:
    ours, base = split(members)
    if request.param in {"deb", "rpm"}:
        make = archives.deb if request.param == "deb" else archives.rpm
        found = []
        for name, content in (("ours", ours), ("base", base)):
            found.append(tmp_path / f"{name}.{request.param}")
            found[-1].write_bytes(make(content))
        return found
    path = tmp_path / "all"
    if request.param == "tar":
        path.write_bytes(archives.compressed(archives.tar(relative(members)), "xz"))
    elif request.param == "oci":
        path.write_bytes(archives.tar(archives.oci([relative(base), relative(ours)])))
    elif request.param == "docker":
        path.write_bytes(archives.docker([relative(base), relative(ours)]))
    else:
        write(members, path)
    return [path]


def write(members: Members, root: Path) -> None:
    """As files below a directory."""
    for name, file in members.items():
        where = root / name[1:]
        where.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, Link):
            where.symlink_to(file.target)
        elif isinstance(file, bytes):
            where.write_bytes(file)


def test_a_fixture_from_each_container(containers: list[Path]) -> None:
    report = forkproof.scan(*containers)
    assert report.errors == ()
    (target,) = [target for target in report.targets if target.path == "/usr/bin/daemon_unhooked"]
    assert [entry.path for entry in target.closure if "alloc" in entry.name] == ["/usr/bin/liballoc_spin.so"]
    (hang,) = [f for f in report.findings if f.rule == "inherited-lock" and f.severity is Severity.HIGH]
    assert hang.fork is not None
    assert (hang.fork.function, hang.object) == ("become_daemon", "liballoc_spin.so")


class TestLaunches:
    """What a system starts a program with is part of the answer, and the report says where it comes from."""

    def scanned(self, members: Members, tmp_path: Path, files: Members) -> Report:
        write({**members, **files}, tmp_path / "root")
        return forkproof.scan("/usr/bin/daemon_unhooked", sysroot=tmp_path / "root")

    def test_of_the_dynamic_linkers_own_file(self, members: Members, tmp_path: Path) -> None:
        preload = "/usr/bin/liballoc_spin.so"
        (target,) = self.scanned(members, tmp_path, {"/etc/ld.so.preload": f"{preload}\n".encode()}).targets
        assert target.launches == (Launch("/etc/ld.so.preload", (preload,)),)

    def test_of_a_unit(self, members: Members, tmp_path: Path) -> None:
        unit, preload = "/usr/lib/systemd/system/x.service", "/usr/bin/liballoc_spin.so"
        text = f"[Service]\nExecStart=/usr/bin/daemon_unhooked\nEnvironment=LD_PRELOAD={preload}\n"
        (target,) = self.scanned(members, tmp_path, {unit: text.encode()}).targets
        assert target.launches == (Launch(unit, (preload,)),)

    def test_of_nothing(self, members: Members, tmp_path: Path) -> None:
        (target,) = self.scanned(members, tmp_path, {}).targets
        assert target.launches == ()


def test_twice_the_same(containers: list[Path]) -> None:
    first, second = (command("scan", *containers, "--format", "json") for _ in range(2))
    assert first.stdout == second.stdout
    assert "/tmp/forkproof" not in first.stdout


# The incident, from Debian's own packages.

WANTED = ("qemu-system-arm", "libgoogle-perftools4")
PROGRAM = "/usr/bin/qemu-system-aarch64"


@pytest.fixture(scope="module")
def debs() -> list[Path]:
    home = place("bookworm", "arm64", WANTED)
    if not home.is_dir():
        pytest.skip(f"no packages: python3 tools/debs.py bookworm arm64 {' '.join(WANTED)}")
    return sorted(home.glob("*.deb"))


def incident(*artifacts: Path) -> list[Finding]:
    said = command("scan", *artifacts, "--preload", "libtcmalloc.so.4", "--only", PROGRAM, "--format", "json")
    assert said.code == 1, said.stderr
    from forkproof.report import json

    report = json.parse(said.stdout)
    assert [target.path for target in report.targets] == [PROGRAM]
    assert report.errors == ()
    return [finding for finding in report.findings if finding.severity is Severity.HIGH]


@pytest.fixture(scope="module")
def from_packages(debs: list[Path]) -> list[Finding]:
    return incident(*debs)


@pytest.fixture(scope="module")
def unpacked(debs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("unpacked")
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    yield root
    subprocess.run(["rm", "-rf", root], check=True)


@pytest.mark.real
@pytest.mark.arm64
@pytest.mark.slow
class TestIncident:
    def test_from_nothing_but_packages(self, from_packages: list[Finding]) -> None:
        hang = next(finding for finding in from_packages if finding.rule == "inherited-lock")
        assert hang.fork is not None
        assert (hang.fork.function, hang.object) == ("os_daemonize", "libtcmalloc.so.4")
        assert any(finding.rule == "atfork-unbound" for finding in from_packages)

    def test_from_the_packages_over_a_sysroot(self, debs: list[Path], sysroot_arm64: Path) -> None:
        ours = [deb for deb in debs if deb.name.startswith(WANTED)]
        assert len(ours) == 2
        said = command("scan", *ours, "--sysroot", sysroot_arm64, "--preload", "libtcmalloc.so.4", "--only", PROGRAM)
        assert said.code == 1
        assert "os_daemonize" in said.stdout

    def test_from_a_directory(self, unpacked: Path, from_packages: list[Finding]) -> None:
        assert incident(unpacked) == from_packages

    def test_from_a_tarball(self, unpacked: Path, tmp_path: Path, from_packages: list[Finding]) -> None:
        path = tmp_path / "root.tar.gz"
        subprocess.run(["tar", "-C", unpacked, "-cf", path, "-I", "gzip -1", "."], check=True)
        assert incident(path) == from_packages

    def test_from_an_image(self, unpacked: Path, tmp_path: Path, from_packages: list[Finding]) -> None:
        layer = tmp_path / "layer.tar"
        subprocess.run(["tar", "-C", unpacked, "-cf", layer, "."], check=True)
        image = tmp_path / "image.tar"
        image.write_bytes(archives.tar(archives.oci_of([layer.read_bytes()], machine="arm64")))
        assert incident(image) == from_packages

    def test_the_allocators_of_a_package_are_targets(self, debs: list[Path], sysroot_arm64: Path) -> None:
        (package,) = [deb for deb in debs if deb.name.startswith("libgoogle-perftools4")]
        said = command("scan", package, "--sysroot", sysroot_arm64, "--format", "json").json()
        assert "/usr/lib/aarch64-linux-gnu/libtcmalloc.so.4.5.10" in {target["path"] for target in said["targets"]}
        assert any(finding["rule"] == "atfork-unbound" for finding in said["findings"])
