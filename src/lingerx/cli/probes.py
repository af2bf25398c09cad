"""The facts that `lingerx doctor` tries, each by one function, on loopback connections of its Lab.

A probe says what it saw, and never waits longer than its Lab does. Where systems differ it accepts both and says
which one this is: only what lingerx relies on is "broken". Running and printing are done elsewhere.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import select
import socket
import struct
import threading
import time
from contextlib import ExitStack

import lingerx
from lingerx import Drain

from .. import _sockopt
from . import upload
from .facts import AGAIN, DEADLINE, NOTHING_TO_DO, Finding, Lab, Probe, broken, note, ok
from .tally import find_failures

__all__ = ["LOOPBACK", "PROBES"]

ANOTHER_KERNEL = (
    "Do not trust lingerx on this machine: run on another kernel, or outside of what sandboxes this one, and report it "
    "with what `lingerx doctor --json` prints."
)
NO_TRUTH = "Nothing is lost by it, but reports can't tell what arrived: `delivered` and `unacked` are None."
LOOKS_AGAIN = "Nothing is lost: lingerx looks again from time to time. Flush and Drain may take 0.5 to 8 s longer."

NATIVE = lingerx.engine == "native"
FDS_FOR_AN_UPLOAD = 16  # more than it needs
LOOK = 0.1  # seconds to see that a call waits; one that does not needs microseconds
SETTLED = 1.0  # seconds; the peer's last ACK may be 40 ms late (RFC 1122 4.2.3.2), and a machine may be busy
PIECE = 4096  # bytes per read of a slow peer: more than a hundred reads for what `fill` queues
MANY = 100  # wake-ups; a few are right
USER_TIMEOUT_WAIT = 2.0  # seconds; half a one is usual
USER_TIMEOUT = 50  # ms, looked at when a window probe is due, which is 200 ms and more after the window has closed


def _engine(lab: Lab) -> Finding:
    forced = os.environ.get("LINGERX_ENGINE")
    installed = importlib.util.find_spec("._native", "lingerx") is not None
    if NATIVE:
        return ok("native: forced by LINGERX_ENGINE." if forced else "native: installed, and no other was asked for.")
    if installed:
        return note("portable: forced by LINGERX_ENGINE.", "Unset LINGERX_ENGINE: the native engine is installed.")
    return note(
        "portable: the native engine is not installed." + (" (LINGERX_ENGINE asks for this one.)" if forced else ""),
        "Install lingerx where a C compiler is, without LINGERX_BUILD=portable; on Windows and PyPy this is all.",
    )


def _loopback(lab: Lab) -> Finding:
    try:
        lab.pair()
    except OSError as error:
        return broken(
            f"127.0.0.1 can't be reached: {error.strerror or error}. Nothing else was tried.",
            "Bring the loopback interface up (ip link set lo up), or ask whoever made this network without it.",
        )
    return ok("127.0.0.1 can be reached.")


# What lingerx does, from end to end -----------------------------------------------------------------------


def _refused_by_close(lab: Lab) -> Finding:
    return _refused_upload(upload.WAYS[-1], lab)


def _refused_by_closer(lab: Lab) -> Finding:
    with lingerx.Closer(Drain(timeout=lab.left())) as closer:

        def close(sock: socket.socket, rest: memoryview | None = None) -> lingerx.Report:
            return closer.submit(sock, data=rest).result(DEADLINE)

        return _refused_upload(upload.Way("Closer()", close, close, lossless=True, gentle=True), lab)


def _refused_upload(way: upload.Way, lab: Lab) -> Finding:
    """The demo's experiment, once: the client has everything and no error, and the report says no more than that."""
    with ExitStack() as stack:
        for _ in range(FDS_FOR_AN_UPLOAD):
            stack.enter_context(socket.socket())  # without them the experiment would fail, and lingerx be blamed
    settings = upload.Settings(uploads=1, timeout=max(0.1, lab.left() - 0.5))
    (row,) = upload.run(settings, lambda name: None, (way,))
    failures = find_failures([row])
    if failures:
        # An error of this process, or a machine that is too busy, does not speak against the kernel.
        elsewhere = any(one.trouble for one in row.served) or row.cells[0].count("timed_out")
        return broken(" ".join(failures), AGAIN if elsewhere else ANOTHER_KERNEL)
    (served,) = row.served
    numbers = {"received": row.cells[0].seen[0].received}
    found = f"the client has it all, and no error; {served.outcome}, delivered: {served.delivered}."
    if served.delivered is None:
        return note(found, NO_TRUTH, **numbers)
    return ok(found, **numbers)


def _lost_answer(lab: Lab) -> Finding:
    """A peer that resets the connection: whatever the report says, it must not say that all arrived."""
    ours, peer = lab.pair()
    sent = lab.fill(ours)
    lingerx.set_linger(peer, 0)
    peer.close()
    report = lingerx.close(ours, Drain(timeout=lab.left() / 2))
    if report.delivered:
        return broken(f"a report lied: {report.outcome.name}, delivered: True, of a lost answer.", ANOTHER_KERNEL)
    return ok(
        f"the report says so: {report.outcome.name}, delivered: {report.delivered}.",
        sent=sent,
        unacked=report.unacked,
    )


# What the kernel does at the end of a connection ----------------------------------------------------------


def _half_close(lab: Lab) -> Finding:
    ours, peer = lab.pair()
    sent = lab.fill(ours)
    ours.shutdown(socket.SHUT_WR)
    peer.sendall(b"later")
    received, error = lab.read_to_end(peer)
    if error or received != sent:
        said = f"{received} of {sent} bytes arrived, then {error or 'EOF'}, when the peer sent on after our half-close."
        return broken(said, ANOTHER_KERNEL)
    if ours.recv(100) != b"later":
        return broken("what the peer sends after our half-close does not arrive.", ANOTHER_KERNEL)
    peer.shutdown(socket.SHUT_WR)
    if ours.recv(100) != b"":
        return broken("data came from nowhere after the peer's FIN.", ANOTHER_KERNEL)
    return ok("the peer reads to the end, may send on, and closes in its turn.", sent=sent)


def _unread_input(lab: Lab) -> Finding:
    ours, peer = lab.pair()
    peer.sendall(b"x")
    ours.recv(1, socket.MSG_PEEK)  # it is there, and stays unread
    sent = lab.fill(ours)
    ours.close()
    received, error = lab.read_to_end(peer)
    numbers = {"sent": sent, "received": received}
    if error:
        lost = sent - received
        return ok(f"{error} at the peer, {lost // 1024} of {sent // 1024} KiB lost: what lingerx is for.", **numbers)
    found = f"the peer got {received} of {sent} bytes and no error: this kernel is kinder than most."
    return note(found, NOTHING_TO_DO, **numbers)


def _linger_option(lab: Lab) -> Finding:
    ours, peer = lab.pair()
    sent = lab.fill(ours)
    lingerx.set_linger(ours, max(1, int(DEADLINE)))
    ours.setblocking(False)
    closing = threading.Thread(target=ours.close, name="doctor-close", daemon=True)
    closing.start()
    closing.join(LOOK)
    waits = closing.is_alive()
    received, error = lab.read_to_end(peer)
    closing.join(lab.left())
    if closing.is_alive() or error or received != sent:
        over = "did not end" if closing.is_alive() else "ended"
        said = f"close() {over}; the peer got {received} of {sent} bytes{error and ', then ' + error}."
        return note(said, "Do not use KernelLinger, nor set_linger, on this machine: Flush and Drain do not use it.")
    if not waits:
        return note("close() returns at once: KernelLinger does not wait on this kernel.", "Use Flush, which does.")
    return ok("close() waits all the same: keep KernelLinger off event loops.")


def _discard(lab: Lab) -> Finding:
    ours, peer = lab.pair()
    peer.sendall(b"0123456789")  # one segment
    untouched = bytearray(b"?" * 7)
    taken = ours.recv_into(untouched, 7, socket.MSG_TRUNC)
    rest = ours.recv(100)
    if taken != 7 or rest != b"789":
        tell = broken if NATIVE else note  # the other engine reads input into a buffer
        said = f"asked to discard 7 of 10 bytes, recv said {taken} and left {rest!r} (MSG_TRUNC)."
        return tell(said, "Set LINGERX_ENGINE=portable, which reads input into a buffer; and report this.")
    if untouched != b"?" * 7:
        return note("input is copied before it is thrown away (MSG_TRUNC does nothing).", "Nothing: it costs CPU time.")
    return ok("input is thrown away in the kernel, without a copy (MSG_TRUNC).")


def _fin_on_last_segment(lab: Lab) -> Finding:
    more, plain = (_segments(lab, flags) for flags in (socket.MSG_MORE, 0))
    numbers = {"segments_with_msg_more": more, "segments_without": plain}
    if more == 1 < plain:  # a segment may have been sent again
        return ok("data and FIN in one segment instead of two (MSG_MORE).", **numbers)
    found = f"{more} segments with MSG_MORE, {plain} without; 1 and 2 were expected."
    return note(found, "Nothing is lost: send_and_close may cost one segment more.", **numbers)


def _segments(lab: Lab, flags: int) -> int:
    ours, peer = lab.pair()
    before = _segments_in(peer)
    ours.send(b"answer", flags)
    ours.shutdown(socket.SHUT_WR)
    lab.read_to_end(peer)
    return _segments_in(peer) - before


def _segments_in(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _sockopt.SEGS_IN + 4)
    return int(struct.unpack_from("I", info, _sockopt.SEGS_IN)[0])


# What the kernel tells ------------------------------------------------------------------------------------


def _unacked(lab: Lab) -> Finding:
    """SIOCOUTQ: what we sent less what it counts is what the peer's kernel has. Our FIN counts as one byte."""
    ours, peer = lab.pair()
    sent = lab.fill(ours)
    if _queue(ours) < 0:
        return note("the kernel does not tell (SIOCOUTQ).", NO_TRUTH)

    def adds_up(fin: int) -> bool:
        return lab.wait_until(lambda: sent + fin - _queue(ours) == _arrived(peer), SETTLED)

    before = adds_up(0)
    unacked = _queue(ours)
    ours.shutdown(socket.SHUT_WR)
    if not before or not adds_up(1):
        said = f"of {sent} bytes and a FIN the peer has {_arrived(peer)}, and {_queue(ours)} are called un-ACKed."
        return broken(said, ANOTHER_KERNEL)
    lab.read_to_end(peer)
    if not lab.wait_until(lambda: _queue(ours) == 0, SETTLED):
        return broken(f"the peer has read all, and {_queue(ours)} bytes are called un-ACKed.", ANOTHER_KERNEL)
    return ok("counted to the byte, down to 0, our FIN as one more (SIOCOUTQ).", sent=sent, unacked=unacked)


def _queue(sock: socket.socket) -> int:
    return _sockopt.send_queue(sock, 0)  # as the engines ask; on Linux the kernel counts the FIN itself


def _arrived(peer: socket.socket) -> int:
    return len(peer.recv(1 << 20, socket.MSG_PEEK))


def _unread(lab: Lab) -> Finding:
    ours, peer = lab.pair()
    counts = [lingerx.tcp_status(ours).unread]
    peer.sendall(b"0123456789")
    ours.recv(1, socket.MSG_PEEK)
    counts.append(lingerx.tcp_status(ours).unread)
    ours.recv(100)
    counts.append(lingerx.tcp_status(ours).unread)
    if counts == [0, 10, 0]:
        return ok("counted to the byte (SIOCINQ).")
    return note(f"0, 10 and 0 bytes were there, the kernel says {counts}.", "Do not use `unread` of tcp_status().")


def _state(lab: Lab) -> Finding:
    """TCP_INFO: the states that decide, and that a connection which has heard something does not look like none."""
    ours, peer = lab.pair()
    seen = [lingerx.tcp_status(ours).state]
    if seen == [None]:
        return note("the kernel does not tell (TCP_INFO).", NO_TRUTH)
    deaf = _sockopt.never_heard(peer)
    ours.shutdown(socket.SHUT_WR)
    lab.read_to_end(peer)
    lab.wait_until(lambda: lingerx.tcp_status(ours).state == "FIN-WAIT-2", SETTLED)
    seen += [lingerx.tcp_status(sock).state for sock in (ours, peer)]
    if seen != ["ESTABLISHED", "FIN-WAIT-2", "CLOSE-WAIT"]:
        return broken(f"ESTABLISHED, FIN-WAIT-2, CLOSE-WAIT were expected; TCP_INFO says {seen}.", ANOTHER_KERNEL)
    if deaf:
        found = "states are told, but segments are not counted (tcpi_segs_in)."
        return note(found, "Nothing is lost: PEER_RESET may be called NOT_CONNECTED, without `delivered`.")
    return ok("ESTABLISHED, FIN-WAIT-2, CLOSE-WAIT, each in its time (TCP_INFO).")


def _ack_wakeup(lab: Lab) -> Finding:
    """After SHUT_WR edge-triggered epoll for output is the only thing that wakes when our FIN is ACKed (epoll(7))."""
    ours, peer = lab.pair()
    lab.fill(ours)
    ours.shutdown(socket.SHUT_WR)
    with select.epoll() as epoll:
        epoll.register(ours, select.EPOLLOUT | select.EPOLLET)
        wakeups = len(epoll.poll(0))
        while peer.recv(PIECE):
            if not _all_acked(ours):
                wakeups += len(epoll.poll(0))  # room in the send queue wakes too, and must not pass for the ACK
        while wakeups < MANY:
            woken = epoll.poll(min(SETTLED, lab.left()))
            wakeups += len(woken)
            if _all_acked(ours) and woken:
                return ok("it comes with the ACK (EPOLLOUT, EPOLLET).", wakeups=wakeups)
            if not woken:
                acked = "was" if _all_acked(ours) else "was not even"
                return note(f"it does not come: the ACK {acked} there after {SETTLED:g} s.", LOOKS_AGAIN)
    return note(f"{wakeups} wake-ups and no ACK: epoll does not wait for an edge here.", LOOKS_AGAIN, wakeups=wakeups)


def _all_acked(sock: socket.socket) -> bool:
    return _queue(sock) == 0


def _user_timeout(lab: Lab) -> Finding:
    """RFC 5482. An orphan's death shows only when its peer reads on; a twin that we keep tells when it is time."""
    (orphan, peer), (twin, _) = lab.pair(), lab.pair()
    for sock in (orphan, twin):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
        lab.fill(sock)
    orphan.close()
    started = time.monotonic()
    poll = select.poll()
    poll.register(twin, 0)  # POLLERR is always told
    poll.poll(1000 * min(USER_TIMEOUT_WAIT, lab.left()))
    error = twin.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    seconds = time.monotonic() - started
    time.sleep(LOOK)  # the orphan's timer may be a few ticks behind
    _, ending = lab.read_to_end(peer)
    if error == errno.ETIMEDOUT and ending:
        return ok(f"{USER_TIMEOUT} ms: after {seconds:.1f} s the kernel let go of a peer that did not read.")
    return note(
        f"{USER_TIMEOUT} ms were set, and after {seconds:.1f} s the kernel still held on.",
        "Nothing is lost: `user_timeout` of the policies has no effect here; orphans live as long as the kernel says.",
    )


PROBES = (
    Probe("engine", "engine", _engine, relied_on=True, linux_only=False),
    Probe("refused_upload_close", "refused upload, close()", _refused_by_close, relied_on=True, linux_only=False),
    Probe("refused_upload_closer", "refused upload, Closer", _refused_by_closer, relied_on=True, linux_only=False),
    Probe("lost_answer", "an answer that is lost", _lost_answer, relied_on=True, linux_only=False),
    Probe("half_close", "half-close", _half_close, relied_on=True, linux_only=False),
    Probe("unread_input", "plain close, input unread", _unread_input, linux_only=False),
    Probe("linger_option", "SO_LINGER, non-blocking", _linger_option),
    Probe("discard", "discarding input", _discard, relied_on=NATIVE),
    Probe("unacked", "bytes not yet ACKed", _unacked, relied_on=True),
    Probe("unread", "bytes not yet read", _unread),
    Probe("state", "the connection's state", _state, relied_on=True),
    Probe("ack_wakeup", "wake-up at the last ACK", _ack_wakeup),
    Probe("fin_on_last_segment", "FIN on the last segment", _fin_on_last_segment),
    Probe("user_timeout", "TCP_USER_TIMEOUT", _user_timeout),
)
"""In the order in which they are shown."""
LOOPBACK = Probe("loopback", "loopback", _loopback, relied_on=True, linux_only=False)
"""What all of them need; it is shown when it fails."""
