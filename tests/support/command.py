"""Run the installed `forkproof` the way its users do: as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORKPROOF = Path(sys.executable).with_name("forkproof")


@dataclass(frozen=True)
class Completed:
    """What the command said and how it ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        document = json.loads(self.stdout)
        assert isinstance(document, dict)
        return document


def forkproof(*arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300) -> Completed:
    """Run it to its end; any exit code is an answer. Use `.json()` after `--format json`."""
    result = subprocess.run(
        [FORKPROOF, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )
    return Completed(result.returncode, result.stdout, result.stderr)
