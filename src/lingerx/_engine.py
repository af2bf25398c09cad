"""Picks one of the two engines. What an engine offers is written down in `_offers`.

``LINGERX_ENGINE=native`` or ``LINGERX_ENGINE=portable`` forces one and raises ImportError when it is missing.
Without the variable the native engine is taken where it was built. Nothing else may live here.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType


def _pick(wanted: str | None) -> tuple[str, ModuleType]:
    if wanted not in (None, "", "native", "portable"):
        raise ImportError(f"LINGERX_ENGINE is 'native' or 'portable'; got {wanted!r}")
    if wanted == "portable":
        return "portable", import_module("lingerx._portable")
    try:
        return "native", import_module("lingerx._native")
    except ModuleNotFoundError as missing:
        if missing.name != "lingerx._native":
            raise
        if wanted == "native":
            raise ImportError(
                "LINGERX_ENGINE=native, but this lingerx was installed without its compiled engine: install it "
                "where a C compiler is (and without LINGERX_BUILD=portable), or unset LINGERX_ENGINE"
            ) from missing
    return "portable", import_module("lingerx._portable")


engine, _module = _pick(os.environ.get("LINGERX_ENGINE"))
"""Which engine runs: "native" or "portable"."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._offers import Loop as Loop
    from ._offers import abort as abort
    from ._offers import close as close
    from ._offers import close_all as close_all
    from ._offers import close_fd as close_fd
    from ._offers import get_linger as get_linger
    from ._offers import send_and_close as send_and_close
    from ._offers import set_linger as set_linger
    from ._offers import tcp_status as tcp_status
else:
    abort = _module.abort
    close = _module.close
    close_all = _module.close_all
    close_fd = _module.close_fd
    get_linger = _module.get_linger
    send_and_close = _module.send_and_close
    set_linger = _module.set_linger
    tcp_status = _module.tcp_status
    Loop = _module.Loop
