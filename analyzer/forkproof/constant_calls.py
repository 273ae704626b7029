"""Calls that never come back because of the constants that they pass: `report_end(0)`, which aborts if it is given 0.

Owns: which functions are worth the question, and the answers, by function and constants.
Takes: `Flow`, which knows what never comes back whatever it is given. Gives: yes or no for a call.
Must never: say yes where some way leads back; decode a function that ends the program on no way at all.
Wrong where: the constant stands in another block than the call, or passes through memory (the call counts as
      returning, which keeps paths alive); where a program ends in a callee's callee only.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from forkproof.callgraph import CALLS, EdgeKind
from forkproof.code.certain import Constants, constants_before
from forkproof.columns import among
from forkproof.program import Function

if TYPE_CHECKING:
    from forkproof.flow import Flow

_LARGEST: Final = 1 << 14
"""Bytes of a function that is worth it: what reports an error and ends is short."""


class ConstantCalls:
    """Answers of one program, memoised."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._passed: dict[tuple[Function, int], Constants] = {}
        self._answers: dict[tuple[Function, frozenset[tuple[str, int]], int], bool] = {}

    def end(self, function: Function, site: int, target: Function, depth: int) -> bool:
        """The call of `target` at a site of `function` does not come back, for the constants that stand before it."""
        return bool(self.may_end[target]) and not self.comes_back(target, self.passed(function, site), depth)

    def passed(self, function: Function, site: int) -> Constants:
        """The constants that a call plainly passes."""
        found = self._passed.get((function, site))
        if found is None:
            found = constants_before(self.flow.body(function), self.flow.machine, site)
            self._passed[function, site] = found
        return found

    @cached_property
    def may_end(self) -> npt.NDArray[np.bool_]:
        """Functions that end the program themselves on some way, or jump to one that does: their cold parts."""
        graph, flow = self.flow.graph, self.flow
        found = np.zeros(graph.size, bool)
        found[list(flow.program.called(flow.signatures.exit_names.exact))] = True
        for kinds in (CALLS, {EdgeKind.JUMP}):
            found[graph.source[found[graph.target] & among(graph.kind, kinds)]] = True
        return found

    def comes_back(self, target: Function, known: Constants, depth: int) -> bool:
        """A function that may come back does so when it is given these constants."""
        if depth <= 0 or not known or not self.may_end[target]:
            return True
        key = target, frozenset(known.items()), depth
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = self._is_large(target) or self.flow.may_return(target, known, depth - 1)
        return answer

    def _is_large(self, function: Function) -> bool:
        return sum(size for _, size in self.flow.ranges(function)) > _LARGEST
