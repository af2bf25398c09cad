from typing import final

from ._offers import (
    Intake as Intake,
    Loop as Loop,
    abort as abort,
    close as close,
    close_all as close_all,
    close_fd as close_fd,
    get_linger as get_linger,
    send_and_close as send_and_close,
    set_linger as set_linger,
    tcp_status as tcp_status,
)

@final
class Rehearsal:
    """The compiled machine, told its events by hand: a test holds it against the interpreted one."""

    def __new__(
        cls,
        goal: int,
        timeout: int,
        idle: int,
        max_bytes: int,
        abort: bool,
        short: bool,
        unsent: int,
        local: bool,
        polled: bool,
        now: int,
    ) -> Rehearsal: ...
    def advance(self, seen: int, amount: int, now: int, never_sent: int = -1) -> int: ...
    def state(self) -> dict[str, int]: ...

@final
class Parcel:
    """What is kept for a socket until it is closed: the data it still has to send, and who wants to know."""
