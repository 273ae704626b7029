"""What a scan does before its rules, as a process: `python benchmarks/spine.py SYSROOT TARGET [LIBRARY]...`.

It reads, links and follows a program up to its fork windows, threads, handlers and allocators. `run.py` measures it.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path


def main(sysroot: str, target: str, *preload: str) -> None:
    """Follow one program."""
    gc.disable()  # as a scan does
    from forkproof import callgraph, closure, facts, signatures
    from forkproof.allocators import find_libc
    from forkproof.program import link

    known = signatures.load()
    world = closure.DirectorySysroot(Path(sysroot))
    loaded = closure.load(closure.LoadRequest(sysroot=world, target=target, preload=preload))
    graph = callgraph.build(link(loaded, world), known)
    found = facts.gather(target, graph, known, find_libc(graph.program, known))
    print(len(found.windows), len(found.registrations), [allocator.hooks.value for allocator in found.allocators])
    gc.freeze()


if __name__ == "__main__":
    main(*sys.argv[1:])
