"""The incident, on unmodified Debian 12: QEMU daemonizes, gperftools is preloaded, and on aarch64 its fork handlers
bind to nothing. One command must say what took days of gdb; and it must be silent where the same source is safe.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fixtures.truth import HERE as FIXTURES
from tests.support.command import Completed, forkproof

pytestmark = [pytest.mark.real, pytest.mark.together]

QEMU = {"arm64": "/usr/bin/qemu-system-aarch64", "amd64": "/usr/bin/qemu-system-x86_64"}
TCMALLOC = "libtcmalloc.so.4"
SHIM = "libshim_pthread_atfork.so"

# gdb's stacks of the hung child, outermost first: what stripped files still name.
HOLDER_STACK = ("g_free", "tcmalloc::CentralFreeList::InsertRange", "SpinLock::SlowLock")
REQUESTER_STACK = (
    "tcmalloc::ThreadCache::FetchFromCentralCache",
    "tcmalloc::CentralFreeList::RemoveRange",
    "SpinLock::SlowLock",
)

Json = dict[str, Any]


@cache
def _scan(root: Path, program: str, *preload: str) -> Completed:
    """One scan for all tests that ask for the same."""
    options = [word for name in preload for word in ("--preload", name)]
    return forkproof("scan", "--sysroot", root, program, *options, "--format", "json")


@pytest.fixture
def arm64(sysroot_arm64: Path) -> Completed:
    return _scan(sysroot_arm64, QEMU["arm64"], TCMALLOC)


@pytest.fixture
def amd64(sysroot_amd64: Path) -> Completed:
    return _scan(sysroot_amd64, QEMU["amd64"], TCMALLOC)


@pytest.fixture(scope="module")
def shimmed_root(sysroot_arm64: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second tree of links to the sysroot's files, which stay as they are, and the shim."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None:
        pytest.skip("no compiler for aarch64")
    # Links must stay on the disk of the sysroot: pytest's directory may be on another.
    root = tmp_path_factory.mktemp("shimmed") / "root"
    try:
        _linked_copy(sysroot_arm64, root)
    except OSError:
        pytest.skip(f"{root} is not on the disk of {sysroot_arm64}")
    source = FIXTURES / "allocators" / "shim_pthread_atfork.c"
    output = root / "usr/lib/aarch64-linux-gnu" / SHIM
    flags = ["-shared", "-fPIC", "-O2", f"-I{FIXTURES / 'include'}", f"-Wl,-soname,{SHIM}"]
    subprocess.run([compiler, *flags, "-o", output, source], check=True)
    return root


def _linked_copy(source: Path, target: Path) -> None:
    """What the program can load: bin and lib, as hard links."""
    for name in ("usr/bin", "usr/lib", "etc/ld.so.conf", "etc/ld.so.conf.d"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, symlinks=True, copy_function=os.link)
        elif (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, target / name)
    for name in ("bin", "sbin", "lib", "lib64"):
        (target / name).symlink_to(f"usr/{name}")


def _target(done: Completed) -> Json:
    (target,) = done.json()["targets"]
    assert isinstance(target, dict)
    return target


def _active(target: Json) -> Json:
    (found,) = [a for a in target["allocators"] if a["active"]]
    assert isinstance(found, dict)
    return found


def _inherited(done: Completed) -> Json:
    """The finding about the daemon and the lock of the incident: one of the central lists."""
    (finding,) = [f for f in _of_the_daemon(done) if f["lock"]["form"] == "array"]
    return finding


def _of_the_daemon(done: Completed) -> list[Json]:
    found: list[Json] = [
        f for f in done.json()["findings"] if f["rule"] == "inherited-lock" and f["severity"] == "high"
    ]
    return [f for f in found if f["fork"]["function"] == "os_daemonize"]


def _functions(frames: list[Json]) -> list[str]:
    return [frame["function"] for frame in frames]


@pytest.mark.arm64
class TestTheHang:
    def test_exit_code(self, arm64: Completed) -> None:
        assert arm64.code == 1

    def test_handlers_exist_and_are_never_registered(self, arm64: Completed) -> None:
        allocator = _active(_target(arm64))
        assert (allocator["object"], allocator["family"], allocator["version"]) == (TCMALLOC, "tcmalloc", "2.10")
        assert allocator["hooks"] == "unbound"
        assert "pthread_atfork" in allocator["why"]
        assert "binds to nothing" in allocator["why"]

    def test_the_cause_is_a_finding_of_its_own(self, arm64: Completed) -> None:
        (cause,) = [f for f in arm64.json()["findings"] if f["rule"] == "atfork-unbound"]
        assert (cause["object"], cause["severity"]) == (TCMALLOC, "high")
        assert "2.11" in cause["fix"]

    def test_the_fork_is_the_daemons(self, arm64: Completed) -> None:
        windows = [w for w in _target(arm64)["windows"] if w["function"] == "os_daemonize"]
        assert [w["kind"] for w in windows] == ["daemonize", "daemonize"]
        assert all(w["handlers_run"] and w["reachable"] == w["threads"] == "yes" for w in windows)

    def test_a_constructor_of_the_program_starts_a_thread_before_main(self, arm64: Completed) -> None:
        target = _target(arm64)
        assert target["threads"] == "yes"
        first = target["thread_sources"][0]
        assert first[0]["object"] == "qemu-system-aarch64"
        assert _functions(first)[-2:] == ["qemu_thread_create", "pthread_create"]

    def test_all_four_conditions_are_shown(self, arm64: Completed) -> None:
        finding = _inherited(arm64)
        assert finding["verdict"] == "reachable"
        assert finding["object"] == finding["lock"]["object"] == TCMALLOC
        assert "atfork-unbound" in finding["why"]
        conditions = finding["conditions"]
        assert "constructor" in conditions["threads"]
        assert "binds to nothing" in conditions["not_quiesced"]

    def test_each_lock_that_the_handlers_would_have_taken_is_found(self, arm64: Completed) -> None:
        locks = {(f["lock"]["form"], f["lock"]["name"]) for f in _of_the_daemon(arm64)}
        assert ("global", "tcmalloc::Static::pageheap_lock_") in locks
        assert {form for form, _ in locks} == {"global", "array"}

    def test_the_stacks_are_those_of_the_incident(self, arm64: Completed) -> None:
        """In order, the functions that gdb showed and that the file's symbols name."""
        finding = _inherited(arm64)
        for path, stack in (("holder", HOLDER_STACK), ("requester", REQUESTER_STACK)):
            named = iter([name.partition("(")[0] for name in _functions(finding[path])])
            assert all(wanted in named for wanted in stack), (path, _functions(finding[path]))

    def test_the_holder_frees_what_it_was_started_with(self, arm64: Completed) -> None:
        """The incident's own stack: qemu_thread_start → g_free → free → … → the lock of a central list."""
        holder = _inherited(arm64)["holder"]
        assert holder[0]["object"] == "qemu-system-aarch64"
        assert "g_free" in _functions(holder)
        assert holder[-1]["object"] == TCMALLOC
        assert "SpinLock" in holder[-1]["function"]

    def test_the_requester_is_the_daemon_itself(self, arm64: Completed) -> None:
        requester = _inherited(arm64)["requester"]
        assert requester[0]["object"] == "qemu-system-aarch64"
        assert any(name.startswith("g_") and "alloc" in name for name in _functions(requester))
        assert requester[-1]["object"] == TCMALLOC
        assert "SpinLock" in requester[-1]["function"]

    def test_the_page_explains_it(self, arm64: Completed, sysroot_arm64: Path) -> None:
        """The same through the text: the words that somebody at 3 a.m. looks for."""
        arguments: list[str | Path] = ["scan", "--sysroot", sysroot_arm64, QEMU["arm64"], "--preload", TCMALLOC]
        done = forkproof(*arguments, "--explain", _inherited(arm64)["id"])
        for word in ("os_daemonize", TCMALLOC, "g_free", "pthread_atfork", "2.11"):
            assert word in done.stdout

    def test_twice_is_the_same(self, arm64: Completed, sysroot_arm64: Path) -> None:
        again = forkproof("scan", "--sysroot", sysroot_arm64, QEMU["arm64"], "--preload", TCMALLOC, "--format", "json")
        assert again.stdout == arm64.stdout


@pytest.mark.arm64
class TestTheCure:
    def test_a_shim_that_exports_pthread_atfork(self, shimmed_root: Path) -> None:
        done = _scan(shimmed_root, QEMU["arm64"], SHIM, TCMALLOC)
        assert done.code == 0
        allocator = _active(_target(done))
        assert (allocator["object"], allocator["hooks"]) == (TCMALLOC, "effective")
        assert SHIM in {allocator["why"], *(frame["object"] for frame in allocator["registered_by"])}
        findings = done.json()["findings"]
        assert not [f for f in findings if f["severity"] == "high" or f["rule"] == "atfork-unbound"]
        # What is left is about a raw clone, which runs no handlers: no handler cures that.
        assert {f["fork"]["object"] for f in findings if f["rule"] == "inherited-lock"} <= {TCMALLOC}

    def test_the_copy_without_the_shim_hangs_as_before(self, shimmed_root: Path) -> None:
        """So it is the shim that cures, and not the copy."""
        assert _scan(shimmed_root, QEMU["arm64"], TCMALLOC).code == 1

    def test_the_order_of_preloads_does_not_matter(self, shimmed_root: Path) -> None:
        assert _active(_target(_scan(shimmed_root, QEMU["arm64"], TCMALLOC, SHIM)))["hooks"] == "effective"

    def test_without_a_preload_libc_quiesces_itself(self, sysroot_arm64: Path) -> None:
        done = _scan(sysroot_arm64, QEMU["arm64"])
        assert done.code == 0
        assert _active(_target(done))["hooks"] == "builtin"


class TestTheOtherMachine:
    """x86-64 has a compatibility symbol pthread_atfork@GLIBC_2.2.5, to which the same reference binds."""

    def test_nothing_is_found(self, amd64: Completed) -> None:
        assert amd64.code == 0
        assert not [f for f in amd64.json()["findings"] if f["severity"] == "high"]

    def test_the_handlers_are_effective(self, amd64: Completed) -> None:
        allocator = _active(_target(amd64))
        assert (allocator["object"], allocator["hooks"]) == (TCMALLOC, "effective")
        assert "binds to libc.so.6" in allocator["why"]

    def test_the_rest_is_the_same_hazard(self, amd64: Completed) -> None:
        """Same windows, same threads: only the binding differs."""
        target = _target(amd64)
        assert target["threads"] == "yes"
        windows = [w for w in target["windows"] if w["function"] == "os_daemonize"]
        assert [w["kind"] for w in windows] == ["daemonize", "daemonize"]
        assert target["thread_sources"][0][0]["object"] == "qemu-system-x86_64"

    def test_the_same_program_of_this_machine(self) -> None:
        program = Path(QEMU["amd64"])
        if not program.exists() or not list(Path("/usr/lib").glob(f"*/{TCMALLOC}")):
            pytest.skip(f"no {program} with {TCMALLOC} here")
        done = forkproof("scan", program, "--preload", TCMALLOC, "--format", "json")
        assert done.code == 0
        assert _active(_target(done))["hooks"] == "effective"


@pytest.mark.parametrize(("suite", "hooks", "code"), [("bookworm", "unbound", 1), ("trixie", "effective", 0)])
@pytest.mark.arm64
def test_a_newer_gperftools_is_the_cure_that_debian_shipped(
    suite: str, hooks: str, code: int, sysroot_arm64: Path, request: pytest.FixtureRequest
) -> None:
    """2.16 refers to __register_atfork, strongly: trixie's library on trixie's own C library."""
    root: Path = request.getfixturevalue("sysroot")(f"{suite}-arm64")
    program = QEMU["arm64"] if suite == "bookworm" else "/usr/bin/getconf"
    if not (root / program[1:]).exists():
        pytest.skip(f"no {program} in {root}")
    done = _scan(root, program, TCMALLOC)
    assert done.code == code
    assert _active(_target(done))["hooks"] == hooks
