"""Runs inside gdb: stops a program at many states and writes, for each thread, gdb's frames and forkproof's.

    gdb -batch -x tools/unwinder_in_gdb.py        configured by FORKPROOF_UNWINDER, a JSON object; see unwinder_check.py

The program is stopped by a signal at chance moments and then stepped some instructions, so that prologues, epilogues
and PLT stubs are met too. Registers and memory are gdb's own reading, for both; what is compared is the unwinding.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

WANTED = json.loads(os.environ["FORKPROOF_UNWINDER"])
sys.path[:0] = WANTED["path"]

import gdb  # noqa: E402 - it exists only inside gdb

from forkproof.probe.ptrace import MACHINES, Registers  # noqa: E402
from forkproof.probe.stack import Modules, Region, _bias, _is_bss  # noqa: E402
from forkproof.probe.tracee import Process  # noqa: E402

MACHINE = MACHINES[WANTED["machine"]]
CHANCE = random.Random(WANTED["seed"])  # noqa: S311 - nothing secret
SIGNAL = "SIGUSR2"


class Memory:
    """The program's memory, as gdb reads it."""

    machine = MACHINE

    def read(self, address: int, size: int) -> bytes:
        try:
            return bytes(gdb.selected_inferior().read_memory(address, size))
        except gdb.MemoryError:
            return b""

    def word(self, address: int, size: int = 8) -> int | None:
        raw = self.read(address, size)
        return int.from_bytes(raw, "little") if len(raw) == size else None


class Mapped(Modules):
    """Modules by a map that qemu-user's host process shows: addresses are the guest's, but nothing is executable."""

    def refresh(self, process: Process) -> None:
        if not WANTED.get("root"):
            super().refresh(process)
            return
        last, table = Region(0, 0, 0, "", is_code=False), []
        for line in Path(f"/proc/{process.pid}/maps").read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            low, high = (int(part, 16) for part in fields[0].split("-"))
            path = fields[5] if len(fields) > 5 else ""
            if path and not path.startswith((WANTED["root"], WANTED["program"])):
                path = ""
            bias = _bias(self._file(path), int(fields[2], 16), low) if path else 0
            if not path and _is_bss(self._file, last, low):
                path, bias = last.path, last.bias
            module = self._file(path) if path else None
            code = module is not None and any(
                s.executable and s.rva <= low - bias + 4095 and low - bias < s.rva + s.memory_size
                for s in module.image.segments
            )
            is_trampoline = not path and "w" not in fields[1]  # of signal handlers, made by qemu
            last = Region(low, high, bias, path, is_code=code or is_trampoline)
            table.append(last)
        self._maps[process.pid] = table


def value(frame: gdb.Frame, name: str) -> int:
    try:
        return int(frame.read_register(name).cast(gdb.lookup_type("unsigned long"))) & (1 << 64) - 1
    except (ValueError, gdb.error):
        return 0


def gdb_frames() -> list[int]:
    found: list[int] = []
    frame = gdb.newest_frame()
    try:
        while frame is not None and len(found) < 128:
            if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):  # from debug information, not from the stack
                found.append(frame.pc())
            frame = frame.older()
    except gdb.error:
        pass
    return found


def own_frames(modules: Modules, process: Process) -> list[int]:
    frame = gdb.newest_frame()
    registers = Registers(MACHINE, tuple(value(frame, name) for name in MACHINE.registers))
    thread: Any = SimpleNamespace(registers=registers, process=process)
    return [pc for pc, _ in modules.walk(thread, 128)]


def named(modules: Modules, process: Process, pc: int) -> str:
    found = modules.of(process, pc)
    if found is None:
        return f"{pc:#x}"
    name, start = found[0].function(found[1])
    return f"{found[0].name}!{name}+{found[1] - start:#x}"


def disturb(pid: int, pause: float, done: threading.Event) -> None:
    """Stop the program after a pause, at whichever of its threads the kernel chooses; again, if it did not hear."""
    while not done.wait(pause):
        subprocess.run(["kill", "-USR2", str(pid)], check=False, stderr=subprocess.DEVNULL)
        pause = 1.0


def go(pid: int) -> None:
    """Run on for a moment."""
    done = threading.Event()
    helper = threading.Thread(target=disturb, args=(pid, CHANCE.uniform(*WANTED["pause"]), done))
    helper.start()
    try:
        gdb.execute("continue", to_string=True)
    finally:
        done.set()
        helper.join()


def main() -> None:
    for setting in (
        "pagination off", "confirm off", "debuginfod enabled off", "backtrace past-main on", "backtrace limit 128",
        "print thread-events off", "print inferior-events off", "auto-load off",
    ):  # fmt: skip
        try:
            gdb.execute(f"set {setting}")
        except gdb.error:
            continue
    gdb.execute(f"handle {SIGNAL} stop print nopass", to_string=True)
    gdb.execute("handle SIGALRM SIGCHLD SIGPIPE nostop noprint pass", to_string=True)
    if WANTED.get("remote"):
        gdb.execute(f"set sysroot {WANTED['root']}")
        gdb.execute(f"file {WANTED['program']}", to_string=True)
        gdb.execute(f"target remote {WANTED['remote']}", to_string=True)
        pid = WANTED["pid"]
    else:
        gdb.execute(f"file {WANTED['program']}", to_string=True)
        gdb.execute("starti " + WANTED["arguments"] + " >/dev/null 2>&1 </dev/null", to_string=True)
        pid = gdb.selected_inferior().pid
    modules = Mapped()
    process = cast("Process", SimpleNamespace(pid=pid, memory=Memory()))
    states: list[dict[str, Any]] = []
    end = time.monotonic() + WANTED["seconds"]
    try:
        while len(states) < WANTED["states"] and time.monotonic() < end:
            go(pid)
            if not gdb.selected_inferior().threads():
                break
            for _ in range(CHANCE.randrange(WANTED["steps"])):
                gdb.execute("stepi", to_string=True)
            modules.refresh(process)
            threads = sorted(gdb.selected_inferior().threads(), key=lambda t: t.num)
            stopped = gdb.selected_thread()
            for thread in [stopped, *[t for t in threads if t is not stopped][: WANTED["threads"]]]:
                thread.switch()
                theirs, ours = gdb_frames(), own_frames(modules, process)
                row: dict[str, Any] = {"depth": len(theirs), "equal": theirs == ours}
                common = len(ours)
                if theirs != ours and theirs[:common] == ours and not modules.is_code(process, theirs[common]):
                    row["beyond"] = True  # gdb goes on where there is no code
                if theirs != ours:
                    row["gdb"] = [named(modules, process, pc) for pc in theirs]
                    row["ours"] = [named(modules, process, pc) for pc in ours]
                row["at"] = named(modules, process, theirs[0]) if theirs else ""
                states.append(row)
            stopped.switch()
    except gdb.error as error:
        print("gdb:", error, file=sys.stderr)
    Path(WANTED["out"]).write_text(json.dumps(states))
    if gdb.selected_inferior().pid:
        gdb.execute("kill", to_string=True)


main()
