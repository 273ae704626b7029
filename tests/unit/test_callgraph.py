"""The call graph: every way in which one function comes to another, in small programs built here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from click.testing import CliRunner

from fixtures import truth
from fixtures.build import Result, Toolchain, Tree
from forkproof import pipeline, signatures
from forkproof.callgraph import CallGraph, EdgeColumns, EdgeKind, ImportCalls, sorted_graph
from forkproof.cli.graph import Shown, _dot, _graphml, graph_command
from forkproof.elf.image import load
from forkproof.elf.names import FunctionNames
from forkproof.options import ScanOptions
from forkproof.program import Function
from forkproof.tables import with_tables
from tests.support.truths import edge_mismatches

MACHINES = ("x86_64", "aarch64")
#: Where Debian's cross compilers keep the libraries that an aarch64 program would load.
LIBRARIES = {"x86_64": (), "aarch64": ("/usr/aarch64-linux-gnu/lib",)}

Edges = set[tuple[str, str, str]]


def _graph(path: Path, machine: str, **options: Any) -> CallGraph:  # noqa: ANN401 - fields of ScanOptions
    asked = ScanOptions(library_path=(str(path.parent), *LIBRARIES[machine]), **options)
    return pipeline.call_graph(str(path), asked, signatures.load())


def _edges(graph: CallGraph) -> Edges:
    """(caller, callee, kind) by name, of edges that leave the first two objects."""
    program = graph.program
    result = set()
    for source, target, kind in zip(graph.source.tolist(), graph.target.tolist(), graph.kind.tolist(), strict=True):
        if program.object_of(source) < 2:
            result.add((program.name_of(source), program.name_of(target), EdgeKind(kind).name.lower()))
    return result


Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """`build(machine, code, *flags)` compiles a program; the name ends in .cc for C++, and .so gives a library."""

    def compile_(machine: str, code: str, *flags: str, name: str = "program.c", output: str = "program") -> Path:
        source = tmp_path / name
        source.write_text(code)
        toolchain = Toolchain(machine)
        if missing := toolchain.missing(source):
            pytest.skip(f"{missing} is not installed")
        command: list[str | Path] = [toolchain.compiler(source), "-O1", "-fno-inline", "-fno-ipa-sra", source]
        command += ["-o", tmp_path / output]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return tmp_path / output

    return compile_


# ---- the fixtures' own truths ------------------------------------------------------------------


def _with_edges(result: Result, machine: str) -> Iterator[truth.Fixture]:
    for fixture in result.fixtures.values():
        if any(isinstance(fact, truth.Edge) for fact in fixture.facts(machine)):
            yield fixture


@pytest.mark.parametrize("variant", ["O2", "O0"])
@pytest.mark.parametrize("machine", MACHINES)
def test_fixtures_bear_out_their_edges(machine: str, variant: str, built_fixtures: Callable[[str], Result]) -> None:
    """PLT, lazy and now; GOT; CET's .plt.sec; BTI and PAC; fixed base; protected symbols; interposition; IFUNC."""
    result = built_fixtures(machine)
    seen = 0
    for fixture in _with_edges(result, machine):
        if variant == "O2" or variant in fixture.recipe.variants:
            document = _document(result.tree.path(fixture, variant), machine, fixture, result.tree)
            assert edge_mismatches(fixture, machine, document, _namer()) == []
            seen += 1
    assert seen >= 5


def _document(path: Path, machine: str, fixture: truth.Fixture, tree: Tree) -> Mapping[str, Any]:
    arguments = [str(path), *(f"--library-path={place}" for place in LIBRARIES[machine])]
    if preload := fixture.environment(tree.root()).get("LD_PRELOAD"):
        arguments.append(f"--preload={preload}")
    return _command(*arguments)


def _command(*arguments: str) -> dict[str, Any]:
    found = CliRunner().invoke(graph_command, arguments)
    assert found.exit_code in (0, 3), found.output
    document = json.loads(found.stdout)
    assert isinstance(document, dict)
    return document


def _namer() -> Callable[[Path, int], str | None]:
    known: dict[Path, FunctionNames] = {}

    def function_at(path: Path, rva: int) -> str | None:
        if path not in known:
            known[path] = FunctionNames(load(path), str(path))
        return known[path].name(rva)

    return function_at


# ---- callbacks ---------------------------------------------------------------------------------

CALLBACKS = """
#include <pthread.h>
#include <stdlib.h>
static int compare(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }
static void *work(void *p) { return p; }
static void once(void) { }
static void leaving(void) { }
static void destroy(void *p) { free(p); }
static int numbers[4];
static pthread_once_t control = PTHREAD_ONCE_INIT;
static pthread_key_t key;
void sorts(void) { qsort(numbers, 4, sizeof *numbers, compare); }
void starts(void) { pthread_t t; pthread_create(&t, 0, work, 0); pthread_join(t, 0); }
void initialises(void) { pthread_once(&control, once); }
void registers(void) { atexit(leaving); }
void keeps(void) { pthread_key_create(&key, destroy); }
int main(void) { sorts(); starts(); initialises(); registers(); keeps(); return 0; }
"""


@pytest.mark.parametrize(
    ("machine", "flags"),
    [(m, f) for m in MACHINES for f in ((), ("-fno-plt",), ("-O2",), ("-O0",))],
)
def test_callbacks_and_threads(build: Build, machine: str, flags: tuple[str, ...]) -> None:
    edges = _edges(_graph(build(machine, CALLBACKS, "-pthread", *flags), machine))
    assert ("sorts", "compare", "callback") in edges
    assert ("starts", "work", "thread") in edges
    assert ("initialises", "once", "callback") in edges
    assert ("registers", "leaving", "deferred") in edges
    assert ("keeps", "destroy", "deferred") in edges
    taken = {(a, b) for a, b, kind in edges if b in ("compare", "work", "once", "leaving", "destroy")}
    assert len(taken) == 5, "and by nobody else"


@pytest.mark.parametrize("machine", MACHINES)
def test_callback_of_another_call_is_not_taken_for_this_one(build: Build, machine: str) -> None:
    code = """
    #include <stdlib.h>
    extern void use(void *);
    static int compare(const void *a, const void *b) { return a != b; }
    int (*chosen)(const void *, const void *);
    void sorts(int *n, int (*how)(const void *, const void *)) { use(compare); qsort(n, 4, 4, how); }
    """
    path = build(machine, code, "-shared", "-fPIC", output="libx.so")
    assert not {e for e in _edges(_graph(path, machine)) if e[1] == "compare"}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("between", "found"),
    [
        ("", {("starts", "work", "thread")}),
        ("count += puts(text);", set()),  # which may change every register
        ("work((void *)text);", {("starts", "work", "thread")}),
        ("if (count) other();", set()),
    ],
)
def test_an_argument_that_a_call_leaves_alone(build: Build, machine: str, between: str, found: Edges) -> None:
    """Compilers put it there before such a call: GCC's -fipa-ra."""
    lea, call = {
        "x86_64": ("lea work(%%rip), %%rdx", "call set; call pthread_create@PLT"),
        "aarch64": ("adrp x2, work; add x2, x2, :lo12:work", "bl set; bl pthread_create"),
    }[machine]
    code = f"""
    #include <stdio.h>
    int count; extern void other(void);
    __attribute__((noinline, used)) static void *work(void *p) {{ __asm__ volatile("" : : "r"(p)); return p; }}
    __attribute__((noinline, used)) static int set(const char *text) {{ {between} return text[0]; }}
    void starts(void) {{ __asm__ volatile("{lea}; {call}" : : : "memory"); }}
    """
    path = build(machine, code, "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-optimize-sibling-calls")
    assert {e for e in _edges(_graph(path, machine)) if e[1] == "work" and e[2] == "thread"} == found


# ---- tail calls, cold parts, tables ------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_tail_calls_and_cold_parts(build: Build, machine: str) -> None:
    """GCC splits cold parts off on x86-64 only."""
    code = """
    __attribute__((noinline)) int target(int n) { __asm__ volatile(""); return n; }
    int tail(int n) { return target(n + 1); }
    extern void give_up(int) __attribute__((noreturn, cold));
    extern int *where;
    int split(int n) { if (__builtin_expect(n == 42, 0)) { *where = 1; give_up(n); } return n + *where; }
    """
    path = build(machine, code, "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-freorder-functions", output="l.so")
    edges = _edges(_graph(path, machine))
    assert ("tail", "target", "jump") in edges
    assert machine != "x86_64" or ("split", "split.cold", "jump") in edges


@pytest.mark.parametrize("machine", MACHINES)
def test_tables_of_functions_are_edges_of_their_own_kind(build: Build, machine: str) -> None:
    code = """
    static int first(int n) { return n; }
    static int second(int n) { return n + 1; }
    static int (*const table[])(int) = { first, second };
    int dispatch(int which, int n) { return table[which](n); }
    int other(int n) { return n; }
    """
    path = build(machine, code, "-shared", "-fPIC", output="libtable.so")
    graph = _graph(path, machine)
    assert not {e for e in _edges(graph) if e[2] == "table"}
    edges = _edges(with_tables(graph))
    assert {e for e in edges if e[2] == "table" and e[0] == "dispatch"} == {
        ("dispatch", "first", "table"),
        ("dispatch", "second", "table"),
    }
    assert not {e for e in edges if e[0] == "other"}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("visibility", ["-fvisibility=hidden", "-fvisibility=default"])
def test_constructor_leads_to_the_virtual_functions_of_its_class(build: Build, machine: str, visibility: str) -> None:
    code = """
    struct Base { virtual int act(int n); virtual ~Base(); };
    struct Derived : Base { int act(int n) override; };
    int Base::act(int n) { return n; }
    Base::~Base() {}
    int Derived::act(int n) { return n + 1; }
    Base *make() { return new Derived; }
    int use(Base *base) { return base->act(1); }
    """
    path = build(machine, code, "-shared", "-fPIC", visibility, name="v.cc", output="libv.so")
    graph = with_tables(_graph(path, machine))
    made = {e[:2] for e in _edges(graph) if e[2] == "table"}
    assert any(
        caller in ("_Z4makev", "_ZN7DerivedC2Ev", "_ZN7DerivedC1Ev") for caller, b in made if b == "_ZN7Derived3actEi"
    )
    use = graph.program.called(["_Z3useP4Base"])
    (function,) = use
    obj = graph.program.object_of(function)
    index = graph.program.codes[obj].function_starting(graph.program.rva_of(function))
    assert graph.program.codes[obj].unknown_calls[index] == 1, "base->act() is counted as unknown"


_POOL = """
#include <functional>
#include <thread>
#include <vector>
struct Pool { std::vector<std::function<void(int)>> jobs; void run(); };
struct Table { void *first, *second; void (*ask)(Table *, Table *, int); void (*act)(Table *, int); } *table;
void work(int); void rest(int); void drop(int);
static std::function<void(int)> kept;
static void asks(Table *to, Table *, int n) { if (n == 0) to->first = table; else if (n == 1) to->second = nullptr; }
static void acts(Table *, int n) { drop(n); }
void Pool::run() { for (auto &job : jobs) job(1); kept(2); }
int main(int count, char **) {
    static Pool pool;
    pool.jobs.emplace_back([](int n) { work(n); });
    kept = [count](int n) { rest(n + count); };
    @TABLE
    std::thread(&Pool::run, &pool).join();
}
void work(int n) { kept = nullptr; }  void rest(int n) { kept = nullptr; }  void drop(int n) { kept = nullptr; }
"""


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flags", [("-O2", "-finline"), ("-O2", "-finline", "-fno-pie", "-no-pie", "-s")])
@pytest.mark.parametrize(
    ("also", "expected"),
    [
        ("", 2),
        # What looks like a manager, stored where no invoker is.
        ("table = new Table; table->ask = asks; table->first = (void *)acts;", 2),
    ],
)
def test_what_a_thread_calls_in_function_objects(
    build: Build, machine: str, flags: tuple[str, ...], also: str, expected: int
) -> None:
    path = build(machine, _POOL.replace("@TABLE", also), "-pthread", *flags, name="pool.cc")
    graph = _graph(path, machine)
    starts = set(graph.target[graph.kind == EdgeKind.THREAD].tolist())
    called = graph.kind == EdgeKind.FIELD
    run = set(graph.source[called].tolist())
    assert len(set(graph.target[called].tolist())) == expected
    assert len(run & starts) == 1, "a pointer to a member function begins the thread"


_TASK = """
struct Task { virtual ~Task(); virtual int run() = 0; };
struct Other { virtual int act(); virtual int more(); virtual int third(); };
void keep(Task *); void start();
"""


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flags", [(), ("-fno-rtti",), ("-s",)])
def test_virtual_call_of_a_thread(build: Build, machine: str, flags: tuple[str, ...]) -> None:
    library = build(
        machine,
        f"""{_TASK}
        #include <thread>
        struct Waiting : Task {{ int run() override; }};
        int Waiting::run() {{ return 1; }}
        Task *kept;
        Task::~Task() {{}}
        void keep(Task *task) {{ kept = task; }}
        static void loop() {{ while (kept->run()) {{}} }}
        void start() {{ keep(new Waiting); std::thread(loop).detach(); }}""",
        "-shared",
        "-fPIC",
        "-pthread",
        "-O2",
        "-finline",
        *flags,
        name="tasks.cc",
        output="libtasks.so",
    )
    code = f"""{_TASK}
        struct Writing : Task {{ int run() override; }};
        int Writing::run() {{ return 2; }}
        int Other::act() {{ return 3; }} int Other::more() {{ return 4; }} int Other::third() {{ return 5; }}
        Other *other;
        int main() {{ other = new Other; keep(new Writing); start(); return other->act(); }}"""
    graph = _graph(build(machine, code, str(library), *flags[:1], name="main.cc"), machine)
    called = np.flatnonzero(graph.kind == EdgeKind.DYNAMIC)
    assert {graph.program.object_of(f) for f in graph.source[called].tolist()} == {_object(graph, "libtasks.so")}
    owners = sorted(graph.program.object_of(f) for f in set(graph.target[called].tolist()))
    library_number = _object(graph, "libtasks.so")
    # Without descriptions nothing tells that a class of the program is derived from the library's, nor that the object
    # of std::thread is derived from the runtime's.
    expected = [library_number, library_number] if flags == ("-fno-rtti",) else [0, library_number]
    assert owners == expected


def _object(graph: CallGraph, name: str) -> int:
    return next(i for i, o in enumerate(graph.program.closure.objects) if o.path.endswith(name))


# ---- binding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_preloaded_definition_takes_the_calls(build: Build, machine: str) -> None:
    library = build(machine, "int f(void) { return 1; }", "-shared", "-fPIC", name="a.c", output="liba.so")
    own = build(machine, "int f(void) { return 2; }", "-shared", "-fPIC", name="b.c", output="libb.so")
    program = build(machine, "extern int f(void); int main(void) { return f(); }", str(library))

    def object_called(graph: CallGraph) -> set[str]:
        ours = graph.program
        found = [
            ours.closure.objects[ours.object_of(t)].name
            for s, t in zip(graph.source.tolist(), graph.target.tolist(), strict=True)
            if ours.object_of(s) == 0 and ours.name_of(t) == "f"
        ]
        return set(found)

    assert object_called(_graph(program, machine)) == {"liba.so"}
    assert {Path(n).name for n in object_called(_graph(program, machine, preload=(str(own),)))} == {"libb.so"}


@pytest.mark.parametrize("machine", MACHINES)
def test_weak_reference_to_nothing_is_an_import_without_target(build: Build, machine: str) -> None:
    code = "extern void absent(void) __attribute__((weak)); int main(void) { if (absent) absent(); return 0; }"
    graph = _graph(build(machine, code, "-fPIC"), machine)
    calls = graph.imports
    image = graph.program.image(0)
    named = {
        image.dynamic_symbols.names[symbol]: target
        for obj, symbol, target in zip(calls.object.tolist(), calls.symbol.tolist(), calls.target.tolist(), strict=True)
        if obj == 0
    }
    assert named["absent"] == -1


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("how", ["-static", "-static-pie"])
def test_static_program(build: Build, machine: str, how: str) -> None:
    """No PLT but for IFUNCs; libc's functions are the program's own."""
    code = """
    #include <string.h>
    #include <unistd.h>
    char a[64], b[64];
    int forks(void) { return fork(); }
    int main(int n, char **v) { memcpy(a, v[0], n); return forks() + a[n]; }
    """
    edges = _edges(_graph(build(machine, code, how, "-fno-builtin"), machine))
    assert {("main", "forks", "direct"), ("main", "memcpy", "plt")} <= edges
    assert {callee for caller, callee, _ in edges if caller == "forks"} & {"fork", "__libc_fork", "__fork"}
    chosen = {b for a, b, kind in edges if a == "memcpy" and kind == "ifunc"}
    assert any("memcpy" in name or "memmove" in name for name in chosen)


# ---- searches ----------------------------------------------------------------------------------


def _chain(build: Build) -> CallGraph:
    code = """
    void d(void) { __asm__ volatile(""); }
    void c(void) { d(); __asm__ volatile(""); }
    void b(void) { c(); __asm__ volatile(""); }
    void a(void) { b(); c(); __asm__ volatile(""); }
    """
    return _graph(build("x86_64", code, "-shared", "-fPIC", "-fvisibility=hidden", output="libchain.so"), "x86_64")


def test_distances_and_paths(build: Build) -> None:
    graph = _chain(build)
    functions = {name: function for function, name in graph.program.called("abcd").items()}
    forward = graph.distances([functions["a"]])
    assert [int(forward[functions[name]]) for name in "abcd"] == [0, 1, 1, 2]
    backward = graph.distances([functions["d"]], backward=True)
    assert [int(backward[functions[name]]) for name in "abcd"] == [2, 2, 1, 0]
    path = graph.path(functions["a"], backward)
    assert path is not None
    assert [graph.program.name_of(graph.target[edge]) for edge in path] == ["c", "d"]
    blocked = graph.distances([functions["a"]], blocked=[functions["c"]])
    assert int(blocked[functions["d"]]) == -1
    assert int(blocked[functions["c"]]) == -1
    jumps_only = graph.distances([functions["a"]], kinds=[EdgeKind.JUMP])
    assert int(jumps_only[functions["b"]]) == -1


def test_a_search_ends_with_the_nearest_function_that_it_is_for(build: Build) -> None:
    graph = _chain(build)
    a, b, c, d = sorted(graph.program.called("abcd"), key=graph.program.name_of)
    found = graph.distances([d], backward=True, until=[c, a])
    assert [int(found[f]) for f in (a, b, c, d)] == [-1, -1, 1, 0]
    assert [int(found[f]) for f in (a, c) for found in [graph.distances([d], backward=True, until=[a])]] == [2, 1]
    assert int(graph.distances([d], backward=True, until=[d])[c]) == -1


@pytest.mark.parametrize("backward", [False, True])
def test_no_way_leads_along_an_edge_that_is_left_out(build: Build, backward: bool) -> None:
    graph = _chain(build)
    a, b, c, d = sorted(graph.program.called("abcd"), key=graph.program.name_of)
    (straight,) = (e for e in graph.edges_from(a) if graph.target[e] == c)
    found = graph.distances([d if backward else a], backward=backward, without=[straight])
    assert [int(found[f]) for f in (a, b, c, d)] == ([3, 2, 1, 0] if backward else [0, 1, 2, 3])
    whole = graph.distances([d if backward else a], backward=backward)
    assert [int(whole[f]) for f in (a, b, c, d)] == ([2, 2, 1, 0] if backward else [0, 1, 1, 2])


# ---- the command -------------------------------------------------------------------------------


def test_command_gives_sorted_unique_edges(build: Build) -> None:
    path = build("x86_64", CALLBACKS, "-pthread")
    document = _command(str(path))
    assert document["objects"][0] == str(path)
    assert document["edges"] == sorted(document["edges"])
    assert len({tuple(edge) for edge in document["edges"]}) == len(document["edges"])
    assert {kind for *_, kind in document["edges"]} <= {kind.name.lower() for kind in EdgeKind}
    assert all(count > 0 for *_, count in document["unknown_calls"])
    assert document == _command(str(path))


def test_command_shows_what_is_near_a_function(build: Build) -> None:
    path = build("x86_64", CALLBACKS, "-pthread")
    names = {name for *_, name in _command(str(path), "--function", "sorts", "--depth", "1")["functions"]}
    assert {"main", "sorts", "compare", "qsort"} <= names
    assert "starts" not in names
    callers = {name for *_, name in _command(str(path), "--function", "compare", "--reverse")["functions"]}
    assert {"main", "sorts", "compare"} <= callers
    assert "qsort" not in callers
    alone = _command(str(path), "--function", "sorts", "--depth", "0")
    assert ([name for *_, name in alone["functions"]], alone["edges"]) == (["sorts"], [])


def test_command_knows_nameless_functions(build: Build) -> None:
    path = build("x86_64", CALLBACKS, "-pthread")
    rva = next(rva for obj, rva, name in _command(str(path), "--function", "sorts")["functions"] if name == "sorts")
    document = _command(str(path), "--function", f"sub_{rva:x}", "--depth", "0")
    assert [0, rva, "sorts"] in document["functions"]


@pytest.mark.parametrize("arguments", [("--function", "nobody"), ("--depth", "2"), ("--reverse",)])
def test_command_refuses(build: Build, arguments: tuple[str, ...]) -> None:
    path = build("x86_64", "int main(void) { return 0; }")
    found = CliRunner().invoke(graph_command, [str(path), *arguments])
    assert found.exit_code != 0


def test_dot_and_graphml_can_be_read(build: Build, tmp_path: Path) -> None:
    path = build("x86_64", "int odd(void) { return 1; } int main(void) { return odd(); }")
    arguments = [str(path), "--function", "main", "--depth", "1"]
    dot = CliRunner().invoke(graph_command, [*arguments, "--format", "dot"])
    assert dot.exit_code == 0
    assert '[label="odd\\nprogram+0x' in dot.output
    place = tmp_path / "graph.xml"
    written = CliRunner().invoke(graph_command, [*arguments, "--format", "graphml", "--output", str(place)])
    assert written.exit_code == 0
    graph = nx.read_graphml(place)
    assert {data["name"] for _, data in graph.nodes(data=True)} >= {"main", "odd"}
    assert "direct" in {data["kind"] for _, _, data in graph.edges(data=True)}


def test_names_of_a_hostile_symbol_table_are_quoted() -> None:
    shown = Shown(("/a\\b",), [(0, 1, 0, 1, "direct")], ((0, 1, 'we"ird\n\x01'),), [], ())
    assert '[label="we\\"ird\\n\\x01\\na\\\\b+0x1"];' in _dot(shown)
    assert "\x01" not in _graphml(shown)


@pytest.mark.parametrize("few", [1, 2, 40, 300])
def test_a_graph_with_more_edges_is_the_one_that_is_sorted_anew(few: int) -> None:
    """Edges of one site, of one target, and before the first and after the last function among them."""
    random, functions = np.random.default_rng(few), 30
    program: Any = SimpleNamespace(base=np.array([0, functions]))
    nothing = np.zeros(0, np.int64)

    def edges(count: int) -> EdgeColumns:
        source, target, site = (random.integers(0, high, count) for high in (functions, functions, 8))
        return source, target, site, random.integers(0, 4, count).astype(np.uint8)

    parts, imports = [edges(200), edges(50)], ImportCalls(nothing, nothing, nothing, nothing, nothing)
    more = [edges(few), edges(1)]
    grown = sorted_graph(program, parts, imports).grown(more)
    expected = sorted_graph(program, parts + more, imports)
    for name in ("source", "target", "site", "kind"):
        assert getattr(grown, name).tolist() == getattr(expected, name).tolist(), name
        assert getattr(grown, name).dtype == getattr(expected, name).dtype, name
    for function in map(Function, range(functions)):
        assert grown.edges_from(function) == expected.edges_from(function)
        assert grown.edges_to(function) == expected.edges_to(function)
        for backward in (False, True):
            far, near = (graph.distances([function], backward=backward).tolist() for graph in (grown, expected))
            assert far == near
