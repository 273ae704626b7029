"""Compare a report with what a fixture says of itself.

Every function answers with a list of sentences, one for each truth that the report does not bear out; an empty list
means that they agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fixtures import truth
from fixtures.truth import SEVERITIES, Expectation, Fixture

Json = Mapping[str, Any]


def _is(path: str | None, name: str) -> bool:
    """Does this path, or soname, end in that name, component by component?"""
    parts = name.split("/")
    return path is not None and path.split("/")[-len(parts) :] == parts


def _function(name: str | None, wanted: str) -> bool:
    """C++ names carry their parameters; a truth may leave them out, and compilers add suffixes."""
    return name is not None and (name == wanted or re.split(r"[(.]", name)[0] == wanted.partition("(")[0])


def _agrees(finding: Json, want: truth.Finding, *, names: bool) -> bool:
    lock, fork = finding.get("lock") or {}, finding.get("fork") or {}
    return all(
        (
            finding["rule"] == want.rule,
            want.severity is None or finding["severity"] == want.severity,
            want.verdict is None or finding["verdict"] == want.verdict,
            want.object is None or any(_is(o, want.object) for o in (finding.get("object"), lock.get("object"))),
            want.lock is None or not names or lock.get("name") == want.lock,
            want.fork is None or not names or _function(fork.get("function"), want.fork),
        )
    )


def _opens(window: Json, want: truth.Window, *, names: bool) -> bool:
    return all(
        (
            window["forker"] == want.forker,
            not names or _function(window["function"], want.function),
            want.kind is None or window["kind"] == want.kind,
            want.handlers is None or window["handlers_run"] == (want.handlers == "yes"),
        )
    )


def _against(finding: Json, want: truth.NoFinding) -> bool:
    serious = SEVERITIES.index(finding["severity"]) >= SEVERITIES.index(want.severity)
    return serious and want.rule in {None, finding["rule"]}


def _holds(fact: truth.Fact, target: Json, findings: Sequence[Json], *, names: bool) -> bool | None:
    """Does the report bear this out? None if a report says nothing about such things."""
    match fact:
        case truth.Allocator():
            return any(_is(a["object"], fact.object) and a["hooks"] == fact.hooks for a in target["allocators"])
        case truth.Threads():
            return bool(target["threads"] == fact.threads)
        case truth.Window():
            return any(_opens(window, fact, names=names) for window in target["windows"])
        case truth.Finding():
            return any(_agrees(finding, fact, names=names) for finding in findings)
        case truth.NoFinding():
            return not any(_against(finding, fact) for finding in findings)
        case truth.Missing():
            return fact.soname in target["missing"]
        case truth.Loads():
            return any(_is(o["path"], fact.path) for o in target["closure"])
        case truth.Closure():
            return _in_order([o["path"] for o in target["closure"]], fact.names)
        case _:
            return None


def _in_order(paths: Sequence[str], names: Sequence[str]) -> bool:
    rest = iter(paths)
    return all(any(_is(path, name) for path in rest) for name in names)


def report_mismatches(fixture: Fixture, machine: str, report: Json, *, names: bool = True) -> list[str]:
    """Truths that a report of one target contradicts. `names=False` for what was stripped."""
    (target,) = report["targets"]
    findings = report["findings"]
    wrong = [e for e in fixture.expected(machine) if _holds(e.fact, target, findings, names=names) is False]
    return [f"{fixture.name} on {machine}: the report does not bear out: {e.text}" for e in wrong]


def _binds(bindings: Sequence[Json], fact: truth.Binding) -> bool:
    for binding in bindings:
        if binding["symbol"] == fact.symbol and _is(binding["from"], fact.source):
            to = binding["to"]
            bound = to is None if fact.target is None else _is(to, fact.target)
            if bound and fact.version in {None, binding["version"]}:
                return True
    return False


def binding_mismatches(fixture: Fixture, machine: str, closure: Json) -> list[str]:
    """The same for `forkproof closure --bindings --format json`."""

    def wrong() -> Iterator[Expectation]:
        for expectation in fixture.expected(machine):
            match expectation.fact:
                case truth.Binding() as fact if not _binds(closure["bindings"], fact):
                    yield expectation
                case truth.NoBinding() as fact if any(
                    b["symbol"] == fact.symbol and _is(b["from"], fact.source) for b in closure["bindings"]
                ):
                    yield expectation
                case truth.Missing() as fact if fact.soname not in closure["missing"]:
                    yield expectation
                case truth.Loads() as fact if not any(_is(o["path"], fact.path) for o in closure["objects"]):
                    yield expectation
                case truth.Closure() as fact if not _in_order([o["path"] for o in closure["objects"]], fact.names):
                    yield expectation
                case _:
                    pass

    return [f"{fixture.name} on {machine}: the closure does not bear out: {e.text}" for e in wrong()]


def edge_mismatches(
    fixture: Fixture, machine: str, graph: Json, function_at: Callable[[Path, int], str | None]
) -> list[str]:
    """The same for `forkproof graph --format json`; `function_at` names the function at (object, rva)."""
    objects = [Path(path) for path in graph["objects"]]
    edges = {
        (function_at(objects[edge[0]], edge[1]), function_at(objects[edge[2]], edge[3])) for edge in graph["edges"]
    }
    wrong = [
        e
        for e in fixture.expected(machine)
        if isinstance(e.fact, truth.Edge) and (e.fact.caller, e.fact.callee) not in edges
    ]
    return [f"{fixture.name} on {machine}: the call graph does not bear out: {e.text}" for e in wrong]
