"""forkproof.toml: what it may say, what it suppresses and for how long, and what a baseline lets pass."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest

from forkproof.cli.gate import exit_code
from forkproof.model import Baseline, Diagnostic, Finding, Override, Report, Severity, program_name
from forkproof.policy import Policy, against, apply, compare, load
from forkproof.policy.apply import matches, today
from forkproof.policy.config import BadConfig, Rule
from tests.unit.report import samples

DAY = dt.date(2027, 3, 1)


def policy(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "forkproof.toml"
    path.write_text(text)
    return load(path)


def entry(selectors: str, expires: str = "2027-03-01") -> str:
    return f'[[suppress]]\n{selectors}\nreason = "upstream knows"\nexpires = {expires}\n'


class TestFile:
    def test_everything(self, tmp_path: Path) -> None:
        text = 'fail-on = "medium"\n[rules]\natfork-absent = "off"\ninherited-lock = "low"\n[scan]\nsysroot = "root"\n'
        text += 'preload = ["liba.so"]\nalso = ["b"]\nlibrary-path = ["c"]\nonly = ["d"]\n' + entry(
            'rule = "atfork-unbound"'
        )
        found = policy(tmp_path, text)
        assert found.fail_on == "medium"
        assert found.severities == (("atfork-absent", None), ("inherited-lock", Severity.LOW))
        assert found.sysroot == tmp_path / "root"
        assert (found.preload, found.also, found.library_path, found.only) == (("liba.so",), ("b",), ("c",), ("d",))
        (rule,) = found.suppressions
        assert (rule.rule, rule.expires, rule.source) == ("atfork-unbound", DAY, f"{found.path}: suppress[0]")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("fail_on = 'high'", "Did you mean fail-on"),
            ("fail-on = 'fatal'", "Expected one of high"),
            ("[rules]\natfork-unbond = 'off'", "Did you mean atfork-unbound"),
            ("[rules]\natfork-unbound = 'none'", "Expected one of"),
            ("[scan]\npreload = 'liba.so'", "a list of strings"),
            ("suppress = 1", "[[suppress]]"),
            ("[[suppress]]\nreason='x'\nexpires=2027-01-01", "would suppress everything"),
            ("[[suppress]]\nrule='inherited-lock'\nexpires=2027-01-01", "no reason"),
            ("[[suppress]]\nrule='inherited-lock'\nreason='  '\nexpires=2027-01-01", "no reason"),
            ("[[suppress]]\nrule='inherited-lock'\nreason='x'", "no date of expiry"),
            ("[[suppress]]\nrule='inherited'\nreason='x'\nexpires=2027-01-01", "Did you mean inherited-lock"),
            ("[[suppress]]\nrule='inherited'\nreason='x'\nexpires=2027-01-01", "Known are: atfork-absent, "),
            ("[rules]\natfork-unbond = 'off'", "Known are: atfork-absent, "),
            ("[rules]\natfork-unbound = true", "atfork-unbound is true"),
            ("[scan]\nlibrary_path = []", "Did you mean library-path? Known are: sysroot"),
            ("[scan]\nfail-on = 'low'", "fail-on belongs at the top of the file"),
            ("preload = ['liba.so']", "preload belongs below [scan]. Known are: fail-on, scan"),
            ("until = 2027-01-01", "unknown: until\n  Known are: fail-on, scan, rules, suppress."),
            ("expires = 2027-01-01", "expires belongs below [[suppress]]"),
            ("FAIL-ON = 'low'", "Did you mean fail-on"),
            ("[[suppress]]\nsoname='x'\nreason='x'\nexpires=2027-01-01", "unknown: suppress[0].soname"),
            ("a = = 1", "not TOML"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(BadConfig) as caught:
            policy(tmp_path, text)
        assert said in str(caught.value)
        assert "forkproof.toml" in str(caught.value)
        assert caught.value.exit_code == 2


class TestExpiry:
    """What is wrong with a day is said with the day, and with what it should look like."""

    @pytest.mark.parametrize(
        ("value", "told", "example"),
        [
            ("'2027-01-09'", 'expires is "2027-01-09"', "expires = 2027-01-09"),
            ("2027-01-09T10:00:00", "expires is 2027-01-09T10:00:00", "expires = 2027-01-09"),
            ("'2027-02-30'", 'expires is "2027-02-30"', "expires = 2027-03-01"),
            ("'in March'", 'expires is "in March"', "expires = 2027-03-01"),
            ("2027", "expires is 2027", "expires = 2027-03-01"),
            ("false", "expires is false", "expires = 2027-03-01"),
            ("10:00:00", "expires is 10:00:00", "expires = 2027-03-01"),
            ("2027-02-30", ": expires=2027-02-30", "expires = 2027-03-01"),
            ("2027-1-9", ": expires=2027-1-9", "expires = 2027-03-01"),
            ("never", ": expires=never", "expires = 2027-03-01"),
            ("", ": expires=", "expires = 2027-03-01"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, value: str, told: str, example: str) -> None:
        with pytest.raises(BadConfig) as caught:
            policy(tmp_path, f"[[suppress]]\nrule='inherited-lock'\nexpires={value}\nreason='x'\n")
        first, _, rest = str(caught.value).partition("\n")
        assert told in first
        assert "YYYY-MM-DD" in rest
        assert rest.endswith(example)


class TestSelectors:
    @pytest.mark.parametrize(
        ("selector", "value", "expected"),
        [
            ("rule", "inherited-lock", True),
            ("rule", "atfork-*", False),
            ("object", "libtcmalloc.so.*", True),
            ("object", "libjemalloc*", False),
            ("target", "qemu-system-*", True),
            ("target", "/usr/bin/*", True),
            ("target", "/usr/sbin/*", False),
            ("function", "os_daemonize", True),
            ("function", "g_free", True),
            ("function", "tcmalloc::CentralFreeList::InsertRange", True),
            ("function", "tcmalloc::CentralFreeList::InsertRange(void*, void*, int)", True),
            ("function", "fork", False),
            ("lock", "tcmalloc::Static::central_cache_", True),
            ("lock", "*pageheap*", False),
            ("id", samples.INHERITED.id, True),
            ("id", samples.INHERITED.fingerprint, True),
            ("id", samples.UNBOUND.id, False),
        ],
    )
    def test_one(self, selector: str, value: str, expected: bool) -> None:
        rule = Rule("x", "y", DAY, **{selector: value})
        assert matches(rule, samples.INHERITED) is expected

    def test_all_must_match(self) -> None:
        rule = Rule("x", "y", DAY, rule="inherited-lock", function="os_daemonize")
        assert matches(rule, samples.INHERITED)
        assert not matches(replace(rule, function="other"), samples.INHERITED)

    def test_a_finding_without_a_lock_has_none_to_match(self) -> None:
        assert not matches(Rule("x", "y", DAY, lock="*"), samples.UNBOUND)


class TestApply:
    def test_suppressed_until_the_day(self, tmp_path: Path) -> None:
        known = policy(tmp_path, entry('rule = "inherited-lock"') + entry('rule = "atfork-unbound"'))
        report = apply(samples.incident(), known, DAY)
        assert len(report.findings) == 2
        assert not any(finding.is_open for finding in report.findings)
        assert exit_code(report, "note") == 0
        after = apply(samples.incident(), known, DAY + dt.timedelta(days=1))
        assert all(finding.is_open for finding in after.findings)
        assert exit_code(after, "high") == 1
        messages = [note.message for note in after.diagnostics if note.object.endswith("suppress[0]")]
        assert messages == ["expired on 2027-03-01: 1 finding counts again (upstream knows)"]

    def test_an_expired_entry_does_not_hide_a_later_one(self, tmp_path: Path) -> None:
        text = entry('rule = "inherited-lock"', "2027-01-01") + entry('rule = "inherited-lock"', "2027-12-31")
        report = apply(samples.incident(), policy(tmp_path, text), DAY)
        hang = next(finding for finding in report.findings if finding.rule == "inherited-lock")
        assert hang.suppression is not None
        assert hang.suppression.expires == "2027-12-31"

    def test_unused(self, tmp_path: Path) -> None:
        report = apply(samples.incident(), policy(tmp_path, entry('function = "gone"')), DAY)
        assert any("matches no finding" in note.message for note in report.diagnostics)

    @pytest.mark.parametrize(
        ("selector", "said"),
        [
            ('function = "gone"', "expired on 2027-03-01 and matches no finding; remove it (upstream knows)"),
            ('target = "named"', "expired on 2027-03-01, and its target was not scanned; remove or renew it "),
        ],
    )
    def test_expired_and_unused(self, tmp_path: Path, selector: str, said: str) -> None:
        report = apply(samples.incident(), policy(tmp_path, entry(selector)), DAY + dt.timedelta(days=1))
        (message,) = [note.message for note in report.diagnostics if note.object.endswith("suppress[0]")]
        assert said in message

    def test_an_entry_for_another_program_is_not_unused(self, tmp_path: Path) -> None:
        report = apply(samples.incident(), policy(tmp_path, entry('target = "named"')), DAY)
        assert not any("matches no finding" in note.message for note in report.diagnostics)

    def test_severity_and_off(self, tmp_path: Path) -> None:
        text = '[rules]\natfork-unbound = "off"\ninherited-lock = "low"\n'
        report = apply(samples.incident(), policy(tmp_path, text), DAY)
        assert [(finding.rule, finding.severity) for finding in report.findings] == [("inherited-lock", Severity.LOW)]
        path = str(tmp_path / "forkproof.toml")
        assert report.overrides == (
            Override("atfork-unbound", None, 1, path), Override("inherited-lock", Severity.LOW, 1, path)
        )  # fmt: skip

    def test_a_rule_that_found_nothing_is_told_to_be_off(self, tmp_path: Path) -> None:
        report = apply(samples.incident(), policy(tmp_path, '[rules]\nvfork-misuse = "off"\n'), DAY)
        assert [(each.rule, each.findings) for each in report.overrides] == [("vfork-misuse", 0)]

    def test_what_a_saved_report_was_narrowed_by_stays(self, tmp_path: Path) -> None:
        off = policy(tmp_path, '[rules]\natfork-unbound = "off"\n')
        again = apply(apply(samples.incident(), off, DAY), policy(tmp_path, '[rules]\ninherited-lock = "low"\n'), DAY)
        assert [each.rule for each in again.overrides] == ["atfork-unbound", "inherited-lock"]

    def test_the_day_can_be_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1803859200")
        assert today() == DAY


def variant(finding: Finding, function: str) -> Finding:
    assert finding.fork is not None
    return replace(finding, fork=replace(finding.fork, function=function))


class TestBaseline:
    ONE = samples.INHERITED

    def states(self, old: list[Finding], new: list[Finding]) -> list[Baseline | None]:
        marked = against(Report(findings=tuple(old)), Report(findings=tuple(new)))
        return sorted((finding.baseline for finding in marked.findings), key=str)

    def test_the_same_is_unchanged_and_another_is_new(self) -> None:
        other = variant(self.ONE, "spawn")
        assert self.states([self.ONE], [self.ONE, other]) == [Baseline.NEW, Baseline.UNCHANGED]

    def test_only_what_is_new_fails(self) -> None:
        marked = against(samples.incident(), samples.incident())
        assert exit_code(marked, "note") == 0
        assert exit_code(against(Report(), samples.incident()), "high") == 1

    def test_a_rebuild_moves_nameless_functions(self) -> None:
        old, new = variant(self.ONE, "sub_1000"), variant(self.ONE, "sub_2000")
        assert self.states([old], [new]) == [Baseline.UNCHANGED]
        assert self.states([old], [new, variant(self.ONE, "sub_3000")]) == [Baseline.NEW, Baseline.UNCHANGED]

    def test_an_upgrade_of_the_allocator_is_no_new_finding(self) -> None:
        assert self.ONE.lock is not None
        old = replace(self.ONE, lock=replace(self.ONE.lock, name="a lock of tcmalloc 2.10"))
        new = replace(self.ONE, lock=replace(self.ONE.lock, name="a lock of tcmalloc 2.10.1"))
        assert self.states([old], [new]) == [Baseline.UNCHANGED]

    def test_what_became_worse_is_new(self) -> None:
        mild = replace(self.ONE, severity=Severity.MEDIUM)
        assert self.states([mild], [self.ONE]) == [Baseline.NEW]
        assert self.states([self.ONE], [mild]) == [Baseline.UNCHANGED]

    def test_compare(self) -> None:
        gone, stays, came = variant(self.ONE, "a"), variant(self.ONE, "b"), variant(self.ONE, "c")
        found = compare(Report(findings=(gone, stays)), Report(findings=(stays, came)))
        assert (found.introduced, found.fixed, found.unchanged) == ((came,), (gone,), (stays,))

    def test_two_of_one_kind_are_counted(self) -> None:
        same = [variant(self.ONE, "sub_1"), variant(self.ONE, "sub_2")]
        found = compare(Report(findings=tuple(same)), Report(findings=(same[1],)))
        assert (found.fixed, found.unchanged) == ((same[0],), (same[1],))


class TestWhatCannotBeTold:
    """A side that does not tell everything of a program introduces nothing in it, and fixes nothing."""

    HERE = samples.INHERITED
    THERE = replace(samples.INHERITED, target="/usr/bin/other")
    ALL = Report(samples.incident().targets, (HERE, THERE))
    LACKING = replace(ALL.targets[0], missing=("libz.so.1",))
    FAILED = Diagnostic("error", "/old/pkg.deb", "/old/pkg.deb: damaged: no end\n  Fetch it again.")

    def test_a_library_is_missing_on_the_old_side(self) -> None:
        found = compare(Report((self.LACKING,)), self.ALL)
        assert (found.introduced, found.perhaps_introduced) == ((self.THERE,), (self.HERE,))
        (gap,) = found.gaps
        assert (gap.program, gap.side, gap.reason) == (program_name(self.HERE.target), "old", "not found: libz.so.1")

    def test_a_library_is_missing_on_the_new_side(self) -> None:
        found = compare(self.ALL, Report((self.LACKING,)))
        assert (found.fixed, found.perhaps_fixed) == ((self.THERE,), (self.HERE,))
        assert [gap.side for gap in found.gaps] == ["new"]

    def test_what_is_incomplete_still_introduces(self) -> None:
        found = compare(Report(self.ALL.targets), Report((self.LACKING,), (self.HERE,)))
        assert (found.introduced, [gap.side for gap in found.gaps]) == ((self.HERE,), ["new"])

    def test_a_preload_in_vain(self) -> None:
        vain = replace(self.ALL.targets[0], incomplete=("libx.so: cannot be preloaded",))
        assert compare(self.ALL, Report((vain,))).perhaps_fixed == (self.HERE,)

    def test_a_side_that_cannot_be_read(self) -> None:
        nothing = Report(diagnostics=(self.FAILED,), errors=(self.FAILED.message,))
        found = compare(nothing, self.ALL)
        assert (found.introduced, set(found.perhaps_introduced)) == ((), {self.HERE, self.THERE})
        assert {gap.reason for gap in found.gaps} == {"not analysed: pkg.deb: damaged: no end"}
        assert compare(self.ALL, nothing).fixed == ()

    def test_one_program_that_cannot_be_read_says_nothing_of_others(self) -> None:
        name = self.THERE.target
        failed = Diagnostic("error", name, f"{name}: is truncated")
        new = Report(self.ALL.targets, (), (failed,), (failed.message,))
        found = compare(self.ALL, new)
        assert (found.fixed, found.perhaps_fixed) == ((self.HERE,), (self.THERE,))
        assert [(gap.program, gap.reason) for gap in found.gaps] == [("other", "not analysed: is truncated")]

    def test_a_program_that_is_not_there_any_more(self) -> None:
        found = compare(self.ALL, Report())
        assert (len(found.fixed), found.gaps) == (2, ())

    def test_a_baseline_says_what_is_not_known_to_be_repaired(self) -> None:
        marked = against(self.ALL, Report((self.LACKING,)))
        (note,) = marked.diagnostics
        assert "1 finding of the baseline is not seen here; whether that is a repair is not known" in note.message
        marked = against(Report((self.LACKING,)), Report(self.ALL.targets, (self.HERE,)))
        assert [finding.baseline for finding in marked.findings] == [Baseline.NEW]
        assert "the baseline does not tell everything of this program" in marked.diagnostics[0].message
