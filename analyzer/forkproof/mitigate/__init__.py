"""Fixes from outside: a library to preload that registers the fork handlers which an allocator does not get registered.

    remedy      what is missing, and whether a shim can be right (decided from code)
    parameters  does a function read its arguments?
    shim        the C source, and the compiler
    apply       before, build, after: shown by scan and by probe

Must never: change a program or a library, or claim a cure that the second scan does not show.
"""
