"""Mangled C++ and Rust names to the names that their authors wrote.

Owns: the choice of demanglers. C++ goes to `__cxa_demangle` of the C++ runtime that lief already loads
      into the process: it is the reference implementation, costs no import, and the packages on PyPI
      that parse names themselves got 2 to 25 % of libtcmalloc's and libstdc++'s names wrong when they
      were compared with c++filt. Rust goes to the package rust-demangler, imported for Rust names only.
Takes: a linker name. Gives: a source name, or the same name where it is not mangled or not understood.
Must never: raise, whatever a hostile symbol table holds.
Wrong where: no libstdc++ is on the machine: names then stay mangled.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Final, cast

_RUST_LEGACY: Final = re.compile(r"^_ZN.*17h[0-9a-f]{16}E")
_HASH: Final = re.compile(r"::h[0-9a-f]{16}$")
_Foreign = Callable[..., int | None]
_LONGEST: Final = 4096
"""Names above this are machine noise or an attack; they are shown as they are."""


@lru_cache(maxsize=1 << 14)
def demangle(name: str) -> str:
    """The source name of a linker name."""
    if not name.startswith(("_Z", "_R")) or len(name) > _LONGEST:
        return name
    if name.startswith("_R") or _RUST_LEGACY.match(name):
        return _rust(name) or _cxx(name) or name
    return _cxx(name) or name


def _rust(name: str) -> str | None:
    try:
        from rust_demangler import demangle as rust_demangle

        found = str(rust_demangle(name))
    except Exception:  # noqa: BLE001 - the package raises IndexError and its own types on odd names
        return None
    return _HASH.sub("", found)


def _cxx(name: str) -> str | None:
    library = _runtime()
    if library is None:
        return None
    status = ctypes.c_int()
    pointer = library(name.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return None
    try:
        return ctypes.string_at(pointer).decode("utf-8", "backslashreplace")
    finally:
        _free()(pointer)


@cache
def _runtime() -> _Foreign | None:
    """`__cxa_demangle` (Itanium C++ ABI, 3.4)."""
    try:
        function = getattr(ctypes.CDLL("libstdc++.so.6"), "__cxa_demangle")
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return cast("_Foreign", function)


@cache
def _free() -> _Foreign:
    free = ctypes.CDLL(None).free
    free.restype = None
    free.argtypes = [ctypes.c_void_p]
    return cast("_Foreign", free)
