"""The text for people: what it says, in which order, and that it is never wider than promised."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkproof import rules
from forkproof.model import Answer, Diagnostic, Frame, Hooks, Report, Severity, Target, Verdict, WindowKind
from forkproof.report import stacks
from forkproof.report.explain import VERDICTS, explanation, page_lines
from forkproof.report.layout import columns, painted
from forkproof.report.text import render
from tests.unit.report import samples


def flat(text: str) -> str:
    """The text with its line breaks forgotten."""
    return " ".join(text.split())


def in_this_order(text: str, *parts: str) -> bool:
    places = [text.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


def explained(report: Report, width: int = 100) -> str:
    finding = report.findings[-1]
    return painted(explanation(report, finding, rules.find(finding.rule), width), color=False)


class TestTheIncident:
    @pytest.fixture
    def text(self) -> str:
        return render(samples.incident())

    def test_the_order(self, text: str) -> None:
        assert in_this_order(
            text,
            f"{samples.QEMU}: 2 findings (2 high)",
            "HIGH  inherited-lock, reachable",
            "a child forked in os_daemonize can hang for ever",
            samples.INHERITED.id,
            "WHY",
            "HOLDER",
            "REQUESTER",
            "WHAT TO DO",
            "HIGH  atfork-unbound",
            "ALLOCATORS",
            "FORK WINDOWS",
            "OTHER THREADS BEFORE A FORK  yes",
            "DIAGNOSTICS",
            "1 target analysed; 2 findings (2 high)",
        )

    def test_the_four_conditions(self, text: str) -> None:
        for label in ("threads", "holder", "requester", "not quiesced"):
            assert re.search(rf"^    {label} +yes +\S", text, re.MULTILINE), label

    def test_stacks_read_as_in_gdb(self, text: str) -> None:
        stack = text.partition("HOLDER")[2].partition("REQUESTER")[0].splitlines()[1:]
        assert [re.sub(r" {2,}", "|", each.strip()) for each in stack if each.strip()] == [
            "#0|libtcmalloc.so.4|tcmalloc::CentralFreeList::InsertRange|direct call",
            "#1|libtcmalloc.so.4|tcmalloc::ThreadCache::ListTooLong+0x30|direct call",
            "#2|libtcmalloc.so.4|tc_free+0x1f4|via PLT",
            "#3|libglib-2.0.so.0|g_free+0x10|via PLT",
            "#4|qemu-system-aarch64|qemu_thread_start+0x6c",
        ]

    def test_windows_that_matter_come_first_and_fold(self, text: str) -> None:
        assert in_this_order(text, "FORK WINDOWS  3", "os_daemonize (x2)", "launch_script")

    def test_diagnostics_fold_and_infos_are_counted(self, text: str) -> None:
        assert "warning: libfoo.so.1, libbar.so.1: no unwind information" in text
        assert "11213 calls" not in text
        assert "and 1 more of level info: --verbose shows them" in text
        assert "11213 calls" in render(samples.incident(), verbose=True)


class TestNoFinding:
    def test_says_what_was_checked_and_why(self) -> None:
        text = flat(render(samples.cured()))
        assert in_this_order(
            text,
            "no finding: malloc is libtcmalloc.so.4 (tcmalloc 2.10); its fork handlers are effective",
            "registered by tcmalloc::Static::InitLateMaybeRecursive()",
            "pthread_atfork@GLIBC_2.2.5 binds to libc.so.6",
            "fork windows that were checked: 3, of which the program is seen to reach 2",
            "not known: whether 1 of 3 fork windows can be reached",
            "1 target analysed; no finding",
        )

    def test_names_every_doubt(self) -> None:
        target = samples.TARGET
        target = replace(
            target,
            threads=Answer.UNKNOWN,
            missing=("libx.so.1",),
            allocators=(replace(samples.ALLOCATOR, hooks=Hooks.UNKNOWN),),
            windows=(replace(samples.SPAWNED, kind=WindowKind.UNKNOWN),),
        )
        text = flat(render(Report((target,))))
        assert "not known: whether fork is safe for libtcmalloc.so.4 (tcmalloc 2.10)" in text
        assert "not known: whether another thread can exist" in text
        assert "not known: whether 1 of 1 fork windows can be reached" in text
        assert "not known: what the child does in 1 of 1 fork windows" in text
        assert "not known: what the missing libraries do" in text

    def test_nothing_there_is_no_claim_of_safety(self) -> None:
        target = replace(samples.TARGET, allocators=(), windows=(), threads=Answer.NO, thread_sources=())
        text = flat(render(Report((target,))))
        assert "no object of the closure was recognised as the one that serves malloc" in text
        assert "nothing in the closure was seen to fork" in text
        assert "no thread was seen to start before a fork" in text
        assert "safe" not in text

    def test_doubts_stay_when_something_was_found(self) -> None:
        assert "not known: whether 1 of 3 fork windows can be reached" in render(samples.incident())

    def test_an_allocator_that_no_signature_knows(self) -> None:
        allocator = replace(
            samples.ALLOCATOR, family="unknown", version=None, hooks=Hooks.NOT_NEEDED, why="it takes no lock"
        )
        text = flat(render(Report((replace(samples.TARGET, allocators=(allocator,)),))))
        assert "malloc is libtcmalloc.so.4 (an allocator without a signature); it takes no lock" in text


class TestFailures:
    def test_each_is_told_once(self) -> None:
        text = render(samples.failed())
        assert text.count("not an ELF file") == 1
        assert "    Name a program or a shared library." in text
        assert "missing: libusbredirparser.so.1" in text
        assert "something was not analysed: see above" in text
        assert "DIAGNOSTICS" not in text

    def test_an_empty_report(self) -> None:
        assert render(Report()) == "0 targets analysed; no finding\n"


class TestManyOfEverything:
    @pytest.fixture
    def report(self) -> Report:
        findings = tuple(
            replace(samples.INHERITED, severity=Severity.LOW, fork=Frame(samples.PROGRAM, f"f{n:02}", 0))
            for n in range(40)
        )
        windows = tuple(replace(samples.DAEMONIZE, function=f"w{n:02}") for n in range(40))
        target = replace(
            samples.TARGET,
            windows=windows,
            missing=tuple(f"lib{n}.so" for n in range(40)),
            thread_sources=tuple((Frame(samples.PROGRAM, f"t{n}", 0),) for n in range(40)),
        )
        warnings = tuple(Diagnostic("warning", "x", f"message {n}") for n in range(40))
        return Report((target,), findings, warnings)

    def test_is_counted_instead_of_listed(self, report: Report) -> None:
        text = render(report)
        assert text.count("HOLDER") == 5
        for rest in (
            "20 more findings",
            "32 more fork windows",
            "36 more places that create threads",
            "30 more messages",
        ):
            assert f"... and {rest}: --verbose shows them" in text
        assert "lib3.so and 36 more" in text

    def test_verbose_shows_all(self, report: Report) -> None:
        text = render(report, verbose=True)
        assert text.count("HOLDER") == 40
        assert " more" not in text
        assert all(f"w{n:02}" in text and f"message {n}" in text for n in range(40))

    def test_the_middle_of_a_long_stack(self) -> None:
        holder = tuple(Frame("a.so", f"f{n:02}", 0, "direct") for n in range(30))
        report = replace(samples.incident(), findings=(replace(samples.INHERITED, holder=holder),))
        text = render(report)
        assert in_this_order(
            text, "#0   a.so  f29", "#8   a.so  f21", "... 18 more frames", "#27  a.so  f02", "#29  a.so  f00"
        )
        assert "f10" in render(report, verbose=True)


class TestExplanation:
    def test_everything_is_there(self) -> None:
        text = explained(samples.incident())
        assert in_this_order(
            text,
            "WHY",
            "HOLDER",
            "InsertRange(void*, void*, int) [direct call]",
            "REQUESTER",
            "RemoveRange(void**, void**, int) [direct call]",
            "WHAT TO DO",
            "VERDICT",
            VERDICTS[Verdict.REACHABLE],
            "HOW EACH STEP WAS DERIVED",
            "via PLT: a call through the PLT",
            "THE FORK WINDOW",
            "its paths end in: exit, return",
            "THE ALLOCATOR libtcmalloc.so.4",
            "Prepare, parent, child: tcmalloc::CentralCacheLockAll()",
            "No handler takes tcmalloc::Static::central_cache_",
            "perftools_pthread_atfork(void (*)(), void (*)(), void (*)())+0x18",
            "NOT KNOWN",
            "# inherited-lock:",
            "## How to fix it",
        )

    def test_what_is_unknown_is_named(self) -> None:
        answers = (Answer.YES, Answer.UNKNOWN, Answer.YES, Answer.YES)
        conditions = replace(samples.CONDITIONS, answers=answers)
        lock = replace(samples.LOCK, rva=None, form="allocator")
        finding = replace(samples.INHERITED, conditions=conditions, lock=lock, verdict=Verdict.SUSPECTED)
        text = flat(explained(Report((samples.TARGET,), (finding,))).partition("NOT KNOWN")[2])
        assert text.startswith("holder: see above which lock it is")

    def test_every_verdict_is_explained(self) -> None:
        assert set(VERDICTS) == set(Verdict)

    def test_a_finding_without_paths_or_target(self) -> None:
        text = explained(Report(findings=(replace(samples.UNBOUND, fix=""),)))
        assert "HOW EACH STEP" not in text
        assert "forkproof rules atfork-unbound" in text


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("main", "main"),
        ("tcmalloc::CentralFreeList::InsertRange(void*, void*, int)", "tcmalloc::CentralFreeList::InsertRange"),
        ("Foo::size() const", "Foo::size"),
        ("f(void (*)(int), int (*)[3])", "f"),
        ("Foo::operator()(int)", "Foo::operator()"),
        ("Foo::operator()", "Foo::operator()"),
        ("(anonymous namespace)::f(int)", "(anonymous namespace)::f"),
        ("(anonymous)", "(anonymous)"),
        ("unbalanced)", "unbalanced)"),
    ],
)
def test_names_without_parameters(function: str, expected: str) -> None:
    assert stacks.brief(function) == expected


LONG = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).map(lambda text: text * 40)
NAMES = LONG | st.sampled_from(["main", "std::" + "vector<" * 60, "中" * 120, "\x1b[2J", "a b " * 100])


@pytest.mark.parametrize(("offset", "expected"), [(0, "f"), (16, "f+0x10"), (-16, "f-0x10")])
def test_a_call_may_lie_before_the_function_that_its_part_belongs_to(offset: int, expected: str) -> None:
    assert stacks.name(Frame("a.so", "f", offset)) == expected


def hostile(name: str) -> Report:
    """The incident with every name replaced."""
    frames = tuple(Frame(name, name, 2**64, name) for _ in range(14))
    lock = replace(samples.LOCK, object=name, name=name)
    finding = replace(
        samples.INHERITED, object=name, target=name, message=name, fix=name, lock=lock, holder=frames, requester=frames
    )
    allocator = replace(samples.ALLOCATOR, object=name, family=name, version=name, why=name, registered_by=frames)
    window = replace(samples.DAEMONIZE, forker=name, function=name, call_site=frames[0], path=frames)
    target: Target = replace(
        samples.TARGET,
        path=name,
        libc=name,
        missing=(name,),
        allocators=(allocator,),
        windows=(window,),
        thread_sources=(frames,),
    )
    safe = replace(target, path=name + "2", allocators=(replace(allocator, hooks=Hooks.EFFECTIVE),))
    return Report((target, safe), (finding,), (Diagnostic("warning", name, name),), (name,))


class TestWidth:
    @given(NAMES, st.integers(20, 120), st.booleans())
    @settings(max_examples=60)
    def test_no_line_is_too_wide_whatever_the_names(self, name: str, width: int, verbose: bool) -> None:
        limit = max(40, min(width, 100))
        report = hostile(name)
        for text in (render(report, width=width, verbose=verbose), explained(report, limit)):
            for each in text.splitlines():
                assert columns(each) <= limit
                assert each.isprintable()

    @given(st.from_type(Report), st.booleans())
    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    def test_any_report_can_be_shown(self, report: Report, verbose: bool) -> None:
        text = render(report, verbose=verbose)
        assert all(columns(each) <= 100 for each in text.splitlines())
        assert render(report, verbose=verbose) == text
        if report.findings:
            assert explained(report)

    @pytest.mark.parametrize("rule", rules.load(), ids=lambda rule: rule.id)
    def test_pages(self, rule: rules.Rule) -> None:
        assert painted(page_lines(rule.page, 100), color=False) == rule.page
        assert all(columns(each) <= 60 for each in painted(page_lines(rule.page, 60), color=False).splitlines())
