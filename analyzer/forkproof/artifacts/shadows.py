"""Which files of an artifact another one hides, where several hold the same path.

Owns: when two files at one path differ, and what a reader is told. Takes: a world, and the layers in front of it.
Gives: for each layer that loses a path, who won it.
Must never: count what a scan does not read: two packages' changelogs may differ.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from forkproof.artifacts.tree import Entry, Kind
from forkproof.artifacts.world import Layer, World
from forkproof.model import Diagnostic

Hidden = Mapping[int, Mapping[int, Sequence[str]]]
"""Number of a layer → number of the layer that wins → paths that it wins."""
_SHOWN: Final = 3


def hidden(world: World, layers: Sequence[Layer]) -> Hidden:
    """What each of these layers, the first of the world, has otherwise than the world has it."""
    found: dict[int, dict[int, list[str]]] = {}
    for number, layer in enumerate(layers[1:], 1):
        for path, entry in layer.held():
            place = world.place(path)
            winner = world.provider(place) if place is not None and not world.is_joined(place) else None
            if place is None or winner is None or winner[0] >= number or _are_same(entry, winner[1]):
                continue
            found.setdefault(number, {}).setdefault(winner[0], []).append(place)
    return found


def _are_same(one: Entry, other: Entry) -> bool:
    if one is other or (one.kind is Kind.DIRECTORY and other.kind is Kind.DIRECTORY):
        return True
    if one.blob is not None and other.blob is not None:
        return filecmp.cmp(one.blob, other.blob, shallow=False)
    return (one.kind, one.link, one.data, one.blob) == (other.kind, other.link, other.data, other.blob)


def told(found: Hidden, names: Sequence[str]) -> Iterator[Diagnostic]:
    """A warning for each two artifacts."""
    for number, winners in found.items():
        for winner, paths in winners.items():
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            what = f"{', '.join(paths[:_SHOWN])}{more}"
            message = (
                f"holds {what} otherwise than {names[winner]}: its own programs are scanned with its own, "
                f"all others with that of {names[winner]}"
            )
            yield Diagnostic("warning", names[number], message)
