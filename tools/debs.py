#!/usr/bin/env python3
"""Fetch Debian packages with their dependencies, as the .deb files that they are.

    python tools/debs.py bookworm arm64 qemu-system-arm libgoogle-perftools4      prints the directory

Resolved and fetched as tools/sysroot.py does it; kept beside its sysroots, complete by one rename. Nothing is unpacked.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sysroot import PrivateApt, Spec, SysrootError, choose_archive, lab  # type: ignore[import-not-found]  # beside us


def place(suite: str, arch: str, packages: tuple[str, ...]) -> Path:
    """Where these packages are, or would be."""
    spec = Spec("debs", suite, arch, tuple(sorted(packages)))
    return Path(lab()) / f"debs-{spec.directory}"


def fetch(suite: str, arch: str, packages: tuple[str, ...]) -> Path:
    """Their directory, made now if need be."""
    home = place(suite, arch, packages)
    if home.is_dir():
        return home
    spec = Spec("debs", suite, arch, tuple(sorted(packages)))
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".debs-", dir=home.parent) as scratch:
        apt = PrivateApt(Path(scratch) / "apt", spec, choose_archive(None))
        apt.update()
        fresh = Path(scratch) / "debs"
        fresh.mkdir()
        for deb in apt.download(spec.packages):
            shutil.move(deb, fresh / deb.name)
        fresh.rename(home)
    return home


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: tools/debs.py SUITE ARCH PACKAGE...")
    try:
        print(fetch(sys.argv[1], sys.argv[2], tuple(sys.argv[3:])))
    except SysrootError as error:
        sys.exit(f"debs: {error}")
