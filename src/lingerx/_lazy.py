"""What `lingerx` has without having imported it: the adapters, and LingerSSLSocket, when they are asked for.

So `lingerx.trio.aclose(stream)` works after `import lingerx`, and who does not ask need not have trio.
"""

from __future__ import annotations

from importlib import import_module

ADAPTERS = {
    *("anyio", "asyncio", "cheroot", "gevent", "gunicorn", "hypercorn"),
    *("prometheus", "socketserver", "trio", "twisted", "uvicorn", "wsgi"),
}


def __getattr__(name: str) -> object:
    if name in ADAPTERS:
        try:
            return import_module(f"{__package__}.{name}")
        except ImportError as missing:  # so that hasattr() says no
            raise AttributeError(f"module {__package__!r} has no attribute {name!r}: {missing}") from missing
    if name == "LingerSSLSocket":
        from .listener import LingerSSLSocket

        return LingerSSLSocket
    raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
