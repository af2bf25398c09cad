"""What is compared: lingerx's calls and the lines that Python programs write instead. Nothing is measured here."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import lingerx

BACKGROUND, DRAIN = lingerx.Background(), lingerx.Drain()
LINGER_RESET = struct.pack("ii", 1, 0)


# Each closes all of a list: the loop and what stands in it are what a program would write.


def _lingerx_abort(socks: list[socket.socket]) -> None:
    for sock in socks:
        lingerx.abort(sock)


def _lingerx_background(socks: list[socket.socket]) -> None:
    for sock in socks:
        lingerx.close(sock, BACKGROUND)


def _lingerx_graceful(socks: list[socket.socket]) -> None:
    for sock in socks:
        lingerx.close(sock, DRAIN)


def _idiom_abort(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        sock.close()


def _idiom_background(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def _idiom_graceful(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
        sock.close()


def nothing(socks: list[socket.socket]) -> None:
    """The loop alone."""
    for _sock in socks:
        pass


WAYS: dict[str, dict[str, Callable[[list[socket.socket]], None]]] = {
    "lingerx": {"abort": _lingerx_abort, "background": _lingerx_background, "graceful": _lingerx_graceful},
    "python": {"abort": _idiom_abort, "background": _idiom_background, "graceful": _idiom_graceful},
}
