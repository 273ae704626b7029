"""The report as JUnit XML: a suite for each target, so that a CI server shows findings as failed tests.

Owns: which finding is a failure. Takes: a Report and the mildest severity that fails. Gives: text.
Must never: fail a test for what the gate lets pass; such a finding is a skipped test that says why.

A case for each finding, one for each rule that found nothing, and an error for what was not analysed.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from forkproof import rules
from forkproof.model import Finding, Override, Report, Severity, Verdict
from forkproof.report.json import in_order
from forkproof.report.layout import WIDTH, clean, plain
from forkproof.report.text import View, finding_lines


def render(report: Report, fail_on: Severity | None) -> str:
    """The document; with `fail_on` None nothing fails."""
    root = ET.Element("testsuites", {"name": "forkproof"})
    findings = in_order(report.findings)
    for target in report.targets:
        suite = ET.SubElement(root, "testsuite", {"name": clean(target.path)})
        found = [finding for finding in findings if finding.target == target.path]
        _findings(suite, target.path, found, fail_on)
        _quiet_rules(suite, target.path, {finding.rule for finding in found}, report.overrides)
        _count(suite)
    if report.errors:
        _errors(root, report.errors)
    for total in ("tests", "failures", "errors", "skipped"):
        root.set(total, str(sum(int(suite.get(total, "0")) for suite in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _findings(suite: ET.Element, target: str, findings: Sequence[Finding], fail_on: Severity | None) -> None:
    for finding in findings:
        case = _case(suite, target, f"{finding.id}: {finding.message}")
        passed = _passed(finding, fail_on)
        if passed:
            ET.SubElement(case, "skipped", {"message": clean(passed)})
        else:
            kind = f"{finding.rule}, {finding.severity.value}, {finding.verdict.value}"
            failure = ET.SubElement(case, "failure", {"message": clean(finding.message), "type": kind})
            lines = finding_lines(finding, View(WIDTH, verbose=True))
            failure.text = "\n" + "\n".join(clean(plain(line)) for line in lines)


def _quiet_rules(suite: ET.Element, target: str, found: set[str], overrides: Sequence[Override]) -> None:
    """A case for each rule without a finding: passed, or skipped where a policy has it off."""
    off = {override.rule: override.source for override in overrides if override.severity is None}
    for rule in rules.load():
        if rule.id in off:
            case = _case(suite, target, f"{rule.id}: not judged")
            ET.SubElement(case, "skipped", {"message": clean(f"off by {off[rule.id]}")})
        elif rule.id not in found:
            _case(suite, target, f"{rule.id}: no finding")


def _case(suite: ET.Element, target: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", {"classname": clean(target), "name": clean(name), "time": "0"})


def _passed(finding: Finding, fail_on: Severity | None) -> str:
    """Why a finding does not fail; empty if it does."""
    if finding.suppression is not None:
        until = f" (until {finding.suppression.expires})" if finding.suppression.expires else ""
        return f"suppressed{until}: {finding.suppression.reason}"
    if finding.verdict is Verdict.REFUTED:
        return "refuted by a probe"
    if not finding.is_open:
        return "in the baseline"
    if fail_on is None or finding.severity.rank > fail_on.rank:
        return f"{finding.severity.value}, below what fails ({fail_on.value if fail_on else 'nothing'})"
    return ""


def _errors(root: ET.Element, errors: Sequence[str]) -> None:
    suite = ET.SubElement(root, "testsuite", {"name": "not analysed"})
    for message in errors:
        first = message.splitlines()[0] if message else ""
        case = _case(suite, "forkproof", first)
        ET.SubElement(case, "error", {"message": clean(first)}).text = "\n".join(map(clean, message.splitlines()))
    _count(suite)


def _count(suite: ET.Element) -> None:
    suite.set("tests", str(len(suite)))
    for total, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(total, str(sum(case.find(tag) is not None for case in suite)))
