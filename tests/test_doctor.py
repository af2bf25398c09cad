"""The doctor: what it finds on this machine, and that it can find something broken.

Each probe runs for real, alone. That a broken kernel is told as such is shown with probes that stand in for one of
them, and with functions of the kernel's that lie.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import select
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lingerx

pytest.importorskip("click", reason="the doctor needs the extra 'cli'")
pytest.importorskip("rich", reason="the doctor needs the extra 'cli'")

from click.testing import CliRunner, Result

from lingerx import _sockopt
from lingerx.cli import cli, facts, limits, probes, upload
from lingerx.cli.doctor import conclude
from lingerx.cli.facts import Finding, Lab, Line, Probe, as_json, broken, note, ok, run

GENEROUS = 5.0
"""Seconds for the whole command; it needs one or two."""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the probe asks Linux alone")


def probe_of(name: str) -> Probe:
    (probe,) = (probe for probe in probes.PROBES if probe.name == name)
    return probe


def replaced(name: str, look: Callable[[Lab], Finding]) -> tuple[Probe, ...]:
    """A quick registry: a few good probes, and `look` in the place of the one of that name."""
    old = probe_of(name)
    return (
        Probe("good", "something good", lambda lab: ok("as ever.")),
        Probe(old.name, old.title, look, old.relied_on, linux_only=False),
    )


def invoke(*arguments: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, ["doctor", *arguments])


def flat(text: str) -> str:
    return " ".join(text.split())


# -- This machine -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "portable"])
def test_nothing_is_broken_here(engine: str) -> None:
    if importlib.util.find_spec(f"lingerx._{engine}") is None:
        pytest.skip(f"the {engine} engine is not installed here")
    # -X dev -W error: a socket, thread or file left behind would speak on stderr.
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "lingerx", "doctor", "--json"],
        env={**os.environ, "LINGERX_ENGINE": engine},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    answer = json.loads(done.stdout)
    check_schema(answer)
    assert (answer["ok"], answer["broken"], answer["engine"]) == (True, [], engine)
    assert [line["name"] for line in answer["facts"]] == [probe.name for probe in probes.PROBES]
    assert [line["name"] for line in answer["limits"]] == [
        "open_files",
        "tcp_max_orphans",
        "tcp_orphan_retries",
        "tcp_fin_timeout",
    ]
    assert answer["seconds"] < GENEROUS
    why = answer["facts"][0]["found"]
    assert why.startswith(f"{engine}: ")
    assert "LINGERX_ENGINE" in why


@pytest.mark.slow
def test_command_leaves_nothing_behind_in_process() -> None:
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    check_schema(json.loads(result.output))
    # fds and threads: see nothing_left_behind in conftest


def check_schema(answer: dict[str, Any]) -> None:
    assert set(answer) == {"lingerx", "engine", "python", "system", "facts", "limits", "broken", "ok", "seconds"}
    assert answer["lingerx"] == lingerx.__version__
    for line in answer["facts"] + answer["limits"]:
        assert set(line) == {"name", "title", "word", "found", "to_do", "numbers", "relied_on", "seconds"}
        assert line["word"] in ("ok", "note", "broken")
        assert line["found"]
        assert (line["to_do"] == "") is (line["word"] == "ok")
        assert all(value is None or type(value) is int for value in line["numbers"].values())
        assert type(line["relied_on"]) is bool
        assert line["seconds"] >= 0
    names = [line["name"] for line in answer["facts"] + answer["limits"]]
    assert len(set(names)) == len(names)
    assert answer["ok"] is (not answer["broken"])


SLOW = {"user_timeout"}


@pytest.mark.parametrize(
    "probe",
    [pytest.param(probe, marks=[pytest.mark.slow] * (probe.name in SLOW), id=probe.name) for probe in probes.PROBES],
)
def test_each_probe_alone(probe: Probe) -> None:
    line = run(probe)
    assert line.finding.word in ("ok", "note"), line
    assert "could not be tried" not in line.finding.found
    assert (line.name, line.title, line.relied_on) == (probe.name, probe.title, probe.relied_on)
    assert bool(line.finding.to_do) is (line.finding.word != "ok")
    assert line.seconds < facts.DEADLINE
    assert len(probe.title) <= 28


@needs_linux
@pytest.mark.parametrize(
    "name",
    [
        "refused_upload_close",
        "refused_upload_closer",
        "lost_answer",
        "half_close",
        "unread_input",
        "linger_option",
        "discard",
        "unacked",
        "unread",
        "state",
        "ack_wakeup",
    ],
)
def test_linux_is_as_lingerx_knows_it(name: str) -> None:
    probe = probe_of(name)
    assert run(probe).finding.word == "ok"


# -- Something is broken ----------------------------------------------------------------------------


def test_broken_fact_is_exit_status_1_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    lie = replaced("half_close", lambda lab: broken("nobody answers.", "Use another kernel."))
    monkeypatch.setattr(probes, "PROBES", lie)
    printed = invoke()
    assert printed.exit_code == 1
    assert "broken half-close nobody answers. To do: Use another kernel." in flat(printed.output)
    assert "BROKEN: lingerx relies on this, and it does not hold here: half-close." in flat(printed.output)
    result = invoke("--json")
    answer = json.loads(result.output)
    assert (result.exit_code, answer["ok"], answer["broken"]) == (1, False, ["half_close"])
    check_schema(answer)


def test_without_loopback_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the others would wait for seconds."""

    def refuse(_: Lab) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(Lab, "pair", refuse)
    printed = invoke()
    assert printed.exit_code == 1
    assert "broken loopback 127.0.0.1 can't be reached: Network is unreachable." in flat(printed.output)
    assert "To do: Bring the loopback interface up (ip link set lo up)" in flat(printed.output)
    answer = json.loads(invoke("--json").output)
    assert (answer["broken"], [line["name"] for line in answer["facts"]]) == (["loopback"], ["loopback"])


def test_note_is_exit_status_0_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    late = replaced("ack_wakeup", lambda lab: note("it does not come.", "Nothing: a timer looks."))
    monkeypatch.setattr(probes, "PROBES", late)
    result = invoke()
    assert result.exit_code == 0
    assert "note wake-up at the last ACK it does not come. To do: Nothing: a timer looks." in flat(result.output)
    assert "All that lingerx relies on holds here. 1 note" in flat(result.output)


def fail(lab: Lab) -> Finding:
    raise ValueError("forged")


@pytest.mark.parametrize(("name", "word", "status"), [("state", "broken", 1), ("unread", "note", 0)])
def test_probe_that_raises_is_told(name: str, word: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBES", replaced(name, fail))
    result = invoke(columns=120)
    assert result.exit_code == status
    assert "could not be tried: ValueError: forged To do: Run it again" in flat(result.output)
    assert f"\n{word} " in result.output


def test_probe_without_fds_asks_for_more() -> None:
    def look(lab: Lab) -> Finding:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    finding = run(Probe("x", "x", look, relied_on=True, linux_only=False)).finding
    assert finding.word == "broken"
    assert "ulimit -n" in finding.to_do


@needs_linux
@pytest.mark.slow
def test_process_with_few_fds_is_told_so() -> None:
    """And the kernel is not blamed for uploads that could not even be tried."""
    command = f"ulimit -n 12 && exec {shlex.quote(sys.executable)} -m lingerx doctor --json"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (1, "")
    answer = json.loads(done.stdout)
    assert answer["broken"] == ["refused_upload_close", "refused_upload_closer"]
    told = [line for line in answer["facts"] if line["word"] == "broken"]
    assert all("Too many open files" in line["found"] and "ulimit -n" in line["to_do"] for line in told)
    assert answer["limits"][0]["numbers"] == {"soft": 12, "hard": 12, "max_pending": 6}


def wait_for_a_silent_peer(lab: Lab) -> Finding:
    ours, _ = lab.pair()
    ours.recv(1)
    return ok("impossible.")


def wait_without_a_deadline(lab: Lab) -> Finding:
    ours, _ = lab.pair()
    ours.settimeout(None)
    ours.recv(1)
    return ok("this must not be believed: the connection was broken off.")


def read_without_an_end(lab: Lab) -> Finding:
    ours, _ = lab.pair()
    lab.read_to_end(ours)
    return ok("impossible.")


@pytest.mark.slow
@pytest.mark.parametrize("look", [wait_for_a_silent_peer, wait_without_a_deadline, read_without_an_end])
@pytest.mark.parametrize("relied_on", [True, False])
def test_probe_that_hangs_is_told_and_ended(look: Callable[[Lab], Finding], relied_on: bool) -> None:
    line = run(Probe("x", "x", look, relied_on, linux_only=False), seconds=0.1)
    assert line.finding == (broken if relied_on else note)(
        "could not be tried: it was not over after 0.1 s.", facts.AGAIN
    )
    assert line.seconds < GENEROUS


@pytest.mark.slow
def test_probe_that_cannot_be_ended_does_not_hold_up_the_doctor() -> None:
    go_on, gone = threading.Event(), threading.Event()

    def look(lab: Lab) -> Finding:
        go_on.wait(20)
        gone.set()
        return ok("too late.")

    line = run(Probe("x", "x", look, relied_on=True, linux_only=False), seconds=0.1)
    assert line.finding.word == "broken"
    assert line.seconds < GENEROUS
    go_on.set()
    assert gone.wait(5)


def test_probe_for_linux_says_that_it_was_not_tried_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    line = run(Probe("x", "x", fail, relied_on=True))
    assert line.finding.word == "note"
    assert line.finding.found.startswith("not tried here: ")
    assert line.finding.to_do
    assert all(line.finding.found.startswith("not read here: ") for line in limits.read_limits()[1:])


# -- What a probe says of a kernel that lies --------------------------------------------------------


def status(**fields: Any) -> Callable[[socket.socket], lingerx.TcpStatus]:
    """tcp_status, with some of its fields forged."""
    real = lingerx.tcp_status

    def forged(sock: socket.socket) -> lingerx.TcpStatus:
        told = real(sock)._asdict()
        return lingerx.TcpStatus(**{**told, **{key: make(told[key]) for key, make in fields.items()}})

    return forged


@needs_linux
@pytest.mark.parametrize(
    ("name", "field", "lie", "word", "said"),
    [
        ("unread", "unread", lambda value: 0, "note", "[0, 0, 0]"),
        ("state", "state", lambda value: "ESTABLISHED", "broken", "'ESTABLISHED', 'ESTABLISHED'"),
        ("state", "state", lambda value: None, "note", "does not tell"),
    ],
)
def test_lie_of_the_kernel_is_told(
    name: str, field: str, lie: Callable[[Any], Any], word: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = probe_of(name)
    monkeypatch.setattr(probes, "SETTLED", 0.1)
    monkeypatch.setattr(lingerx, "tcp_status", status(**{field: lie}))
    finding = run(probe).finding
    assert (finding.word, said in finding.found) == (word, True), finding
    assert finding.to_do


@needs_linux
@pytest.mark.parametrize(
    ("lie", "word", "said"),
    [
        (lambda value: 0, "broken", "and 0 are called un-ACKed"),
        (lambda value: max(0, value - 1), "broken", "are called un-ACKed"),
        (lambda value: value or 1, "broken", "the peer has read all, and 1 bytes"),
        (lambda value: -1, "note", "does not tell"),
    ],
)
def test_lie_about_the_send_queue_is_told(
    lie: Callable[[int], int], word: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _sockopt.send_queue
    monkeypatch.setattr(probes, "SETTLED", 0.1)
    monkeypatch.setattr(_sockopt, "send_queue", lambda sock, fin: lie(real(sock, fin)))
    finding = run(probe_of("unacked")).finding
    assert (finding.word, said in finding.found) == (word, True), finding
    assert finding.to_do


@needs_linux
def test_ack_that_does_not_come_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SETTLED", 0.1)
    monkeypatch.setattr(_sockopt, "send_queue", lambda sock, fin: 1)
    finding = run(probe_of("ack_wakeup")).finding
    assert (finding.word, finding.found) == ("note", "it does not come: the ACK was not even there after 0.1 s.")


@needs_linux
def test_missing_ack_wakeup_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SETTLED", 0.1)
    monkeypatch.setattr(select, "EPOLLOUT", select.EPOLLRDHUP)  # which never comes for an ACK
    probe = probe_of("ack_wakeup")
    finding = run(probe).finding
    assert (finding.word, finding.found) == ("note", "it does not come: the ACK was there after 0.1 s.")
    monkeypatch.undo()
    monkeypatch.setattr(select, "EPOLLET", 0)  # always ready: an ACK that is not waited for
    finding = run(probe).finding
    assert finding.word == "note"
    assert "does not wait for an edge" in finding.found


@needs_linux
@pytest.mark.parametrize(
    ("option", "name", "said"),
    [("MSG_MORE", "fin_on_last_segment", "2 segments with MSG_MORE"), ("MSG_TRUNC", "discard", "copied")],
)
def test_flag_that_does_nothing_is_a_note(option: str, name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, option, 0)
    finding = run(probe_of(name)).finding
    assert finding.word == "note"
    assert said in finding.found


@needs_linux
@pytest.mark.parametrize(
    ("constant", "value", "name", "word", "said"),
    [
        ("SHUT_WR", socket.SHUT_RDWR, "half_close", "broken", "then ECONNRESET, when the peer sent on"),
        ("SHUT_WR", socket.SHUT_RD, "half_close", "broken", "was not over after"),
        ("MSG_TRUNC", socket.MSG_PEEK, "discard", "broken" if probes.NATIVE else "note", "left b'0123456789'"),
    ],
)
def test_call_that_does_something_else_is_told(
    constant: str, value: int, name: str, word: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, constant, value)
    finding = run(probe_of(name), seconds=0.2).finding
    assert (finding.word, said in finding.found) == (word, True), finding
    assert finding.to_do


@needs_linux
def test_close_that_does_not_wait_for_so_linger_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingerx, "set_linger", lambda sock, seconds: None)
    finding = run(probe_of("linger_option")).finding
    assert (finding.word, "returns at once" in finding.found) == ("note", True), finding


@needs_linux
def test_user_timeout_without_effect_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "USER_TIMEOUT", 0)  # the kernel's own, minutes
    monkeypatch.setattr(probes, "USER_TIMEOUT_WAIT", 0.01)
    finding = run(probe_of("user_timeout")).finding
    assert finding.word == "note"
    assert "still held on" in finding.found


def test_refused_upload_that_does_not_arrive_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a plain close, and a report that lies about it."""

    def lie(sock: socket.socket) -> lingerx.Report:
        sock.close()
        return lingerx.Report(lingerx.Outcome.PEER_CLOSED, unacked=0)

    monkeypatch.setattr(upload, "WAYS", (upload.Way("Liar()", lie, lossless=True, gentle=True),))
    finding = run(probe_of("refused_upload_close")).finding
    assert finding.word == "broken"
    assert "A report lied" in finding.found
    assert "another kernel" in finding.to_do


def test_report_that_calls_a_lost_answer_delivered_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(sock: socket.socket, policy: lingerx.Policy) -> lingerx.Report:
        sock.close()
        return lingerx.Report(lingerx.Outcome.PEER_CLOSED, unacked=0)

    monkeypatch.setattr(lingerx, "close", lie)
    finding = run(probe_of("lost_answer")).finding
    assert finding.word == "broken"
    assert "a report lied" in finding.found


@pytest.mark.parametrize(
    ("native", "forced", "installed", "word", "said"),
    [
        (True, None, True, "ok", "native: installed"),
        (True, "native", True, "ok", "native: forced"),
        (False, "portable", True, "note", "portable: forced"),
        (False, None, False, "note", "portable: the native engine is not installed."),
        (False, "portable", False, "note", "(LINGERX_ENGINE asks for this one.)"),
    ],
)
def test_which_engine_and_why(
    native: bool, forced: str | None, installed: bool, word: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "NATIVE", native)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *name: object() if installed else None)
    if forced is None:
        monkeypatch.delenv("LINGERX_ENGINE", raising=False)
    else:
        monkeypatch.setenv("LINGERX_ENGINE", forced)
    finding = run(probes.PROBES[0]).finding
    assert (finding.word, said in finding.found) == (word, True), finding


# -- Limits -----------------------------------------------------------------------------------------


def fake_proc(folder: Path, **values: str) -> Path:
    settings = folder / "sys" / "net" / "ipv4"
    settings.mkdir(parents=True)
    for name, value in values.items():
        (settings / name).write_text(value)
    return folder


@needs_linux
def test_limits_of_a_fake_kernel(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, tcp_max_orphans="9999999\n", tcp_orphan_retries="0\n", tcp_fin_timeout="60\n")
    _, *sysctls = limits.read_limits(proc)
    assert [line.finding.word for line in sysctls] == ["ok"] * 3
    assert [line.finding.numbers for line in sysctls] == [{"value": 9999999}, {"value": 0}, {"value": 60}]


@needs_linux
@pytest.mark.parametrize(
    ("name", "text", "word", "said"),
    [
        ("tcp_max_orphans", "0", "note", "0, fewer than the"),
        ("tcp_orphan_retries", "2", "note", "2: what is left to the kernel"),
        ("tcp_orphan_retries", "9", "ok", "100 s and more"),
        ("tcp_fin_timeout", "7", "ok", "7 s"),
        ("tcp_fin_timeout", "soon", "note", "can't be read here: invalid literal"),
        ("tcp_fin_timeout", "", "note", "can't be read here: invalid literal"),
        ("tcp_fin_timeout", "\xff", "note", "can't be read here: 'ascii'"),
        ("tcp_max_orphans", None, "note", "can't be read here: No such file"),
    ],
)
def test_limit_that_matters_is_judged(name: str, text: str | None, word: str, said: str, tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, **({} if text is None else {name: text}))
    (line,) = (line for line in limits.read_limits(proc) if line.name == name)
    assert (line.finding.word, said in line.finding.found) == (word, True), line
    assert bool(line.finding.to_do) is (word != "ok")


@pytest.mark.parametrize(
    ("soft", "hard", "word", "said"),
    [
        (1024, 524288, "note", "1024, 524288 if raised: a Closer takes 7"),
        (1025, None, "ok", "1025, no limit if raised"),
        (None, None, "ok", "no limit, no limit if raised"),
        (0, 0, "note", "0, 0 if raised"),
    ],
)
def test_open_files(soft: int | None, hard: int | None, word: str, said: str) -> None:
    finding = limits.judge_open_files(soft, hard, 7)
    assert (finding.word, finding.found.startswith(said)) == (word, True), finding
    assert finding.numbers == {"soft": soft, "hard": hard, "max_pending": 7}


@needs_linux
def test_max_pending_is_the_closers_own() -> None:
    import resource

    numbers = limits.read_limits()[0].finding.numbers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (numbers["soft"], numbers["hard"], numbers["max_pending"]) == (soft, hard, soft // 2)


# -- Rendering --------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_table_fits_its_columns(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wordy = note("one two three " * 9, "four five " * 9)
    shown = [Probe(probe.name, probe.title, lambda lab: wordy, linux_only=False) for probe in probes.PROBES]
    shown.append(Probe("long", "long", lambda lab: broken("x" * 250), linux_only=False))
    monkeypatch.setattr(probes, "PROBES", tuple(shown))
    result = invoke(columns=columns)
    assert result.exit_code == 1
    printed = [line.rstrip() for line in result.output.splitlines()]
    assert max(map(len, printed)) <= columns
    assert "x" * 250 in "".join(result.output.split())
    assert flat(result.output).endswith(conclude([run(probe) for probe in shown] + limits.read_limits()))
    titles = [line for line in printed if line.startswith(("ok ", "note ", "broken "))]
    assert len(titles) == len(shown) + len(limits.read_limits())


def test_conclusion_counts_what_is_above() -> None:
    good, so, bad = (Line(word, f"the {word}", make("x")) for word, make in (("a", ok), ("b", note), ("c", broken)))
    assert conclude([good]) == "All that lingerx relies on holds here."
    assert conclude([good, so]) == "All that lingerx relies on holds here. 1 note above."
    assert conclude([so, bad, so]).endswith("does not hold here: the c. 2 notes above.")


def test_line_as_json() -> None:
    plain = json.loads(json.dumps(as_json([Line("a", "b", ok("c", soft=1, hard=None), True, 0.5)])))
    assert plain == [
        {
            "name": "a",
            "title": "b",
            "word": "ok",
            "found": "c",
            "to_do": "",
            "numbers": {"soft": 1, "hard": None},
            "relied_on": True,
            "seconds": 0.5,
        }
    ]
