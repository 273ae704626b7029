#!/usr/bin/env python3
"""Print what pyproject.toml asks for, one requirement a line: to build, to run, to test and to lint.

The Makefile installs these first and the wheel alone afterwards, so that editing a source does not resolve the
dependencies again.
"""

import tomllib
from pathlib import Path


def requirements(pyproject: Path) -> list[str]:
    with pyproject.open("rb") as file:
        data = tomllib.load(file)
    project = data["project"]
    extras = (project["optional-dependencies"][name] for name in ("test", "lint"))
    return sorted({*data["build-system"]["requires"], *project["dependencies"], *(r for e in extras for r in e)})


if __name__ == "__main__":
    print("\n".join(requirements(Path(__file__).parents[1] / "pyproject.toml")))
