"""The signatures: the schema is enforced, the shipped data follow it, and real libraries are recognised."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkproof import signature_files, signature_values, signatures
from forkproof.signature_values import NameSet, SignatureError, VersionRange

if TYPE_CHECKING:
    import re

LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
RELEASES = st.lists(st.integers(0, 40), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
BOUNDS = st.tuples(st.sampled_from([">=", "<=", ">", "<", "==", "!="]), RELEASES).map("".join)
RANGES = st.lists(BOUNDS, min_size=1, max_size=3).map(lambda bounds: VersionRange.parse(",".join(bounds)))


@pytest.fixture(scope="module")
def shipped() -> signatures.Signatures:
    return signatures.load()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(signatures.default_directory(), tmp_path / "signatures")


def searcher(data: bytes) -> signature_values.Contains:
    return lambda pattern: pattern.search(data)


def allocators_in(
    shipped: signatures.Signatures, data: bytes, soname: str | None = None
) -> list[tuple[str, str | None]]:
    contains = searcher(data)
    return [
        (each.id, each.version_of(contains))
        for each in shipped.allocators
        if each.matches(soname, frozenset(), contains)
    ]


class TestVersionRange:
    @pytest.mark.parametrize(
        ("text", "version", "expected"),
        [
            (">=2.5,<2.11", "2.10", True),
            (">=2.5,<2.11", "2.5", True),
            (">=2.5,<2.11", "2.4.90", False),
            (">=2.5,<2.11", "2.11", False),
            (">=2.5,<2.11", "2.10.80", True),
            ("<=2.36", "2.36-9+deb12u14", True),
            ("==2.0", "2", True),
            ("!=1.2.3", "1.2.3.0", False),
            (">2", "2.0", False),
            (">=2.5", None, None),
            (">=2.5", "unknown", None),
            ("*", None, True),
            ("*", "unknown", True),
        ],
    )
    def test_contains(self, text: str, version: str | None, expected: bool | None) -> None:
        assert VersionRange.parse(text).contains(version) is expected

    @pytest.mark.parametrize("text", ["", "2.5", ">=", ">=2.5,", "=>2", ">=2.x", "*,>=2", ">=2 <3"])
    def test_refuses_what_is_no_range(self, text: str) -> None:
        with pytest.raises(ValueError, match="not a version bound"):
            VersionRange.parse(text)

    @given(RELEASES, RELEASES)
    def test_every_version_is_below_or_not_below_a_bound(self, version: str, bound: str) -> None:
        below = VersionRange.parse(f"<{bound}").contains(version)
        assert below is not VersionRange.parse(f">={bound}").contains(version)

    @given(RELEASES, RANGES)
    def test_trailing_zeros_change_nothing(self, version: str, bounds: VersionRange) -> None:
        assert bounds.contains(version) is bounds.contains(version + ".0")

    @given(RELEASES, RANGES, RANGES)
    def test_a_common_version_means_overlap(self, version: str, one: VersionRange, other: VersionRange) -> None:
        if one.contains(version) and other.contains(version):
            assert one.overlaps(other)
            assert other.overlaps(one)

    def test_adjacent_ranges_do_not_overlap(self) -> None:
        assert not VersionRange.parse("<2.29").overlaps(VersionRange.parse(">=2.29"))

    def test_open_means_no_upper_bound(self) -> None:
        assert VersionRange.parse(">=2.29").is_open
        assert VersionRange.parse("*").is_open
        assert not VersionRange.parse("<2.29").is_open


class TestNameSet:
    names = NameSet.of(["abort", "_ZSt*__throw_*"])

    @pytest.mark.parametrize("name", ["abort", "_ZSt20__throw_length_errorPKc"])
    def test_members(self, name: str) -> None:
        assert name in self.names

    @pytest.mark.parametrize("name", ["Abort", "abort2", "x_ZSt20__throw_x", None, 3])
    def test_others(self, name: object) -> None:
        assert name not in self.names

    def test_first_of_prefers_exact_names(self) -> None:
        assert self.names.first_of({"_ZSt2__throw_a", "abort"}) == "abort"
        assert self.names.first_of({"_ZSt2__throw_b", "_ZSt2__throw_a"}) == "_ZSt2__throw_a"
        assert self.names.first_of({"main"}) is None

    def test_the_empty_set(self) -> None:
        assert not NameSet()
        assert "" not in NameSet()


class TestRecognition:
    """Literals as a stripped static program holds them; the soname is gone, strings are all there is."""

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"\0gperftools 2.10\0TCMALLOC_TRANSFER_NUM_OBJ\0", ("gperftools", "2.10")),
            (b"\0TCMALLOC_TRANSFER_NUM_OBJ\0", ("gperftools", None)),
            (b"MALLOC: + %12u (%7.1f MiB) Bytes in per-CPU cache freelist\n", ("google-tcmalloc", None)),
            (b"<jemalloc>: %s\0005.3.0-0-g" + b"54eaed1d" * 5 + b"\0", ("jemalloc", "5.3.0")),
            (b"<jemalloc>: %s\x000.0.0-0-g000000missing_version\0", ("jemalloc", None)),
            (b"TBBmalloc: VERSION\t\t2021.8\n", ("tbbmalloc", "2021.8")),
            (b"\0mimalloc: error: \0", ("mimalloc", None)),
            (b"\0_ZNK8snmalloc9AllocatorE\0", ("snmalloc", None)),
            (b'<malloc version="scudo-1">', ("scudo", None)),
            (b"fatal allocator error: ", ("hardened_malloc", None)),
            (b"  Electric Fence 2.2 Copyright", ("electric-fence", "2.2")),
            (b"DMALLOC_OPTIONS\x005.5.2\0", ("dmalloc", "5.5.2")),
            (
                b"GNU C Library (Debian 2.36-9) stable release version 2.36.\nmalloc(): corrupted top size\0",
                ("glibc-ptmalloc", "2.36"),
            ),
            (
                b"musl libc (x86_64)\nVersion %s\n\0/proc/self/fd/\x001.2.3\0Unsupported",
                ("musl-mallocng", "1.2.3"),
            ),
        ],
    )
    def test_by_string(self, shipped: signatures.Signatures, data: bytes, expected: tuple[str, str | None]) -> None:
        assert expected in allocators_in(shipped, data)

    def test_what_is_no_allocator(self, shipped: signatures.Signatures) -> None:
        data = b"\0malloc\0free\0MALLOC:   ------------\0google_malloc\0snmalloc\0jemalloc\0"
        assert allocators_in(shipped, data, "libexample.so.1") == []

    @pytest.mark.parametrize(
        ("soname", "expected"),
        [
            ("libtcmalloc.so.4", "gperftools"),
            ("libtcmalloc_minimal.so.4", "gperftools"),
            ("libjemalloc.so.2", "jemalloc"),
            ("libmimalloc.so.2", "mimalloc"),
            ("libtbbmalloc.so.2", "tbbmalloc"),
            ("libtbbmalloc_proxy.so.2", "tbbmalloc-proxy"),
            ("libc.so.6", "glibc-ptmalloc"),
            ("libc.musl-x86_64.so.1", "musl-mallocng"),
        ],
    )
    def test_by_soname(self, shipped: signatures.Signatures, soname: str, expected: str) -> None:
        assert [name for name, _ in allocators_in(shipped, b"", soname)] == [expected]

    def test_the_match_says_why(self, shipped: signatures.Signatures) -> None:
        gperftools = next(each for each in shipped.allocators if each.id == "gperftools")
        match = gperftools.matches(None, {"main", "tc_malloc_skip_new_handler"}, searcher(b""))
        assert match == signature_values.Match("gperftools", "symbol", "tc_malloc_skip_new_handler")

    def test_strings_are_searched_last(self, shipped: signatures.Signatures) -> None:
        def never(pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
            pytest.fail(f"searched for {pattern!r}")

        gperftools = next(each for each in shipped.allocators if each.id == "gperftools")
        assert gperftools.matches("libtcmalloc.so.4", frozenset(), never) is not None

    @pytest.mark.parametrize(
        ("soname", "interpreter", "data", "expected"),
        [
            ("libc.so.6", None, b"", ["glibc"]),
            (None, "/lib/ld-linux-aarch64.so.1", b"", ["glibc"]),
            (None, "/lib64/ld-linux-x86-64.so.2", b"", ["glibc"]),
            (None, "/lib/ld-musl-x86_64.so.1", b"", ["musl"]),
            (None, None, b"\0No error information\0", ["musl"]),
            (None, "/lib/ld64-uClibc.so.1", b"", ["uclibc"]),
            (None, None, b"", []),
        ],
    )
    def test_libc(
        self,
        shipped: signatures.Signatures,
        soname: str | None,
        interpreter: str | None,
        data: bytes,
        expected: list[str],
    ) -> None:
        found = [each.id for each in shipped.libcs if each.matches(soname, interpreter, (), searcher(data))]
        assert found == expected

    def test_musl_inside_a_program_that_prints_no_error_text(self, shipped: signatures.Signatures) -> None:
        names, nothing = {"main", "__init_libc", "__simple_malloc"}, searcher(b"")
        assert [each.id for each in shipped.libcs if each.matches(None, None, names, nothing)] == ["musl"]
        assert [each.id for each in shipped.allocators if each.matches(None, names, nothing)] == ["musl-mallocng"]


class TestRealLibraries:
    """Strings alone, so that a stripped static copy of the same code is recognised too."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("libtcmalloc.so.4", ("gperftools", "2.10")),
            ("libtcmalloc_minimal.so.4", ("gperftools", "2.10")),
            ("libjemalloc.so.2", ("jemalloc", "5.3.0")),
            ("libmimalloc.so.2", ("mimalloc", "2")),
            ("libtbbmalloc.so.2", ("tbbmalloc", "2021.8")),
        ],
    )
    def test_debian_12(self, shipped: signatures.Signatures, name: str, expected: tuple[str, str | None]) -> None:
        path = LIBRARIES / name
        if not path.exists() or not Path("/etc/debian_version").read_text(encoding="ascii").startswith("12"):
            pytest.skip(f"needs Debian 12's {name}")
        assert allocators_in(shipped, path.read_bytes()) == [expected]

    def test_the_running_libc(self, shipped: signatures.Signatures) -> None:
        try:
            kind, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        except (ValueError, OSError):
            pytest.skip("not running on glibc")
        path = next(Path("/lib").glob("*-linux-gnu/libc.so.6"), None)
        if path is None:
            pytest.skip("libc.so.6 is not where Debian puts it")
        contains = searcher(path.read_bytes())
        found = [
            (each.id, each.version_of(contains)) for each in shipped.libcs if each.matches(None, None, (), contains)
        ]
        assert found == [(kind, version)]

    def test_libprofiler_is_no_allocator(self, shipped: signatures.Signatures) -> None:
        """It shares gperftools' weak pthread_atfork, and its wrapper's name, but allocates nothing."""
        path = LIBRARIES / "libprofiler.so.0"
        if not path.exists():
            pytest.skip("needs libprofiler.so.0 (libgoogle-perftools4)")
        symbols = {"_Z24perftools_pthread_atforkPFvvES0_S0_", "ProfilerStart"}
        contains = searcher(path.read_bytes())
        assert [a.id for a in shipped.allocators if a.matches("libprofiler.so.0", symbols, contains)] == []


class TestForkers:
    @pytest.mark.parametrize(
        ("libc", "version", "name", "handlers_run"),
        [
            ("glibc", "2.28", "popen", True),
            ("glibc", "2.29", "popen", False),
            ("glibc", None, "popen", False),
            ("musl", "1.2.3", "popen", False),
            ("glibc", "2.30", "wordexp", True),
            ("glibc", "2.31", "wordexp", False),
            ("musl", "1.2.3", "wordexp", True),
            ("glibc", "2.23", "posix_spawn", True),
            ("glibc", "2.36", "posix_spawn", False),
            ("glibc", "2.36", "fork", True),
            (None, None, "fork", True),
            ("glibc", "2.36", "_Fork", False),
            ("glibc", "2.28", "system", False),
            ("musl", "1.2.3", "daemon", True),
        ],
    )
    def test_who_runs_handlers(
        self,
        shipped: signatures.Signatures,
        libc: str | None,
        version: str | None,
        name: str,
        handlers_run: bool,
    ) -> None:
        assert shipped.forkers_for(libc, version)[name].handlers_run is handlers_run

    def test_kinds(self, shipped: signatures.Signatures) -> None:
        forkers = shipped.forkers_for("glibc", "2.36")
        kinds = {name: forkers[name].kind for name in ("fork", "vfork", "daemon", "clone", "popen")}
        assert kinds == {
            "fork": "fork",
            "vfork": "vfork",
            "daemon": "daemon",
            "clone": "clone",
            "popen": "spawn",
        }
        assert (forkers["clone"].callback, forkers["clone"].flags) == (0, 2)

    def test_only_functions_that_return_in_the_child_have_a_result(self, shipped: signatures.Signatures) -> None:
        for forker in shipped.forkers:
            returns = forker.kind in ("fork", "vfork", "daemon")
            assert (forker.child_result is not None) == returns, forker.name

    def test_a_libcs_own_entries_replace_the_general_ones(self, shipped: signatures.Signatures) -> None:
        assert "_Fork" in shipped.forkers_for(None, None)
        assert "_Fork" in shipped.forkers_for("glibc", "2.34")
        assert "_Fork" in shipped.forkers_for("glibc", None)
        assert "_Fork" not in shipped.forkers_for("glibc", "2.33")
        assert "_Fork" not in shipped.forkers_for("musl", "1.2.1")

    def test_names_of_one_libc_stay_there(self, shipped: signatures.Signatures) -> None:
        assert "__libc_fork" in shipped.forkers_for("glibc", None)
        assert "__libc_fork" not in shipped.forkers_for("musl", None)

    @pytest.mark.parametrize(
        ("machine", "numbers"), [("x86_64", {56, 57, 58, 435}), ("aarch64", {220, 435}), ("mips", set())]
    )
    def test_system_calls(self, shipped: signatures.Signatures, machine: str, numbers: set[int]) -> None:
        assert set(shipped.raw_process_syscalls(machine)) == numbers

    @pytest.mark.parametrize(
        ("number", "flags", "expected"),
        [
            (57, None, "process"),
            (58, None, "shared"),
            (56, None, "unknown"),
            (56, 17, "process"),
            (56, 0x4111, "shared"),
            (56, 0x3D0F00, "thread"),
            (435, None, "unknown"),
        ],
    )
    def test_what_a_system_call_creates(
        self, shipped: signatures.Signatures, number: int, flags: int | None, expected: str
    ) -> None:
        assert shipped.raw_process_syscalls("x86_64")[number].creates(flags) == expected


class TestFixes:
    def fix(self, shipped: signatures.Signatures, name: str, rule: str, version: str | None) -> str:
        allocator = next((each for each in shipped.allocators if each.id == name), None)
        fix = shipped.fix_for(allocator, rule, version)
        assert fix is not None
        return fix.text

    def test_for_the_version(self, shipped: signatures.Signatures) -> None:
        assert "2.11" in self.fix(shipped, "gperftools", "atfork-unbound", "2.10")
        assert "before 2.1" in self.fix(shipped, "gperftools", "atfork-absent", "2.0")
        assert "TCMALLOC_NO_ATFORK" in self.fix(shipped, "gperftools", "atfork-absent", "2.16")

    def test_an_unknown_version_gets_the_fix_that_may_apply(self, shipped: signatures.Signatures) -> None:
        assert "2.11" in self.fix(shipped, "gperftools", "atfork-unbound", None)

    def test_a_version_that_no_fix_covers_gets_the_general_one(self, shipped: signatures.Signatures) -> None:
        general = self.fix(shipped, "nobody", "atfork-unbound", None)
        assert self.fix(shipped, "gperftools", "atfork-unbound", "2.16") == general

    @pytest.mark.parametrize("rule", signature_values.RULES)
    def test_every_rule_has_a_general_fix(self, shipped: signatures.Signatures, rule: str) -> None:
        assert shipped.unknown_allocator.fix_for(rule, None) is not None

    @pytest.mark.parametrize(
        ("allocator", "libc", "version", "expected"),
        [
            ("glibc-ptmalloc", "glibc", "2.17", True),
            ("glibc-ptmalloc", "glibc", None, True),
            ("musl-mallocng", "musl", "1.2.2", True),
            ("musl-mallocng", "musl", "1.2.1", False),
            ("musl-mallocng", "musl", None, None),
            ("musl-mallocng", "glibc", "2.36", False),
            ("gperftools", "glibc", "2.36", False),
        ],
    )
    def test_quiesced_by_the_libc(
        self,
        shipped: signatures.Signatures,
        allocator: str,
        libc: str,
        version: str | None,
        expected: bool | None,
    ) -> None:
        found = next(each for each in shipped.allocators if each.id == allocator)
        assert found.quiesced_by_fork_of(libc, version) is expected


class TestFunctions:
    def test_thread_starters(self, shipped: signatures.Signatures) -> None:
        starters = shipped.thread_starters
        assert (starters["pthread_create"].callback, starters["pthread_create"].data) == (2, 3)
        assert (starters["g_thread_new"].callback, starters["thrd_create"].callback) == (1, 1)

    def test_callbacks(self, shipped: signatures.Signatures) -> None:
        assert shipped.callbacks["qsort"].arguments == (3,)
        assert shipped.callbacks["__register_atfork"].arguments == (0, 1, 2)
        assert shipped.callbacks["__register_atfork"].when == ("prepare", "parent", "child")
        assert shipped.callbacks["scandir"].when == ("during", "during")

    def test_every_thread_starter_with_a_callback_argument_names_it_alike(self, shipped: signatures.Signatures) -> None:
        for name in shipped.thread_starters.keys() & shipped.callbacks.keys():
            assert shipped.thread_starters[name].callback == shipped.callbacks[name].arguments[0], name

    def test_locks(self, shipped: signatures.Signatures) -> None:
        lock = shipped.locks["pthread_mutex_lock"]
        assert (lock.op, lock.kind, lock.argument, lock.success) == ("acquire", "mutex", 0, "always")
        assert shipped.locks["g_mutex_trylock"].success == "nonzero"
        assert shipped.locks["pthread_mutex_trylock"].success == "zero"
        assert shipped.locks["pthread_cond_wait"].mutex == 1
        assert shipped.locks["pthread_mutex_timedlock"].bounded
        assert shipped.locks["pthread_rwlock_rdlock"].shared

    def test_a_try_always_says_which_result_is_success(self, shipped: signatures.Signatures) -> None:
        assert [lock.name for lock in shipped.locks.values() if (lock.op, lock.success) == ("try", "always")] == []

    def test_every_lock_that_is_taken_can_be_released(self, shipped: signatures.Signatures) -> None:
        released = {lock.kind for lock in shipped.locks.values() if lock.op == "release"}
        taken = {lock.kind for lock in shipped.locks.values() if lock.op in ("acquire", "try")}
        assert taken <= released

    def test_waiting(self, shipped: signatures.Signatures) -> None:
        assert "sched_yield" in shipped.waiters
        assert "_ZN4base8internal13SpinLockDelayEPViii" in shipped.waiters
        assert "malloc" not in shipped.waiters

    def test_failures(self, shipped: signatures.Signatures) -> None:
        assert "strerror" in shipped.error_texts
        assert "abort" in shipped.aborts
        assert shipped.aborts.exact & shipped.exit_names.exact == {"abort"}

    def test_clocks(self, shipped: signatures.Signatures) -> None:
        assert "clock_gettime" in shipped.clocks
        assert "nanosleep" not in shipped.clocks
        assert shipped.wait_syscalls("x86_64")[202].name == "futex"
        assert shipped.wait_syscalls("aarch64")[98].name == "futex"

    def test_fills(self, shipped: signatures.Signatures) -> None:
        assert (shipped.fills["memset"].length, shipped.fills["bzero"].length) == (2, 1)

    def test_futures(self, shipped: signatures.Signatures) -> None:
        assert {function.op for function in shipped.futures.values()} == {"wait", "tell"}
        assert all(function.bounded == 3 for function in shipped.futures.values() if function.op == "wait")

    def test_noreturn(self, shipped: signatures.Signatures) -> None:
        for name in ("abort", "__stack_chk_fail", "_ZSt20__throw_length_errorPKc", "_ZSt9terminatev"):
            assert name in shipped.noreturn
        assert "_ZN4core9panicking5panic17h0123456789abcdefE" in shipped.noreturn
        assert "printf" not in shipped.noreturn

    def test_exec_and_exit(self, shipped: signatures.Signatures) -> None:
        assert {"execve", "execvp", "fexecve"} <= shipped.exec_names.exact
        assert {"_exit", "_Exit", "abort"} <= shipped.exit_names.exact
        assert not shipped.exec_names.exact & shipped.exit_names.exact

    def test_malloc_family(self, shipped: signatures.Signatures) -> None:
        family = shipped.malloc_family
        assert (family["malloc"], family["realloc"], family["free"]) == ("allocate", "resize", "release")
        assert (family["_Znwm"], family["_ZdaPvmSt11align_val_t"]) == ("allocate", "release")
        assert family["malloc_usable_size"] == "query"


class TestShippedData:
    def test_is_clean(self) -> None:
        assert [str(problem) for problem in signature_files.lint(signatures.default_directory())] == []

    def test_ids_match_file_names(self) -> None:
        for directory in ("allocators", "libc"):
            for path in (signatures.default_directory() / directory).glob("*.yml"):
                text = path.read_text(encoding="utf-8")
                if "\nid: " in text:
                    assert f"\nid: {path.stem}\n" in text, path

    def test_the_example_of_the_readme(self, copy: Path) -> None:
        readme = (copy / "README.md").read_text(encoding="utf-8")
        example = readme.split("```yaml\n")[1].split("```")[0]
        (copy / "allocators" / "examplemalloc.yml").write_text(example, encoding="utf-8")
        assert signature_files.lint(copy) == []
        loaded = signatures.load(copy)
        assert allocators_in(loaded, b"\0examplemalloc-1.4\0") == [("examplemalloc", "1.4")]
        example_malloc = next(each for each in loaded.allocators if each.id == "examplemalloc")
        assert example_malloc.fix_for("atfork-absent", "1.4") is not None
        assert example_malloc.fix_for("atfork-absent", "2.0") is None


GOOD_LOCK = """\
kind: locks
source: s
test: t
entries:
  - {name: lock_it, op: acquire, kind: mutex, argument: 0}
  - {name: unlock_it, op: release, kind: mutex, argument: 0}
"""
GOOD_FORKER = """\
kind: forkers
source: s
test: t
entries:
  - {name: f, libc: any, versions: "<2", kind: fork, handlers_run: true, child_result: 0}
  - {name: f, libc: any, versions: ">=2", kind: fork, handlers_run: false, child_result: 0}
"""
GOOD_ALLOCATOR = """\
kind: allocator
id: a
title: A
family: a
source: s
test: t
recognise:
  strings: ['a+']
version: ['a(\\d)']
fixes:
  - {rule: atfork-absent, versions: "*", text: Do it.}
"""
GOOD_CALLBACK = """\
kind: callbacks
source: s
test: t
entries:
  - {name: each_of, arguments: [1, 2], when: [during, later]}
"""


class TestLint:
    """Each case damages one line of a good file; the problem must name that line and say what is wrong."""

    CASES = (
        ("locks", GOOD_LOCK, "name: lock_it", "nome: lock_it", 5, "unknown key 'nome'"),
        ("locks", GOOD_LOCK, "name: lock_it, ", "", 5, "missing key 'name'"),
        ("locks", GOOD_LOCK, "op: acquire", "op: grab", 5, "expected one of acquire, try"),
        ("locks", GOOD_LOCK, "argument: 0", "argument: zero", 5, "expected a number, found text"),
        ("locks", GOOD_LOCK, "argument: 0", "argument: 8", 5, "argument index 8 out of range 0..7"),
        ("locks", GOOD_LOCK, "argument: 0", "argument: -1", 5, "argument index -1 out of range"),
        ("locks", GOOD_LOCK, "argument: 0", "argument: 0, argument: 1", 5, "key 'argument' comes twice"),
        ("locks", GOOD_LOCK, "name: unlock_it", "name: lock_it", 6, "'lock_it'; first in x.yml:5"),
        ("locks", GOOD_LOCK, "argument: 0", "argument: 0, bounded: 1", 5, "expected true or false, found a"),
        ("locks", GOOD_LOCK, "source: s\n", "", 1, "missing key 'source'"),
        ("locks", GOOD_LOCK, "test: t", "test: ''", 3, "expected text, found an empty string"),
        ("locks", GOOD_LOCK, "kind: locks", "kind: lock", 1, "expected one of locks, waiters"),
        ("locks", GOOD_LOCK, "kind: locks", "kind: threads", 1, "expected one of locks, waiters"),
        ("locks", GOOD_LOCK, "kind: locks\n", "", 1, "missing key 'kind'"),
        ("locks", GOOD_LOCK, "entries:", "entries: {", 5, "not YAML: "),
        ("locks", GOOD_LOCK, GOOD_LOCK, "", 0, "empty file"),
        ("locks", GOOD_LOCK, GOOD_LOCK, "- 1\n", 1, "expected a mapping, found a list"),
        ("forkers", GOOD_FORKER, '">=2"', '">=1.5"', 6, "versions overlap x.yml:5"),
        ("forkers", GOOD_FORKER, '"<2"', '"<two"', 5, "not a version bound: '<two'"),
        ("forkers", GOOD_FORKER, '"<2"', "2.10", 5, "expected text, found a float (quote it?)"),
        ("forkers", GOOD_FORKER, "child_result: 0", "child_result: none", 5, "expected a number"),
        ("allocators", GOOD_ALLOCATOR, "['a+']", "['a(']", 8, "bad regular expression 'a('"),
        ("allocators", GOOD_ALLOCATOR, "['a(\\d)']", "['a\\d']", 9, "exactly one group, this one has 0"),
        ("allocators", GOOD_ALLOCATOR, "rule: atfork-absent", "rule: absent", 11, "expected one of atfork-"),
        ("allocators", GOOD_ALLOCATOR, "Do it.", "x" * 301, 11, "at most 300 characters"),
        ("allocators", GOOD_ALLOCATOR, "id: a", "id: jemalloc", 1, "first in jemalloc.yml:1"),
        ("callbacks", GOOD_CALLBACK, "[during, later]", "[during]", 5, "'when' has 1 words for 2 arguments"),
        ("callbacks", GOOD_CALLBACK, "[1, 2]", "1", 5, "expected a list, found a number"),
    )  # fmt: skip

    @pytest.mark.parametrize(("directory", "good", "old", "new", "line", "message"), CASES)
    def test_names_file_line_and_problem(
        self, copy: Path, directory: str, good: str, old: str, new: str, line: int, message: str
    ) -> None:
        assert old in good
        path = copy / directory / "x.yml"
        path.write_text(good, encoding="utf-8")
        assert signature_files.lint(copy) == []
        path.write_text(good.replace(old, new, 1), encoding="utf-8")
        problems = signature_files.lint(copy)
        assert {problem.file for problem in problems} == {path}
        assert any(str(each).startswith(f"{path}:{line}: ") and message in each.message for each in problems)

    def test_reports_every_problem(self, copy: Path) -> None:
        path = copy / "locks" / "x.yml"
        path.write_text(GOOD_LOCK.replace("argument: 0", "argument: 9"), encoding="utf-8")
        assert [(problem.file, problem.line) for problem in signature_files.lint(copy)] == [(path, 5), (path, 6)]

    @pytest.mark.parametrize("name", ["locks/x.yaml", "extra/x.yml", "x.yml", "locks/deep/x.yml"])
    def test_files_that_would_not_be_read(self, copy: Path, name: str) -> None:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(GOOD_LOCK, encoding="utf-8")
        assert [problem.file for problem in signature_files.lint(copy)] == [copy / name]

    def test_a_missing_directory(self, copy: Path) -> None:
        shutil.rmtree(copy / "noreturn")
        assert [problem.file for problem in signature_files.lint(copy)] == [copy / "noreturn"]

    def test_bytes_that_are_no_text(self, copy: Path) -> None:
        (copy / "locks" / "x.yml").write_bytes(b"kind: \xff\xfe\x00")
        (problem,) = signature_files.lint(copy)
        assert problem.message.startswith("not YAML: ")


class TestLoading:
    def test_a_bad_file_raises_with_its_place(self, copy: Path) -> None:
        path = copy / "locks" / "x.yml"
        path.write_text(GOOD_LOCK.replace("op: acquire", "op: grab"), encoding="utf-8")
        with pytest.raises(SignatureError, match="expected one of acquire") as caught:
            _ = signatures.load(copy).locks
        assert (caught.value.file, caught.value.line) == (path, 5)
        assert "python -m forkproof.signatures lint" in str(caught.value)

    def test_directories_are_read_on_first_use(self, copy: Path) -> None:
        (copy / "locks" / "x.yml").write_text("nonsense", encoding="utf-8")
        loaded = signatures.load(copy)
        assert loaded.allocators
        with pytest.raises(SignatureError):
            _ = loaded.waiters

    def test_each_property_is_read_once(self, shipped: signatures.Signatures) -> None:
        assert shipped.callbacks is shipped.callbacks

    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(SignatureError, match="no such directory"):
            signatures.load(tmp_path / "none")

    def test_no_general_fixes(self, copy: Path) -> None:
        (copy / "allocators" / "unknown.yml").unlink()
        with pytest.raises(SignatureError, match="no allocator 'unknown'"):
            signatures.load(copy).fix_for(None, "atfork-absent", None)

    def test_an_entry_may_replace_its_files_source(self, shipped: signatures.Signatures) -> None:
        popen = shipped.forkers_for("glibc", "2.28")["popen"]
        fork = shipped.forkers_for("glibc", "2.28")["fork"]
        assert "iopopen.c" in popen.origin.source
        assert popen.origin.source != fork.origin.source
        assert popen.origin.test == fork.origin.test

    def test_heavy_packages_stay_out(self) -> None:
        code = "import forkproof.signatures, sys; sys.exit(any(m in sys.modules for m in ('lief', 'numpy')))"
        environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


class TestCommand:
    def test_clean(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert signatures.main(["lint", str(copy)]) == 0
        assert capsys.readouterr().out == ""

    def test_problems(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = copy / "locks" / "x.yml"
        path.write_text(GOOD_LOCK.replace("name: unlock_it", "name: lock_it"), encoding="utf-8")
        assert signatures.main(["lint", str(copy)]) == 1
        assert capsys.readouterr().out == f"{path}:6: duplicate name 'lock_it'; first in x.yml:5\n"

    @pytest.mark.parametrize("arguments", [[], ["check"], ["lint", "a", "b"]])
    def test_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert signatures.main(arguments) == 2
        assert "usage: " in capsys.readouterr().err
