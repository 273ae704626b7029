"""Which objects ld.so maps for a program, and in which order.

Owns: the breadth-first walk over DT_NEEDED, the rule by which two names are one object, preloads, the
      interpreter's place, libraries opened later, and the check of needed versions.
Takes: a `LoadRequest`. Gives: a `Closure`.
Must never: run anything, or read a file outside the sysroot.
Wrong where: LD_AUDIT, set-user-ID, dlmopen, DT_AUXILIARY and DT_FILTER are at work (the last two get a
      diagnostic); a file is bind-mounted twice (one inode, yet two objects for us only if names differ).

Source: glibc elf/rtld.c, elf/dl-deps.c, elf/dl-load.c, elf/dl-version.c; musl ldso/dynlink.c.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forkproof.closure.model import Closure, Libc, LoadedObject, LookedIn, Missing
from forkproof.closure.notes import announced
from forkproof.closure.order import glibc_order, initfirst, musl_order
from forkproof.closure.rules import LoaderRules, glibc_rules, host_hwcaps, musl_rules
from forkproof.closure.search import DT_FLAGS_1, Asker, Found, NotFound, Search
from forkproof.elf import image as elf
from forkproof.elf.image import Machine, ObjectKind
from forkproof.errors import InputError, UnsupportedElf
from forkproof.model import Diagnostic

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from forkproof.closure.model import LoadRequest
    from forkproof.closure.sysroot import Sysroot
    from forkproof.elf.image import Image

    OpenImage = Callable[[Path], Image]

PRELOAD_FILE: Final = "/etc/ld.so.preload"
_DF_1_INITFIRST: Final = 0x20
_DEFAULT_INTERPRETERS: Final = {
    (Libc.GLIBC, Machine.X86_64): "/lib64/ld-linux-x86-64.so.2",
    (Libc.GLIBC, Machine.AARCH64): "/lib/ld-linux-aarch64.so.1",
    (Libc.MUSL, Machine.X86_64): "/lib/ld-musl-x86_64.so.1",
    (Libc.MUSL, Machine.AARCH64): "/lib/ld-musl-aarch64.so.1",
}
_MUSL_OWN: Final = ("libc.", "libpthread.", "librt.", "libm.", "libdl.", "libutil.", "libxnet.")
"""musl answers to every name that begins so with itself."""
_DT_AUXILIARY, _DT_FILTER = 0x7FFFFFFD, 0x7FFFFFFF


def load(request: LoadRequest, *, open_image: OpenImage = elf.load) -> Closure:
    """What ld.so would map for the request's target.

    `open_image` lets a scan of many targets share images. Raises InputError when the target itself
    cannot be analysed; anything that goes wrong with another object is a diagnostic or `missing`.
    """
    sysroot = request.sysroot
    path = sysroot.locate(request.target)
    image = open_image(sysroot.host_path(path))
    if image.kind is ObjectKind.CORE:
        from forkproof.elf.core import program_of

        dumped = program_of(sysroot.host_path(path))
        help_text = f"Name the program that dumped it: {dumped or f'file {path} may tell which'}"
        raise UnsupportedElf(path, "is a core file, expected a program", next_step=help_text)
    if image.is_static:
        return _static(request, path, image)
    return _Loading(request, path, image, open_image).run()


@dataclass(eq=False)
class _Map:
    """An object while the walk goes on; `position` is its place in the load order, once it has one."""

    asker: Asker
    names: set[str]
    why: str
    position: int | None = None
    is_startup: bool = True
    needed: list[_Map] = field(default_factory=list)

    @property
    def image(self) -> Image:
        return self.asker.image

    @property
    def path(self) -> str:
        return self.asker.path


class _Loading:
    """One program start. The steps are in `run`; each leaves its result in the fields below."""

    def __init__(self, request: LoadRequest, path: str, image: Image, open_image: OpenImage) -> None:
        self.request = request
        self.sysroot: Sysroot = request.sysroot
        self.open_image = open_image
        self.diagnostics: list[Diagnostic] = []
        self.missing: dict[str, Missing] = {}
        self.by_identity: dict[Hashable, _Map] = {}
        self.order: list[_Map] = []
        self.libc = _libc(image)
        self.program = _Map(Asker(path, _origin(self.sysroot, path), image, None), _names(image), "program")
        self.known: list[_Map] = [self.program]
        self.interpreter = self._open_interpreter()
        self.search = Search(
            sysroot=self.sysroot,
            rules=self._rules(),
            program=self.program.asker,
            library_path=request.library_path,
            cwd=request.cwd or (str(Path.cwd()) if self.sysroot.is_host else "/"),
        )

    def run(self) -> Closure:
        """The start of the program, step by step."""
        self._place(self.program)
        preloads = self._preload()
        # 1. Breadth first: what the program and each object after it needs, each object once.
        self._walk(0, [] if self.libc is Libc.GLIBC else preloads)
        # 2. The interpreter is mapped by the kernel in any case; its symbols count only if somebody needs it.
        in_scope = len(self.order)
        if self.interpreter is not None and self.interpreter.position is None:
            self._place(self.interpreter)
        startup = self._init_order(self.program, self.order)
        # 3. Libraries opened later, one dlopen after the other.
        init = list(startup)
        for name in self.request.also:
            init += [index for index in self._dlopen(name) if index not in init]
        unscoped = range(in_scope, in_scope + 1) if self._is_unscoped(in_scope) else range(0)
        self._note_fallbacks()
        self._check_objects()
        objects = tuple(self._product(item, index not in unscoped) for index, item in enumerate(self.order))
        return Closure(self.libc, objects, tuple(self.missing.values()), tuple(self.diagnostics), tuple(init))

    def _is_unscoped(self, index: int) -> bool:
        return index < len(self.order) and self.order[index] is self.interpreter

    # ---- the interpreter and its rules --------------------------------------------------------

    def _open_interpreter(self) -> _Map | None:
        image = self.program.image
        path = image.interpreter or _DEFAULT_INTERPRETERS[self.libc, image.machine]
        why = "interpreter" if image.interpreter else "interpreter assumed for a library"
        actual = path
        if self.sysroot.resolve(path) is None and self.sysroot.resolve(f"/usr{path}") is not None:
            actual = f"/usr{path}"
            self._note("info", path, f"does not exist; {actual} is taken, as on a system with merged /usr")
        if self.sysroot.resolve(actual) is None:
            self._lack(path, self.program.path, NotFound(()))
            return None
        if self.sysroot.identity(actual) == self.sysroot.identity(self.program.path):
            return None
        try:
            opened = self.open_image(self.sysroot.host_path(actual))
        except InputError as error:
            self._note("error", path, f"the interpreter cannot be analysed: {error.reason}")
            return None
        result = _Map(Asker(path, path.rpartition("/")[0] or "/", opened, None), _names(opened) | {path}, why)
        self.known.append(result)
        self.by_identity[self.sysroot.identity(actual)] = result
        return result

    def _rules(self) -> LoaderRules:
        machine = self.program.image.machine
        if self.libc is Libc.MUSL:
            return musl_rules(machine, self._musl_directories())
        hwcaps = self.request.hwcaps
        if hwcaps is None:
            runs_here = self.sysroot.is_host and machine.value == platform.machine()
            hwcaps = host_hwcaps() if runs_here else ()
        return glibc_rules(machine, self.interpreter.image if self.interpreter else None, hwcaps)

    def _musl_directories(self) -> tuple[str, ...]:
        """/etc/ld-musl-ARCH.path, below the directory that holds the interpreter's lib; or the default."""
        image = self.program.image
        interpreter = image.interpreter or _DEFAULT_INTERPRETERS[Libc.MUSL, image.machine]
        prefix = interpreter.rpartition("/")[0].rpartition("/")[0] if interpreter.startswith("/") else ""
        path = f"{prefix}/etc/ld-musl-{image.machine.value}.path"
        try:
            text = self.sysroot.read(path).decode("utf-8", "replace")
        except OSError:
            return ("/lib", "/usr/local/lib", "/usr/lib")
        return tuple(part for part in text.replace("\n", ":").split(":") if part)

    # ---- the walk -----------------------------------------------------------------------------

    def _preload(self) -> list[_Map]:
        """LD_PRELOAD, then /etc/ld.so.preload; ld.so goes on without those that it cannot load."""
        result: list[_Map] = []
        asker = self.program.asker if self.libc is Libc.GLIBC else None
        for name, source in self._preload_names():
            loaded = self._map(name, asker, f"preload ({source})")
            if isinstance(loaded, NotFound):
                message = f"cannot be preloaded ({source}) and is ignored, as ld.so does: {loaded.reason}"
                # Who asks for a preload asks about the program with it: without, the answer is to another question.
                self._note("warning" if source == PRELOAD_FILE else "error", name, message)
            elif loaded.position is None:
                self._place(loaded)
                result.append(loaded)
        return result

    def _preload_names(self) -> Iterator[tuple[str, str]]:
        for item in self.request.preload:
            yield from ((name, "LD_PRELOAD") for name in item.replace(":", " ").split())
        if self.libc is not Libc.GLIBC:
            return
        try:
            text = self.sysroot.read(PRELOAD_FILE).decode("utf-8", "replace")
        except OSError:
            return
        for line in text.splitlines():
            yield from ((name, PRELOAD_FILE) for name in line.split("#", 1)[0].replace(":", " ").split())

    def _walk(self, start: int, pseudo: list[_Map]) -> None:
        """Map what the objects from `start` on need; each new one is appended and visited in its turn.

        `pseudo`: musl counts the preloads among what the program needs, before all else.
        """
        self.order[start].needed += pseudo
        position = start
        while position < len(self.order):
            current = self.order[position]
            for name in current.image.needed:
                loaded = self._map(name, current.asker, f"needed by {current.path}")
                if isinstance(loaded, NotFound):
                    self._lack(name, current.path, loaded)
                    continue
                current.needed.append(loaded)
                if loaded.position is None:
                    self._place(loaded)
            position += 1

    def _map(self, name: str, asker: Asker | None, why: str) -> _Map | NotFound:
        """The object called `name`: one that is known by that name, or by its file, or a new one."""
        if (known := self._known_as(name)) is not None:
            return known
        found = self.search.find(name, asker)
        if isinstance(found, NotFound):
            return found
        identity = self.sysroot.identity(found.path)
        if (same := self.by_identity.get(identity)) is not None:
            same.names.add(name)
            return same
        return self._open(name, found, asker, why, identity)

    def _open(self, name: str, found: Found, asker: Asker | None, why: str, identity: Hashable) -> _Map | NotFound:
        try:
            image = self.open_image(self.sysroot.host_path(found.path))
        except InputError as error:
            self._note("error", found.path, f"found for {name}, but cannot be analysed: {error.reason}")
            return NotFound((LookedIn(found.path, found.how, error.reason),))
        new = Asker(found.path, found.path.rpartition("/")[0] or "/", image, asker)
        # musl remembers the last part of the path, glibc the name that was asked for and the soname.
        is_musl = self.libc is Libc.MUSL
        names = {found.path.rpartition("/")[2]} if is_musl else _names(image) | {name, found.path}
        result = _Map(new, names, f"{why} ({found.how})")
        self.known.append(result)
        self.by_identity[identity] = result
        return result

    def _known_as(self, name: str) -> _Map | None:
        if self.libc is Libc.MUSL and self.interpreter is not None:
            if name.startswith(_MUSL_OWN) or name == self.interpreter.path:
                return self.interpreter
            if "/" in name:
                return None
        return next((item for item in self.known if name in item.names), None)

    def _dlopen(self, name: str) -> tuple[int, ...]:
        """Open a library with RTLD_GLOBAL from the program; the constructors it brings, in order."""
        before = len(self.order)
        loaded = self._map(name, self.program.asker, "dlopen")
        if isinstance(loaded, NotFound):
            self._lack(name, "dlopen", loaded)
            return ()
        if loaded.position is not None:
            return ()
        # The program led the search, but is not the library's loader: l_loader stays empty after dlopen.
        loaded.asker = Asker(loaded.path, loaded.asker.origin, loaded.image, None)
        self._place(loaded)
        self._walk(before, [])
        new = self.order[before:]
        for item in new:
            item.is_startup = False
        return self._init_order(loaded, new)

    def _init_order(self, root: _Map, objects: list[_Map]) -> tuple[int, ...]:
        indexes = {id(item): index for index, item in enumerate(self.order)}
        needed = {indexes[id(item)]: [indexes[id(n)] for n in item.needed] for item in objects}
        if self.libc is Libc.MUSL:
            reached = musl_order(indexes[id(root)], needed)
            rest = tuple(index for index in needed if index not in reached)
            return rest + reached
        return initfirst(
            glibc_order(sorted(needed), needed, indexes[id(root)]), [i for i in needed if self._is_first(i)]
        )

    def _is_first(self, index: int) -> bool:
        return bool(self.order[index].image.dynamic.get(DT_FLAGS_1, 0) & _DF_1_INITFIRST)

    def _place(self, item: _Map) -> None:
        item.position = len(self.order)
        self.order.append(item)

    # ---- reports ------------------------------------------------------------------------------

    def _lack(self, name: str, needed_by: str, search: NotFound) -> None:
        known = self.missing.get(name)
        if known is None:
            self.missing[name] = Missing(name, (needed_by,), search.looked_in)
        elif needed_by not in known.needed_by:
            self.missing[name] = Missing(name, (*known.needed_by, needed_by), known.looked_in)

    def _note(self, level: str, path: str, message: str) -> None:
        self.diagnostics.append(Diagnostic(level, path, message))

    def _note_fallbacks(self) -> None:
        if self.libc is Libc.GLIBC and not self.search.has_cache:
            message = "no usable cache in the sysroot: the directories of ld.so.conf are searched in its place"
            self._note("info", "/etc/ld.so.cache", message)
        for path in self.request.library_path:
            # Several in one word, or with tokens, are ld.so's to read.
            if path.startswith("/") and not set(path) & set(":;$") and self.sysroot.resolve(path) is None:
                self._note("warning", path, "does not exist in the sysroot: LD_LIBRARY_PATH finds nothing there")

    def _check_objects(self) -> None:
        for item in self.order:
            tags = item.image.dynamic
            if _DT_AUXILIARY in tags or _DT_FILTER in tags:
                message = "is a filter (DT_FILTER or DT_AUXILIARY): its filtees are not loaded"
                self._note("warning", item.path, message)
            for entry in announced(item.image):
                feature = f" for {entry.feature}" if entry.feature else ""
                message = f"may dlopen {' or '.join(entry.sonames)}{feature} ({entry.priority})"
                self._note("info", item.path, message)
            if self.libc is Libc.GLIBC:
                self._check_versions(item)

    def _check_versions(self, item: _Map) -> None:
        """elf/dl-version.c: a needed version must be defined by the object that the entry names."""
        for need in item.image.versions.needs.values():
            provider = self._known_as(need.file)
            if provider is None or need.weak or not provider.image.versions.definitions:
                continue
            if need.version not in provider.image.versions.definitions.values():
                message = f"version {need.version} not found (required by {item.path}): ld.so would stop here"
                self._note("error", provider.path, message)

    def _product(self, item: _Map, in_scope: bool) -> LoadedObject:
        assert item.position is not None
        actual = item.path if self.sysroot.resolve(item.path) is not None else f"/usr{item.path}"
        return LoadedObject(
            index=item.position,
            name=item.image.soname or item.path.rpartition("/")[2],
            path=item.path,
            host_path=self.sysroot.host_path(actual),
            image=item.image,
            why=item.why,
            needed=tuple(dict.fromkeys(n.position for n in item.needed if n.position is not None)),
            in_scope=in_scope,
            is_startup=item.is_startup,
        )


def _static(request: LoadRequest, path: str, image: Image) -> Closure:
    host_path = request.sysroot.host_path(path)
    name = image.soname or path.rpartition("/")[2]
    only = LoadedObject(0, name, path, host_path, image, "program", (), in_scope=True, is_startup=True)
    diagnostics = []
    if request.preload or request.also:
        message = "is a static program: no ld.so runs, so nothing can be preloaded or opened into it"
        diagnostics.append(Diagnostic("warning", path, message))
    return Closure(Libc.NONE, (only,), (), tuple(diagnostics), (0,))


def _libc(image: Image) -> Libc:
    if image.interpreter is not None:
        return Libc.MUSL if "ld-musl" in image.interpreter else Libc.GLIBC
    is_musl = any(name == "libc.so" or name.startswith("libc.musl-") for name in image.needed)
    return Libc.MUSL if is_musl else Libc.GLIBC


def _names(image: Image) -> set[str]:
    return {image.soname} if image.soname else set()


def _origin(sysroot: Sysroot, path: str) -> str:
    """$ORIGIN of the program: the directory of /proc/self/exe, whose links the kernel has followed."""
    return (sysroot.resolve(path) or path).rpartition("/")[0] or "/"
