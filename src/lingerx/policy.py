"""What to ask for: the five policies, each checked when it is made.

Here live only the values a caller passes and their checks. Nothing in this file touches a socket, reads a
clock or imports another lingerx module. Seconds come in as numbers and are kept as integer nanoseconds in
``_terms``, the one tuple of plain integers that the engines read; ``_packed`` holds the same for C.
"""

from __future__ import annotations

import math
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Literal, NoReturn, SupportsFloat

    from typing_extensions import Self

    OnTimeout = Literal["background", "abort"]
    Terms = tuple[int, int, int, int, int, int, int]

__all__ = [
    "DEFAULT_TIMEOUT",
    "Abort",
    "Background",
    "Drain",
    "Flush",
    "KernelLinger",
    "Policy",
    "left_of",
    "policy_from_linger",
    "seconds_to_ns",
]

DEFAULT_TIMEOUT = 3.0
"""Seconds. The usual advice for long-lived services (RPC, chat): a guess that has served them well."""

# No fact of any kernel stands behind this one: it keeps nanoseconds far inside a signed 64-bit integer.
LONGEST_TIMEOUT = 1e9
# l_linger is a signed 16-bit field on some systems (macOS, Windows has 16 bits unsigned): the common range.
LONGEST_KERNEL_LINGER = 32767
# TCP_USER_TIMEOUT is an int of milliseconds (tcp(7)).
LONGEST_USER_TIMEOUT_MS = 2**31 - 1

# The kinds, as the engines switch on them.
BACKGROUND, ABORT, KERNEL_LINGER, FLUSH, DRAIN = range(5)


def seconds_to_ns(name: str, value: SupportsFloat, instead: str = "") -> int:
    """Nanoseconds for a number of seconds that may be 0 but not negative, NaN or endless.

    Raises TypeError when `value` is no number, ValueError when it is out of range; `instead` ends the sentence
    with what to pass when no limit is wanted.
    """
    if isinstance(value, (bool, str, bytes)) or not hasattr(type(value), "__float__"):
        raise TypeError(f"{name} is a number of seconds, such as 3.0{instead}; got {value!r}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not 0.0 <= seconds <= LONGEST_TIMEOUT:  # also false for NaN
        raise ValueError(f"{name} is a number of seconds from 0 to {LONGEST_TIMEOUT:.0f}{instead}; got {value!r}")
    return round(seconds * 1e9)


def _idle_ns(value: SupportsFloat | None) -> int:
    return -1 if value is None else seconds_to_ns("idle_timeout", value, ", or None for no idle limit")


def _byte_limit(value: int | None) -> int:
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_bytes is a whole number of bytes, or None for no limit; got {value!r}")
    if not 0 <= value < 2**63:
        raise ValueError(f"max_bytes is 0 or more (below 2**63), or None for no limit; got {value!r}")
    return value


def _user_timeout_ms(value: SupportsFloat | None) -> int:
    if value is None:
        return -1
    ns = seconds_to_ns("user_timeout", value, ", or None for the system's own")
    milliseconds = -(-ns // 1_000_000)  # rounded up: 0 would mean "the system's own" (tcp(7))
    if not 1 <= milliseconds <= LONGEST_USER_TIMEOUT_MS:
        raise ValueError(
            "user_timeout is more than 0 and at most 2147483 seconds (TCP_USER_TIMEOUT counts milliseconds "
            f"in an int), or None for the system's own; got {value!r}"
        )
    return milliseconds


def _aborts(value: str) -> int:
    if value not in ("background", "abort"):
        raise ValueError(f"on_timeout is 'background' or 'abort'; got {value!r}")
    return int(value == "abort")


class Policy:
    """What all five have in common: immutable, comparable, hashable, picklable. Not for subclassing."""

    __slots__ = ("_packed", "_terms")
    __match_args__: ClassVar[tuple[str, ...]] = ()

    _terms: Terms
    _packed: bytes

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls is Policy:
            raise TypeError("pass one of Background, Abort, KernelLinger, Flush, Drain; Policy is only their base")
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
        if cls.__module__ != __name__:
            raise TypeError(
                "the policies are a closed set, known to the engines: use Background, Abort, KernelLinger, "
                "Flush or Drain with other arguments"
            )

    def _settle(self, terms: Terms, **values: object) -> None:
        object.__setattr__(self, "_terms", terms)
        object.__setattr__(self, "_packed", struct.pack("=7q", *terms))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__match_args__}

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a policy cannot be changed; make another {type(self).__name__}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a policy cannot be changed; make another {type(self).__name__}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._terms == other._terms

    def __hash__(self) -> int:
        return hash(self._terms)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({shown})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._arguments())


def _rebuild(cls: type[Policy], arguments: dict[str, Any]) -> Policy:
    return cls(**arguments)


class Background(Policy):
    """Plain close: SO_LINGER off, `close`, and the kernel goes on with the rest (Go: SetLinger < 0).

    The caller pays nothing. The peer sees the rest of the data and FIN, but RST if input was unread or comes
    later (RFC 1122 4.2.2.13), and then everything still queued is lost.

    user_timeout: seconds for TCP_USER_TIMEOUT, after which the orphaned connection dies (RFC 5482, tcp(7));
        None for the system's own.
    """

    __slots__ = ("user_timeout",)
    __match_args__ = ("user_timeout",)

    user_timeout: SupportsFloat | None

    def __init__(self, user_timeout: SupportsFloat | None = None) -> None:
        self._settle((BACKGROUND, 0, -1, -1, 0, _user_timeout_ms(user_timeout), 0), user_timeout=user_timeout)


class Abort(Policy):
    """Abort: SO_LINGER on with 0 seconds, `close`: RST at once (Go: SetLinger 0; RFC 9293 3.10.5).

    The caller pays nothing. The peer sees RST. Everything the peer has not yet received is lost. Use it on
    purpose: to get rid of a misbehaving peer, or after a read or write time-out or error.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self._settle((ABORT, 0, -1, -1, 1, -1, 0))


class KernelLinger(Policy):
    """The kernel's own wait: SO_LINGER on with n seconds, `close` (Go: SetLinger n > 0; socket(7)).

    The caller is blocked up to n seconds, on a non-blocking socket too, and is not told what came of it. The
    peer sees what it sees with Background: unread input still makes the kernel send RST at once and destroy
    what was queued. Offered for completeness; Flush does what people hope this does.

    seconds: whole seconds from 1 to 32767 (the range that every system's SO_LINGER carries).
    """

    __slots__ = ("seconds",)
    __match_args__ = ("seconds",)

    seconds: int

    def __init__(self, seconds: int) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"seconds is a whole number, such as 3; got {seconds!r}")
        if seconds == 0:
            raise ValueError("SO_LINGER with 0 seconds destroys data and sends RST: if that is meant, use Abort()")
        if not 1 <= seconds <= LONGEST_KERNEL_LINGER or seconds != int(seconds):
            raise ValueError(
                f"seconds is a whole number from 1 to {LONGEST_KERNEL_LINGER} (SO_LINGER knows no fractions); "
                f"got {seconds!r}. Flush(timeout=...) takes fractions"
            )
        self._settle((KERNEL_LINGER, int(seconds), -1, -1, 0, -1, 0), seconds=int(seconds))


class Flush(Policy):
    """Half-close, discard input, and stop as soon as every byte and the FIN are ACKed by the peer's TCP.

    The caller pays one round trip. The peer sees the data and FIN; if it goes on sending after the close it
    sees RST, which a Linux peer survives with every byte readable (another system may lose what its
    application had not read). Nothing is lost once ACKed.

    timeout: seconds for the whole of it; 0 means: do what can be done without waiting.
    max_bytes: the most input that is discarded; None for no limit.
    on_timeout: what to do with the rest at a limit: "background" (plain close, the kernel goes on) or "abort".
    user_timeout: seconds for TCP_USER_TIMEOUT, set before the kernel is left alone with the rest (RFC 5482).
    reset_after_ack: after the last ACK leave no TIME_WAIT behind (TCP_LINGER2 = -1, tcp(7)); no effect when
        the peer's FIN comes before our close: TIME_WAIT has then begun. The sharp tool.
    """

    __slots__ = ("timeout", "max_bytes", "on_timeout", "user_timeout", "reset_after_ack")
    __match_args__ = ("timeout", "max_bytes", "on_timeout", "user_timeout", "reset_after_ack")

    timeout: float
    max_bytes: int | None
    on_timeout: OnTimeout
    user_timeout: SupportsFloat | None
    reset_after_ack: bool

    def __init__(
        self,
        timeout: SupportsFloat = DEFAULT_TIMEOUT,
        *,
        max_bytes: int | None = None,
        on_timeout: OnTimeout = "background",
        user_timeout: SupportsFloat | None = None,
        reset_after_ack: bool = False,
    ) -> None:
        ns = seconds_to_ns("timeout", timeout)
        if not isinstance(reset_after_ack, bool):
            raise TypeError(f"reset_after_ack is True or False; got {reset_after_ack!r}")
        self._settle(
            (
                FLUSH,
                ns,
                -1,
                _byte_limit(max_bytes),
                _aborts(on_timeout),
                _user_timeout_ms(user_timeout),
                int(reset_after_ack),
            ),
            timeout=float(timeout),
            max_bytes=max_bytes,
            on_timeout=on_timeout,
            user_timeout=user_timeout,
            reset_after_ack=reset_after_ack,
        )


class Drain(Policy):
    """Half-close, discard input until the peer has closed *and* no data byte is un-ACKed (RFC 9112 9.6).

    The caller waits until the peer closes, or for a limit. The peer sees the data and FIN, and no RST within
    the limits. Nothing is lost within the limits.

    timeout: seconds for the whole of it; 0 means: do what can be done without waiting.
    idle_timeout: seconds without any input from the peer (nor any byte of ours taken by the kernel, while
        there are some left to send: it may take some without the peer's doing, but once only); None for no idle limit.
    max_bytes: the most input that is discarded; None for no limit. A peer that sends exactly this many and
        closes is within the limit.
    on_timeout: what to do with the rest at a limit: "background" (plain close, the kernel goes on) or "abort".
    user_timeout: seconds for TCP_USER_TIMEOUT, set before the kernel is left alone with the rest (RFC 5482).
    """

    __slots__ = ("timeout", "idle_timeout", "max_bytes", "on_timeout", "user_timeout")
    __match_args__ = ("timeout", "idle_timeout", "max_bytes", "on_timeout", "user_timeout")

    timeout: float
    idle_timeout: SupportsFloat | None
    max_bytes: int | None
    on_timeout: OnTimeout
    user_timeout: SupportsFloat | None

    def __init__(
        self,
        timeout: SupportsFloat = DEFAULT_TIMEOUT,
        *,
        idle_timeout: SupportsFloat | None = None,
        max_bytes: int | None = None,
        on_timeout: OnTimeout = "background",
        user_timeout: SupportsFloat | None = None,
    ) -> None:
        ns = seconds_to_ns("timeout", timeout)
        self._settle(
            (
                DRAIN,
                ns,
                _idle_ns(idle_timeout),
                _byte_limit(max_bytes),
                _aborts(on_timeout),
                _user_timeout_ms(user_timeout),
                0,
            ),
            timeout=float(timeout),
            idle_timeout=idle_timeout,
            max_bytes=max_bytes,
            on_timeout=on_timeout,
            user_timeout=user_timeout,
        )


def policy_from_linger(seconds: int) -> Background | Abort | KernelLinger:
    """The policy that Go's SetLinger(seconds) asks for: < 0 Background(), 0 Abort(), > 0 KernelLinger(seconds).

    Raises TypeError when `seconds` is no integer, ValueError beyond 32767.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int):
        raise TypeError(f"seconds is a whole number: below 0 off, 0 reset, above 0 seconds; got {seconds!r}")
    if seconds < 0:
        return Background()
    return Abort() if seconds == 0 else KernelLinger(seconds)


def left_of(policy: Policy, elapsed_ns: int, drained: int) -> Policy:
    """The same Flush or Drain after `elapsed_ns` nanoseconds (-1: its time is up) and `drained` bytes of input."""
    arguments = policy._arguments()
    _, timeout, _, max_bytes, *_ = policy._terms
    arguments["timeout"] = 0.0 if elapsed_ns < 0 else max(0, timeout - elapsed_ns) / 1e9
    if max_bytes >= 0:
        arguments["max_bytes"] = max(0, max_bytes - drained)
    return type(policy)(**arguments)
