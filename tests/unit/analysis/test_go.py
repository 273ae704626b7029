"""Programs that bear the names of Go's runtime: which system calls are forks, and what their children come to.

There is no Go compiler here: the snippets are C with the linker's names of Go and calls in Go's convention. What real
programs of Go look like is in tests/real/test_hidden_forks.py.
"""

from __future__ import annotations

import re

import pytest

from forkproof.elf.image import Image
from forkproof.elf.tables import SymbolTable
from forkproof.model import Answer, Finding
from tests.unit.analysis.snippets import MACHINES, Build, findings_of, program

NUMBERS = {"x86_64": {"fork": 57, "clone": 56, "exit": 60}, "aarch64": {"clone": 220, "exit": 93}}
CALL = {
    "x86_64": 'asm volatile("call syscall.RawSyscall" : "=a"(r), "=c"(e) : "a"(%dL), "b"(%dL)'
    ' : "rdi", "rsi", "memory");',
    "aarch64": 'asm volatile("mov x0, %d\\n mov x1, %d\\n bl syscall.RawSyscall\\n mov %%0, x0\\n mov %%1, x2"'
    ' : "=r"(r), "=r"(e) :: "x0", "x1", "x2", "x30", "memory");',
}
RUNTIME = """
#define GO(name) __asm__(name)
NOINLINE void raw(void) GO("syscall.RawSyscall"); void raw(void) { work(1); }
static int held;
NOINLINE void lock2(void) GO("runtime.lock2");
void lock2(void) { while (__atomic_exchange_n(&held, 1, 2)) syscall(SYS_futex, &held, 0, 1, 0, 0, 0); }
NOINLINE void *mallocgc(void) GO("runtime.mallocgc"); void *mallocgc(void) { lock2(); work(2); return 0; }
NOINLINE void morestack(void) GO("runtime.morestack"); void morestack(void) { lock2(); work(4); }
NOINLINE void sysmon(void) GO("runtime.sysmon"); void sysmon(void) { for (;;) { lock2(); work(3); } }
NOINLINE void newosproc(void) GO("runtime.newosproc"); void newosproc(void) { work(5); }
NOINLINE void go_main(void) GO("main.main");
int main(void) { newosproc(); sysmon(); go_main(); return 0; }
"""


def go_functions(image: Image) -> SymbolTable:
    """The functions with Go's names, as Go's own table would list them."""
    names = image.static_symbols.names
    rows = [i for i, name in enumerate(names) if re.match(r"(runtime|syscall|main)\.", name)]
    known = image.static_symbols
    return SymbolTable(known._table[rows], known._strings, None)


@pytest.fixture(autouse=True)
def as_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "go_functions", property(go_functions))


def system_call(machine: str, name: str, argument: int = 0) -> str:
    return CALL[machine] % (NUMBERS[machine][name], argument)


def judged(build: Build, body: str) -> tuple[list[str], list[Finding]]:
    """The kinds of the windows in main.main, and the findings about the runtime."""
    code = f'{RUNTIME} void go_main(void) {{ long r, e; {body} asm volatile("" :: "r"(r), "r"(e)); }}'
    found = program(build, code)
    kinds = [w.window.kind.value for w in found.windows if found.flow.name(w.window.function) == "main.main"]
    return kinds, [f for f in findings_of(found) if f.lock is not None and "Go" in f.lock.name]


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_child_that_goes_on_in_the_runtime(build: Build) -> None:
    fork = system_call(build.machine, "clone", 17)
    kinds, found = judged(build, f"{fork} if (r) exit(0); for (;;) mallocgc();")
    assert kinds == ["daemonize"]
    (finding,) = found
    assert (finding.severity.value, finding.verdict.value) == ("medium", "suspected")
    assert [frame.function for frame in finding.requester] == ["main.main", "runtime.mallocgc", "runtime.lock2"]
    assert [frame.function for frame in finding.holder] == ["runtime.sysmon", "runtime.lock2"]


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_child_that_makes_system_calls_only(build: Build) -> None:
    machine = build.machine
    fork, end = system_call(machine, "clone", 17), system_call(machine, "exit")
    body = f'{fork} if (e) return; asm volatile("" : "+r"(r)); if (r) return; {end} for (;;) work(1);'
    assert judged(build, body) == (["exit"], [])


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_thread_is_no_fork(build: Build) -> None:
    kinds, found = judged(build, f"{system_call(build.machine, 'clone', 0x10000)} if (!r) mallocgc();")
    assert (kinds, found) == ([], [])


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_a_stack_that_grows_is_rare(build: Build) -> None:
    fork = system_call(build.machine, "clone", 17)
    _, found = judged(build, f"{fork} if (r) exit(0); morestack(); pause();")
    assert found == []


@pytest.mark.parametrize("build", MACHINES, ids=str)
def test_threads_exist_before_main(build: Build) -> None:
    code = f"{RUNTIME} void go_main(void) {{ long r, e; {system_call(build.machine, 'clone', 17)} work(r + e); }}"
    (window,) = (w for w in program(build, code).windows if w.window.forker == "clone")
    assert window.threads is Answer.YES
