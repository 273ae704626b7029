"""All formats: the same findings, well-formed whatever the names are, the same bytes twice."""

from __future__ import annotations

import json as stdlib_json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree as ET

import markdown_it
import pytest

from forkproof.model import Baseline, Finding, Frame, Launch, Override, Report, Severity, Suppression, Verdict
from forkproof.report import formats
from forkproof.report.formats import Look
from tests.unit.report import samples

HOSTILE = "<script>alert(1)</script>]]>|`$(x)`\"'\\\n\x1b[31m\x00{{7*7}} -->*/ %% \udcff</title>"

_SVG = "{http://www.w3.org/2000/svg}"


def hostile() -> Report:
    """Every name that comes from a file wants to be markup."""
    frame = Frame(HOSTILE, HOSTILE, 4, "plt")
    finding = replace(
        samples.INHERITED, message=HOSTILE, why=HOSTILE, fix=HOSTILE, holder=(frame, frame), requester=(frame,),
        fork=frame, lock=replace(samples.LOCK, name=HOSTILE), target=f"/{HOSTILE}",
    )  # fmt: skip
    target = replace(samples.TARGET, path=f"/{HOSTILE}", missing=(HOSTILE,))
    return Report((target,), (finding,), (), (HOSTILE,))


def decided() -> Report:
    """One finding of each state that a gate knows, more than the text report shows unasked, two with one id."""
    base = samples.INHERITED
    findings = [
        replace(base, suppression=Suppression("known upstream", "2027-03-01", "forkproof.toml: suppress[0]")),
        replace(base, baseline=Baseline.UNCHANGED, fork=replace(samples.FORK, function="launch")),
        replace(base, baseline=Baseline.NEW, fork=replace(samples.FORK, function="spawn")),
        replace(base, verdict=Verdict.REFUTED, fork=replace(samples.FORK, function="probe")),
        *(replace(base, severity=Severity.LOW, fork=replace(samples.FORK, function=f"f{i}")) for i in range(30)),
        replace(base, target="/opt/other/bin/qemu-system-aarch64"),
    ]
    other = replace(samples.TARGET, path="/opt/other/bin/qemu-system-aarch64")
    return Report((samples.TARGET, other), tuple(findings))


def narrowed() -> Report:
    """A policy has switched a rule off, and ranked another one lower."""
    overrides = (
        Override("atfork-unbound", None, 1, "forkproof.toml"),
        Override("inherited-lock", Severity.LOW, 1, "forkproof.toml"),
        Override("vfork-misuse", None, 0, "forkproof.toml"),
    )
    return Report((samples.TARGET,), (replace(samples.INHERITED, severity=Severity.LOW),), overrides=overrides)


REPORTS: dict[str, Callable[[], Report]] = {
    "incident": samples.incident,
    "cured": samples.cured,
    "failed": samples.failed,
    "hostile": hostile,
    "decided": decided,
    "narrowed": narrowed,
    "empty": Report,
}

# How each format says which findings there are: text to (id, severity) of each.


def _of_json(text: str) -> list[tuple[str, str]]:
    return [(f["id"], f["severity"]) for f in stdlib_json.loads(text)["findings"]]


def _of_sarif(text: str) -> list[tuple[str, str]]:
    (run,) = stdlib_json.loads(text)["runs"]
    return [(r["properties"]["id"], r["properties"]["severity"]) for r in run["results"]]


def _of_html(text: str) -> list[tuple[str, str]]:
    return re.findall(r'data-finding="([^"]+)" data-severity="([a-z]+)"', text)


def _of_markdown(text: str) -> list[tuple[str, str]]:
    return [(i, s) for s, i in re.findall(r"^\| \S+ ([a-z]+) \| `([^`]+)` \|", text, re.MULTILINE)]


def _of_junit(text: str) -> list[tuple[str, str]]:
    cases = ET.fromstring(text).iter("testcase")
    ids = [str(case.get("name")).partition(":")[0] for case in cases]
    return [(each, "") for each in ids if re.fullmatch(r"[a-z-]+-[0-9a-f]{10}", each)]


def _of_svg(text: str) -> list[tuple[str, str]]:
    notes = [str(each.text) for each in ET.fromstring(text).iter(f"{_SVG}desc")]
    return [(note.split()[1], note.split()[0]) for note in notes]


def _of_comments(text: str) -> list[tuple[str, str]]:
    return [(i, s) for s, i in re.findall(r"^  (?://|%%) (\w+) (\S+)", text, re.MULTILINE)]


def _of_text(text: str) -> list[tuple[str, str]]:
    return [(each, "") for each in re.findall(r"^  id ([a-z-]+-[0-9a-f]{10})", text, re.MULTILINE)]


def _of_brief(text: str) -> list[tuple[str, str]]:
    return [(i, s) for s, i in re.findall(r": (\w+): [a-z-]+, .* \[([a-z-]+-[0-9a-f]{10})\]$", text, re.MULTILINE)]


READERS = {
    "text": _of_text, "brief": _of_brief, "json": _of_json, "sarif": _of_sarif, "html": _of_html,
    "markdown": _of_markdown, "junit": _of_junit, "dot": _of_comments, "svg": _of_svg, "mermaid": _of_comments,
}  # fmt: skip


def told(findings: tuple[Finding, ...], *, with_severity: bool) -> Counter[tuple[str, str]]:
    return Counter((f.id, f.severity.value if with_severity else "") for f in findings)


def test_every_format_has_a_reader_here() -> None:
    assert set(READERS) == set(formats.NAMES)


@pytest.mark.parametrize("name", formats.NAMES)
@pytest.mark.parametrize("report", REPORTS)
class TestEveryFormat:
    def test_the_same_findings(self, name: str, report: str) -> None:
        made = REPORTS[report]()
        found = Counter(READERS[name](formats.render(made, name, Look(verbose=True))))
        assert found == told(made.findings, with_severity=name not in {"text", "junit"})

    def test_twice_the_same(self, name: str, report: str) -> None:
        made = REPORTS[report]()
        assert formats.render(made, name, Look()) == formats.render(made, name, Look())

    def test_order_of_findings_does_not_matter(self, name: str, report: str) -> None:
        made = REPORTS[report]()
        turned = replace(made, findings=made.findings[::-1])
        assert formats.render(made, name, Look()) == formats.render(turned, name, Look())

    def test_can_be_written_and_shown(self, name: str, report: str) -> None:
        text = formats.render(REPORTS[report](), name, Look())
        assert text.endswith("\n")
        assert not any(char in text for char in "\x00\x1b")


_MARKDOWN_TAGS = {
    *("h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "strong"),
    *("details", "summary"),
}


@pytest.mark.parametrize("name", ["text", "markdown", "html"])
def test_a_narrowed_gate_is_told_in_one_line(name: str) -> None:
    told = [each for each in formats.render(narrowed(), name, Look()).splitlines() if "hanged by policy" in each]
    (line,) = (each.replace("\\", "") for each in told)
    assert "forkproof.toml: atfork-unbound is off (1 finding left out), inherited-lock is" in line
    assert "hanged by policy" not in formats.render(samples.incident(), name, Look())


@pytest.mark.parametrize("name", ["text", "markdown", "html", "sarif"])
def test_a_preload_that_nobody_asked_for_is_told(name: str) -> None:
    """It changes the verdict; without --verbose, too."""
    unit = "/usr/lib/systemd/system/dirsrv@.service.d/custom.conf"
    launches = (Launch(unit, ("libjemalloc.so.2",)), Launch("/usr/bin/wrapper", ()))
    report = replace(samples.incident(), targets=(replace(samples.TARGET, launches=launches),))
    told = " ".join(formats.render(report, name, Look()).replace("\\", "").split())
    assert f"scanned with libjemalloc.so.2 preloaded, since {unit} says so" in told
    assert "scanned since /usr/bin/wrapper starts it" in told


@pytest.mark.parametrize("name", ["text", "markdown", "html", "sarif"])
def test_a_preload_that_is_not_there_is_not_called_preloaded(name: str) -> None:
    unit = "/etc/systemd/system/x.service"
    vain = ("libgone.so: cannot be preloaded (LD_PRELOAD) and is ignored",)
    some = replace(samples.TARGET, launches=(Launch(unit, ("liba.so", "libgone.so")),), incomplete=vain)
    none = replace(samples.TARGET, launches=(Launch(unit, ("libgone.so",)),), incomplete=vain)
    told = " ".join(formats.render(replace(samples.incident(), targets=(some, none)), name, Look()).split())
    told = told.replace("\\", "")
    assert f"scanned with liba.so preloaded, since {unit} says so; libgone.so is not there" in told
    assert f"scanned without what {unit} preloads: libgone.so is not there" in told


@pytest.mark.parametrize("name", ["text", "markdown", "html", "sarif"])
def test_the_thread_that_is_lost_holds_nothing(name: str) -> None:
    lost = replace(samples.INHERITED, rule="threads-lost", lock=None, conditions=None)
    report = replace(samples.incident(), findings=(lost,))
    said = formats.render(report, name, Look()).lower()
    assert "thread: one that the child does not have" in said
    assert "another thread, which can have the lock" not in said


class TestHostileNames:
    def test_html_has_one_script(self) -> None:
        page = formats.render(hostile(), "html", Look())
        assert page.count("<script") == page.count("</script>") == 1
        assert "alert(1)" in page
        assert "49" not in re.sub(r"[0-9a-f]{3,}|\d+\.\d+", "", page)  # {{7*7}} is no template here

    def test_markdown_of_a_partial_scan_does_not_begin_like_a_clean_one(self) -> None:
        partly = replace(samples.TARGET, missing=("libgone.so.1",))
        clean = replace(samples.cured(), findings=(), targets=(partly,), errors=(), diagnostics=())
        vain = replace(clean, errors=("x: libgone.so.1 was not found",))
        assert formats.render(vain, "markdown", Look()).splitlines()[0].endswith("something was not analysed")
        assert "no finding in what was analysed" in formats.render(vain, "markdown", Look())
        whole = replace(clean, targets=(samples.TARGET,))
        assert formats.render(whole, "markdown", Look()).splitlines()[0] == "## forkproof: no finding"

    def test_markdown_has_no_markup_of_theirs(self) -> None:
        page = formats.render(hostile(), "markdown", Look())
        shown = markdown_it.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(page)
        assert set(re.findall(r"</?([a-z][a-z0-9]*)", shown.replace("<br", ""))) <= _MARKDOWN_TAGS
        (row,) = [line for line in page.splitlines() if line.startswith("| 🔴")]
        assert len(re.findall(r"(?<!\\)\|", row)) == 6

    def test_dot_strings_are_closed(self) -> None:
        text = formats.render(hostile(), "dot", Look())
        for line in text.splitlines():
            assert len(re.findall(r'(?<!\\)(?:\\\\)*"', line.partition("  //")[0])) % 2 == 0, line

    def test_mermaid_labels_hold_no_syntax(self) -> None:
        text = formats.render(hostile(), "mermaid", Look())
        labels = [label for line in text.splitlines() for label in re.findall(r'"(.*?)"', line.partition("%%")[0])]
        assert labels
        assert not any(re.search(r"[<>|`{}\\]", label.replace("<br/>", "")) for label in labels)


class TestJunit:
    def suites(self, report: Report, fail_on: Severity | None) -> ET.Element:
        return ET.fromstring(formats.render(report, "junit", Look(fail_on=fail_on)))

    def test_what_the_gate_lets_pass_does_not_fail(self) -> None:
        root = self.suites(decided(), Severity.HIGH)
        assert (root.get("failures"), root.get("skipped")) == ("2", "33")
        reasons = {str(each.get("message")) for each in root.iter("skipped")}
        assert "suppressed (until 2027-03-01): known upstream" in reasons
        assert {"in the baseline", "refuted by a probe", "low, below what fails (high)"} <= reasons

    def test_never(self) -> None:
        assert self.suites(samples.incident(), None).get("failures") == "0"

    def test_rules_without_findings_pass_and_failures_show_the_stacks(self) -> None:
        root = self.suites(samples.incident(), Severity.HIGH)
        assert "atfork-absent: no finding" in [case.get("name") for case in root.iter("testcase")]
        text = "".join(str(failure.text) for failure in root.iter("failure"))
        assert "HOLDER" in text
        assert "qemu_thread_start" in text

    def test_a_rule_that_is_off_does_not_pass(self) -> None:
        cases = {str(case.get("name")): case for case in self.suites(narrowed(), Severity.HIGH).iter("testcase")}
        for rule in ("atfork-unbound", "vfork-misuse"):
            (skipped,) = cases[f"{rule}: not judged"]
            assert skipped.get("message") == "off by forkproof.toml"
        assert "atfork-absent: no finding" in cases

    def test_errors(self) -> None:
        root = self.suites(samples.failed(), Severity.HIGH)
        assert root.get("errors") == "2"


class TestSarif:
    def run(self, report: Report) -> dict[str, object]:
        (run,) = stdlib_json.loads(formats.render(report, "sarif", Look()))["runs"]
        assert isinstance(run, dict)
        return run

    def result(self, report: Report, finding: Finding) -> dict[str, object]:
        results = self.run(report)["results"]
        assert isinstance(results, list)
        names = (finding.id, finding.target)
        return next(dict(r) for r in results if (r["properties"]["id"], r["properties"]["target"]) == names)

    def test_both_witness_paths_are_code_flows(self) -> None:
        flows = self.result(samples.incident(), samples.INHERITED)["codeFlows"]
        assert isinstance(flows, list)
        paths = [
            [step["location"]["logicalLocations"][0]["name"] for step in flow["threadFlows"][0]["locations"]]
            for flow in flows
        ]
        assert paths == [[frame.function for frame in path] for path in (samples.HOLDER, samples.REQUESTER)]

    def test_fingerprint_survives_a_rebuild(self) -> None:
        moved = replace(samples.INHERITED, fork=replace(samples.FORK, offset=0x99), lock=replace(samples.LOCK, rva=1))
        before = self.result(samples.incident(), samples.INHERITED)["partialFingerprints"]
        after = self.result(Report((samples.TARGET,), (moved,)), moved)["partialFingerprints"]
        assert before == after

    def test_suppressions_and_baseline_are_sarifs_own(self) -> None:
        known, old, new = decided().findings[:3]
        suppressions = self.result(decided(), known)["suppressions"]
        assert isinstance(suppressions, list)
        assert suppressions[0]["justification"] == "known upstream"
        states = [self.result(decided(), each)["baselineState"] for each in (old, new)]
        assert states == ["unchanged", "new"]

    def test_a_narrowed_gate_is_an_override_of_the_rules_configuration(self) -> None:
        run = self.run(narrowed())
        invocations, tool = run["invocations"], run["tool"]
        assert isinstance(invocations, list)
        assert isinstance(tool, dict)
        found = invocations[0]["ruleConfigurationOverrides"]
        assert [(each["descriptor"]["id"], each["configuration"]) for each in found] == [
            ("atfork-unbound", {"enabled": False}),
            ("inherited-lock", {"enabled": True, "level": "note"}),
            ("vfork-misuse", {"enabled": False}),
        ]
        for each in found:
            assert tool["driver"]["rules"][each["descriptor"]["index"]]["id"] == each["descriptor"]["id"]

    def test_an_incomplete_scan_says_so(self) -> None:
        invocations = self.run(samples.failed())["invocations"]
        assert isinstance(invocations, list)
        assert (invocations[0]["executionSuccessful"], invocations[0]["exitCode"]) == (False, 3)


class TestFingerprint:
    def test_functions_without_a_name_are_known_by_what_leads_to_the_lock(self) -> None:
        fork = replace(samples.FORK, function="sub_495540")
        rebuilt = replace(samples.FORK, function="sub_4a0010")
        one = replace(samples.INHERITED, fork=fork)
        assert one.fingerprint == replace(one, fork=rebuilt).fingerprint
        assert one.fingerprint != replace(one, requester=samples.REQUESTER[1:]).fingerprint
        assert one.id != replace(one, fork=rebuilt).id

    def test_another_lock_or_fork_is_another_finding(self) -> None:
        one = samples.INHERITED
        assert one.fingerprint != replace(one, fork=replace(samples.FORK, function="other")).fingerprint
        assert one.fingerprint != replace(one, lock=replace(samples.LOCK, name="other")).fingerprint

    def test_names_that_are_not_utf8(self) -> None:
        strange = replace(samples.INHERITED, target="/bin/\udcff")
        assert strange.id
        assert strange.fingerprint
