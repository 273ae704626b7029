"""Ways to a lock that programs seldom take, or never: after failures, behind a switch that is off or set by a child.

Owns: what makes a call of a way unusual, and which ways the child's own stores rule out.
Takes: `Facts`, a child's levels, and what it makes anew. Gives: reasons by edge; yes or no.
Must never: look into a function of libc, or of an allocator: `OtherLocks.usable`.
Wrong where: `Occasions` is; where what the child stores is changed again by what it calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Final

from forkproof.facts import Facts
from forkproof.forks import Level
from forkproof.hazards.anew import Anew
from forkproof.hazards.evidence import comes_first
from forkproof.locks.ordinary import Occasions
from forkproof.locks.others import Place
from forkproof.locks.runs import Turn
from forkproof.locks.summary import Step
from forkproof.locks.values import Content, Object, Value, Word
from forkproof.program import Function

_SETTER: Final = 64
"""Bytes of a function that may do no more than set a variable."""


class Unusual:
    """Answers for one fork window."""

    def __init__(self, facts: Facts, anew: Anew, levels: Sequence[Level]) -> None:
        self.facts, self.anew, self.levels = facts, anew, levels
        self.flow, self.graph, self.others = facts.flow, facts.flow.graph, facts.other_locks
        self._own = frozenset(level.function for level in levels)

    @cached_property
    def occasions(self) -> Occasions:
        """How ordinary it is to take one of these locks."""
        return Occasions(self.others.summaries, (), self.facts.may_run)

    def among(self, edges: Iterable[int]) -> dict[int, str]:
        """Those calls of a way that are made only when something rare is the case, with what it is."""
        edges = list(edges)
        found = dict.fromkeys(self.facts.failures.among(edges), "only after a call has failed")
        for edge in edges:
            if edge not in found and (reason := self._switched(edge)):
                found[edge] = reason
        return found

    def _switched(self, edge: int) -> str:
        """What must be the case for a library to make a call, if it is a switch that is off."""
        function = self.flow.whole(Function(int(self.graph.source[edge])))
        if function in self._own or not self.others.usable[function]:
            return ""
        return self.occasions.rare_step(Step(function, int(self.graph.site[edge])))

    def rules_out(self, position: tuple[int, int], edges: list[int], place: Place) -> bool:
        """What the child has stored into a variable, in its own code, rules out a branch on its way: `in_child = 1`."""
        depth, site = position
        constants = {**self._set_by_calls(position), **self.anew.constants(depth, site)}
        home = self.flow.program.object_of(self.levels[depth].function)
        steps = [Step(self.flow.whole(Function(int(self.graph.source[e]))), int(self.graph.site[e])) for e in edges[1:]]
        return any(
            other.base is None and word.base == Object(home) and _is_not(constants[word.offset], other.offset, turn)
            for step in ((*steps, *place.steps) if constants else ())
            if self.others.usable[step.function]
            for turn in self.occasions.required(step)
            for base, other in ((turn.value.base, turn.other),)
            if isinstance(base, Content | Word) and turn.value.offset == 0
            for word in (Value(base.base, base.offset),)
            if word.offset in constants
        )

    def _set_by_calls(self, position: tuple[int, int]) -> dict[int, int]:
        """The constants that functions which do no more have stored into variables, on every way of the child's there:
        `log_close()`."""
        level, found = self.levels[position[0]], dict[int, int]()
        home = self.flow.program.object_of(level.function)
        for edge in level.edges:
            site, setter = int(self.graph.site[edge]), Function(int(self.graph.target[edge]))
            is_plain = self.others.usable[setter] and self.flow.program.size_of(setter) <= _SETTER
            if site < position[1] and is_plain and self.flow.program.object_of(setter) == home:
                run = self.others.summaries.run(setter)
                if not run.calls and not run.blocks.turns and comes_first(self.flow, level, {site}, position[1]):
                    found |= {
                        word.offset: next(iter(values)).offset
                        for word, values in run.stores.items()
                        if word.base == Object(home) and len(values) == 1 and next(iter(values)).base is None
                    }
        return found


def _is_not(known: int, constant: int, turn: Turn) -> bool:
    """A word that holds a constant does not take a turn."""
    is_equal = (known ^ constant) & ((1 << min(turn.bits, 32)) - 1) == 0
    return turn.equal is not None and is_equal is not turn.equal
