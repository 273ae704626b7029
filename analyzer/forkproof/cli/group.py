"""A click group that imports a command when it is called, and turns every failure into a line and an exit code.

Owns: lazy loading; what the user reads when something goes wrong.
Takes: a table of commands. Gives: exit codes of `forkproof.errors`; 130 after Ctrl-C, 143 after SIGTERM, 129 after
SIGHUP, 141 for a reader that left.
Must never: show a traceback that was not asked for, or call a failure of forkproof one of its input.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NoReturn

import click

from forkproof.cli.output import discard_stdout, tell
from forkproof.errors import EXIT_INPUT, EXIT_INTERNAL, ForkproofError, bug

_SIGNAL: Final = 128
"""Added to a signal's number, as a shell has it: 130 after Ctrl-C."""
EXIT_NO_READER: Final = 141
"""128 + SIGPIPE."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A command that has not been imported."""

    where: str
    """module:attribute"""
    help: str
    """One line."""


class Ended(KeyboardInterrupt):
    """A signal that would have ended the process at once, with its temporary files still there."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__()


@contextmanager
def _orderly_end() -> Iterator[None]:
    """A pipeline's time limit is a SIGTERM: leave as after Ctrl-C. What the caller ignores stays ignored (nohup)."""

    def end(number: int, _: object) -> NoReturn:
        raise Ended(number)

    is_main = threading.current_thread() is threading.main_thread()
    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def ends_process(context: click.Context) -> bool:
    """The process ends with this command."""
    command = context.find_root().command
    return isinstance(command, LazyGroup) and command.is_process


class LazyGroup(click.Group):
    """The group of all commands; the class that says which has them in `entries`, in the order of the help."""

    entries: ClassVar[Mapping[str, Entry]] = {}
    meant: ClassVar[Mapping[str, Sequence[str]]] = {}
    """What other tools call a command, and what it is here."""
    is_process: bool = False
    """The command line is the process's own, which ends with the command; a caller in Python gives arguments."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names in the order of the table."""
        return list(self.entries)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a misspelt name is told with those that look like it."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = self.meant.get(args[0]) or difflib.get_close_matches(args[0], self.entries, n=2)
            if not near:
                raise
            message = f"{error.message.partition(' Did you mean')[0]} Did you mean {' or '.join(near)}?"
            raise click.UsageError(message, ctx) from None

    def main(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - click's signature
        """As click does; --help has nowhere to go where standard output is full."""
        self.is_process = not arguments and options.get("args") is None
        try:
            return super().main(*arguments, **options)
        except OSError as error:
            discard_stdout()
            sys.exit(_told(f"standard output: cannot write: {error.strerror or error}", EXIT_INPUT))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.where.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        if ctx.resilient_parsing:  # a shell asks what may come next
            from forkproof.cli.complete import completing

            return completing(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - the same
        """The list of commands in the help, from the table: click's own would import each of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; whatever it raises becomes a message on stderr and an exit code."""
        try:
            with _orderly_end():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as end:
            number = end.number if isinstance(end, Ended) else signal.SIGINT
            _leave(ctx, "interrupted", _SIGNAL + number)
        except BrokenPipeError:
            discard_stdout()
            ctx.exit(EXIT_NO_READER)
        except ForkproofError as error:
            _leave(ctx, str(error), error.exit_code)
        except Exception as error:  # noqa: BLE001 - the last resort, which is what exit code 4 is for
            _leave(ctx, _bug(error, with_traceback=bool(ctx.meta.get("forkproof.traceback"))), EXIT_INTERNAL)


def _leave(context: click.Context, message: str, code: int) -> NoReturn:
    """One message, and out."""
    context.exit(_told(message, code))


def _told(message: str, code: int) -> int:
    """One message."""
    tell(message)
    return code


def _bug(error: Exception, *, with_traceback: bool) -> str:
    """What went wrong inside, where, and what to do about it."""
    text = bug(error)
    if with_traceback:
        return "".join(traceback.format_exception(error)) + text
    return f"{text}\n  To report it, run the same command with FORKPROOF_TRACEBACK=1 and send what it prints."
