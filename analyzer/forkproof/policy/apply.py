"""A policy applied to a report: severities, rules that are off, suppressions with what became of each.

Owns: what a selector matches, and the day of expiry. Takes: a Report, a Policy, a date. Gives: a Report.
Must never: hide a finding: what is suppressed stays in the report with its reason, and what a rule that is off would
have said is counted.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from forkproof.model import Diagnostic, Finding, Override, Report, Suppression
from forkproof.policy.config import Policy, Rule
from forkproof.report import stacks


def today() -> dt.date:
    """The day that suppressions expire against; SOURCE_DATE_EPOCH sets it, for builds that must be the same twice."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch.isdigit():
        return dt.datetime.fromtimestamp(int(epoch), dt.UTC).date()
    return dt.datetime.now(dt.UTC).date()


def apply(report: Report, policy: Policy, day: dt.date) -> Report:
    """The report with the policy's marks."""
    levels = dict(policy.severities)
    counts = Counter(finding.rule for finding in report.findings)
    overrides = (Override(rule, level, counts[rule], policy.path) for rule, level in sorted(levels.items()))
    kept = [finding for finding in report.findings if levels.get(finding.rule, ...) is not None]
    kept = [replace(f, severity=level) if (level := levels.get(f.rule)) is not None else f for f in kept]
    used: Counter[Rule] = Counter()
    findings = tuple(_marked(finding, policy, day, used) for finding in kept)
    return replace(
        report,
        findings=findings,
        diagnostics=(*report.diagnostics, *_verdicts(report, policy, day, used)),
        overrides=(*report.overrides, *overrides),
    )


def _marked(finding: Finding, policy: Policy, day: dt.date, used: Counter[Rule]) -> Finding:
    """The finding with the first suppression that holds; those that have expired are remembered."""
    for rule in policy.suppressions:
        if matches(rule, finding):
            used[rule] += 1
            if day <= rule.expires:
                known = Suppression(rule.reason, rule.expires.isoformat(), rule.source)
                return replace(finding, suppression=known)
    return finding


def matches(rule: Rule, finding: Finding) -> bool:
    """Whether every selector that the entry gives fits the finding."""
    functions = {frame.function for frame in (*finding.holder, *finding.requester)}
    functions |= {finding.fork.function} if finding.fork is not None else set()
    functions |= {stacks.brief(each) for each in functions}
    objects = {finding.object, *([finding.lock.object] if finding.lock is not None else [])}
    return all(
        not pattern or any(_fits(pattern, value) for value in values)
        for pattern, values in (
            (rule.id, {finding.id, finding.fingerprint}),
            (rule.rule, {finding.rule}),
            (rule.target, {finding.target, finding.target.rsplit("/", 1)[-1]}),
            (rule.object, objects),
            (rule.function, functions),
            (rule.lock, {finding.lock.name} if finding.lock is not None else set()),
        )
    )


def _fits(pattern: str, value: str) -> bool:
    """Equal, or as a shell's pattern; C++ names hold brackets of their own."""
    return pattern == value or fnmatch.fnmatchcase(value, pattern)


def _verdicts(report: Report, policy: Policy, day: dt.date, used: Counter[Rule]) -> Iterator[Diagnostic]:
    """Entries that have expired, and entries that matched nothing of what was scanned.

    One that has expired does nothing for any program, so it is told even where its program was not scanned.
    """
    for rule in policy.suppressions:
        count = used[rule]
        expired = f"expired on {rule.expires.isoformat()}" if day > rule.expires else ""
        if count and expired:
            message = f"{expired}: {count} finding{' counts' if count == 1 else 's count'} again"
        elif not count and _is_about(report, rule):
            message = f"{f'{expired} and ' if expired else ''}matches no finding; remove it"
        elif expired:
            message = f"{expired}, and its target was not scanned; remove or renew it"
        else:
            continue
        yield Diagnostic("warning", rule.source, f"{message} ({rule.reason})")


def _is_about(report: Report, rule: Rule) -> bool:
    """An entry for a program that was not scanned this time is not unused."""
    paths = [target.path for target in report.targets]
    return not rule.target or any(
        _fits(rule.target, each) for path in paths for each in (path, path.rsplit("/", 1)[-1])
    )
