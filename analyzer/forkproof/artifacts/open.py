"""What the user named, opened: programs to scan, and the world in which each would run.

Owns: what each kind of input is, which programs of it are targets, and what stands in front of what.
Takes: names, and the options of a scan. Gives: `Scope`s.
Must never: analyse code, execute anything, or leave a temporary file behind.

    plain ELF files                  the sysroot, as ever
    a directory                      its programs, in the sysroot it lies in; one that looks like a root is the sysroot
    .deb, .rpm, tar(.gz|.xz|.zst)    one world together, resolved among themselves first, --sysroot behind
    OCI layout, docker-save archive  a world for each image, packages that were named in front
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Final

from forkproof.closure.sysroot import DirectorySysroot, Sysroot
from forkproof.errors import InputError, UsageError
from forkproof.model import Diagnostic

if TYPE_CHECKING:
    from forkproof.artifacts.image import Blobs
    from forkproof.artifacts.tree import Store, Tree
    from forkproof.artifacts.world import Layer


class _Kind(Enum):
    PLAIN = "a file"
    DIRECTORY = "a directory"
    ROOT = "a root file system"
    LAYOUT = "an OCI layout"
    DEB = "a Debian package"
    RPM = "an RPM package"
    TAR = "a tar archive"


_PACKED: Final = (b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd", b"\x5d\0\0\x80")
_SKIPPED: Final = ("/usr/lib/debug/", "/proc/", "/sys/", "/dev/", "/boot/")
_LABELLED: Final = 4
_LIBC_ONLY: Final = frozenset({"fork", "__tls_get_addr"})
"""Who exports malloc and one of these is a C library, or its loader."""


@dataclass(frozen=True, slots=True)
class Start:
    """A program to be scanned."""

    name: str
    """As `Sysroot.locate` takes it."""
    preload: tuple[str, ...] = ()
    """What its unit or wrapper puts into LD_PRELOAD."""
    source: str = ""
    """The file that says so."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Programs that run in one world."""

    sysroot: Sysroot
    label: str
    """What the report calls the sysroot."""
    starts: tuple[Start, ...]
    prefix: str = ""
    """Put before the targets' paths where several worlds could have the same."""
    diagnostics: tuple[Diagnostic, ...] = ()
    errors: tuple[InputError, ...] = ()


@contextmanager
def opened(names: Sequence[str], sysroot: Path | None, only: Sequence[str] = ()) -> Iterator[list[Scope]]:
    """The scopes of these names; what was unpacked for them lives as long as the block."""
    kinds = {name: _kind(name) for name in names}
    with ExitStack() as stack:
        if all(kind is _Kind.PLAIN for kind in kinds.values()):
            yield [_plain(names, sysroot)]
            return
        from forkproof.artifacts.tree import Store

        place = TemporaryDirectory(prefix="forkproof-", ignore_cleanup_errors=True)
        opening = _Opening(kinds, sysroot, only, Store(Path(stack.enter_context(place))), stack)
        yield opening.scopes()


def _kind(name: str) -> _Kind:
    try:
        mode = os.stat(name).st_mode  # noqa: PTH116 - a name with a NUL raises ValueError in both
        if stat.S_ISDIR(mode):
            return _directory_kind(Path(name))
        if not stat.S_ISREG(mode):
            return _Kind.PLAIN
        with Path(name).open("rb") as stream:
            head = stream.read(512)
    except (OSError, ValueError):
        return _Kind.PLAIN
    if head.startswith(b"!<arch>\ndebian-binary"):
        return _Kind.DEB
    if head.startswith(b"\xed\xab\xee\xdb"):
        return _Kind.RPM
    is_tar = head[257:262] == b"ustar" or head.startswith(_PACKED)
    return _Kind.TAR if is_tar or _is_old_tar(name, head) else _Kind.PLAIN


def _is_old_tar(name: str, head: bytes) -> bool:
    """Before ustar a tar had no magic: its name and a checksum in octal must do."""
    return name.endswith(".tar") and head[148:155].strip(b" \0").isdigit()


def _directory_kind(path: Path) -> _Kind:
    if (path / "oci-layout").is_file() and (path / "index.json").is_file():
        return _Kind.LAYOUT
    is_root = (path / "usr").is_dir() or ((path / "etc").is_dir() and (path / "lib").is_dir())
    return _Kind.ROOT if is_root else _Kind.DIRECTORY


def _plain(names: Sequence[str], sysroot: Path | None) -> Scope:
    """Files of one sysroot; scripts among them stand for the programs that they start."""
    root = DirectorySysroot(sysroot or Path("/"))
    return Scope(root, str(sysroot or "/"), tuple(_start(root, name) for name in names))


def _start(root: Sysroot, name: str) -> Start:
    """A name as it is, unless a unit or a script of the sysroot preloads something into that program."""
    from forkproof.artifacts import start

    try:
        path = root.locate(name)
        script = start.of_script(root, path)
        if script is not None:
            return Start(script[0], script[1].libraries, script[1].source)
        known = start.preloads(root).get(root.resolve(path) or path)
    except InputError:
        known = None
    return Start(name, known.libraries, known.source) if known is not None else Start(name)


@dataclass
class _Opening:
    """Names of several kinds on their way to scopes."""

    kinds: dict[str, _Kind]
    behind: Path | None
    only: Sequence[str]
    store: Store
    stack: ExitStack
    errors: list[InputError] = field(default_factory=list)
    trees: list[tuple[Tree, bool]] = field(default_factory=list)
    """Archives that are no images, and whether each is a package."""
    images: list[Tree] = field(default_factory=list)

    def scopes(self) -> list[Scope]:
        """Everything, opened."""
        for name, kind in self.kinds.items():
            try:
                self._read(name, kind)
            except InputError as error:
                self.errors.append(error)
        if self.images and self.behind is not None:
            message = "an image brings its own root; --sysroot cannot stand behind it"
            raise UsageError(message, next_step="Leave --sysroot out, or unpack the image.")
        found = [self._world(image) for image in self.images]
        if not self.images:
            found = self._without_images()
        return found or [Scope(DirectorySysroot(), "/", (), errors=tuple(self.errors))]

    # ---- reading ------------------------------------------------------------------------------

    def _read(self, name: str, kind: _Kind) -> None:
        from forkproof.artifacts import package
        from forkproof.artifacts.tree import Tree

        if kind is _Kind.LAYOUT:
            self._images(name, _blobs_of_directory(Path(name)))
        elif kind is _Kind.TAR:
            self._tar(name)
        elif kind in {_Kind.DEB, _Kind.RPM}:
            tree = Tree(name)
            read = package.read_deb if kind is _Kind.DEB else package.read_rpm
            with Path(name).open("rb") as stream:
                read(stream, tree, self.store)
            self.trees.append((tree, True))

    def _tar(self, name: str) -> None:
        """A tree, or an image if a manifest is among its members."""
        from forkproof.artifacts import tar
        from forkproof.artifacts.limits import unpacked
        from forkproof.artifacts.tree import Tree

        tree, spooled = Tree(name), dict[str, Path]()
        with Path(name).open("rb") as stream:
            for member in tar.members(unpacked(stream, name, self.store.limits), name, self.store.limits):
                path = member.name.removeprefix("./")
                if not member.hard and member.size and _is_blob(path):
                    spooled[path] = self.store.spool(name, member.read)
                elif member.link and _is_blob(path):  # docker save: a layer that another image has, too
                    spooled.setdefault(path, spooled.get(_joined(path, member.link), Path("/dev/null")))
                else:
                    tar.add(tree, member, self.store)
        documents = ("manifest.json", "index.json")
        if any(f"/{document}" in tree.entries for document in documents) and spooled:
            self._images(name, _blobs_of_archive(tree, spooled))
        else:
            self.trees.append((tree, False))

    def _images(self, name: str, blobs: Blobs) -> None:
        from forkproof.artifacts import image
        from forkproof.artifacts.tree import Tree

        for each in image.images(name, blobs):
            tree = Tree(f"{name} ({each.title})" if each.title else name)
            image.read_image(each, blobs, tree, self.store)
            self.images.append(tree)

    # ---- worlds -------------------------------------------------------------------------------

    def _without_images(self) -> list[Scope]:
        """One world of all artifacts; directories and files alone need none."""
        directories = [name for name, kind in self.kinds.items() if kind in {_Kind.DIRECTORY, _Kind.ROOT}]
        if self.trees:
            return [self._world(None)]
        roots = [name for name in directories if self.kinds[name] is _Kind.ROOT and self.behind is None]
        roots = [name for name in roots if Path(name).resolve() != Path("/")]
        scopes = [self._in_place(DirectorySysroot(name), name, [name], several=len(roots) > 1) for name in roots]
        rest = [name for name in self.kinds if name not in roots]
        outside = [name for name in rest if name in directories and not self._lies_behind(name)]
        if outside and self.behind is not None:
            return [self._world(None)]
        if any(self.kinds[name] in {_Kind.DIRECTORY, _Kind.ROOT, _Kind.PLAIN} for name in rest):
            scopes.append(self._in_place(DirectorySysroot(self.behind or "/"), str(self.behind or "/"), rest))
        return scopes

    def _lies_behind(self, name: str) -> bool:
        """A part of the sysroot; another root inside it, a build root for example, is none."""
        if self.behind is None:
            return True
        place, behind = Path(name).resolve(), self.behind.resolve()
        return place == behind or (place.is_relative_to(behind) and self.kinds[name] is not _Kind.ROOT)

    def _in_place(self, root: DirectorySysroot, label: str, names: Sequence[str], *, several: bool = False) -> Scope:
        """Files and directories of one sysroot."""
        starts: list[Start] = []
        errors: list[InputError] = []
        for name in names:
            if self.kinds[name] is _Kind.PLAIN:
                starts.append(_start(root, name))
                continue
            top = Path(name).resolve()
            inside = "/" + str(top.relative_to(root.root)).removeprefix(".")
            found = _Programs(self.only, with_libraries=False)
            found.look(_walk(top, inside.rstrip("/")))
            starts += _sorted_starts(root, found)
            errors += found.errors or [] if starts else [_nothing(name)]
        prefix = f"{label}:" if several else ""
        return Scope(root, label, tuple(starts), prefix, errors=(*self.errors, *errors))

    def _world(self, image: Tree | None) -> Scope:
        """Artifacts in front, an image or the sysroot behind."""
        from forkproof.artifacts.world import DirectoryLayer, FileLayer, TreeLayer, World

        front: list[Layer] = [TreeLayer(tree, is_package=is_package) for tree, is_package in self.trees]
        directories = [name for name, kind in self.kinds.items() if kind in {_Kind.DIRECTORY, _Kind.ROOT}]
        front += [DirectoryLayer(name) for name in directories]
        files = [str(Path(name).absolute()) for name, kind in self.kinds.items() if kind is _Kind.PLAIN]
        front += [FileLayer(files)] if files else []
        layers = [*front]
        layers += [TreeLayer(image, is_package=False)] if image is not None else []
        layers += [DirectoryLayer(self.behind)] if self.behind is not None and image is None else []
        names = [tree.name for tree, _ in self.trees] + directories + ([image.name] if image is not None else [])
        label = _label(names, self.behind)
        world = World(label, layers)
        found = _Programs(self.only, with_libraries=image is None)
        for tree, is_package in self.trees:
            found.look(_in_tree(tree, world), is_package=is_package)
        for name in directories:
            found.look(_walk(Path(name), ""))
        if image is not None:
            found.look(_in_tree(image, world))
        starts = [*(Start(name) for name in files), *_sorted_starts(world, found, alone=not files)]
        errors = [*self.errors, *found.errors, *([] if starts else [_nothing(label)])]
        trees = [tree for tree, _ in self.trees] + ([image] if image is not None else [])
        notes = tuple(note for tree in trees for note in tree.diagnostics) + found.notes
        prefix = f"{image.name}:" if image is not None and len(self.images) > 1 else ""
        return Scope(world, label, tuple(starts), prefix, notes, tuple(errors))


def _label(names: Sequence[str], behind: Path | None) -> str:
    """What the report calls a world: all of a few artifacts, the first of many."""
    shown = list(names) if len(names) <= _LABELLED else [names[0], f"{len(names) - 1} more artifacts"]
    return " + ".join([*shown, *([str(behind)] if behind is not None else [])])


def _nothing(name: str) -> InputError:
    help_text = "Name a library of it by its path, or see what it holds."
    return InputError(name, "holds no ELF program for x86-64 or aarch64", next_step=help_text)


def _sorted_starts(sysroot: Sysroot, found: _Programs, *, alone: bool = True) -> list[Start]:
    """Each program once, with what its unit or wrapper preloads."""
    from forkproof.artifacts import start

    known = {**start.wrapped(sysroot), **start.preloads(sysroot)}
    starts = []
    for path in sorted(found.chosen(alone=alone)):
        preload = known.get(sysroot.resolve(path) or path)
        starts.append(Start(path, preload.libraries, preload.source) if preload is not None else Start(path))
    return starts


# Programs among files.


class _Programs:
    """Which files are to be scanned: programs; of packages also what exports malloc; all libraries if nothing is."""

    def __init__(self, only: Sequence[str], *, with_libraries: bool) -> None:
        self._only = only
        self._with_libraries = with_libraries
        self._seen: set[tuple[int, int]] = set()
        self._programs: list[str] = []
        self._allocators: list[str] = []
        self._libraries: list[str] = []
        self._foreign = 0
        self.errors: list[InputError] = []

    def chosen(self, *, alone: bool) -> list[str]:
        """Paths to scan; `alone` where there are no targets beside these."""
        return [*self._programs, *self._allocators] or (self._libraries if self._with_libraries and alone else [])

    @property
    def notes(self) -> tuple[Diagnostic, ...]:
        """What was left out."""
        if not self._foreign:
            return ()
        return (Diagnostic("info", "", f"{self._foreign} ELF files are for other machines, or no programs"),)

    def look(self, files: Iterator[tuple[str, Path]], *, is_package: bool = False) -> None:
        """Sort these files."""
        for path, place in files:
            if self._only and not any(fnmatch.fnmatch(path, pattern) for pattern in self._only):
                continue
            status = place.stat()
            if path.startswith(_SKIPPED) or (status.st_dev, status.st_ino) in self._seen:
                continue
            self._seen.add((status.st_dev, status.st_ino))
            self._sort(path, place, is_package)

    def _sort(self, path: str, place: Path, is_package: bool) -> None:
        from forkproof.allocators import is_program
        from forkproof.elf import image as elf
        from forkproof.errors import UnsupportedElf

        try:
            image = elf.load(place)
        except UnsupportedElf:
            self._foreign += 1
            return
        except InputError as error:
            self.errors.append(InputError(path, error.reason, next_step=error.next_step))
            return
        if is_program(image) and image.soname is None:
            self._programs.append(path)
        elif is_package and image.soname is not None:
            self._libraries.append(path)
            names = image.dynamic_symbols.by_name
            if self._with_libraries and _defines(image, "malloc") and not _LIBC_ONLY & names.keys():
                self._allocators.append(path)


def _defines(image: object, name: str) -> bool:
    from forkproof.elf.image import Image

    assert isinstance(image, Image)
    table = image.dynamic_symbols
    return any(bool(table.defined[index]) for index in table.by_name.get(name, ()))


def _in_tree(tree: Tree, world: Sysroot) -> Iterator[tuple[str, Path]]:
    """ELF files of an archive, by the paths that they have in the world."""
    for path, entry in tree.files():
        resolved = world.resolve(path)
        if entry.blob is not None and resolved is not None:
            yield resolved, entry.blob


def _walk(top: Path, inside: str) -> Iterator[tuple[str, Path]]:
    """ELF files below a directory, sorted; links are not followed, other file systems are."""
    for directory, below, names in os.walk(top):
        below.sort()
        for name in sorted(names):
            place = Path(directory, name)
            if _is_elf(place):
                yield f"{inside}/{place.relative_to(top)}", place


def _is_elf(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as stream:
            return stream.read(4) == b"\x7fELF"
    except OSError:
        return False


# Blobs of images.


def _is_blob(path: str) -> bool:
    return path.startswith("blobs/sha256/") or (path.endswith(("/layer.tar", ".tar")) and path.count("/") <= 1)


def _joined(path: str, link: str) -> str:
    """A link of `docker save`: ../<id>/layer.tar, one level up."""
    return link.removeprefix("../") if link.startswith("../") else f"{path.rpartition('/')[0]}/{link}"


def _blobs_of_directory(root: Path) -> Blobs:
    @contextmanager
    def open_blob(path: str) -> Iterator[IO[bytes]]:
        place = root / path
        if not place.is_file() or not place.resolve().is_relative_to(root.resolve()):
            raise KeyError(path)
        with place.open("rb") as stream:
            yield stream

    return open_blob


def _blobs_of_archive(tree: Tree, spooled: dict[str, Path]) -> Blobs:
    import io

    @contextmanager
    def open_blob(path: str) -> Iterator[IO[bytes]]:
        if path in spooled:
            with spooled[path].open("rb") as stream:
                yield stream
            return
        yield io.BytesIO(tree.entries[f"/{path}"].data)

    return open_blob
