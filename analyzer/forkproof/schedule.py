"""Many programs on several processes: who scans which, and in which order the outcomes come.

Owns: when a second process is worth its start, the order of outcomes, what is shown meanwhile, and what is said of a
      program whose workers died.
Takes: what makes a worker's function, tasks and their names. Gives: outcomes in the order of the tasks.
Must never: let one task's end decide another's: results are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from forkproof import workers
from forkproof.options import Progress, Scanned

_FEW: Final = 4
"""Programs that are scanned sooner than a second process is started."""

Outcome = TypeVar("Outcome")


class Done(NamedTuple, Generic[Outcome]):
    """What a task gave, or why it gave nothing; and what people who wait are told of it."""

    outcome: Outcome | str
    told: Scanned


def is_for_one(tasks: Sequence[object], jobs: int) -> bool:
    """One process is as quick as several."""
    return jobs < 2 or len(tasks) <= _FEW


def results(
    make: Callable[[Any], Callable[[Any], Done[Outcome]]],
    setup: object,
    tasks: Sequence[object],
    names: Sequence[str],
    jobs: int,
    progress: Progress,
) -> Iterator[Outcome | str]:
    """The outcome of every task, each as soon as those before it are there too."""
    waiting: dict[int, Outcome | str] = {}
    following = 0
    for done, (number, result) in enumerate(workers.run(make, setup, tasks, jobs), 1):
        is_dead = isinstance(result, workers.Died)
        waiting[number], told = _dead(names[number], result) if is_dead else result
        progress.scanned(told, done, len(tasks))
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _dead(name: str, died: workers.Died) -> tuple[str, Scanned]:
    help_text = "Scan it alone; if the system ran out of memory, with --jobs 1."
    obituary = f"{name}: two processes that scanned it died (exit code {died.code})\n  {help_text}"
    return obituary, Scanned(name, gap="not analysed")
