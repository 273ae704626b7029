"""The order of the search, ld.so(8), rule by rule, on fakes; the last tests ask the host's ld.so as well."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forkproof.closure import Closure, load
from forkproof.closure.rules import glibc_rules, host_hwcaps
from forkproof.elf.image import Machine
from tests.unit.closure.ld_so import Case, differences
from tests.unit.closure.memory import MemorySysroot, fake_image
from tests.unit.closure.test_ldcache import make_cache

if TYPE_CHECKING:
    from tests.unit.closure.conftest import Compiler

P = "/usr/bin/p"
NODEFLIB = {0x6FFFFFFB: 0x800}


def _where(closure: Closure, name: str) -> tuple[str, str]:
    """Path of a library and the words that say how it was found."""
    item = closure.find(name)
    assert item is not None, [m.name for m in closure.missing]
    return item.path, item.why.partition("(")[2].removesuffix(")")


def test_rpath_comes_before_library_path_and_runpath_after() -> None:
    """ "(1) ... DT_RPATH ... (2) LD_LIBRARY_PATH ... (3) DT_RUNPATH" """
    for tag, expected in (("rpath", "/own"), ("runpath", "/env")):
        root = MemorySysroot()
        root.add_program(P, "libx.so", **{tag: ("/own",)})
        root.add_library("/own/libx.so")
        root.add_library("/env/libx.so")
        assert _where(root.load(P, library_path=("/env",)), "libx.so")[0] == f"{expected}/libx.so"


def test_rpath_is_ignored_if_there_is_a_runpath() -> None:
    """ "DT_RPATH ... if present and DT_RUNPATH attribute does not exist" """
    root = MemorySysroot()
    root.add_program(P, "libx.so", rpath=("/rpath",), runpath=("/nowhere",))
    root.add_library("/rpath/libx.so")
    assert [missing.name for missing in root.load(P).missing] == ["libx.so"]


def test_rpath_of_the_loaders_counts_and_runpath_does_not() -> None:
    """ "(DT_RUNPATH) directories are searched only to find those objects required by DT_NEEDED" """
    for tag, found in (("rpath", True), ("runpath", False)):
        root = MemorySysroot()
        root.add_program(P, "liba.so", **{tag: ("/own",)})
        root.add_library("/own/liba.so", "libb.so")
        root.add_library("/own/libb.so")
        assert (root.load(P).find("libb.so") is not None) is found


def test_rpath_chain_skips_a_loader_with_runpath_but_goes_on_above() -> None:
    root = MemorySysroot()
    root.add_program(P, "liba.so", rpath=("/own",))
    root.add_library("/own/liba.so", "libb.so", runpath=("/own",))
    root.add_library("/own/libb.so", "libc-of-b.so")
    root.add_library("/own/libc-of-b.so")
    assert _where(root.load(P), "libc-of-b.so")[1] == f"RPATH of {P}"


def test_asker_with_runpath_sees_no_rpath_at_all() -> None:
    root = MemorySysroot()
    root.add_program(P, "liba.so", rpath=("/own",))
    root.add_library("/own/liba.so", "libb.so", runpath=("/elsewhere",))
    root.add_library("/own/libb.so")
    assert root.load(P).missing[0].needed_by == ("/own/liba.so",)


def test_cache_comes_before_the_built_in_directories_and_after_runpath() -> None:
    root = MemorySysroot()
    root.add_program(P, "libx.so", "liby.so", runpath=("/run",))
    root.add_library("/run/liby.so")
    for path in ("/opt/libx.so", "/opt/liby.so", "/usr/lib/libx.so"):
        root.add_library(path)
    root.files["/etc/ld.so.cache"] = make_cache([("libx.so", "/opt/libx.so", None), ("liby.so", "/opt/liby.so", None)])
    closure = root.load(P)
    assert _where(closure, "libx.so") == ("/opt/libx.so", "ld.so.cache")
    assert _where(closure, "liby.so") == ("/run/liby.so", f"RUNPATH of {P}")


def test_configuration_stands_in_for_a_missing_cache_and_says_so() -> None:
    root = MemorySysroot()
    root.add_program(P, "libx.so")
    root.add_library("/opt/x/libx.so")
    root.files["/etc/ld.so.conf"] = b"include /etc/ld.so.conf.d/*.conf\n"
    root.files["/etc/ld.so.conf.d/x.conf"] = b"# private\n/opt/x\n"
    closure = root.load(P)
    assert _where(closure, "libx.so")[1] == "ld.so.conf"
    assert any("ld.so.conf" in d.message for d in closure.diagnostics)


def test_nodefaultlib_keeps_out_the_default_directories_even_from_the_cache() -> None:
    """ "-z nodefaultlib ... the default paths ... are skipped" """
    root = MemorySysroot()
    root.add_program(P, "libx.so", "liby.so", dynamic=NODEFLIB)
    root.add_library("/usr/lib/libx.so")
    root.add_library("/opt/liby.so")
    root.files["/etc/ld.so.cache"] = make_cache(
        [("libx.so", "/usr/lib/libx.so", None), ("liby.so", "/opt/liby.so", None)]
    )
    closure = root.load(P)
    assert [missing.name for missing in closure.missing] == ["libx.so"]
    assert _where(closure, "liby.so")[1] == "ld.so.cache"


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("$ORIGIN/../lib", "/usr/bin/../lib"),
        ("${ORIGIN}/x", "/usr/bin/x"),
        ("/usr/$LIB", "/usr/lib/x86_64-linux-gnu"),
        ("/opt/$PLATFORM", "/opt/x86_64"),
        ("/opt/$ORIGINAL", "/opt/$ORIGINAL"),
        ("/opt//x///", "/opt//x"),
    ],
)
def test_dynamic_string_tokens(directory: str, expected: str) -> None:
    """ld.so(8), "Dynamic string tokens"; a longer identifier is no token."""
    root = MemorySysroot()
    root.add_program(P, "libx.so", runpath=(directory,))
    root.add_library(posixpath.normpath(f"{expected}/libx.so"))
    assert _where(root.load(P), "libx.so")[0] == f"{expected}/libx.so"


def test_origin_of_the_program_follows_its_links_and_that_of_a_library_does_not() -> None:
    root = MemorySysroot()
    root.add_program("/opt/app/p", "libx.so", runpath=("$ORIGIN",))
    root.add_library("/opt/app/libx.so", "liby.so", runpath=("$ORIGIN/y",))
    root.add_library("/opt/app/y/liby.so")
    root.links[P] = "/opt/app/p"
    assert _where(root.load(P), "liby.so")[0] == "/opt/app/y/liby.so"


def test_name_with_a_slash_is_not_searched() -> None:
    """ "If the soname contains a slash, it is interpreted as a pathname" """
    root = MemorySysroot()
    root.add_program(P, "/opt/libx.so", "$ORIGIN/liby.so", runpath=("/run",))
    root.add_library("/opt/libx.so")
    root.add_library("/usr/bin/liby.so")
    closure = root.load(P)
    assert _where(closure, "libx.so") == ("/opt/libx.so", "path in the name")
    assert _where(closure, "liby.so")[0] == "/usr/bin/liby.so"


def test_library_for_another_machine_is_passed_over() -> None:
    root = MemorySysroot()
    root.add_program(P, "libx.so", runpath=("/arm", "/x86"))
    root.add_library("/arm/libx.so", machine=Machine.AARCH64)
    root.add_library("/x86/libx.so")
    assert _where(root.load(P), "libx.so")[0] == "/x86/libx.so"


def test_file_that_is_no_library_ends_the_search() -> None:
    """open_verify: "invalid ELF header" is fatal, unlike a wrong class."""
    root = MemorySysroot()
    root.add_program(P, "libx.so", runpath=("/script", "/x86"))
    root.files["/script/libx.so"] = b"/* GNU ld script */\nGROUP ( libx.so.1 )"
    root.add_library("/x86/libx.so")
    missing = root.load(P).missing[0]
    assert [(place.path, place.outcome) for place in missing.looked_in] == [("/script/libx.so", "not an ELF file")]


def test_missing_library_lists_every_place_in_order() -> None:
    root = MemorySysroot()
    root.add_program(P, "libgone.so", runpath=("/run",))
    root.files["/etc/ld.so.cache"] = make_cache([])
    missing = root.load(P, library_path=("/env1:/env2",)).missing[0]
    assert [place.path for place in missing.looked_in] == [
        "/env1/libgone.so",
        "/env2/libgone.so",
        "/run/libgone.so",
        "/lib/x86_64-linux-gnu/libgone.so",
        "/usr/lib/x86_64-linux-gnu/libgone.so",
        "/lib/libgone.so",
        "/usr/lib/libgone.so",
        "/lib64/libgone.so",
        "/usr/lib64/libgone.so",
    ]
    assert [place.source for place in missing.looked_in[:4]] == [
        "LD_LIBRARY_PATH",
        "LD_LIBRARY_PATH",
        f"RUNPATH of {P}",
        "built-in directory",
    ]


def test_best_hwcaps_subdirectory_is_taken_only_when_the_cpu_is_known_to_have_it() -> None:
    """ld.so(8), "glibc hardware capabilities"."""
    root = MemorySysroot()
    root.add_program(P, "libx.so", runpath=("/run",))
    for place in ("", "glibc-hwcaps/x86-64-v2/", "glibc-hwcaps/x86-64-v3/"):
        root.add_library(f"/run/{place}libx.so")
    root.images["/lib64/ld-linux-x86-64.so.2"] = fake_image("", data=b"\0glibc-hwcaps\0")
    assert _where(root.load(P), "libx.so")[0] == "/run/libx.so"
    both = root.load(P, hwcaps=("x86-64-v3", "x86-64-v2"))
    assert _where(both, "libx.so")[0] == "/run/glibc-hwcaps/x86-64-v3/libx.so"
    assert _where(root.load(P, hwcaps=("x86-64-v2",)), "libx.so")[0] == "/run/glibc-hwcaps/x86-64-v2/libx.so"


def test_built_in_directories_are_read_from_ld_so() -> None:
    data = b"junk\0/lib64/\0/usr/lib64/\0more\0/proc/self/\0"
    rules = glibc_rules(Machine.X86_64, fake_image("", data=data), ())
    assert rules.directories == ("/lib64", "/usr/lib64")
    assert rules.lib_token in rules.directories[0]


def test_legacy_subdirectories_are_tried_fullest_first() -> None:
    """glibc before 2.37; LD_DEBUG=libs prints this order."""
    image = fake_image("", data=b"\0/lib/\0 Legacy HWCAP subdirectories under")
    rules = glibc_rules(Machine.X86_64, image, ("x86-64-v3", "x86-64-v2"))
    assert rules.subdirectories[:4] == ("tls/haswell/x86_64/", "tls/haswell/", "tls/x86_64/", "tls/")
    assert rules.subdirectories[-1] == ""


def test_cpu_levels_need_all_flags_below(tmp_path: Path) -> None:
    v2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
    for flags, expected in ((v2, ("x86-64-v2",)), ("avx avx2 bmi1", ()), (f"{v2} avx512f", ("x86-64-v2",))):
        path = tmp_path / f"cpuinfo{len(flags)}"
        path.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
        assert host_hwcaps(str(path)) == expected


# ---- musl ------------------------------------------------------------------------------------------

MUSL = "/lib/ld-musl-x86_64.so.1"


def _musl(*needed: str, **facts: object) -> MemorySysroot:
    root = MemorySysroot()
    root.add(MUSL)
    root.add(P, *needed, **{"interpreter": MUSL, **facts})
    return root


def test_musl_runpath_is_inherited_like_rpath_and_comes_after_library_path() -> None:
    root = _musl("liba.so", runpath=("/own",))
    root.add_library("/own/liba.so", "libb.so")
    root.add_library("/own/libb.so")
    assert _where(root.load(P), "libb.so")[0] == "/own/libb.so"
    root.add_library("/env/libb.so")
    assert _where(root.load(P, library_path=("/env",)), "libb.so")[0] == "/env/libb.so"


def test_musl_answers_to_libc_names_itself() -> None:
    root = _musl("libc.musl-x86_64.so.1", "libpthread.so.0", "libx.so")
    root.add_library("/usr/lib/libx.so")
    root.add_library("/usr/lib/libpthread.so.0")
    assert [item.path for item in root.load(P).objects] == [P, MUSL, "/usr/lib/libx.so"]


def test_musl_system_path_file_replaces_the_default() -> None:
    root = _musl("libx.so")
    root.add_library("/usr/lib/libx.so")
    root.add_library("/opt/lib/libx.so")
    assert _where(root.load(P), "libx.so")[0] == "/usr/lib/libx.so"
    root.files["/etc/ld-musl-x86_64.path"] = b"/opt/none\n/opt/lib\n"
    assert _where(root.load(P), "libx.so")[0] == "/opt/lib/libx.so"


def test_musl_drops_a_search_path_with_a_token_that_it_does_not_know() -> None:
    root = _musl("libx.so", runpath=("/own", "/opt/$LIB"))
    root.add_library("/own/libx.so")
    assert root.load(P).missing[0].name == "libx.so"


# ---- the host's ld.so as a witness ------------------------------------------------------------------


def test_search_paths_as_ld_so_takes_them(gcc: Compiler) -> None:
    gcc.library("deep/libdeep.so", "int d(void) { return 1; }")
    gcc.library(
        "lib/liba.so", "int d(); int a(void) { return d(); }", "-Ldeep", "-ldeep", "-Wl,-rpath,${ORIGIN}/../deep/"
    )
    gcc.library("other/liba.so", "int a(void) { return 2; }")
    for flag in ("--enable-new-dtags", "--disable-new-dtags"):
        program = gcc.program(
            f"p{flag}", "int a(); int main() { return a(); }", "-Llib", "-la", f"-Wl,{flag},-rpath,$ORIGIN/lib"
        )
        assert differences(Case(str(program))) == []
        assert differences(Case(str(program), library_path=(str(gcc.directory / "other"),))) == []


def test_inherited_rpath_as_ld_so_takes_it(gcc: Compiler) -> None:
    gcc.library("lib/libdeep.so", "int d(void) { return 1; }")
    gcc.library("lib/liba.so", "int d(); int a(void) { return d(); }", "-Llib", "-ldeep")
    flags = ("-Llib", "-la", "-Wl,--disable-new-dtags,-rpath,$ORIGIN/lib")
    assert differences(Case(str(gcc.program("p", "int a(); int main() { return a(); }", *flags)))) == []


def test_hardware_subdirectories_as_ld_so_takes_them(gcc: Compiler) -> None:
    names = ["glibc-hwcaps/x86-64-v3", "glibc-hwcaps/x86-64-v2", "tls/haswell", "haswell/x86_64", "tls", "x86_64", "."]
    if "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        names = [name for name in names if "haswell" not in name]  # a platform that glibc gives Intel's only
    program = None
    for number, name in enumerate(reversed(names)):
        gcc.library(f"lib/{name}/liba.so", f"int a(void) {{ return {number}; }}")
        if program is None:
            program = gcc.program("p", "int a(); int main() { return a(); }", "-Llib", "-la", "-Wl,-rpath,$ORIGIN/lib")
        assert differences(Case(str(program))) == [], name


def test_odd_files_in_the_way_as_ld_so_takes_them(gcc: Compiler) -> None:
    good = gcc.library("good/liba.so", "int a(void) { return 1; }")
    wrong = bytearray(good.read_bytes())
    wrong[18] = 183
    (gcc.directory / "bad").mkdir()
    (gcc.directory / "bad/liba.so").write_bytes(wrong)
    (gcc.directory / "dangling").mkdir()
    (gcc.directory / "dangling/liba.so").symlink_to("nowhere")
    flags = ("-Lgood", "-la", "-Wl,-rpath,$ORIGIN/none:$ORIGIN/bad:$ORIGIN/dangling:$ORIGIN/good")
    assert differences(Case(str(gcc.program("p", "int a(); int main() { return a(); }", *flags)))) == []


def test_names_and_identities_as_ld_so_takes_them(gcc: Compiler) -> None:
    """One file under two names is one object; a library without a soname is known by its path."""
    gcc.library("liba.so.1", "int a(void) { return 1; }")
    (gcc.directory / "liba.so").symlink_to("liba.so.1")
    gcc.library("libb.so", "int a(); int b(void) { return a(); }", "./liba.so")
    plain = gcc.library("libplain.so", "int n(void) { return 1; }", soname=None)
    flags = ("-L.", "-lb", "-Wl,-rpath-link,.", "-Wl,-rpath,$ORIGIN", str(plain), "-Wl,-z,now")
    program = gcc.program("p", "int b(), n(); int main() { return b() + n(); }", *flags)
    # libb.so has no RUNPATH of its own, so liba.so.1 is missing, and ld.so prints the rest nevertheless.
    assert [item.name for item in load(Case(str(program)).request()).missing] == ["liba.so.1"]
    assert differences(Case(str(program))) == []
    assert differences(Case(str(program), (str(gcc.directory / "liba.so"),))) == []
