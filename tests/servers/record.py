"""What came of all uploads of a run: printed at its end, and written to the file that LINGERX_TEST_RECORD names.

The file is JSON; a readable table lies beside it, with the ending .txt.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lingerx
from refusals import GOOD, Seen

FILE = os.environ.get("LINGERX_TEST_RECORD")


@dataclass
class Count:
    """Of so many uploads: with the whole answer; with the whole answer and no send error."""

    total: int = 0
    whole: int = 0
    good: int = 0

    def add(self, seen: Sequence[Seen]) -> None:
        self.total += len(seen)
        self.whole += sum(one.whole for one in seen)
        self.good += seen.count(GOOD)

    def __str__(self) -> str:
        return f"{self.whole} ({self.good}) of {self.total}" if self.total else "-"


@dataclass
class Row:
    """One server, client, link and size of the answer, in bytes."""

    server: str
    client: str
    link: str
    answer: int
    lingering: Count = field(default_factory=Count)
    plain: Count = field(default_factory=Count)


rows: dict[tuple[str, str, str, int], Row] = {}
packages: set[str] = set()
delays: list[str] = []
"""Lines about who waits."""


def add(server: str, client: str, link: str, answer: int, lingering: bool, seen: Sequence[Seen]) -> None:
    """Counts what clients saw."""
    row = rows.setdefault((server, client, link, answer), Row(server, client, link, answer))
    (row.lingering if lingering else row.plain).add(seen)


def versions() -> dict[str, str]:
    """Of all that took part."""
    found = {
        "lingerx": f"engine {lingerx.engine}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if curl := shutil.which("curl"):
        words = subprocess.run([curl, "--version"], capture_output=True, text=True).stdout.split()
        found["curl"] = " ".join(words[1:2])
    for package in sorted(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "?"
    return found


def table() -> list[str]:
    """Lines to print; none when nothing was counted."""
    if not rows and not delays:
        return []
    lines = [", ".join(f"{name} {what}" for name, what in versions().items())]
    cells: list[tuple[str, ...]] = [("server", "client", "link", "answer", "with lingerx", "without")]
    cells += [
        (row.server, row.client, row.link, _size(row.answer), str(row.lingering), str(row.plain))
        for row in rows.values()
    ]
    if rows:
        lines.append("whole answers, and in brackets those that came without a send error:")
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return lines + delays


def _size(number: int) -> str:
    return f"{number >> 10} KiB" if number >= 1024 else f"{number} bytes"


def write(lines: Iterable[str]) -> None:
    """Both files, when they are wanted."""
    if FILE is None:
        return
    path = Path(FILE)
    content = {"versions": versions(), "rows": [asdict(row) for row in rows.values()], "delays": delays}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
