"""A Django project in one file whose view refuses uploads: every client gets the whole refusal.

    gunicorn -k lingerx.gunicorn.SyncWorker --chdir examples --bind 127.0.0.1:8413 django_app:application
    python examples/django_app.py 8413

The view answers without a look at the body, while the client is still sending. Only the worker's class, or `server_cls`
of the command `runserver` below, says that lingerx is there. SIGTERM ends both; three more seconds for connections in
flight.
"""

from __future__ import annotations

import signal
import sys

from django.conf import settings
from django.core.management import call_command
from django.core.management.commands import runserver
from django.core.servers.basehttp import WSGIServer
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

import lingerx
from lingerx.socketserver import LingeringMixIn

# No more than the kernel takes at once: a client that sends everything before it reads would block a bigger write.
PAGE = b"Nothing can be uploaded here.\n" * 35_000


def upload(request: HttpRequest) -> HttpResponse:
    return HttpResponse(PAGE, status=413, content_type="text/plain")


class Server(LingeringMixIn, WSGIServer):
    policy = lingerx.Drain(timeout=30.0, idle_timeout=5.0)


class Command(runserver.Command):
    """In a project: management/commands/runserver.py of an app."""

    server_cls = Server


urlpatterns = [path("upload", upload)]
settings.configure(
    SECRET_KEY="of an example",
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    ROOT_URLCONF=__name__,
)
application = get_wsgi_application()

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    call_command(Command(), f"127.0.0.1:{sys.argv[1]}", use_reloader=False, skip_checks=True)
