"""Container images: OCI layouts and what `docker save` writes, in a directory or a tar, as one tree per image.

Owns: manifests, configurations, the order of layers, whiteouts. Takes: blobs by name. Gives: trees.
Must never: fetch anything, or take a digest for a path.

Source: OCI image-spec, image-layout.md, manifest.md, config.md, layer.md ("Whiteouts apply to lower layers only").
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, Final

from forkproof.artifacts import tar
from forkproof.artifacts.limits import BadArchive, Counted, unpacked
from forkproof.artifacts.tree import Entry, Kind, Store, Tree, normal

_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_MACHINES: Final = frozenset({"amd64", "arm64"})
_LARGEST_DOCUMENT: Final = 4 << 20
_DEEPEST: Final = 4
"""How many indexes may lead to one another."""

Blobs = Callable[[str], AbstractContextManager[IO[bytes]]]
"""A blob by its path in the layout, such as blobs/sha256/…; raises KeyError."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a layout: what to call it, and its layers, lowest first."""

    title: str
    layers: tuple[str, ...]
    config: str = ""
    """Where its configuration is."""


def images(name: str, blobs: Blobs) -> list[Image]:
    """The images of a layout that are for Linux on a machine that is analysed."""
    try:
        found = _docker(name, blobs) if _has(blobs, "manifest.json") else list(_oci(name, blobs))
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BadArchive(name, f"damaged: its manifest does not lead to layers ({error})") from error
    if not found:
        raise BadArchive(name, "holds no image for linux/amd64 or linux/arm64")
    return found


def _has(blobs: Blobs, path: str) -> bool:
    try:
        with blobs(path):
            return True
    except KeyError:
        return False


def _docker(name: str, blobs: Blobs) -> list[Image]:
    """`docker save`: a list of images, each with its layers' paths."""
    listed = _document(name, blobs, "manifest.json")
    return [
        Image(
            ", ".join(each.get("RepoTags") or ()),
            tuple(map(_inside, each["Layers"])),
            _inside(each.get("Config") or ""),
        )
        for each in listed
    ]


def _inside(path: str) -> str:
    return path.removeprefix("./")


def _oci(name: str, blobs: Blobs) -> Iterator[Image]:
    yield from _of_index(name, blobs, _document(name, blobs, "index.json"), "", 0)


def _of_index(name: str, blobs: Blobs, index: Any, title: str, depth: int) -> Iterator[Image]:  # noqa: ANN401 - JSON
    if depth > _DEEPEST:
        raise BadArchive(name, "damaged: its indexes do not end")
    for each in index["manifests"]:
        platform = each.get("platform") or {}
        machine = platform.get("architecture", "amd64")
        if machine not in _MACHINES or platform.get("os", "linux") != "linux":
            continue
        label = (each.get("annotations") or {}).get("org.opencontainers.image.ref.name", title)
        words = ", ".join(filter(None, [str(label), f"linux/{machine}" if platform else ""]))
        document = _document(name, blobs, _blob(each["digest"]))
        if "manifests" in document:
            yield from _of_index(name, blobs, document, str(label), depth + 1)
        elif "layers" in document:
            config = (document.get("config") or {}).get("digest")
            yield Image(
                words, tuple(_blob(layer["digest"]) for layer in document["layers"]), _blob(config) if config else ""
            )


def _blob(digest: str) -> str:
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise KeyError(f"a digest that is none of sha256: {digest[:80]!r}")
    return f"blobs/sha256/{match[1]}"


def _document(name: str, blobs: Blobs, path: str) -> Any:  # noqa: ANN401 - JSON
    with blobs(path) as stream:
        text = stream.read(_LARGEST_DOCUMENT + 1)
    if len(text) > _LARGEST_DOCUMENT:
        raise BadArchive(name, f"refused: {path} is larger than any manifest")
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadArchive(name, f"damaged: {path} is not JSON ({error})") from error


def environment(image: Image, blobs: Blobs, name: str) -> tuple[str, ...]:
    """NAME=value, as the image's configuration gives it to every process of a container. Raises BadArchive."""
    if not image.config:
        return ()
    try:
        listed = (_document(name, blobs, image.config).get("config") or {}).get("Env") or ()
        return tuple(str(each) for each in listed)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"damaged: {image.config} cannot be read, so what its environment preloads is not known"
        raise BadArchive(name, reason) from error


# Layers.


def read_image(image: Image, blobs: Blobs, tree: Tree, store: Store) -> None:
    """Apply all layers, lowest first."""
    for layer in image.layers:
        try:
            with blobs(layer) as stream:
                _apply(unpacked(stream, tree.name, store.limits), tree, store)
        except KeyError as error:
            raise BadArchive(tree.name, f"damaged: the layer {layer} is not there") from error


def _apply(stream: Counted, tree: Tree, store: Store) -> None:
    """One layer: what it removes of those below, then what it adds."""
    layer = Tree(tree.name)
    for member in tar.members(stream, tree.name, store.limits):
        base = member.name.rstrip("/").rpartition("/")[2]
        if base.startswith(_WHITEOUT):
            path = normal(member.name, store.limits)
            if path is not None:
                _white_out(tree, path)
        elif member.hard:
            _hard(tree, layer, member, store)
        else:
            tar.add(layer, member, store)
    for path, entry in layer.entries.items():
        known = tree.entries.get(path)
        if known is not None and known.kind is Kind.DIRECTORY and entry.kind is not Kind.DIRECTORY:
            tree.remove(path)
        tree.add(path, entry)
    tree.diagnostics += layer.diagnostics


def _hard(tree: Tree, layer: Tree, member: tar.Member, store: Store) -> None:
    """A hard link to a file of this layer, or of one below."""
    path, target = normal(member.name, store.limits), normal(member.link, store.limits)
    known: Entry | None = None
    if path is not None and target is not None:
        known = layer.entries.get(target) or tree.entries.get(target)
    if path is None or known is None or known.kind is Kind.DIRECTORY:
        layer.note(f"left out, a hard link to what the image does not hold: {member.name[:200]}")
    else:
        layer.add(path, known)


def _white_out(tree: Tree, path: str) -> None:
    above, _, name = path.rpartition("/")
    if name == _OPAQUE:
        for each in tree.names_in(above or "/"):
            tree.remove(f"{above}/{each}")
    else:
        tree.remove(f"{above}/{name.removeprefix(_WHITEOUT)}")
