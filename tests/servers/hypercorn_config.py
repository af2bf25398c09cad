"""A configuration module for the command line: `hypercorn -c python:servers.hypercorn_config servers.apps:asgi`.

What it says is told by the environment, in JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "LINGERX_TEST_HYPERCORN"
"""{"lingering": whether, "settings": {name of hypercorn: value}}"""

_told: dict[str, Any] = json.loads(os.environ.get(VARIABLE, "{}"))
globals().update(_told.get("settings", {}))

if _told.get("lingering"):
    from lingerx.hypercorn import Config

    create_sockets = Config.from_mapping(_told["settings"]).create_sockets
