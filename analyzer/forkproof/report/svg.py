"""The slice as a picture: layers from the roots down to the lock, few crossings, no tool needed.

Owns: the layout and the drawing. Takes: a `Slice`. Gives: SVG text that stands alone, or goes into a page.
Must never: need a font, a script or a network; colours are CSS variables with a fallback, so a page can set them.
Wrong where: the calls form a cycle: one call of it points upwards.

The layout is Sugiyama's in its simplest form: longest-path layers, places for calls that span several layers,
four sweeps of barycentres. Graphviz would do better on hundreds of nodes; a witness slice has a dozen or two, and
a report must not depend on what is installed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from forkproof.model import Report
from forkproof.report import stacks
from forkproof.report.graph import Role, Slice, slice_of, words
from forkproof.report.json import in_order
from forkproof.report.layout import clean, shorten

_CHAR: Final = 7.3
"""Width of a character of the 12 px monospace font, generously."""
_LONGEST: Final = 38
_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 40, 28, 46, 16
_SWEEPS: Final = 4

STYLE: Final = """
.fp-graph { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.fp-graph rect { fill: var(--fp-node, #ffffff); stroke-width: 1.5; }
.fp-graph text { fill: var(--fp-text, #1b1b1f); text-anchor: middle; }
.fp-graph .o { fill: var(--fp-quiet, #5b5b66); font-size: 10px; }
.fp-graph .e { fill: var(--fp-quiet, #5b5b66); font-size: 9px; paint-order: stroke; stroke-width: 5px;
  stroke: var(--card, #ffffff); }
.fp-graph path { fill: none; stroke-width: 1.5; }
.fp-graph .lock { stroke: var(--fp-lock, #b3261e); }
.fp-graph .fork { stroke: var(--fp-fork, #7b4ea3); }
.fp-graph .requester { stroke: var(--fp-requester, #1f6fb2); }
.fp-graph .holder { stroke: var(--fp-holder, #b26a00); }
.fp-graph marker path { stroke: none; fill: var(--fp-quiet, #5b5b66); }
"""


def render(report: Report) -> str:
    """All findings in one picture, as a file."""
    findings = in_order(report.findings)
    root = drawing(slice_of(findings), "", alone=True)
    for finding in findings:
        text = f"{finding.severity.value} {finding.id} {finding.target}: {finding.message}"
        ET.SubElement(root, "desc").text = clean(text)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def inline(shown: Slice, key: str) -> str:
    """For a page that has STYLE among its own; `key` is the picture's own in that page."""
    return ET.tostring(drawing(shown, key), encoding="unicode")


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a node is drawn: its centre and its width."""

    x: float
    y: float
    width: float


def drawing(shown: Slice, key: str, *, alone: bool = False) -> ET.Element:
    """The svg element."""
    chains = _chains(shown)
    layers = _ordered(_layers(shown, chains), chains)
    boxes = _placed(layers, shown)
    right = max((box.x + box.width / 2 for box in boxes.values()), default=200.0) + _MARGIN
    bottom = max((box.y for box in boxes.values()), default=20.0) + _HEIGHT / 2 + _MARGIN
    root = ET.Element("svg", {"class": "fp-graph", "viewBox": f"0 0 {right:.0f} {bottom:.0f}", "role": "img"})
    if alone:
        root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": f"{right:.0f}", "height": f"{bottom:.0f}"}
        ET.SubElement(root, "style").text = STYLE
        ET.SubElement(root, "rect", {"width": "100%", "height": "100%"})
    if not shown.nodes:
        ET.SubElement(root, "text", {"x": "100", "y": "24"}).text = "no finding"
        return root
    arrow = f"fp-arrow{key}"
    _arrowhead(root, arrow)
    labels: dict[tuple[int, int], list[str]] = defaultdict(list)
    for call in shown.calls:
        labels[call.source, call.target].append(words(call.edge))
    for call, chain in zip(shown.calls, chains, strict=True):
        # Calls of one pair of functions lie on each other: the first is labelled for all.
        label = ", ".join(dict.fromkeys(labels.pop((call.source, call.target), [])))
        _draw_call(root, [boxes[place] for place in chain], label, call.role, arrow)
    for number, node in enumerate(shown.nodes):
        _draw_node(root, boxes[number, -1], node.name, node.object, node.role)
    return root


# Layers. A place is (node, -1), or (call, step) for a call that passes through a layer.

_Place = tuple[int, int]


def _depths(shown: Slice) -> list[int]:
    """Longest way from a root, with the calls that close a cycle left out."""
    after: dict[int, list[int]] = defaultdict(list)
    for call in shown.calls:
        after[call.source].append(call.target)
    state: dict[int, int] = {}
    order: list[int] = []
    kept: list[tuple[int, int]] = []
    for start in range(len(shown.nodes)):
        stack = [(start, iter(after[start]))] if start not in state else []
        state.setdefault(start, 1)
        while stack:
            node, rest = stack[-1]
            target = next(rest, None)
            if target is None:
                state[node] = 2
                order.append(node)
                stack.pop()
            elif state.get(target) != 1:  # not on the way from the root: no cycle
                kept.append((node, target))
                if target not in state:
                    state[target] = 1
                    stack.append((target, iter(after[target])))
    depth = [0] * len(shown.nodes)
    successors: dict[int, list[int]] = defaultdict(list)
    for source, target in kept:
        successors[source].append(target)
    for node in reversed(order):
        for target in successors[node]:
            depth[target] = max(depth[target], depth[node] + 1)
    locks = [i for i, node in enumerate(shown.nodes) if node.role is Role.LOCK]
    deepest = max(depth, default=0)
    for lock in locks:  # where both paths end
        depth[lock] = deepest
    return depth


def _chains(shown: Slice) -> list[list[_Place]]:
    """Each call as the places it runs through, from its source to its target."""
    depth = _depths(shown)
    chains = []
    for number, call in enumerate(shown.calls):
        first, last = depth[call.source], depth[call.target]
        between = range(first + 1, last) if last > first else range(0)
        chains.append([(call.source, -1), *((number, level) for level in between), (call.target, -1)])
    return chains


def _layers(shown: Slice, chains: Sequence[Sequence[_Place]]) -> list[list[_Place]]:
    depth = _depths(shown)
    layers: list[list[_Place]] = [[] for _ in range(max(depth, default=0) + 1)]
    for node, level in enumerate(depth):
        layers[level].append((node, -1))
    for chain in chains:
        for place in chain[1:-1]:
            layers[place[1]].append(place)
    return layers


def _ordered(layers: list[list[_Place]], chains: Sequence[Sequence[_Place]]) -> list[list[_Place]]:
    """Each layer sorted by the mean position of its neighbours above, then below, a few times."""
    above: dict[_Place, list[_Place]] = defaultdict(list)
    below: dict[_Place, list[_Place]] = defaultdict(list)
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            above[lower].append(upper)
            below[upper].append(lower)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        walk = layers if down else layers[::-1]
        position = {place: index for layer in layers for index, place in enumerate(layer)}
        for layer in walk:
            # Bound now: the mean is over the order that the layers before this one have just been given.
            centre = {
                place: sum(position[n] for n in neighbours[place]) / len(neighbours[place])
                if neighbours[place]
                else float(position[place])
                for place in layer
            }
            layer.sort(key=lambda place: (centre[place], place))
            position |= {place: index for index, place in enumerate(layer)}
    return layers


def _placed(layers: Sequence[Sequence[_Place]], shown: Slice) -> dict[_Place, _Box]:
    """Layers from top to bottom, each centred."""
    widths = {
        (number, -1): max(len(_label(node.name)), len(_label(node.object))) * _CHAR + 18
        for number, node in enumerate(shown.nodes)
    }
    totals = [sum(widths.get(p, 10.0) + _GAP_X for p in layer) - _GAP_X for layer in layers]
    widest = max(totals, default=0.0)
    boxes = {}
    for level, layer in enumerate(layers):
        x = _MARGIN + (widest - totals[level]) / 2
        y = _MARGIN + _HEIGHT / 2 + level * (_HEIGHT + _GAP_Y)
        for place in layer:
            width = widths.get(place, 10.0)
            boxes[place] = _Box(x + width / 2, y, width)
            x += width + _GAP_X
    return boxes


# Drawing.


def _arrowhead(root: ET.Element, name: str) -> None:
    size = {"viewBox": "0 0 8 8", "refX": "7", "refY": "4", "markerWidth": "8", "markerHeight": "8", "orient": "auto"}
    marker = ET.SubElement(ET.SubElement(root, "defs"), "marker", {"id": name, **size})
    ET.SubElement(marker, "path", {"d": "M0,0 L8,4 L0,8 z"})


def _draw_call(root: ET.Element, boxes: Sequence[_Box], label: str, role: Role, arrow: str) -> None:
    """A curve through the places of the call, its words in the middle of the first stretch."""
    points = [(box.x, box.y) for box in boxes]
    upwards = points[-1][1] <= points[0][1]
    half = -_HEIGHT / 2 if upwards else _HEIGHT / 2
    points[0] = (points[0][0], points[0][1] + half)
    points[-1] = (points[-1][0], points[-1][1] - half)
    parts = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        parts.append(f"C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}")
    ET.SubElement(root, "path", {"d": " ".join(parts), "class": role.value, "marker-end": f"url(#{arrow})"})
    (x0, y0), (x1, y1) = points[0], points[1]
    ET.SubElement(
        root, "text", {"class": "e", "x": f"{(x0 + x1) / 2:.1f}", "y": f"{(y0 + y1) / 2 + 3:.1f}"}
    ).text = clean(label)


def _draw_node(root: ET.Element, box: _Box, name: str, where: str, role: Role) -> None:
    group = ET.SubElement(root, "g", {"data-role": role.value})
    ET.SubElement(group, "title").text = clean(f"{name} in {where}")
    corner = {"x": f"{box.x - box.width / 2:.1f}", "y": f"{box.y - _HEIGHT / 2:.1f}"}
    size = {"width": f"{box.width:.1f}", "height": str(_HEIGHT), "rx": "18" if role is Role.LOCK else "4"}
    ET.SubElement(group, "rect", {**corner, **size, "class": role.value})
    ET.SubElement(group, "text", {"x": f"{box.x:.1f}", "y": f"{box.y - 2:.1f}"}).text = _label(name)
    ET.SubElement(group, "text", {"class": "o", "x": f"{box.x:.1f}", "y": f"{box.y + 13:.1f}"}).text = _label(where)


def _label(text: str) -> str:
    return shorten(stacks.brief(clean(text)), _LONGEST)
