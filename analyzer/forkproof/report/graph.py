"""The part of the call graph that findings stand on: witness paths joined at their forks and locks.

Owns: which functions and calls are shown, what each is there for, and how they are written for Graphviz and Mermaid.
Takes: findings. Gives: a `Slice`; text of a drawing language. `svg` draws the same slice without help.
Must never: show a call that no witness path has, or lose one that a path has.
Wrong where: two paths run through one function: it is one node, and a reader can follow a mixture of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from forkproof.model import Finding, Frame, Report
from forkproof.report import stacks
from forkproof.report.json import in_order
from forkproof.report.layout import clean


class Role(Enum):
    """What a node or a call is there for; a node that has several is what stands first."""

    LOCK = "lock"
    FORK = "fork"
    REQUESTER = "requester"
    HOLDER = "holder"


@dataclass(frozen=True, slots=True)
class Node:
    """A function, or the lock."""

    object: str
    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Call:
    """How one node leads to another: indexes into the slice's nodes."""

    source: int
    target: int
    edge: str
    role: Role


@dataclass(frozen=True, slots=True)
class Slice:
    """Nodes in the order in which the paths come upon them."""

    nodes: tuple[Node, ...]
    calls: tuple[Call, ...]


def slice_of(findings: Iterable[Finding]) -> Slice:
    """The union of the findings' witness paths."""
    joined = _Joined()
    for finding in findings:
        joined.add(finding)
    return joined.product()


class _Joined:
    """Nodes and calls while paths are added; a key is an object, a name, and whether it is a lock."""

    def __init__(self) -> None:
        self.roles: dict[tuple[str, str, bool], Role] = {}
        self.calls: dict[tuple[tuple[str, str, bool], tuple[str, str, bool], str, Role], None] = {}

    def add(self, finding: Finding) -> None:
        """Both paths, the fork that the child comes from, and the lock that they meet at."""
        self._path(finding.holder, Role.HOLDER)
        self._path(finding.requester, Role.REQUESTER)
        if finding.fork is not None:
            fork = self._node((finding.fork.object, finding.fork.function, False), Role.FORK)
            if finding.requester and _key(finding.requester[0]) != fork:
                self.calls[fork, _key(finding.requester[0]), "fork", Role.REQUESTER] = None
        if finding.lock is not None:
            lock = self._node((finding.lock.object, finding.lock.name, True), Role.LOCK)
            for path, word, role in (
                (finding.holder, "holds", Role.HOLDER),
                (finding.requester, "waits for", Role.REQUESTER),
            ):
                if path:
                    self.calls[_key(path[-1]), lock, word, role] = None

    def product(self) -> Slice:
        """As frozen values."""
        numbers = {key: number for number, key in enumerate(self.roles)}
        nodes = tuple(Node(key[0], key[1], role) for key, role in self.roles.items())
        calls = tuple(Call(numbers[s], numbers[t], edge, role) for s, t, edge, role in self.calls)
        return Slice(nodes, calls)

    def _path(self, frames: Sequence[Frame], role: Role) -> None:
        for frame in frames:
            self._node(_key(frame), role)
        for caller, callee in itertools.pairwise(frames):
            if _key(caller) != _key(callee):
                self.calls[_key(caller), _key(callee), caller.edge, role] = None

    def _node(self, key: tuple[str, str, bool], role: Role) -> tuple[str, str, bool]:
        order = list(Role)
        self.roles[key] = min(self.roles.get(key, role), role, key=order.index)
        return key


def _key(frame: Frame) -> tuple[str, str, bool]:
    return frame.object, frame.function, False


def words(edge: str) -> str:
    """An edge as people call it."""
    return stacks.EDGES[edge][0] if edge in stacks.EDGES else edge


# Graphviz.

_COLORS: Final = {
    Role.LOCK: "#b3261e",
    Role.FORK: "#7b4ea3",
    Role.REQUESTER: "#1f6fb2",
    Role.HOLDER: "#b26a00",
}
"""Readable on white and on black."""
_SHAPES: Final = {Role.LOCK: "octagon", Role.FORK: "invhouse"}


def dot(report: Report) -> str:
    """One digraph; the functions of an object stand in a cluster."""
    whole = slice_of(in_order(report.findings))
    lines = ["digraph forkproof {", "  rankdir=TB;", '  node [shape=box, fontname="monospace"];']
    for number, name in enumerate(dict.fromkeys(node.object for node in whole.nodes)):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(name)};"]
        lines += [f"    {_dot_node(i, node)}" for i, node in enumerate(whole.nodes) if node.object == name]
        lines.append("  }")
    lines += [
        f"  n{call.source} -> n{call.target} [label={_quoted(words(call.edge))}, color={_quoted(_COLORS[call.role])}];"
        for call in whole.calls
    ]
    lines += [f"  // {clean(_title(finding))}" for finding in in_order(report.findings)]
    return "\n".join([*lines, "}", ""])


def _dot_node(number: int, node: Node) -> str:
    color = _quoted(_COLORS[node.role])
    return f"n{number} [label={_quoted(node.name)}, color={color}, shape={_SHAPES.get(node.role, 'box')}];"


def _quoted(text: str) -> str:
    escaped = clean(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _title(finding: Finding) -> str:
    return f"{finding.severity.value} {finding.id} {finding.target}: {finding.message}"


# Mermaid, which GitLab and GitHub draw in Markdown.


def mermaid(report: Report) -> str:
    """A flowchart of all findings."""
    lines = list(flowchart(slice_of(in_order(report.findings))))
    lines += [f"  %% {clean(_title(finding))}" for finding in in_order(report.findings)]
    return "\n".join([*lines, ""])


def flowchart(shown: Slice) -> Iterator[str]:
    """The lines of a flowchart."""
    yield "flowchart TD"
    for number, node in enumerate(shown.nodes):
        text = _entities(f"{stacks.brief(node.name)}\n{node.object}").replace("\n", "<br/>")
        opened, closed = {Role.LOCK: ("{{", "}}"), Role.FORK: ("[/", "\\]")}.get(node.role, ("[", "]"))
        yield f'  n{number}{opened}"{text}"{closed}:::{node.role.value}'
    for call in shown.calls:
        yield f'  n{call.source} -->|"{_entities(words(call.edge))}"| n{call.target}'
    for role, color in _COLORS.items():
        yield f"  classDef {role.value} stroke:{color},stroke-width:2px"


def _entities(text: str) -> str:
    """Mermaid takes #NN; for any character that its grammar or HTML would act on."""
    parts = [clean(part) for part in text.split("\n")]
    return "\n".join("".join(c if c.isalnum() or c in " .:_+-/~," else f"#{ord(c)};" for c in part) for part in parts)


__all__: Final = ["Call", "Node", "Role", "Slice", "dot", "flowchart", "mermaid", "slice_of", "words"]
