"""A sysroot of fakes: files, links and ELF images that exist only here, for rules that need no real object."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from forkproof.closure.load import load
from forkproof.closure.model import Closure, LoadRequest
from forkproof.elf.image import Image, Machine, ObjectKind, Rva

if TYPE_CHECKING:
    from collections.abc import Hashable

NUMBER = {Machine.X86_64: 62, Machine.AARCH64: 183}
LD_SO = "/lib64/ld-linux-x86-64.so.2"


def fake_image(
    path: str,
    *needed: str,
    soname: str | None = None,
    rpath: tuple[str, ...] = (),
    runpath: tuple[str, ...] = (),
    interpreter: str | None = None,
    machine: Machine = Machine.X86_64,
    dynamic: dict[int, int] | None = None,
    data: bytes = b"",
) -> Image:
    """An image with a dynamic section that says just this."""
    return Image(
        path=Path(path),
        machine=machine,
        kind=ObjectKind.PIE if interpreter else ObjectKind.SHARED,
        entry=Rva(0),
        interpreter=interpreter,
        soname=soname,
        needed=needed,
        rpath=rpath,
        runpath=runpath,
        build_id=None,
        segments=(),
        sections=(),
        dynamic=dynamic or {},
        eh_frame_header=None,
        data=data,
    )


@dataclass
class MemorySysroot:
    """Files by path; directories are implied. Implements `Sysroot` without symbolic links but `links`."""

    files: dict[str, bytes] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    is_host: bool = False

    def add(self, path: str, *needed: str, **facts: object) -> Image:
        """Put an ELF file there."""
        image = fake_image(path, *needed, **facts)  # type: ignore[arg-type]
        header = b"\x7fELF\x02\x01\x01".ljust(18, b"\0") + NUMBER[image.machine].to_bytes(2, "little")
        self.files[path] = header
        self.images[path] = image
        return image

    def add_library(self, path: str, *needed: str, **facts: object) -> Image:
        """A library whose soname is its file name."""
        return self.add(path, *needed, **{"soname": path.rpartition("/")[2], **facts})

    def add_program(self, path: str, *needed: str, **facts: object) -> Image:
        """A program of glibc, with its interpreter in place."""
        self.add_library(LD_SO)
        return self.add(path, *needed, **{"interpreter": LD_SO, **facts})

    def resolve(self, path: str) -> str | None:
        parts: list[str] = []
        for part in path.split("/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        clean = "/" + "/".join(parts)
        if clean in self.links:
            return self.resolve(self.links[clean])
        known = clean in self.files or any(name.startswith(f"{clean}/") for name in self.files)
        return clean if known else None

    def identity(self, path: str) -> Hashable:
        return self.resolve(path)

    def read(self, path: str, size: int = -1) -> bytes:
        resolved = self.resolve(path)
        if resolved not in self.files:
            raise FileNotFoundError(path)
        data = self.files[resolved]
        return data if size < 0 else data[:size]

    def names_in(self, path: str) -> tuple[str, ...]:
        prefix = f"{path.rstrip('/')}/"
        return tuple(sorted({name[len(prefix) :].split("/")[0] for name in self.files if name.startswith(prefix)}))

    def host_path(self, path: str) -> Path:
        resolved = self.resolve(path)
        if resolved is None:
            raise FileNotFoundError(path)
        return Path(resolved)

    def locate(self, target: str) -> str:
        return target

    def load(self, target: str, **options: tuple[str, ...]) -> Closure:
        """The closure of a program in here."""
        request = LoadRequest(self, target, **options)  # type: ignore[arg-type]
        return load(request, open_image=lambda path: self.images[str(path)])
