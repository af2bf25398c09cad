"""`python -m lingerx` and the command `lingerx`: the way to `lingerx.cli`, whose libraries are an extra."""

from __future__ import annotations

import sys

NEEDED = ("click", "rich")  # what the extra `cli` installs
USAGE_ERROR = 2  # the exit status that click gives too when a command line cannot be run


def main() -> int:
    """Run the command line and end the process; returns an exit status only when the extra is missing."""
    try:
        from lingerx.cli import cli
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in NEEDED:
            raise
        print(
            f"lingerx: the command line needs {' and '.join(NEEDED)} ({missing.name} is not installed): "
            "pip install 'lingerx[cli]'",
            file=sys.stderr,
        )
        return USAGE_ERROR
    cli(prog_name="lingerx")
    return 0


if __name__ == "__main__":
    sys.exit(main())
