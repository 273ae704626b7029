"""Machine code to text, a range at a time: capstone's library, without its Python half.

Owns: capstone (the only importer), and one handle for each machine.
Takes: bytes and their address. Gives: (address, size, mnemonic, operands) of each instruction.
Must never: know what an instruction means.
Wrong where: data stands between instructions; what cannot be decoded is passed over as `.byte`.

capstone's Python module was measured at 0.04 s to import (the constants of twenty machines) and at three
times the cost for each instruction, of which it makes an object. Here the library's array is read as it is.
The layout of its records is that of capstone 5, which pyproject.toml asks for and `_library` checks.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
import numpy.typing as npt

from forkproof.elf.image import Machine

Line = tuple[int, int, bytes, bytes]
"""Address, size, mnemonic and operands."""

_MAJOR: Final = 5
_MODES: Final = {Machine.AARCH64: (1, 0), Machine.X86_64: (3, 1 << 3)}
"""CS_ARCH_ARM64 with CS_MODE_ARM, CS_ARCH_X86 with CS_MODE_64."""
_SKIPDATA: Final = (5, 3)
"""CS_OPT_SKIPDATA, CS_OPT_ON: go on after undecodable bytes instead of losing the rest of the function."""
_RECORD: Final = np.dtype(
    {
        "names": ["address", "size", "mnemonic", "operands"],
        "formats": ["<u8", "<u2", "S32", "S160"],
        "offsets": [8, 16, 42, 74],
        "itemsize": 248,
    }
)
"""struct cs_insn: id, address, size, bytes[24], mnemonic[32], op_str[160], detail."""
_ONE_AT_A_TIME: Final = Lock()
"""Objects are indexed by several threads, and a handle is not theirs to share."""


def disassemble(machine: Machine, code: bytes, address: int) -> list[Line]:
    """Every instruction of a range, in address order."""
    # Whatever was in the library's memory before stands behind the ends of the texts.
    return [
        (at, size, mnemonic.split(b"\0", 1)[0], operands.split(b"\0", 1)[0])
        for at, size, mnemonic, operands in _records(machine, code, address).tolist()
    ]


def starts(machine: Machine, code: bytes) -> npt.NDArray[np.int64]:
    """Where the instructions of a range begin, as offsets in it: a third of the cost of their texts."""
    return _records(machine, code, 0)["address"].astype(np.int64)


def _records(machine: Machine, code: bytes, address: int) -> npt.NDArray[np.void]:
    """The library's records of the instructions of a range."""
    found = ctypes.c_void_p()
    with _ONE_AT_A_TIME:
        library = _library()
        count = library.cs_disasm(_handle(machine), code, len(code), address, 0, ctypes.byref(found))
        if not count or found.value is None:
            return np.zeros(0, _RECORD)
        try:
            return np.frombuffer(ctypes.string_at(found.value, count * _RECORD.itemsize), _RECORD)
        finally:
            library.cs_free(found, count)


@cache
def _handle(machine: Machine) -> ctypes.c_size_t:
    """Never closed: there is one for each machine."""
    handle = ctypes.c_size_t()
    error = _library().cs_open(*_MODES[machine], ctypes.byref(handle))
    if error:
        raise RuntimeError(f"capstone cannot be opened for {machine.value}: error {error}")
    _library().cs_option(handle, *_SKIPDATA)
    return handle


@cache
def _library() -> ctypes.CDLL:
    library = _load()
    library.cs_disasm.restype = ctypes.c_size_t
    library.cs_disasm.argtypes = (
        ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p,
    )  # fmt: skip
    library.cs_free.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.cs_open.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    library.cs_option.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t)
    major = library.cs_version(None, None) >> 8
    if major != _MAJOR:
        raise RuntimeError(
            f"capstone {_MAJOR} is needed, this is {major}; install it with: pip install 'capstone>=5,<6'"
        )
    return library


def _load() -> ctypes.CDLL:
    """The library inside the Python package, else wherever that package finds one (distributions move it)."""
    spec = find_spec("capstone")
    if spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "lib" / "libcapstone.so"
        if inside.is_file():
            return ctypes.CDLL(str(inside))
    import capstone

    found: ctypes.CDLL = capstone._cs  # noqa: SLF001 - the handle that the package itself works with
    return found
