"""A Flask app that refuses uploads that are too long: every client gets the whole refusal.

    gunicorn -k lingerx.gunicorn.SyncWorker --chdir examples --bind 127.0.0.1:8413 flask_app:app
    flask --app examples/flask_app.py run -p 8413
    python examples/flask_app.py 8413

Flask compares the announced length with MAX_CONTENT_LENGTH and answers, while the client is still sending the body that
nobody will read. For gunicorn the worker's class makes the connection linger, for Werkzeug's development server the
middleware. SIGTERM ends them; three more seconds for connections in flight, but none with `flask run`.
"""

from __future__ import annotations

import signal
import sys

from flask import Flask, request

import lingerx
from lingerx.wsgi import LingeringMiddleware

# No more than the kernel takes at once: a client that sends everything before it reads would block a bigger write.
PAGE = "Nothing so long can be uploaded here.\n" * 28_000

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 1 << 20


@app.post("/upload")
def upload() -> str:
    return f"{len(request.get_data())} bytes\n"  # 413, if that is too long


@app.errorhandler(413)
def refuse(error: Exception) -> tuple[str, int, dict[str, str]]:
    return PAGE, 413, {"Content-Type": "text/plain"}


# For the development server. With a worker of lingerx it has nothing to do.
policy = lingerx.Drain(timeout=30.0, idle_timeout=5.0)
app.wsgi_app = LingeringMiddleware(app.wsgi_app, policy=policy)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app.run(port=int(sys.argv[1]))
