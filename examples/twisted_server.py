"""A server of Twisted that refuses uploads: every client gets the whole refusal, and the reactor waits for none.

    python examples/twisted_server.py 8413

It answers once it has the head of a request, while the client is still sending the rest. Only the factory around the
protocol's is lingerx's: after loseConnection() the transport reads on while it writes, half-closes, and the connection
lingers in the background. SIGTERM ends the server: one more second for what is not written yet, and one for
connections in flight.
"""

from __future__ import annotations

import sys

from twisted.internet import endpoints, protocol, reactor

from lingerx import Closer, Drain
from lingerx.twisted import lingering

LONGEST_HEAD = 16384
PAGE = b"Nothing can be uploaded here.\n" * 100_000  # more than the kernel takes at once: the rest goes out later
HEAD = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"


class Refuse(protocol.Protocol):
    head = b""

    def dataReceived(self, data: bytes) -> None:
        self.head += data  # (A real server gives up on clients that never send one.)
        if b"\r\n\r\n" in self.head or len(self.head) > LONGEST_HEAD:
            self.transport.write(HEAD % len(PAGE) + PAGE)
            self.transport.loseConnection()


def main(port: int) -> None:
    closer = Closer(Drain(timeout=30.0, idle_timeout=5.0), exit_timeout=1.0)
    factory = lingering(protocol.Factory.forProtocol(Refuse), closer=closer)
    endpoint = endpoints.TCP4ServerEndpoint(reactor, port, interface="127.0.0.1")
    endpoint.listen(factory).addCallback(lambda port: print("port", port.getHost().port, flush=True))
    reactor.run()
    print("closed", closer.stats().handed_over, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
