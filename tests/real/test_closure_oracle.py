"""`forkproof.closure` against the dynamic linkers themselves.

Oracle: glibc's ld.so, asked with LD_TRACE_LOADED_OBJECTS=1 LD_WARN=1 LD_BIND_NOW=1 LD_DEBUG=bindings. It maps
the program and its libraries, prints each binding that it makes, and stops before any code of theirs runs.
For arm64 the same ld.so runs under qemu-user. musl has no such mode; `ld-musl --list` gives the load order.

Compared: the load order, and the set of (from, to, symbol, version). Left out of the comparison, on purpose:
the vDSO, which is the kernel's; and ld.so's own four references, since it does not relocate itself in trace
mode (`test_ld_so_binds_its_own_references` compares those with a real start).

`python -m tests.real.test_closure_oracle [SYSROOT_ARM64]` prints the table of docs/closure.md;
`python -m tests.real.test_closure_oracle --all DIR...` compares every program below some directories.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import pytest

from forkproof.closure import Bindings, Closure, DirectorySysroot, LoadRequest, load
from forkproof.elf.image import load as load_image
from forkproof.errors import InputError
from tests.unit.closure.ld_so import LISTED, Case, ask, bound_by, differences, oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.real

HOST_CASES: Final = (
    # C, from the smallest to daemons
    Case("/usr/bin/true"),
    Case("/usr/bin/bash"),
    Case("/usr/bin/git"),
    Case("/usr/bin/tar"),
    Case("/usr/bin/ssh"),
    Case("/usr/sbin/sshd"),
    Case("/usr/sbin/nginx"),
    Case("/usr/bin/redis-server"),
    Case("/usr/sbin/named"),
    Case("/usr/bin/curl"),
    Case("/usr/bin/openssl"),
    Case("/usr/bin/vim"),
    Case("/usr/bin/perl"),
    Case("/usr/bin/gcc"),
    Case("/usr/bin/ld.bfd"),
    Case("/usr/bin/gpg"),
    Case("/usr/bin/dpkg"),
    Case("/usr/sbin/ip"),
    # not position independent: copy relocations, PLT addresses
    Case("/usr/bin/python3.11"),
    # C++ with STB_GNU_UNIQUE and many versions
    Case("/usr/bin/gdb"),
    Case("/usr/bin/apt"),
    Case("/usr/bin/cmake"),
    Case("/usr/bin/node"),
    # private directories: RUNPATH, $ORIGIN
    Case("/usr/lib/systemd/systemd"),
    Case("/usr/bin/journalctl"),
    Case("/usr/lib/systemd/systemd-logind"),
    Case("/usr/bin/man"),
    Case("/usr/bin/expr"),
    Case("/usr/bin/java"),
    # emulators
    Case("/usr/bin/qemu-system-x86_64"),
    Case("/usr/bin/qemu-aarch64"),
    # interposition
    Case("/usr/bin/qemu-system-x86_64", ("libtcmalloc.so.4",)),
    Case("/usr/bin/bash", ("libjemalloc.so.2",)),
    Case("/usr/bin/git", ("libjemalloc.so.2", "libtcmalloc_minimal.so.4")),
    Case("/usr/bin/python3.11", ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",)),
    Case("/usr/bin/gdb", ("libtcmalloc.so.4",)),
    Case("/usr/lib/systemd/systemd", ("libjemalloc.so.2",)),
    Case("/usr/bin/perl", ("libnot-there.so.1",)),
)

ARM64_PROGRAMS: Final = (
    ("/usr/bin/qemu-system-aarch64", ()),
    ("/usr/bin/qemu-system-aarch64", ("libtcmalloc.so.4",)),
    ("/usr/bin/qemu-system-arm", ("libtcmalloc_minimal.so.4",)),
    ("/usr/bin/python3.11", ()),
    ("/usr/bin/python3.11", ("libtcmalloc.so.4",)),
    ("/usr/bin/qemu-storage-daemon", ()),
    ("/usr/bin/qemu-pr-helper", ()),
    ("/usr/bin/passwd", ()),
    ("/usr/bin/chage", ()),
    ("/usr/bin/bash", ()),
    ("/usr/bin/git", ("libtcmalloc_minimal.so.4",)),
    ("/usr/bin/perl", ()),
    ("/usr/bin/dpkg", ()),
)


@pytest.mark.parametrize("case", HOST_CASES, ids=str)
def test_host_program_binds_as_ld_so_says(case: Case) -> None:
    _need_program(case)
    assert differences(case) == []


@pytest.mark.parametrize("language", ["rust", "go"])
def test_program_of_another_language_binds_as_ld_so_says(tmp_path: Path, language: str) -> None:
    case = _built(tmp_path, language)
    assert differences(case) == []
    assert differences(replace(case, preload=("libc.so.6",))) == []


@pytest.mark.arm64
@pytest.mark.parametrize(("program", "preload"), ARM64_PROGRAMS)
def test_arm64_program_binds_as_its_ld_so_says(sysroot_arm64: Path, program: str, preload: tuple[str, ...]) -> None:
    case = _arm64_case(Path(sysroot_arm64), program, preload)
    _need_program(case)
    assert differences(case) == []


@pytest.mark.arm64
def test_weak_pthread_atfork_binds_to_nothing_on_arm64(sysroot_arm64: Path) -> None:
    case = Case("/usr/bin/qemu-system-aarch64", ("libtcmalloc.so.4",), root=Path(sysroot_arm64))
    _need_program(case)
    assert _binding_of("pthread_atfork", "libtcmalloc.so.4", load(case.request())) is None


def test_weak_pthread_atfork_binds_to_the_compat_symbol_on_x86_64() -> None:
    case = Case("/usr/bin/qemu-system-x86_64", ("libtcmalloc.so.4",))
    _need_program(case)
    assert _binding_of("pthread_atfork", "libtcmalloc.so.4", load(case.request())) == "libc.so.6"


def test_ld_so_binds_its_own_references() -> None:
    """A real start of /usr/bin/true, which runs: ld.so is then relocated like everything else."""
    program = "/usr/bin/true"
    closure = load(Case(program).request())
    interpreter = next(item.path for item in closure.objects if item.why == "interpreter")
    expected = {bound for bound in ask(program, {"LD_DEBUG": "bindings"})[1] if bound[0] == interpreter}
    assert {bound for bound in bound_by(closure) if bound[0] == interpreter} == expected


@pytest.mark.parametrize(
    "command",
    [
        ("/usr/bin/true",),
        ("/usr/bin/git", "--version"),
        ("/usr/bin/python3.11", "-S", "-c", ""),
        ("/usr/bin/gdb", "--version"),
        ("/usr/bin/apt", "--version"),
        ("/usr/bin/journalctl", "--version"),
        ("/usr/bin/qemu-system-x86_64", "--version"),
    ],
    ids=lambda command: Path(command[0]).name,
)
def test_constructors_run_in_init_order(command: tuple[str, ...]) -> None:
    """LD_DEBUG=files names every object whose constructors ld.so calls; what is dlopened later is not ours.

    The program's own constructors are called by its start code, which prints nothing.
    """
    _need_program(Case(command[0]))
    closure = load(Case(command[0]).request())
    expected = [closure.objects[index].path for index in closure.init_order]
    _, _, log = ask(command, {"LD_DEBUG": "files"})
    called = re.findall(r"calling init: (\S+)", log)
    assert called[: len(expected) - 1] == expected[:-1]
    assert expected[-1] == closure.program.path


def test_musl_program_loads_in_the_order_of_ld_musl(tmp_path: Path) -> None:
    program = _musl_fixture(tmp_path)
    listed = subprocess.run(
        ["/lib/ld-musl-x86_64.so.1", "--list", program], capture_output=True, text=True, check=True
    ).stdout
    expected = [match[1] for line in listed.splitlines()[1:] if (match := LISTED.match(line))]
    closure = load(LoadRequest(DirectorySysroot("/"), str(program)))
    ours = [item.path for item in closure.objects[1:]]
    assert [path for path in ours if path in expected] == list(dict.fromkeys(expected))
    assert set(ours) == set(expected)


# ---- what can be compared ----------------------------------------------------------------------


def _binding_of(symbol: str, library: str, closure: Closure) -> str | None:
    item = closure.find(library)
    assert item is not None
    reference = next(r for r in Bindings(closure).of(item.index) if r.name == symbol)
    return None if reference.binding is None else closure.objects[reference.binding.object].name


def _arm64_case(root: Path, program: str, preload: tuple[str, ...]) -> Case:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("cannot be compared: no qemu-aarch64 (apt-get install qemu-user)")
    return Case(program, preload, root=root, emulator=emulator)


def _need_program(case: Case) -> None:
    """Skip with the reason, so that what was not compared is listed (pytest -ra)."""
    sysroot = DirectorySysroot(case.root)
    if sysroot.resolve(case.program) is None:
        pytest.skip(f"cannot be compared: no {case.program}")
    try:
        image = load_image(sysroot.host_path(case.program))
    except InputError as error:
        pytest.skip(f"cannot be compared: {error.reason}")
    if image.interpreter is None:
        pytest.skip("cannot be compared: a static program has no ld.so to ask")
    for name in case.preload:
        if name != "libnot-there.so.1" and not _is_known(sysroot, name):
            pytest.skip(f"cannot be compared: no {name}")


def _is_known(sysroot: DirectorySysroot, name: str) -> bool:
    triplets = ("x86_64-linux-gnu", "aarch64-linux-gnu")
    places = [name] if "/" in name else [f"/usr/lib/{triplet}/{name}" for triplet in triplets]
    return any(sysroot.resolve(place) is not None for place in places)


_SOURCES: Final = {
    "rust": ("rustc", "hello.rs", 'fn main() { std::thread::spawn(|| println!("hello")).join().unwrap(); }'),
    "go": (
        "go",
        "hello.go",
        """package main
// #include <stdlib.h>
import "C"
import "net"
func main() { C.free(C.malloc(1)); net.LookupHost("localhost") }""",
    ),
}


def _built(directory: Path, language: str) -> Case:
    """A program that rustc, or go with cgo, links here."""
    compiler, source, code = _SOURCES[language]
    (directory / source).write_text(code)
    output = directory / language
    command = [compiler, *(["build"] if language == "go" else []), "-o", str(output), source]
    environment = {**os.environ, "CGO_ENABLED": "1", "GOCACHE": str(directory / "cache"), "GO111MODULE": "off"}
    if shutil.which(compiler) is None:
        pytest.skip(f"cannot be compared: no {compiler}")
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot be compared: {compiler} does not work here: {done.stderr.strip()[-200:]}")
    return Case(str(output), label=f"hello world in {language}")


def _musl_fixture(directory: Path) -> Path:
    if shutil.which("musl-gcc") is None or not Path("/lib/ld-musl-x86_64.so.1").exists():
        pytest.skip("cannot be compared: no musl-gcc (apt-get install musl-tools)")
    (directory / "lib").mkdir()

    def build(output: str, code: str, *flags: str) -> None:
        source = directory / f"{Path(output).name}.c"
        source.write_text(code)
        command = ["musl-gcc", "-o", str(directory / output), str(source), *flags]
        subprocess.run(command, check=True, cwd=directory, capture_output=True)

    build("lib/libdeep.so", "int deep(void) { return 1; }", "-shared", "-fPIC")
    build(
        "lib/libfirst.so", "int deep(void); int first(void) { return deep(); }",
        "-shared", "-fPIC", "-Llib", "-ldeep",
    )  # fmt: skip
    build("lib/libsecond.so", "int second(void) { return 2; }", "-shared", "-fPIC")
    # libdeep.so is found only because musl lets the RUNPATH of the program count for what libfirst.so needs.
    build(
        "program", "int first(void), second(void); int main(void) { return first() + second(); }",
        "-Llib", "-lfirst", "-lsecond", "-Wl,-rpath,$ORIGIN/lib", "-Wl,-rpath-link,lib",
    )  # fmt: skip
    return directory / "program"


# ---- the table ---------------------------------------------------------------------------------


def _table(cases: list[Case]) -> Iterator[str]:
    yield "| program | preload | objects | bindings compared | differences |"
    yield "|---|---|--:|--:|--:|"
    objects = bindings = different = 0
    for case in cases:
        try:
            _need_program(case)
        except pytest.skip.Exception as reason:
            yield f"| `{case.label or case.program}` | {' '.join(case.preload)} | | | {reason} |"
            continue
        expected, found = oracle(case), differences(case)
        objects += len(expected.order) + 1
        bindings += len(expected.bindings)
        different += len(found)
        preload = " ".join(f"`{Path(name).name}`" for name in case.preload)
        counts = f"{len(expected.order) + 1} | {len(expected.bindings):,} | {len(found)}"
        yield f"| `{case.label or case.program}` | {preload} | {counts} |"
    yield f"| **{len(cases)} cases** | | **{objects:,}** | **{bindings:,}** | **{different}** |"


def _everything(directories: list[str]) -> Iterator[str]:
    """Compare every program below some directories; a line for each that differs or cannot be compared."""
    seen: set[Path] = set()
    programs = objects = bindings = different = 0
    for directory in directories:
        for path in sorted(Path(directory).rglob("*")):
            real = path.resolve()
            if real in seen or not _is_program(real):
                continue
            seen.add(real)
            case = Case(str(real))
            try:
                found, expected = differences(case), oracle(case)
            except (InputError, AssertionError) as error:
                yield f"{real}: cannot be compared: {error}"
                continue
            programs, objects = programs + 1, objects + len(expected.order) + 1
            bindings, different = bindings + len(expected.bindings), different + len(found)
            yield from (f"{real}: {difference}" for difference in found)
    yield f"{programs:,} programs, {objects:,} objects, {bindings:,} bindings compared, {different:,} differences"


def _is_program(path: Path) -> bool:
    """An executable of glibc; set-user-ID programs are left out, since ld.so ignores LD_DEBUG in them."""
    try:
        if not path.is_file() or not os.access(path, os.X_OK) or path.stat().st_mode & 0o6000:
            return False
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return False
        interpreter = load_image(path).interpreter
    except (OSError, InputError):
        return False
    return interpreter is not None and "musl" not in interpreter


def main() -> None:
    """Print the table for the host, and for an arm64 sysroot when one is named; or compare `--all DIR...`."""
    if sys.argv[1:2] == ["--all"]:
        print("\n".join(_everything(sys.argv[2:])))
        return
    with TemporaryDirectory() as directory:
        built = [_built(Path(directory), language) for language in _SOURCES]
        print("\n".join(_table([*HOST_CASES, *built])))
    for root in sys.argv[1:]:
        cases = [_arm64_case(Path(root), program, preload) for program, preload in ARM64_PROGRAMS]
        print("\n" + "\n".join(_table(cases)))


if __name__ == "__main__":
    main()
