"""Results that scans of one test process share: what is found about a libc is found once."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path


@cache
def directory() -> Path:
    """A cache of forkproof's, which goes when the process does."""
    place = tempfile.TemporaryDirectory(prefix="forkproof-kept-")
    atexit.register(place.cleanup)
    return Path(place.name)
