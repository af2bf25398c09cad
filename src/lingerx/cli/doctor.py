"""`lingerx doctor`: the command and its rendering. `probes` tries, `limits` reads, `facts` runs them."""

from __future__ import annotations

import json
import platform
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lingerx

from . import probes
from .facts import Line, as_json, run
from .limits import read_limits

__all__ = ["conclude", "doctor"]

STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}


@click.command()
@click.option("--json", "as_machine", is_flag=True, help="Print one JSON object on stdout and nothing else.")
def doctor(as_machine: bool) -> None:
    """Try what lingerx relies on, on this machine, and say what to do where it does not hold.

    Each fact of the kernel is tried on loopback connections, which takes a second or two, and the limits that
    matter are read. Nothing is changed.

    ok: as expected. note: it costs time, or can't be known here, or is good to know. broken: lingerx relies on it.

    Exit status 0, or 1 when something is broken.
    """
    start = time.monotonic()
    lo = run(probes.LOOPBACK)
    # Without it each of the others would wait for as long as it may.
    facts = [lo] if _broken([lo]) else [run(probe) for probe in probes.PROBES]
    limits = read_limits()
    seconds = time.monotonic() - start
    if as_machine:
        click.echo(json.dumps(_machine_readable(facts, limits, seconds), indent=2))
    else:
        _show(facts, limits, seconds)
    if _broken(facts + limits):
        sys.exit(1)


def _broken(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.finding.word == "broken"]


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _machine_readable(facts: list[Line], limits: list[Line], seconds: float) -> dict[str, Any]:
    return {
        "lingerx": lingerx.__version__,
        "engine": lingerx.engine,
        "python": _python(),
        "system": _system(),
        "facts": as_json(facts),
        "limits": as_json(limits),
        "broken": [line.name for line in _broken(facts + limits)],
        "ok": not _broken(facts + limits),
        "seconds": seconds,
    }


def _show(facts: list[Line], limits: list[Line], seconds: float) -> None:
    console = Console(highlight=False)
    console.print(
        f"lingerx {lingerx.__version__}, {lingerx.engine} engine; {_python()}; {_system()}; {seconds:.1f} s.\n"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(min_width=min(22, console.width // 3))
    table.add_column(overflow="fold")
    for line in facts + limits:
        finding = line.finding
        found = Text(finding.found)
        if finding.word != "ok":
            found.append(f"\nTo do: {finding.to_do}", style="dim" if finding.word == "note" else "bold")
        table.add_row(Text(finding.word, style=STYLES[finding.word]), line.title, found)
    console.print(table)
    console.line()
    console.print(Text(conclude(facts + limits)))


def conclude(lines: list[Line]) -> str:
    """The verdict in a sentence or two."""
    notes = sum(line.finding.word == "note" for line in lines)
    found = [line.title for line in _broken(lines)]
    told = f" {notes} note{'s' * (notes > 1)} above." if notes else ""
    if found:
        return f"BROKEN: lingerx relies on this, and it does not hold here: {', '.join(found)}.{told}"
    return f"All that lingerx relies on holds here.{told}"
