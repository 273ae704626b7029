"""The report as SARIF 2.1.0, for code scanning and the viewers of editors.

Owns: what of a report stands where in SARIF. Takes: a Report. Gives: text.
Must never: say more than the report, or hold anything that differs between two scans of the same input.

- A rule of forkproof is a `reportingDescriptor` with its page as help.
- A finding is a `result`: located at the object at fault, with one code flow for each witness path (viewers show the
  first thread flow of a code flow only), the lock and the fork as related locations, and `partialFingerprints` that
  a rebuild does not change.
- A place in a binary has no line. Hosts that insist on a region get line 1; what tells is the logical location
  `object!function+0xoffset`.
- Suppressions, the baseline and what a policy makes of rules are SARIF's own; diagnostics are notifications of the
  invocation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from forkproof import __version__, rules
from forkproof.errors import EXIT_INPUT
from forkproof.model import Answer, Diagnostic, Finding, Frame, Lock, Override, Report, Severity
from forkproof.report import stacks
from forkproof.report.json import CONDITIONS, in_order
from forkproof.report.text import is_partial, launched, lock_words

SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
ROOT: Final = "SYSROOT"
LEVELS: Final = {Severity.HIGH: "error", Severity.MEDIUM: "warning", Severity.LOW: "note", Severity.NOTE: "note"}
_NOTIFICATIONS: Final = {"error": "error", "warning": "warning", "info": "note"}

_Object = dict[str, Any]


def render(report: Report) -> str:
    """The log: one run, two spaces of indentation, ASCII, a newline at its end."""
    return json.dumps(document(report), indent=2) + "\n"


def document(report: Report) -> _Object:
    """The same as plain values."""
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [_Run(report).document()]}


class _Run:
    """One run; artifacts and rules are numbered in the order of their first use."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.findings = in_order(report.findings)
        self.artifacts: dict[str, str] = {}
        """Path to SHA-256."""
        self.paths: dict[tuple[str, str], str] = {}
        """Where the object of this name is, in the closure of this target."""
        for target in report.targets:
            for entry in target.closure:
                self.artifacts.setdefault(entry.path, entry.sha256)
                self.paths.setdefault((target.path, entry.name), entry.path)
            self.artifacts.setdefault(target.path, "")
        for finding in self.findings:
            self.artifacts.setdefault(self.path(finding.target, finding.object), "")
        self.numbers = {path: number for number, path in enumerate(self.artifacts)}
        self.rules = sorted(
            {rule.id for rule in rules.load()}
            | {finding.rule for finding in self.findings}
            | {override.rule for override in report.overrides}
        )

    def document(self) -> _Object:
        """The run."""
        driver = {
            "name": "forkproof",
            "version": __version__,
            "semanticVersion": __version__ if __version__[:1].isdigit() and "+" not in __version__ else "0.0.0",
            "shortDescription": {"text": "Finds locks that a child of fork can hang on, in ELF binaries."},
            "rules": [_rule(rule) for rule in self.rules],
            "notifications": [_notified(level) for level in _NOTIFICATIONS],
        }
        return {
            "tool": {"driver": driver},
            "automationDetails": {"id": "forkproof/"},
            "invocations": [self.invocation()],
            "originalUriBaseIds": {ROOT: {"description": {"text": "The root of the file system that was scanned."}}},
            "artifacts": [self.artifact(path, sha256) for path, sha256 in self.artifacts.items()],
            "columnKind": "unicodeCodePoints",
            "results": [self.result(finding) for finding in self.findings],
        }

    def invocation(self) -> _Object:
        """Whether everything was analysed, and what was not."""
        failed = is_partial(self.report)
        known = {diagnostic.message for diagnostic in self.report.diagnostics if diagnostic.level == "error"}
        untold = (message for message in self.report.errors if not any(each in message for each in known))
        rest = [Diagnostic("error", "", message) for message in untold]
        rest += [Diagnostic("info", t.path, told) for t in self.report.targets for told in launched(t)]
        notes = [_notification(each) for each in (*self.report.diagnostics, *rest)]
        overrides = [self.override(each) for each in self.report.overrides]
        return {
            "executionSuccessful": not failed,
            **({"exitCode": EXIT_INPUT} if failed else {}),
            "toolExecutionNotifications": notes,
            **({"ruleConfigurationOverrides": overrides} if overrides else {}),
        }

    def override(self, override: Override) -> _Object:
        """A rule that a policy has ranked otherwise or switched off."""
        level = override.severity
        configuration: _Object = {"enabled": False} if level is None else {"enabled": True, "level": LEVELS[level]}
        return {
            "descriptor": {"id": override.rule, "index": self.rules.index(override.rule)},
            "configuration": configuration,
            "properties": {"source": override.source, "findings": override.findings},
        }

    def artifact(self, path: str, sha256: str) -> _Object:
        """A file of the sysroot."""
        hashes = {"hashes": {"sha-256": sha256}} if sha256 else {}
        return {"location": {"uri": _uri(path), "uriBaseId": ROOT}, **hashes, "roles": ["analysisTarget"]}

    def path(self, target: str, name: str) -> str:
        """The file of an object; its name where the closure does not hold it."""
        return self.paths.get((target, name), target if name == target.rsplit("/", 1)[-1] else name)

    def result(self, finding: Finding) -> _Object:
        """A finding."""
        level = LEVELS[finding.severity]
        related = [self.place(finding.target, finding.fork, "the fork")] if finding.fork else []
        related += [self.lock(finding.target, finding.lock)] if finding.lock else []
        flows = [
            self.flow(finding.target, path, words)
            for path, words in zip((finding.holder, finding.requester), stacks.titles(finding.rule), strict=True)
            if path
        ]
        result = {
            "ruleId": finding.rule,
            "ruleIndex": self.rules.index(finding.rule),
            "level": level,
            "message": {"text": _message(finding)},
            "locations": [self.location(finding.target, finding.object, "")],
            "partialFingerprints": {"forkproofFinding/v1": finding.fingerprint},
            "properties": _properties(finding),
        }
        if related:
            result["relatedLocations"] = [{"id": number, **each} for number, each in enumerate(related)]
        if flows:
            result["codeFlows"] = flows
        if finding.suppression is not None:
            result["suppressions"] = [
                {
                    "kind": "external",
                    "status": "accepted",
                    "justification": finding.suppression.reason,
                    "properties": {"expires": finding.suppression.expires, "source": finding.suppression.source},
                }
            ]
        if finding.baseline is not None:
            result["baselineState"] = finding.baseline.value
        return result

    def flow(self, target: str, path: Sequence[Frame], words: str) -> _Object:
        """A witness path as a code flow, outermost frame first."""
        steps = []
        for number, frame in enumerate(path):
            how = stacks.EDGES.get(frame.edge, (frame.edge,))[0] if frame.edge else "here"
            step = {"location": self.place(target, frame, how), "nestingLevel": number}
            important = number in {0, len(path) - 1}
            steps.append({**step, "importance": "essential" if important else "important"})
        return {"message": {"text": words}, "threadFlows": [{"message": {"text": words}, "locations": steps}]}

    def place(self, target: str, frame: Frame, words: str) -> _Object:
        """A frame as a location."""
        return self.location(target, frame.object, words, frame.function, stacks.name(frame))

    def lock(self, target: str, lock: Lock) -> _Object:
        """The lock as a location."""
        location = self.location(target, lock.object, lock_words(lock), lock.name, lock.name)
        location["logicalLocations"][0]["kind"] = "variable"
        return location

    def location(self, target: str, name: str, words: str, function: str = "", place: str = "") -> _Object:
        """An object, or a function of it."""
        path = self.path(target, name)
        artifact: _Object = {"uri": _uri(path), "uriBaseId": ROOT}
        if path in self.numbers:
            artifact["index"] = self.numbers[path]
        logical = {
            "name": function or name,
            "fullyQualifiedName": f"{name}!{place}" if place else name,
            "kind": "function" if function else "module",
        }
        return {
            "physicalLocation": {"artifactLocation": artifact, "region": {"startLine": 1}},
            "logicalLocations": [logical],
            **({"message": {"text": words}} if words else {}),
        }


def _rule(rule_id: str) -> _Object:
    rule = rules.find(rule_id)
    if rule is None:
        return {"id": rule_id, "name": _camel(rule_id)}
    return {
        "id": rule.id,
        "name": _camel(rule.id),
        "shortDescription": {"text": _sentence(rule.title)},
        "fullDescription": {"text": rule.summary},
        "help": {"text": rule.page, "markdown": rule.page},
        "defaultConfiguration": {"level": "warning"},
        "properties": {"tags": ["fork", "deadlock", "reliability"], "precision": "high"},
    }


def _camel(rule_id: str) -> str:
    return "".join(part.capitalize() for part in rule_id.split("-"))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _message(finding: Finding) -> str:
    parts = [_sentence(finding.message)]
    if finding.why:
        parts.append(_sentence(finding.why))
    if finding.fix:
        parts.append(f"What to do: {_sentence(finding.fix)}")
    return " ".join(parts)


def _properties(finding: Finding) -> _Object:
    found: _Object = {
        "id": finding.id,
        "severity": finding.severity.value,
        "verdict": finding.verdict.value,
        "target": finding.target,
        "count": finding.count,
    }
    if finding.conditions is not None:
        answers: tuple[Answer, ...] = finding.conditions.answers
        found["conditions"] = {
            name: {"answer": answer.value, "evidence": getattr(finding.conditions, name)}
            for name, answer in zip(CONDITIONS, answers, strict=True)
        }
    return found


def _notified(level: str) -> _Object:
    text = {"text": f"Diagnostics of level {level}: what was not resolved, or what a reader should know."}
    return {"id": level, "shortDescription": text, "fullDescription": text, "help": text}


def _notification(diagnostic: Diagnostic) -> _Object:
    level = diagnostic.level if diagnostic.level in _NOTIFICATIONS else "info"
    text = f"{diagnostic.object}: {diagnostic.message}" if diagnostic.object else diagnostic.message
    return {
        "descriptor": {"id": level, "index": list(_NOTIFICATIONS).index(level)},
        "level": _NOTIFICATIONS[level],
        "message": {"text": text},
    }


def _uri(path: str) -> str:
    """A relative URI below the root; names that are not UTF-8 as their bytes."""
    return quote(os.fsencode(path.lstrip("/") or "."))
