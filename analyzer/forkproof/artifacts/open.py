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

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Final

from forkproof.artifacts import scope
from forkproof.artifacts.programs import Files, Programs, in_directory, in_tree
from forkproof.artifacts.scope import Scope, Start
from forkproof.closure.sysroot import DirectorySysroot
from forkproof.errors import InputError, UsageError
from forkproof.model import Diagnostic

if TYPE_CHECKING:
    from forkproof.artifacts.image import Blobs
    from forkproof.artifacts.tree import Store, Tree
    from forkproof.artifacts.worlds import Part


class _Kind(Enum):
    PLAIN = "a file"
    DIRECTORY = "a directory"
    ROOT = "a root file system"
    LAYOUT = "an OCI layout"
    DEB = "a Debian package"
    RPM = "an RPM package"
    TAR = "a tar archive"


_DIRECTORIES: Final = (_Kind.DIRECTORY, _Kind.ROOT)
_PACKED: Final = (b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd", b"\x5d\0\0\x80")
_LABELLED: Final = 4


@contextmanager
def opened(
    names: Sequence[str], sysroot: Path | None, only: Sequence[str] = (), *, as_named: bool = False
) -> Iterator[list[Scope]]:
    """The scopes of these names; what was unpacked for them lives as long as the block.

    `as_named`: a plain file is started as it is, without what a unit or wrapper preloads.
    """
    if "" in names:
        raise UsageError(
            "a target is empty", next_step="Name a file or a directory; in a script, see which variable is unset."
        )
    kinds = {name: _kind(name) for name in names}
    with ExitStack() as stack:
        if all(kind is _Kind.PLAIN for kind in kinds.values()):
            yield [_plain(names, sysroot, as_named=as_named)]
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
    """Before ustar a tar had no magic: its name and a checksum in octal must do; one without files is zeros."""
    return name.endswith(".tar") and (head[148:155].strip(b" \0").isdigit() or head == bytes(512))


def _directory_kind(path: Path) -> _Kind:
    if (path / "oci-layout").is_file() and (path / "index.json").is_file():
        return _Kind.LAYOUT
    is_root = (path / "usr").is_dir() or ((path / "etc").is_dir() and (path / "lib").is_dir())
    return _Kind.ROOT if is_root else _Kind.DIRECTORY


def _plain(names: Sequence[str], sysroot: Path | None, *, as_named: bool = False) -> Scope:
    """Files of one sysroot; scripts among them stand for the programs that they start."""
    root = DirectorySysroot(sysroot or Path("/"))
    return Scope(root, str(sysroot or "/"), scope.once(root, scope.named(root, names, as_named=as_named)))


@dataclass
class _Opening:
    """Names of several kinds on their way to scopes."""

    kinds: dict[str, _Kind]
    behind: Path | None
    only: Sequence[str]
    store: Store
    stack: ExitStack
    errors: list[InputError] = field(default_factory=list)
    trees: dict[str, Tree] = field(default_factory=dict)
    """Archives that are no images, by name."""
    images: list[Tree] = field(default_factory=list)
    given: list[scope.Given] = field(default_factory=list)
    """The environment of each image."""

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
        found = [each for number in range(len(self.images)) for each in self._world(number)]
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
            self.trees[name] = tree

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
            self.trees[name] = tree

    def _images(self, name: str, blobs: Blobs) -> None:
        from forkproof.artifacts import image
        from forkproof.artifacts.tree import Tree

        for each in image.images(name, blobs):
            tree = Tree(f"{name} ({each.title})" if each.title else name)
            image.read_image(each, blobs, tree, self.store)
            self.images.append(tree)
            try:
                variables = image.environment(each, blobs, tree.name)
            except InputError as error:
                self.errors.append(error)
                variables = ()
            self.given.append(_given(variables, tree))

    # ---- worlds -------------------------------------------------------------------------------

    def _without_images(self) -> list[Scope]:
        """One world of all artifacts; directories and files alone need none."""
        directories = [name for name, kind in self.kinds.items() if kind in _DIRECTORIES]
        if self.trees:
            return self._world(None)
        roots = [name for name in directories if self.kinds[name] is _Kind.ROOT and self.behind is None]
        roots = [name for name in roots if Path(name).resolve() != Path("/")]
        scopes = [self._in_place(DirectorySysroot(name), name, [name], several=len(roots) > 1) for name in roots]
        rest = [name for name in self.kinds if name not in roots]
        outside = [name for name in rest if name in directories and not self._lies_behind(name)]
        if outside and self.behind is not None:
            return self._world(None)
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
        notes: list[Diagnostic] = []
        prefix = f"{label}:" if several else ""
        plain = [name for name in names if self.kinds[name] is _Kind.PLAIN]
        named = dict(zip(plain, scope.named(root, plain), strict=True))
        for name in names:
            if name in named:
                starts.append(named[name])
                continue
            found = Programs(self.only, with_libraries=False)
            found.look(in_directory(Path(name).resolve(), _inside(root, name)))
            here = scope.in_order(root, [(path, prefix) for _, path in found.chosen])
            starts += here
            notes += found.notes
            errors += found.errors if here or found.errors else [found.nothing(name)]
        return Scope(root, label, scope.once(root, starts), tuple(notes), errors=(*self.errors, *errors))

    def _world(self, number: int | None) -> list[Scope]:
        """Artifacts in front, the image of this number or the sysroot behind."""
        from forkproof.artifacts import worlds
        from forkproof.artifacts.world import DirectoryLayer, TreeLayer

        base: worlds.Part | None = None
        image = None if number is None else self.images[number]
        given = scope.NOTHING if number is None else self.given[number]
        if image is not None:
            prefix = image.name if len(self.images) > 1 else ""
            base = worlds.Part(prefix, TreeLayer(image, is_part=False), in_tree(image))
        elif self.behind is not None:
            base = worlds.Part("", DirectoryLayer(self.behind, is_part=False), self._of_sysroot(self.behind))
        parts = list(self._parts(has_base=base is not None))
        names = [part.name for part in parts if part.name] + ([image.name] if image is not None else [])
        files = [self._located(n) or str(Path(n).absolute()) for n, kind in self.kinds.items() if kind is _Kind.PLAIN]
        trees = [*self.trees.values(), *([image] if image is not None else [])]
        programs = Programs(self.only, with_libraries=image is None)
        found = worlds.scopes(_label(names, self.behind), parts, base, files, programs, given)
        notes = tuple(note for tree in trees for note in tree.diagnostics) + found[0].diagnostics
        return [replace(found[0], diagnostics=notes, errors=(*self.errors, *found[0].errors)), *found[1:]]

    def _parts(self, *, has_base: bool) -> Iterator[Part]:
        """What stands in front, in the order in which it was named; single files first, since each means itself."""
        from forkproof.artifacts.world import DirectoryLayer, FileLayer, TreeLayer
        from forkproof.artifacts.worlds import Part

        files = [name for name, kind in self.kinds.items() if kind is _Kind.PLAIN and self._located(name) is None]
        if files:
            yield Part("", FileLayer([str(Path(name).absolute()) for name in files]), iter(()))
        for name, kind in self.kinds.items():
            if name in self.trees:
                is_package = kind in {_Kind.DEB, _Kind.RPM}
                tree = self.trees[name]
                yield Part(name, TreeLayer(tree, is_part=is_package or has_base), in_tree(tree), is_package)
            elif kind in _DIRECTORIES and (self.behind is None or not self._lies_behind(name)):
                is_part = has_base or kind is _Kind.DIRECTORY
                yield Part(name, DirectoryLayer(name, is_part=is_part), in_directory(Path(name), ""))

    def _of_sysroot(self, behind: Path) -> Files:
        """Programs of those directories that are a part of the sysroot."""
        root = DirectorySysroot(behind)
        inside = [name for name, kind in self.kinds.items() if kind in _DIRECTORIES and self._lies_behind(name)]
        return chain.from_iterable(in_directory(Path(name).resolve(), _inside(root, name)) for name in inside)

    def _located(self, name: str) -> str | None:
        """A path of the sysroot, if the file is there."""
        try:
            return DirectorySysroot(self.behind).locate(name) if self.behind is not None else None
        except InputError:
            return None


def _given(variables: Sequence[str], tree: Tree) -> scope.Given:
    """What an image's environment says to ld.so."""
    from forkproof.artifacts import start

    source = f"the environment of {tree.name}"
    values = [value for name, _, value in (each.partition("=") for each in variables) if name == "LD_LIBRARY_PATH"]
    places = tuple(filter(None, values[-1].replace(";", ":").split(":"))) if values else ()
    if places:
        tree.note(f"libraries are looked for in {', '.join(places)} first, since {source} says so", "info")
    return scope.Given(start.of_environment(variables, source).libraries, places, source)


def _inside(root: DirectorySysroot, name: str) -> str:
    """What a directory of this machine is called in a sysroot."""
    inside = "/" + str(Path(name).resolve().relative_to(root.root)).removeprefix(".")
    return inside.rstrip("/")


def _label(names: Sequence[str], behind: Path | None) -> str:
    """What the report calls a world: all of a few artifacts, the first of many."""
    shown = list(names) if len(names) <= _LABELLED else [names[0], f"{len(names) - 1} more artifacts"]
    return " + ".join([*shown, *([str(behind)] if behind is not None else [])])


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
