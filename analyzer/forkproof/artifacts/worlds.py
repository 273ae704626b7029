"""Several artifacts as one world, and as an own one for each of which another hides files.

Owns: which programs are scanned where, and how the report tells two of one path apart.
Takes: artifacts in front, one behind, programs by path. Gives: `Scope`s.
Must never: scan a program of one artifact as another's: what it is and what it loads come from its own artifact first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from forkproof.artifacts import scope, shadows
from forkproof.artifacts.programs import Files, Programs, in_world
from forkproof.artifacts.scope import Scope
from forkproof.artifacts.world import Layer, World


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An artifact in a world."""

    name: str
    """What tells its programs apart; empty where nothing does."""
    layer: Layer
    files: Files
    """Its ELF files that are asked for."""
    is_package: bool = False


def scopes(
    label: str,
    front: Sequence[Part],
    base: Part | None,
    files: Sequence[str],
    programs: Programs,
    given: scope.Given = scope.NOTHING,
) -> list[Scope]:
    """The programs of all artifacts and these single files; libraries are looked for in front first."""
    layers, behind = [part.layer for part in front], [base.layer] if base is not None else []
    shared = World(label, [*layers, *behind])
    # 1. What an artifact holds otherwise than one before it, it would lose: it gets a world with itself in front.
    hidden = shadows.hidden(shared, layers)
    own = {n: World(label, [layers[n], *layers[:n], *layers[n + 1 :], *behind]) for n in hidden}
    # 2. Programs, each of the artifact that holds it.
    for number, part in enumerate(front):
        programs.look(in_world(part.files, own.get(number, shared)), of=number, is_package=part.is_package)
    if base is not None:
        programs.look(in_world(base.files, shared), of=len(front))
    chosen = programs.chosen or ([] if files else programs.libraries)
    # 3. How the report calls them.
    names = [part.name and f"{part.name}:" for part in front]
    image = f"{base.name}:" if base is not None and base.name else ""
    common = Counter([path for _, path in chosen] + [*files])
    starts: dict[int, list[tuple[str, str]]] = {}
    for number, path in chosen:
        artifact = names[number] if common[path] > 1 and number < len(names) else ""
        starts.setdefault(number if number in own else -1, []).append((path, image + artifact))
    # 4. A scope for each world.
    notes = (*shadows.told(hidden, [part.name or "a file" for part in front]), *programs.notes)
    nothing = [] if chosen or files else [programs.nothing(label)]
    first = (*scope.named(shared, files), *scope.in_order(shared, starts.get(-1, []), given))
    found = [Scope(shared, label, first, notes, (*programs.errors, *nothing))]
    return found + [Scope(own[n], label, tuple(scope.in_order(own[n], starts[n], given))) for n in own if n in starts]
