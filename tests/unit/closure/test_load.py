"""Which objects, in which order: the walk, preloads, the interpreter, dlopen and constructors, on fakes."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest

from forkproof.closure import Closure, DirectorySysroot, Libc, LoadRequest, load
from forkproof.closure.notes import MayOpen, announced
from forkproof.closure.order import glibc_order, initfirst, musl_order
from forkproof.elf.image import Rva, Section
from forkproof.errors import NotElf, UnsupportedElf
from tests.unit.closure.memory import LD_SO, MemorySysroot, fake_image

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.closure.conftest import Compiler

P = "/usr/bin/p"


def _world(**needed: str) -> MemorySysroot:
    """A program `p` and libraries, each with what it needs: _world(p="a b", a="c")."""
    root = MemorySysroot()
    for name, names in needed.items():
        libraries = [LD_SO.rpartition("/")[2] if other == "ld" else f"lib{other}.so" for other in names.split()]
        if name == "p":
            root.add_program(P, *libraries)
        else:
            root.add_library(f"/lib/lib{name}.so", *libraries)
    return root


def _order(closure: Closure) -> str:
    """Load order in the letters of `_world`."""
    return " ".join(_short(item.path) for item in closure.objects)


def _short(path: str) -> str:
    return (
        "p" if path == P else "ld" if path == LD_SO else path.rpartition("/")[2].removeprefix("lib").removesuffix(".so")
    )


def _init(closure: Closure) -> str:
    return " ".join(_short(closure.objects[index].path) for index in closure.init_order)


def test_order_is_breadth_first() -> None:
    assert _order(_world(p="a b", a="c d", b="e", c="", d="", e="").load(P)) == "p a b c d e ld"


def test_interpreter_stands_where_it_is_first_needed() -> None:
    closure = _world(p="a b", a="ld", b="c", c="").load(P)
    assert _order(closure) == "p a b ld c"
    assert closure.global_scope == (0, 1, 2, 3, 4)


def test_interpreter_that_nobody_needs_is_last_and_out_of_scope() -> None:
    closure = _world(p="a", a="").load(P)
    assert _order(closure) == "p a ld"
    assert closure.global_scope == (0, 1)


def test_cycles_and_repeats_load_once() -> None:
    closure = _world(p="a b", a="b p2", b="a", p2="a").load(P)
    assert _order(closure) == "p a b p2 ld"
    assert closure.objects[1].needed == (2, 3)


def test_preloads_come_first_and_only_once() -> None:
    root = _world(p="a b", a="", b="", x="y", y="")
    closure = root.load(P, preload=("libx.so:libb.so", "libx.so"))
    assert _order(closure) == "p x b a y ld"
    assert closure.objects[1].why == "preload (LD_PRELOAD) (built-in directory)"


def test_preload_file_comes_after_the_environment() -> None:
    root = _world(p="a", a="", x="", y="")
    root.files["/etc/ld.so.preload"] = b"# comment\nlibx.so # more\n"
    assert _order(root.load(P, preload=("liby.so",))) == "p y x a ld"


def test_preload_that_cannot_be_loaded_is_a_diagnostic() -> None:
    """ "object ... cannot be preloaded ... ignored." """
    closure = _world(p="a", a="").load(P, preload=("libgone.so",))
    assert closure.missing == ()
    assert [(d.level, d.object) for d in closure.diagnostics if "preload" in d.message] == [("error", "libgone.so")]


def test_missing_library_is_listed_once_with_all_who_need_it() -> None:
    closure = _world(p="gone a", a="gone").load(P)
    assert [(item.name, item.needed_by) for item in closure.missing] == [("libgone.so", (P, "/lib/liba.so"))]
    assert _order(closure) == "p a ld"


def test_one_file_under_two_names_is_one_object() -> None:
    root = _world(p="a b", a="")
    root.links["/lib/libb.so"] = "/lib/liba.so"
    assert _order(root.load(P)) == "p a ld"


def test_soname_answers_for_a_library_loaded_under_another_name() -> None:
    root = _world(p="b")
    root.add("/lib/libb.so", "libreal.so", soname="libreal.so")
    assert _order(root.load(P)) == "p b ld"


def test_libraries_opened_later_follow_all_others() -> None:
    root = _world(p="a", a="", x="y a", y="")
    closure = root.load(P, also=("libx.so",))
    assert _order(closure) == "p a ld x y"
    assert [item.is_startup for item in closure.objects] == [True, True, True, False, False]
    assert _init(closure) == "ld a p y x"
    assert closure.objects[3].why.startswith("dlopen (")


def test_library_that_cannot_be_opened_later_is_missing() -> None:
    assert [item.name for item in _world(p="").load(P, also=("libgone.so",)).missing] == ["libgone.so"]


def test_interpreter_that_does_not_exist_is_missing() -> None:
    root = MemorySysroot()
    root.add(P, interpreter="/lib64/ld-nowhere.so.2")
    assert [item.name for item in root.load(P).missing] == ["/lib64/ld-nowhere.so.2"]


def test_interpreter_of_a_merged_usr_package_is_found_below_usr() -> None:
    root = MemorySysroot()
    root.add(P, interpreter=LD_SO)
    root.add_library(f"/usr{LD_SO}")
    closure = root.load(P)
    assert closure.missing == ()
    assert closure.objects[1].path == LD_SO
    assert any("merged /usr" in d.message for d in closure.diagnostics)


def test_library_as_target_gets_the_usual_interpreter() -> None:
    root = _world(p="", a="b ld", b="")
    closure = root.load("/lib/liba.so")
    assert [item.path for item in closure.objects] == ["/lib/liba.so", "/lib/libb.so", LD_SO]
    assert closure.objects[2].why == "interpreter assumed for a library"


def test_filters_are_not_followed_but_named() -> None:
    root = MemorySysroot()
    root.add_program(P, "liba.so")
    root.add_library("/lib/liba.so", dynamic={0x7FFFFFFF: 1})
    assert any("filter" in d.message for d in root.load(P).diagnostics)


# ---- constructors -----------------------------------------------------------------------------------


def test_dependencies_are_initialised_first_and_ties_fall_to_the_later_loaded() -> None:
    assert _init(_world(p="a b", a="c", b="c", c="").load(P)) == "ld c b a p"
    assert _init(_world(p="a b", a="b", b="").load(P)) == "ld b a p"


def test_cycle_is_entered_at_the_object_loaded_last() -> None:
    assert glibc_order([0, 1, 2], {0: [1], 1: [2], 2: [1]}, 0) == (1, 2, 0)


def test_root_stays_last_even_when_a_dependency_needs_it() -> None:
    assert glibc_order([0, 1], {0: [1], 1: [0]}, 0) == (1, 0)


def test_musl_initialises_in_the_order_of_needed() -> None:
    assert musl_order(0, {0: [1, 2], 1: [3], 2: [3], 3: []}) == (3, 1, 2, 0)


def test_initfirst_goes_before_what_it_needs_and_the_last_of_them_wins() -> None:
    assert initfirst((3, 2, 1, 0), []) == (3, 2, 1, 0)
    assert initfirst((3, 2, 1, 0), [1]) == (1, 3, 2, 0)
    assert initfirst((3, 2, 1, 0), [1, 2]) == (2, 3, 1, 0)


def test_long_chain_does_not_exhaust_the_stack() -> None:
    length = 20_000
    chain = {n: [n + 1] for n in range(length)} | {length: []}
    assert glibc_order(range(length + 1), chain, 0)[0] == length


# ---- notes ------------------------------------------------------------------------------------------


def _note(document: object, kind: int = 0x407C0C0A) -> bytes:
    text = json.dumps(document).encode() + b"\0"
    padded = text + b"\0" * (-len(text) % 4)
    return struct.pack("<III", 4, len(text), kind) + b"FDO\0" + padded


def test_dlopen_notes_are_read() -> None:
    image = fake_image(
        "/lib/liba.so", data=_note([{"soname": ["libx.so.2", "libx.so.1"], "feature": "x"}]) + _note([], 1)
    )
    section = Section(".note.dlopen", Rva(0), 0, len(image.data), executable=False, allocated=True, has_bits=True)
    object.__setattr__(image, "sections", (section,))
    assert announced(image) == (MayOpen(("libx.so.2", "libx.so.1"), "x", "recommended"),)


@pytest.mark.parametrize("document", ["text", {"soname": []}, [{"soname": "libx.so"}], [3], [{"soname": [1]}]])
def test_dlopen_notes_that_are_not_as_specified_are_passed_over(document: object) -> None:
    image = fake_image("/lib/liba.so", data=_note(document))
    section = Section(".note.dlopen", Rva(0), 0, len(image.data), executable=False, allocated=True, has_bits=True)
    object.__setattr__(image, "sections", (section,))
    assert announced(image) == ()


# ---- real files -------------------------------------------------------------------------------------


def test_static_program_is_alone(gcc: Compiler) -> None:
    for flag in ("-static", "-static-pie"):
        program = gcc.program(f"p{flag}", "int main() { return 0; }", flag)
        closure = load(LoadRequest(DirectorySysroot("/"), str(program), preload=("libm.so.6",)))
        assert closure.libc is Libc.NONE
        assert len(closure.objects) == 1
        assert any("static" in d.message for d in closure.diagnostics)


def test_core_file_is_refused_with_advice(gcc: Compiler) -> None:
    program = gcc.program("p", "int main() { return 0; }")
    core = bytearray(program.read_bytes())
    core[16] = 4
    path = gcc.directory / "core"
    path.write_bytes(core)
    with pytest.raises(UnsupportedElf, match="core file") as caught:
        load(LoadRequest(DirectorySysroot("/"), str(path)))
    assert "program that dumped it" in caught.value.next_step


def test_script_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(NotElf):
        load(LoadRequest(DirectorySysroot("/"), str(script)))
