"""What is not a program, or is a damaged one, or lies about itself: a message that names the file and says what is
wrong, exit code 3, and the other targets scanned all the same. Never a traceback, never a hang.

All through the command. A run has a limit of a minute: reading /dev/zero to its end would take longer.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.build import Result
from tests.support.command import FORKPROOF, Completed, forkproof
from tests.support.machines import NATIVE

TRUE = Path("/bin/true").resolve()
LIMIT = 60

# Elf64_Ehdr: e_ident[16], type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, …
E_TYPE, E_MACHINE, E_PHOFF, E_SHOFF, E_PHENTSIZE, E_PHNUM, E_SHNUM, E_SHSTRNDX = 16, 18, 32, 40, 54, 56, 60, 62
ET_REL, ET_CORE, EM_RISCV = 1, 4, 243


@pytest.fixture(scope="module")
def good() -> bytes:
    """A small real program of this machine."""
    content = TRUE.read_bytes()
    assert content.startswith(b"\x7fELF\x02\x01")
    return content


@pytest.fixture(scope="module")
def gcc(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles one C text: gcc(name, code, *flags)."""
    directory = tmp_path_factory.mktemp("built")

    def build(name: str, code: str, *flags: str) -> Path:
        output = directory / name
        output.parent.mkdir(parents=True, exist_ok=True)
        command = ["gcc", "-x", "c", "-", "-x", "none", "-o", str(output), "-Wl,--no-as-needed", *flags]
        subprocess.run(command, input=code, text=True, check=True, cwd=directory)
        return output

    return build


def scanned(*arguments: str | Path) -> Completed:
    done = forkproof("scan", *arguments, timeout=LIMIT)
    assert "Traceback" not in done.stderr + done.stdout
    assert "internal error" not in done.stderr
    return done


def _flat(text: str) -> str:
    """Messages are wrapped to the width of a page."""
    return re.sub(r"\s+", " ", text)


def refused(path: str | Path, *patterns: str, options: tuple[str | Path, ...] = ()) -> str:
    """Scan a bad target beside a good one: it must be named, with what is wrong, and the good one be scanned."""
    done = scanned(*options, path, TRUE, "--format", "json")
    assert done.code == 3
    document = done.json()
    assert [target["path"] for target in document["targets"]] == [str(TRUE)]
    (error,) = [d for d in document["diagnostics"] if d["level"] == "error"]
    assert str(path) in error["message"]
    for pattern in patterns:
        assert re.search(pattern, error["message"]), error["message"]
    text = scanned(*options, path)
    assert text.code == 3
    shown = _flat(text.stdout + text.stderr).replace(" ", "")
    assert _flat(str(path)).replace(" ", "") in shown
    message: str = error["message"]
    return message


def changed(content: bytes, *changes: tuple[int, str, int]) -> bytes:
    """The same bytes with some numbers replaced: (offset, struct format, value)."""
    result = bytearray(content)
    for offset, form, value in changes:
        struct.pack_into("<" + form, result, offset, value)
    return bytes(result)


class TestNotAProgram:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("empty", b""),
            ("one-byte", b"\x7f"),
            ("text", b"This is not a program.\n"),
            ("script", b"#!/bin/sh\nexit 0\n"),
            ("archive.a", b"!<arch>\n" + b"x/              0           0     0     644     4         `\nabcd"),
            ("zeros", bytes(4096)),
            ("almost", b"\x7fELG" + bytes(100)),
        ],
    )
    def test_other_files(self, name: str, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        refused(path, r"(?i)\bELF\b|empty")

    def test_a_script_is_called_one(self, tmp_path: Path) -> None:
        path = tmp_path / "daemon"
        path.write_text("#!/usr/bin/python3\nprint('hello')\n")
        refused(path, r"is a script")

    def test_an_object_file(self, gcc: Callable[..., Path]) -> None:
        refused(gcc("x.o", "int f(void) { return 1; }", "-c"), r"(?i)relocatable|object file|\.o")

    def test_a_static_library(self, gcc: Callable[..., Path], tmp_path: Path) -> None:
        path = tmp_path / "libx.a"
        subprocess.run(["ar", "rcs", path, gcc("y.o", "int g(void) { return 1; }", "-c")], check=True)
        refused(path, r"(?i)archive|ELF")

    def test_a_core_file(self, good: bytes, tmp_path: Path) -> None:
        path = tmp_path / "core.1234"
        path.write_bytes(changed(good, (E_TYPE, "H", ET_CORE)))
        refused(path, r"(?i)core")


class TestOtherMachines:
    @pytest.mark.parametrize(
        ("name", "changes", "pattern"),
        [
            ("bits32", ((4, "B", 1),), r"32.bit|ELF32|ELFCLASS32"),
            ("big-endian", ((5, "B", 2),), r"(?i)big.endian"),
            ("riscv", ((E_MACHINE, "H", EM_RISCV),), r"(?i)machine|riscv|243"),
            ("class9", ((4, "B", 9),), r"(?i)class|64"),
        ],
    )
    def test_refused(
        self, name: str, changes: tuple[tuple[int, str, int], ...], pattern: str, good: bytes, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        path.write_bytes(changed(good, *changes))
        refused(path, pattern)


class TestDamage:
    def test_cut_anywhere(self, good: bytes, tmp_path: Path) -> None:
        """At each boundary of the headers, and at 200 places; a cut that loses nothing that matters may pass."""
        header = [0, 1, 3, 4, 5, 15, 16, 17, 18, 20, 24, 32, 40, 52, 54, 56, 58, 60, 62, 63, 64]
        count = struct.unpack_from("<H", good, E_PHNUM)[0]
        programs = [64 + 56 * i + d for i in range(count + 1) for d in (-1, 0, 1)]
        anywhere = [len(good) * i // 200 for i in range(200)]
        paths = []
        for size in sorted({*header, *programs, *anywhere}):
            path = tmp_path / f"cut-{size:06}"
            path.write_bytes(good[:size])
            paths.append(path)
        done = scanned(*paths, TRUE, "--format", "json")
        assert done.code == 3
        document = done.json()
        scanned_paths = [target["path"] for target in document["targets"]]
        assert scanned_paths[-1] == str(TRUE)
        errors = [d for d in document["diagnostics"] if d["level"] == "error"]
        assert len(errors) + len(scanned_paths) == len(paths) + 1
        assert all("cut-" in error["message"] for error in errors)
        # Without its last byte a file has lost its section table at most, which nobody needs to load it.
        assert all(int(path.rpartition("-")[2]) > 4096 for path in scanned_paths[:-1])
        assert len(errors) > 100

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("phoff-outside", ((E_PHOFF, "Q", 1 << 40),)),
            ("phoff-huge", ((E_PHOFF, "Q", (1 << 64) - 8),)),
            ("phnum-zero", ((E_PHNUM, "H", 0),)),
            ("phnum-huge", ((E_PHNUM, "H", 0xFFFF),)),
            ("phentsize-zero", ((E_PHENTSIZE, "H", 0),)),
            ("phentsize-other", ((E_PHENTSIZE, "H", 8),)),
        ],
    )
    def test_program_headers_that_lie(
        self, name: str, changes: tuple[tuple[int, str, int], ...], good: bytes, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        path.write_bytes(changed(good, *changes))
        refused(path, r"(?i)header|damaged|segment")

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("shoff-outside", ((E_SHOFF, "Q", 1 << 40),)),
            ("shoff-huge", ((E_SHOFF, "Q", (1 << 64) - 8),)),
            ("shnum-huge", ((E_SHNUM, "H", 0xFFFE),)),
            ("shstrndx-outside", ((E_SHSTRNDX, "H", 0xFFFE),)),
        ],
    )
    def test_section_headers_that_lie(
        self, name: str, changes: tuple[tuple[int, str, int], ...], good: bytes, tmp_path: Path
    ) -> None:
        """The kernel and ld.so do not read them: refusing and scanning are both right, failing is not."""
        path = tmp_path / name
        path.write_bytes(changed(good, *changes))
        done = scanned(path, "--format", "json")
        errors = [d["message"] for d in done.json()["diagnostics"] if d["level"] == "error"]
        assert (done.code, len(errors)) in {(0, 0), (3, 1)}
        assert all(str(path) in message for message in errors)

    def test_every_dynamic_entry_at_its_worst(self, good: bytes, tmp_path: Path) -> None:
        """Each value of the dynamic section in turn is a number that no file can satisfy."""
        phoff, count = struct.unpack_from("<Q", good, E_PHOFF)[0], struct.unpack_from("<H", good, E_PHNUM)[0]
        heads = [struct.unpack_from("<IIQQQQ", good, phoff + 56 * i) for i in range(count)]
        offset, size = next((h[2], h[5]) for h in heads if h[0] == 2)
        paths = []
        for place in range(offset, offset + size, 16):
            if struct.unpack_from("<q", good, place)[0] == 0:
                break
            for worst in (0, 1, 1 << 40, (1 << 64) - 1):
                path = tmp_path / f"entry-{place:x}-{worst:x}"
                path.write_bytes(changed(good, (place + 8, "Q", worst)))
                paths.append(path)
        assert len(paths) > 60
        done = scanned(*paths, TRUE, "--format", "json")
        document = done.json()
        assert document["targets"][-1]["path"] == str(TRUE)
        errors = [d for d in document["diagnostics"] if d["level"] == "error"]
        assert all("entry-" in error["message"] or ".so" in error["message"] for error in errors)


class TestNotAFile:
    def test_a_directory(self, tmp_path: Path) -> None:
        refused(tmp_path, r"(?i)directory")

    def test_a_missing_target(self, tmp_path: Path) -> None:
        refused(tmp_path / "nothing-here", r"(?i)no such file|not exist|not found")

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
    def test_devices(self, device: str) -> None:
        if not Path(device).is_char_device():
            pytest.skip(f"no {device}")
        refused(device, r"(?i)device|regular file")

    def test_a_fifo_that_nobody_writes_to(self, tmp_path: Path) -> None:
        path = tmp_path / "fifo"
        os.mkfifo(path)
        refused(path, r"(?i)fifo|pipe|regular file")

    def test_symbolic_links_in_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        refused(tmp_path / "a", "is a symbolic link that leads nowhere")

    def test_a_dangling_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("gone")
        refused(tmp_path / "link", r"is a symbolic link that leads nowhere \(to gone\)")

    def test_no_permission(self, good: bytes, tmp_path: Path) -> None:
        """Root may read everything, unless the right to is taken away."""
        path = tmp_path / "secret"
        path.write_bytes(good)
        path.chmod(0)
        command = [str(FORKPROOF), "scan", str(path), str(TRUE), "--format", "json"]
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                pytest.skip("root without setpriv")
            command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
        assert done.returncode == 3
        assert "Traceback" not in done.stderr
        assert "secret" in done.stdout
        assert re.search(r"(?i)permission|not allowed", done.stdout)


class TestTheClosure:
    def test_a_missing_library_is_named_and_the_rest_analysed(self, gcc: Callable[..., Path]) -> None:
        stub = gcc("libgone.so.3", "int gone(void) { return 0; }", "-shared", "-fPIC", "-Wl,-soname,libgone.so.3")
        program = gcc("needs-gone", "int gone(void); int main(void) { return gone(); }", str(stub))
        stub.unlink()
        done = scanned(program, "--format", "json")
        assert done.code == 3
        (target,) = done.json()["targets"]
        assert target["missing"] == ["libgone.so.3"]
        text = scanned(program)
        assert text.code == 3
        assert "libgone.so.3" in text.stdout + text.stderr

    def test_a_missing_interpreter(self, gcc: Callable[..., Path]) -> None:
        program = gcc("odd", "int main(void) { return 0; }", "-Wl,--dynamic-linker=/lib/ld-nowhere.so.9")
        done = scanned(program, "--format", "json")
        assert done.code in {0, 3}
        assert "ld-nowhere.so.9" in done.stdout

    def test_libraries_that_need_each_other(self, gcc: Callable[..., Path]) -> None:
        def library(name: str, code: str, *links: Path) -> Path:
            here = "-Wl,-rpath,$ORIGIN"
            return gcc(name, code, "-shared", "-fPIC", f"-Wl,-soname,{name}", here, *map(str, links))

        first = library("libround1.so", "int one(void) { return 1; }")
        second = library("libround2.so", "int one(void); int two(void) { return one(); }", first)
        library("libround1.so", "int two(void); int one(void) { return two(); }", second)
        program = gcc(
            "round", "int one(void); int main(void) { return one(); }", str(first), f"-Wl,-rpath,{first.parent}"
        )
        done = scanned(program, "--format", "json")
        assert done.code == 0
        names = [entry["name"] for entry in done.json()["targets"][0]["closure"]]
        assert [name for name in names if "round" in name] == ["round", "libround1.so", "libround2.so"]

    @pytest.mark.parametrize("content", [b"", b"INPUT(libc.so.6)\n", b"\x7fELF\x02\x01\x01" + bytes(30)])
    def test_a_damaged_library(self, content: bytes, gcc: Callable[..., Path]) -> None:
        library = gcc("libdamaged.so", "int f(void) { return 1; }", "-shared", "-fPIC", "-Wl,-soname,libdamaged.so")
        program = gcc(
            "needs-damaged", "int f(void); int main(void) { return f(); }", str(library), f"-Wl,-rpath,{library.parent}"
        )
        library.write_bytes(content)
        done = scanned(program, TRUE, "--format", "json")
        assert done.code == 3
        assert "libdamaged.so" in done.stdout
        assert done.json()["targets"][-1]["path"] == str(TRUE)

    def test_a_preload_that_does_not_exist(self) -> None:
        """ld.so says so and goes on; who asked for a preload wants to know, and not a clean exit."""
        done = scanned(TRUE, "--preload", "libnowhere.so.1")
        assert done.code == 3
        assert "libnowhere.so.1" in done.stdout + done.stderr

    def test_a_preload_that_is_no_library(self, tmp_path: Path) -> None:
        path = tmp_path / "libtext.so"
        path.write_text("hello")
        done = scanned(TRUE, "--preload", path)
        assert done.code == 3
        assert "libtext.so" in _flat(done.stdout + done.stderr)

    def test_a_sysroot_that_does_not_exist(self, tmp_path: Path) -> None:
        done = scanned("--sysroot", tmp_path / "nowhere", "/bin/true")
        assert done.code == 2
        assert "nowhere" in done.stderr

    def test_a_target_outside_the_sysroot(self, tmp_path: Path) -> None:
        refused_alone = scanned("--sysroot", tmp_path, "/bin/true")
        assert refused_alone.code == 3
        assert "/bin/true" in refused_alone.stdout + refused_alone.stderr

    def test_a_link_that_leads_out_of_the_sysroot(self, tmp_path: Path) -> None:
        """Links are followed inside: the host's files are never read in a sysroot's stead."""
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "true").symlink_to("../../../../../.." + str(TRUE))
        (tmp_path / "bin" / "loop").symlink_to("/bin/loop")
        for name in ("true", "loop"):
            done = scanned("--sysroot", tmp_path, f"/bin/{name}")
            assert done.code == 3
            assert f"/bin/{name}" in done.stdout + done.stderr


class TestExitCodes:
    def test_findings_win_over_what_was_not_analysed(
        self, built_fixtures: Callable[[str], Result], tmp_path: Path
    ) -> None:
        """Both fail a gate; the report tells both."""
        program = built_fixtures(NATIVE).tree.root() / "daemon_unhooked"
        done = scanned(tmp_path / "nothing", program, "--format", "json")
        assert done.code == 1
        document = done.json()
        assert any(finding["severity"] == "high" for finding in document["findings"])
        assert any(d["level"] == "error" and "nothing" in d["message"] for d in document["diagnostics"])
        assert scanned(tmp_path / "nothing", program, "--fail-on", "never").code == 3

    def test_nothing_to_scan(self) -> None:
        done = scanned()
        assert done.code == 2
        assert "TARGET" in done.stderr
