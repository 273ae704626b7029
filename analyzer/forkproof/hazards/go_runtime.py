"""inherited-lock, for Go: a child of a raw fork or clone goes on in Go's runtime, whose other threads are gone.

Owns: the way from the child's code to a lock of the runtime, and from a thread of the runtime.
Takes: `Facts`. Gives: one `Finding` for each function that forks.
Must never: speak of os/exec and os.StartProcess: their child makes system calls only.
Wrong where: which of the runtime's locks the two sides take was not told apart, so that the finding is `suspected`;
      calls through interfaces are not followed.

Go offers no fork: "no rescheduling, no malloc calls, and no new stack segments" are allowed in the child
(src/syscall/exec_linux.go), and the linker puts a call of morestack into nearly every function. That call needs a
lock only where a goroutine's stack has run out, and is left out here.
"""

from __future__ import annotations

from typing import Final

from forkproof.callgraph import Reach
from forkproof.facts import Facts, WindowFacts
from forkproof.hazards.evidence import FOLLOWED, folded, fork_frame, nearest, threads_sentence
from forkproof.model import Answer, Conditions, Finding, Frame, Lock, Severity, Verdict
from forkproof.program import Function

_LOCKS: Final = ("runtime.lock2", "runtime.lock")
_THREADS: Final = ("runtime.sysmon", "runtime.gcBgMarkWorker", "runtime.schedule")
"""What threads of the runtime run in every program; the first that is there is the witness."""
_RARE: Final = (
    "runtime.morestack", "runtime.morestack_noctxt", "runtime.morestack.abi0", "runtime.morestack_noctxt.abi0",
    "runtime.throw", "runtime.fatal", "runtime.fatalthrow", "runtime.gopanic", "runtime.panicmem", "runtime.panicwrap",
    "runtime.goPanicIndex", "runtime.goPanicIndexU", "runtime.goPanicSliceAcap", "runtime.goPanicSliceAlen",
    "runtime.goPanicSliceB", "runtime.panicdivide", "runtime.panicshift", "runtime.printlock",
)  # fmt: skip


def find(facts: Facts) -> list[Finding]:
    """All findings about children that go on in Go's runtime."""
    program = facts.flow.program
    if not len(program.image(0).go_functions):
        return []
    locks = list(program.called(_LOCKS, [0]))
    reach = facts.flow.graph.distances(locks, backward=True, blocked=list(program.called(_RARE, [0])))
    found = (_finding(facts, window, reach) for window in facts.windows if _matters(facts, window))
    return folded(finding for finding in found if finding is not None)


def _matters(facts: Facts, window: WindowFacts) -> bool:
    inner = window.window
    runs_apart = inner.kind in FOLLOWED and inner.shares_memory is not Answer.YES
    return runs_apart and window.reachable is not Answer.NO and facts.flow.is_go(inner.function)


def _finding(facts: Facts, window: WindowFacts, reach: Reach) -> Finding | None:
    graph, name = facts.flow.graph, facts.object_name(0)
    calls = [e for level in window.window.levels for e in level.edges if reach[graph.target[e]] >= 0]
    if not calls:
        return None
    first = min(calls, key=lambda e: (int(reach[graph.target[e]]), int(graph.site[e])))
    child = _frames(facts, Function(int(graph.target[first])), reach, [first])
    other = nearest(facts.flow.program.called(_THREADS, [0]), reach)
    holder = _frames(facts, other, reach, []) if other is not None else ()
    fork = fork_frame(facts, window)
    return Finding(
        rule="inherited-lock",
        severity=Severity.MEDIUM if window.reachable is Answer.YES else Severity.LOW,
        verdict=Verdict.SUSPECTED,
        target=facts.target,
        object=name,
        message=f"a child forked in {fork.function} goes on in Go's runtime, and can hang there for ever",
        why="Only the thread that forked lives on in the child: the runtime's other threads, which schedule, poll and "
        "collect garbage, are gone, with whatever they held. Which of its locks that is was not told apart.",
        fix="Start the program again with os/exec and tell it by an argument or its environment to be the daemon, or "
        "let a supervisor do it. Between fork and exec, Go code may make system calls only.",
        lock=Lock(name, "a lock of Go's runtime", None, "unknown"),
        fork=fork,
        holder=holder,
        requester=child,
        conditions=Conditions(
            threads_sentence(facts, window),
            f"a thread of the runtime reaches {_end(holder)}" if holder else "no thread of the runtime was recognised",
            f"the child reaches {_end(child)} from {child[0].function}",
            "Go's runtime has no fork handlers: it takes none of its locks for a fork that is not its own",
            (window.threads, Answer.YES if holder else Answer.UNKNOWN, Answer.YES, Answer.UNKNOWN),
        ),
    )


def _frames(facts: Facts, start: Function, reach: Reach, before: list[int]) -> tuple[Frame, ...]:
    graph = facts.flow.graph
    way = [*before, *(graph.path(start, reach) or [])]
    return facts.flow.frames(way, Function(int(graph.target[way[-1]])) if way else start)


def _end(frames: tuple[Frame, ...]) -> str:
    return frames[-1].function
