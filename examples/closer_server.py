"""A server with one thread that refuses uploads: every client gets the whole refusal, and the thread waits for none.

    python examples/closer_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. After `sock.close()` the
kernel would reset the connection, and the client would hardly ever see why. The closer half-closes, discards what
comes, and closes when the client has done so; this thread goes on at once. SIGTERM ends it: no new connections, one
more second for those in flight.
"""

from __future__ import annotations

import selectors
import signal
import socket
import sys
from contextlib import suppress

from lingerx import Closer, Drain

LONGEST_HEAD = 16384
PAGE = b"Nothing can be uploaded here.\n" * 100_000  # more than the kernel takes at once: the rest goes out later
HEAD = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
ANSWER = HEAD % len(PAGE) + PAGE


class Server:
    def __init__(self, listener: socket.socket, closer: Closer) -> None:
        self.listener = listener
        self.closer = closer
        self.heads: dict[socket.socket, bytes] = {}  # (A real server gives up on clients that never send one.)

    def serve(self, stop: socket.socket) -> None:
        """Until there is something to read from `stop`."""
        with selectors.DefaultSelector() as self.selector:
            self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
            self.selector.register(stop, selectors.EVENT_READ, None)
            while True:
                for key, _ in self.selector.select():
                    if key.data is None:
                        return self.closer.close_all(self.heads)
                    key.data(key.fileobj)

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # gone already; or no fd left: a real server stops listening for a moment then
            client, _ = listener.accept()
            client.setblocking(False)
            self.heads[client] = b""
            self.selector.register(client, selectors.EVENT_READ, self.read)

    def read(self, client: socket.socket) -> None:
        try:
            data = client.recv(4096)
        except OSError:
            data = b""
        self.heads[client] += data
        if data and b"\r\n\r\n" not in self.heads[client] and len(self.heads[client]) < LONGEST_HEAD:
            return
        # Out of the selector first: after the hand-over the fd is the closer's, and soon somebody else's.
        self.selector.unregister(client)
        del self.heads[client]
        if data:
            self.closer.send_and_close(client, ANSWER)
        else:
            self.closer.close(client)


def main(port: int) -> None:
    stop, stopper = socket.socketpair()
    signal.signal(signal.SIGTERM, lambda *_: stopper.send(b"!"))
    listener = socket.create_server(("127.0.0.1", port))
    listener.setblocking(False)
    closer = Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0)
    with stop, stopper, closer, listener:  # left in reverse: the listener, then the closer, in its exit_timeout
        print("port", listener.getsockname()[1], flush=True)
        Server(listener, closer).serve(stop)
    print("closed", closer.stats().handed_over, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
