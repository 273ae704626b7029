"""Locks: who takes which, for how long, and which of them fork quiesces.

`evidence` tells functions that wait from those that only use atomic operations; `interpret` follows one function
with the addresses that it locks; `summary` composes functions; `coverage`, `reentry` and `order` ask the questions.
"""

from forkproof.locks.evidence import NO_LOCKS, LockFunctions, lock_functions
from forkproof.locks.looks import waits_for_memory

__all__ = ["NO_LOCKS", "LockFunctions", "lock_functions", "waits_for_memory"]
