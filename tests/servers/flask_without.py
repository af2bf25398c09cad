"""The app of examples/flask_app.py without lingerx's middleware; run as a program, by Flask's development server."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
app = import_module("flask_app").app
app.wsgi_app = app.wsgi_app.app

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app.run(port=int(sys.argv[1]))
