"""TCP Fast Open (RFC 7413): a server gets its socket, and may answer, before the handshake is over.

Linux counts the send queue as 0 until then, and that must not be taken for "all is ACKed".
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from closers import output_of, start_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts so, and has namespaces for networks"),
]

NETWORK = """
ip link set lo up &&
sysctl -qw net.ipv4.tcp_fastopen=0x602 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.lo.rp_filter=0 &&
ip addr add 10.8.8.8/32 dev lo &&
ip tuntap add nowhere mode tun && ip link set nowhere up && ip route add 10.9.9.0/24 dev nowhere &&
exec "$@"
"""
"""One that no answer leaves. Servers in it need no cookies."""

SERVER = """
import socket, struct, sys
import lingerx

policy = eval(sys.argv[1], vars(lingerx))
listener = socket.create_server(("10.8.8.8", 0))
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
(address, port), client = listener.getsockname(), "10.9.9.9"

def checksum(data):
    total = sum(struct.unpack(f"!{len(data + bytes(len(data) % 2)) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

# A client that sends SYN with data, and never anything else.
both = socket.inet_aton(client) + socket.inet_aton(address)
options = bytes.fromhex("020405b4" "22020101")  # MSS, Fast Open
ports_and_numbers = struct.pack("!HHIIBBH", 4321, port, 1000, 0, (20 + len(options)) // 4 << 4, 2, 65000)
data = b"GET"
pseudo = both + struct.pack("!BBH", 0, socket.IPPROTO_TCP, 20 + len(options) + len(data))
summed = checksum(pseudo + ports_and_numbers + bytes(4) + options + data)
segment = ports_and_numbers + struct.pack("!HH", summed, 0) + options + data
packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, socket.IPPROTO_TCP, 0) + both + segment
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
    raw.sendto(packet, (address, 0))
listener.settimeout(5.0)
ours, _ = listener.accept()
ours.sendall(bytes(3000))
status = lingerx.tcp_status(ours)
report = lingerx.close(ours, policy)
print(status.state, status.unsent, status.unacked, report.outcome.name, report.unacked, report.delivered)
"""


def namespace() -> list[str]:
    """A command that runs another in such a network; skips where there can be none."""
    unshare = shutil.which("unshare")
    if unshare is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip")
    command = [unshare, "--net", "--map-root-user", "sh", "-c", NETWORK, "sh"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no network of its own can be had here: {tried.stderr.strip()}")
    return command


@pytest.mark.parametrize(
    "policy", ["Flush(timeout=0.1)", "Drain(timeout=0.1)", "Drain(timeout=0.1, on_timeout='abort')"]
)
def test_nothing_is_known_before_the_handshake_is_over(engine_name: str, policy: str) -> None:
    with start_program(engine_name, SERVER, policy, wrapper=namespace()) as process:
        assert output_of(process) == "SYN-RECEIVED None None TIMED_OUT None None\n"
