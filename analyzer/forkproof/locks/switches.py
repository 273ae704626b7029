"""Words of an object's data that decide a branch: what they hold when the program runs as nobody has asked it to.

Owns: the words that are set up once, and the switches that are off unless somebody turns them on.
Takes: `Summaries`, the functions that run often. Gives: a reason why one side of a branch is rarely taken, if it is.
Must never: call a word a switch that is off because the file holds 0 there: constructors set it first, and what they
      compute is not always known.
Wrong where: code that runs often computes what it turns on (only constants of it count: most that is computed there
      are settings that were read); a word is set through a pointer that is not the first argument of a call; a
      configuration file that a distribution ships turns something on (the environment is taken to say nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from forkproof.callgraph import Reach
from forkproof.code.values import Value as KnownValue
from forkproof.locks.chosen import Stores
from forkproof.locks.runs import NOTHING, Effect, Exit, Run
from forkproof.locks.summary import Alone, Summaries
from forkproof.locks.values import ZERO, Object, Value
from forkproof.program import Function

_ENVIRONMENT: Final = ("getenv", "secure_getenv", "__secure_getenv")
"""What asks the environment, and is told nothing."""


class Switches:
    """Answers for the words of one program, seen from functions that run often."""

    def __init__(self, summaries: Summaries, reach: Callable[[], Reach], *, believes: bool = True) -> None:
        """`reach`: distances from the functions that run often; `believes`: what those compute is off, as settings
        are, and nobody else sets a word. Of a program's own variables, that is not so."""
        self.summaries, self._reach, self._believes = summaries, reach, believes
        self._often = Stores(summaries, lambda function: bool(reach()[function] >= 0))
        self._anybodys = Stores(summaries, lambda _: True)
        self._once = Stores(summaries, self._is_setup, self._quiet_run)
        self._constructed: dict[int, Reach] = {}
        self._environment = frozenset(summaries.program.called(_ENVIRONMENT))

    def why_rare(self, asker: Function, word: Value, constant: int, *, equal: bool, bits: int) -> str:
        """Why the low bits of a word of an object rarely equal a constant's, or differ from them, where a function asks
        for it."""
        assert isinstance(word.base, Object)
        image = self.summaries.program.image(word.base.number)
        if image.pointer_at(word.offset) is not None:
            return ""
        first = int.from_bytes(image.read(word.offset, 4).tobytes(), "little")
        started = self._once.of(word)
        stored = self._often.of(word) | started
        holds = [_is(value.offset, constant, bits) is equal for value in stored if value.base is None]
        is_computed = len(holds) < len(stored)
        if _is(first, constant, bits) is equal:
            # What is computed differs from one number in particular.
            is_rare = not all(holds) or (is_computed and equal)
            if not self._believes:  # what runs may set it back, and others tell a thread to stop in the same way
                is_rare = is_rare and not any(holds) and self.sets_up(asker, word)
            return "only until it has been set up" if is_rare else ""
        computed = started if self._believes else stored
        if any(holds) or any(value.base is not None for value in computed):
            return ""  # code that runs at start, or that allocation runs through, turns it on
        if not self._believes and (self._is_given_away(word) or not (stored or self._anybodys.of(word))):
            return ""  # what no code stores into by name is set through a pointer: compilers drop what nobody sets
        return "only while a switch is on that is off at start"

    def sets_up(self, asker: Function, word: Value) -> bool:
        """Who asks for a word sees to it that it is set."""
        reach = self.summaries.graph.distances([asker])
        return any(reach[f] >= 0 and word in self.summaries.stores(f) for f in self._often.naming(word))

    def _is_given_away(self, word: Value) -> bool:
        """Other objects know the word by its name, or a table holds its address: of options, say."""
        assert isinstance(word.base, Object)
        image = self.summaries.program.image(word.base.number)
        table = image.dynamic_symbols
        return bool(np.any(image.pointers[1] == word.offset) or np.any(table.value == word.offset))

    def _is_setup(self, function: Function) -> bool:
        """Constructors of the object run it, and nothing that runs often does."""
        obj = self.summaries.program.object_of(function)
        if obj not in self._constructed:
            program = self.summaries.program
            found = (program.function(obj, rva) for rva in program.image(obj).constructors)
            self._constructed[obj] = self.summaries.graph.distances([f for f in found if f is not None])
        return bool(self._constructed[obj][function] >= 0 and self._reach()[function] < 0)

    def _quiet_run(self, function: Function) -> Run:
        calls = _Quiet(self.summaries, function, self._environment)
        return self.summaries.interpreted_run(function, NOTHING, calls=calls)


def _is(value: int, constant: int, bits: int) -> bool:
    """Two numbers are the same one in so many bits, and in 4 bytes at most, with a sign or without."""
    return (value ^ constant) & ((1 << min(bits, 32)) - 1) == 0


class _Quiet(Alone):
    """Calls of a function that the environment tells nothing."""

    def __init__(self, summaries: Summaries, function: Function, environment: frozenset[Function]) -> None:
        super().__init__(summaries, function)
        self._environment = environment

    def effect(self, target: int, arguments: tuple[Value, ...]) -> Effect | None:
        result = "zero" if Function(target) in self._environment else self._told(target, arguments)
        return Effect((Exit(NOTHING, result),), frozenset()) if result else super().effect(target, arguments)

    def _told(self, target: int, arguments: tuple[Value, ...]) -> str | None:
        """What a function of the object makes of an answer of the environment: most have a default for none."""
        program = self.flow.program
        function = Function(target)
        if arguments[0] != ZERO or program.object_of(function) != self.obj:
            return None
        known = zip(self.flow.convention.arguments, arguments, strict=True)
        constants = {name: value.offset for name, value in known if value.base is None}
        results = self.flow.explore_from(function, program.rva_of(function), constants).results
        if not results or any(result is None or result.base is not None for result in results):
            return None
        is_zero = [result == KnownValue(None, 0) for result in results]
        return "zero" if all(is_zero) else None if any(is_zero) else "nonzero"
