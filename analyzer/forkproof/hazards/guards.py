"""Guards: locks that prepare handlers take, and calls that threads make only while they hold one.

Owns: which fork handlers run at a fork, and the question whether a call is made under a lock that they quiesce: then no
      thread is in it when the fork comes.
Takes: `Facts`, a window. Gives: functions, locks, answers about call edges.
Must never: take a call for guarded that one way reaches without the lock.
Wrong where: a handler is registered on a way to another fork only; where what follows a function's locks is wrong.
"""

from __future__ import annotations

from functools import cached_property

from forkproof.facts import Facts, WindowFacts
from forkproof.locks.coverage import prepared_by, tried_by
from forkproof.locks.identity import Match
from forkproof.locks.runs import Held
from forkproof.locks.values import Object
from forkproof.program import Function


def handlers_at(facts: Facts, window: WindowFacts, which: int) -> list[Function]:
    """The fork handlers of one kind that are registered, but for those that main registers when it has forked."""
    if not window.window.handlers_run:
        return []
    found = [
        r.handlers[which].function
        for r in facts.registrations
        if r.is_effective
        and facts.may_run[r.outermost]
        and not (r.outermost == facts.flow.main and facts.threads.is_later(window.window, r.chain[0][1]))
    ]
    return [f for f in dict.fromkeys(found) if f is not None]


class Guards:
    """What is quiesced at one fork because of the lock under which it is called."""

    def __init__(self, facts: Facts, window: WindowFacts) -> None:
        self.facts, self.window = facts, window
        self._known: dict[int, bool] = {}

    @cached_property
    def handlers(self) -> list[Function]:
        """What runs before the fork."""
        return handlers_at(self.facts, self.window, 0)

    @cached_property
    def prepared(self) -> Held:
        """What they hold when the fork comes, for sure."""
        summaries = self.facts.summaries
        handlers = [f for f in self.handlers if summaries.relevant[f]]
        held = frozenset().union(*(prepared_by(summaries, prepare)[0] for prepare in handlers))
        return held.difference(*(tried_by(summaries, prepare) for prepare in handlers))

    @cached_property
    def takers(self) -> frozenset[Function]:
        """Functions that name one of these locks, and those that call them: only these may hold one."""
        program, graph = self.facts.flow.program, self.facts.flow.graph
        named = set[Function]()
        for lock in self.prepared:
            if isinstance(lock.base, Object):
                code, base = program.codes[lock.base.number], int(program.base[lock.base.number])
                owners = code.data_owner[code.sites.data_target == lock.offset]
                named |= {Function(base + owner) for owner in owners.tolist() if owner >= 0}
        callers = {Function(int(graph.source[edge])) for function in named for edge in graph.edges_to(function)}
        return frozenset(map(self.facts.flow.whole, named | callers))

    def guards(self, edge: int) -> bool:
        """The call is made under one of these locks, whoever makes it."""
        if not self.handlers:
            return False
        known = self._known.get(edge)
        if known is None:
            known = self._known[edge] = self._decide(edge)
        return known

    def _decide(self, edge: int) -> bool:
        flow, summaries = self.facts.flow, self.facts.summaries
        function = flow.whole(Function(int(flow.graph.source[edge])))
        if function not in self.takers or not summaries.relevant[function]:
            return False
        held = summaries.held_at(function, int(flow.graph.site[edge]))
        return any(summaries.arrays.same(h, p) is Match.EXACT for h in held for p in self.prepared)
