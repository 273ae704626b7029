"""Inputs that are more than one file: packages, tarballs, images, directories, and how their programs are started.

    limits → tree → tar, package, image → world → programs, shadows, scope → worlds → open

`opened` gives scopes: a sysroot and the programs to scan in it. Archives are hostile: their files never get a name on
this machine, nothing is executed, and everything that they can claim is counted.
"""

from forkproof.artifacts.open import opened
from forkproof.artifacts.replaced import ReplacedSysroot
from forkproof.artifacts.scope import Scope, Start

__all__ = ["ReplacedSysroot", "Scope", "Start", "opened"]
