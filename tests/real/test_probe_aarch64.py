"""Probes of arm64 programs, in a virtual machine of unmodified Debian packages: the incident, its cure, the fixtures.

The scans are made here, with the packages as a sysroot; the machine only probes. One boot serves all tests.

FORKPROOF_LABORATORY=1 asks for all of it, a quarter of an hour; =small for one run of the incident, of its cure and of
a pair of fixtures, which is what continuous integration has time for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import Result
from forkproof.mitigate.apply import mitigate
from forkproof.options import QUIET, ScanOptions
from forkproof.probe.prepare import plan_text
from tools import laboratory, probe_fixtures, probe_jobs

QEMU = "/usr/bin/qemu-system-aarch64"
DAEMON = [QEMU, "-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none", "-daemonize"]
LEVEL = os.environ.get("FORKPROOF_LABORATORY", "")
IS_SMALL = LEVEL == "small"
_HANGING = ("daemon_weak", "child_localtime", "daemon_unhooked", "daemon_mutex", "daemon_futex", "daemon_decoy")
_CLEAN = ("daemon_shimmed", "daemon_hooked", "daemon_mutex_hooked", "daemon_futex_hooked", "daemon_once")
HANGING = _HANGING[: 1 if IS_SMALL else None]
CLEAN = _CLEAN[: 1 if IS_SMALL else None]
SHIM = "/work/fixtures/libforkshim.so"
RUNS, FIXTURE_RUNS = (1, 1) if IS_SMALL else (5, int(os.environ.get("FORKPROOF_PROBE_RUNS", "2")))

pytestmark = pytest.mark.together  # of two workers each would boot a machine

Results = Mapping[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, sysroot_arm64: Path, built_aarch64: Result) -> Results:
    if not LEVEL:
        pytest.skip("an emulated machine takes minutes: set FORKPROOF_LABORATORY=small, or =1 for all of it")
    if (reason := laboratory.missing()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("laboratory")
    planner = probe_fixtures.for_guest(built_aarch64, folder / "root", sysroot_arm64)
    plans = folder / "plans"
    plans.mkdir()
    options = ScanOptions(sysroot_arm64, preload=("libtcmalloc.so.4",))
    shim = folder / "root" / SHIM.lstrip("/")
    mitigated = mitigate(QEMU, options, shim, None, None, 60, QUIET)
    assert mitigated.shim is not None
    incident = plan_text(QEMU, options)
    (plans / "incident.json").write_text(incident, encoding="utf-8")
    jobs = [
        {
            "name": "incident",
            "plan": "plans/incident.json",
            "command": DAEMON,
            "preload": ["libtcmalloc.so.4"],
            "runs": RUNS,
        },
        {
            "name": "cured",
            "plan": "plans/incident.json",
            "command": DAEMON,
            "preload": [SHIM, "libtcmalloc.so.4"],
            "runs": RUNS,
        },
    ]
    for job in jobs:
        job["rule"] = "atfork-unbound"
    for name in (*HANGING, *CLEAN):
        fixture = built_aarch64.fixtures[name]
        (plans / f"{name}.json").write_text(planner.text(fixture), encoding="utf-8")
        jobs.append(
            {
                "name": name,
                "plan": f"plans/{name}.json",
                "command": [planner.program(fixture)],
                "preload": [],
                "runs": FIXTURE_RUNS,
                "covered": True,
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    files = {"plans": plans, "jobs.json": folder / "jobs.json", "fixtures": shim.parent}
    files["probe_jobs.py"] = Path(probe_jobs.__file__)
    done = laboratory.run("python3 probe_jobs.py jobs.json /work/out/results.json\n", files, seconds=1500)
    if "results.json" not in done.files:
        pytest.fail(f"the machine brought nothing back:\n{done.console[-3000:]}")
    return {result["name"]: result for result in json.loads(done.files["results.json"])}


@pytest.mark.real
@pytest.mark.laboratory
class TestInTheMachine:
    def test_incident_is_confirmed_every_time(self, results: Results) -> None:
        assert results["incident"]["verdicts"] == [["confirmed"]] * RUNS

    def test_child_waits_in_futex_on_the_held_word(self, results: Results) -> None:
        findings = results["incident"]["report"]["findings"]
        record = next(f["probe"] for f in findings if f["probe"] and f["probe"]["verdict"] == "confirmed")
        assert record["waiters"]
        assert all(record["lock_address"] in waiter["doing"] for waiter in record["waiters"])
        functions = {frame["function"] for waiter in record["waiters"] for frame in waiter["stack"]}
        assert "SpinLock::SlowLock()" in functions
        assert "os_daemonize" in {frame["function"] for frame in record["fork"]}

    def test_shim_refutes_it_every_time(self, results: Results) -> None:
        assert results["cured"]["verdicts"] == [["refuted"]] * RUNS

    @pytest.mark.parametrize("name", HANGING)
    def test_hanging_fixture(self, results: Results, name: str) -> None:
        assert results[name]["verdicts"] == [["confirmed"]] * FIXTURE_RUNS

    @pytest.mark.parametrize("name", CLEAN)
    def test_clean_twin(self, results: Results, name: str) -> None:
        assert results[name]["verdicts"] == [["refuted"]] * FIXTURE_RUNS

    def test_nothing_is_left_over(self, results: Results) -> None:
        assert {name: result["left"] for name, result in results.items() if any(result["left"])} == {}
