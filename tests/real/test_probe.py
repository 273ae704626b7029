"""Probes of programs that run on this machine: fixtures, QEMU, and programs that make it hard."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fixtures.build import Result, Toolchain
from forkproof import libc_locks, pipeline
from forkproof.elf.image import load
from forkproof.model import Finding, Frame, Lock, ProbeRecord, Severity, Verdict
from forkproof.options import QUIET, ScanOptions
from forkproof.pipeline import scan
from forkproof.probe import census, planfile, ptrace, session
from forkproof.probe.plan import Plan, make
from forkproof.probe.prepare import plan_text, prepared
from forkproof.probe.prove import Prover, Wanted
from forkproof.probe.session import Session
from forkproof.probe.sites import AcquireSite
from forkproof.probe.stage import Command, Stage
from tools import probe_jobs

RUNS = int(os.environ.get("FORKPROOF_PROBE_RUNS", "1"))
"""More for measuring."""
MACHINE = platform.machine()
COMMAND = (sys.executable, "-c", "from forkproof.cli import main; main()")
HANGING = (
    "daemon_unhooked", "daemon_mutex", "daemon_futex", "daemon_decoy", "daemon_call", "daemon_partial", "cxx_new",
    "child_readdir",
)  # fmt: skip
CLEAN = (
    "daemon_hooked",
    "daemon_mutex_hooked",
    "daemon_futex_hooked",
    "daemon_once",
    "daemon_shimmed",
    "cxx_new_hooked",
)
OF_OTHER_LOCKS = (
    "own_spin_looked",
    "own_recursive",
    "child_localtime",
)
"""Locks that are not an allocator's: the program's own, that who waits for looks at, without trying; its own that fork
handlers hold and never let go; libc's."""
WITHOUT_LOCKS = ("daemon_tls", "daemon_lockfree", "daemon_late_threads", "daemon_libc")

SOMEBODY_ELSE = (
    "setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"
)  # fmt: skip
"""Another user, who can read the files of this one, and has no other rights."""


def _can_be_somebody_else() -> bool:
    try:
        return os.geteuid() == 0 and subprocess.run([*SOMEBODY_ELSE, "true"], check=False).returncode == 0
    except OSError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or MACHINE not in ("x86_64", "aarch64"), reason="probes run there only"),
]


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """No process that the test started is left, running or stopped, when it is over."""
    mark = f"{os.getpid()}-{request.node.name}"
    monkeypatch.setenv(probe_jobs.MARK, mark)
    yield
    assert list(probe_jobs.left_over(mark)) == []


def probed(
    command: Sequence[str], preload: Sequence[str] = (), *, library_path: Sequence[str] = (), seconds: float = 60
) -> list[Finding]:
    environment = {**os.environ, **({"LD_LIBRARY_PATH": ":".join(library_path)} if library_path else {})}
    what = Command(tuple(command), environment, preload=tuple(preload))
    report, plan = prepared(command[0], ScanOptions(preload=tuple(preload), library_path=tuple(library_path)))
    assert not report.errors
    found = Prover(Wanted(what, seconds, covered=True)).prove(plan, list(report.findings))
    return [finding for finding in found if finding.probe is not None]


def asked(program: str, rule: str, library: str, lock: str, fork: str = "") -> ProbeRecord:
    """Probe a program for something that a scan may not find."""
    table = load(Path(library)).static_symbols
    name = Path(library).name
    of = Lock(name, lock, int(table.value[table.names.index(lock)]), "global")
    where = Frame(Path(program).name, fork, 0, "fork") if fork else None
    finding = Finding(rule, Severity.MEDIUM, Verdict.SUSPECTED, program, name, "", "", "", lock=of, fork=where)
    plans: list[Plan] = []
    scan((program,), ScanOptions(), QUIET, lambda facts, _: plans.append(make(facts, findings=[finding])))
    record = Prover(Wanted(Command((program,), dict(os.environ)), 20)).prove(plans[0], [finding])[0].probe
    assert record is not None
    return record


def verdicts(findings: list[Finding]) -> set[Verdict]:
    return {f.probe.verdict for f in findings if f.probe is not None}


_HOLDERS = """
#include <pthread.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
struct holder { long kind; pthread_mutex_t lock; };
static struct holder *first, *second;
static volatile int rounds;
__attribute__((noinline)) static void enter(struct holder *h) { pthread_mutex_lock(&h->lock); }
__attribute__((noinline)) static void leave(struct holder *h) { pthread_mutex_unlock(&h->lock); }
__attribute__((noinline)) static struct holder *make(void) {
    struct holder *h = calloc(1, sizeof *h); pthread_mutex_init(&h->lock, 0); return h; }
static void *worker(void *p) {
    for (;; rounds++) { enter(first); rounds++; leave(first); enter(second); rounds++; leave(second); }
    return p; }
int main(int count, char **words) {
    pthread_t t; first = make(); second = make(); pthread_create(&t, 0, worker, 0);
    while (rounds < 9) usleep(100);
    pid_t child = fork();
    if (child == 0) {
        enter(first); leave(first);
        if (count > 1) { enter(second); leave(second); }
        _exit(0);
    }
    return waitpid(child, 0, 0);
}
"""


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("more", [[], ["more"]])
def test_a_lock_behind_a_pointer_is_told_from_another(tmp_path: Path, more: list[str]) -> None:
    """Both are taken at one instruction; only the one that its own pointer leads to shows a finding."""
    (tmp_path / "holders.c").write_text(_HOLDERS, encoding="utf-8")
    subprocess.run(["gcc", "-O2", "-pthread", "holders.c", "-o", "holders"], cwd=tmp_path, check=True)
    found = {f.lock.name: f.probe for f in probed([str(tmp_path / "holders"), *more]) if f.lock is not None}
    first, second = found["(*first)+0x8"], found["(*second)+0x8"]
    assert first is not None
    assert first.verdict is Verdict.CONFIRMED
    assert second is not None
    assert (second.verdict is Verdict.CONFIRMED) == bool(more)


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

    def test_lock_that_is_taken_through_a_pointer(self, built_fixtures: object) -> None:
        """The dynamic linker's: that it is taken is seen each time, and that it is at a fork by chance."""
        found = [f for f in probed([str(_path(built_fixtures, "child_dlopen"))]) if f.lock and "ld-" in f.lock.object]
        assert found
        assert Verdict.REFUTED not in verdicts(found)
        assert all(f.probe and any("_rtld_global" in line for line in f.probe.census) for f in found)

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

    def test_a_milder_finding_that_is_confirmed_fails_a_gate(self, built_fixtures: object) -> None:
        """The scan ranks this one medium, and the default gate is high."""
        path = str(_path(built_fixtures, "relocks_hangs"))
        command = [*COMMAND, "probe", "--rule", "lock-reentry", "--format", "json", "--", path]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        found = next(f for f in json.loads(ran.stdout)["findings"] if f["verdict"] == "confirmed")
        assert (found["severity"], found["probe"]["scan_severity"], ran.returncode) == ("high", "medium", 1)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("own_mutex", Verdict.CONFIRMED),
            ("own_mutex_hooked", Verdict.REFUTED),
            ("own_semaphore", Verdict.CONFIRMED),  # 0 is taken
            ("own_mutex_attempted", Verdict.CONFIRMED),  # that the handler got it in one run says nothing of the next
            ("own_mutex_attempted_again", Verdict.REFUTED),  # it goes round until it has it
        ],
    )
    def test_own_lock(self, built_fixtures: object, name: str, expected: Verdict) -> None:
        """A mutex of the program itself: its sites are the program's calls of lock functions."""
        path = str(_path(built_fixtures, name))
        for _ in range(RUNS):
            record = asked(path, "inherited-lock", path, "log_lock", "spawn_child")
            assert record.verdict is expected, record.why
            assert record.lock is not None
            assert record.lock.name == "log_lock"

    def test_lock_that_processes_share(self, built_fixtures: object) -> None:
        """Its memory is mapped from /dev/zero, which is no object."""
        path = str(_path(built_fixtures, "own_semaphore_shared"))
        record = asked(path, "inherited-lock", path, "log_lock", "spawn_child")
        assert record.verdict is Verdict.INCONCLUSIVE, record.why

    def test_lock_that_the_fork_itself_has(self, built_fixtures: object) -> None:
        """The child hangs whatever other threads do; in the control run it starts with the lock free."""
        path = str(_path(built_fixtures, "own_recursive"))
        record = asked(path, "inherited-lock", path, "log_lock", "spawn_child")
        assert record.verdict is Verdict.CONFIRMED, record.why
        assert "the forking thread itself had" in record.why
        assert record.holder is not None
        assert record.holder.doing == "forks, and has the lock"
        assert "made free" in record.control

    def test_one_lock_by_name(self, built_fixtures: object) -> None:
        """A lock that the scan calls covered, asked for by its name: the refutation is of this one."""
        what = Command((str(_path(built_fixtures, "daemon_mutex_hooked")),), dict(os.environ))
        report, plan = prepared(what.arguments[0], ScanOptions())
        for name, count in (("arena_lock", 1), ("no_such_lock", 0)):
            proven = Prover(Wanted(what, lock=name, covered=True)).prove(plan, list(report.findings))
            found = [f for f in proven if f.probe is not None]
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


class TestPlans:
    def test_kept_for_the_next_time(
        self, built_fixtures: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As long as no file that the scan read has changed."""
        program = Path(shutil.copy(_path(built_fixtures, "daemon_mutex"), tmp_path))
        library = Path(shutil.copy(_path(built_fixtures, "alloc_mutex"), tmp_path))
        options = ScanOptions(cache=tmp_path / "cache")
        first = prepared(str(program), options)
        monkeypatch.setattr(pipeline, "scan", _refused)
        assert prepared(str(program), options) == first
        with library.open("ab") as file:
            file.write(b"x")
        with pytest.raises(AssertionError, match="scanned again"):
            prepared(str(program), options)

    def test_libraries_are_known_from_other_programs(
        self, built_fixtures: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = ScanOptions(cache=tmp_path / "cache")
        prepared(str(_path(built_fixtures, "daemon_libc")), options)
        monkeypatch.setattr(libc_locks, "derive", _refused)
        prepared(str(_path(built_fixtures, "child_localtime")), options)


def _refused(*_unused: object) -> None:
    raise AssertionError("scanned again")


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


Robust = Callable[..., list[Finding]]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Robust:
    """Probe a program whose children wait for a lock, in one of its ways."""
    program = tmp_path_factory.mktemp("waiting") / "waiting"
    source = Path(__file__).with_name("verdicts.c")
    subprocess.run([Toolchain(MACHINE).compiler(source), "-O1", "-pthread", "-o", program, source], check=True)
    report, plan = planfile.load(plan_text(str(program), ScanOptions()), "waiting")

    def run(what: str, seconds: float = 60) -> list[Finding]:
        prover = Prover(Wanted(Command((str(program), what), dict(os.environ)), seconds, rule="inherited-lock"))
        return [f for f in prover.prove(plan, list(report.findings)) if f.probe is not None]

    return run


@pytest.mark.usefixtures("nothing_left")
class TestWaits:
    """What becomes of a child that waits; a scan says the same of all of them."""

    @pytest.mark.parametrize("what", ["plain", "spin", "spin-bare", "fifth"])
    def test_has_no_end(self, waiting: Robust, what: str) -> None:
        assert Verdict.CONFIRMED in verdicts(waiting(what))

    @pytest.mark.parametrize(
        "what", ["timed", "tried", "timer", "freed", "spin-bounded", "spin-counted", "spin-clocked", "spin-ticked"]
    )
    def test_ends(self, waiting: Robust, what: str) -> None:
        assert verdicts(waiting(what)) == {Verdict.INCONCLUSIVE}

    def test_was_let_go_by_whoever_forks(self, waiting: Robust) -> None:
        assert verdicts(waiting("all")) == {Verdict.INCONCLUSIVE, Verdict.REFUTED}

    def test_the_lock_beside_it_is_not_blamed(self, waiting: Robust) -> None:
        found = {f.lock.name for f in waiting("beside") if f.lock is not None and f.verdict is Verdict.CONFIRMED}
        assert found == {"pair+0x28"}

    def test_another_thread_that_keeps_it_is_blamed(self, waiting: Robust) -> None:
        (found,) = [f for f in waiting("kept") if f.verdict is Verdict.CONFIRMED]
        assert found.probe is not None
        assert found.probe.holder is not None
        assert (found.probe.holder.name, "had at the fork" in found.probe.why) == ("thread 2 of the parent", True)


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory, built_x86_64: Result) -> Path:
    program = tmp_path_factory.mktemp("robust") / "robust"
    library = built_x86_64.tree.path(built_x86_64.fixtures["alloc_mutex"])
    source = Path(__file__).with_name("robust.c")
    command: list[str | Path] = [Toolchain("x86_64").compiler(source), "-O1", "-pthread", "-o", program, source]
    subprocess.run([*command, "-Wl,--no-as-needed", library, f"-Wl,-rpath,{library.parent}"], check=True)
    return program


@pytest.fixture(scope="module")
def robustly(robust: Path) -> Robust:
    """Probe the program, which is scanned once, with an argument."""
    report, plan = planfile.load(plan_text(str(robust), ScanOptions()), "robust")

    def run(what: str, seconds: float = 60) -> list[Finding]:
        prover = Prover(Wanted(Command((str(robust), what), dict(os.environ)), seconds, covered=True))
        return [f for f in prover.prove(plan, list(report.findings)) if f.probe is not None]

    return run


@pytest.mark.skipif(MACHINE != "x86_64", reason="built for this machine only")
@pytest.mark.usefixtures("nothing_left")
class TestHardCases:
    def test_a_program_that_may_not_be_executed(self, tmp_path: Path) -> None:
        program = tmp_path / "program"
        shutil.copy("/bin/true", program)
        program.chmod(0o644)
        done = subprocess.run(
            [sys.executable, "-m", "forkproof", "observe", "--", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 3
        assert "Permission denied" in done.stderr
        assert "chmod +x" in done.stderr

    @pytest.mark.parametrize("what", ["crash", "exec", "execs", "vfork", "seccomp", "killed", "orphans"])
    def test_ends_with_a_reason(self, robustly: Robust, what: str) -> None:
        found = robustly(what, seconds=5 if what == "seccomp" else 60)
        assert found
        assert all(f.probe is not None and f.probe.why for f in found)
        assert Verdict.CONFIRMED not in verdicts(found), "its children ask for no lock"

    @pytest.mark.parametrize(
        "what",
        ["plain", "ignore", "ptrace", "attach", "close", "filter", "escape", "storm", "undumpable", "vforks", "leaves"],
    )
    def test_is_probed_as_ever(self, robustly: Robust, what: str) -> None:
        found = robustly(what)
        assert Verdict.CONFIRMED not in verdicts(found)
        reasons = [f.probe.why for f in found if f.probe is not None]
        assert any(f.probe is not None and f.probe.holder is not None for f in found), f"was not held: {reasons}"

    def test_acquire_that_faults(self, robust: Path) -> None:
        """The thread is not stepped over it for ever, and gets its signal."""
        image = load(robust)
        names = image.static_symbols.names
        at = next(i for i, name in enumerate(names) if name.startswith("faulty"))
        start, size = int(image.static_symbols.value[at]), int(image.static_symbols.size[at])
        offset = image.read(start, size).tobytes().index(b"\xf0\x0f\xb1")  # lock cmpxchg
        site = AcquireSite(str(robust), start + offset)
        with Stage(Command((str(robust), "fault"), dict(os.environ)), [site], None, {}) as stage:
            seen = census.take(stage, 20)
        assert seen.end == "was killed by SIGSEGV"
        assert list(seen.leader) == [8]

    def test_runs_past_where_it_was_to_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An emulator may go on with code that was there before a breakpoint: nobody waits for its thread for ever."""
        monkeypatch.setattr(session, "_STOP", 0.2)
        with Session() as running:
            process = running.launch(("/bin/sleep", "60"), dict(os.environ), stdin=0, output=1)
            (thread,) = process.threads.values()
            start = thread.registers.pc
            name = process.memory.word(thread.registers.sp + 8)  # argv[0], which nobody executes
            assert name is not None
            assert process.memory.insert(start, exits=(name,))
            assert not running.step(thread)
            assert not thread.is_stopped
            running.freeze([thread])
            assert thread.registers.pc != start  # which only a stopped thread can be asked for

    def test_stopped_by_itself(self, robustly: Robust) -> None:
        found = robustly("stop", seconds=3)
        assert verdicts(found) == {Verdict.INCONCLUSIVE}

    def test_time_limit(self, robustly: Robust) -> None:
        begun = time.monotonic()
        found = robustly("forever", seconds=2)
        assert verdicts(found) == {Verdict.INCONCLUSIVE}
        assert time.monotonic() - begun < 60, "two seconds a run; the rest is a loaded machine"

    def test_thousand_forks(self, robustly: Robust) -> None:
        assert Verdict.CONFIRMED not in verdicts(robustly("many", seconds=20))

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give its rights up")
    def test_gives_its_rights_up(self, robustly: Robust) -> None:
        self.test_is_probed_as_ever(robustly, "setuid")

    @pytest.mark.skipif(not _can_be_somebody_else(), reason="only root can make a set-user-ID file, and run as another")
    def test_by_somebody_else(self, robust: Path, tmp_path: Path) -> None:
        """A set-user-ID program runs without the rights of its owner, which is said."""
        done = _by_somebody_else(robust, tmp_path, "plain")
        assert "set-user-ID" in done.stderr
        assert done.returncode in (0, 1), done.stderr
        records = [f["probe"] for f in json.loads(done.stdout)["findings"] if f["probe"]]
        assert any(record["holder"] for record in records), "the lock was held"
        assert all(record["verdict"] != "confirmed" for record in records)

    @pytest.mark.skipif(not _can_be_somebody_else(), reason="only root can run as another")
    def test_hides_its_memory(self, robust: Path, tmp_path: Path) -> None:
        done = _by_somebody_else(robust, tmp_path, "undumpable")
        assert done.returncode == 3
        assert "made itself undumpable" in done.stderr
        assert not _running(tmp_path / robust.name)

    @pytest.mark.parametrize("seconds", [0, 0.3, 1, 2])
    def test_interrupted(self, robust: Path, seconds: float) -> None:
        """Ctrl-C on a terminal reaches the program as well. Exit code 130, and nothing of the program is left."""
        with _probing(robust, "forever" if not seconds else "many") as process:
            time.sleep(seconds)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
        assert not _running(robust)

    @pytest.mark.usefixtures("nothing_left")
    def test_interrupt_that_python_loses(self, robust: Path) -> None:
        """As it does where a callback of a weak reference raises it."""
        with Stage(Command((str(robust), "forever"), dict(os.environ)), [], None, {}) as stage:
            stage.start()
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                next(stage.scenes(time.monotonic() + 20))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
    def test_killed_tracer_takes_its_tracees_along(self, robust: Path, number: int) -> None:
        with _probing(robust, "forever") as process:
            process.send_signal(number)
        for _ in range(200):
            if not _running(robust):
                break
            time.sleep(0.05)
        assert not _running(robust)

    def test_killed_from_outside(self, robust: Path) -> None:
        """In every run, half way: a verdict all the same, and it says how the program ended."""
        with _probing(robust, "forever") as process:
            while process.poll() is None:
                for pid in _running(robust):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            assert process.stdout is not None
            assert "was killed by SIGKILL" in " ".join(process.stdout.read().decode().split())
        assert process.returncode in (0, 1)

    @pytest.mark.usefixtures("nothing_left")
    def test_killed_before_its_first_instruction(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between execve and the tracer's look at it, so that only its end is ever seen."""
        wait = ptrace.wait

        def late(pid: int, *, block: bool) -> ptrace.Status | None:
            while block and not Path(f"/proc/{pid}/exe").samefile("/bin/true"):
                time.sleep(0.001)
            if block:
                os.kill(pid, signal.SIGKILL)
            return wait(pid, block=block)

        monkeypatch.setattr(ptrace, "wait", late)
        with Stage(Command(("/bin/true",), dict(os.environ)), [], None, {}) as stage:
            found = census.take(stage, 20)
        assert found.end == "was killed by SIGKILL"


def _by_somebody_else(program: Path, folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    copy = Path(shutil.copy(program, folder))
    copy.chmod(0o4755)
    command = [*SOMEBODY_ELSE, *COMMAND, "probe", "--covered", "--format", "json", "--", str(copy), what]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def _probing(program: Path, what: str) -> Iterator[subprocess.Popen[bytes]]:
    """`forkproof probe` of the program, which runs; in a process group of its own."""
    command = [*COMMAND, "probe", "--covered", "--timeout", "100", "--", str(program), what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        while not _running(program):
            assert process.poll() is None
            time.sleep(0.01)
        yield process


def _running(program: Path) -> list[int]:
    """Processes that run this file."""
    found = []
    for link in Path("/proc").glob("[0-9]*/exe"):
        with suppress(OSError):
            if link.readlink() == program:
                found.append(int(link.parent.name))
    return found
