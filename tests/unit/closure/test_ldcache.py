"""The format of /etc/ld.so.cache, written here from its definition and read back; and the host's own."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from forkproof.closure import DirectorySysroot
from forkproof.closure.ldcache import configured_directories, parse_cache
from forkproof.closure.sysroot import glob
from forkproof.elf.image import Machine

LIBC6_X86_64, LIBC6_AARCH64, LIBC6_I386 = 0x0303, 0x0A03, 0x0003

Entry = tuple[str, str, str | None]


def make_cache(entries: list[Entry], flags: int = LIBC6_X86_64) -> bytes:
    """A cache of the format "glibc-ld.so.cache1.1": (soname, path, glibc-hwcaps name) each."""
    hwcaps = sorted({name for _, _, name in entries if name})
    texts = list(dict.fromkeys([*hwcaps, *(text for entry in entries for text in entry[:2])]))
    table = 48 + 24 * len(entries)
    offsets, at = {}, table
    for text in texts:
        offsets[text] = at
        at += len(text) + 1
    strings = b"".join(text.encode() + b"\0" for text in texts)
    padding = -(table + len(strings)) % 4
    extension = table + len(strings) + padding
    section = struct.pack("<II", 0xEAA42174, 1) + struct.pack("<IIII", 1, 0, extension + 24, 4 * len(hwcaps))
    section += b"".join(struct.pack("<I", offsets[name]) for name in hwcaps)
    header = b"glibc-ld.so.cache1.1" + struct.pack("<IIB3xI12x", len(entries), len(strings), 2, extension)
    body = b"".join(
        struct.pack("<iIIIQ", flags, offsets[name], offsets[path], 0, (1 << 62 | hwcaps.index(cap)) if cap else 0)
        for name, path, cap in entries
    )
    return header + body + strings + b"\0" * padding + section


def test_entry_is_found_by_soname_and_machine() -> None:
    cache = parse_cache(make_cache([("libx.so.1", "/lib/libx.so.1", None)]))
    assert cache is not None
    assert cache.lookup("libx.so.1", Machine.X86_64, ()) == "/lib/libx.so.1"
    assert cache.lookup("libx.so.1", Machine.AARCH64, ()) is None
    assert cache.lookup("libx.so.2", Machine.X86_64, ()) is None


@pytest.mark.parametrize(("flags", "machine"), [(LIBC6_AARCH64, Machine.AARCH64), (LIBC6_X86_64, Machine.X86_64)])
def test_flags_name_the_machine(flags: int, machine: Machine) -> None:
    cache = parse_cache(make_cache([("libx.so.1", "/lib/libx.so.1", None)], flags))
    assert cache is not None
    assert cache.lookup("libx.so.1", machine, ()) == "/lib/libx.so.1"
    i386 = parse_cache(make_cache([("libx.so.1", "/lib/libx.so.1", None)], LIBC6_I386))
    assert i386 is not None
    assert i386.lookup("libx.so.1", machine, ()) is None


def test_best_supported_hwcaps_entry_wins() -> None:
    names = ("x86-64-v2", "x86-64-v3", None)
    cache = parse_cache(make_cache([("libx.so", f"/lib/{name}/libx.so", name) for name in names]))
    assert cache is not None
    assert cache.lookup("libx.so", Machine.X86_64, ("x86-64-v3", "x86-64-v2")) == "/lib/x86-64-v3/libx.so"
    assert cache.lookup("libx.so", Machine.X86_64, ("x86-64-v2",)) == "/lib/x86-64-v2/libx.so"
    assert cache.lookup("libx.so", Machine.X86_64, ()) == "/lib/None/libx.so"


def test_new_format_behind_the_old_one() -> None:
    """`ldconfig -c compat`: an old table first; the new one starts at the next multiple of eight."""
    old = b"ld.so-1.7.0".ljust(12, b"\0") + struct.pack("<I", 1) + b"\0" * 12
    old += b"\0" * (-len(old) % 8)
    cache = parse_cache(old + make_cache([("libx.so", "/lib/libx.so", None)]))
    assert cache is not None
    assert cache.lookup("libx.so", Machine.X86_64, ()) == "/lib/libx.so"


@pytest.mark.parametrize("length", [0, 10, 47, 60, 80])
def test_damaged_cache_is_no_cache(length: int) -> None:
    assert parse_cache(make_cache([("libx.so", "/lib/libx.so", None)])[:length]) is None


def test_host_cache_reads_as_ldconfig_prints_it() -> None:
    path = Path("/etc/ld.so.cache")
    ldconfig = Path("/sbin/ldconfig")
    if not path.exists() or not ldconfig.exists():
        pytest.skip("no ld.so.cache to compare with")
    printed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout
    expected = {
        (line.split(" ", 1)[0].strip(), line.split(" => ")[1]) for line in printed.splitlines()[1:] if "=>" in line
    }
    cache = parse_cache(path.read_bytes())
    assert cache is not None
    assert {(name, entry.path) for name, entries in cache.entries.items() for entry in entries} == expected


def test_configuration_includes_by_pattern_in_order(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    (etc / "conf.d").mkdir(parents=True)
    (etc / "ld.so.conf").write_text("/first\ninclude conf.d/*.conf\n/last/ # comment\n/old=libc5\n")
    (etc / "conf.d/b.conf").write_text("/b1\n/b2, /b3\ninclude /etc/ld.so.conf\n")
    (etc / "conf.d/a.conf").write_text("\n# nothing but\n/a\nhwcap 1 nosegneg\n")
    (etc / "conf.d/not-one").write_text("/never\n")
    assert configured_directories(DirectorySysroot(tmp_path)) == ("/first", "/a", "/b1", "/b2", "/b3", "/last", "/old")
    assert glob(DirectorySysroot(tmp_path), "/etc/*.d/[ab].conf") == ("/etc/conf.d/a.conf", "/etc/conf.d/b.conf")
