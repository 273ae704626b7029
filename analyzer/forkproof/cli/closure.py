"""`forkproof closure`: what ld.so would load for a program, and what each reference binds to.

Owns: the command's options, its document and the two ways to print it.
Takes: a target. Gives: text or JSON on stdout, and the exit code: 3 when a library is missing.
Must never: hide a missing library or an unresolved symbol behind a clean exit.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from forkproof.cli import output
from forkproof.closure import Bindings, DirectorySysroot, LoadRequest, load
from forkproof.errors import EXIT_CLEAN, EXIT_INPUT
from forkproof.report.layout import clean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkproof.closure import Closure, Reference

Document = dict[str, Any]


@click.command("closure")
@click.argument("target")
@click.option("--sysroot", default="/", metavar="DIR", help="Tree in which the target would run (default: /).")
@click.option("--library-path", multiple=True, metavar="DIR", help="As in LD_LIBRARY_PATH; may be repeated.")
@click.option("--preload", multiple=True, metavar="LIB", help="As in LD_PRELOAD: a soname or a path; repeatable.")
@click.option("--also", multiple=True, metavar="LIB", help="Opened after start-up with dlopen; repeatable.")
@click.option("--bindings", is_flag=True, help="List what every symbol reference binds to.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Output format.",
)
@click.pass_context
def closure_command(
    context: click.Context,
    target: str,
    sysroot: str,
    library_path: tuple[str, ...],
    preload: tuple[str, ...],
    also: tuple[str, ...],
    bindings: bool,
    form: str,
) -> None:
    """Show the objects that ld.so would map for TARGET, in load order, without running it.

    \b
    Examples:
      forkproof closure /usr/sbin/named
      forkproof closure /usr/bin/qemu-system-aarch64 --sysroot /srv/bookworm-arm64 --preload libtcmalloc.so.4
      forkproof closure /usr/sbin/cron --bindings | grep fork

    Exit codes: 0 all was found; 3 the target, a library or a preload was not.
    """
    request = LoadRequest(DirectorySysroot(sysroot), target, library_path, preload, also)
    closure = load(request)
    result = document(closure, Bindings(closure) if bindings else None)
    lines = [json.dumps(result, indent=2)] if form == "json" else [clean(line) for line in text(result)]
    output.emit("\n".join([*lines, ""]))
    # As a scan has it: what could not be loaded was not looked at, whether it is needed or was asked for.
    failed = bool(closure.missing) or any(diagnostic.level == "error" for diagnostic in closure.diagnostics)
    context.exit(EXIT_INPUT if failed else EXIT_CLEAN)


def document(closure: Closure, bindings: Bindings | None) -> Document:
    """The closure as plain values; `bindings` None leaves that part out."""
    paths = [item.path for item in closure.objects]
    result: Document = {
        "target": closure.program.path,
        "libc": closure.libc.value,
        "objects": [{"name": item.name, "path": item.path, "why": item.why} for item in closure.objects],
        "init_order": [paths[index] for index in closure.init_order],
    }
    diagnostics = [{"level": d.level, "object": d.object, "message": d.message} for d in closure.diagnostics]
    if bindings is not None:
        references = list(bindings.all())
        result["bindings"] = [_binding(reference, paths) for reference in references]
        diagnostics += [_unresolved(reference, paths) for reference in references if reference.is_unresolved]
    result["missing"] = [item.name for item in closure.missing]
    result["searched"] = [
        {
            "name": item.name,
            "needed_by": list(item.needed_by),
            "looked_in": [{"path": p.path, "source": p.source, "outcome": p.outcome} for p in item.looked_in],
        }
        for item in closure.missing
    ]
    result["diagnostics"] = diagnostics
    return result


def text(result: Document) -> Iterator[str]:
    """The document in lines, for people."""
    yield f"{result['target']}: {len(result['objects'])} objects ({result['libc']})"
    for index, item in enumerate(result["objects"]):
        yield f"{index:4} {item['path']}"
        yield f"     {item['why']}"
    for item in result.get("bindings", ()):
        version = f"@{item['version']}" if item["version"] else ""
        target = item["to"] or ("nothing (weak)" if item["weak"] else "nothing: UNRESOLVED")
        yield f"{item['from']}: {item['symbol']}{version} -> {target}{' (ifunc)' if item['ifunc'] else ''}"
    for item in result["searched"]:
        yield f"missing: {item['name']}, needed by {', '.join(item['needed_by'])}"
        yield from (f"    {p['path']} ({p['source']}): {p['outcome']}" for p in item["looked_in"])
    for item in result["diagnostics"]:
        yield f"{item['level']}: {item['object']}: {item['message']}"


def _binding(reference: Reference, paths: list[str]) -> Document:
    target = reference.binding
    return {
        "from": paths[reference.object],
        "to": None if target is None else paths[target.object],
        "symbol": reference.name,
        "version": reference.version,
        "weak": reference.weak,
        "ifunc": target is not None and target.is_ifunc,
    }


def _unresolved(reference: Reference, paths: list[str]) -> Document:
    version = f", version {reference.version}" if reference.version else ""
    message = f"undefined symbol: {reference.name}{version}"
    return {"level": "error", "object": paths[reference.object], "message": message}
