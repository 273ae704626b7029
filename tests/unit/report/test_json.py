"""The canonical JSON: every promised key, byte for byte the same, and back to the same values."""

from __future__ import annotations

import json as stdlib_json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forkproof
from forkproof.model import Finding, Report, Severity
from forkproof.report import json
from tests.unit.report import samples

Json = dict[str, Any]

FRAME = {"object", "function", "offset", "edge"}
LOCK = {"object", "name", "rva", "form"}

#: Every key that version 1 promises, and those that have come since. A key that goes is a new version.
PROMISED = {
    "": {"version", "tool", "targets", "findings", "diagnostics"},
    "tool": {"name", "version"},
    "targets": {
        *("path", "machine", "build_id", "interpreter", "closure", "missing", "allocators"),
        *("threads", "thread_sources", "windows"),
    },
    "closure": {"name", "path", "build_id", "sha256"},
    "allocators": {
        *("object", "family", "version", "defines", "active", "hooks"),
        *("registered_by", "prepare_locks", "uncovered_locks", "why"),
    },
    "windows": {"forker", "function", "kind", "handlers_run", "call_site"},
    "findings": {
        *("id", "rule", "severity", "verdict", "target", "object", "message", "lock", "fork"),
        *("holder", "requester", "conditions", "why", "fix", "probe"),
    },
    "conditions": {"threads", "holder", "requester", "not_quiesced"},
    "diagnostics": {"level", "object", "message"},
}
ADDED = {
    "": {"errors", "overrides"},
    "targets": {"libc", "sysroot", "library_path", "preload", "also", "launches", "incomplete", "not_known"},
    "allocators": {"handlers", "registered_from", "coverage"},
    "windows": {"reachable", "threads", "path", "outcomes"},
    "findings": {"count", "fingerprint", "suppression", "baseline"},
    "conditions": {"answers"},
}


def rendered(report: Report) -> Json:
    document = stdlib_json.loads(json.render(report))
    assert isinstance(document, dict)
    return document


def finding_of(report: Json, rule: str) -> Json:
    findings: list[Json] = report["findings"]
    return next(finding for finding in findings if finding["rule"] == rule)


class TestShape:
    @pytest.fixture
    def document(self) -> Json:
        return rendered(samples.incident())

    def test_every_key_is_there_and_no_other(self, document: Json) -> None:
        (target,) = document["targets"]
        hang = finding_of(document, "inherited-lock")
        places = {
            "": [document],
            "tool": [document["tool"]],
            "targets": [target],
            "closure": target["closure"],
            "allocators": target["allocators"],
            "windows": target["windows"],
            "findings": document["findings"],
            "conditions": [hang["conditions"]],
            "diagnostics": document["diagnostics"],
        }
        for name, objects in places.items():
            for value in objects:
                assert set(value) == PROMISED[name] | ADDED.get(name, set()), name

    def test_frames_and_locks(self, document: Json) -> None:
        (target,) = document["targets"]
        hang = finding_of(document, "inherited-lock")
        frames = [hang["fork"], *hang["holder"], *hang["requester"], target["windows"][0]["call_site"]]
        frames += [frame for path in target["thread_sources"] for frame in path]
        frames += target["allocators"][0]["registered_by"]
        assert all(set(frame) == FRAME for frame in frames)
        assert set(hang["lock"]) == LOCK
        assert hang["holder"][0] == {
            "object": samples.PROGRAM,
            "function": "qemu_thread_start",
            "offset": 0x6C,
            "edge": "plt",
        }

    def test_values_are_the_words_of_the_design(self, document: Json) -> None:
        (target,) = document["targets"]
        hang = finding_of(document, "inherited-lock")
        assert document["version"] == 1
        assert document["tool"] == {"name": "forkproof", "version": forkproof.__version__}
        assert (hang["severity"], hang["verdict"], hang["probe"]) == ("high", "reachable", None)
        assert hang["id"] == samples.INHERITED.id
        assert hang["conditions"]["answers"] == dict.fromkeys(json.CONDITIONS, "yes")
        assert hang["conditions"]["threads"] == samples.CONDITIONS.threads
        assert finding_of(document, "atfork-unbound")["conditions"] is None
        assert (target["machine"], target["threads"]) == ("aarch64", "yes")
        assert [allocator["hooks"] for allocator in target["allocators"]] == ["unbound", "builtin"]
        assert [window["kind"] for window in target["windows"]] == ["exec", "daemonize", "daemonize"]
        assert target["windows"][0]["handlers_run"] is True

    def test_layout(self) -> None:
        text = json.render(samples.incident())
        assert text.startswith('{\n  "version": 1,\n  "tool": {\n    "name": "forkproof",\n')
        assert text.endswith("}\n")
        assert not text.endswith("\n\n")
        assert text.isascii()


class TestOrder:
    def test_most_severe_first(self) -> None:
        findings = [replace(samples.UNBOUND, severity=severity) for severity in reversed(Severity)]
        report = rendered(Report(findings=tuple(findings)))
        assert [finding["severity"] for finding in report["findings"]] == ["high", "medium", "low", "note"]

    @given(
        st.permutations([samples.INHERITED, samples.UNBOUND, replace(samples.INHERITED, holder=()), samples.UNBOUND])
    )
    def test_the_order_of_discovery_does_not_show(self, findings: list[Finding]) -> None:
        expected = (samples.INHERITED, samples.UNBOUND, replace(samples.INHERITED, holder=()), samples.UNBOUND)
        assert json.render(Report(findings=tuple(findings))) == json.render(Report(findings=expected))


class TestRoundTrip:
    @given(st.from_type(Report))
    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    def test_parse_undoes_render(self, report: Report) -> None:
        again = json.parse(json.render(report))
        assert again == replace(report, findings=tuple(json.in_order(report.findings)))
        assert json.render(again) == json.render(report)

    def test_file_names_that_are_not_utf8(self) -> None:
        target = replace(samples.TARGET, path="/srv/\udcff/prog")
        text = json.render(Report((target,)))
        assert text.encode("ascii")
        assert json.parse(text).targets[0].path == "/srv/\udcff/prog"

    def test_unknown_keys_are_let_be(self) -> None:
        document = rendered(samples.incident())
        document["later"] = document["findings"][0]["later"] = {"x": 1}
        assert json.parse(stdlib_json.dumps(document)).findings[0] == json.in_order(samples.incident().findings)[0]

    def test_keys_that_came_later_may_be_missing(self) -> None:
        document = rendered(samples.incident())
        del document["errors"]
        for finding in document["findings"]:
            del finding["count"]
        assert json.parse(stdlib_json.dumps(document)).findings[0].count == 1


def _without(path: str) -> str:
    document = rendered(samples.incident())
    value: Any = document
    *parents, last = path.split(".")
    for step in parents:
        value = value[int(step) if step.isdigit() else step]
    del value[last]
    return stdlib_json.dumps(document)


def _with(path: str, new: object) -> str:
    document = rendered(samples.incident())
    value: Any = document
    *parents, last = path.split(".")
    for step in parents:
        value = value[int(step) if step.isdigit() else step]
    value[last] = new
    return stdlib_json.dumps(document)


class TestBadReports:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "line 1 column 1: not JSON"),
            ("{", "not JSON"),
            ("[]", r"\[\] where an object was expected"),
            ("[" * 100_000, "nested too deeply"),
            ('{"x": ' + "1" * 5000 + "}", "not JSON"),
            ("{}", "version: null where this forkproof reads 1"),
            (_with("version", 2), "version: 2 where this forkproof reads 1"),
            (_with("version", True), "version: true where"),
            (_without("targets"), "targets: missing"),
            (_without("targets.0.machine"), r"targets\[0\].machine: missing"),
            (_with("targets.0.machine", 7), r"targets\[0\].machine: 7 where a string"),
            (_with("targets.0.threads", "maybe"), r'threads: "maybe" is none of yes, no, unknown'),
            (_with("targets.0.windows.0.handlers_run", 1), r"windows\[0\].handlers_run: 1 where true or false"),
            (_with("findings.1.holder", "x" * 80), r'holder: "x{36}\.\.\. where a list'),
            (_with("findings.1.conditions.answers", []), r"conditions.answers: \[\] where an object"),
            (_with("findings.1.conditions.answers", {}), r"answers\[0\]: null is none of"),
            (_with("findings.0.probe", {}), r"probe\.verdict: missing"),
        ],
    )
    def test_says_where_and_what(self, text: str, message: str) -> None:
        with pytest.raises(json.BadReport, match=message) as caught:
            json.parse(text)
        assert caught.value.exit_code == 3
        assert "--format json" in caught.value.next_step
