"""Probes of programs that run on this machine: fixtures, QEMU, and programs that make it hard."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fixtures.build import Result, Toolchain
from forkproof.elf.image import load
from forkproof.facts import Facts
from forkproof.model import Finding, Frame, Lock, ProbeRecord, Severity, Verdict
from forkproof.options import QUIET, ScanOptions
from forkproof.pipeline import scan
from forkproof.probe.plan import make
from forkproof.probe.prove import Prover, Wanted
from forkproof.probe.stage import Command

RUNS = int(os.environ.get("FORKPROOF_PROBE_RUNS", "1"))
"""More for measuring."""
MACHINE = platform.machine()
HANGING = (
    "daemon_unhooked", "daemon_mutex", "daemon_futex", "daemon_decoy", "daemon_call", "daemon_partial", "cxx_new"
)  # fmt: skip
CLEAN = (
    "daemon_hooked",
    "daemon_mutex_hooked",
    "daemon_futex_hooked",
    "daemon_once",
    "daemon_shimmed",
    "cxx_new_hooked",
)
OF_OTHER_LOCKS = ("child_localtime",)
"""Locks that are not an allocator's: libc's."""
WITHOUT_LOCKS = ("daemon_tls", "daemon_lockfree", "daemon_late_threads", "daemon_libc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or MACHINE not in ("x86_64", "aarch64"), reason="probes run there only"),
]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process of the test's own is left, running or stopped, when it is over."""
    yield
    children = [word for p in Path("/proc/self/task").glob("*/children") for word in p.read_text().split()]
    states = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] for pid in children}
    assert {pid: s for pid, s in states.items() if s in "tTZ"} == {}


def probed(
    command: Sequence[str], preload: Sequence[str] = (), *, library_path: Sequence[str] = (), seconds: float = 60
) -> list[Finding]:
    environment = {**os.environ, **({"LD_LIBRARY_PATH": ":".join(library_path)} if library_path else {})}
    what = Command(tuple(command), environment, preload=tuple(preload))
    prover = Prover(Wanted(what, seconds, covered=True))
    options = ScanOptions(preload=tuple(preload), library_path=tuple(library_path))
    report = scan((command[0],), options, QUIET, prover)
    assert not report.errors
    return [finding for finding in report.findings if finding.probe is not None]


def asked(program: str, rule: str, library: str, lock: str, fork: str = "") -> ProbeRecord:
    """Probe a program for something that a scan may not find."""
    table = load(Path(library)).static_symbols
    name = Path(library).name
    of = Lock(name, lock, int(table.value[table.names.index(lock)]), "global")
    where = Frame(Path(program).name, fork, 0, "fork") if fork else None
    finding = Finding(rule, Severity.MEDIUM, Verdict.SUSPECTED, program, name, "", "", "", lock=of, fork=where)
    found: list[Finding] = []

    def prove(facts: Facts, findings: list[Finding]) -> list[Finding]:
        prover = Prover(Wanted(Command((program,), dict(os.environ)), 20))
        found.extend(prover.prove(make(facts, findings=[finding]), [finding]))
        return findings

    scan((program,), ScanOptions(), QUIET, prove)
    record = found[0].probe
    assert record is not None
    return record


def verdicts(findings: list[Finding]) -> set[Verdict]:
    return {f.probe.verdict for f in findings if f.probe is not None}


@pytest.mark.usefixtures("nothing_left")
class TestFixtures:
    @pytest.mark.parametrize("name", HANGING)
    def test_hanging(self, built_fixtures: object, name: str) -> None:
        found = [f for _ in range(RUNS) for f in probed([str(_path(built_fixtures, name))])]
        assert verdicts(found) == {Verdict.CONFIRMED}
        for finding in found:
            assert finding.probe is not None
            assert finding.probe.waiters
            assert finding.probe.holder is not None
            assert finding.probe.control

    @pytest.mark.parametrize("name", OF_OTHER_LOCKS)
    def test_hanging_on_another_lock(self, built_fixtures: object, name: str) -> None:
        for _ in range(RUNS):
            found = probed([str(_path(built_fixtures, name))])
            assert Verdict.CONFIRMED in verdicts(found)
            confirmed = [f for f in found if f.verdict is Verdict.CONFIRMED]
            assert all(f.probe is not None and f.lock is not None and f.probe.lock == f.lock for f in confirmed)

    @pytest.mark.parametrize("name", ["child_write", "own_mutex_hooked", "handler_quiet"])
    def test_clean_twin_of_those(self, built_fixtures: object, name: str) -> None:
        found = [f for _ in range(RUNS) for f in probed([str(_path(built_fixtures, name))])]
        assert Verdict.CONFIRMED not in verdicts(found)

    @pytest.mark.parametrize(
        ("name", "library", "verdict"),
        [
            ("reentry_hangs", "alloc_reentrant", Verdict.CONFIRMED),
            ("reentry_ends", "alloc_reentry_safe", Verdict.INCONCLUSIVE),
            ("relocks_hangs", "alloc_relocks", Verdict.CONFIRMED),
            ("relocks_ends", "alloc_relocks_recursive", Verdict.REFUTED),
        ],
    )
    def test_lock_reentry(self, built_fixtures: object, name: str, library: str, verdict: Verdict) -> None:
        """Asked directly: whether a scan finds the way through the hook is another matter."""
        path = str(_path(built_fixtures, name))
        for _ in range(RUNS):
            record = asked(path, "lock-reentry", str(_path(built_fixtures, library)), "arena_lock")
            assert record.verdict is verdict
            assert bool(record.waiters) == (verdict is Verdict.CONFIRMED)
            assert record.why

    @pytest.mark.parametrize(
        ("name", "expected"), [("own_mutex", Verdict.CONFIRMED), ("own_mutex_hooked", Verdict.REFUTED)]
    )
    def test_own_lock(self, built_fixtures: object, name: str, expected: Verdict) -> None:
        """A mutex of the program itself: its sites are the program's calls of lock functions."""
        path = str(_path(built_fixtures, name))
        for _ in range(RUNS):
            record = asked(path, "inherited-lock", path, "log_lock", "spawn_child")
            assert record.verdict is expected, record.why
            assert record.lock is not None
            assert record.lock.name == "log_lock"

    def test_one_lock_by_name(self, built_fixtures: object) -> None:
        """A lock that the scan calls covered, asked for by its name: the refutation is of this one."""
        what = Command((str(_path(built_fixtures, "daemon_mutex_hooked")),), dict(os.environ))
        for name, count in (("arena_lock", 1), ("no_such_lock", 0)):
            prover = Prover(Wanted(what, lock=name, covered=True))
            found = [f for f in scan(what.arguments[:1], ScanOptions(), QUIET, prover).findings if f.probe is not None]
            assert [f.probe.lock.name for f in found if f.probe is not None and f.probe.lock is not None] == [
                name
            ] * count
            assert verdicts(found) == ({Verdict.REFUTED} if count else set())

    @pytest.mark.parametrize("name", CLEAN)
    def test_clean_twin(self, built_fixtures: object, name: str) -> None:
        found = [f for _ in range(RUNS) for f in probed([str(_path(built_fixtures, name))])]
        assert verdicts(found) == {Verdict.REFUTED}

    @pytest.mark.parametrize("name", WITHOUT_LOCKS)
    def test_nothing_to_hold(self, built_fixtures: object, name: str) -> None:
        assert verdicts(probed([str(_path(built_fixtures, name))])) <= {Verdict.REFUTED, Verdict.INCONCLUSIVE}


def _path(built: object, name: str) -> Path:
    assert callable(built)
    result: Result = built(MACHINE)
    return result.tree.path(result.fixtures[name])


@pytest.fixture(scope="module")
def hookless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library whose pthread_atfork does nothing: it makes of x86-64 what arm64 is."""
    source = tmp_path_factory.mktemp("hookless") / "hookless.c"
    source.write_text(
        "int pthread_atfork(void (*a)(void), void (*b)(void), void (*c)(void)) { return !a && !b && !c; }\n"
    )
    library = source.with_name("libhookless.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.mark.real
@pytest.mark.skipif(MACHINE != "x86_64", reason="the amd64 packages run here only")
@pytest.mark.usefixtures("nothing_left")
class TestQemu:
    """Debian's QEMU under tcmalloc, with its handlers and without."""

    def run(self, root: Path, preload: Sequence[str]) -> list[Finding]:
        libraries = root / "usr/lib/x86_64-linux-gnu"
        command = [str(root / "usr/bin/qemu-system-x86_64"), "-S", "-no-user-config", "-nodefaults", "-nographic"]
        tcmalloc = str(libraries / "libtcmalloc.so.4")
        extra = [str(libraries), *map(str, libraries.glob("pulseaudio"))]
        return probed([*command, "-machine", "none", "-daemonize"], [*preload, tcmalloc], library_path=extra)

    def test_stock_library_is_refuted(self, sysroot_amd64: Path) -> None:
        for _ in range(RUNS):
            found = self.run(sysroot_amd64, [])
            # lock-reentry is about no fork, and the lock that it names is taken only when the heap profiler is on.
            forks = [f for f in found if f.object.startswith("libtcmalloc") and f.rule != "lock-reentry"]
            assert verdicts(forks) == {Verdict.REFUTED}
            assert Verdict.CONFIRMED not in verdicts(found), "the child asks for no lock of libc that a thread takes"

    def test_without_handlers_it_is_confirmed(self, sysroot_amd64: Path, hookless: str) -> None:
        for _ in range(RUNS):
            found = [f for f in self.run(sysroot_amd64, [hookless]) if f.fork and f.fork.function == "os_daemonize"]
            # Which lock the thread takes is chance; a finding about one that it does not take stays open.
            confirmed = [f for f in found if f.probe is not None and f.probe.verdict is Verdict.CONFIRMED]
            assert confirmed
            assert verdicts(found) <= {Verdict.CONFIRMED, Verdict.INCONCLUSIVE}
            record = confirmed[0].probe
            assert record is not None
            assert all(record.lock_address in waiter.doing for waiter in record.waiters)


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory, built_x86_64: Result) -> Path:
    program = tmp_path_factory.mktemp("robust") / "robust"
    library = built_x86_64.tree.path(built_x86_64.fixtures["alloc_mutex"])
    source = Path(__file__).with_name("robust.c")
    command: list[str | Path] = [Toolchain("x86_64").compiler(source), "-O1", "-pthread", "-o", program, source]
    subprocess.run([*command, "-Wl,--no-as-needed", library, f"-Wl,-rpath,{library.parent}"], check=True)
    return program


@pytest.mark.skipif(MACHINE != "x86_64", reason="built for this machine only")
@pytest.mark.usefixtures("nothing_left")
class TestHardCases:
    @pytest.mark.parametrize("what", ["crash", "exec", "vfork", "seccomp", "killed"])
    def test_ends_with_a_reason(self, robust: Path, what: str) -> None:
        found = probed([str(robust), what])
        assert found
        assert all(f.probe is not None and f.probe.why for f in found)
        assert Verdict.CONFIRMED not in verdicts(found), "its children ask for no lock"

    @pytest.mark.parametrize("what", ["plain", "ignore", "ptrace", "close"])
    def test_is_probed_as_ever(self, robust: Path, what: str) -> None:
        found = probed([str(robust), what])
        assert Verdict.CONFIRMED not in verdicts(found)
        assert any(f.probe is not None and f.probe.holder is not None for f in found), "the lock was held"

    def test_stopped_by_itself(self, robust: Path) -> None:
        found = probed([str(robust), "stop"], seconds=3)
        assert verdicts(found) == {Verdict.INCONCLUSIVE}

    def test_time_limit(self, robust: Path) -> None:
        begun = time.monotonic()
        found = probed([str(robust), "forever"], seconds=2)
        assert verdicts(found) == {Verdict.INCONCLUSIVE}
        assert time.monotonic() - begun < 60, "two seconds a run; the rest is a loaded machine"

    def test_thousand_forks(self, robust: Path) -> None:
        assert Verdict.CONFIRMED not in verdicts(probed([str(robust), "many"], seconds=20))

    def test_interrupted(self, robust: Path) -> None:
        """Ctrl-C: exit code 130, and nothing of the program is left."""
        code = "import sys; from forkproof.cli import main; main()"
        command = [sys.executable, "-c", code, "probe", "--timeout", "100", "--", str(robust), "forever"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            while not _running(robust):
                time.sleep(0.05)
            process.send_signal(2)
            assert process.wait(60) == 130
        assert not _running(robust)

    def test_killed_tracer_takes_its_tracees_along(self, robust: Path) -> None:
        code = "import sys; from forkproof.cli import main; main()"
        command = [sys.executable, "-c", code, "probe", "--timeout", "100", "--", str(robust), "forever"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while not _running(robust):
                time.sleep(0.05)
            process.kill()
        for _ in range(200):
            if not _running(robust):
                break
            time.sleep(0.05)
        assert not _running(robust)


def _running(program: Path) -> bool:
    """Some process runs this file."""
    for link in Path("/proc").glob("[0-9]*/exe"):
        try:
            if link.readlink() == program:
                return True
        except OSError:
            continue
    return False
