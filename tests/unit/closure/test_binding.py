"""The rules of symbol lookup, each on objects of a few lines, each also put to the host's ld.so.

A test names the rule, states what must come out, and then asks ld.so whether that is what it does.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forkproof.closure import Bindings, Closure, DirectorySysroot, Libc, LoadRequest, TypeClass, load
from forkproof.elf.tables import STB_UNIQUE
from tests.unit.closure.ld_so import Case, ask, bound_by, columns_differ, differences

if TYPE_CHECKING:
    from tests.unit.closure.conftest import Compiler

HERE = ("-L.", "-Wl,-rpath,$ORIGIN")


def _load(program: Path, *preload: str, also: tuple[str, ...] = ()) -> Closure:
    closure = load(LoadRequest(DirectorySysroot("/"), str(program), preload=preload, also=also))
    assert columns_differ(closure) == []  # whatever a test here asks of `resolve` holds of `resolve_all`, too
    return closure


def _target(closure: Closure, source: str, symbol: str, type_class: TypeClass | None = None) -> str | None:
    """Name of the object to which a reference of `source` binds."""
    item = closure.find(source)
    assert item is not None
    for reference in Bindings(closure).of(item.index):
        if reference.name == symbol and type_class in (None, reference.type_class):
            return None if reference.binding is None else closure.objects[reference.binding.object].name
    raise AssertionError(f"{source} does not refer to {symbol}")


def _agrees(program: Path, *preload: str) -> None:
    assert differences(Case(str(program), preload)) == []


def test_first_object_in_load_order_wins(gcc: Compiler) -> None:
    """dl-lookup.c: the scope is searched in order and the first definition ends the search."""
    gcc.library("libone.so", "int f(void) { return 1; }")
    gcc.library("libtwo.so", "int f(void) { return 2; } int g(void) { return f(); }")
    program = gcc.program("p", "int f(), g(); int main() { return f() + g(); }", *HERE, "-lone", "-ltwo")
    closure = _load(program)
    assert _target(closure, "p", "f") == "libone.so"
    assert _target(closure, "libtwo.so", "f") == "libone.so"
    _agrees(program)


def test_preload_comes_before_what_is_needed(gcc: Compiler) -> None:
    """ld.so(8), LD_PRELOAD: "used to selectively override functions in other shared objects"."""
    gcc.library("libone.so", "int f(void) { return 1; }")
    over = gcc.library("libover.so", "int f(void) { return 9; }")
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lone")
    assert _target(_load(program, str(over)), "p", "f") == "libover.so"
    _agrees(program, str(over))


def test_weak_definition_is_as_good_as_a_strong_one(gcc: Compiler) -> None:
    """Without LD_DYNAMIC_WEAK, do_lookup_x takes STB_WEAK like STB_GLOBAL."""
    gcc.library("libweak.so", "__attribute__((weak)) int f(void) { return 1; }")
    gcc.library("libstrong.so", "int f(void) { return 2; }")
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lweak", "-lstrong")
    assert _target(_load(program), "p", "f") == "libweak.so"
    _agrees(program)


def test_weak_reference_to_nothing_is_null_and_strong_one_is_reported(gcc: Compiler) -> None:
    code = "int w() __attribute__((weak)); int s(); int g() { return (w ? w() : 0) + s(); }"
    gcc.library("lib.so", code)
    program = gcc.program("p", "int g(); int main() { return g(); }", *HERE, "-l:lib.so", "-Wl,-z,lazy")
    closure = _load(program)
    unresolved = Bindings(closure).unresolved
    assert _target(closure, "lib.so", "w") is None
    assert [reference.name for reference in unresolved] == ["s"]


def test_symbolic_object_prefers_its_own_definition(gcc: Compiler) -> None:
    """ld(1), -Bsymbolic: "bind references to global symbols to the definition within the shared library"."""
    gcc.library("libsym.so", "int v = 1; int *g(void) { return &v; }", "-Wl,-Bsymbolic", "-Wl,-z,nocombreloc")
    gcc.library("libplain.so", "int v = 1; int *h(void) { return &v; }")
    code = "int v = 5; int *g(), *h(); int main() { return *g() + *h(); }"
    program = gcc.program("p", code, *HERE, "-lsym", "-lplain", "-rdynamic")
    assert _target(_load(program), "libplain.so", "v") == "p"
    _agrees(program)


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
def test_both_hash_tables_are_read(gcc: Compiler, style: str) -> None:
    gcc.library("libone.so", "int f(void) { return 1; } int unused(void);", f"-Wl,--hash-style={style}")
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lone")
    assert _target(_load(program), "p", "f") == "libone.so"
    _agrees(program)


def test_protected_symbol_keeps_its_own_definition(gcc: Compiler) -> None:
    """_dl_lookup_symbol_x: "protected" overrides what the scope would give, for the object itself only."""
    code = '__attribute__((visibility("protected"))) int f(void) { return 1; } int (*p)(void) = f;'
    gcc.library("libprot.so", code)
    gcc.library("libuser.so", "int f(); int g() { return f(); }")
    over = gcc.library("libover.so", "int f(void) { return 9; }")
    program = gcc.program("p", "int g(); int main() { return g(); }", *HERE, "-luser", "-lprot")
    closure = _load(program, str(over))
    assert _target(closure, "libuser.so", "f") == "libover.so"
    _agrees(program, str(over))


def test_copy_relocation_asks_the_library_and_the_rest_asks_the_copy(gcc: Compiler) -> None:
    """do_lookup_x: "Don't search the executable when resolving a copy reloc"."""
    gcc.library("libvar.so", "int v = 7; int *where(void) { return &v; }")
    code = "extern int v; int *where(); int main() { return v + *where(); }"
    program = gcc.program("p", code, *HERE, "-lvar", "-no-pie", "-fno-pie")
    closure = _load(program)
    assert _target(closure, "p", "v", TypeClass.COPY) == "libvar.so"
    assert _target(closure, "libvar.so", "v") == "p"
    _agrees(program)


def test_plt_address_of_the_program_counts_for_data_but_not_for_calls(gcc: Compiler) -> None:
    """check_match: with ELF_RTYPE_CLASS_PLT an undefined symbol with a value is no definition."""
    gcc.library("libfun.so", "int f(void) { return 1; } int (*pointer)(void) = f;")
    code = "int f(void); extern int (*pointer)(void); int main() { return (f == pointer) + f(); }"
    program = gcc.program("p", code, *HERE, "-lfun", "-no-pie", "-fno-pie", "-fno-plt", "-mno-direct-extern-access")
    _agrees(program)
    program = gcc.program("q", code, *HERE, "-lfun", "-no-pie", "-fno-pie")
    closure = _load(program)
    assert _target(closure, "libfun.so", "f") == "q"
    assert _target(closure, "q", "f", TypeClass.PLT) == "libfun.so"
    _agrees(program)


VERSIONS = "V1 { global: f; local: *; }; V2 { global: f; } V1; V3 { global: f; } V2;"
VERSIONED = """
__asm__(".symver f1,f@V1"); __asm__(".symver f2,f@V2"); __asm__(".symver f3,f@@V3");
int f1(void) { return 1; } int f2(void) { return 2; } int f3(void) { return 3; }
"""


def _versioned(gcc: Compiler, name: str = "libver.so", code: str = VERSIONED, script: str = VERSIONS) -> Path:
    (gcc.directory / "map").write_text(script)
    return gcc.library(name, code, "-Wl,--version-script=map")


def _rva(closure: Closure, source: str, symbol: str) -> int:
    item = closure.find(source)
    assert item is not None
    reference = next(r for r in Bindings(closure).of(item.index) if r.name == symbol)
    assert reference.binding is not None
    return reference.binding.rva


def test_versioned_reference_takes_its_version_even_when_hidden(gcc: Compiler) -> None:
    _versioned(gcc)
    code = '__asm__(".symver f,f@V2"); int f(); int main() { return f(); }'
    program = gcc.program("p", code, *HERE, "-lver")
    closure = _load(program)
    library = closure.find("libver.so")
    assert library is not None
    names = {library.image.versions.name(library.image.dynamic_symbols.version_index[i]): i  # type: ignore[index]
             for i in library.image.dynamic_symbols.by_name["f"]}  # fmt: skip
    assert _rva(closure, "p", "f") == library.image.dynamic_symbols.value[names["V2"]]
    _agrees(program)


def test_unversioned_reference_takes_the_first_version_even_when_hidden(gcc: Compiler) -> None:
    """check_match: "the oldest (default) version should be used". So x86-64's pthread_atfork is found."""
    gcc.library("libver.so", "int f(void) { return 0; }")
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lver")
    first = _versioned(gcc)
    closure = _load(program)
    symbols = load(LoadRequest(DirectorySysroot("/"), str(first))).program.image.dynamic_symbols
    first_index = next(i for i in symbols.by_name["f"] if symbols.version_index[i] & 0x7FFF == 2)  # type: ignore[index]
    assert _rva(closure, "p", "f") == symbols.value[first_index]
    _agrees(program)


def test_unversioned_reference_takes_a_later_version_only_when_it_is_the_only_visible_one(gcc: Compiler) -> None:
    """do_lookup_x: "we still accept this symbol since there are no possible ambiguities"."""
    gcc.library("libver.so", "int f(void) { return 0; } int g(void) { return 0; }")
    gcc.library("libafter.so", "int g(void) { return 0; }")
    program = gcc.program("p", "int f(), g(); int main() { return f() + g(); }", *HERE, "-lver", "-lafter")
    code = '__asm__(".symver f2,f@@V2"); __asm__(".symver g2,g@V2"); int f2() { return 2; } int g2() { return 2; }'
    _versioned(gcc, code=code, script="V1 { local: *; }; V2 { global: f; g; } V1;")
    closure = _load(program)
    assert _target(closure, "p", "f") == "libver.so"
    assert _target(closure, "p", "g") == "libafter.so"
    _agrees(program)


def test_versioned_reference_accepts_an_object_without_versions(gcc: Compiler) -> None:
    """Interposition: malloc@GLIBC_2.2.5 is satisfied by an allocator that knows no versions."""
    over = gcc.library("libover.so", "int f(void) { return 9; }")
    _versioned(gcc)
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lver")
    assert _target(_load(program, str(over)), "p", "f") == "libover.so"
    _agrees(program, str(over))


def test_versioned_reference_passes_over_another_version(gcc: Compiler) -> None:
    _versioned(gcc)
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lver")
    other = _versioned(
        gcc, "libother.so", '__asm__(".symver f9,f@@OTHER"); int f9() { return 9; }', "OTHER { global: f; local: *; };"
    )
    assert _target(_load(program, str(other)), "p", "f") == "libver.so"
    _agrees(program, str(other))


def test_missing_version_is_an_error(gcc: Compiler) -> None:
    """dl-version.c: "version `V3' not found (required by p)" stops the program."""
    _versioned(gcc)
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lver")
    _versioned(gcc, code='__asm__(".symver f1,f@@V1"); int f1() { return 1; }', script="V1 { global: f; local: *; };")
    errors = [d.message for d in _load(program).diagnostics if d.level == "error"]
    assert len(errors) == 1
    assert errors[0].startswith(f"version V3 not found (required by {program})")


def test_hidden_symbols_are_no_definitions(gcc: Compiler) -> None:
    """do_lookup_x: "Hidden and internal symbols are local, ignore them." """
    gcc.library(
        "libhid.so", '__attribute__((visibility("hidden"))) int f(void) { return 1; } int k(void) { return f(); }'
    )
    gcc.library("libreal.so", "int f(void) { return 2; }")
    program = gcc.program("p", "int f(), k(); int main() { return f() + k(); }", *HERE, "-lhid", "-lreal")
    assert _target(_load(program), "p", "f") == "libreal.so"
    _agrees(program)


def test_tls_symbols_bind_like_others(gcc: Compiler) -> None:
    gcc.library("libtls.so", "__thread int t = 3;")
    program = gcc.program("p", "extern __thread int t; int main() { return t; }", *HERE, "-ltls")
    assert _target(_load(program), "p", "t") == "libtls.so"
    _agrees(program)


def test_ifunc_is_bound_and_marked(gcc: Compiler) -> None:
    resolver = "static int a(void) { return 1; } static void *pick(void) { return a; }"
    code = f'{resolver} int f(void) __attribute__((ifunc("pick")));'
    gcc.library("libifunc.so", code)
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lifunc")
    binding = Bindings(_load(program)).lookup("f")
    assert binding is not None
    assert binding.is_ifunc
    _agrees(program)


def test_unique_symbol_is_the_one_bound_first_whatever_the_version(gxx: Compiler) -> None:
    """do_lookup_unique knows names, not versions: found in libapt-private, which binds to libapt-pkg's."""
    template = "template<class T> struct S { static int v; }; template<class T> int S<T>::v = 1;"
    for name in ("one", "two"):
        (gxx.directory / f"{name}.map").write_text(f"V_{name} {{ *; }};")
        code = f"{template} int *{name}() {{ return &S<int>::v; }}"
        gxx.library(f"lib{name}.so", code, f"-Wl,--version-script={name}.map", "-fgnu-unique")
    program = gxx.program("p", "int *one(), *two(); int main() { return *one() + *two(); }", *HERE, "-lone", "-ltwo")
    closure = _load(program)
    one = closure.find("libone.so")
    assert one is not None
    symbol = one.image.dynamic_symbols.by_name["_ZN1SIiE1vE"][0]
    assert one.image.dynamic_symbols.binding[symbol] == STB_UNIQUE
    assert _target(closure, "libone.so", "_ZN1SIiE1vE") == _target(closure, "libtwo.so", "_ZN1SIiE1vE")
    _agrees(program)


def test_library_opened_later_is_seen_by_itself_and_after_the_rest(gcc: Compiler) -> None:
    gcc.library("libone.so", "int f(void) { return 1; } int w() __attribute__((weak)); int (*pw)() = w;")
    late = gcc.library(
        "liblate.so", "int f(void) { return 2; } int w(void) { return 3; } int h(void) { return f() + w(); }"
    )
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lone")
    closure = _load(program, also=(str(late),))
    assert _target(closure, "liblate.so", "f") == "libone.so"
    assert _target(closure, "liblate.so", "w") == "liblate.so"
    assert _target(closure, "libone.so", "w") is None, "bound at start-up, before the library came"
    assert Bindings(closure).lookup("w") is not None
    assert closure.init_order[-1] == closure.objects[-1].index


def test_library_opened_later_binds_as_ld_so_binds_it_at_run_time(gcc: Compiler) -> None:
    """A real dlopen with RTLD_GLOBAL; the program runs, so only what the late objects bind is compared."""
    gcc.library("libone.so", "int f(void) { return 1; }")
    gcc.library("libdeep.so", "int f(void) { return 2; } int d(void) { return f(); }")
    code = "int f(), d(); int late(void) { return f() + d(); } int v; int *where(void) { return &v; }"
    gcc.library("liblate.so", code, *HERE, "-ldeep")
    opener = 'int f(), v; void *dlopen(const char *, int); int main() { f(); return !dlopen("liblate.so", 0x102); }'
    program = gcc.program("p", opener, *HERE, "-lone", "-rdynamic")
    closure = _load(program, also=("liblate.so",))
    late = {item.path for item in closure.objects if not item.is_startup}
    assert [Path(path).name for path in sorted(late)] == ["libdeep.so", "liblate.so"]
    _, bound, _ = ask(str(program), {"LD_DEBUG": "bindings"})
    assert {b for b in bound_by(closure) if b[0] in late} == {b for b in bound if b[0] in late}


def test_versioned_reference_falls_back_to_the_base_version(gcc: Compiler) -> None:
    """check_match: "We can match the version information or use the default one if it is not hidden"."""
    _versioned(gcc)
    program = gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lver")
    code = "int f(void) { return 9; } int g(void) { return 9; }"
    over = _versioned(gcc, "libover.so", code, "OTHER { global: g; };")
    assert _target(_load(program, str(over)), "p", "f") == "libover.so"
    _agrees(program, str(over))


def test_musl_takes_the_first_symbol_whose_version_is_not_hidden(musl_gcc: Compiler) -> None:
    """musl has no bindings to print, so the program itself tells: its exit status is what f() returned."""
    _versioned(musl_gcc)
    program = musl_gcc.program("p", "int f(); int main() { return f(); }", *HERE, "-lver")
    closure = _load(program)
    assert closure.libc is Libc.MUSL
    library = closure.find("libver.so")
    assert library is not None
    default = next(
        index
        for index in library.image.dynamic_symbols.by_name["f"]
        if not library.image.dynamic_symbols.is_hidden_version(index)
    )
    assert _rva(closure, "p", "f") == library.image.dynamic_symbols.value[default]
    assert subprocess.run([program], check=False).returncode == 3


def test_musl_looks_up_protected_and_symbolic_symbols_like_all_others(musl_gcc: Compiler) -> None:
    """find_sym knows no DT_SYMBOLIC: an object linked so is interposed nevertheless."""
    musl_gcc.library("libsym.so", "int v = 1; int g(void) { return v; }", "-Wl,-Bsymbolic")
    over = musl_gcc.library("libover.so", "int v = 7;")
    program = musl_gcc.program("p", "int g(); int main() { return g(); }", *HERE, "-lsym")
    closure = _load(program, str(over))
    status = subprocess.run([program], env={"LD_PRELOAD": str(over)}, check=False).returncode
    item = closure.find("libsym.so")
    assert item is not None
    asked = {r.name for r in Bindings(closure).of(item.index)}
    bound = _target(closure, "libsym.so", "v") if "v" in asked else "libsym.so"
    assert bound == ("libover.so" if status == 7 else "libsym.so")
