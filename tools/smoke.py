"""The least that an installed lingerx must do, on any platform: python tools/smoke.py [native|portable]

Needs no package but lingerx itself. The argument says which engine must be the one in use. Whether what is known of
the peer is right is what the tests are for; here every call runs once.
"""

from __future__ import annotations

import socket
import sys
import threading
from importlib.metadata import version

import lingerx

ANSWER = b"x" * 65536
POLICIES = (lingerx.Drain(), lingerx.Flush(), lingerx.Background(), lingerx.KernelLinger(3), None)


def exchange(policy: lingerx.Policy | None, closer: lingerx.Closer | None = None) -> tuple[lingerx.Report, int]:
    """One answer over loopback: the closing side's report, and how many bytes the peer got."""
    got = bytearray()

    def read(sock: socket.socket) -> None:
        with sock:
            while part := sock.recv(65536):
                got.extend(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname(), timeout=10.0)
        ours, _ = listener.accept()
    reader = threading.Thread(target=read, args=(peer,))
    reader.start()
    if closer is not None:
        report = closer.submit(ours, policy, data=ANSWER).result(timeout=20.0)
    else:
        ours.sendall(ANSWER)
        report = lingerx.close(ours, policy)
    reader.join(20.0)
    assert not reader.is_alive(), "the peer still waits for the end of the answer"
    assert ours.fileno() == -1, "the socket is still its caller's"
    return report, len(got)


def main() -> None:
    wanted = sys.argv[1:2] or [lingerx.engine]
    assert wanted == [lingerx.engine], f"the engine is {lingerx.engine}"
    assert lingerx.__version__ == version("lingerx"), (lingerx.__version__, version("lingerx"))
    for policy in POLICIES:
        report, size = exchange(policy)
        assert size == len(ANSWER), f"{policy}: {size} bytes arrived"
        assert report.delivered is not False, report
    with lingerx.Closer() as closer:
        report, size = exchange(lingerx.Drain(timeout=10.0), closer)
        assert size == len(ANSWER), f"closer: {size} bytes arrived"
        assert report.delivered is not False, report
    assert closer.stats().handed_over == 1
    name, release = sys.implementation.name, ".".join(map(str, sys.version_info[:3]))
    print(f"lingerx {lingerx.__version__} works: {lingerx.engine} engine, {name} {release}, {sys.platform}")


if __name__ == "__main__":
    main()
