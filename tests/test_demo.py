"""The demo: what it promises on this machine, and that it can fail.

The verdict is pure, so most tests forge what clients and reports said. A few run the real thing with few
uploads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

import lingerx

pytest.importorskip("click", reason="the demo needs the extra 'cli'")
pytest.importorskip("rich", reason="the demo needs the extra 'cli'")

from click.testing import CliRunner

from lingerx.cli import cli, upload
from lingerx.cli.demo import conclude
from lingerx.cli.tally import FATES, Cell, Row, Seen, Served, as_json, find_failures, find_lies

CURL = upload.curl_path() is not None
SMALL = upload.Settings(uploads=2, timeout=5.0)


def rows_by_name(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in answer["rows"]}


def check_promises(answer: dict[str, Any], uploads: int) -> None:
    rows = rows_by_name(answer)
    assert list(rows) == [way.name for way in upload.WAYS]
    assert list(rows["Drain()"]["clients"]) == (["raw", "curl"] if CURL else ["raw"])
    for name in ("Flush()", "Drain()"):
        for client, counts in rows[name]["clients"].items():
            assert counts["whole"] == counts["uploads"] == uploads, (name, client)
    assert rows["Drain()"]["clients"]["raw"]["send_errors"] == 0
    assert rows["sock.close()"]["clients"]["raw"]["whole"] < uploads
    assert all(not counts["lies"] for row in rows.values() for counts in row["clients"].values())
    assert rows["sock.close()"]["outcomes"] == {}
    assert sum(rows["Drain()"]["outcomes"].values()) == uploads * len(rows["Drain()"]["clients"])
    assert answer["failures"] == []
    assert answer["ok"] is True


@pytest.mark.slow
def test_promises_are_kept_in_process() -> None:
    result = CliRunner().invoke(cli, ["demo", "--json", "--uploads", "3"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    check_promises(answer, uploads=3)
    assert answer["engine"] == lingerx.engine


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "portable"])
def test_promises_are_kept_by_the_command(engine: str) -> None:
    if importlib.util.find_spec(f"lingerx._{engine}") is None:
        pytest.skip(f"the {engine} engine is not installed here")
    # -X dev -W error: a socket, thread or file left behind would speak on stderr.
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "lingerx", "demo", "--json", "--uploads", "3"],
        env={**os.environ, "LINGERX_ENGINE": engine},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    answer = json.loads(done.stdout)
    check_promises(answer, uploads=3)
    assert answer["engine"] == engine


@pytest.mark.slow
def test_answer_that_the_kernel_does_not_take_at_once() -> None:
    drain = upload.WAYS[-1]
    settings = upload.Settings(uploads=1, answer_bytes=16 * 1024 * 1024, timeout=10.0)
    (row,) = upload.run(settings, lambda name: None, (drain,))
    assert row.cells[0].count("whole") == 1
    assert find_failures([row]) == []


def test_table_fits_80_columns_and_ends_with_a_conclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        forged(way.name, fates=["whole"] * 20, outcomes=["PEER_CLOSED"] * 19 + ["ACKED"], way=way)
        for way in upload.WAYS
    ]
    monkeypatch.setattr(upload, "run", lambda settings, progress: rows)
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli, ["demo", "--client", "raw"])
    assert result.exit_code == 0
    assert max(len(line.rstrip()) for line in result.output.splitlines()) <= 80
    assert " ".join(result.output.split()).endswith(conclude(rows))
    assert "19 PEER_CLOSED, 1 ACKED" in result.output


# -- The verdict, with forged tallies ---------------------------------------------------------------


def forged(
    name: str,
    fates: list[str],
    outcomes: list[str],
    delivered: bool | None = None,
    send_errors: int = 0,
    handed_over: bool = True,
    way: upload.Way | None = None,
    client: str = "raw",
    trouble: str = "",
    stuck: int = 0,
) -> Row:
    seen = tuple(
        Seen(number, fate, 1000, "EPIPE" if number < send_errors else "")  # type: ignore[arg-type]
        for number, fate in enumerate(fates)
    )
    served = [Served(i, handed_over, 0.001, said, delivered, trouble) for i, said in enumerate(outcomes)]
    way = way or next(way for way in upload.WAYS if way.name == name)
    return Row(name, (Cell(client, seen, tuple(served), stuck),), way.reports, way.lossless, way.gentle)


def test_honest_reports_are_no_lies() -> None:
    seen = [Seen(1, "whole", 9), Seen(2, "truncated", 5), Seen(3, "reset", 0), Seen(4, "timed_out", 5)]
    served = [
        Served(4, True, 0.0, "TIMED_OUT", None),
        Served(1, True, 0.0, "PEER_CLOSED", True),
        Served(2, True, 0.0, "PEER_RESET", False),
        Served(3, True, 0.0, "BACKGROUND", None),
    ]
    assert find_lies(served, seen) == []


@pytest.mark.parametrize("fate", ["truncated", "reset", "timed_out"])
@pytest.mark.parametrize(("outcome", "sure"), [("ACKED", True), ("PEER_CLOSED", True), ("PEER_CLOSED", None)])
def test_claim_of_delivery_with_a_byte_missing_is_a_lie(fate: Any, outcome: str, sure: bool | None) -> None:
    seen = [Seen(1, "whole", 9), Seen(2, fate, 8)]
    served = [Served(2, True, 0.0, outcome, sure), Served(1, True, 0.0, outcome, sure)]
    (lie,) = find_lies(served, seen)
    assert (lie.request, lie.claim, lie.fate, lie.received) == (2, outcome, fate, 8)


def test_claim_without_a_client_is_a_lie() -> None:
    (lie,) = find_lies([Served(7, True, 0.0, "ACKED", True)], [Seen(1, "whole", 9)])
    assert (lie.request, lie.fate) == (7, "no client")


def test_report_on_an_answer_that_was_not_handed_over_whole_is_no_lie() -> None:
    assert find_lies([Served(1, False, 0.0, "ACKED", True)], [Seen(1, "truncated", 5)]) == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            forged("Drain()", ["whole", "truncated"], ["PEER_CLOSED", "TIMED_OUT"]),
            "1 of 2 answers did not reach",
        ),
        (forged("Flush()", ["reset"], ["PEER_RESET"], client="curl"), "not reach the curl client"),
        (
            forged("Drain()", ["whole", "whole"], ["PEER_CLOSED"] * 2, send_errors=1),
            "1 of 2 raw clients had a send",
        ),
        (
            forged("Background()", ["truncated"], ["BACKGROUND"], delivered=True),
            "A report lied: Background() said",
        ),
        (forged("Abort()", ["truncated", "whole"], ["ABORTED"]), "Abort() gave 1 reports for 2 uploads"),
        (forged("Drain()", ["whole"], [""], trouble="OSError: forged"), "Drain() raised OSError: forged"),
        (forged("Flush()", ["whole"], ["ACKED"], stuck=1), "Flush() left 1 server threads waiting"),
    ],
)
def test_each_broken_promise_is_named_and_ends_with_status_1(
    row: Row, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = forged("Flush()", ["whole"], ["ACKED"], delivered=True)
    monkeypatch.setattr(upload, "run", lambda settings, progress: [kept, row])
    printed = CliRunner().invoke(cli, ["demo", "--client", "raw"])
    assert printed.exit_code == 1
    assert "FAILED: " in printed.output
    result = CliRunner().invoke(cli, ["demo", "--client", "raw", "--json"])
    answer = json.loads(result.output)
    assert (result.exit_code, answer["ok"]) == (1, False)
    assert any(sentence in failure for failure in answer["failures"])


@pytest.mark.parametrize(
    "row",
    [
        forged("sock.close()", ["truncated", "reset"], ["", ""], send_errors=2),
        forged("SO_LINGER 3 s, close", ["truncated"], [""], send_errors=1),
        forged("Background()", ["truncated"], ["BACKGROUND"], send_errors=1),
        forged("Flush()", ["whole"], ["ACKED"], delivered=True, send_errors=1),
        forged("Drain()", ["whole"], ["PEER_CLOSED"], delivered=True),
        # curl stops sending on purpose once it has the answer.
        forged("Drain()", ["whole"], ["PEER_CLOSED"], delivered=True, send_errors=1, client="curl"),
    ],
)
def test_what_nobody_promised_is_no_failure(row: Row) -> None:
    assert find_failures([row]) == []


def test_conclusion_says_so_when_plain_close_lost_nothing() -> None:
    row = forged("sock.close()", ["whole", "whole"], ["", ""], send_errors=2)
    assert "2 of 2 answers arrived this time, though 2 clients had a send error" in conclude([row])


def test_row_as_json_counts_everything() -> None:
    row = forged("Drain()", list(FATES), ["PEER_CLOSED"] * 4, delivered=True, send_errors=2)
    plain = json.loads(json.dumps(as_json(row)))
    counts = plain["clients"]["raw"]
    assert [counts[key] for key in ("uploads", "whole", "truncated", "reset", "timed_out")] == [4, 1, 1, 1, 1]
    assert (counts["send_errors"], counts["send_error_names"], len(counts["lies"])) == (2, {"EPIPE": 2}, 3)
    assert plain["outcomes"] == {"PEER_CLOSED": 4}
    assert plain["delivered"] == {"true": 4, "false": 0, "unknown": 0}


# -- The experiment, with a closing call that fails -------------------------------------------------


def test_real_clients_expose_a_lying_report() -> None:
    def lie(sock: socket.socket) -> lingerx.Report:
        sock.close()
        return lingerx.Report(lingerx.Outcome.PEER_CLOSED, unacked=0)

    (row,) = upload.run(SMALL, lambda name: None, (upload.Way("Liar()", lie, lossless=True),))
    assert len(row.cells[0].lies) == 2
    assert any("A report lied: Liar() said PEER_CLOSED" in failure for failure in find_failures([row]))


def test_closing_call_that_raises_is_told_and_its_socket_closed() -> None:
    def fail(sock: socket.socket) -> None:
        raise RuntimeError("forged")

    (row,) = upload.run(SMALL, lambda name: None, (upload.Way("Broken()", fail),))
    assert "Broken() raised RuntimeError: forged (raw client)." in find_failures([row])


def test_closing_call_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PATIENCE", 0.05)
    go_on = threading.Event()

    def hang(sock: socket.socket) -> None:
        go_on.wait(20)
        sock.close()

    server = upload.UploadServer(upload.Way("Hanging()", hang), b"answer", timeout=0.05)
    with server, socket.create_connection((upload.HOST, server.port)) as sock:
        sock.sendall(b"POST /upload/1 HTTP/1.1\r\n\r\n")
        sock.recv(100)
    assert server.stuck == 1
    go_on.set()
    for thread in server._threads:
        thread.join(5)
        assert not thread.is_alive()


def test_server_ends_though_a_stranger_says_nothing_of_use() -> None:
    server = upload.UploadServer(upload.WAYS[0], b"answer", timeout=5.0)
    with server:
        for words in (b"", b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection((upload.HOST, server.port), 5.0) as sock:
                sock.sendall(words)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(100) == b""
    assert (server.served, server.stuck) == ([], 0)


# -- The command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "curl", "clients"),
    [
        ([], None, ("raw",)),
        ([], "/bin/curl", ("raw", "curl")),
        (["--client", "both"], "/bin/curl", ("raw", "curl")),
        (["--client", "curl"], "/bin/curl", ("curl",)),
        (["--client", "raw"], "/bin/curl", ("raw",)),
    ],
)
def test_clients_in_use(
    arguments: list[str], curl: str | None, clients: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "curl_path", lambda: curl)
    monkeypatch.setattr(upload, "run", lambda settings, progress: [])
    result = CliRunner().invoke(cli, ["demo", "--json", *arguments])
    assert tuple(json.loads(result.output)["settings"]["clients"]) == clients


@pytest.mark.parametrize("timeout", ["nan", "0", "inf", "ten"])
def test_timeout_that_is_none_is_a_usage_error(timeout: str) -> None:
    result = CliRunner().invoke(cli, ["demo", "--timeout", timeout])
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)


@pytest.mark.parametrize("client", ["curl", "both"])
def test_asking_for_missing_curl_is_a_usage_error(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "curl_path", lambda: None)
    result = CliRunner().invoke(cli, ["demo", "--client", client])
    assert result.exit_code == 2
    assert "needs curl" in result.output


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_missing_extra_is_named(missing: str) -> None:
    done = run_without(missing)
    assert done.returncode == 2
    assert "pip install 'lingerx[cli]'" in done.stderr
    assert missing in done.stderr
    assert "Traceback" not in done.stderr


def test_other_missing_modules_are_not_blamed_on_the_extra() -> None:
    done = run_without("statistics")
    assert done.returncode == 1
    assert "lingerx[cli]" not in done.stderr
    assert "ModuleNotFoundError" in done.stderr


def run_without(module: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.modules[{module!r}] = None; import lingerx.__main__ as m; sys.exit(m.main())"
    command = [sys.executable, "-c", script, "--version"]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)
