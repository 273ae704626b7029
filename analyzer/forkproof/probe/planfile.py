"""A plan on disk: scan here, probe there.

Owns: the file format. Takes: a report and a `Plan`. Gives: text, and both back.
Must never: be needed for a probe on the machine that scans; it serves small or slow machines, whose programs are
scanned elsewhere as a sysroot.

The file is JSON: a report of `forkproof scan --format json` with one key more.
"""

from __future__ import annotations

import json as standard
from typing import Any

from forkproof.errors import InputError
from forkproof.model import Lock, Report
from forkproof.probe.plan import Plan
from forkproof.probe.pointers import Way
from forkproof.probe.sites import AcquireSite
from forkproof.report import json

_KEY = "plan"


def dump(report: Report, plan: Plan) -> str:
    """The text of a plan file."""
    document = json.document(report)
    document[_KEY] = {
        "sites": {
            name: [[site.object, site.rva, site.callee, site.turn, site.is_permit] for site in sites]
            for name, sites in sorted(plan.sites.items())
        },
        "known": sorted([path, rva, name] for (path, rva), name in plan.known.items()),
        "active": list(plan.active),
        "locks": [_row(lock) for lock in plan.locks],
        "pointers": sorted([*key, way.path, list(way.offsets)] for key, way in plan.pointers.items()),
        "claims": sorted([path, rva, *_row(lock)] for (path, rva), lock in plan.claims.items()),
    }
    return standard.dumps(document, indent=1) + "\n"


def load(text: str, path: str) -> tuple[Report, Plan]:
    """What `dump` wrote."""
    try:
        report = json.parse(text)
        found: dict[str, Any] = standard.loads(text)[_KEY]
        sites = {
            name: tuple(AcquireSite(str(o), int(rva), str(callee), *rest) for o, rva, callee, *rest in rows)
            for name, rows in found["sites"].items()
        }
        known = {(str(where), int(rva)): str(name) for where, rva, name in found["known"]}
        locks = tuple(_lock(*row) for row in found.get("locks", ()))
        claims = {(str(where), int(rva)): _lock(*row) for where, rva, *row in found.get("claims", ())}
        pointers = {
            (str(holder), str(name)): Way(str(where), tuple(map(int, offsets)))
            for holder, name, where, offsets in found.get("pointers", ())
        }
        return report, Plan(sites, known, tuple(map(str, found["active"])), locks, claims, pointers)
    except (json.BadReport, KeyError, TypeError, ValueError) as error:
        raise InputError(
            path, f"is no plan: {error}", next_step="Make one with: forkproof probe --write-plan FILE -- CMD"
        ) from error


def _row(lock: Lock) -> list[Any]:
    return [lock.object, lock.name, lock.rva, lock.form]


def _lock(holder: Any, name: Any, rva: Any, form: Any) -> Lock:  # noqa: ANN401
    return Lock(str(holder), str(name), None if rva is None else int(rva), str(form))
