"""What a probe's record makes of a finding: its verdict, and its rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forkproof.cli.gate import exit_code
from forkproof.model import ProbeRecord, Report, Severity, Verdict
from forkproof.policy import Policy
from forkproof.policy.apply import apply, today
from forkproof.probe.prove import judged
from forkproof.report import proof
from forkproof.report.layout import plain
from tests.unit.report import samples


def record(verdict: Verdict) -> ProbeRecord:
    return ProbeRecord(verdict, "since it was so", ("./daemon",))


@pytest.mark.parametrize("ranked", list(Severity))
class TestRank:
    def test_confirmed_is_high_and_fails_a_gate(self, ranked: Severity) -> None:
        found = judged(replace(samples.INHERITED, severity=ranked), record(Verdict.CONFIRMED))
        assert (found.verdict, found.severity) == (Verdict.CONFIRMED, Severity.HIGH)
        assert exit_code(Report(findings=(found,)), "high") == 1
        assert exit_code(Report(findings=(found,)), "never") == 0

    def test_the_scans_rank_is_kept_beside_it(self, ranked: Severity) -> None:
        found = judged(replace(samples.INHERITED, severity=ranked), record(Verdict.CONFIRMED))
        assert found.probe is not None
        assert found.probe.scan_severity == (None if ranked is Severity.HIGH else ranked)
        text = "\n".join(plain(each) for each in proof.lines(found.probe, 80, verbose=False))
        assert (f"ranked {ranked.value} by the scan" in text) == (ranked is not Severity.HIGH)

    def test_a_lock_that_nobody_takes_is_ranked_one_lower(self, ranked: Severity) -> None:
        idle = replace(record(Verdict.INCONCLUSIVE), scan_severity=ranked)
        found = judged(replace(samples.INHERITED, severity=ranked), idle)
        milder = {Severity.HIGH: Severity.MEDIUM, Severity.MEDIUM: Severity.LOW}.get(ranked)
        assert (found.verdict, found.severity) == (samples.INHERITED.verdict, milder or ranked)
        assert found.probe is not None
        assert found.probe.scan_severity is (ranked if milder else None)
        text = "\n".join(plain(each) for each in proof.lines(found.probe, 80, verbose=False))
        assert ("since its lock was not taken" in text) == (milder is not None)

    def test_others_keep_it(self, ranked: Severity) -> None:
        finding = replace(samples.INHERITED, severity=ranked)
        undecided = judged(finding, record(Verdict.INCONCLUSIVE))
        assert (undecided.verdict, undecided.severity) == (finding.verdict, ranked)
        assert judged(finding, record(Verdict.REFUTED)).severity is ranked
        assert exit_code(Report(findings=(judged(finding, record(Verdict.REFUTED)),)), "note") == 0


def test_what_a_team_has_chosen_counts_after_it() -> None:
    """A policy that ranks the rule knows better than the default: it stands in the team's own file."""
    found = judged(samples.INHERITED, record(Verdict.CONFIRMED))
    policy = Policy(path="forkproof.toml", severities=(("inherited-lock", Severity.LOW),))
    assert exit_code(apply(Report(findings=(found,)), policy, today()), "high") == 0
