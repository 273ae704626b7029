"""Show a hang on the running program, or show that the program is protected.

    ptrace → tracee → session        the kernel's interface; processes, threads and breakpoints; running them
    cfi, stack                       where a stopped thread is, and how it came there
    sites                            one acquire site: what it locks, and whether it got it
    plan, census, steer, watch       finding → what to force → doing it → what became of the child

Importing this package costs nothing.
"""
