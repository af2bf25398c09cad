"""The checks of arguments and the sentences they fail with, shared by both engines and all that stands on them.

Only questions are asked here: nothing in this file closes, changes or keeps a socket. Every sentence says what
to pass instead. A socket object that is closed already is no mistake; the engines report it as ALREADY_CLOSED.
"""

from __future__ import annotations

import errno
import os
import socket

from ._ownership import attach, blank
from ._sockopt import NO_SOCKET
from .policy import LONGEST_KERNEL_LINGER, Drain, Flush, KernelLinger, Policy, seconds_to_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from typing_extensions import Buffer

__all__ = [
    "check_data",
    "check_fd",
    "check_linger",
    "check_many",
    "check_open",
    "check_policy",
    "check_socket",
    "check_spread",
    "check_timeout",
    "check_unique",
]

# stdin, stdout, stderr: whoever passes one of them has mixed up numbers.
STANDARD_FDS = 3
# An int in C. CPython keeps only the last bits of a larger one, and would take somebody else's socket.
LARGEST_FD = 2**31 - 1


def check_socket(sock: object) -> int:
    """The fd of a stream socket that may be closed, or -1 when the object is closed already. Borrows.

    Raises TypeError for what is no `socket.socket` and for other types than SOCK_STREAM, ValueError for fd 0 to
    2 and for a listening socket.
    """
    if not isinstance(sock, socket.socket):
        _refuse(sock)
    if sock.type != socket.SOCK_STREAM:
        raise TypeError(
            "lingering is for connected stream sockets (SOCK_STREAM), where there is a FIN to wait for; "
            f"close this one with its own close(): {sock!r}"
        )
    fd = sock.fileno()
    if fd < 0:
        return -1
    if fd < STANDARD_FDS:
        raise ValueError(f"fd {fd} is a standard stream; pass sock.dup() if it really is the connection to close")
    _check_not_listening(sock)
    return fd


def check_count(name: str, value: object, least: int = 1) -> int:
    """A whole number of `least` or more. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number; got {value!r}")
    if not least <= value < 2**31:
        raise ValueError(f"{name} is a whole number from {least} to 2147483647; got {value!r}")
    return value


def check_many(socks: object) -> list[Any]:
    """A list of what an iterable of sockets holds. Raises TypeError when it is none."""
    try:
        return list(socks)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise TypeError(f"socks is an iterable of sockets, such as [sock]; got {socks!r}") from None


def check_unique(fd: int, seen: set[int]) -> int:
    """`fd`, which goes into `seen`. Raises ValueError when it is there already: two objects would close it twice."""
    if fd >= 0 and fd in seen:
        raise ValueError(f"two socket objects hold fd {fd}, which can be closed only once; detach() one of them")
    seen.add(fd)
    return fd


def check_fd(fd: object) -> int:
    """The number of an open, connected stream socket. Borrows.

    Raises TypeError for anything but an int and for other types than SOCK_STREAM, ValueError for a negative
    number, for 0 to 2, for a number that is no open socket, and for a listening socket.
    """
    if type(fd) is not int:  # a bool is an int, and so is a signal number
        instead = "; pass a socket object to close()" if isinstance(fd, socket.socket) else ""
        raise TypeError(f"fd is an int, such as sock.detach() returns{instead}; got {fd!r}")
    if fd < 0:
        raise ValueError(f"fd is the number of an open socket, 3 or more; got {fd}")
    if fd < STANDARD_FDS:
        raise ValueError(f"fd {fd} is a standard stream; pass os.dup({fd}) if it really is the connection to close")
    view = blank()
    try:
        if fd > LARGEST_FD:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        attach(view, fd)
        if view.type != socket.SOCK_STREAM:
            raise TypeError(f"fd {fd} is no stream socket (SOCK_STREAM); close it with os.close({fd})")
        _check_not_listening(view)
    except OSError as error:
        if error.errno not in NO_SOCKET:
            raise
        raise ValueError(
            f"fd {fd} is no open socket ({error.strerror}), nothing was closed; pass what sock.detach() returned, "
            "once and before anybody else closes it"
        ) from None
    finally:
        view.detach()
    return fd


def check_open(sock: object) -> socket.socket:
    """A socket object that is only asked or set, listening or not. Borrows.

    Raises TypeError for what is no `socket.socket`, OSError (EBADF) for one that is closed.
    """
    if not isinstance(sock, socket.socket):
        _refuse(sock)
    if sock.fileno() < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return sock


def check_policy(policy: object, *, deadline: bool = False, blocking: bool = True) -> Policy:
    """`policy` itself, when it is one.

    deadline: only policies with a deadline will do (Flush, Drain): the rest of the data is still to be sent.
    blocking: False where nobody may be blocked: KernelLinger is then refused.

    Raises TypeError for what is no policy, ValueError for a policy that cannot be used here.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is one of Drain(), Flush(), Background(), Abort(), KernelLinger(3); {_hint(policy)}")
    name = type(policy).__name__
    if deadline and not isinstance(policy, (Flush, Drain)):
        raise ValueError(
            f"the rest of the data can only be sent within a deadline, and {name} has none: pass Drain(...) or "
            "Flush(...), or call sock.sendall(data) before closing"
        )
    if not blocking and isinstance(policy, KernelLinger):
        raise ValueError(
            f"{policy!r} would block for seconds where nobody may be blocked: pass Flush(...) or Drain(...)"
        )
    return policy


def check_linger(seconds: object) -> int:
    """The argument of set_linger: below 0 off, 0 reset, above 0 whole seconds up to 32767.

    Raises TypeError when it is no int, ValueError when it is out of range.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int):
        raise TypeError(f"seconds is a whole number: below 0 off, 0 reset, above 0 seconds; got {seconds!r}")
    if seconds > LONGEST_KERNEL_LINGER:
        raise ValueError(f"SO_LINGER carries at most {LONGEST_KERNEL_LINGER} seconds on every system; got {seconds}")
    return max(int(seconds), -1)


def check_data(data: Buffer) -> memoryview:
    """`data` as a flat view of its bytes, whatever its item type and shape. Nothing is copied where that can be.

    Raises TypeError for what is not bytes-like, ValueError when its memory is not contiguous.
    """
    try:
        view = memoryview(data)
    except TypeError:
        instead = "; encode it first: data.encode()" if isinstance(data, str) else ", such as bytes or bytearray"
        raise TypeError(f"data is a bytes-like object{instead}; got {type(data).__name__}") from None
    if not view.c_contiguous:
        raise ValueError("data does not lie in one piece in memory (C-contiguous); pass bytes(data)")
    try:
        return view.cast("B")
    except (TypeError, ValueError):
        # Structured items, and shapes that have a 0 in them: nothing that cast() takes.
        return memoryview(view.tobytes())


def check_timeout(name: str, value: object) -> int:
    """Nanoseconds for a number of seconds, or -1 for None: no limit of its own.

    Raises TypeError when it is no number, ValueError when it is negative, NaN or endless.
    """
    if value is None:
        return -1
    return _ns(name, value, ", or None for no further limit")


def check_spread(value: object) -> int:
    """Nanoseconds over which close_all spreads its starts; 0 for all at once. Raises as `check_timeout` does."""
    return _ns("spread", value, ", or 0.0 to start all at once")


def _check_not_listening(sock: socket.socket) -> None:
    try:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        return  # no socket any more, which the engine reports; or a system that can't tell
    if listening:
        raise ValueError(
            "this socket is listening, there is no connection to close: pass what accept() returned, and close the "
            f"listener with its own close(): {sock!r}"
        )


def _refuse(sock: object) -> NoReturn:
    if isinstance(sock, int) and not isinstance(sock, bool):
        hint = "a bare fd only goes through close_fd"
    elif isinstance(sock, type):
        hint = "pass an instance"
    elif hasattr(sock, "get_extra_info"):
        hint = "an asyncio transport or writer owns its socket, and goes through lingerx.asyncio"
    elif hasattr(sock, "fileno"):
        hint = "pass the socket itself, not what is wrapped around it"
    else:
        hint = "pass what socket.create_connection() or accept() returned"
    raise TypeError(f"sock is a socket.socket object; {hint}; got {sock!r}")


def _hint(policy: object) -> str:
    if isinstance(policy, type) and issubclass(policy, Policy):
        if policy is Policy:
            return "Policy is only their base"
        example = "3" if policy is KernelLinger else ""
        return f"write {policy.__name__}({example}) instead of {policy.__name__}"
    if isinstance(policy, (int, float)) and not isinstance(policy, bool):
        return f"write Drain(timeout={policy!r}) instead of {policy!r}"
    return f"got {policy!r}"


def _ns(name: str, value: Any, instead: str) -> int:
    return seconds_to_ns(name, value, instead)
