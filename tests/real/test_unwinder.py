"""forkproof's stacks against gdb's, at a few chance states; `make unwinder-check` takes many more."""

from __future__ import annotations

import pytest

from tools import unwinder_check

pytestmark = [pytest.mark.slow, pytest.mark.together]  # they write and build the same sources


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("name", ["signals", "perl"])
def test_same_stacks(machine: str, name: str) -> None:
    if (reason := unwinder_check.missing(machine)) is not None:
        pytest.skip(reason)
    subjects = unwinder_check.X86_64 if machine == "x86_64" else unwinder_check.AARCH64
    unwinder_check.write_sources()
    subject = next(s for s in subjects if s.name == name)
    tally = unwinder_check.check(machine, subject, states=12, seed=1, seconds=45)
    if tally is None or not tally.states:
        pytest.skip("gdb could not run it here")
    assert dict(tally.differences) == {}, tally.examples
