"""A compiler for the tests that need real objects, a few lines of C each."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Compiler:
    """gcc in a directory of its own; every method returns the path of what it made."""

    directory: Path
    command: str = "gcc"

    def library(self, name: str, code: str, *flags: str, soname: str | None = "") -> Path:
        """A shared object. `soname` "": its own file name; None: none."""
        named = Path(name).name if soname == "" else soname
        options = () if named is None else (f"-Wl,-soname,{named}",)
        return self._build(name, code, "-shared", "-fPIC", *options, *flags)

    def program(self, name: str, code: str, *flags: str) -> Path:
        """An executable."""
        return self._build(name, code, *flags)

    def _build(self, name: str, code: str, *flags: str) -> Path:
        output = self.directory / name
        output.parent.mkdir(parents=True, exist_ok=True)
        source = self.directory / f"{name.replace('/', '_')}.{'cc' if self.command == 'g++' else 'c'}"
        source.write_text(code)
        base = [self.command, "-w", "-O0", "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", "-o", str(output)]
        done = subprocess.run(
            [*base, str(source), *flags], cwd=self.directory, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return output


def _compiler(directory: Path, command: str) -> Compiler:
    if shutil.which(command) is None or platform.machine() != "x86_64":
        pytest.skip(f"needs {command} and an x86-64 glibc to compare with")
    return Compiler(directory, command)


@pytest.fixture
def gcc(tmp_path: Path) -> Compiler:
    return _compiler(tmp_path, "gcc")


@pytest.fixture
def gxx(tmp_path: Path) -> Compiler:
    return _compiler(tmp_path, "g++")


@pytest.fixture
def musl_gcc(tmp_path: Path) -> Compiler:
    return _compiler(tmp_path, "musl-gcc")
