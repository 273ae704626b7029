"""`forkproof.elf.headers` against lief, which decodes the same headers independently."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import lief
import pytest

from fixtures.build import Result
from forkproof import closure
from forkproof.elf.headers import DT, read_headers
from forkproof.elf.image import load
from forkproof.errors import UnsupportedElf

MACHINES = ("x86_64", "aarch64")


def _objects(result: Result) -> list[Path]:
    root = result.tree.root()
    return [p for folder in (root, root / "stripped") for p in sorted(folder.iterdir()) if _is_elf(p)]


def _is_elf(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("machine", MACHINES)
def test_every_field_is_what_lief_decodes(machine: str, built_fixtures: Callable[[str], Result]) -> None:
    objects = _objects(built_fixtures(machine))
    assert len(objects) > 50
    for path in objects:
        ours, theirs = read_headers(path, path.read_bytes()), lief.ELF.parse(str(path))
        assert theirs is not None
        _compare(path, ours, theirs)


def _compare(path: Path, ours: object, theirs: lief.ELF.Binary) -> None:
    headers = read_headers(path, path.read_bytes())
    assert ours == headers, "reading twice gives the same"
    assert headers.entry == theirs.header.entrypoint
    assert headers.interpreter == (theirs.interpreter if theirs.has_interpreter else None)
    note = theirs.get(lief.ELF.Note.TYPE.GNU_BUILD_ID)
    assert headers.build_id == (bytes(note.description).hex() if isinstance(note, lief.ELF.Note) else None)
    loads = [s for s in theirs.segments if s.type == lief.ELF.Segment.TYPE.LOAD]
    assert [(s.rva, s.offset, s.file_size, s.memory_size) for s in headers.segments] == [
        (s.virtual_address, s.file_offset, s.physical_size, s.virtual_size) for s in loads
    ]
    assert [(s.readable, s.writable, s.executable) for s in headers.segments] == [
        (bool(int(s.flags) & 4), bool(int(s.flags) & 2), bool(int(s.flags) & 1)) for s in loads
    ]
    relro = [s for s in theirs.segments if s.type == lief.ELF.Segment.TYPE.GNU_RELRO]
    assert headers.relro == tuple((s.virtual_address, s.virtual_size) for s in relro)
    frames = [s.virtual_address for s in theirs.segments if s.type == lief.ELF.Segment.TYPE.GNU_EH_FRAME]
    assert headers.eh_frame_header == (frames[0] if frames else None)
    entries = [(int(e.tag) & 0xFFFFFFFF, e.value) for e in theirs.dynamic_entries if int(e.tag)]
    assert headers.needed == tuple(value for tag, value in entries if tag == DT.NEEDED)
    assert headers.dynamic == {tag: value for tag, value in entries if tag != DT.NEEDED}
    named = {s.name: s for s in headers.sections if s.name}
    for section in theirs.sections:
        if section.name and section.name in named:
            mine = named[section.name]
            assert (mine.rva, mine.offset, mine.size) == (section.virtual_address, section.file_offset, section.size)
    assert {s.name for s in theirs.sections if s.name} == set(named)


def test_kinds(built_x86_64: Result) -> None:
    root = built_x86_64.tree.root()
    kinds = {
        name: load(root / name).kind.value for name in ("calls_lazy", "calls_nopie", "libcallee.so", "static_hooked")
    }
    assert kinds == {
        "calls_lazy": "pie",
        "calls_nopie": "executable",
        "libcallee.so": "shared",
        "static_hooked": "executable",
    }
    assert load(root / "static_pie_hooked").is_static
    assert load(root / "static_hooked").is_static
    assert not load(root / "calls_lazy").is_static


def test_a_core_leads_to_the_program_that_dumped_it(tmp_path: Path) -> None:
    """A real core: it maps the vsyscall page, which no program may."""
    gcore = shutil.which("gcore")
    if gcore is None:
        pytest.skip("no gcore (Debian: gdb)")
    process = subprocess.Popen(["sleep", "60"])
    try:
        made = subprocess.run([gcore, "-o", tmp_path / "core", str(process.pid)], capture_output=True, check=False)
    finally:
        process.kill()
        process.wait()
    core = tmp_path / f"core.{process.pid}"
    if made.returncode != 0 or not core.exists():
        pytest.skip("gcore may not attach here")
    with pytest.raises(UnsupportedElf, match=r"(?s)is a core file.*/sleep"):
        closure.load(closure.LoadRequest(closure.DirectorySysroot("/"), str(core)))
