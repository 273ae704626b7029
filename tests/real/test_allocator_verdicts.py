"""Every allocator that Debian has, on both machines: what forkproof says of its fork handlers, and what happens when
three threads allocate while a fourth forks.

`python -m tests.real.test_allocator_verdicts` prints the table of docs/allocators.md: it preloads each library into
allocator_stress.c and counts children that hang in malloc. amd64 libraries run natively under their own dynamic linker,
arm64 ones by qemu-user. The tests only scan; the two marked `slow` run the stress on what is called protected.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import forkproof
from forkproof.report import json as report_json
from tests.support import kept
from tools.sysroot import find

pytestmark = [pytest.mark.real, pytest.mark.together("case")]

SOURCE = Path(__file__).with_name("allocator_stress.c")
CLANG = "/usr/lib/llvm-14/lib/clang/14.0.6/lib/linux"
ALL = "bookworm-amd64-allocators"
TRIPLET = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
QEMU = {"amd64": "qemu-x86_64", "arm64": "qemu-aarch64"}
FORKS, MOST_HANGS, LIMIT = 200, 10, 240


@dataclass(frozen=True)
class Case:
    """An allocator in a sysroot, and what is true of it."""

    sysroot: str
    library: str
    """A soname in the usual directory, or a path; empty for libc's own."""
    hooks: str
    """What the report should say."""
    family: str
    version: str | None = None
    handlers: str = ""
    """The prepare handler, where exported symbols name it."""
    also: tuple[str, ...] = ()

    @property
    def arch(self) -> str:
        return "arm64" if "arm64" in self.sysroot else "amd64"

    @property
    def path(self) -> str:
        return self.library if "/" in self.library else f"/usr/lib/{TRIPLET[self.arch]}/{self.library}"

    @property
    def name(self) -> str:
        return Path(self.library).name or "libc.so.6"


_LOCK_ALL = "tcmalloc::CentralCacheLockAll()"


def _gperftools(sysroot: str, version: str, hooks: str, *, also: tuple[str, ...] = ()) -> Iterator[Case]:
    for name in ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4"):
        yield Case(sysroot, name, hooks, "tcmalloc", version, _LOCK_ALL, also=also)
    for name in ("libtcmalloc_debug.so.4", "libtcmalloc_minimal_debug.so.4"):
        if hooks == "unbound":
            yield Case(sysroot, name, hooks, "tcmalloc", version, _LOCK_ALL, also=also)
        else:
            # MallocBlock::alloc_map_lock_ and free_queue_lock_ are debugallocation.cc's own, and no handler takes them.
            yield Case(sysroot, name, "incomplete", "tcmalloc", version, _LOCK_ALL, also=also)


def _cases() -> Iterator[Case]:
    # In glibc 2.31 pthread_atfork's compatibility symbol is in libpthread, which every threaded program has loaded.
    yield from _gperftools("bullseye-amd64", "2.8.1", "effective", also=("libpthread.so.0",))
    yield from _gperftools("bullseye-arm64", "2.8.1", "unbound", also=("libpthread.so.0",))
    yield from _gperftools("bookworm-amd64", "2.10", "effective")
    yield from _gperftools("bookworm-arm64", "2.10", "unbound")
    yield from _gperftools("trixie-amd64", "2.16", "effective")
    yield from _gperftools("trixie-arm64", "2.16", "effective")
    for suite, version in (("bullseye", "5.2.1"), ("bookworm", "5.3.0"), ("trixie", "5.3.0")):
        for arch in TRIPLET:
            # 5.2.1: log_mtx, and the init_lock of extents_rtree, at which children were seen to wait; not with 5.3.0.
            hooks = "incomplete" if version == "5.2.1" else "effective"
            yield Case(f"{suite}-{arch}", "libjemalloc.so.2", hooks, "jemalloc", version)
            yield Case(f"{suite}-{arch}", "", "builtin", "ptmalloc")
    for arch in TRIPLET:
        yield Case(f"bookworm-{arch}", "libmimalloc.so.2", "absent", "mimalloc")
    # Its malloc is scalable_malloc in libtbbmalloc.so.2: the locks are another object's.
    yield Case(ALL, "libtbbmalloc_proxy.so.2", "absent", "tbbmalloc")
    yield Case(ALL, "/usr/lib/libefence.so.0", "absent", "electric-fence")
    yield Case(ALL, "/usr/lib/libduma.so.0", "absent", "electric-fence")
    yield Case(ALL, "libdmalloc.so.5", "absent", "dmalloc", "5.5.2")
    yield Case(ALL, "libdmallocth.so.5", "absent", "dmalloc", "5.5.2")
    yield Case(ALL, f"{CLANG}/libclang_rt.scudo_standalone-x86_64.so", "effective", "scudo")
    for name in ("scudo", "scudo_minimal"):
        yield Case(ALL, f"{CLANG}/libclang_rt.{name}-x86_64.so", "incomplete", "scudo")


CASES = tuple(_cases())


def _id(case: Case) -> str:
    return f"{case.sysroot}-{case.name}"


# ---- what forkproof says ------------------------------------------------------------------------


@cache
def verdict(case: Case, root: Path) -> dict[str, Any]:
    """What the report says of the active allocator.

    Single locks are looked at where a fork among threads can meet them: not in these programs, but in a library alone.
    """
    program = next(p for p in ("/usr/bin/bash", "/usr/bin/getconf") if (root / p[1:]).exists())
    preload = [case.path] if case.library else []
    if case.hooks == "incomplete":
        program, preload = case.path, []
    report = forkproof.scan(program, sysroot=root, preload=preload, also=case.also, cache=kept.directory())
    (target,) = json.loads(report_json.render(report))["targets"]
    (active,) = [a for a in target["allocators"] if a["active"]]
    assert isinstance(active, dict)
    return active


def _params() -> Iterator[Any]:
    for case in CASES:
        marks = [pytest.mark.arm64] if case.arch == "arm64" else []
        yield pytest.param(case, id=_id(case), marks=marks)


@pytest.mark.parametrize("case", list(_params()))
def test_verdict(case: Case, sysroot: Callable[[str], Path]) -> None:
    root = sysroot(case.sysroot)
    if case.library and not (root / case.path[1:]).exists():
        pytest.skip(f"no {case.path} in {root}")
    assert verdict(case, root)["hooks"] == case.hooks


@pytest.mark.parametrize("case", [pytest.param(c, id=_id(c)) for c in CASES])
def test_recognised(case: Case, sysroot: Callable[[str], Path]) -> None:
    """Family, version and handlers, whatever the verdict."""
    root = sysroot(case.sysroot)
    found = verdict(case, root)
    assert found["family"] == case.family
    if case.version is not None:
        assert found["version"] == case.version
    if case.handlers:
        assert found["handlers"][0] == case.handlers
    if case.hooks in {"effective", "unbound", "incomplete"}:
        assert found["registered_by"]
        assert len(found["handlers"]) == 3


def test_an_effective_registration_says_what_it_binds_to(sysroot: Callable[[str], Path]) -> None:
    old = verdict(CASES[0], sysroot("bullseye-amd64"))
    assert "libpthread.so.0" in old["why"] or "libpthread" in str(old["registered_by"])
    new = next(c for c in CASES if c.sysroot == "trixie-arm64")
    assert "__register_atfork binds to libc.so.6" in verdict(new, sysroot("trixie-arm64"))["why"]


def test_without_libpthread_the_old_compatibility_symbol_is_not_there(sysroot: Callable[[str], Path]) -> None:
    """tcmalloc_minimal 2.8.1 does not need libpthread: in a program that does not either, nothing is registered."""
    case = next(c for c in CASES if c.sysroot == "bullseye-amd64" and c.library == "libtcmalloc_minimal.so.4")
    assert verdict(Case(case.sysroot, case.library, "unbound", "tcmalloc"), sysroot(case.sysroot))["hooks"] == "unbound"


@pytest.mark.parametrize("link", ["dynamic", "static"])
def test_musl_quiesces_its_own_since_1_2_2(link: str, tmp_path: Path) -> None:
    """musl ≥ 1.2.2: fork takes the locks of its malloc (167390f0)."""
    compiler = shutil.which("musl-gcc")
    if compiler is None:
        pytest.skip("no musl-gcc (Debian: musl-tools)")
    program = tmp_path / "stress"
    flags = ["-static"] if link == "static" else []
    subprocess.run([compiler, "-O2", "-D_GNU_SOURCE", *flags, "-o", program, SOURCE], check=True)
    (target,) = json.loads(report_json.render(forkproof.scan(program)))["targets"]
    (active,) = [a for a in target["allocators"] if a["active"]]
    assert active["family"] == "musl"
    if link == "dynamic":
        assert target["libc"].startswith("musl 1.2")
        assert active["hooks"] == "builtin"
    else:  # a static program holds the version only where it asks for it, and 1.2.1 did not quiesce
        assert target["libc"] == "musl"
        assert active["hooks"] == "unknown"


# ---- what happens -------------------------------------------------------------------------------


def _compiled(case: Case, root: Path, directory: Path) -> Path:
    """The stress program, linked with the sysroot's own C library: a newer one's symbols would not be there."""
    output = directory / f"stress-{case.sysroot}"
    if not output.exists():
        libraries = root / "usr/lib" / TRIPLET[case.arch]
        needed = [libraries / n for n in ("libpthread.so.0", "libc.so.6") if (libraries / n).exists()]
        needed = [n for n in needed if n.name == "libc.so.6" or "bullseye" in case.sysroot]
        compiler = "gcc" if case.arch == _native() else f"{TRIPLET[case.arch]}-gcc"
        command: list[str | Path] = [
            compiler,
            "-O2",
            "-pthread",
            "-o",
            output,
            SOURCE,
            "-nodefaultlibs",
            "-Wl,--no-as-needed",
        ]
        subprocess.run([*command, *needed, _linker(case, root), "-lgcc"], check=True)
    return output


def _linker(case: Case, root: Path) -> Path:
    """The dynamic linker's file: links to it are absolute, and would lead to this machine's own."""
    found = sorted((root / "usr/lib" / TRIPLET[case.arch]).glob("ld-*.so*"))
    return next(path for path in found if not path.is_symlink())


def _native() -> str:
    return "amd64" if platform.machine() == "x86_64" else "arm64"


def stress(case: Case, root: Path, directory: Path, forks: int = FORKS) -> str | None:
    """ "hangs/forks" as the stress program counts them; None where nothing here runs it."""
    prefix: list[str] = []
    if case.arch != _native():
        qemu = shutil.which(QEMU[case.arch])
        if qemu is None or shutil.which(f"{TRIPLET[case.arch]}-gcc") is None:
            return None
        prefix = [qemu]
    preload = ["--preload", str(root / case.path[1:])] if case.library else []
    linker = str(_linker(case, root))
    libraries = f"{root}/usr/lib/{TRIPLET[case.arch]}"
    command: list[str | Path] = [
        *prefix,
        linker,
        "--library-path",
        libraries,
        *preload,
        _compiled(case, root, directory),
    ]
    environment = {**os.environ, "EF_DISABLE_BANNER": "1"}
    done = subprocess.run(
        [*command, str(forks), str(MOST_HANGS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        env=environment,
    )
    counted = re.search(r"forks=(\d+) hangs=(\d+)", done.stdout)
    return f"{counted[2]}/{counted[1]}" if counted else f"ended with {done.returncode}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=_id(c)) for c in CASES if c.arch == _native() and c.hooks in {"effective", "builtin"}]
)
def test_what_is_called_protected_does_not_hang(case: Case, sysroot: Callable[[str], Path], tmp_path: Path) -> None:
    hangs = stress(case, sysroot(case.sysroot), tmp_path)
    assert hangs == f"0/{FORKS}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["libdmallocth.so.5", "libtcmalloc_minimal_debug.so.4"])
def test_the_stress_can_tell(name: str, sysroot: Callable[[str], Path], tmp_path: Path) -> None:
    """The two that hang most: without them, "0 hangs" above would prove nothing."""
    case = next(c for c in CASES if c.name == name and c.sysroot in {ALL, "bookworm-amd64"})
    hangs = stress(case, sysroot(case.sysroot), tmp_path)
    assert hangs is not None
    assert int(hangs.partition("/")[0]) > 0


# ---- the table of docs/allocators.md ------------------------------------------------------------


def _rows(directory: Path) -> Iterator[str]:
    for case in CASES:
        root = find(case.sysroot)
        if root is None:
            print(f"no sysroot {case.sysroot}", file=sys.stderr)
            continue
        found = verdict(case, root)
        try:
            hangs = stress(case, root, directory) or "not run"
        except subprocess.TimeoutExpired:
            hangs = f"over {LIMIT} s"
        print(f"{_id(case)}: {found['hooks']}, {hangs}", file=sys.stderr)
        version = found["version"] or "?"
        suite = case.sysroot.split("-")[0]
        yield f"| {case.name} | {found['family']} {version} | {suite} {case.arch} | {found['hooks']} | {hangs} |"


if __name__ == "__main__":
    print("| allocator | version | machine | handlers | hangs/forks |\n|---|---|---|---|---|")
    with TemporaryDirectory() as scratch:
        for row in _rows(Path(scratch)):
            print(row, flush=True)
