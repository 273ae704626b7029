"""Reports written by hand: the incident, its cure, and a scan that went wrong. No ELF file was needed."""

from __future__ import annotations

from dataclasses import replace

from forkproof.model import (
    Allocator,
    Answer,
    ClosureEntry,
    Conditions,
    Diagnostic,
    Finding,
    Frame,
    Hooks,
    Lock,
    Report,
    Severity,
    Target,
    Verdict,
    Window,
    WindowKind,
)

QEMU = "/usr/bin/qemu-system-aarch64"
PROGRAM = "qemu-system-aarch64"
TCMALLOC = "libtcmalloc.so.4"
LOCK = Lock(TCMALLOC, "tcmalloc::Static::central_cache_", 0x4A200, "array")

HOLDER = (
    Frame(PROGRAM, "qemu_thread_start", 0x6C, "plt"),
    Frame("libglib-2.0.so.0", "g_free", 0x10, "plt"),
    Frame(TCMALLOC, "tc_free", 0x1F4, "direct"),
    Frame(
        TCMALLOC, "tcmalloc::ThreadCache::ListTooLong(tcmalloc::ThreadCache::FreeList*, unsigned int)", 0x30, "direct"
    ),
    Frame(TCMALLOC, "tcmalloc::CentralFreeList::InsertRange(void*, void*, int)", 0, ""),
)
REQUESTER = (
    Frame(PROGRAM, "main", 0x88, "direct"),
    Frame(PROGRAM, "qemu_init", 0x2F1C, "plt"),
    Frame("libglib-2.0.so.0", "g_realloc", 0x24, "plt"),
    Frame(TCMALLOC, "tc_realloc", 0x9C, "direct"),
    Frame(TCMALLOC, "tcmalloc::CentralFreeList::RemoveRange(void**, void**, int)", 0, ""),
)
FORK = Frame(PROGRAM, "os_daemonize", 0x48, "fork")

CONDITIONS = Conditions(
    threads=f"the constructor rcu_init in {PROGRAM} starts a thread before main",
    holder="the thread that begins in qemu_thread_start reaches tcmalloc::CentralFreeList::InsertRange",
    requester="the child lives on and reaches tcmalloc::CentralFreeList::RemoveRange from main",
    not_quiesced=f"{TCMALLOC}: its weak reference to pthread_atfork binds to nothing in this closure",
    answers=(Answer.YES, Answer.YES, Answer.YES, Answer.YES),
)

INHERITED = Finding(
    rule="inherited-lock",
    severity=Severity.HIGH,
    verdict=Verdict.REACHABLE,
    target=QEMU,
    object=TCMALLOC,
    message=f"a child forked in os_daemonize can hang for ever on a lock of {TCMALLOC}",
    why="Caused by atfork-unbound. A thread that does not exist in the child can own the lock there.",
    fix="Upgrade to gperftools 2.11 or later, or preload a shim that exports pthread_atfork.",
    lock=LOCK,
    fork=FORK,
    holder=HOLDER,
    requester=REQUESTER,
    conditions=CONDITIONS,
    count=2,
)
UNBOUND = Finding(
    rule="atfork-unbound",
    severity=Severity.HIGH,
    verdict=Verdict.REACHABLE,
    target=QEMU,
    object=TCMALLOC,
    message=f"{TCMALLOC} (tcmalloc 2.10) never registers its fork handlers",
    why="It would register CentralCacheLockAll with pthread_atfork, but that reference binds to nothing here.",
    fix="Upgrade to gperftools 2.11 or later.",
)

REGISTRATION = (
    Frame(TCMALLOC, "tcmalloc::Static::InitLateMaybeRecursive()", 0x20, "direct"),
    Frame(TCMALLOC, "perftools_pthread_atfork(void (*)(), void (*)(), void (*)())", 0x18, "got"),
)
ALLOCATOR = Allocator(
    object=TCMALLOC,
    family="tcmalloc",
    version="2.10",
    defines=("calloc", "free", "malloc", "realloc"),
    active=True,
    hooks=Hooks.UNBOUND,
    registered_by=REGISTRATION,
    handlers=(
        "tcmalloc::CentralCacheLockAll()",
        "tcmalloc::CentralCacheUnlockAll()",
        "tcmalloc::CentralCacheUnlockAll()",
    ),
    registered_from="never",
    prepare_locks=(),
    uncovered_locks=(LOCK,),
    why="it would register CentralCacheLockAll, but its weak unversioned reference to pthread_atfork binds to nothing",
)
LIBC_MALLOC = Allocator(
    object="libc.so.6",
    family="glibc",
    version="2.36",
    defines=("malloc",),
    active=False,
    hooks=Hooks.BUILTIN,
    registered_by=(),
    handlers=(),
    registered_from="",
    prepare_locks=(),
    uncovered_locks=(),
    why="the fork of glibc 2.36 takes the locks of its own malloc",
)
DAEMONIZE = Window(
    forker="fork",
    function="os_daemonize",
    kind=WindowKind.DAEMONIZE,
    handlers_run=True,
    call_site=FORK,
    reachable=Answer.YES,
    threads=Answer.YES,
    path=(Frame(PROGRAM, "main", 0x20, "direct"), Frame(PROGRAM, "qemu_init", 0x1000, "direct"), FORK),
    outcomes=("exit", "return"),
)
SPAWNED = Window(
    forker="fork",
    function="launch_script",
    kind=WindowKind.EXEC,
    handlers_run=True,
    call_site=Frame(PROGRAM, "launch_script", 0x90, "fork"),
    reachable=Answer.UNKNOWN,
    threads=Answer.YES,
    path=(),
    outcomes=("exec",),
)
TARGET = Target(
    path=QEMU,
    machine="aarch64",
    build_id="0123456789abcdef0123456789abcdef01234567",
    interpreter="/lib/ld-linux-aarch64.so.1",
    libc="glibc 2.36",
    closure=(
        ClosureEntry(PROGRAM, QEMU, "0123456789abcdef0123456789abcdef01234567", "00" * 32),
        ClosureEntry(TCMALLOC, f"/usr/lib/aarch64-linux-gnu/{TCMALLOC}", None, "11" * 32),
    ),
    missing=(),
    allocators=(ALLOCATOR, LIBC_MALLOC),
    threads=Answer.YES,
    thread_sources=(
        (Frame(PROGRAM, "rcu_init", 0x30, "direct"), Frame(PROGRAM, "qemu_thread_create", 0x74, "thread")),
    ),
    windows=(SPAWNED, DAEMONIZE, replace(DAEMONIZE, call_site=replace(FORK, offset=0xC0))),
)


def incident() -> Report:
    """QEMU with gperftools 2.10 on aarch64: daemonizing can hang."""
    notes = (
        Diagnostic("info", PROGRAM, "11213 calls in the closure have targets that are not known"),
        Diagnostic("warning", "libfoo.so.1", "no unwind information: function starts were guessed"),
        Diagnostic("warning", "libbar.so.1", "no unwind information: function starts were guessed"),
    )
    return Report((TARGET,), (UNBOUND, INHERITED), notes)


def cured() -> Report:
    """The same on x86-64, where the handlers are effective: no finding."""
    why = (
        "it registers CentralCacheLockAll from the first allocation, and pthread_atfork@GLIBC_2.2.5 binds to libc.so.6"
    )
    allocator = replace(ALLOCATOR, hooks=Hooks.EFFECTIVE, registered_from="the first allocation", why=why)
    return Report((replace(TARGET, machine="x86_64", allocators=(allocator, LIBC_MALLOC)),))


def failed() -> Report:
    """One target is no ELF file, the other lacks a library."""
    told = "/etc/passwd: not an ELF file\n  Name a program or a shared library."
    lacking = replace(cured().targets[0], missing=("libusbredirparser.so.1",))
    errors = (told, f"{QEMU}: library libusbredirparser.so.1 was not found; what it holds was not analysed")
    return Report((lacking,), (), (Diagnostic("error", "/etc/passwd", told),), errors)
