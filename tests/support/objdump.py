"""What binutils says of an ELF file: functions, PLT stubs and branches, read from the text that it prints.

An oracle must not share a line with what it checks. Everything here comes from the output of `objdump -d`, which
decodes every instruction in turn, and of `readelf`; nothing from forkproof.

    functions   where an FDE of `readelf --debug-dump=frames` begins, or a FUNC or IFUNC symbol of `readelf -s`;
                the entry points that `readelf -h`, `-d` and `-r` name (e_entry, DT_INIT, DT_INIT_ARRAY, ...);
                and where a call of `objdump -d` leads that lies in none of those (assembly without any table)
    stubs       the labels `<name@plt>:` that objdump gives to the entries of .plt, .plt.got and .plt.sec
    edges       call, jmp, jcc (bl, b, b.cond, cbz, cbnz, tbz, tbnz) to a literal address, where that is a function
                or a stub, and the instruction lies in a function; a jump to the start of its own function is a loop

The site of an edge is the address of its opcode: prefixes (`bnd`, `addr32`, `data16 rex.W`) stand before it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

_PREFIX: Final = {"x86_64": "x86_64-linux-gnu-", "aarch64": "aarch64-linux-gnu-"}
_CHUNK: Final = 1 << 24
# `1139:	call   1030 <f@plt>`; prefixes such as `bnd` and hints such as `,pn` are part of the text.
_X86_BRANCH: Final = re.compile(
    rb"^ *([0-9a-f]+):\t((?:(?:bnd|notrack|data16|addr32|rex\S*|repz|repnz|[c-gs]s) )*)"
    rb"(call|j[a-z]+)(?:,p[nt])? +([0-9a-f]+)(?: <.*>)? *$",
    re.MULTILINE,
)
_ARM_BRANCH: Final = re.compile(
    rb"^ *([0-9a-f]+):\t()(bl|b|b\.[a-z]+|bc\.[a-z]+|cbn?z|tbn?z)\t(?:[xw]\w+, )?(?:#\d+, )?([0-9a-f]+)(?: <.*>)?"
    rb"(?: *\t?//.*)?$",
    re.MULTILINE,
)
_LABEL: Final = re.compile(rb"^([0-9a-f]{16}) <(.*)>:$", re.MULTILINE)
_FDE: Final = re.compile(rb" FDE .*pc=([0-9a-f]+)\.\.([0-9a-f]+)$", re.MULTILINE)
# 12: 00000000000a2ce0   210 FUNC    GLOBAL DEFAULT [<other>: 88]  16 fork@@GLIBC_2.2.5
_SYMBOL: Final = re.compile(
    rb"^ +\d+: ([0-9a-f]{16}) +(\d+|0x[0-9a-f]+) I?FUNC +\w+ +\w+ +(?:\[[^]]*\] +)?(UND|ABS|\d+)\b", re.MULTILINE
)
# [12] .plt  PROGBITS  00000000001c7020 1c7020 000140 10  AX  0   0 16
_SECTION: Final = re.compile(
    rb"^ +\[ *\d+\] (\S+) +[A-Z_0-9]+ +([0-9a-f]{16}) [0-9a-f]+ ([0-9a-f]+) [0-9a-f]{2} +([A-Zxlop]*) ", re.MULTILINE
)
_DYNAMIC: Final = re.compile(rb"^ 0x[0-9a-f]{16} \((\w+)\) +(0x[0-9a-f]+|\d+)(?: \(bytes\))?$", re.MULTILINE)
_POINTER: Final = re.compile(rb"^([0-9a-f]{16})  [0-9a-f]{16} R_\w+_(?:RELATIVE|64|ABS64) +([0-9a-f]+)\b", re.MULTILINE)
# 0x0000003dd0 30110000 00000000 f0100000 00000000 0...............
_DUMP: Final = re.compile(rb"^  0x([0-9a-f]+) ((?:[0-9a-f]{2,8} ){1,4})", re.MULTILINE)
_RESOLVER: Final = re.compile(rb"^[0-9a-f]{16}  [0-9a-f]{16} R_\w+_IRELATIV\w* +([0-9a-f]+)\b", re.MULTILINE)


def tool(name: str, machine: str) -> str | None:
    """The path of a binutils program for a machine; None when it is not installed."""
    return shutil.which(_PREFIX[machine] + name)


def output(name: str, machine: str, *arguments: str | Path) -> bytes:
    """What a binutils program prints. Warnings go nowhere; readelf ends with 1 when it had some, a crash raises."""
    program = tool(name, machine)
    assert program is not None, f"{_PREFIX[machine]}{name} is not installed"
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode in (0, 1), f"{program} ended with {done.returncode}"
    return done.stdout


class Edge(NamedTuple):
    """A branch: where it is, where it leads, whether it is a jump."""

    site: int
    target: int
    is_jump: bool


@dataclass(frozen=True, eq=False)
class Functions:
    """Where functions begin, by who says so, with their sizes (0: not said)."""

    unwound: dict[int, int]
    symbols: dict[int, int]
    entries: frozenset[int]
    code: tuple[range, ...]
    """The sections that hold functions."""
    plt: tuple[range, ...]
    """The sections that hold stubs; an FDE that begins in one describes the PLT, not a function."""

    @cached_property
    def known(self) -> dict[int, int]:
        """Start and size of every function that some table names."""
        found = dict.fromkeys(self.entries, 0) | self.symbols
        found |= {start: size for start, size in self.unwound.items() if not any(start in r for r in self.plt)}
        return found


@dataclass(frozen=True, eq=False)
class Extents:
    """Sorted starts with sizes; what has no size reaches to the next start, but not out of its section."""

    starts: I64
    sizes: I64
    code: tuple[range, ...]

    def owners(self, addresses: I64) -> I64:
        """Start of the function that holds each address; -1 outside."""
        if not len(self.starts):
            return np.full(len(addresses), -1, np.int64)
        following = np.append(self.starts[1:], np.iinfo(np.int64).max)
        for section in self.code:
            within = (self.starts >= section.start) & (self.starts < section.stop)
            following[within] = np.minimum(following[within], section.stop)
        ends = np.where(self.sizes > 0, self.starts + self.sizes, following)
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (index >= 0) & (addresses < ends[np.maximum(index, 0)])
        return np.where(inside, self.starts[np.maximum(index, 0)], -1)


@dataclass(frozen=True, eq=False)
class Listing:
    """One file's disassembly: stubs, and every branch to a literal address as parallel columns."""

    stubs: dict[int, str]
    site: I64
    target: I64
    jump: npt.NDArray[np.bool_]


def functions(path: Path, machine: str) -> Functions:
    """What the tables of a file say of its functions, by readelf."""
    frames = output("readelf", machine, "--debug-dump=frames", "--wide", path)
    unwound = {int(m[1], 16): int(m[2], 16) - int(m[1], 16) for m in _FDE.finditer(frames)}
    text = output("readelf", machine, "--symbols", "--wide", path)
    symbols: dict[int, int] = {}
    for match in _SYMBOL.finditer(text):
        if match[3] not in (b"UND", b"ABS"):
            value = int(match[1], 16)
            symbols[value] = max(int(match[2], 0), symbols.get(value, 0))
    sections = sections_of(path, machine)
    plt = tuple(range(s.address, s.address + s.size) for s in sections if s.name.startswith((".plt", ".iplt")))
    code = tuple(range(s.address, s.address + s.size) for s in sections if "X" in s.flags)
    code = tuple(r for r in code if r not in plt)
    entries = {e for e in entry_points(path, machine) if any(e in r for r in code)}
    return Functions({s: n for s, n in unwound.items() if n}, symbols, frozenset(entries), code, plt)


class Section(NamedTuple):
    """A line of `readelf -S`."""

    name: str
    address: int
    size: int
    flags: str


def sections_of(path: Path, machine: str) -> list[Section]:
    """The section headers of a file."""
    text = output("readelf", machine, "--section-headers", "--wide", path)
    return [Section(m[1].decode(), int(m[2], 16), int(m[3], 16), m[4].decode()) for m in _SECTION.finditer(text)]


def dynamic(path: Path, machine: str) -> dict[str, int]:
    """The numeric entries of the dynamic section, by their name."""
    text = output("readelf", machine, "--dynamic", "--wide", path)
    return {m[1].decode(): int(m[2], 0) for m in _DYNAMIC.finditer(text)}


def arrays(path: Path, machine: str) -> dict[str, list[int]]:
    """The functions that INIT_ARRAY and its kin hold, in order: by relocation, or in place (DT_RELR)."""
    tags = dynamic(path, machine)
    relocations = output("readelf", machine, "--relocs", "--wide", path)
    words = {int(m[1], 16): int(m[2], 16) for m in _POINTER.finditer(relocations)}
    result = {}
    for name in ("PREINIT_ARRAY", "INIT_ARRAY", "FINI_ARRAY"):
        start, size = tags.get(name, 0), tags.get(f"{name}SZ", 0)
        stored = _dumped(path, machine, f".{name.lower()}") if size else {}
        result[name] = [words.get(slot, stored.get(slot, 0)) for slot in range(start, start + size, 8)]
    return result


def _dumped(path: Path, machine: str, section: str) -> dict[int, int]:
    """The 8-byte words of a section as the file holds them, by `readelf -x`."""
    text = output("readelf", machine, f"--hex-dump={section}", path)
    data = b"".join(bytes.fromhex(m[2].replace(b" ", b"").decode()) for m in _DUMP.finditer(text))
    first = _DUMP.search(text)
    start = int(first[1], 16) if first else 0
    return {start + i: int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data) - 7, 8)}


def entry_points(path: Path, machine: str) -> set[int]:
    """Where control comes from outside: e_entry, DT_INIT, DT_FINI and the arrays; and IFUNC resolvers."""
    header = output("readelf", machine, "--file-header", path)
    match = re.search(rb"Entry point address: +0x([0-9a-f]+)", header)
    assert match is not None
    tags = dynamic(path, machine)
    found = {int(match[1], 16), tags.get("INIT", 0), tags.get("FINI", 0)}
    found.update(*arrays(path, machine).values())
    relocations = output("readelf", machine, "--relocs", "--wide", path)
    found.update(int(m[1], 16) for m in _RESOLVER.finditer(relocations))
    return found - {0}


def listing(path: Path, machine: str) -> Listing:
    """Every stub and every literal branch of a file, by objdump."""
    pattern = _X86_BRANCH if machine == "x86_64" else _ARM_BRANCH
    stubs: dict[int, str] = {}
    sites: list[int] = []
    targets: list[int] = []
    jumps: list[bool] = []
    for text in _disassembly(path, machine):
        for label in _LABEL.finditer(text):
            if label[2].endswith(b"@plt"):
                stubs[int(label[1], 16)] = label[2].decode()
        for branch in pattern.finditer(text):
            if (target := int(branch[4], 16)) >> 63:
                continue  # data that was decoded as a branch to before address 0
            sites.append(int(branch[1], 16) + branch[2].count(b" "))
            targets.append(target)
            jumps.append(branch[3] not in (b"call", b"bl"))
    return Listing(stubs, np.array(sites, np.int64), np.array(targets, np.int64), np.array(jumps, np.bool_))


def _disassembly(path: Path, machine: str) -> Iterator[bytes]:
    """The text of `objdump -d` in pieces that end with a line."""
    program = tool("objdump", machine)
    assert program is not None
    command = [program, "--disassemble", "--no-show-raw-insn", "--wide", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        rest = b""
        while block := process.stdout.read(_CHUNK):
            whole, newline, tail = block.rpartition(b"\n")
            if not newline:
                rest += block
                continue
            yield rest + whole + newline
            rest = tail
        yield rest
    assert process.returncode == 0, f"objdump failed on {path}"


def extents(table: Functions, found: Listing) -> Extents:
    """The functions of a file: those of its tables, and those that are only called."""
    named = _extents(table.known, table.code)
    calls = np.unique(found.target[~found.jump])
    nameless = calls[named.owners(calls) < 0].tolist()
    called = [c for c in nameless if c not in found.stubs and any(c in r for r in table.code)]
    return _extents(dict.fromkeys(called, 0) | table.known, table.code)


def _extents(known: dict[int, int], code: tuple[range, ...]) -> Extents:
    starts = sorted(known)
    return Extents(np.array(starts, np.int64), np.array([known[s] for s in starts], np.int64), code)


def edges(functions: Extents, found: Listing) -> set[Edge]:
    """The direct call edges of a file, by the rule above."""
    entries = np.union1d(functions.starts, np.array(sorted(found.stubs), np.int64))
    leads = np.isin(found.target, entries)
    site, target, jump = found.site[leads], found.target[leads], found.jump[leads]
    owner = functions.owners(site)
    keep = (owner >= 0) & ~(jump & (owner == target))
    columns = (site[keep].tolist(), target[keep].tolist(), jump[keep].tolist())
    return {Edge(*row) for row in zip(*columns, strict=True)}
