"""The environment of a process that is measured.

Owns: that Python's bytecode is kept, as an installed package has it: where none may be written, each run would compile
forkproof anew, a third of a second. Takes nothing. Gives: our environment, with that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_KEPT: Final = Path(__file__).resolve().parents[1] / "build" / "bytecode"
"""From one run of the benchmarks to the next."""


def with_bytecode(**more: str) -> dict[str, str]:
    """Ours, with bytecode and these variables."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(_KEPT), **more}
