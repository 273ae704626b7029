"""Which functions of a static program are its C library's: the two share one object.

Owns: that question, for static programs whose functions have names.
Takes: `Flow`. Gives: membership in libc for every function, or None where the code does not tell.
Must never: count main, or what threads of the program's begin in, as libc's.
Wrong where: a program is linked with libc's archive before its own code; where a handful of functions at libc's very
      edge are reached through pointers only (they then count as the program's); where what the program puts in place
      of a function of libc's (getenv) lies right before libc: it then counts as libc's, with what it calls there.

Linkers put a program's own objects first and the archives that these need behind them, so libc is one run of addresses.
Code that seldom runs is put apart, before all else, by both alike (`.text.unlikely`). So:

1. What surely is libc's: what the entry calls, what POSIX and the signatures of a libc name, and all that these call.
   A program that defines one of the names itself, malloc or getenv, has its own functions among them.
2. The run of addresses in which such functions are frequent. One alone amid others begins none, and no run contains
   main or the entry. In glibc and musl they are half of all: what only pointers lead to is not among them.
3. Of code before main and the entry, what 1. found, and the cold parts of libc's functions.

Names were not taken for it: libc defines thousands, and programs replace some. Archive members have left no trace.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CALLS, EdgeKind
from forkproof.flow import Flow
from forkproof.program import Function
from forkproof.signature_values import EDITIONS

Functions = npt.NDArray[np.bool_]
"""Membership of every function."""
_OTHER: Final = 0.25
"""What a function that is not known to be libc's weighs against one that is: a run needs more than one in five."""
_THREAD: Final = 25
"""What one weighs in which a thread begins: libc has few such, and they lie amid hundreds of its own."""
_STRAY: Final = 0.25
"""Of the functions that seem to be libc's, those outside its run beyond which it is not known which is which."""


def libc_functions(flow: Flow) -> Functions | None:
    """Membership in libc of every function of a static program; None where that cannot be told.

    All False for a program without libc: one of Go's.
    """
    graph, main = flow.graph, flow.main
    entry = flow.program.function(0, flow.program.image(0).entry)
    begins = _begins(flow, entry)
    if not begins:
        return np.zeros(graph.size, bool)
    if main is None or entry is None:
        return None
    ends = [entry, main]
    reached: Functions = graph.distances(begins - set(ends), CALLS | {EdgeKind.IFUNC}, blocked=ends) >= 0
    found = _run(flow, reached, ends)
    before = flow.program.start < min(flow.program.rva_of(f) for f in ends)
    stray = int(np.count_nonzero(reached & ~found & ~before))
    if not found.any() or stray > _STRAY * np.count_nonzero(reached):
        return None
    found |= reached & before
    for part in np.flatnonzero(before & ~found).tolist():
        found[part] = found[flow.whole(Function(part))]
    return found


def _begins(flow: Flow, entry: Function | None) -> set[int]:
    """Functions that surely are libc's, unless the program has put its own in their place."""
    graph, names = flow.graph, {*flow.signatures.signal_safe(EDITIONS[-1]), *flow.signatures.libc_areas}
    found = {int(f) for f in (*flow.program.called(sorted(names)), *flow.forkers)}
    if entry is not None:
        found |= {int(graph.target[e]) for e in graph.edges_from(entry) if graph.kind[e] in CALLS}
    return {f for f in found if not flow.is_go(Function(f))}


def _run(flow: Flow, reached: Functions, ends: list[Function]) -> Functions:
    """The run of addresses with the greatest weight, and on to the last function that was reached."""
    graph, found = flow.graph, np.zeros(flow.graph.size, bool)
    weight = np.where(reached, 1.0, -_OTHER)
    starters = [*flow.program.called(flow.signatures.thread_starters)]
    starts = np.flatnonzero(graph.kind == EdgeKind.THREAD)
    starts = starts[~reached[graph.source[starts]] & ~np.isin(graph.source[starts], starters)]
    weight[graph.target[starts]] = -_THREAD
    weight[ends] = -np.inf
    order = np.argsort(flow.program.start, kind="stable")
    best, first, last = _heaviest(weight[order])
    if not best:
        return found
    behind = weight[order[last + 1 :]]
    walls = np.flatnonzero(behind <= -_THREAD)
    more = np.flatnonzero(behind[: walls[0] if len(walls) else None] > 0)
    found[order[first : last + 1 + (int(more[-1]) + 1 if len(more) else 0)]] = True
    return found


def _heaviest(weight: npt.NDArray[np.float64]) -> tuple[float, int, int]:
    """The sum, the first and the last position of the heaviest run (Kadane's algorithm)."""
    best, found, here, begin = 0.0, (0, -1), 0.0, 0
    for position, each in enumerate(weight.tolist()):
        if here <= 0:
            here, begin = 0.0, position
        here += each
        if here > best:
            best, found = here, (begin, position)
    return best, *found
