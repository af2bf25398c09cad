"""A user's program that uses every public name. It is not run: a test has mypy --strict read it.

An ignored error that mypy does not find is an error too (--warn-unused-ignores): those lines show what the types
must refuse.
"""

from __future__ import annotations

import http.server
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import Future

from prometheus_client import CollectorRegistry

import lingerx
import lingerx.prometheus
import lingerx.socketserver


def choose(policies: Iterable[lingerx.Policy]) -> lingerx.Policy:
    for policy in policies:
        match policy:
            case lingerx.Drain(timeout=timeout, idle_timeout=None) if timeout > 1:
                return policy
            case lingerx.Flush(reset_after_ack=True) | lingerx.KernelLinger():
                return lingerx.Abort()
    return lingerx.Background(user_timeout=30)


def every_policy() -> list[lingerx.Policy]:
    known: lingerx.Background | lingerx.Abort | lingerx.KernelLinger = lingerx.policy_from_linger(3)
    return [
        known,
        lingerx.Background(),
        lingerx.Abort(),
        lingerx.KernelLinger(3),
        lingerx.Flush(1.0, max_bytes=65536, on_timeout="abort", user_timeout=20.0, reset_after_ack=True),
        lingerx.Drain(10, idle_timeout=5, max_bytes=None, on_timeout="background", user_timeout=None),
    ]


def read(report: lingerx.Report) -> str:
    outcome: lingerx.Outcome = report.outcome
    drained: int = report.drained
    unacked: int | None = report.unacked
    elapsed: float = report.elapsed
    error: int | None = report.error
    delivered: bool | None = report.delivered
    if outcome is lingerx.Outcome.PEER_CLOSED and delivered:
        return f"{drained} bytes in {elapsed:.3f} s"
    match report:
        case lingerx.Report(lingerx.Outcome.TIMED_OUT, _, int(missing)):
            return f"{missing} bytes missing"
    return f"{outcome.name}: {unacked} {error} {len(report)} {list(report)}"


def close_them(sock: socket.socket, tls: ssl.SSLSocket, policy: lingerx.Policy) -> list[lingerx.Report]:
    one: lingerx.Report = lingerx.close(sock)
    reports: list[lingerx.Report] = [
        one,
        lingerx.close(tls, policy),
        lingerx.close(sock, policy=None),
        lingerx.abort(sock),
        lingerx.close_fd(sock.detach(), policy),
        lingerx.send_and_close(sock, b"bye", policy),
        lingerx.send_and_close(sock, bytearray(3)),
        lingerx.send_and_close(tls, memoryview(b"bye"), policy=policy),
    ]
    reports += lingerx.close_all([sock, tls], policy, timeout=15.0)
    reports += lingerx.close_all(iter((sock,)), timeout=None, spread=1)
    return reports


def leave(sock: socket.socket) -> lingerx.Report | None:
    with lingerx.closing(sock, lingerx.Drain(), on_error=lingerx.Abort()) as same:
        still: socket.socket = same
        still.sendall(b"answer")
    block = lingerx.closing(sock)
    with block:
        pass
    return block.report


def ask(sock: socket.socket) -> lingerx.TcpStatus:
    lingerx.set_linger(sock, -1)
    seconds: int = lingerx.get_linger(sock)
    status: lingerx.TcpStatus = lingerx.tcp_status(sock)
    state: str | None = status.state
    counts: tuple[int | None, int | None, int | None] = (status.unsent, status.unacked, status.unread)
    name: str = lingerx.engine
    print(seconds, state, counts, name)
    return status


def in_the_background(sock: socket.socket, tls: ssl.SSLSocket, policy: lingerx.Policy) -> lingerx.Stats:
    options = lingerx.Closer(
        policy, max_pending=1000, on_full="shed_oldest", max_buffered=0, collect=0.001, exit_timeout=1, name="mine"
    )
    options.shutdown(timeout=0)
    with lingerx.Closer() as closer:
        closer.close(sock)
        closer.close(tls, policy)
        closer.close_all({sock, tls}, policy=lingerx.Flush())
        whole: bool = closer.send_and_close(sock, bytearray(b"bye"), policy)
        future: Future[lingerx.Report] = closer.submit(sock)
        print(whole, read(future.result(timeout=3.0)), read(closer.submit(sock, policy, data=b"bye").result()))
        pending: int = closer.pending
        same: lingerx.Policy = closer.policy
        idle: bool = closer.join() or closer.join(timeout=1.5)
        print(pending, same, idle)
    return closer.shutdown()


class Server(lingerx.socketserver.LingeringMixIn, http.server.ThreadingHTTPServer):
    policy = lingerx.Drain(timeout=10.0)
    closer = None
    wait = False


class Patient(lingerx.LingerSSLSocket):
    policy = lingerx.Drain(timeout=60.0)


def listen(context: ssl.SSLContext, closer: lingerx.Closer) -> lingerx.LingerSocket:
    context.sslsocket_class = lingerx.LingerSSLSocket
    context.sslsocket_class = Patient
    with lingerx.create_server(("", 8000), policy=lingerx.Flush(), closer=closer, backlog=5) as listener:
        conn, _ = listener.accept()
        conn.policy = lingerx.Abort()
        same: lingerx.LingerSocket = conn.dup()
        same.close()
    plain: socket.socket = lingerx.wrap_listener(
        socket.create_server(("", 0)), policy=lingerx.KernelLinger(3), wait=True
    )
    plain.close()
    server = Server(("", 8000), http.server.SimpleHTTPRequestHandler)
    server.socket = lingerx.wrap_listener(server.socket)
    return conn


def count(stats: lingerx.Stats) -> float:
    sockets: int = stats.handed_over + stats.pending
    amount: int = stats.buffered + stats.drained
    timed_out: int = stats.outcomes[lingerx.Outcome.TIMED_OUT]
    slow: int = sum(times for bound, times in stats.linger_times.items() if bound > 1.0)
    print(sockets, amount, timed_out, slow)
    return stats.total_linger_time


def expose() -> str | None:
    closer: lingerx.Closer = lingerx.default_closer()
    collector: lingerx.prometheus.CloserCollector = lingerx.prometheus.register(closer)
    collector.add(lingerx.Closer(), "other")
    collector.remove("other")
    registry = CollectorRegistry()
    registry.register(lingerx.prometheus.CloserCollector(closer, name="mine"))
    lingerx.prometheus.register(closer, "other", registry)
    return next((metric.name for metric in collector.collect()), None)


def refused(sock: socket.socket, report: lingerx.Report) -> None:
    lingerx.close(sock.fileno())  # type: ignore[arg-type]
    lingerx.close(sock, 3.0)  # type: ignore[arg-type]
    lingerx.close(sock, lingerx.Drain)  # type: ignore[arg-type]
    lingerx.close_fd(sock)  # type: ignore[arg-type]
    lingerx.send_and_close(sock, "text")  # type: ignore[arg-type]
    lingerx.close_all(sock)  # type: ignore[arg-type]
    lingerx.Drain(on_timeout="linger")  # type: ignore[arg-type]
    lingerx.Drain("3")  # type: ignore[arg-type]
    lingerx.Flush(max_bytes=1.5)  # type: ignore[arg-type]
    lingerx.KernelLinger(1.5)  # type: ignore[arg-type]
    lingerx.set_linger(sock, None)  # type: ignore[arg-type]
    lingerx.default_closer().close(sock.fileno())  # type: ignore[arg-type]
    lingerx.default_closer().send_and_close(sock, None)  # type: ignore[arg-type]
    lingerx.default_closer().pending = 3  # type: ignore[misc]
    lingerx.create_server(("", 0), policy=3.0)  # type: ignore[arg-type]
    lingerx.wrap_listener(sock.fileno())  # type: ignore[arg-type]
    print(lingerx.LingerTLSSocket)  # type: ignore[attr-defined]
    report.drained = 3  # type: ignore[misc]
