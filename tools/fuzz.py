#!/usr/bin/env python3
"""Feed forkproof mutated real files: `python tools/fuzz.py --cases 22000 --seed 1`.

Each case is one ELF file, package, tarball or image with bytes changed, cut, doubled or taken from another, and is
known by two numbers, so that it can be made again: `--seed 1 --only 4711`. A case passes if it is refused with an error
that is meant for a user, or read, within the limits on memory and time. Half of the cases are ELF files that are read
whole, indexed and disassembled, half are archives that are opened as a scan opens them.

Ends with 1 if anything else was raised; a crash or a limit ends the process, and the case is the last that it named.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from forkproof.artifacts import opened  # noqa: E402 - after the path
from forkproof.errors import ForkproofError  # noqa: E402
from tests.support import archives  # noqa: E402
from tests.unit.elf.mutants import use  # noqa: E402

MEMORY = 3 << 30
SECONDS = 30
LARGEST = 256 << 10


class Late(Exception):
    """A case took longer than any real file of its size."""


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to eight changes; most near the start, where headers are."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        size = len(result)
        if not size:
            break
        near = chance.choice((64, 512, 4096, size))
        at = chance.randrange(min(near, size))
        kind = chance.randrange(6)
        if kind == 0:
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            width = chance.choice((1, 2, 4, 8))
            value = chance.choice((0, 1, -1, 1 << 31, (1 << 63) - 1, size, size - 1, chance.getrandbits(64)))
            result[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif kind == 2:
            del result[at : at + chance.randint(1, 64)]
        elif kind == 3:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            piece = other[start : start + chance.randint(1, 512)]
            result[at : at + len(piece)] = piece
        elif kind == 4:
            result[at:at] = result[at : at + chance.randint(1, 256)]
        elif chance.random() < 0.3:
            del result[chance.randrange(size) :]
    return bytes(result)


def elf_files() -> list[bytes]:
    """Small real files of both machines; fixtures if they are built, and what Debian has."""
    places = [Path("/bin/true"), *sorted(Path("/lib/x86_64-linux-gnu").glob("lib*.so.*"))]
    places += sorted((ROOT / "build/fixtures/aarch64").glob("*.so")) + sorted(
        (ROOT / "build/fixtures/x86_64").glob("*")
    )
    lab = Path.home() / ".cache/forkproof-lab"
    places += sorted(lab.glob("bookworm-arm64-*/root/usr/lib/aarch64-linux-gnu/lib*.so.*"))
    found, sizes = [], Counter[bytes]()
    for place in places:
        if place.is_file() and not place.is_symlink() and place.stat().st_size <= LARGEST:
            data = place.read_bytes()
            machine = data[18:20]
            if data.startswith(b"\x7fELF") and sizes[machine] < 24:
                sizes[machine] += 1
                found.append(data)
    return found


def archive_files(elf: list[bytes]) -> list[bytes]:
    """One of each container around the smallest ELF files."""
    small = sorted(elf, key=len)[:2]
    members: archives.Members = {
        "/usr/bin/a": small[0],
        "/usr/lib/b.so": small[1],
        "/usr/bin/c": archives.Link("a"),
        "/etc/ld.so.preload": b"b.so\n",
        "/usr/bin/d": archives.Hard("/usr/bin/a"),
    }
    plain = {
        path[1:]: archives.Hard("usr/bin/a") if path.endswith("d") else content for path, content in members.items()
    }
    without = {path: content for path, content in members.items() if not path.endswith("d")}
    found = [archives.tar(plain), archives.docker([plain]), archives.tar(archives.oci([plain], ""))]
    found += [archives.compressed(archives.tar(plain), how) for how in ("gz", "xz", "zst")]
    found += [archives.deb(without, how) for how in ("", "gz", "xz", "zst")]
    return found + [archives.rpm(without, how) for how in ("gz", "xz", "zst")] + [archives.rpm(without, "")]


def open_archive(path: Path) -> None:
    with opened([str(path)], None) as scopes:
        for scope in scopes:
            for start in scope.starts:
                with contextlib.suppress(ForkproofError, OSError):
                    scope.sysroot.read(scope.sysroot.locate(start.name))


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed forkproof mutated real files.")
    parser.add_argument("--cases", type=int, default=22000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="this case alone")
    asked = parser.parse_args()
    elf = elf_files()
    packed = archive_files(elf)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _late)
    began = time.monotonic()
    outcomes: Counter[str] = Counter()
    numbers = [asked.only] if asked.only is not None else range(asked.cases)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        for number in numbers:
            chance = random.Random(f"{asked.seed}:{number}")  # noqa: S311 - the same cases again are the point
            files, read = ((elf, use), (packed, open_archive))[number % 2]
            path = Path(home) / "case"
            path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
            path.write_bytes(mutated(chance.choice(files), files, chance))
            outcomes[_outcome(read, path, f"--seed {asked.seed} --only {number}")] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{sum(outcomes.values())} cases, seed {asked.seed}, {time.monotonic() - began:.0f} s, peak {peak} MiB")
    for outcome, count in sorted(outcomes.items()):
        print(f"  {outcome}: {count}")
    return 1 if outcomes["BUG"] else 0


def _late(*_: object) -> None:
    raise Late


def _outcome(read: Callable[[Path], None], path: Path, name: str) -> str:
    signal.alarm(SECONDS)
    try:
        read(path)
    except ForkproofError:
        return "refused"
    except Exception:  # noqa: BLE001 - this is what is looked for
        print(f"BUG: tools/fuzz.py {name}", file=sys.stderr)
        traceback.print_exc()
        return "BUG"
    finally:
        signal.alarm(0)
    return "read, or refused in part"


if __name__ == "__main__":
    sys.exit(main())
