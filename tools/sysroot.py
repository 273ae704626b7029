#!/usr/bin/env python3
"""Make Debian sysroots for the tests, without root and without touching the machine's own apt or dpkg.

    python tools/sysroot.py bookworm-arm64        make it if it is not there, print its path
    python tools/sysroot.py --list                what is known, and what is there
    python tools/sysroot.py --dry-run NAME        how much would be downloaded

The packages are resolved and fetched by apt under a private configuration (another architecture, an empty dpkg
status, lists and cache of its own) and unpacked by `dpkg -x`; no maintainer script runs, so no foreign code does.
They come from the archive that this machine's own apt sources name, with the suite replaced, or from --mirror.

A sysroot lies in $FORKPROOF_LAB (default $XDG_CACHE_HOME/forkproof-lab) as <suite>-<arch>-<hash of the list>/root,
and appears there complete, by one rename.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("sysroots.toml")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: Debian has merged these into /usr; the links are made by an installer's script, so we make them.
MERGED = ("bin", "sbin", "lib", "lib64")


class SysrootError(Exception):
    """A sysroot that cannot be made: the message says why, and what to do."""


@dataclass(frozen=True)
class Spec:
    """One entry of the table."""

    name: str
    suite: str
    arch: str
    packages: tuple[str, ...]
    by_hand: bool = False
    """Made only when asked for by its name."""

    @property
    def directory(self) -> str:
        content = "\n".join((self.suite, self.arch, *self.packages))
        return f"{self.suite}-{self.arch}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Archive:
    """Where apt finds Debian: `http(s)://…/debian`, and the keys that sign it."""

    uri: str
    signed_by: str | None

    def line(self, suite: str) -> str:
        options = f" [signed-by={self.signed_by}]" if self.signed_by else ""
        return f"deb{options} {self.uri} {suite} main\n"


def load_table(path: Path = TABLE) -> dict[str, Spec]:
    with path.open("rb") as file:
        table = tomllib.load(file)
    return {
        name: Spec(name, entry["suite"], entry["arch"], tuple(sorted(entry["packages"])), entry.get("by_hand", False))
        for name, entry in table.items()
    }


def lab() -> Path:
    """The directory that holds all sysroots; shared by every checkout of this user."""
    if chosen := os.environ.get("FORKPROOF_LAB"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "forkproof-lab"


def root_of(spec: Spec) -> Path:
    return lab() / spec.directory / "root"


def find(name: str) -> Path | None:
    """The sysroot's root if it has been made; never makes it. This is what the tests call."""
    root = root_of(load_table()[name])
    return root if root.is_dir() else None


# The archive: read from the machine's own sources, so that its mirror and its keys are used.


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """deb822: `Key: value` lines, continued by indentation, separated by blank lines."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        unfolded = re.sub(r"\n[ \t]+", " ", "\n".join(lines))
        fields = (line.partition(":") for line in unfolded.splitlines() if ":" in line)
        stanza = {key.strip().lower(): value.strip() for key, _, value in fields}
        if stanza:
            yield stanza


def _deb822_archives(text: str, codename: str) -> Iterator[Archive]:
    for stanza in _stanzas(text):
        suites = stanza.get("suites", "").split()
        enabled = stanza.get("enabled", "yes").lower() not in {"no", "false"}
        if enabled and codename in suites and "deb" in stanza.get("types", "").split():
            key = stanza.get("signed-by", "")
            for uri in stanza.get("uris", "").split():
                yield Archive(uri, key if key.startswith("/") else None)


def _one_line_archives(text: str, codename: str) -> Iterator[Archive]:
    pattern = re.compile(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s", re.MULTILINE)
    for match in pattern.finditer(text):
        if match["suite"] == codename:
            key = re.search(r"signed-by=(\S+)", match["options"] or "")
            yield Archive(match["uri"], key[1] if key else None)


def machine_archive(etc: Path = Path("/etc")) -> Archive:
    """The archive that this machine, a Debian, is installed from: the one that carries its own codename."""
    release = dict(line.split("=", 1) for line in (etc / "os-release").read_text().splitlines() if "=" in line)
    codename = release.get("VERSION_CODENAME", "").strip('"')
    if release.get("ID", "").strip('"') == "debian" and codename:
        parts = etc / "apt" / "sources.list.d"
        for path in sorted(parts.glob("*.sources")):
            for archive in _deb822_archives(path.read_text(), codename):
                return archive
        for path in [etc / "apt" / "sources.list", *sorted(parts.glob("*.list"))]:
            text = path.read_text() if path.exists() else ""
            for archive in _one_line_archives(text, codename):
                return archive
    raise SysrootError("this machine's apt sources name no Debian archive; give one with --mirror URL")


def choose_archive(mirror: str | None) -> Archive:
    archive = Archive(mirror, None) if mirror else machine_archive()
    if archive.signed_by is None and KEYRING.exists():
        return Archive(archive.uri, str(KEYRING))
    return archive


# One sysroot.


class PrivateApt:
    """apt with everything of its own: configuration, sources, lists, cache and an empty dpkg status."""

    def __init__(self, directory: Path, spec: Spec, archive: Archive) -> None:
        self.directory = directory
        for part in ("state/lists/partial", "cache/archives/partial", "etc/parts"):
            (directory / part).mkdir(parents=True)
        (directory / "status").touch()
        (directory / "etc/sources.list").write_text(archive.line(spec.suite))
        self.configuration = directory / "apt.conf"
        self.configuration.write_text(
            f'APT::Architecture "{spec.arch}";\n'
            f'APT::Architectures {{"{spec.arch}";}};\n'
            'APT::Install-Recommends "false";\n'
            'APT::Sandbox::User "";\n'
            'Acquire::Languages "none";\n'
            'Acquire::Retries "2";\n'
            'Acquire::http::Timeout "30";\n'
            'Debug::NoLocking "true";\n'
            f'Dir::State "{directory}/state";\n'
            f'Dir::State::status "{directory}/status";\n'
            f'Dir::Cache "{directory}/cache";\n'
            f'Dir::Etc::sourcelist "{directory}/etc/sources.list";\n'
            f'Dir::Etc::sourceparts "{directory}/etc/parts";\n'
            f'Dir::Etc::preferences "{directory}/etc/preferences";\n'
            f'Dir::Etc::preferencesparts "{directory}/etc/parts";\n'
            "DPkg::Pre-Install-Pkgs { }; APT::Update::Post-Invoke { }; APT::Update::Post-Invoke-Success { };\n"
        )

    def run(self, *arguments: str) -> str:
        result = subprocess.run(
            ["apt-get", "-q", *arguments],
            env=os.environ | {"APT_CONFIG": str(self.configuration), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        problems = [line for line in result.stdout.splitlines() if line.startswith(("E:", "Err:"))]
        if result.returncode != 0:
            reason = "\n  ".join(problems[:6]) or result.stdout[-600:]
            raise SysrootError(f"apt-get {arguments[0]} failed:\n  {reason}\n  (is the network reachable?)")
        return result.stdout

    def update(self) -> None:
        # Without this option a mirror that cannot be reached is only a warning.
        self.run("update", "-o", "APT::Update::Error-Mode=any")

    def download(self, packages: tuple[str, ...]) -> list[Path]:
        self.run("install", "--download-only", "--yes", *packages)
        return sorted((self.directory / "cache/archives").glob("*.deb"))

    def size(self, packages: tuple[str, ...]) -> str:
        output = self.run("install", "--download-only", "--yes", "--print-uris", *packages)
        sizes = [int(size) for size in re.findall(r"^'\S+' \S+ (\d+)", output, re.MULTILINE)]
        return f"{len(sizes)} packages, {sum(sizes) / 1e6:.0f} MB to download"


def _unpack(debs: list[Path], root: Path) -> None:
    for name in MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")

    def extract(deb: Path) -> None:
        # Not `dpkg -x`, which would replace the links above by directories.
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as archive:
            tar: list[str | Path] = [
                "tar",
                "-x",
                "-C",
                root,
                "--keep-directory-symlink",
                "--no-same-owner",
                "--no-same-permissions",
            ]
            subprocess.run(tar, stdin=archive.stdout, check=True)
        if archive.returncode != 0:
            raise SysrootError(f"{deb.name}: dpkg-deb could not unpack it")

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(extract, debs))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One maker at a time for each sysroot, across processes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(spec: Spec, archive: Archive) -> Path:
    """The sysroot's root, made now if need be."""
    root = root_of(spec)
    with _locked(root.parent):
        if root.is_dir():
            return root
        print(f"{spec.name}: fetching from {archive.uri}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=f".{spec.name}-", dir=lab()) as scratch:
            apt = PrivateApt(Path(scratch) / "apt", spec, archive)
            apt.update()
            debs = apt.download(spec.packages)
            fresh = Path(scratch) / "made" / "root"
            fresh.mkdir(parents=True)
            _unpack(debs, fresh)
            (fresh.parent / "packages").write_text("".join(f"{deb.name}\n" for deb in debs))
            shutil.rmtree(root.parent, ignore_errors=True)
            fresh.parent.rename(root.parent)
        print(f"{spec.name}: {len(debs)} packages unpacked", file=sys.stderr)
    return root


def dry_run(spec: Spec, archive: Archive) -> str:
    with tempfile.TemporaryDirectory(prefix="forkproof-sysroot-") as scratch:
        apt = PrivateApt(Path(scratch) / "apt", spec, archive)
        apt.update()
        return apt.size(spec.packages)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make Debian sysroots for the tests, without root.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries of sysroots.toml, or 'all'")
    parser.add_argument("--mirror", metavar="URL", help="Debian archive to use instead of the machine's own")
    parser.add_argument("--list", action="store_true", help="what is known, and what is there")
    parser.add_argument("--dry-run", action="store_true", help="resolve, and say how much would be fetched")
    parser.add_argument("--keep-going", action="store_true", help="try the rest after one could not be made")
    return parser.parse_args()


def main() -> int:
    arguments, table = _arguments(), load_table()
    if arguments.list:
        for spec in table.values():
            root = find(spec.name)
            print(f"{spec.name:16} {root or '(not made)'}")
        return 0
    names = [n for n, spec in table.items() if not spec.by_hand] if arguments.names == ["all"] else arguments.names
    if unknown := sorted(set(names) - set(table)):
        print(f"sysroot: unknown: {', '.join(unknown)}; known: {', '.join(table)}", file=sys.stderr)
        return 2
    if missing := [tool for tool in ("apt-get", "dpkg-deb", "tar") if shutil.which(tool) is None]:
        print(f"sysroot: needs {', '.join(missing)}: only a Debian machine can make these", file=sys.stderr)
        return 1
    failed = False
    for name in names:
        try:
            archive = choose_archive(arguments.mirror)
            print(f"{name}: {dry_run(table[name], archive)}" if arguments.dry_run else make(table[name], archive))
        except (SysrootError, OSError, subprocess.CalledProcessError) as error:
            print(f"sysroot: {name}: {error}", file=sys.stderr)
            failed = True
            if not arguments.keep_going:
                break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
