"""`LingerSocket`: a socket object whose close() lingers. It overrides what it must, and makes no system call.

A file of its own, for its TLS twin stands on it and is imported only by those who use TLS.
"""

from __future__ import annotations

import socket

from ._terms import Terms, came_of_a_fork_since, has_forked_since, last_fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Self

__all__ = ["LingerSocket"]


class LingerSocket(Terms, socket.socket):
    """A socket whose close() lingers: what a listener of `create_server` or `wrap_listener` accepts.

    policy, closer, wait: attributes, as in `create_server`. They may be set on one socket, up to its close, or by a
        subclass for all of its sockets. (One without them: the default closer, by its own policy.)

    close() returns at once, the fd is no longer the object's, and nothing is raised for what the network does. As
    ever it waits for the objects of makefile() to be closed. Where nobody can linger it is a plain close: the closer
    was shut down or cannot start, the interpreter has exited, the socket listens or is no stream. What is not
    connected is closed at once; so is what was shut down by SHUT_RDWR, which leaves nothing to drain.

    Whoever has a copy must not see its connection half-closed. After dup() every close but the last is a plain one; a
    copy that was detached or never closed counts as open. After os.fork() the parent's close is a plain one, and the
    child's lingers in the calling thread, by `policy` or Drain(timeout=3.0): such children leave by os._exit, which
    waits for no closer. detach() hands over the fd and nothing else; a socket that is collected unclosed gives a
    ResourceWarning and is closed plainly, as ever; pickling raises TypeError, as ever.

    Sources: RFC 9293 3.6; dup(2), fork(2), close(2).
    """

    _born: int
    _copies: list[None] | None = None  # one item for each that is open, shared by all

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        # Not __init__, which an SSLSocket never calls.
        self = super().__new__(cls)
        self._born = last_fork()
        return self

    def dup(self) -> Self:
        """As socket.dup, with the same terms. Of all copies the one that is closed last lingers."""
        other = super().dup()
        other._take_terms_of(self)
        other._born = self._born
        if self._copies is None:
            self._copies = [None]
        self._copies.append(None)
        other._copies = self._copies
        return other

    def _real_close(self) -> None:
        # What socket.close calls when no makefile() object is open any more; ssl.SSLSocket overrides it too.
        try:
            if self.fileno() >= 0 and self._was_the_last_copy():
                self._linger(self, came_of_a_fork_since(self._born))
        finally:
            super()._real_close()  # type: ignore[misc]  # does nothing when the fd is gone

    def _was_the_last_copy(self) -> bool:
        if self._copies:
            self._copies.pop()
        return not self._copies and not has_forked_since(self._born)
