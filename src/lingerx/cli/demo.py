"""`lingerx demo`: the command and its rendering. `upload` measures what it shows, `tally` judges it."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import lingerx

from . import upload
from .tally import Row, as_json, find_failures

__all__ = ["conclude", "demo"]

MIB = 1024 * 1024
POSITIVE = click.IntRange(1)
FOOT = (
    "Truncated: a part of the answer arrived; reset: not one byte. Send error: the upload itself failed "
    "(ECONNRESET or EPIPE; curl: exit status 55), and many a client then reports that instead of the answer. "
    "Flush() closes as soon as every byte is ACKed, so a client that is still sending may have a send error "
    "although its answer is there. Drain() waits for the client, so its clients must have none."
)


class Seconds(click.FloatRange):
    """Of a wait; click takes "nan" for a number in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        return seconds


@click.command()
@click.option("--uploads", default=20, show_default=True, type=POSITIVE, help="Per way and client.")
@click.option(
    "--client",
    "wanted",
    type=click.Choice(["raw", "curl", "both"]),
    help="raw: writes everything before it reads, and reads on after a send error. Default: raw, and curl "
    "where it is installed.",
)
@click.option("--answer-bytes", default=MIB, show_default=True, type=POSITIVE, help="The 413's body.")
@click.option("--upload-bytes", default=8 * MIB, show_default=True, type=POSITIVE, help="The POST's body.")
@click.option("--timeout", default=10.0, show_default=True, type=Seconds(0.1, 3600.0), help="Seconds for one upload.")
@click.option("--json", "as_machine", is_flag=True, help="Print one JSON object on stdout and nothing else.")
def demo(
    uploads: int, wanted: str | None, answer_bytes: int, upload_bytes: int, timeout: float, as_machine: bool
) -> None:
    """Refuse uploads in seven ways, and count what the clients got.

    A server on loopback answers big uploads with 413 and a long body while the client is still sending, and
    then closes: plainly, with SO_LINGER, and by each policy of lingerx.

    Exit status 0 when Drain and Flush delivered every answer, Drain without a send error, and no report
    claimed more than its client got; else 1.
    """
    settings = upload.Settings(uploads, _clients(wanted), answer_bytes, upload_bytes, timeout)
    start = time.monotonic()
    rows = _run(settings, quiet=as_machine)
    seconds = time.monotonic() - start
    failures = find_failures(rows)
    if as_machine:
        click.echo(json.dumps(_machine_readable(settings, rows, failures, seconds), indent=2))
    else:
        _show(settings, rows, failures, seconds)
    if failures:
        sys.exit(1)


def _clients(wanted: str | None) -> tuple[str, ...]:
    here = upload.curl_path() is not None
    if wanted in ("curl", "both") and not here:
        raise click.UsageError(f"--client {wanted} needs curl, and there is none on PATH.")
    if wanted is None:
        wanted = "both" if here else "raw"
    return ("raw", "curl") if wanted == "both" else (wanted,)


def _run(settings: upload.Settings, quiet: bool) -> list[Row]:
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with progress:
        task = progress.add_task("", total=settings.uploads * len(settings.clients) * len(upload.WAYS))
        return upload.run(settings, lambda name: progress.update(task, advance=1, description=name))


def _machine_readable(
    settings: upload.Settings, rows: list[Row], failures: list[str], seconds: float
) -> dict[str, Any]:
    return {
        "lingerx": lingerx.__version__,
        "engine": lingerx.engine,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "settings": vars(settings),
        "rows": [as_json(row) for row in rows],
        "failures": failures,
        "ok": not failures,
        "seconds": seconds,
    }


def _show(settings: upload.Settings, rows: list[Row], failures: list[str], seconds: float) -> None:
    console = Console(highlight=False)
    console.print(
        f"Uploads of {_size(settings.upload_bytes)}, refused with a 413 and {_size(settings.answer_bytes)} "
        f"of body while the client is still sending. {settings.uploads} uploads per way and client. "
        f"lingerx {lingerx.__version__}, {lingerx.engine} engine; {platform.python_implementation()} "
        f"{platform.python_version()}; {platform.system()} {platform.release()} {platform.machine()}; "
        f"{seconds:.1f} s.\n"
    )
    for part in (_clients_table(rows), _server_table(rows), Text(FOOT, style="dim"), Text(conclude(rows))):
        console.print(part)
        console.line()
    for failure in failures:
        console.print(Text(f"FAILED: {failure}", style="bold red"))


def _clients_table(rows: list[Row]) -> Table:
    timed_out = any(cell.count("timed_out") for row in rows for cell in row.cells)
    table = _table("What the clients saw", "Closed by", "Client")
    for heading in ("Whole", "Truncated", "Reset", *["Timed out"] * timed_out, "Send errors"):
        table.add_column(heading, justify="right")
    for row in rows:
        name = row.name
        for cell in row.cells:
            whole = cell.count("whole")
            counts = [
                Text(f"{whole} of {cell.uploads}", style="green" if whole == cell.uploads else "red"),
                _count(cell.count("truncated")),
                _count(cell.count("reset")),
                *[_count(cell.count("timed_out"))] * timed_out,
                _count(cell.send_errors),
            ]
            table.add_row(name, cell.client, *counts)
            name = ""
    return table


def _server_table(rows: list[Row]) -> Table:
    table = _table("What the server heard, and how long its thread was busy closing", "Closed by")
    for heading in ("Median ms", "Max ms"):
        table.add_column(heading, justify="right")
    table.add_column("Delivered", no_wrap=True)
    table.add_column("Outcomes")
    for row in rows:
        times = [f"{1e3 * value:.1f}" for value in (row.median_closing, row.longest_closing)]
        answers = {"yes": row.delivered(True), "no": row.delivered(False), "unknown": row.delivered(None)}
        delivered = ", ".join(f"{count} {answer}" for answer, count in answers.items() if count)
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in row.outcomes.most_common())
        table.add_row(row.name, *times, delivered or "-", outcomes or "-")
    return table


def _table(title: str, *left: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading in left:
        table.add_column(heading, no_wrap=True)
    return table


def _count(number: int) -> Text:
    return Text(str(number) if number else "-")


def _size(number: int) -> str:
    for unit, name in ((1024 * 1024, "MiB"), (1024, "KiB")):
        if number >= unit and number % unit == 0:
            return f"{number // unit} {name}"
    return f"{number} bytes"


def conclude(rows: list[Row]) -> str:
    """The whole result as one paragraph for somebody who has never heard of lingering."""
    sentences = []
    for row in rows:
        arrived = sum(cell.count("whole") for cell in row.cells)
        total = sum(cell.uploads for cell in row.cells)
        errors = sum(cell.send_errors for cell in row.cells)
        if row.name == upload.PLAIN:
            sentences.append(f"Plain close: {arrived} of {total} answers arrived")
            if arrived < total:
                sentences[-1] += (
                    "; the client's upload was still coming in, so the kernel reset the connection and threw "
                    "away what it had not sent yet, and nobody told the server."
                )
            else:
                sentences[-1] += (
                    f" this time, though {errors} clients had a send error: the answer was small enough to "
                    "be on the client's side before the reset. A larger --answer-bytes shows the loss."
                )
        elif row.name == upload.SO_LINGER:
            sentences.append(f"SO_LINGER, the usual advice: {arrived} of {total}.")
        elif row.lossless:
            sentences.append(
                f"{row.name}: {arrived} of {total}, for {1e3 * row.median_closing:.0f} ms of the server "
                "thread's time (median)" + (f", and {errors or 'no'} send errors." if row.gentle else ".")
            )
    lies = sum(len(cell.lies) for row in rows for cell in row.cells)
    sentences.append(f"{lies or 'No'} report{'s' * (lies > 1)} claimed more than its client got.")
    return " ".join(sentences)
