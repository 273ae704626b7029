"""Where results go: standard output, or a file that is there entirely or not at all.

Owns: encoding, the decision for colour, atomic writing, readers that go away.
Takes: text. Gives: bytes somewhere, or an error that names the place.
Must never: leave half a report under the name that was asked for.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TextIO, TypeVar

import click
from click.core import ParameterSource

from forkproof.errors import EXIT_INPUT, ForkproofError, UsageError
from forkproof.report.layout import WIDTH, clean

_Command = TypeVar("_Command", bound=Callable[..., Any])

NO_COLOR: Final = click.option(
    "--no-color", is_flag=True, help="No colours, even on a terminal; nor with NO_COLOR set, or TERM=dumb."
)
"""For every command that has colours."""


_NAMED: Final = {
    ".json": "json",
    ".sarif": "sarif",
    ".html": "html",
    ".md": "markdown",
    ".xml": "junit",
    ".dot": "dot",
    ".svg": "svg",
    ".mmd": "mermaid",
    ".graphml": "graphml",
}
"""What a file is called that holds a format."""


def format_option(
    names: Sequence[str], default: str = "text", explained: str = "", into: str = "file"
) -> Callable[[_Command], _Command]:
    """`--format` of a command that writes into the file of the parameter `into`: its name decides if not given."""

    def chosen(context: click.Context, parameter: click.Parameter, value: str) -> str:
        file = context.params.get(into)
        is_asked = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
        named = _NAMED.get(file.suffix) if isinstance(file, Path) and not is_asked else None
        return named if named is not None and named in names else value

    shown = f"what FILE's name says, else {default}"
    kind = click.Choice(names)
    return click.option(
        "--format", "form", type=kind, default=default, show_default=shown, callback=chosen, help=explained
    )


class OutputError(ForkproofError):
    """The analysis is done, and its result could not be written."""

    exit_code = EXIT_INPUT

    def __init__(self, place: str, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(
            f"{place}: cannot write: {reason}",
            next_step="Name a file where there is room and permission: --output FILE",
        )


def wants_color(no_color: bool = False) -> bool:
    """Colour is for a terminal that can show it, and whose owner has not said no (https://no-color.org)."""
    allowed = not no_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return allowed and _is_terminal()


def width() -> int:
    """The terminal's width, up to the widest that a report is; in a pipe always the latter."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if _is_terminal() else WIDTH


def emit(text: str) -> None:
    """Write to standard output. A reader that has left (`| head`) is none of our business: the exit code stays."""
    stream = _stdout()
    if stream is None:
        raise OutputError("standard output", OSError(errno.EBADF, "it is closed"))
    try:
        stream.flush()
        stream.buffer.write(text.encode(stream.encoding or "utf-8", "replace"))
        stream.buffer.flush()
    except BrokenPipeError:
        discard_stdout()
    except OSError as error:
        discard_stdout()
        raise OutputError("standard output", error) from error


def tell(message: str) -> None:
    """To people, on standard error: no control character of a file's name is in it, and nobody need be there."""
    with suppress(OSError):
        click.echo("\n".join(map(clean, f"forkproof: {message}".splitlines())), err=True)


def _stdout() -> TextIO | None:
    """None where the caller has closed it (`>&-`), which the type of sys.stdout does not say."""
    return sys.stdout


def _is_terminal() -> bool:
    stream = _stdout()
    return stream is not None and stream.isatty()


def discard_stdout() -> None:
    """Send what is still in buffers to nowhere, lest Python complain about it at exit."""
    stream = _stdout()
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):
        return
    if descriptor < 0:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def check(path: Path) -> None:
    """Raise now what `write` would raise after a long scan, as far as can be told."""
    if path.is_dir():
        raise UsageError(f"{path}: is a directory", next_step="Name a file: --output FILE")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no directory {path.parent}", next_step=f"mkdir -p {path.parent}")
    place = path if _is_special(path) else path.parent
    if not os.access(place, os.W_OK):
        raise OutputError(str(path), PermissionError(0, "no permission, or a read-only file system"))


def deliver(text: str, file: Path | None) -> None:
    """To the file, or to standard output."""
    if file is None:
        emit(text)
    else:
        write(file, text)


def write(path: Path, text: str) -> None:
    """Write a file by renaming a complete one into its place; devices and pipes are written to as they are."""
    data = text.encode("utf-8", "replace")
    try:
        if _is_special(path):
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise OutputError(str(path), error) from error


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".forkproof-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            if path.exists():
                temporary.chmod(path.stat().st_mode & 0o777)
            stream.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
