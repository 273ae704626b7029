"""The tree of files in which a program would run.

Owns: the `Sysroot` protocol, through which every byte and every name of the target's world enters, and
      its first implementation, a directory.
Takes: paths inside the tree ("/usr/lib/libc.so.6"). Gives: resolved paths, contents, identities.
Must never: look outside the tree. A symbolic link to "/etc/x" means the tree's own /etc/x; ".." at the
      top stays at the top, as chroot(2) has it. A sysroot other than "/" never falls back to the host.
Wrong where: the tree was unpacked by a user without the right to read some of it (what cannot be read
      does not exist, as for that user's ld.so), or a mount of the target machine hides part of it.
"""

from __future__ import annotations

import errno
import fnmatch
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from forkproof.errors import UnreadableFile, UsageError

if TYPE_CHECKING:
    from collections.abc import Hashable

_MAX_LINKS: Final = 40
"""As in Linux (path_resolution(7)): one more is ELOOP."""

_MERGED: Final = frozenset({"bin", "sbin", "lib", "lib32", "lib64", "libx32"})
"""Top directories that a merged-/usr distribution makes links into /usr."""


class Sysroot(Protocol):
    """A tree of files, read only.

    All paths are absolute paths inside the tree. The methods that take a path follow symbolic links.
    """

    @property
    def is_host(self) -> bool:
        """True when the tree is the running system's own, so that its CPU is the target's CPU."""
        ...

    def resolve(self, path: str) -> str | None:
        """The path with every symbolic link and dot followed, or None where nothing exists."""
        ...

    def identity(self, path: str) -> Hashable:
        """Equal for two paths exactly when they name one file (device and inode, or the like)."""
        ...

    def read(self, path: str, size: int = -1) -> bytes:
        """The first `size` bytes of a file, or all of it. Raises OSError."""
        ...

    def names_in(self, path: str) -> tuple[str, ...]:
        """The names in a directory, sorted; none where there is no directory."""
        ...

    def host_path(self, path: str) -> Path:
        """A file of this machine with the content of `path`. Raises FileNotFoundError."""
        ...

    def locate(self, target: str) -> str:
        """The path in the tree that a user means by `target`. Raises UnreadableFile."""
        ...


class DirectorySysroot:
    """A directory that holds a file system: "/", an unpacked image, `dpkg -x` of some packages.

    Packages of a merged-/usr distribution that are unpacked without its base-files package leave the
    links /lib → usr/lib and the like out. Where such a top directory does not exist at all, /usr's stands in.
    """

    def __init__(self, root: Path | str = "/") -> None:
        self.root: Final = str(Path(root).resolve())
        if not Path(self.root).is_dir():
            raise UsageError(
                f"{root}: not a directory, expected a sysroot",
                next_step="Name the directory that holds usr/, or leave --sysroot out for this system.",
            )
        self._resolved: dict[str, str | None] = {}

    @property
    def is_host(self) -> bool:
        """True for "/"."""
        return self.root == "/"

    def resolve(self, path: str) -> str | None:
        """See `Sysroot.resolve`; every answer is remembered, since an analysis sees one state of the tree."""
        if path not in self._resolved:
            self._resolved[path] = None if "\0" in path else self._walk(path)
        return self._resolved[path]

    def identity(self, path: str) -> Hashable:
        """Device and inode."""
        status = self.host_path(path).stat()
        return status.st_dev, status.st_ino

    def read(self, path: str, size: int = -1) -> bytes:
        """See `Sysroot.read`. O_NONBLOCK: a FIFO in the tree must not stop the analysis.

        An opener, not os.fdopen: that leaves the descriptor of a directory open when it refuses it.
        """
        with open(self.host_path(path), "rb", opener=_opened) as file:
            return file.read(size)

    def names_in(self, path: str) -> tuple[str, ...]:
        """See `Sysroot.names_in`."""
        try:
            return tuple(sorted(entry.name for entry in self.host_path(path).iterdir()))
        except OSError:
            return ()

    def host_path(self, path: str) -> Path:
        """The file below `root`."""
        resolved = self.resolve(path)
        if resolved is None:
            raise FileNotFoundError(errno.ENOENT, "no such file in the sysroot", path)
        return Path(self._on_host(resolved))

    def locate(self, target: str) -> str:
        """A host path when it names a file inside the tree, else a path in the tree.

        The first reading wins: with --sysroot /r, "/r/usr/bin/x" is usr/bin/x of the tree, and so is
        "usr/bin/x" from within /r. "/usr/bin/x" lies outside of /r and is therefore read as the tree's own.
        """
        inside = self._inside(target)
        if inside is not None:
            return inside
        path = target if target.startswith("/") else f"/{target}"
        if not self.is_host and self.resolve(path) is not None:
            return path
        leads = _link(target, target if self.is_host else self._on_host(path))
        if self.is_host and leads:
            reason = f"is a symbolic link that leads nowhere (to {leads})"
            raise UnreadableFile(target, reason, next_step=f"Follow it: namei {target}")
        if self.is_host:
            raise UnreadableFile(target, "does not exist", next_step="Check the spelling.")
        raise UnreadableFile(
            target,
            f"does not exist (neither below {self.root} nor as a path in that sysroot)",
            next_step=f"List what is there: find {self.root} -name '{Path(target).name}'",
        )

    def _inside(self, target: str) -> str | None:
        """The tree's path of an existing host path; a link as its last part stays one."""
        # Not Path.absolute(): it leaves "..", which would not compare with the root.
        path = os.path.abspath(target)  # noqa: PTH100 - see above
        if not os.path.lexists(path):
            return None
        if self.is_host:
            return path if self.resolve(path) is not None else None
        parent, root = Path(path).parent.resolve(), Path(self.root)
        if not parent.is_relative_to(root):
            return None
        inside = str(Path("/") / parent.relative_to(root) / Path(path).name)
        return inside if self.resolve(inside) is not None else None

    def _on_host(self, resolved: str) -> str:
        return resolved if self.root == "/" else self.root + resolved

    def _walk(self, path: str) -> str | None:
        """Follow a path one part at a time; readlink(2) says in one call what each part is."""
        pending = path.split("/")[::-1]
        done: list[str] = []
        links = 0
        while pending:
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                del done[-1:]
                continue
            done.append(part)
            here = "/" + "/".join(done)
            try:
                target = os.readlink(self._on_host(here))  # noqa: PTH115 - a Path for each part doubles the cost
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue
                if not self._stands_in(done):
                    return None
                done.insert(0, "usr")
                continue
            links += 1
            if links > _MAX_LINKS:
                return None
            done = [] if target.startswith("/") else done[:-1]
            pending += target.split("/")[::-1]
        return "/" + "/".join(done)

    def _stands_in(self, parts: list[str]) -> bool:
        if len(parts) != 1 or parts[0] not in _MERGED or self.is_host:
            return False
        return Path(self.root, "usr", parts[0]).is_dir()


def glob(sysroot: Sysroot, pattern: str) -> tuple[str, ...]:
    """The existing paths that match a pattern of glob(7), sorted, within the tree."""
    found = ["/"]
    for part in pattern.split("/"):
        if not part:
            continue
        if any(char in part for char in "*?["):
            found = [_join(base, name) for base in found for name in fnmatch.filter(sysroot.names_in(base), part)]
        else:
            found = [_join(base, part) for base in found]
    return tuple(sorted(path for path in found if sysroot.resolve(path) is not None))


def _join(base: str, name: str) -> str:
    return f"{base.rstrip('/')}/{name}"


def _link(target: str, path: str) -> str:
    """Where a link that leads nowhere leads to; "" if nothing is at `path`. Raises what hides it, if something does."""
    try:
        return str(Path(path).readlink())
    except ValueError:
        return ""
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
            return ""
        step = "Run as a user who may look into its directory, or copy it." if error.errno == errno.EACCES else ""
        raise UnreadableFile(target, f"cannot be looked up: {error.strerror}", next_step=step) from error


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
