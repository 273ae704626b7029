"""A click group that imports a command when it is called, and turns every failure into a line and an exit code.

Owns: lazy loading; what the user reads when something goes wrong.
Takes: a table of commands. Gives: exit codes of `forkproof.errors`; 130 after Ctrl-C, 141 for a reader that left.
Must never: show a traceback that was not asked for, or call a failure of forkproof one of its input.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, NoReturn

import click

from forkproof.cli.output import discard_stdout
from forkproof.errors import EXIT_INTERNAL, ForkproofError, bug
from forkproof.report.layout import clean

EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as a shell has it."""
EXIT_NO_READER: Final = 141
"""128 + SIGPIPE."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A command that has not been imported."""

    where: str
    """module:attribute"""
    help: str
    """One line."""


class LazyGroup(click.Group):
    """The group of all commands; the class that says which has them in `entries`, in the order of the help."""

    entries: ClassVar[Mapping[str, Entry]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names in the order of the table."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - the same
        """The command, imported now."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.where.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - the same
        """The list of commands in the help, from the table: click's own would import each of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; whatever it raises becomes a message on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _leave(ctx, "interrupted", EXIT_INTERRUPTED)
        except BrokenPipeError:
            discard_stdout()
            ctx.exit(EXIT_NO_READER)
        except ForkproofError as error:
            _leave(ctx, str(error), error.exit_code)
        except Exception as error:  # noqa: BLE001 - the last resort, which is what exit code 4 is for
            _leave(ctx, _bug(error, with_traceback=bool(ctx.meta.get("forkproof.traceback"))), EXIT_INTERNAL)


def _leave(context: click.Context, message: str, code: int) -> NoReturn:
    """One message, no control characters of a file's name in it, and out."""
    click.echo("\n".join(map(clean, f"forkproof: {message}".splitlines())), err=True)
    context.exit(code)


def _bug(error: Exception, *, with_traceback: bool) -> str:
    """What went wrong inside, where, and what to do about it."""
    text = bug(error)
    if with_traceback:
        return "".join(traceback.format_exception(error)) + text
    return f"{text}\n  To report it, run the same command with FORKPROOF_TRACEBACK=1 and send what it prints."
