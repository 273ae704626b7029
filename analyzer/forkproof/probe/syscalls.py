"""System calls as strace writes them, as far as a fork's evidence needs them.

Owns: names and shapes of the calls that tell a story of forks, threads, waits and descriptors.
Takes: numbers and arguments. Gives: text, and whether a call is a wait on a futex word.
Must never: read a tracee's memory: strings are left out, addresses are shown.
"""

from __future__ import annotations

from typing import Final

_X86_64: Final = """
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
    rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise
    shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile socket connect accept
    sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
    clone fork vfork execve exit wait4 kill uname
""".split()  # noqa: SIM905 - a list of sixty literals is no easier to read
_COMMON: Final = {
    72: "fcntl", 79: "getcwd", 80: "chdir", 82: "rename", 83: "mkdir", 87: "unlink", 95: "umask", 97: "getrlimit",
    102: "getuid", 104: "getgid", 105: "setuid", 106: "setgid", 110: "getppid", 112: "setsid", 116: "setgroups",
    137: "statfs", 157: "prctl", 158: "arch_prctl", 186: "gettid", 200: "tkill", 202: "futex", 203: "sched_setaffinity",
    204: "sched_getaffinity", 217: "getdents64", 218: "set_tid_address", 228: "clock_gettime", 230: "clock_nanosleep",
    231: "exit_group", 232: "epoll_wait", 233: "epoll_ctl", 234: "tgkill", 257: "openat", 262: "newfstatat",
    270: "pselect6", 271: "ppoll", 273: "set_robust_list", 281: "epoll_pwait", 288: "accept4", 290: "eventfd2",
    291: "epoll_create1", 292: "dup3", 293: "pipe2", 302: "prlimit64", 318: "getrandom", 332: "statx", 334: "rseq",
    435: "clone3", 436: "close_range", 439: "faccessat2", 223: "timer_settime", 219: "restart_syscall",
}  # fmt: skip
_AARCH64: Final = {
    17: "getcwd", 19: "eventfd2", 20: "epoll_create1", 21: "epoll_ctl", 22: "epoll_pwait", 23: "dup", 24: "dup3",
    25: "fcntl", 29: "ioctl", 34: "mkdirat", 35: "unlinkat", 46: "ftruncate", 48: "faccessat", 49: "chdir",
    56: "openat", 57: "close", 59: "pipe2", 61: "getdents64", 62: "lseek", 63: "read", 64: "write", 65: "readv",
    66: "writev", 67: "pread64", 68: "pwrite64", 72: "pselect6", 73: "ppoll", 74: "signalfd4", 78: "readlinkat",
    79: "newfstatat", 80: "fstat", 93: "exit", 94: "exit_group", 96: "set_tid_address", 98: "futex",
    99: "set_robust_list", 101: "nanosleep", 113: "clock_gettime", 115: "clock_nanosleep", 122: "sched_setaffinity",
    123: "sched_getaffinity", 124: "sched_yield", 129: "kill", 130: "tkill", 131: "tgkill", 134: "rt_sigaction",
    135: "rt_sigprocmask", 139: "rt_sigreturn", 144: "setgid", 146: "setuid", 157: "setsid", 160: "uname",
    166: "umask", 167: "prctl", 172: "getpid", 173: "getppid", 178: "gettid", 198: "socket", 200: "bind",
    201: "listen", 202: "accept", 203: "connect", 206: "sendto", 207: "recvfrom", 211: "sendmsg", 212: "recvmsg",
    214: "brk", 215: "munmap", 216: "mremap", 220: "clone", 221: "execve", 222: "mmap", 226: "mprotect",
    233: "madvise", 260: "wait4", 261: "prlimit64", 278: "getrandom", 291: "statx", 293: "rseq", 435: "clone3",
    436: "close_range", 439: "faccessat2", 103: "setitimer", 110: "timer_settime", 128: "restart_syscall",
}  # fmt: skip
NAMES: Final = {"x86_64": dict(enumerate(_X86_64)) | _COMMON, "aarch64": _AARCH64}

_COUNTS: Final = {
    "close": 1, "exit": 1, "exit_group": 1, "read": 3, "write": 3, "setsid": 0, "fork": 0, "vfork": 0, "getpid": 0,
    "gettid": 0, "sched_yield": 0, "umask": 1, "dup2": 2, "dup3": 3, "munmap": 2, "mprotect": 3, "poll": 3, "ppoll": 3,
    "set_robust_list": 2, "wait4": 4, "rt_sigprocmask": 4, "clone3": 2, "brk": 1, "madvise": 3, "chdir": 1, "pipe2": 2,
}  # fmt: skip
_FUTEX_OPERATIONS: Final = {
    0: "FUTEX_WAIT", 1: "FUTEX_WAKE", 3: "FUTEX_REQUEUE", 4: "FUTEX_CMP_REQUEUE", 5: "FUTEX_WAKE_OP",
    6: "FUTEX_LOCK_PI", 7: "FUTEX_UNLOCK_PI", 9: "FUTEX_WAIT_BITSET", 10: "FUTEX_WAKE_BITSET",
    11: "FUTEX_WAIT_REQUEUE_PI",
    13: "FUTEX_LOCK_PI2",
}  # fmt: skip
_WAITS: Final = frozenset({0, 6, 9, 11, 13})
_PAUSES: Final = frozenset({"sched_yield", "nanosleep", "clock_nanosleep"})


def name_of(machine: str, number: int) -> str:
    """The call's name, or its number."""
    return NAMES[machine].get(number, f"syscall_{number}")


def is_pause(machine: str, number: int | None) -> bool:
    """What a spinning thread does between two looks."""
    return number is not None and name_of(machine, number) in _PAUSES


def is_restart(machine: str, number: int | None) -> bool:
    """The call is one that was interrupted, and goes on: which, and with what arguments, only its entry told."""
    return number is not None and name_of(machine, number) == "restart_syscall"


_TIMES: Final = {"futex": 3, "nanosleep": 0, "clock_nanosleep": 2}
_TIMERS: Final = frozenset({"alarm", "setitimer", "timer_settime"})


def time_argument(machine: str, number: int) -> int | None:
    """Which argument points to the time after which the call gives up or returns."""
    return _TIMES.get(name_of(machine, number))


def sets_timer(machine: str, number: int, arguments: tuple[int, ...]) -> bool:
    """The call asks for a signal at a later time, which may end whatever the thread waits for."""
    return name_of(machine, number) in _TIMERS and any(arguments[:3])


def futex_wait(machine: str, number: int | None, arguments: tuple[int, ...]) -> int | None:
    """The word that a call waits on; None for every other call."""
    if number is None or len(arguments) < 2 or name_of(machine, number) != "futex":
        return None
    return arguments[0] if arguments[1] & 0x7F in _WAITS else None


def text(machine: str, number: int, arguments: tuple[int, ...], result: int | None = None) -> str:
    """One line of the log."""
    name = name_of(machine, number)
    shown = ", ".join(_arguments(name, arguments))
    return f"{name}({shown})" + ("" if result is None else f" = {_result(result)}")


def _arguments(name: str, arguments: tuple[int, ...]) -> list[str]:
    if name == "futex" and len(arguments) >= 3:
        operation = _FUTEX_OPERATIONS.get(arguments[1] & 0x7F, str(arguments[1] & 0x7F))
        private = "_PRIVATE" if arguments[1] & 0x80 else ""
        return [f"{arguments[0]:#x}", operation + private, str(arguments[2] & 0xFFFFFFFF)]
    return [_number(a) for a in arguments[: _COUNTS.get(name, 4)]]


def _number(value: int) -> str:
    signed = value - (1 << 64) if value >> 63 else value
    return str(signed) if -4096 <= signed < 65536 else f"{value:#x}"


def _result(value: int) -> str:
    import errno

    if -4096 < value < 0:
        return f"-1 {errno.errorcode.get(-value, -value)}"
    return _number(value & 0xFFFF_FFFF_FFFF_FFFF)
