"""Reads the limits of this process and of the kernel that decide what becomes of lingering sockets.

Only reads, and judges what it read; nothing is set, and nothing printed. Which limits: `RLIMIT_NOFILE` of
getrlimit(2), and those of tcp(7) and the kernel's ip-sysctl.rst that rule orphans, which are connections that were
closed while data was still on its way.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..closer import _half_of_all_fds
from .facts import Finding, Line, note, ok

if sys.platform != "win32":
    import resource

__all__ = ["read_limits"]

PROC = Path("/proc")
USUAL_SOFT_LIMIT = 1024  # fds; what a process gets that nobody has given more (getrlimit(2), systemd)
RETRIES_FOR_ZERO = 8  # ip-sysctl.rst, tcp_orphan_retries


def read_limits(proc: Path = PROC) -> list[Line]:
    """The limits that matter here, in the order in which they are shown. Raises nothing.

    proc: where proc(5) is mounted.
    """
    return [
        Line("open_files", "open files", _open_files()),
        Line("tcp_max_orphans", "tcp_max_orphans", _sysctl(proc, "tcp_max_orphans")),
        Line("tcp_orphan_retries", "tcp_orphan_retries", _sysctl(proc, "tcp_orphan_retries")),
        Line("tcp_fin_timeout", "tcp_fin_timeout", _sysctl(proc, "tcp_fin_timeout")),
    ]


def _open_files() -> Finding:
    pending = _half_of_all_fds()
    if sys.platform == "win32":
        return note(f"no such limit here; a Closer takes {pending} sockets at a time.", max_pending=pending)
    soft, hard = (_number(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    return judge_open_files(soft, hard, pending)


def _number(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def judge_open_files(soft: int | None, hard: int | None, pending: int) -> Finding:
    """RLIMIT_NOFILE, None for no limit, and what a Closer makes of it."""
    numbers = {"soft": soft, "hard": hard, "max_pending": pending}
    now, most = ("no limit" if limit is None else limit for limit in (soft, hard))
    found = f"{now}, {most} if raised: a Closer takes {pending} sockets at a time."
    if soft is None or soft > USUAL_SOFT_LIMIT:
        return ok(found, **numbers)
    to_do = "Raise it (`ulimit -n`, LimitNOFILE= of systemd) for more: beyond max_pending the oldest are SHED."
    return note(found, to_do, **numbers)


def _sysctl(proc: Path, name: str) -> Finding:
    if sys.platform != "linux":
        return note("not read here: a setting of Linux.")
    try:
        value = int((proc / "sys/net/ipv4" / name).read_text("ascii"))
    except (OSError, ValueError) as error:
        # Settings of the whole machine are not shown in the network namespace of a container.
        why = error.strerror if isinstance(error, OSError) else str(error)
        return note(f"can't be read here: {why}", f"In a container ask its host: `sysctl net.ipv4.{name}`.")
    return {
        "tcp_max_orphans": _max_orphans,
        "tcp_orphan_retries": _orphan_retries,
        "tcp_fin_timeout": _fin_timeout,
    }[name](value)


def _max_orphans(value: int) -> Finding:
    pending = _half_of_all_fds()
    if value >= pending:
        return ok(f"{value} closed connections may still have data to send, machine-wide.", value=value)
    return note(
        f"{value}, fewer than the {pending} sockets of one Closer: if all time out at once, the rest are reset.",
        f"Raise it (`sysctl -w net.ipv4.tcp_max_orphans={pending}`), or pass a smaller max_pending.",
        value=value,
    )


def _orphan_retries(value: int) -> Finding:
    if value == 0:
        return ok(f"0, which acts as {RETRIES_FOR_ZERO}: the kernel goes on for 100 s and more.", value=value)
    if value >= RETRIES_FOR_ZERO:
        return ok(f"{value}: the kernel goes on for 100 s and more.", value=value)
    return note(
        f"{value}: what is left to the kernel is given up after so many tries without an answer.",
        "On lossy networks give Drain and Flush more `timeout`, or set it to 0, which acts as 8.",
        value=value,
    )


def _fin_timeout(value: int) -> Finding:
    return ok(f"{value} s for a peer that has everything and does not close.", value=value)
