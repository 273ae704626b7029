"""Runs in the laboratory: probes by plans, several times each, in one process: importing numpy takes seconds there.

    python3 probe_in_guest.py jobs.json OUT

A job is {"name", "plan": file, "command": [...], "preload": [...], "runs": n, "covered": bool}; OUT gets a JSON object
with the verdicts of each job's runs, the first run's report, and the processes that were left over.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from forkproof.probe import planfile
from forkproof.probe.prove import Prover, Wanted
from forkproof.probe.stage import Command
from forkproof.report import json as report_json


def processes() -> set[int]:
    """Everything that runs."""
    return {int(path.name) for path in Path("/proc").glob("[0-9]*")}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """All runs of one job."""
    report, plan = planfile.load(Path(job["plan"]).read_text(encoding="utf-8"), job["plan"])
    before, verdicts, seconds, first = processes(), [], [], None
    for _ in range(job["runs"]):
        begun = time.monotonic()
        command = Command(tuple(job["command"]), dict(os.environ), preload=tuple(job["preload"]))
        prover = Prover(Wanted(command, rule=job.get("rule"), covered=job.get("covered", False)))
        found = prover.prove(plan, list(report.findings))
        seconds.append(round(time.monotonic() - begun, 1))
        verdicts.append(sorted({f.probe.verdict.value for f in found if f.probe is not None}))
        first = first or report_json.document(replace(report, findings=tuple(found)))
    left = [p for p in processes() - before if Path(f"/proc/{p}/exe").exists()]
    return {"name": job["name"], "verdicts": verdicts, "seconds": seconds, "left": len(left), "report": first}


def main() -> None:
    jobs, out = Path(sys.argv[1]), Path(sys.argv[2])
    results = []
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        results.append(run_job(job))
        out.write_text(json.dumps(results), encoding="utf-8")
        print(job["name"], results[-1]["verdicts"], results[-1]["seconds"], flush=True)


if __name__ == "__main__":
    main()
