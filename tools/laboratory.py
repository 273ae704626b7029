"""An aarch64 machine for the tests: real Debian arm64 packages under qemu-system-aarch64, without root.

    python tools/laboratory.py                       make it, and say where it is
    python tools/laboratory.py -- COMMAND…           run a command in it; its output is this one's
    python tools/laboratory.py --put DIR -- COMMAND  the same with DIR as /work/DIR's name

What it is made of: the sysroots `bookworm-arm64` (programs, Python) and `bookworm-arm64-vm` (kernel, busybox), and
wheels of forkproof's dependencies for aarch64. Disk images are made by mke2fs -d, the initramfs here: nothing is
mounted on the host and nothing foreign runs on it. All of it is cached beside the sysroots; the disk of a run holds
what is tested, and comes back with what /work/out holds.
"""

from __future__ import annotations

import argparse
import compileall
import gzip
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.sysroot import find, lab

HERE = Path(__file__).resolve().parents[1]
#: In the order in which they need each other; ext4 is built in.
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
#: What no test reads: half of the disk.
LEFT_OUT = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/qemu",
    "usr/share/info",
    "boot",
    "usr/include",
)
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64", "any")
GUEST_PYTHON = "3.11"
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in {modules}; do /bin/busybox insmod /modules/$m.ko; done
/bin/busybox mount -t ext4 /dev/vda /mnt
/bin/busybox mount -t ext4 /dev/vdb /mnt/work
/bin/busybox chroot /mnt /bin/busybox --install -s /usr/bin
for d in proc sys dev; do /bin/busybox mount --move /$d /mnt/$d; done
/bin/busybox mount -t tmpfs tmp /mnt/tmp
/bin/busybox mkdir -p /mnt/dev/shm /mnt/dev/pts
/bin/busybox mount -t tmpfs shm /mnt/dev/shm
/bin/busybox mount -t devpts -o ptmxmode=666 pts /mnt/dev/pts
/bin/busybox chroot /mnt /bin/sh /work/run
echo "laboratory: status $?"
/bin/busybox umount /mnt/work
/bin/busybox poweroff -f
"""


def dependencies() -> list[str]:
    """What forkproof needs to run."""
    with (HERE / "pyproject.toml").open("rb") as file:
        return sorted(tomllib.load(file)["project"]["dependencies"])


class LaboratoryError(Exception):
    """The machine cannot be made or run: the message says why, and what to do."""


def missing() -> str | None:
    """Why it cannot be used here, or None."""
    for tool in ("qemu-system-aarch64", "mke2fs", "debugfs"):
        if shutil.which(tool) is None and not Path("/usr/sbin", tool).exists():
            return f"{tool} is not installed (Debian: qemu-system-arm, e2fsprogs)"
    for name in ("bookworm-arm64", "bookworm-arm64-vm"):
        if find(name) is None:
            return f"no sysroot {name}: make sysroots SYSROOTS={name}"
    return None


# The base: made once.


@dataclass(frozen=True)
class Base:
    """What every run starts from."""

    kernel: Path
    initramfs: Path
    disk: Path


def _sysroots() -> tuple[Path, Path]:
    system, machine = find("bookworm-arm64"), find("bookworm-arm64-vm")
    if system is None or machine is None:
        raise LaboratoryError(missing() or "")
    return system, machine


def base() -> Base:
    """The kernel, the initramfs and the disk, made now if need be."""
    system, machine = _sysroots()
    content = "\n".join((system.parent.name, machine.parent.name, INIT, *LEFT_OUT, *sorted(dependencies())))
    folder = lab() / f"laboratory-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=".laboratory-", dir=lab()) as scratch:
            fresh = Path(scratch) / "made"
            fresh.mkdir()
            kernel = next((machine / "boot").glob("vmlinuz-*"))
            (fresh / "vmlinuz").write_bytes(_plain_kernel(kernel.read_bytes()))
            (fresh / "initramfs").write_bytes(gzip.compress(_initramfs(machine), 1))
            _make_disk(fresh / "disk", _base_tree(Path(scratch) / "root", system, machine), spare=1 << 28)
            fresh.rename(folder)
    return Base(folder / "vmlinuz", folder / "initramfs", folder / "disk")


def _plain_kernel(raw: bytes) -> bytes:
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def _base_tree(root: Path, system: Path, machine: Path) -> Path:
    """The system with the wheels, as links into the sysroot where it can be."""
    subprocess.run(["cp", "-al", system, root], check=True)
    for name in LEFT_OUT:
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("proc", "sys", "dev", "tmp", "work", "run", "root"):
        (root / name).mkdir(exist_ok=True)
    for link in ("usr/bin/sh",):
        (root / link).unlink(missing_ok=True)
        (root / link).symlink_to("bash")
    (root / "usr/bin/busybox").unlink(missing_ok=True)
    shutil.copy2(machine / "usr/bin/busybox", root / "usr/bin/busybox")
    _install_wheels(root / "opt/site")
    return root


def _install_wheels(site: Path) -> None:
    """forkproof's dependencies for the guest's Python, unpacked; compiled if this Python can do that for it."""
    wheels = lab() / "wheels-aarch64"
    options = [f"--platform={name}" for name in PLATFORMS]
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    command += ["--only-binary=:all:", f"--python-version={GUEST_PYTHON}", *options, f"--target={site}"]
    if wheels.is_dir():
        command += [f"--find-links={wheels}"]
    result = subprocess.run([*command, *dependencies()], capture_output=True, text=True, check=False)
    if result.returncode:
        raise LaboratoryError(f"pip could not get wheels for aarch64:\n{result.stderr[-600:]}")
    compile_for_guest(site)


def compile_for_guest(site: Path) -> None:
    """Bytecode costs an emulated machine seconds to make; another Python's would be of no use to it."""
    if platform.python_version().startswith(f"{GUEST_PYTHON}."):
        compileall.compile_dir(site, quiet=2, workers=os.cpu_count() or 1)


def _make_disk(path: Path, tree: Path, spare: int) -> None:
    size = sum(p.lstat().st_size + 4096 for p in tree.rglob("*")) * 9 // 8 + spare
    mke2fs = shutil.which("mke2fs") or "/usr/sbin/mke2fs"
    command: list[str | Path] = [
        mke2fs,
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-E",
        "root_owner=0:0",
        "-d",
        tree,
        path,
        str(size >> 10),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LaboratoryError(f"mke2fs: {result.stderr[-400:]}")


def _initramfs(machine: Path) -> bytes:
    """A cpio archive ("newc", as the kernel's Documentation/driver-api/early-userspace describes it)."""
    modules = {p.stem: p for p in machine.rglob("*.ko")}
    members: list[tuple[str, int, bytes]] = [("bin", stat.S_IFDIR | 0o755, b""), ("modules", stat.S_IFDIR | 0o755, b"")]
    members.append(("bin/busybox", stat.S_IFREG | 0o755, (machine / "usr/bin/busybox").read_bytes()))
    members += [(f"modules/{n}.ko", stat.S_IFREG | 0o644, modules[n].read_bytes()) for n in MODULES]
    members.append(("init", stat.S_IFREG | 0o755, INIT.format(modules=" ".join(MODULES)).encode()))
    members.append(("TRAILER!!!", 0, b""))
    return b"".join(_member(number, *member) for number, member in enumerate(members, 1))


def _member(number: int, name: str, mode: int, content: bytes) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


# A run.


@dataclass(frozen=True)
class Result:
    """What came back."""

    console: str
    status: int | None
    """Of the script; None when it did not come to its end."""
    seconds: float
    files: Mapping[str, bytes]
    """What the script left in /work/out."""


def forkproof_files() -> Iterator[tuple[str, Path]]:
    """This checkout's forkproof as /work/site."""
    yield "site/forkproof", HERE / "analyzer" / "forkproof"
    yield "site/forkproof/signatures", HERE / "signatures"


def run(script: str, files: Mapping[str, Path] | None = None, seconds: float = 600.0) -> Result:
    """Run a shell script in the machine; `files` are directories or files to put below /work."""
    if (reason := missing()) is not None:
        raise LaboratoryError(reason)
    begun, made = time.monotonic(), base()
    with tempfile.TemporaryDirectory(prefix="forkproof-laboratory-") as scratch:
        tree = Path(scratch) / "work"
        (tree / "out").mkdir(parents=True)
        for name, source in [*forkproof_files(), *(files or {}).items()]:
            _copy(source, tree / name)
        compile_for_guest(tree / "site")
        (tree / "run").write_text(_ENVIRONMENT + script)
        disk = Path(scratch) / "disk"
        _make_disk(disk, tree, spare=1 << 25)
        console = _boot(made, disk, seconds)
        files_back = dict(_read_back(disk, Path(scratch) / "back"))
        console = files_back.pop("console", b"").decode("utf-8", "replace") + console
    marks = [line for line in console.splitlines() if line.startswith("laboratory: status ")]
    status = int(marks[-1].split()[-1]) if marks else None
    return Result(console, status, time.monotonic() - begun, files_back)


_ENVIRONMENT = """\
export PATH=/usr/bin:/usr/sbin HOME=/root LC_ALL=C.UTF-8 PYTHONPATH=/work/site:/opt/site
export PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
cd /work
exec </dev/null >/work/out/console 2>&1
"""


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def _boot(made: Base, disk: Path, seconds: float) -> str:
    command = [
        "qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "max,pauth-impdef=on", "-smp", "2", "-m", "2G",
        "-accel", "tcg,thread=multi", "-nic", "none", "-nographic", "-no-reboot",
        "-kernel", str(made.kernel), "-initrd", str(made.initramfs), "-append", "console=ttyAMA0 quiet panic=-1",
        "-drive", f"file={made.disk},format=raw,if=virtio,snapshot=on",
        "-drive", f"file={disk},format=raw,if=virtio",
    ]  # fmt: skip
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        return result.stdout.decode("utf-8", "replace").replace("\r\n", "\n")
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode("utf-8", "replace") + f"\nlaboratory: no end after {seconds:.0f} s\n"


def _read_back(disk: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    folder.mkdir()
    debugfs = shutil.which("debugfs") or "/usr/sbin/debugfs"
    subprocess.run([debugfs, "-R", f"rdump /out {folder}", disk], capture_output=True, check=False)
    for path in sorted((folder / "out").rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder / "out")), path.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description="An aarch64 machine of Debian packages.")
    parser.add_argument("--put", action="append", type=Path, default=[], metavar="PATH", help="put this below /work")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="shell commands, one an argument")
    arguments = parser.parse_args()
    try:
        if not arguments.command:
            print(base().disk.parent)
            return 0
        files = {path.resolve().name: path.resolve() for path in arguments.put}
        result = run("\n".join(arguments.command) + "\n", files, arguments.seconds)
    except LaboratoryError as error:
        print(f"laboratory: {error}", file=sys.stderr)
        return 1
    print(result.console, end="")
    print(f"laboratory: {result.seconds:.1f} s", file=sys.stderr)
    return 1 if result.status is None else result.status


if __name__ == "__main__":
    sys.exit(main())
