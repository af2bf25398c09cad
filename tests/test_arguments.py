"""A caller's mistake is an exception that says what to pass instead, and the socket is untouched."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from conformance import Engine
from connections import Pair, PairMaker
from lingerx import Abort, Background, Drain, Flush, KernelLinger, Policy

Call = Callable[[Any], object]


def assert_usable(pair: Pair) -> None:
    """Both directions still work."""
    ours, peer = pair
    ours.sendall(b"to the peer")
    assert peer.recv(100) == b"to the peer"
    peer.sendall(b"to us")
    assert ours.recv(100) == b"to us"


@pytest.fixture(params=["close", "abort", "send_and_close", "close_all"])
def closing(request: pytest.FixtureRequest, engine: Engine) -> Call:
    """Each call that takes a socket object over."""
    calls: dict[str, Call] = {
        "close": engine.close,
        "abort": engine.abort,
        "send_and_close": lambda sock: engine.send_and_close(sock, b"answer"),
        "close_all": lambda sock: engine.close_all([sock]),
    }
    return calls[request.param]


# The socket -----------------------------------------------------------------------------------------------


class HasFileno:
    """Like a file, a wrapper, a selector key."""

    def fileno(self) -> int:
        return 7


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (7, "close_fd"),
        (7.0, r"socket\.socket"),
        (True, r"socket\.socket"),
        (None, r"socket\.socket"),
        ("127.0.0.1", r"socket\.socket"),
        (socket.socket, "instance"),
        (HasFileno(), "pass the socket itself"),
        (object(), r"accept\(\)"),
    ],
    ids=["int", "float", "bool", "none", "str", "class", "wrapper", "object"],
)
def test_what_is_no_socket(closing: Call, wrong: object, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        closing(wrong)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_datagram_socket(closing: Call, family: int) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        with pytest.raises(TypeError, match=r"stream sockets.*its own close\(\)"):
            closing(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_DGRAM


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_listening_socket(closing: Call, family: int) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=socket.AddressFamily(family)) as listener:
        with pytest.raises(ValueError, match=r"listening.*accept\(\)"):
            closing(listener)
        with socket.create_connection(listener.getsockname()[:2]):
            listener.accept()[0].close()


STANDARD_STREAM = """if True:
    import os, socket, sys
    from importlib import import_module
    engine, fd, out = import_module(sys.argv[1]), int(sys.argv[2]), os.dup(1)
    ours, peer = socket.socketpair()
    os.dup2(ours.fileno(), fd)
    sock = socket.socket(fileno=fd)
    for close in (
        engine.close,
        engine.abort,
        lambda sock: engine.close_all([sock]),
        lambda sock: engine.send_and_close(sock, b""),
        lambda sock: engine.close_fd(sock.fileno()),
    ):
        try:
            close(sock)
        except ValueError as refusal:
            os.write(out, str(refusal).encode() + b"\\n")
        sock.send(b"x")
        assert peer.recv(1) == b"x"
    sock.detach()
    """


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_standard_stream(engine: Engine, fd: int) -> None:
    """Whoever passes one of them has mixed up numbers; every call refuses it and leaves it open."""
    program = [sys.executable, "-c", STANDARD_STREAM, engine.__name__, str(fd)]  # type: ignore[attr-defined]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=30)
    refusals = done.stdout.splitlines()
    assert len(refusals) == 5, done
    assert all(f"fd {fd} is a standard stream" in refusal and "dup(" in refusal for refusal in refusals)
    assert done.returncode == 0


# The bare number ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (7.0, TypeError, r"detach\(\)"),
        (True, TypeError, r"detach\(\)"),
        (None, TypeError, r"detach\(\)"),
        ("7", TypeError, r"detach\(\)"),
        (-1, ValueError, "3 or more"),
        (1_000_000, ValueError, r"detach\(\)"),
        (2**31, ValueError, "no open socket"),
        (2**64, ValueError, "no open socket"),
    ],
    ids=["float", "bool", "none", "str", "negative", "closed", "beyond_int", "beyond_long"],
)
def test_what_is_no_fd_of_a_socket(engine: Engine, wrong: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        engine.close_fd(wrong)


@pytest.mark.parametrize("excess", [2**32, 2**64])
def test_number_that_only_its_last_bits_make_an_fd(engine: Engine, tcp: PairMaker, excess: int) -> None:
    """C would cut it off, and close somebody's socket."""
    pair = tcp()
    with pytest.raises(ValueError, match="no open socket"):
        engine.close_fd(excess + pair[0].fileno())
    assert_usable(pair)


def test_socket_object_where_a_number_is_wanted(engine: Engine, tcp: PairMaker) -> None:
    pair = tcp()
    with pytest.raises(TypeError, match=r"pass a socket object to close\(\)"):
        engine.close_fd(pair[0])  # type: ignore[arg-type]
    assert_usable(pair)


def test_number_of_a_file(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> None:
    with open(tmp_path_factory.mktemp("files") / "file", "w", encoding="utf-8") as file:
        with pytest.raises(ValueError, match="no open socket"):
            engine.close_fd(file.fileno())
        file.write("still open")
        file.flush()


def test_number_of_a_datagram_or_listening_socket(engine: Engine) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagram, socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(TypeError, match="stream socket"):
            engine.close_fd(datagram.fileno())
        with pytest.raises(ValueError, match="listening"):
            engine.close_fd(listener.fileno())
        assert datagram.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_DGRAM
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


# The policy -----------------------------------------------------------------------------------------------


class Unknown:
    """Somebody's own idea of a policy."""

    timeout = 3.0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (Drain, r"write Drain\(\) instead of Drain"),
        (KernelLinger, r"write KernelLinger\(3\) instead"),
        (Policy, "Policy is only their base"),
        (3, r"write Drain\(timeout=3\) instead of 3"),
        (0.5, r"write Drain\(timeout=0\.5\) instead"),
        ("drain", r"Drain\(\), Flush\(\)"),
        (True, r"Drain\(\), Flush\(\)"),
        (Unknown(), r"Drain\(\), Flush\(\)"),
        ((4, 0), r"Drain\(\), Flush\(\)"),
    ],
    ids=["class", "class_with_argument", "base", "int", "float", "str", "bool", "unknown", "tuple"],
)
@pytest.mark.parametrize("function", ["close", "close_fd", "close_all", "send_and_close"])
def test_what_is_no_policy(engine: Engine, tcp: PairMaker, function: str, wrong: Any, sentence: str) -> None:
    pair = ours, _ = tcp()
    calls: dict[str, Call] = {
        "close": lambda policy: engine.close(ours, policy),
        "close_fd": lambda policy: engine.close_fd(ours.fileno(), policy),
        "close_all": lambda policy: engine.close_all([ours], policy),
        "send_and_close": lambda policy: engine.send_and_close(ours, b"answer", policy),
    }
    with pytest.raises(TypeError, match=sentence):
        calls[function](wrong)
    assert_usable(pair)


def test_wrong_policy_for_a_socket_that_is_closed_already(engine: Engine, tcp: PairMaker) -> None:
    """A mistake is a mistake, also where there would be nothing to do."""
    ours, _ = tcp()
    ours.close()
    with pytest.raises(TypeError):
        engine.close(ours, 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deadline"):
        engine.send_and_close(ours, b"", Background())


@pytest.mark.parametrize("policy", [None, Drain(timeout=0), Flush(timeout=0), Background(), Abort(), KernelLinger(1)])
def test_policy_by_position_and_by_name(engine: Engine, tcp: PairMaker, policy: Policy | None) -> None:
    (first, first_peer), (second, second_peer) = tcp(), tcp()
    first_peer.close()
    second_peer.close()
    assert engine.close(first, policy).outcome is engine.close(sock=second, policy=policy).outcome


def test_options_of_close_all_have_names(engine: Engine, tcp: PairMaker) -> None:
    pair = tcp()
    with pytest.raises(TypeError):
        engine.close_all([pair[0]], Drain(), 3.0)  # type: ignore[call-arg]
    assert_usable(pair)
