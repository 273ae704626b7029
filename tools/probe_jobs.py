"""Probes by plans, many times each, in one process: `python tools/probe_jobs.py JOBS OUT`.

It needs nothing but forkproof, so that it can be put into the laboratory, where importing numpy takes seconds. JOBS is
a JSON list of

    {"name", "plan": file beside it, "command": […], "preload": […], "environment": {…}, "runs": n, "rule": …,
     "covered": bool}

and OUT gets a JSON list of results, rewritten after each job: the verdicts of each run, their reasons where a run is
not `confirmed` or `refuted`, its seconds and CPU seconds, what was left over, and the report of the first run.

What a run leaves is told by its environment, which its processes inherit whatever they do: any process that still has
the run's mark, and any child of this one that is stopped or was not waited for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from forkproof.model import Finding
from forkproof.probe import planfile
from forkproof.probe.prove import Prover, Wanted
from forkproof.probe.stage import Command
from forkproof.report import json as report_json

MARK: Final = "FORKPROOF_PROBE_RUN"
"""The environment variable that tells a run's processes."""


def left_over(mark: str) -> Iterator[str]:
    """Processes of a run that are still there, each with its state and the states of its threads."""
    wanted = f"{MARK}={mark}".encode()
    own = {word for path in Path("/proc/self/task").glob("*/children") for word in path.read_text().split()}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_own = path.name in own and _state(path) in "tTZ"
            if is_own or wanted in (path / "environ").read_bytes().split(b"\0"):
                yield f"{path.name} {_state(path)}: threads {[_state(t) for t in sorted((path / 'task').iterdir())]}"


def _state(path: Path) -> str:
    return (path / "stat").read_text().rpartition(") ")[2][:1]


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All runs of one job."""
    report, plan = planfile.load((folder / job["plan"]).read_text(encoding="utf-8"), job["plan"])
    result: dict[str, Any] = {"name": job["name"], "report": None}
    columns = ("verdicts", "why", "seconds", "cpu", "left")
    result.update({column: [] for column in columns})
    for number in range(job["runs"]):
        mark = f"{os.getpid()}-{job['name']}-{number}"
        variables = {**os.environ, **job.get("environment", {}), MARK: mark}
        command = Command(tuple(job["command"]), variables, preload=tuple(job.get("preload", ())))
        prover = Prover(Wanted(command, rule=job.get("rule"), covered=job.get("covered", False)))
        begun, before = time.monotonic(), os.times()
        found = prover.prove(plan, list(report.findings))
        seconds, after = time.monotonic() - begun, os.times()
        row = (*_told(found), round(seconds, 2), round(sum(after[:4]) - sum(before[:4]), 2), list(left_over(mark)))
        for column, value in zip(columns, row, strict=True):
            result[column].append(value)
        result["report"] = result["report"] or report_json.document(replace(report, findings=tuple(found)))
    return result


def _told(found: list[Finding]) -> tuple[list[str], list[str]]:
    """The verdicts of a run, and why the undecided ones are."""
    probes = [(f.rule, f.probe) for f in found if f.probe is not None]
    verdicts = sorted({probe.verdict.value for _, probe in probes})
    return verdicts, sorted({f"{rule}: {probe.why}" for rule, probe in probes if probe.verdict.value == "inconclusive"})


def main() -> None:
    jobs, out = Path(sys.argv[1]), Path(sys.argv[2])
    results = []
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        results.append(run_job(job, jobs.parent))
        out.write_text(json.dumps(results), encoding="utf-8")
        print(job["name"], results[-1]["verdicts"], results[-1]["seconds"], flush=True)


if __name__ == "__main__":
    main()
