"""What units, drop-ins, environment files and wrapper scripts preload."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from forkproof.artifacts import start
from forkproof.artifacts.open import opened
from forkproof.artifacts.start import Preload
from forkproof.closure.sysroot import DirectorySysroot
from tests.support import archives
from tests.unit.artifacts.test_trees import TRUE

UNIT = "/usr/lib/systemd/system/dirsrv@.service"
SERVICE = "[Unit]\nDescription=x\n[Service]\nExecStart=-/usr/sbin/ns-slapd -D /etc/dirsrv/%i\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for directory in ("usr/sbin", "usr/bin", "etc/systemd/system", "usr/lib/systemd/system"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "usr/sbin/ns-slapd").write_bytes(TRUE)
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def found(root: Path) -> dict[str, Preload]:
    return start.preloads(DirectorySysroot(root))


class TestUnits:
    def test_a_drop_in_of_a_template(self, root: Path) -> None:
        """As Debian's 389-ds-base has it."""
        drop_in = f"{UNIT}.d/custom.conf"
        write(root, UNIT, SERVICE)
        write(root, drop_in, "[Service]\nEnvironment=LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n")
        expected = Preload(("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2",), drop_in)
        assert found(root) == {"/usr/sbin/ns-slapd": expected}

    @pytest.mark.parametrize(
        ("setting", "libraries"),
        [
            ('Environment="LD_PRELOAD=liba.so libb.so" X=1', ("liba.so", "libb.so")),
            ("Environment=A=1 'LD_PRELOAD=liba.so:libb.so'", ("liba.so", "libb.so")),
            ("Environment=LD_PRELOAD=liba.so\nEnvironment=LD_PRELOAD=libb.so", ("libb.so",)),
            ("Environment=A=1 \\\n  LD_PRELOAD=liba.so", ("liba.so",)),
            ("Environment=LD_PRELOAD=liba.so\nEnvironment=LD_PRELOAD=", ()),
            ("# Environment=LD_PRELOAD=liba.so", ()),
            ("[Install]\nEnvironment=LD_PRELOAD=liba.so", ()),
            ('Environment="LD_PRELOAD=unbalanced', ()),
        ],
    )
    def test_settings(self, root: Path, setting: str, libraries: tuple[str, ...]) -> None:
        write(root, UNIT, SERVICE + setting + "\n")
        assert found(root) == ({"/usr/sbin/ns-slapd": Preload(libraries, UNIT)} if libraries else {})

    def test_an_environment_file(self, root: Path) -> None:
        write(root, UNIT, SERVICE + "EnvironmentFile=-/etc/default/dirsrv\n")
        write(root, "/etc/default/dirsrv", "# comment\nOTHER=x\nLD_PRELOAD='liba.so'\n")
        assert found(root)["/usr/sbin/ns-slapd"] == Preload(("liba.so",), "/etc/default/dirsrv")

    def test_what_the_administrator_wrote_wins(self, root: Path) -> None:
        write(root, UNIT, SERVICE + "Environment=LD_PRELOAD=liba.so\n")
        write(root, "/etc/systemd/system/dirsrv@.service", SERVICE)
        assert found(root) == {}

    def test_exec_start_can_be_reset(self, root: Path) -> None:
        (root / "usr/sbin/other").write_bytes(TRUE)
        more = "Environment=LD_PRELOAD=liba.so\nExecStart=\nExecStart=@/usr/sbin/other other\n"
        write(root, UNIT, SERVICE + more)
        assert set(found(root)) == {"/usr/sbin/other"}


class TestScripts:
    @pytest.mark.parametrize(
        ("script", "libraries"),
        [
            ('#!/bin/sh\nexport LD_PRELOAD=liba.so\nexec /usr/sbin/ns-slapd "$@"\n', ("liba.so",)),
            ("#!/bin/bash\nLD_PRELOAD=liba.so exec /usr/sbin/ns-slapd\n", ("liba.so",)),
            ("#!/usr/bin/env bash\nexec env LD_PRELOAD=liba.so /usr/sbin/ns-slapd\n", ("liba.so",)),
            ('#!/bin/sh\nLD_PRELOAD="liba.so libb.so" ns-slapd\n', ("liba.so", "libb.so")),
            ('#!/bin/sh\nLIB=/opt/a.so\nexport LD_PRELOAD="$LIB:$LD_PRELOAD"\nexec ns-slapd\n', ("/opt/a.so",)),
            ("#!/bin/sh\nD=/usr/sbin\nLD_PRELOAD=liba.so\nexport LD_PRELOAD\nexec $D/ns-slapd\n", ("liba.so",)),
            ("#!/bin/sh\n# LD_PRELOAD=liba.so\nexec /usr/sbin/ns-slapd\n", ()),
            ("#!/bin/sh\nLD_PRELOAD=`find liba`\nexec /usr/sbin/ns-slapd\n", ()),
        ],
    )  # fmt: skip
    def test_preloads(self, root: Path, script: str, libraries: tuple[str, ...]) -> None:
        write(root, "/usr/bin/wrapper", script)
        source = "/usr/bin/wrapper"
        assert start.of_script(DirectorySysroot(root), source) == ("/usr/sbin/ns-slapd", Preload(libraries, source))

    @pytest.mark.parametrize("text", ["#!/usr/bin/python3\nprint()", "\x7fELF", "#!/bin/sh\necho x\n", ""])
    def test_others_are_none(self, root: Path, text: str) -> None:
        write(root, "/usr/bin/wrapper", text)
        assert start.of_script(DirectorySysroot(root), "/usr/bin/wrapper") is None

    @pytest.mark.parametrize(
        ("script", "programs"),
        [
            ('#!/bin/sh\nns-slapd --version\nLD_PRELOAD=liba.so "$@"\n', set[str]()),
            ("#!/bin/sh\nns-slapd x | tr a b\nexec env LD_PRELOAD=liba.so ${SHELL:-/bin/sh}\n", set[str]()),
            ('#!/bin/sh\nLD_PRELOAD=liba.so ns-slapd "$@"\n', {"/usr/sbin/ns-slapd"}),
            ("#!/bin/sh\nLD_PRELOAD=liba.so exec ns-slapd -d\n", {"/usr/sbin/ns-slapd"}),
        ],
    )
    def test_a_wrapper_is_one_of_what_it_passes_its_arguments_to(
        self, root: Path, script: str, programs: set[str]
    ) -> None:
        write(root, "/usr/bin/wrapper", script)
        assert set(start.wrapped(DirectorySysroot(root))) == programs

    def test_nothing_is_run(self, root: Path) -> None:
        write(root, "/usr/bin/wrapper", f"#!/bin/sh\ntouch {root}/ran\nLD_PRELOAD=$(touch {root}/ran)\nexec ns-slapd\n")
        start.wrapped(DirectorySysroot(root))
        assert not (root / "ran").exists()


class TestTargets:
    def test_a_program_of_a_unit(self, root: Path) -> None:
        write(root, UNIT, SERVICE + "Environment=LD_PRELOAD=liba.so\n")
        with opened(["/usr/sbin/ns-slapd"], root) as (scope,):
            (only,) = scope.starts
            assert (only.preload, only.source) == (("liba.so",), UNIT)

    def test_what_is_started_as_it_is_named(self, root: Path) -> None:
        write(root, UNIT, SERVICE + "Environment=LD_PRELOAD=liba.so\n")
        write(root, "/usr/bin/wrapper", "#!/bin/sh\nLD_PRELOAD=libb.so exec ns-slapd\n")
        for name, preload in (("/usr/sbin/ns-slapd", ()), ("/usr/bin/wrapper", ("libb.so",))):
            with opened([name], root, as_named=True) as (scope,):
                (only,) = scope.starts
                assert (only.name, only.preload) == ("/usr/sbin/ns-slapd", preload)

    def test_a_program_of_a_wrapper_is_the_same_by_path_and_in_a_tree(self, root: Path) -> None:
        write(root, "/usr/bin/wrapper", "#!/bin/sh\nLD_PRELOAD=liba.so exec ns-slapd\n")
        expected = ("/usr/sbin/ns-slapd", ("liba.so",), "/usr/bin/wrapper")
        for names, sysroot in (["/usr/sbin/ns-slapd"], root), ([str(root)], None):
            with opened(names, sysroot) as (scope,):
                (only,) = scope.starts
                assert (only.name, only.preload, only.source) == expected

    def test_a_program_of_the_sysroot_beside_a_package(
        self, root: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        write(root, UNIT, SERVICE + "Environment=LD_PRELOAD=liba.so\n")
        package = tmp_path_factory.mktemp("packages") / "x.deb"
        package.write_bytes(archives.deb({"usr/bin/x": TRUE + b"x"}))
        with opened(["/usr/sbin/ns-slapd", str(package)], root) as (scope,):
            assert [each.preload for each in scope.starts if each.name == "/usr/sbin/ns-slapd"] == [("liba.so",)]

    def test_a_script_stands_for_its_program(self, root: Path) -> None:
        write(root, "/usr/bin/wrapper", "#!/bin/sh\nLD_PRELOAD=liba.so exec ns-slapd\n")
        with opened(["/usr/bin/wrapper"], root) as (scope,):
            (only,) = scope.starts
            assert (only.name, only.preload) == ("/usr/sbin/ns-slapd", ("liba.so",))

    def test_in_packages(self, tmp_path: Path) -> None:
        unit = (SERVICE + "Environment=LD_PRELOAD=liba.so\n").encode()
        script = b"#!/bin/sh\nLD_PRELOAD=libb.so exec /usr/bin/other\n"
        package = tmp_path / "x.deb"
        package.write_bytes(
            archives.deb(
                {
                    "/usr/sbin/ns-slapd": TRUE,
                    "/usr/bin/other": TRUE + b"x",
                    "/usr/bin/wrapper": script,
                    "/lib/systemd/system/dirsrv.service": unit,
                }
            )
        )
        with opened([str(package)], None) as (scope,):
            found = {start.name: start.preload for start in scope.starts}
        assert found == {"/usr/bin/other": ("libb.so",), "/usr/sbin/ns-slapd": ("liba.so",)}


class TestImages:
    ENV = ("PATH=/usr/bin", "LD_PRELOAD=libx.so", "LD_PRELOAD=liba.so libb.so", "LD_LIBRARY_PATH=/opt/a:/opt/b")

    def layout(self, tmp_path: Path, environment: tuple[str, ...], files: archives.Members) -> str:
        place = tmp_path / "image"
        for name, content in archives.oci([files], environment=environment).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        return str(place)

    def test_the_environment_of_an_image_preloads(self, tmp_path: Path) -> None:
        name = self.layout(tmp_path, self.ENV, {"usr/bin/x": TRUE})
        with opened([name], None) as (scope,):
            (only,) = scope.starts
            assert (only.preload, only.library_path) == (("liba.so", "libb.so"), ("/opt/a", "/opt/b"))
            assert only.source == f"the environment of {name} (app:1, linux/amd64)"
            assert any("/opt/a, /opt/b" in note.message for note in scope.diagnostics)

    def test_of_what_docker_saves(self, tmp_path: Path) -> None:
        image = tmp_path / "image.tar"
        image.write_bytes(archives.docker([{"usr/bin/x": TRUE}], environment=self.ENV))
        with opened([str(image)], None) as (scope,):
            (only,) = scope.starts
            assert only.preload == ("liba.so", "libb.so")

    def test_what_a_wrapper_says_wins(self, tmp_path: Path) -> None:
        script = b"#!/bin/sh\nLD_PRELOAD=libc.so exec /usr/bin/x\n"
        name = self.layout(tmp_path, self.ENV, {"usr/bin/x": TRUE, "usr/bin/wrapper": script})
        with opened([name], None) as (scope,):
            (only,) = scope.starts
            assert (only.preload, only.source) == (("libc.so",), "/usr/bin/wrapper")

    def test_without_one(self, tmp_path: Path) -> None:
        with opened([self.layout(tmp_path, (), {"usr/bin/x": TRUE})], None) as (scope,):
            (only,) = scope.starts
            assert (only.preload, only.source, only.library_path) == ((), "", ())

    def test_a_configuration_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        name = self.layout(tmp_path, self.ENV, {"usr/bin/x": TRUE})
        (config,) = (each for each in Path(name, "blobs/sha256").iterdir() if b"LD_PRELOAD" in each.read_bytes())
        config.unlink()
        with opened([name], None) as (scope,):
            (error,) = scope.errors
            assert "what its environment preloads is not known" in str(error)
            assert len(scope.starts) == 1


@pytest.fixture
def closed() -> Iterator[Path]:
    """A tree that somebody else may not read all of; root reads everything, so root is somebody else for a while."""
    with TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        for path, mode in (("bin/open", 0o755), ("bin/secret", 0o700), ("etc/shadow", 0o600), ("lib/private/x", 0o755)):
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(TRUE)
            (place / path).chmod(mode)
        (place / "bin/secret").chmod(0o311)
        (place / "etc/shadow").chmod(0)
        (place / "lib/private").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield place
        finally:
            if is_root:
                os.seteuid(0)
            (place / "lib/private").chmod(0o755)


class TestClosed:
    """What may not be read is no reason to say that all was analysed."""

    def errors(self, place: Path, *only: str) -> list[str]:
        with opened([str(place)], None, only) as scopes:
            return [str(error).splitlines()[0] for scope in scopes for error in scope.errors]

    def test_commands_and_directories(self, closed: Path) -> None:
        command, directory = self.errors(closed)
        assert command.endswith("/bin/secret: cannot be read: Permission denied")
        assert directory.endswith("/lib/private: cannot be looked into: Permission denied")

    def test_where_nobody_asked_for_them(self, closed: Path) -> None:
        assert self.errors(closed, "/bin/o*") == []
        assert len(self.errors(closed, "*")) == 2
