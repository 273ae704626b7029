"""`forkproof mitigate`: build a library that registers the fork handlers that are missing, and show that it helps.

Owns: the command's options, where the library and its source go, and the exit code.
Takes: a program, and how it is started. Gives: a library, its source, and a report of before and after.
Must never: decide what is right to register; that is `forkproof.mitigate`, imported once the command is checked.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from forkproof.cli import output, running
from forkproof.cli.gate import FAIL_ON, is_incomplete, limit
from forkproof.cli.progress import QUIETLY, progress
from forkproof.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_INPUT
from forkproof.options import ScanOptions
from forkproof.report.layout import WIDTH

if TYPE_CHECKING:
    from forkproof.mitigate.apply import Mitigation
    from forkproof.probe.stage import Command

_NAME: Final = "libforkshim.so"
_SEPARATORS: Final = re.compile(r"[\s:]")


@click.command("mitigate")
@click.argument("target", metavar="TARGET")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
@click.option(
    "--output", "-o", "file", type=click.Path(path_type=Path), metavar="FILE.so",
    help="Keep the library there, its source beside it as FILE.c; without it both are only made and shown.",
)  # fmt: skip
@click.option("--cc", metavar="COMMAND", help="The C compiler (default: gcc, or the cross gcc of TARGET's machine).")
@click.option("--preload", multiple=True, metavar="LIB", help="A library of LD_PRELOAD; repeatable.")
@click.option("--library-path", multiple=True, metavar="DIR", help="A directory of LD_LIBRARY_PATH; repeatable.")
@click.option(
    "--sysroot", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
    help="The directory that is / for TARGET.",
)  # fmt: skip
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="For CMD: a variable of its environment; repeatable.")
@click.option("--timeout", type=click.FloatRange(min=1), default=running.SECONDS, show_default=True, metavar="S",
              help="For CMD: seconds that one run may take.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@FAIL_ON
@click.option("--verbose", "-v", is_flag=True, help="Shorten nothing.")
@output.NO_COLOR
@QUIETLY
@click.pass_context
def mitigate_command(
    context: click.Context,
    /,
    **asked: Any,  # noqa: ANN401 - a field of Request each
) -> None:
    """Build a library to preload that registers what TARGET's allocator does not, and show that the hazard is gone.

    For atfork-unbound: the library defines the pthread_atfork that the allocator looks for, and passes the handlers on
    to libc. For atfork-absent: only where the allocator exports functions that lock and unlock everything, as its code
    shows, does the library register these. Everything else is refused, with the reason and what to do instead.

    TARGET is scanned without and with the library. With a command line after "--" that runs TARGET, the findings are
    also probed, without it and with it. CMD runs as you, with all its effects.

    \b
    Examples:
      forkproof mitigate /usr/bin/qemu-system-aarch64 --preload libtcmalloc.so.4 -o libforkshim.so
      forkproof mitigate ./daemon -o libforkshim.so -- ./daemon --config test.conf
      forkproof mitigate /usr/sbin/named --sysroot /srv/bookworm-arm64 --cc aarch64-linux-gnu-gcc

    \b
    Exit codes:
      0  cured, as shown by the scan, and by the probe if one was asked for; or nothing to mitigate
      1  refused, or not cured
      2  the command line asks for something impossible
      3  the library could not be built, something not analysed, or the probe showed nothing
    """
    request = Request(**asked)
    request.check()
    found = request.mitigation()
    request.deliver(found)
    context.exit(request.exit_code(found))


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; a field for each option."""

    target: str
    command: tuple[str, ...]
    file: Path | None
    cc: str | None
    preload: tuple[str, ...]
    library_path: tuple[str, ...]
    sysroot: Path | None
    env: tuple[str, ...]
    timeout: float
    form: str
    fail_on: str
    verbose: bool
    no_color: bool
    quiet: bool

    def check(self) -> None:
        """Refuse what cannot be meant, and files that would be lost."""
        if self.command and self.sysroot is not None:
            raise click.UsageError("-- CMD runs the program on this machine: leave --sysroot out, or CMD.")
        if self.file is None:
            return
        output.check(self.file)
        if _SEPARATORS.search(str(self.file.resolve())):
            raise click.UsageError(f"{self.file}: LD_PRELOAD takes no path with blanks or colons.")
        if self.file.suffix != ".so":
            raise click.UsageError(f"{self.file}: the library's name is to end in .so; its source goes beside it.")
        from forkproof.mitigate.shim import MARK

        beside = self.file.with_suffix(".c")
        if beside.exists() and MARK not in beside.read_text(encoding="utf-8", errors="replace"):
            raise click.UsageError(f"{beside}: exists, and is not the source of such a library: choose another name.")

    def mitigation(self) -> Mitigation:
        """Scan, build, scan, probe."""
        from forkproof.mitigate.apply import mitigate

        options = ScanOptions(self.sysroot, self.library_path, self.preload)
        folder = tempfile.TemporaryDirectory(prefix="forkproof-shim-")
        with folder as name, progress(quiet=self.quiet, no_color=self.no_color) as watched:
            place = self.file if self.file is not None else Path(name, _NAME)
            found = mitigate(self.target, options, place, self.cc, self.running(), self.timeout, watched)
            if found.shim is None:
                return found
            if self.file is not None:
                output.write(self.file.with_suffix(".c"), found.shim.source)
            return replace(found, shim=replace(found.shim, is_kept=self.file is not None))

    def running(self) -> Command | None:
        """What is probed."""
        if not self.command:
            return None
        return running.command(self.command, preload=self.preload, library_path=self.library_path, env=self.env)

    def deliver(self, found: Mitigation) -> None:
        """To standard output."""
        from forkproof.report import mitigation

        if self.form == "json":
            output.emit(mitigation.render_json(found, limit(self.fail_on)))
            return
        width, color = min(output.width(), WIDTH), output.wants_color(self.no_color)
        output.emit(mitigation.render(found, limit(self.fail_on), width=width, color=color, verbose=self.verbose))

    def exit_code(self, found: Mitigation) -> int:
        """See the command's help."""
        if found.refusals or found.left(limit(self.fail_on)) or found.still_hangs:
            return EXIT_FINDINGS if found.decisions else EXIT_CLEAN
        return EXIT_INPUT if is_incomplete(found.before) or found.is_undecided else EXIT_CLEAN
