"""Connections over loopback in the state in which a benchmark closes them. Nothing is measured here."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

CASES = ("abort", "background", "graceful")
"""What is closed, and how: see README.md."""

SILENT = "silent"
"""No way to close: the peers do nothing. For what is handed to a closer."""

SPARE_FDS = 64


def make_room(sockets: int) -> None:
    """Let this process have so many sockets at once; raises OSError or ValueError when the system says no.

    Beyond the hard limit only with CAP_SYS_RESOURCE.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sockets + SPARE_FDS
    if resource.RLIM_INFINITY != soft < wanted:
        enough = hard == resource.RLIM_INFINITY or hard >= wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard if enough else wanted))


@contextmanager
def connected(count: int, case: str, *, unix: bool = False) -> Iterator[list[socket.socket]]:
    """`count` connected sockets whose caller closes them; their peers are closed at the end, "graceful" ones before.

    What is still in the list at the end is closed too. unix: socketpairs in place of TCP. A fresh listener each time:
    its port keeps the connections that are in TIME-WAIT out of the way.
    """
    make_room(2 * count)
    ours, peers = [], []
    if unix:
        pairs = [socket.socketpair() for _ in range(count)]
        ours, peers = [one for one, _ in pairs], [other for _, other in pairs]
        count = 0
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        address = listener.getsockname()
        for _ in range(count):
            ours.append(socket.create_connection(address))
            peer, _ = listener.accept()
            peers.append(peer)
    if case == "graceful":
        for peer in peers:
            peer.close()
        for sock in ours:
            # On loopback the FIN is there when close returns; where it is not, wait for it.
            assert not sock.recv(1, socket.MSG_PEEK)
    try:
        yield ours
    finally:
        for sock in (*ours, *peers):
            sock.close()
