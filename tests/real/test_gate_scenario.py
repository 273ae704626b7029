"""The gate of docs/gate.sh, step by step: baseline, upgrade, suppression, expiry. The script is what is tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.build import Result
from tests.support import archives
from tests.support.archives import Link

SCRIPT = Path(__file__).parents[2] / "docs" / "gate.sh"
LIBRARIES = Path("/lib/x86_64-linux-gnu")
RUNTIME = ("libc.so.6", "ld-linux-x86-64.so.2", "libgcc_s.so.1")


pytestmark = pytest.mark.together


@pytest.fixture(scope="module")
def packages(built_x86_64: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A daemon that an upgrade builds against an allocator without handlers, beside one that had that hazard before."""
    if not LIBRARIES.is_dir():
        pytest.skip("needs an x86-64 Debian for its C library")
    root, home = built_x86_64.tree.root(), tmp_path_factory.mktemp("packages")
    base: dict[str, bytes | Link | archives.Hard | archives.Device | None] = {
        f"/usr/lib/x86_64-linux-gnu/{name}": (LIBRARIES / name).read_bytes() for name in RUNTIME
    }
    base["/usr/lib64/ld-linux-x86-64.so.2"] = Link("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    (home / "base.deb").write_bytes(archives.deb(base))
    common = {
        f"/usr/bin/{name}": (root / name).read_bytes()
        for name in ("daemon_mutex", "liballoc_mutex.so", "liballoc_spin.so", "liballoc_spin_hooked.so")
    }
    for release, program in (("old", "daemon_hooked"), ("new", "daemon_unhooked")):
        content = {**common, "/usr/bin/daemon": (root / program).read_bytes()}
        (home / f"{release}.deb").write_bytes(archives.deb(content))
    return home


@pytest.fixture(scope="module")
def steps(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What each step printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    said = subprocess.run(
        ["sh", SCRIPT, packages],
        cwd=tmp_path_factory.mktemp("work"),
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert said.stderr == ""
    parts = re.split(r"^== (\d)\. .*\n", said.stdout, flags=re.MULTILINE)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_gate(steps: dict[int, str]) -> None:
    codes = {number: text.strip().rpartition("exit ")[2] for number, text in steps.items()}
    assert codes == {1: "0", 2: "0", 3: "1", 4: "0", 5: "1"}


def test_only_the_new_hazard_fails(steps: dict[int, str]) -> None:
    """The hang and its cause, of the program that was upgraded; what was there before stays quiet."""
    new = [line for line in steps[3].splitlines() if line.startswith("HIGH")]
    assert new == ["HIGH  inherited-lock, reachable, new", "HIGH  atfork-absent, reachable, new"]


def test_expiry_says_why(steps: dict[int, str]) -> None:
    assert "expired on 2027-03-01" in steps[5]
