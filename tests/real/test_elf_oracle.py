"""`forkproof.elf` against readelf: symbols, versions, relocations, constructors, build-ids, PLT names.

Objects: the libraries below in the Debian sysroots of both machines, and the fixtures (which have symbol tables).
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from fixtures.build import Result
from forkproof.code.index import index_code
from forkproof.elf.image import Image, load
from forkproof.elf.tables import STT_SECTION, RelocationKind, SymbolTable
from tests.support import objdump
from tools.sysroot import find

SYSROOTS: Final = {"x86_64": "bookworm-amd64", "aarch64": "bookworm-arm64"}
NAMES: Final = (
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libcrypto.so.3",
    "libglib-2.0.so.0",
    "libtcmalloc.so.4",
    "libjemalloc.so.2",
    "libmimalloc.so.2",
    "libnuma.so.1",
    "libgnutls.so.30",
    "bash",
    "git",
    "python3.11",
    "perl",
    "sshd",
    "nginx",
    "redis-server",
    "systemd",
)
FIXTURES: Final = (
    "calls_lazy",
    "calls_now",
    "calls_noplt",
    "calls_nopie",
    "calls_cet",
    "calls_protected",
    "copy_relocation",
    "ifunc_user",
    "libifunc.so",
    "libversions.so",
    "libunique_a.so",
    "static_hooked",
    "static_pie_hooked",
    "cxx_new",
    "search_rpath",
    "search_runpath",
)
CASES: Final = [
    pytest.param(machine, name, id=f"{machine}-{name}", marks=[pytest.mark.real] if name in NAMES else [])
    for machine in SYSROOTS
    for name in (*NAMES, *FIXTURES)
    if (machine, name) not in (("x86_64", "calls_protected"), ("aarch64", "calls_cet"))
]
EVERY_OBJECT = pytest.mark.parametrize(("machine", "name"), CASES)


@pytest.fixture
def image(machine: str, name: str, built_fixtures: Callable[[str], Result]) -> Image:
    if objdump.tool("readelf", machine) is None:
        pytest.skip(f"no readelf for {machine}: apt-get install binutils-{machine.replace('_', '-')}-linux-gnu")
    return load(built_fixtures(machine).tree.root() / name if name in FIXTURES else _in_sysroot(machine, name))


def _in_sysroot(machine: str, name: str) -> Path:
    root = find(SYSROOTS[machine])
    if root is None:
        pytest.skip(f"no sysroot {SYSROOTS[machine]}: make sysroots SYSROOTS={SYSROOTS[machine]}")
    folders = (f"usr/lib/{machine}-linux-gnu", "usr/bin", "usr/sbin", "usr/lib/systemd")
    path = next((root / f / name for f in folders if (root / f / name).is_file()), None)
    if path is None:
        pytest.skip(f"no {name} in {SYSROOTS[machine]}")
    return path.resolve()


def _readelf(image: Image, *arguments: str) -> str:
    return objdump.output("readelf", image.machine.value, "--wide", *arguments, image.path).decode(errors="replace")


# ---- symbols and versions ----------------------------------------------------------------------

_SYMBOL: Final = re.compile(
    r"^ +\d+: ([0-9a-f]{16}) +(\S+) (\w+|<.*?>: \d+) +(\w+) +(\w+) +(?:\[[^]]*\] +)?(\w+)(?: (.*))?$", re.MULTILINE
)
_TYPES: Final = {0: "NOTYPE", 1: "OBJECT", 2: "FUNC", 3: "SECTION", 4: "FILE", 5: "COMMON", 6: "TLS", 10: "IFUNC"}
_BINDINGS: Final = {0: "LOCAL", 1: "GLOBAL", 2: "WEAK", 10: "UNIQUE"}
_VISIBILITIES: Final = {0: "DEFAULT", 1: "INTERNAL", 2: "HIDDEN", 3: "PROTECTED"}
_SECTIONS: Final = {0: "UND", 0xFFF1: "ABS", 0xFFF2: "COM"}

Symbol = tuple[int, int, str, str, str, str, str]


def _listed(text: str) -> list[Symbol]:
    """(value, size, type, binding, visibility, section, name@version) of one table."""
    return [
        (int(m[1], 16), int(m[2], 0), m[3], m[4], m[5], m[6], re.sub(r" \(\d+\)$", "", m[7] or ""))
        for m in _SYMBOL.finditer(text)
        if m[3] != "SECTION"  # nameless: readelf prints the section's name
    ]


def _ours(image: Image, table: SymbolTable) -> list[Symbol]:
    result = []
    for index, name in enumerate(table.names):
        section = int(table.section[index])
        if table.type[index] == STT_SECTION:
            continue
        result.append(
            (
                int(table.value[index]),
                int(table.size[index]),
                _TYPES[int(table.type[index])],
                _BINDINGS[int(table.binding[index])],
                _VISIBILITIES[int(table.visibility[index])],
                _SECTIONS.get(section, str(section)),
                name + _version(image, table, index),
            )
        )
    return result


def _version(image: Image, table: SymbolTable, index: int) -> str:
    """As readelf writes it: @ for a reference or a hidden definition, @@ for the default."""
    if table.version_index is None:
        return ""
    number = int(table.version_index[index])
    version = image.versions.name(number)
    if version is None:
        return ""
    # A copied variable is defined here with the version of the library that it is copied from.
    hidden = table.is_hidden_version(index) or number & 0x7FFF in image.versions.needs
    return f"{'@' if hidden else '@@'}{version}"


def _without_base(symbol: Symbol, base: str | None) -> Symbol:
    """Readelf gives the symbols that stand for versions (`GLIBC_2.2.5@@GLIBC_2.2.5`) no version."""
    *fields, name = symbol
    plain, at, version = name.partition("@")
    return (*fields, plain if version.lstrip("@") in (plain, base) else plain + at + version)  # type: ignore[return-value]


@EVERY_OBJECT
def test_dynamic_symbols(image: Image) -> None:
    base = image.versions.definitions.get(image.versions.base) if image.versions.base is not None else None
    expected = [_without_base(s, base) for s in _listed(_readelf(image, "--dyn-syms"))]
    assert [_without_base(s, base) for s in _ours(image, image.dynamic_symbols)] == expected


@pytest.mark.parametrize(("machine", "name"), [case for case in CASES if case.values[1] in FIXTURES])
def test_static_symbols(image: Image) -> None:
    text = _readelf(image, "--symbols").partition("Symbol table '.symtab'")[2]
    assert _ours(image, image.static_symbols) == _listed(text)


_NEED: Final = re.compile(r"(?:Version: \d+ +File: (\S+))|(?:Name: (\S+) +Flags: (.*?) +Version: (\d+))")
_DEFINITION: Final = re.compile(r"Rev: \d+ +Flags: (.*?) +Index: (\d+) +Cnt: \d+ +Name: (\S+)")


@EVERY_OBJECT
def test_versions(image: Image) -> None:
    text = _readelf(image, "--version-info")
    definitions = {int(m[2]): (m[3], "BASE" in m[1]) for m in _DEFINITION.finditer(text)}
    needs: dict[int, tuple[str, str, bool]] = {}
    file = ""
    for match in _NEED.finditer(text):
        if match[1]:
            file = match[1]
        else:
            needs[int(match[4])] = (file, match[2], "WEAK" in match[3])
    versions = image.versions
    assert {i: (n, i == versions.base) for i, n in versions.definitions.items()} == definitions
    assert {i: (n.file, n.version, n.weak) for i, n in versions.needs.items()} == needs


# ---- relocations -------------------------------------------------------------------------------

_KINDS: Final = {
    "GLOB_DAT": RelocationKind.GOT,
    "JUMP_SLOT": RelocationKind.PLT,
    "JUMP_SLO": RelocationKind.PLT,
    "RELATIVE": RelocationKind.RELATIVE,
    "RELATIV": RelocationKind.RELATIVE,
    "IRELATIVE": RelocationKind.IRELATIVE,
    "IRELATIV": RelocationKind.IRELATIVE,
    "COPY": RelocationKind.COPY,
    "64": RelocationKind.ABSOLUTE,
    "ABS64": RelocationKind.ABSOLUTE,
    "DTPMOD64": RelocationKind.MODULE,
    "DTPOFF64": RelocationKind.TLS,
    "TPOFF64": RelocationKind.TLS,
    "TLS_DTPMOD": RelocationKind.MODULE,
    "TLS_DTPREL": RelocationKind.TLS,
    "TLS_TPREL": RelocationKind.TLS,
    "TLS_DTPMOD64": RelocationKind.MODULE,
    "TLS_TPREL64": RelocationKind.TLS,
    "TLSDESC": RelocationKind.TLS,
}
_RELOCATION: Final = re.compile(r"^([0-9a-f]{16})  [0-9a-f]{16} R_(?:X86_64|AARCH64)_(\w+)", re.MULTILINE)
_RELR: Final = re.compile(r"^([0-9a-f]{16})$", re.MULTILINE)


@EVERY_OBJECT
def test_relocations(image: Image) -> None:
    """Each by its place and kind, and so their number by kind; DT_RELR's are all RELATIVE."""
    text = _readelf(image, "--relocs")
    expected = Counter((int(m[1], 16), _KINDS.get(m[2], RelocationKind.OTHER)) for m in _RELOCATION.finditer(text))
    expected.update((int(m[1], 16), RelocationKind.RELATIVE) for m in _RELR.finditer(text))
    table = image.relocations
    ours = Counter((o, RelocationKind(k)) for o, k in zip(table.offset.tolist(), table.kind.tolist(), strict=True))
    assert ours == expected


# ---- headers -----------------------------------------------------------------------------------


@EVERY_OBJECT
def test_dynamic_section(image: Image) -> None:
    text = _readelf(image, "--dynamic")

    def strings(tag: str) -> tuple[str, ...]:
        return tuple(re.findall(rf"\({tag}\) .*\[(.*)\]", text))

    assert image.needed == strings("NEEDED")
    assert (image.soname,) == (strings("SONAME") or (None,))
    assert image.rpath == tuple(p for s in strings("RPATH") for p in s.split(":"))
    assert image.runpath == tuple(p for s in strings("RUNPATH") for p in s.split(":"))
    assert image.binds_now == bool(re.search(r"\(BIND_NOW\)|\(FLAGS\) .*BIND_NOW|\(FLAGS_1\) .*\bNOW\b", text))


@EVERY_OBJECT
def test_headers(image: Image) -> None:
    notes, segments = _readelf(image, "--notes"), _readelf(image, "--program-headers")
    build_id = re.search(r"Build ID: ([0-9a-f]+)", notes)
    interpreter = re.search(r"Requesting program interpreter: (.*)\]", segments)
    assert image.build_id == (build_id[1] if build_id else None)
    assert image.interpreter == (interpreter[1] if interpreter else None)
    loads = re.findall(r"^ +LOAD +(0x\S+) (0x\S+) 0x\S+ (0x\S+) (0x\S+) ([R ])([W ])([E ])", segments, re.MULTILINE)
    assert [(s.offset, s.rva, s.file_size, s.memory_size, s.writable, s.executable) for s in image.segments] == [
        (int(o, 16), int(v, 16), int(f, 16), int(m, 16), w == "W", e == "E") for o, v, f, m, _, w, e in loads
    ]


@EVERY_OBJECT
def test_constructors_and_destructors(image: Image) -> None:
    """The arrays' words, by relocation or in place; DT_INIT runs before DT_INIT_ARRAY, DT_FINI last."""
    machine = image.machine.value
    if image.is_static and not image.dynamic:
        pytest.skip("cannot be compared: no dynamic section names the arrays of a static program")
    arrays, tags = objdump.arrays(image.path, machine), objdump.dynamic(image.path, machine)
    first = [tags["INIT"]] if tags.get("INIT") else []
    last = [tags["FINI"]] if tags.get("FINI") else []
    expected = [*arrays["PREINIT_ARRAY"], *first, *(f for f in arrays["INIT_ARRAY"] if f not in (0, 2**64 - 1))]
    assert list(image.constructors) == expected
    assert list(image.destructors) == [*reversed(arrays["FINI_ARRAY"]), *last]


# ---- code --------------------------------------------------------------------------------------


@EVERY_OBJECT
def test_functions_have_the_extents_of_their_fde(image: Image) -> None:
    table = objdump.functions(image.path, image.machine.value)
    index = index_code(image)
    ours = dict(zip(index.start.tolist(), index.size.tolist(), strict=True))
    expected = {start: size for start, size in table.unwound.items() if start in ours}
    assert set(table.known) <= set(ours)
    # A symbol may say more of a function than its FDE does, never less.
    assert {s: ours[s] for s in expected} == {s: max(n, table.symbols.get(s, 0)) for s, n in expected.items()}


@EVERY_OBJECT
def test_plt_stubs_are_called_as_objdump_says(image: Image) -> None:
    """`<name@plt>:` and `<name@VERSION@plt>:`; `*ABS*+0x..@plt` is an IFUNC of the object's own."""
    machine = image.machine.value
    if image.is_static:
        assert set(index_code(image).stubs.slot.tolist()) == image.irelative_slots.keys(), "objdump gives no labels"
        return
    arguments = ["--disassemble", "--no-show-raw-insn", *_plt_sections(image)]
    labels = objdump.output("objdump", machine, *arguments, image.path)
    expected = {
        int(address, 16): re.sub(r"@@?.*", "", name.decode())
        for address, name in re.findall(rb"^([0-9a-f]{16}) <(.*)@plt>:$", labels, re.MULTILINE)
    }
    ours = dict(_stub_names(image))
    # Objdump takes the trampoline of TLS descriptors (AArch64) for a stub, and calls it after any symbol.
    trampolines = {address for address in expected if address not in ours and machine == "aarch64"}
    assert len(trampolines) <= 2
    assert ours == {a: n for a, n in expected.items() if a not in trampolines}


def _plt_sections(image: Image) -> list[str]:
    return [f"--section={s.name}" for s in image.sections if s.name.startswith((".plt", ".iplt"))]


def _stub_names(image: Image) -> Iterator[tuple[int, str]]:
    stubs = index_code(image).stubs
    for start, slot in zip(stubs.start.tolist(), stubs.slot.tolist(), strict=True):
        symbol = image.slot_symbols.get(slot)
        if symbol is not None:
            yield start, image.dynamic_symbols.names[symbol]
        else:
            yield start, f"*ABS*+{image.irelative_slots[slot]:#x}"


@cache
def _listing(path: Path, machine: str) -> str:
    return objdump.output("objdump", machine, "--disassemble", "--no-show-raw-insn", "--wide", path).decode()


@EVERY_OBJECT
def test_calls_through_the_got_are_those_of_objdump(image: Image) -> None:
    """`call *0x2fd2(%rip)  # 3fe0 <f>`: site and slot, on x86-64. AArch64 has no such instruction.

    Bytes that look like one by chance do not lead to a word that the loader fills.
    """
    if image.machine.value != "x86_64":
        pytest.skip("AArch64 loads the slot and branches in two instructions")
    text = _listing(image.path, image.machine.value)
    pattern = r"^ +([0-9a-f]+):\t((?:(?:bnd|notrack|rex\S*) )*)(?:call|jmp) +\*\S+\(%rip\) +# ([0-9a-f]+)"
    listed = {(int(m[1], 16) + m[2].count(" "), int(m[3], 16)) for m in re.finditer(pattern, text, re.MULTILINE)}
    index = index_code(image)
    filled = set(image.relocations.offset.tolist())
    ours = set(zip(index.sites.slot_site.tolist(), index.sites.slot_address.tolist(), strict=True))
    expected = {(site, slot) for site, slot in listed if slot in filled and index.function_at(site) >= 0}
    assert {(site, slot) for site, slot in ours if slot in filled} == expected


@EVERY_OBJECT
def test_sha256(image: Image) -> None:
    listed = subprocess.run(["sha256sum", image.path], capture_output=True, text=True, check=True).stdout
    assert image.sha256 == listed.split()[0]
