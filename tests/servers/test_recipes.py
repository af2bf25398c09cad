"""The apps of docs/recipes: Flask, Django and FastAPI, by the servers that their pages name."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from refusals import GOOD, Seen, finish

from .kit import (
    BODY,
    FEWER_UPLOADS,
    PATIENCE,
    At,
    Command,
    RefusedUploads,
    Served,
    Server,
    answered,
    each_client,
    skip_module_without,
    uploads,
)
from .links import Link

EXAMPLES = Path(__file__).parents[2] / "examples"
IMPORTS = f"import sys; sys.path.append({str(EXAMPLES)!r})\n"

# What the pages say stands and falls with all of them.
skip_module_without("flask", "django", "fastapi", "gunicorn", "uvicorn", "hypercorn")


class Gunicorn(Server):
    """The example under gunicorn's sync worker, lingerx's or gunicorn's own."""

    app: str
    app_without: str | None = None

    def command(self, at: At) -> Command:
        from gunicorn.config import make_settings

        kind = "lingerx.gunicorn.SyncWorker" if at.lingering else "sync"
        options = ["-k", kind, "-b", f"127.0.0.1:{at.port}", "--chdir", str(EXAMPLES)]
        if "control_socket_disable" in make_settings():
            options.append("--no-control-socket")
        app = self.app if at.lingering else self.app_without or self.app
        return [sys.executable, "-m", "gunicorn", *options, app]


def late_bodies(server: Server, loopback: Link, lingering: bool) -> list[Seen]:
    """What three clients see that send their body once the server has closed its side."""
    with server.serve(loopback, lingering=lingering) as served, ExitStack() as stack:
        clients = [answered(served, stack, body=0) for _ in range(3)]
        for client in clients:
            client.wait_for_the_close()
        return [client.go_on(served.page) for client in clients]


# Flask ----------------------------------------------------------------------------------------------------


class Flask(Server):
    packages: tuple[str, ...] = ("flask", "werkzeug")

    def page(self, answer: int) -> bytes:
        return b"Nothing so long can be uploaded here.\n" * 28_000


class TestFlaskByGunicorn(Flask, Gunicorn, RefusedUploads):
    """Its own 413, of MAX_CONTENT_LENGTH."""

    uploads = FEWER_UPLOADS

    name, app, app_without = "Flask, gunicorn sync", "flask_app:app", "servers.flask_without:app"
    packages = ("flask", "werkzeug", "gunicorn")


class TestFlaskByWerkzeug(Flask):
    """The development server reads what comes at once; bodies that come late are lost with its own close."""

    name = "Flask, werkzeug"

    def command(self, at: At) -> Command:
        program = EXAMPLES / "flask_app.py" if at.lingering else Path(__file__).with_name("flask_without.py")
        return [sys.executable, program, str(at.port)]

    def test_every_answer_arrives(self, loopback: Link) -> None:
        # (raw waits for the end of the connection, and Werkzeug for 10 MB of a body that has 8, with lingerx too.)
        with self.serve(loopback) as served:
            self._all_arrive(served, "curl", FEWER_UPLOADS)

    def test_answers_arrive_although_the_body_comes_late(self, loopback: Link) -> None:
        assert late_bodies(self, loopback, lingering=True) == 3 * [GOOD]

    def test_without_lingerx_late_bodies_cost_the_answer(self, loopback: Link) -> None:
        assert GOOD not in late_bodies(self, loopback, lingering=False)


class TestFlaskRun(Flask):
    """The same middleware, from the command line."""

    name = "Flask, flask run"
    exit_status = -signal.SIGTERM

    def command(self, at: At) -> Command:
        return [sys.executable, "-m", "flask", "--app", str(EXAMPLES / "flask_app.py"), "run", "-p", str(at.port)]

    def test_answers_arrive_although_the_body_comes_late(self, loopback: Link) -> None:
        assert late_bodies(self, loopback, lingering=True) == 3 * [GOOD]


# Django ---------------------------------------------------------------------------------------------------


class Django(Server):
    packages: tuple[str, ...] = ("django",)

    def page(self, answer: int) -> bytes:
        return b"Nothing can be uploaded here.\n" * 35_000


class TestDjangoByGunicorn(Django, Gunicorn, RefusedUploads):
    """A view that answers without a look at the body."""

    uploads = FEWER_UPLOADS

    name, app = "Django, gunicorn sync", "django_app:application"
    packages = ("django", "gunicorn")


PLAIN_RUNSERVER = """
import django_app
from django.core.management.commands.runserver import Command
django_app.call_command(Command(), f"127.0.0.1:{sys.argv[1]}", use_reloader=False, skip_checks=True)
"""

UVICORN = """
import django_app, uvicorn
from django.core.asgi import get_asgi_application
uvicorn.run(get_asgi_application(), http=sys.argv[2], port=int(sys.argv[1]), lifespan="off", access_log=False)
"""


class TestDjangoByRunserver(Django):
    """It reads bodies of an announced length to their end, by itself. What gets lost are answers to all others."""

    name = "Django, runserver"
    chunked = (
        b"POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        + 128 * (b"10000\r\n" + BODY[:65536] + b"\r\n")
        + b"0\r\n\r\n"
    )

    def command(self, at: At) -> Command:
        program = [EXAMPLES / "django_app.py"] if at.lingering else ["-c", IMPORTS + PLAIN_RUNSERVER]
        return [sys.executable, *program, str(at.port)]

    def _chunked(self, served: Served) -> list[Seen]:
        return [finish(served.connect(), self.chunked, served.page, PATIENCE) for _ in range(10)]

    def env(self, at: At) -> dict[str, str]:
        return {"PYTHONWARNINGS": "ignore::ResourceWarning"}  # runserver leaves its listener open

    @each_client
    def test_every_answer_arrives(self, client: str, loopback: Link) -> None:
        with self.serve(loopback) as served:
            self._all_arrive(served, client, FEWER_UPLOADS)

    def test_chunked_uploads(self, loopback: Link) -> None:
        with self.serve(loopback) as served:
            assert self._chunked(served) == 10 * [GOOD]

    def test_without_lingerx_chunked_uploads_cost_the_answer(self, loopback: Link) -> None:
        with self.serve(loopback, lingering=False) as served:
            assert GOOD not in self._chunked(served)


class TestDjangoByUvicorn(Django):
    """Under ASGI Django reads the whole body before it calls a view: with it or without, nothing gets lost."""

    name = "Django, uvicorn"
    exit_status = -signal.SIGTERM

    def command(self, at: At) -> Command:
        kind = "lingerx.uvicorn:AutoHTTPProtocol" if at.lingering else "auto"
        return [sys.executable, "-c", IMPORTS + UVICORN, str(at.port), kind]

    def test_it_reads_to_the_end_by_itself(self, loopback: Link) -> None:
        for lingering in (True, False):
            with self.serve(loopback, lingering=lingering) as served:
                assert uploads(served, "raw", 5) == 5 * [GOOD]


# FastAPI --------------------------------------------------------------------------------------------------


class FastApi(Server):
    packages: tuple[str, ...] = ("fastapi", "starlette")

    def page(self, answer: int) -> bytes:
        return b"Nothing can be uploaded here.\n" * 35_000


class TestFastApiByUvicorn(FastApi, RefusedUploads):
    """From the command line, with whatever parser and event loop are there."""

    uploads = FEWER_UPLOADS

    name = "FastAPI, uvicorn"
    packages = ("fastapi", "starlette", "uvicorn", "h11", "httptools", "uvloop")
    exit_status = -signal.SIGTERM
    protocol = "lingerx.uvicorn:AutoHTTPProtocol"

    def command(self, at: At) -> Command:
        kind = self.protocol if at.lingering else "auto"
        words = ["--http", kind, "--port", str(at.port), "--no-access-log", "--app-dir", str(EXAMPLES)]
        return [sys.executable, "-m", "uvicorn", *words, "fastapi_app:app"]


class TestFastApiWithItsOwnPolicy(TestFastApiByUvicorn):
    """The class in the example."""

    name, protocol = "FastAPI, uvicorn, policy", "fastapi_app:Protocol"
    test_without_the_adapter_answers_are_lost = None  # type: ignore[assignment]
    test_sigterm_with_lingering_connections_in_flight = None  # type: ignore[assignment]


HYPERCORN = """
import asyncio
import hypercorn.asyncio, hypercorn.config, lingerx.hypercorn
from fastapi_app import app
kind = lingerx.hypercorn.Config if sys.argv[2] == "True" else hypercorn.config.Config
asyncio.run(hypercorn.asyncio.serve(app, kind.from_mapping(bind=f"127.0.0.1:{sys.argv[1]}", errorlog=None)))
"""


class TestFastApiByHypercorn(FastApi, RefusedUploads):
    """hypercorn.asyncio.serve with lingerx's Config or hypercorn's own."""

    uploads = FEWER_UPLOADS

    name = "FastAPI, hypercorn"
    packages = ("fastapi", "starlette", "hypercorn", "h11")

    def command(self, at: At) -> Command:
        return [sys.executable, "-c", IMPORTS + HYPERCORN, str(at.port), str(at.lingering)]
