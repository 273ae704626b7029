"""What can run after an instruction of a function, and what every way from there on meets.

Owns: questions about the order in which ways meet instructions.
Takes: a body, an exploration of it, and where that began. Gives: yes or no; sites.
Must never: be asked about an instruction that the exploration did not begin at, or come to.
Wrong where: the exploration is: where it keeps ways that no input takes.
"""

from __future__ import annotations

from collections.abc import Collection

from forkproof.code.decode import Body
from forkproof.code.explore import Exploration
from forkproof.code.operations import Jump


class Ahead:
    """The ways of one function from an instruction on, by what they meet."""

    def __init__(self, body: Body, start: int, run: Exploration) -> None:
        self.body, self.start, self.run = body, start, run

    def _block(self, first: int) -> range:
        position = self.body.position(first) or 0
        return range(position, self.body.block_end(position))

    def _instructions(self, first: int) -> list[int]:
        return [self.body.instructions[p].address for p in self._block(first)]

    def with_loops(self, sites: Collection[int], outside: Collection[int]) -> set[int]:
        """These sites, and all of each loop around one: a loop that joins is taken to join what there is.

        Not where the loop goes around what lies outside as well.
        """
        found = set(sites)
        for first in self.run.successors:
            if not set(self._instructions(first)) & set(sites):
                continue
            loop = {b for b in self.run.onward(first) if first in self.run.onward(b)}
            inside = {address for block in loop for address in self._instructions(block)}
            if not inside & set(outside):
                found |= inside
        return found

    def looks_before(self, sites: Collection[int]) -> set[int]:
        """Where it is asked, before a loop that waits, whether to wait at all: who goes past it need not.

        Compilers ask once before such a loop what the loop asks in each round.
        """
        found = set[int]()
        for first in self.run.successors:
            loop = {b for b in self.run.onward(first) if first in self.run.onward(b)}
            if not loop or not set(self._instructions(first)) & set(sites):
                continue
            leaving = {self._settled(b) for inner in loop for b in self.run.successors[inner] if b not in loop}
            for block, following in self.run.successors.items():
                ways = {self._settled(b) for b in following} - loop
                if block not in loop and len(ways) < len(following) and ways <= leaving:
                    found.add(self._instructions(block)[-1])
        return found

    def _settled(self, block: int) -> int:
        """Where a block leads that does nothing but lead on."""
        following = self.run.successors.get(block, ())
        idle = all(isinstance(o, Jump) for p in self._block(block) for o in self.body.instructions[p].operations)
        return following[0] if idle and len(following) == 1 else block

    def between(self, sites: Collection[int], goals: Collection[int], start: int) -> set[int]:
        """Those sites that control comes to before a goal, and from which it goes on to one in the same round."""
        reached = {site for site in sites if self._comes(self.start, {site}, {start, *goals})}
        return {site for site in reached if self._comes(site, goals, {start})}

    def comes_to(self, goals: Collection[int], stops: Collection[int]) -> bool:
        """Control can come to a goal without meeting a stop."""
        return self._comes(self.start, goals, stops)

    def _comes(self, start: int, goals: Collection[int], stops: Collection[int]) -> bool:
        pending, seen = [start], {start}
        while pending:
            block = pending.pop()
            met = next((a for a in self._instructions(block) if a in goals or a in stops), None)
            if met is not None and met not in stops:
                return True
            if met is None:
                following = self.run.successors.get(self.run.block_of(block) or 0, ())
                new = [b for b in following if b not in seen]
                seen.update(new)
                pending += new
        return False
