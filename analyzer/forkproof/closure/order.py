"""The order in which constructors run.

Owns: glibc's and musl's ways to sort objects so that dependencies come first.
Takes: who needs whom, by index. Gives: indexes in the order of initialisation.
Must never: look at what a constructor does.
Wrong where: GLIBC_TUNABLES=glibc.rtld.dynamic_sort=1 or a glibc before 2.35 is used and the dependencies
      have a cycle: the old algorithm breaks cycles elsewhere. Without cycles both obey every dependency,
      but may differ in the order of objects that do not depend on each other.

Source: glibc elf/dl-sort-maps.c (`_dl_sort_maps_dfs`, the default since 2.35), elf/dl-init.c and elf/dl-load.c;
musl ldso/dynlink.c (`queue_ctors`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def glibc_order(objects: Sequence[int], needed: Mapping[int, Sequence[int]], first: int) -> tuple[int, ...]:
    """Initialisation order of `objects`, which are in load order; `first`, their root, goes last.

    A depth-first walk from the last loaded object to the first. An object is finished when what it
    needs is; finished order is initialisation order (glibc keeps it reversed, for destruction). Ties
    therefore fall in favour of what was loaded later. Cycles: the walk does not enter an object twice,
    nor the root from within.
    """
    members = set(objects)
    done: list[int] = []
    visited = {first}
    for start in reversed(objects):
        if start != first:
            _visit(start, needed, members, visited, done)
    return (*done, first)


def initfirst(order: tuple[int, ...], marked: Sequence[int]) -> tuple[int, ...]:
    """What glibc makes of an order: the last loaded object that is linked with -z initfirst goes before all others."""
    if not marked:
        return order
    first = max(marked)
    return (first, *(index for index in order if index != first))


def musl_order(program: int, needed: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """Initialisation order of what `program` reaches: depth first, in the order of DT_NEEDED."""
    done: list[int] = []
    members = set(needed)
    _visit(program, needed, members, set(), done)
    return tuple(done)


def _visit(
    start: int, needed: Mapping[int, Sequence[int]], members: set[int], visited: set[int], done: list[int]
) -> None:
    """Append the objects below `start`, and `start`, to `done`; own stack, since chains can be deep."""
    if start in visited or start not in members:
        return
    visited.add(start)
    stack = [(start, iter(needed.get(start, ())))]
    while stack:
        index, rest = stack[-1]
        following = next((n for n in rest if n not in visited and n in members), None)
        if following is None:
            done.append(index)
            stack.pop()
        else:
            visited.add(following)
            stack.append((following, iter(needed.get(following, ()))))
