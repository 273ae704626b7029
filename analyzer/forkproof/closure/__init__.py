"""What ld.so would do with a program: its objects in load order, and every reference bound.

    sysroot → rules, ldcache → search → load → binding

The package never runs the target, and reads nothing but the sysroot. `load` answers "which objects",
`Bindings` answers "whose malloc".
"""

from forkproof.closure.binding import Binding, Bindings, Reference, TypeClass
from forkproof.closure.load import load
from forkproof.closure.model import Closure, Libc, LoadedObject, LoadRequest, LookedIn, Missing
from forkproof.closure.sysroot import DirectorySysroot, Sysroot

__all__ = [
    "Binding",
    "Bindings",
    "Closure",
    "DirectorySysroot",
    "Libc",
    "LoadRequest",
    "LoadedObject",
    "LookedIn",
    "Missing",
    "Reference",
    "Sysroot",
    "TypeClass",
    "load",
]
