"""`forkproof graph`: the call graph of a program and its libraries, whole or around one function.

Owns: the command's options, the choice of what is shown, and its three formats.
Takes: a target. Gives: JSON, DOT or GraphML, and the exit code: 3 when a library is missing.
Must never: resolve a call; that is `forkproof.callgraph`.

JSON: {"objects": [path…], "edges": [[src_object, src_rva, dst_object, dst_rva, kind]…],
"functions": [[object, rva, name]…] (with --function), "unknown_calls": [[object, rva, count]…], "missing": [name…]}.
Objects are numbered by their place in "objects"; a source is the start of the function that holds the call; an edge
stands once, however many calls there are. All lists are sorted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from forkproof.cli import output
from forkproof.errors import EXIT_CLEAN, EXIT_INPUT, UsageError
from forkproof.options import ScanOptions

if TYPE_CHECKING:
    import networkx as nx

    from forkproof.callgraph import CallGraph

DEPTH: Final = 2

Node = tuple[int, int]
"""(object, rva): a function."""


@click.command("graph")
@click.argument("target")
@click.option(
    "--sysroot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="The directory that is / for the target: an unpacked image, packages of another machine.",
)
@click.option("--library-path", multiple=True, metavar="DIR", help="A directory of LD_LIBRARY_PATH; repeatable.")
@click.option("--preload", multiple=True, metavar="LIB", help="A library of LD_PRELOAD; repeatable.")
@click.option("--also", multiple=True, metavar="LIB", help="A library that the program dlopens; repeatable.")
@click.option("--function", metavar="NAME", help="Only what is near this function, a linker name or sub_<rva>.")
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"How many calls away from --function (default: {DEPTH}).",
)
@click.option("--reverse", is_flag=True, help="Only the callers of --function, not what it calls.")
@output.format_option(("json", "dot", "graphml"), "json", "JSON, or a language of graph viewers.")
@click.option("--output", "-o", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead.")
@click.pass_context
def graph_command(context: click.Context, /, **asked: Any) -> None:  # noqa: ANN401 - a field of Request each
    """Show which function calls which in TARGET and the libraries that ld.so would load for it.

    Calls through the PLT and the GOT are resolved as ld.so would bind them; callbacks, new threads, IFUNC choices and
    constant tables of functions are edges of their own kind. Calls whose target is unknown are counted by function.

    \b
    Examples:
      forkproof graph /usr/sbin/named -o named.json
      forkproof graph /usr/bin/qemu-system-x86_64 --function os_daemonize --format dot | dot -Tsvg -o daemonize.svg
      forkproof graph /usr/sbin/cron --function fork --reverse --depth 4

    Exit codes: 0 all was read; 3 the target or one of its libraries was not.
    """
    request = Request(**asked)
    request.check()
    graph = request.graph()
    shown = request.shown(graph)
    result = {"json": _json, "dot": _dot, "graphml": _graphml}[request.form](shown)
    if request.file is None:
        output.emit(result)
    else:
        output.write(request.file, result)
    for name in shown.missing:
        output.tell(f"{request.target}: library {name} was not found; its calls are not shown")
    context.exit(EXIT_INPUT if shown.missing else EXIT_CLEAN)


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; a field for each option."""

    target: str
    sysroot: Path | None
    library_path: tuple[str, ...]
    preload: tuple[str, ...]
    also: tuple[str, ...]
    function: str | None
    depth: int | None
    reverse: bool
    form: str
    file: Path | None

    def check(self) -> None:
        """Refuse, before anything takes long, what cannot be meant or cannot work."""
        if self.function is None and (self.reverse or self.depth is not None):
            raise click.UsageError("--depth and --reverse need --function NAME.")
        if self.file is not None:
            output.check(self.file)

    def graph(self) -> CallGraph:
        """The whole graph, tables included."""
        from forkproof import pipeline, signatures, tables

        options = ScanOptions(self.sysroot, self.library_path, self.preload, self.also)
        return tables.with_tables(pipeline.call_graph(self.target, options, signatures.load()))

    def shown(self, graph: CallGraph) -> Shown:
        """The part that was asked for."""
        program = graph.program
        objects = tuple(item.path for item in program.closure.objects)
        missing = tuple(sorted({item.name for item in program.closure.missing}))
        if self.function is None:
            edges = _edges(graph)
            names = () if self.form == "json" else _names(graph, {n for edge in edges for n in (edge[:2], edge[2:4])})
            return Shown(objects, edges, names, _unknown_calls(graph, None), missing)
        roots = _named(graph, self.function)
        nodes = _near(_networkx(_edges(graph)), roots, DEPTH if self.depth is None else self.depth, self.reverse)
        edges = [edge for edge in _edges(graph) if edge[:2] in nodes and edge[2:4] in nodes]
        return Shown(objects, edges, _names(graph, nodes), _unknown_calls(graph, nodes), missing)


Edge = tuple[int, int, int, int, str]


@dataclass(frozen=True, slots=True)
class Shown:
    """What is written, in any format."""

    objects: tuple[str, ...]
    edges: list[Edge]
    functions: tuple[tuple[int, int, str], ...]
    unknown_calls: list[tuple[int, int, int]]
    missing: tuple[str, ...]


# ---- choosing ----------------------------------------------------------------------------------


def _edges(graph: CallGraph) -> list[Edge]:
    """Every edge once, sorted."""
    import numpy as np

    from forkproof.callgraph import EdgeKind

    words = sorted((kind.name.lower(), int(kind)) for kind in EdgeKind)
    rank = np.zeros(max(EdgeKind) + 1, np.int64)
    rank[[number for _, number in words]] = np.arange(len(words))
    program = graph.program
    ends = (graph.source, graph.target)
    objects = [np.searchsorted(program.base, end, side="right") - 1 for end in ends]
    columns = [objects[0], program.start[graph.source], objects[1], program.start[graph.target], rank[graph.kind]]
    rows = np.unique(np.stack(columns, axis=1), axis=0) if len(graph.source) else np.zeros((0, 5), np.int64)
    names = [word for word, _ in words]
    return [(a, b, c, d, names[k]) for a, b, c, d, k in rows.tolist()]


def _named(graph: CallGraph, name: str) -> set[Node]:
    """The functions that bear a name, in any object."""
    program = graph.program
    found = {(program.object_of(f), program.rva_of(f)) for f in program.called([name])}
    prefix, _, digits = name.partition("_")
    if not found and prefix == "sub" and (rva := _hexadecimal(digits)) is not None:
        everywhere = range(len(program.codes))
        found = {(obj, rva) for obj in everywhere if program.function(obj, rva) is not None}
    if not found:
        raise UsageError(
            f"no function {name} in {program.closure.program.path} or its libraries",
            next_step="Give the linker's name (mangled, without a version), or sub_<rva> in stripped code.",
        )
    return found


def _hexadecimal(digits: str) -> int | None:
    try:
        return int(digits, 16)
    except ValueError:
        return None


def _networkx(edges: Iterable[Edge]) -> nx.DiGraph[Node]:
    import networkx as nx

    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_edges_from((edge[:2], edge[2:4]) for edge in edges)
    return graph


def _near(graph: nx.DiGraph[Node], roots: set[Node], depth: int, reverse: bool) -> set[Node]:
    """The functions within `depth` calls of a root: its callers, and unless `reverse` what it calls."""
    import networkx as nx

    found = set(roots)
    for root in roots & set(graph):
        found |= set(nx.single_source_shortest_path_length(graph.reverse(copy=False), root, depth))
        if not reverse:
            found |= set(nx.single_source_shortest_path_length(graph, root, depth))
    return found


def _names(graph: CallGraph, nodes: Iterable[Node]) -> tuple[tuple[int, int, str], ...]:
    from forkproof.elf.demangle import demangle

    names = graph.program.names
    return tuple((obj, rva, demangle(names[obj].name(rva))) for obj, rva in sorted(nodes))


def _unknown_calls(graph: CallGraph, nodes: set[Node] | None) -> list[tuple[int, int, int]]:
    """(object, rva, number) of calls with unknown targets; None for all functions."""
    found = []
    for obj, code in enumerate(graph.program.codes):
        for index in code.unknown_calls.nonzero()[0].tolist():
            node = (obj, int(code.start[index]))
            if nodes is None or node in nodes:
                found.append((*node, int(code.unknown_calls[index])))
    return found


# ---- writing -----------------------------------------------------------------------------------


def _json(shown: Shown) -> str:
    document: dict[str, Any] = {"objects": shown.objects, "edges": shown.edges}
    if shown.functions:
        document["functions"] = shown.functions
    document |= {"unknown_calls": shown.unknown_calls, "missing": shown.missing}
    parts = [f"{json.dumps(key)}: {_rows(value)}" for key, value in document.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rows(rows: Iterable[Any]) -> str:
    """A list, an element a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]" if lines else "[]"


_STYLES: Final = {
    "thread": "bold",
    "deferred": "dashed",
    "callback": "dashed",
    "table": "dotted",
    "field": "dotted",
    "dynamic": "dotted",
    "ifunc": "dashed",
}


def _dot(shown: Shown) -> str:
    return "\n".join(_dot_lines(shown)) + "\n"


def _dot_lines(shown: Shown) -> Iterator[str]:
    yield "digraph calls {"
    yield "  node [shape=box];"
    for obj, rva, name in shown.functions:
        label = f"{name}\n{shown.objects[obj].rpartition('/')[2]}+{rva:#x}"
        yield f"  {_id(obj, rva)} [label={_quoted(label)}];"
    for a, b, c, d, kind in shown.edges:
        style = f", style={_STYLES[kind]}" if kind in _STYLES else ""
        yield f"  {_id(a, b)} -> {_id(c, d)} [label={kind}{style}];"
    yield "}"


def _id(obj: int, rva: int) -> str:
    return f"f{obj}_{rva:x}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped) + '"'


def _graphml(shown: Shown) -> str:
    import networkx as nx

    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    for obj, rva, name in shown.functions:
        graph.add_node(_id(obj, rva), object=_printable(shown.objects[obj]), rva=rva, name=_printable(name))
    for a, b, c, d, kind in shown.edges:
        graph.add_edge(_id(a, b), _id(c, d), key=kind, kind=kind)
    return "\n".join(nx.generate_graphml(graph)) + "\n"


def _printable(text: str) -> str:
    """XML has no control characters; a hostile symbol table may."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
