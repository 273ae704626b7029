"""Assembly for the tests of `forkproof.code`: a few lines become an object, and its labels addresses."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from fixtures.build import Toolchain
from forkproof.code.decode import Body, decode
from forkproof.elf.image import Image, Machine, load

Assemble = Callable[..., "Assembled"]


@dataclass(frozen=True)
class Assembled:
    """A shared object made of a few lines of assembly."""

    image: Image

    @property
    def machine(self) -> Machine:
        return self.image.machine

    @cached_property
    def labels(self) -> dict[str, int]:
        table = self.image.static_symbols
        return {name: int(table.value[i]) for i, name in enumerate(table.names) if name and table.defined[i]}

    def __getitem__(self, label: str) -> int:
        return self.labels[label]

    def body(self, first: str = "f", last: str = "end") -> Body:
        """The code between two labels."""
        return decode(self.image, [(self[first], self[last] - self[first])])


@pytest.fixture
def assemble(tmp_path: Path) -> Assemble:
    """`assemble(machine, text, *flags)`; the text is the content of .text, labels keep their names."""

    def build(machine: str, text: str, *flags: str) -> Assembled:
        toolchain = Toolchain(machine)
        source = tmp_path / f"{machine}.s"
        if missing := toolchain.missing(source):
            pytest.skip(f"{missing} is not installed")
        syntax = ".intel_syntax noprefix\n" if machine == "x86_64" else ""
        source.write_text(f"{syntax}.text\n{text}\n.section .note.GNU-stack\n")
        output = source.with_suffix(".so")
        command: list[str | Path] = [toolchain.compiler(source), "-shared", "-nostdlib", "-o", output, source, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Assembled(load(output))

    return build
