"""How the programs of a system are started: what units and wrapper scripts put into LD_PRELOAD.

Owns: the reading of systemd units with their drop-ins and environment files, and of shell scripts that start a program.
Takes: a sysroot. Gives: for each program, the libraries that are preloaded, and which file says so.
Must never: run a script. What a variable holds is known only if the same file assigns it as plain text.
Wrong where: a script chooses between programs or libraries; the first of each in the file is taken, and a name that
only running would tell is not found. Generators and sysv-init are not read; of a container, entry points that are
scripts outside the usual directories are not.

Source: systemd.exec(5), systemd.unit(5), systemd.service(5); ld.so(8).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from forkproof.closure.sysroot import Sysroot

_UNITS: Final = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
"""Where units are, the one that wins first (systemd.unit(5)); the last is the third's old name."""
_COMMANDS: Final = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_LARGEST: Final = 1 << 20
_SHELL: Final = re.compile(rb"#!\s*/\S*?(?:ba|da|k)?sh\b|#!\s*/usr/bin/env\s+(?:ba|da|k)?sh\b")
_PRELOAD: Final = re.compile(r"""LD_PRELOAD=("[^"]*"|'[^']*'|[^\s;&|]*)""")
_ASSIGNED: Final = re.compile(r"""^\s*(?:export\s+)?([A-Za-z_]\w*)=("[^"]*"|'[^']*'|[^\s;&|$`]*)\s*(?:#.*)?$""")
_VARIABLE: Final = re.compile(r"\$(?:\{(\w+)(?::?[-+][^}]*)?\}|(\w+))")
_EXEC: Final = re.compile(r"\bexec\s+(?:-a\s+\S+\s+)?(.*)")
_COMMAND: Final = re.compile(r"^\s*((?:[A-Za-z_]\w*=\S*\s+)*.*)$")
_ARGUMENTS: Final = re.compile(r"\$\{?[@*]")
_PREFIXES: Final = "@-:+!"


@dataclass(frozen=True, slots=True)
class Preload:
    """What is preloaded into a program, and which file says so."""

    libraries: tuple[str, ...]
    source: str


def preloads(sysroot: Sysroot) -> dict[str, Preload]:
    """Resolved path of a program to what its unit preloads; the first unit by name wins."""
    found: dict[str, Preload] = {}
    for path, text in _units(sysroot):
        for program, preload in _of_unit(sysroot, path, text):
            found.setdefault(program, preload)
    return found


def of_script(sysroot: Sysroot, path: str) -> tuple[str, Preload] | None:
    """The program that a shell script ends in, with what it preloads; None for what is no such script."""
    text = _read(sysroot, path)
    if text is None or not _SHELL.match(text):
        return None
    return _in_script(sysroot, path, text.decode("utf-8", "replace"))


def wrapped(sysroot: Sysroot, directories: Sequence[str] = _COMMANDS) -> dict[str, Preload]:
    """Programs that a script among the commands starts with a preload.

    Each gets the script's own arguments, or takes its place by exec. Others that a script happens to run (cat, in one
    that starts whatever it is given) are not what it is there for.
    """
    found: dict[str, Preload] = {}
    places = {sysroot.resolve(directory): directory for directory in reversed(directories)}
    for directory in reversed([place for resolved, place in places.items() if resolved is not None]):
        for name in sysroot.names_in(directory):
            path = f"{directory}/{name}"
            head = _head(sysroot, path)
            text = _read(sysroot, path) if head is not None and _SHELL.match(head) else None
            # Few scripts preload anything, and to find what the others end in takes long.
            if text is None or b"LD_PRELOAD" not in text:
                continue
            if (script := _in_script(sysroot, path, text.decode("utf-8", "replace"), passes_on=True)) is not None:
                program, preload = script
                if preload.libraries:
                    found.setdefault(program, preload)
    return found


def of_environment(variables: Sequence[str], source: str) -> Preload:
    """What the environment that an image gives to its processes preloads; the last assignment counts."""
    values = [value for name, _, value in (each.partition("=") for each in variables) if name == "LD_PRELOAD"]
    return Preload(_names(values[-1]) if values else (), source)


# Units.


def _units(sysroot: Sysroot) -> Iterator[tuple[str, str]]:
    """Each service once, with its drop-ins appended in the order of their names; only those that preload something."""
    homes: dict[str, str] = {}
    dropins: dict[str, dict[str, str]] = {}
    for directory in _UNITS:
        for name in sysroot.names_in(directory):
            if name.endswith(".service"):
                homes.setdefault(name, f"{directory}/{name}")
            elif name.endswith(".service.d"):
                places = dropins.setdefault(name.removesuffix(".d"), {})
                for each in sysroot.names_in(f"{directory}/{name}"):
                    if each.endswith(".conf"):
                        places.setdefault(each, f"{directory}/{name}/{each}")
    for name, path in sorted(homes.items()):
        template = re.sub(r"@[^.]+\.", "@.", name)
        more = {**dropins.get("service", {}), **dropins.get(template, {}), **dropins.get(name, {})}
        files = [path, *(more[each] for each in sorted(more))]
        texts = [(each, raw.decode("utf-8", "replace")) for each in files if (raw := _read(sysroot, each))]
        whole = "\n".join(text for _, text in texts)
        if "LD_PRELOAD" in whole or "EnvironmentFile" in whole:
            says = next((each for each, text in texts if "LD_PRELOAD" in text), path)
            yield says, whole


def _of_unit(sysroot: Sysroot, path: str, text: str) -> Iterator[tuple[str, Preload]]:
    value, source, commands = "", path, list[str]()
    for key, setting in _settings(text):
        if key == "Environment":
            for name, each in _assignments(setting):
                value, source = (each, path) if name == "LD_PRELOAD" else (value, source)
        elif key == "EnvironmentFile":
            file = setting.lstrip("-")
            raw = _read(sysroot, file) or b""
            for name, each in _assignments(raw.decode("utf-8", "replace")):
                value, source = (each, file) if name == "LD_PRELOAD" else (value, source)
        elif key == "ExecStart":
            commands = [*commands, setting] if setting else []
    for command in commands:
        program = command.lstrip(_PREFIXES).split(" ", 1)[0]
        yield from _started(sysroot, program, Preload(_names(value), source))


def _started(sysroot: Sysroot, program: str, preload: Preload) -> Iterator[tuple[str, Preload]]:
    """The program itself, or the one that the script at its path ends in."""
    script = of_script(sysroot, program)
    if script is not None:
        program, inner = script
        preload = inner if inner.libraries else preload
    resolved = sysroot.resolve(program) if program.startswith("/") else None
    if resolved is not None and preload.libraries:
        yield resolved, preload


def _settings(text: str) -> Iterator[tuple[str, str]]:
    """Keys and values of [Service], continued lines joined."""
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped
        elif section == "[Service]" and "=" in stripped and not stripped.startswith(("#", ";")):
            key, _, value = stripped.partition("=")
            yield key.strip(), value.strip()


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    """NAME=value, quoted or not, one or several in a line; comments are skipped."""
    for line in text.splitlines():
        if line.lstrip().startswith(("#", ";")):
            continue
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        for word in words:
            name, found, value = word.partition("=")
            if found:
                yield name.removeprefix("export ").strip(), value


def _names(value: str) -> tuple[str, ...]:
    """LD_PRELOAD's list: separated by blanks or colons."""
    return tuple(part for part in re.split(r"[\s:]+", value) if part)


# Scripts.


def _in_script(sysroot: Sysroot, path: str, text: str, *, passes_on: bool = False) -> tuple[str, Preload] | None:
    known: dict[str, str] = {}
    libraries: tuple[str, ...] = ()
    for line in text.splitlines():
        if (match := _PRELOAD.search(line)) is not None and not line.lstrip().startswith("#"):
            value = _expanded(match[1].strip("\"'"), {**known, "LD_PRELOAD": ""})
            libraries = libraries or (_names(value) if value is not None else ())
        if (match := _ASSIGNED.match(line)) is not None:
            value = _expanded(match[2].strip("\"'"), known)
            if value is not None:
                known[match[1]] = value
    program = next(_programs(sysroot, text, known, passes_on=passes_on), None)
    return (program, Preload(libraries, path)) if program is not None else None


def _programs(sysroot: Sysroot, text: str, known: dict[str, str], *, passes_on: bool) -> Iterator[str]:
    """ELF programs that the script's lines name: after exec first, then any that begins a command."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for pattern in (_EXEC, _COMMAND):
        for line in lines:
            if (match := pattern.search(line)) is None or (
                passes_on and pattern is _COMMAND and _ARGUMENTS.search(line) is None
            ):
                continue
            words = [word for word in _words(match[1]) if not re.match(r"[A-Za-z_]\w*=|env$", word)]
            name = _expanded(words[0], known) if words else None
            found = _found(sysroot, name) if name else None
            if found is not None:
                yield found


def _words(text: str) -> list[str]:
    """A shell's words, or what blanks separate where its quotes do not match up."""
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return text.split()


def _found(sysroot: Sysroot, name: str) -> str | None:
    """The ELF file that a command is; what the shell itself or a script would do is nothing."""
    places = [name] if "/" in name else [f"{directory}/{name}" for directory in _COMMANDS]
    for place in places:
        if place.startswith("/") and (_head(sysroot, place) or b"").startswith(b"\x7fELF"):
            resolved = sysroot.resolve(place)
            if resolved is not None and resolved.rpartition("/")[2] not in {"bash", "dash", "sh", "test", "["}:
                return resolved
    return None


def _expanded(text: str, known: dict[str, str]) -> str | None:
    """Text with its variables replaced; None if one is unknown, or a command is substituted."""
    if "`" in text or "$(" in text:
        return None
    missing = []

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in known:
            missing.append(name)
        return known.get(name, "")

    result = _VARIABLE.sub(value, text)
    return None if missing else result


# Files.


def _read(sysroot: Sysroot, path: str) -> bytes | None:
    try:
        return sysroot.read(path, _LARGEST) if sysroot.resolve(path) is not None else None
    except OSError:
        return None


def _head(sysroot: Sysroot, path: str) -> bytes | None:
    try:
        return sysroot.read(path, 48)
    except OSError:
        return None
